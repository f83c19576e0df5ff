"""Find a learning rate: train with a rate that rises at each step, and see where the loss falls fastest.

    python src/find_lr.py                                           # today's settings
    python src/find_lr.py -S model_name=squeezenet -S head.kind=concat_pool
    python src/find_lr.py -S backbone.trainable=all --group backbone           # the head's rate stays lr
    python src/find_lr.py -S backbone.trainable=all -S backbone.unfreeze_epoch=2 --epoch 2     # after the thawing

Writes results/find_lr.png and results/find_lr.json, and prints the command with the rate that it suggests. The model is
a copy: no checkpoint, experiment or setting changes. Needs data/prepared (`dvc repro prepare`).

Leslie Smith 2015, arXiv:1506.01186; the smoothing and where it stops as in fastai.
"""

import functools
import itertools
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path

from finetune import (
    augment,
    backbones,
    device,
    images,
    layers,
    lr_range,
    metrics,
    optim,
    params,
    stage,
    training,
)
from finetune.datasets import check_num_classes
from finetune.errors import UserError
from finetune.files import replaced

import torch
from tqdm import tqdm

OUTPUT = Path("results/find_lr")


def main() -> None:
    parser = params.parser(__doc__)
    parser.add_argument("--group", default="all", help="whose rate rises: all (default), head, backbone, or a block")
    parser.add_argument("--epoch", type=int, default=0, help="train so many epochs first, as the run would (default 0)")
    parser.add_argument("--steps", type=int, default=100, help="of the rising rate (default 100)")
    parser.add_argument("--low", type=float, default=1e-6, help="rate of the first step (default 1e-6)")
    parser.add_argument("--high", type=float, default=10.0, help="rate of the last step (default 10)")
    arguments = parser.parse_args()
    settings = params.load(changes=arguments.changes)
    if not (0 < arguments.low < arguments.high < math.inf and arguments.steps >= 20):
        raise UserError("--low must be above 0 and below --high, and --steps 20 or more.")
    if not 0 <= arguments.epoch < settings.num_epochs:
        raise UserError(f"--epoch is {arguments.epoch}: it must be 0 to {settings.num_epochs - 1}, below num_epochs.")
    store = images.ImageStore("data/prepared")
    images.check_settings(store.manifest, settings.data)
    check_num_classes(settings.num_classes, store.classes, settings.data.source)
    device.make_deterministic()
    device.keep_freed_memory()

    tensors, backbone = weights(settings, any(each.startswith("backbone.weights=") for each in arguments.changes))
    model, groups = backbones.fine_tuned(settings, tensors, backbone["missing"])
    model.to(device.choose(settings.device))
    chosen = lr_range.chosen_groups(groups, arguments.group, arguments.epoch)
    normalization = store.manifest if settings.augment.normalize == "data" else backbone
    normalize = functools.partial(augment.normalize, mean=normalization["mean"], std=normalization["std"])
    objective = training.objective(settings, store.labels[store.indices("train")], next(model.parameters()).device)
    optimizer = optim.optimizer(model, groups, settings.optimizer, settings.lr, settings.momentum)
    rates = lr_range.rising(arguments.low, arguments.high, arguments.steps)
    shares = {group.name: group.lr_scale / chosen[0].lr_scale for group in chosen}
    try:
        train_first(model, groups, optimizer, store, settings, normalize, objective, arguments.epoch)
        layers.thaw(model, groups, arguments.epoch)
        layers.train_mode(model, settings.backbone.batch_norm)
        batches = forever(store, settings, arguments.epoch)
        with tqdm(total=len(rates), desc="find_lr", disable=None) as bar:
            losses = lr_range.losses(model, optimizer, rates, shares, batches, normalize, objective, bar)
    except FloatingPointError as error:
        raise training.diverged(str(error), settings.lr, "Nothing was written.") from None
    except (torch.OutOfMemoryError, ValueError) as error:  # the latter from batch norm
        raise training.batch_does_not_fit(error, settings.batch_size, settings.data.image_size) from None
    found = lr_range.suggestion(rates[: len(losses)], losses)
    write(found, arguments.group, chosen[0].name)
    print(f"steepest descent at {found.steepest:.2g}, safer {found.safer:.2g}: {OUTPUT}.png, {OUTPUT}.json")
    others = arguments.group != "all" and any(group.thaws is not None and group not in chosen for group in groups)
    print(command(arguments.changes, suggested(settings, found.steepest, chosen[0], others)))


def weights(settings: params.Params, other: bool) -> tuple[dict, dict]:
    """Return the pretrained tensors and what is to be known of them: those of the workspace, or `other` ones anew."""
    file = Path("models/backbone.safetensors")
    if file.exists() and not other:
        tensors, about = backbones.read(file)
        if about["model_name"] == backbones.canonical_name(settings.model_name):
            return tensors, about
    return backbones.pretrained(settings.model_name, settings.backbone.weights)[:2]


def train_first(
    model: torch.nn.Module,
    groups: list[layers.Group],
    optimizer: torch.optim.Optimizer,
    store: images.ImageStore,
    settings: params.Params,
    normalize,
    objective: training.Objective,
    epochs: int,
) -> None:
    """Train as the run does in its first epochs. The learning rates are as they were, whatever the schedule."""
    rates = optim.rates(optimizer)
    val_labels = store.labels[store.indices("val")]
    steps = len(training.slices(len(store.indices("train")), settings.batch_size))
    schedule = optim.LearningRate(optimizer, settings.schedule, settings.num_epochs, steps)
    for epoch in range(epochs):
        layers.thaw(model, groups, epoch)
        layers.train_mode(model, settings.backbone.batch_norm)
        sums = training.Sums(next(model.parameters()).device, epoch, {})
        batches = training.training_batches(store, settings, epoch)
        with tqdm(total=steps, desc=f"epoch {epoch + 1}/{epochs}, before", disable=None) as bar:
            training.train_epoch(model, optimizer, schedule, batches, normalize, objective, sums, bar)
        val = training.plain_batches(store, "val", settings.data.image_size)
        schedule.after_epoch(float(metrics.cross_entropy(training.predict(model, val, normalize), val_labels).mean()))
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


def forever(store: images.ImageStore, settings: params.Params, epoch: int) -> Iterator[training.Batch]:
    """Yield the batches of that epoch, and of all after it."""
    return itertools.chain.from_iterable(training.training_batches(store, settings, e) for e in itertools.count(epoch))


def write(found: lr_range.Suggestion, group: str, first: str) -> None:
    """Write the numbers and the plot; `first` is the block whose rate it is, the nearest to the head."""
    numbers = {
        "group": group,
        "steepest": found.steepest,
        "safer": found.safer,
        "lr": found.rates,
        "loss": found.losses,
        "smoothed": found.smoothed,
    }
    with replaced(OUTPUT.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2) + "\n")
    with replaced(OUTPUT.with_suffix(".png")) as temporary:
        lr_range.plot(found, "learning rate" if group == "all" else f"learning rate of {first}", temporary)


def suggested(settings: params.Params, rate: float, first: layers.Group, others: bool) -> dict[str, float]:
    """Return the settings that give the group `first` that rate; `others`, which were not chosen, keep theirs."""
    change = rate / (settings.lr * first.lr_scale)
    if first.name != "head":
        return {"optimizer.backbone_lr_scale": settings.optimizer.backbone_lr_scale * change}
    kept = {"optimizer.backbone_lr_scale": settings.optimizer.backbone_lr_scale / change} if others else {}
    return {"lr": rate} | kept


def command(changes: list[str], suggested: dict[str, float]) -> str:
    """Return the command of an experiment with these changes, as `-S` has them, and what was suggested."""
    kept = [change for change in changes if change.partition("=")[0] not in suggested]
    options = [*kept, *(f"{key}={value:.2g}" for key, value in suggested.items())]
    return shlex.join(["dvc", "exp", "run", *(word for option in options for word in ("-S", option))])


if __name__ == "__main__":
    stage.run(main)
