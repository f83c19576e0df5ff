"""What saving costs: seconds per epoch with checkpoints written beside the training, before it goes on, and not at all.

    python benchmarks/checkpoints.py    # about eight minutes on 2 cores; needs neither pictures nor weights

SqueezeNet with a frozen trunk and AlexNet fully fine-tuned, on drawn pictures of 224 px, from random weights. The three
ways take turns, two epochs each; what is printed are medians, and ratios to the epochs without saving.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

from finetune import (
    augment,
    backbones,
    checkpoint,
    datasets,
    decoding,
    device,
    images,
    inference,
    layers,
    optim,
    params,
    runs,
    sources,
    training,
)

import torch
from tqdm import tqdm

CASES = {"SqueezeNet, frozen": ("squeezenet", "head"), "AlexNet, full": ("alexnet", "all")}
WAYS = ("none", "before", "beside")
SIZE = 224
BLOCK = 2  # epochs with a checkpoint each, the last one's writing included


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed blocks of each way")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    place = device.choose(arguments.device)
    device.make_deterministic()
    device.keep_freed_memory()
    print(f"{place}, {torch.get_num_threads()} threads; seconds an epoch, and their ratios to saving none")
    ways = "".join(f"{way:>9}" for way in WAYS)
    print(f"{'case':20}{'checkpoint':>10} {ways} {ways}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = draw(Path(folder))
        for name, (model_name, trainable) in CASES.items():
            megabytes, seconds = measure(Path(folder) / name, store, model_name, trainable, arguments.rounds, place)
            medians = [statistics.median(seconds[way]) for way in WAYS]
            times = "".join(f"{each:9.2f}" for each in medians)
            ratios = "".join(f"{each / medians[0]:9.3f}" for each in medians)
            print(f"{name:20}{megabytes:7.1f} MB {times} {ratios}", flush=True)


def draw(folder: Path) -> images.ImageStore:
    """Return a store of 244 drawn pictures to train and 152 to validate, about as many as the ants and bees."""
    recipe = sources.DrawnRecipe(drawn=["ants", "bees"], train=122, val=76, size=SIZE, seed=0)
    sources.draw(recipe, folder / "pictures")
    dataset = datasets.read(folder / "pictures", "drawn")
    shards = images.write_shards(dataset.pictures, folder / "store", lambda data: decoding.decode(data, resize=SIZE))
    images.write_manifest(folder / "store", dataset, shards, "drawn", SIZE)
    return images.ImageStore(folder / "store")


def measure(
    folder: Path, store: images.ImageStore, model_name: str, trainable: str, rounds: int, place: torch.device
) -> tuple[float, dict[str, list[float]]]:
    """Return the size of a checkpoint, in MB, and the seconds an epoch of each timed block of each way of saving."""
    changes = [f"model_name={model_name}", f"backbone.trainable={trainable}", "lr=0.0001", "momentum=0.9"]
    settings = params.load(ROOT / "params.yaml", [*changes, f"data.image_size={SIZE}"])
    model, groups = backbones.fine_tuned(settings, {}, missing=[])
    model.to(place)
    layers.thaw(model, groups, epoch=0)
    optimizer = optim.optimizer(model, groups, settings.optimizer, settings.lr, settings.momentum)
    schedule = optim.LearningRate(optimizer, settings.schedule, num_epochs=1, steps=1)
    session = checkpoint.Session(model, optimizer, schedule)
    run = runs.Run(folder, "0" * 16)
    writer = checkpoint.Writer(run, 10**4, {"run": run.name}, limit=float("inf"))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):  # the first warms up
        for way in WAYS:
            start = time.perf_counter()
            for _ in range(BLOCK):
                train_epoch(session, store, settings)
                session.history = [*session.history, {"step": len(session.history)}]
                if way != "none":
                    writer.save(session)
                if way == "before":
                    writer.wait()
            writer.wait()
            seconds[way].append((time.perf_counter() - start) / BLOCK)
    return run.bytes / len(run.checkpoints()) / 1e6, {way: times[1:] for way, times in seconds.items()}


def train_epoch(session: checkpoint.Session, store: images.ImageStore, settings: params.Params) -> None:
    """Train and validate as the stage does."""
    layers.train_mode(session.model)
    place = next(session.model.parameters()).device
    batches = training.training_batches(store, settings, len(session.history))
    objective, sums = training.Objective(settings.num_classes), training.Sums(place, len(session.history), {})
    with tqdm(disable=True) as bar:
        training.train_epoch(
            session.model, session.optimizer, session.schedule, batches, normalize, objective, sums, bar
        )
    inference.predict(session.model, training.plain_batches(store, "val", SIZE, device.LOT[place.type]), normalize)


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    return augment.normalize(pictures, backbones.IMAGENET_MEAN, backbones.IMAGENET_STD)


if __name__ == "__main__":
    main()
