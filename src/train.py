"""Stage `train`: fine-tune the backbone on the prepared pictures; one experiment, from settings to model.

    dvc exp run -S lr=0.025 -S momentum=0.5 -S num_epochs=2
    dvc exp run -S backbone.trainable=all        # full fine-tuning
    dvc exp run -S resume=last -S lr=0.0001      # train on top of the workspace's checkpoint

Each epoch is logged to results/train/ (DVCLive) and saved to the store of checkpoints. A run that was killed goes on
from there, and one that is finished there is not trained again. At the end its checkpoint becomes
models/checkpoint.pt, and its weights models/model.safetensors.
"""

import contextlib
import functools
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune import augment, backbones, checkpoint, device, lineage, metrics, optim, params, runs, stage, training
from finetune.datasets import check_num_classes, listing
from finetune.errors import explained
from finetune.images import ImageStore

import torch
from dvclive import Live
from tqdm import tqdm

Stopped = Callable[[], signal.Signals | None]


def main() -> None:
    started = time.perf_counter()
    settings = params.load()
    store = ImageStore("data/prepared")
    check_num_classes(settings.num_classes, store.classes, store.manifest["source"])
    device.make_deterministic()
    device.keep_freed_memory()
    place = device.choose(settings.device)
    pretrained, backbone = backbones.read(Path("models/backbone.safetensors"))
    # What a checkpoint on top of which another run trains must agree in with that one's settings.
    base = {"model_name": backbone["model_name"], "classes": store.classes, "weights": backbone["digest"]}
    parent = lineage.find(settings.resume, base)

    torch.manual_seed(settings.seed)  # of the layers without pretrained weights
    model = backbones.build(settings.model_name, settings.num_classes, settings.data.image_size)
    backbones.load_tensors(model, pretrained)
    choose_trainable(model, backbone["missing"], settings.backbone.trainable)
    model.to(place)
    optimizer = optim.optimizer(model, settings.lr, settings.momentum)
    schedule = optim.schedule(optimizer, settings.schedule, settings.num_epochs)
    session = checkpoint.Session(model, optimizer, schedule, started=started)
    if parent:
        session.inherit(*parent)
        print(f"on top of {parent[0]}, which has {len(session.history)} epochs")
    epochs = len(session.history) + settings.num_epochs

    origin = {key: session.lineage[-1][key] for key in ("run", "epochs")} if parent else None
    identity = runs.identity(settings, store.manifest["files"], store.classes, backbone, place.type, origin)
    run = runs.Run(runs.store_folder(), runs.run_id(identity))
    about = base | {"run": run.name, "experiment": os.environ.get("DVC_EXP_NAME")}
    with run.held(about | {"parent": parent and parent[0], "identity": identity}):
        if settings.resume == "never":
            run.begin_anew()
        go_on(session, run, epochs)
        limit = settings.checkpoint_store_gb * 1e9
        with checkpoint.Writer(run, epochs, about, limit) as writer, logged(Path("results/train")) as live:
            if parent:
                live.summary["continues"] = parent[0]
            for row in session.history:
                log(live, row)
            with stage.deferred_signals() as stopped:
                train(session, settings, store, backbone, epochs, writer, live, stopped)
        checkpoint.put(run.finish(epochs), Path("models/checkpoint.pt"))
    about_model = {name: backbone[name] for name in ("model_name", "mean", "std")} | {
        "classes": store.classes,
        "image_size": settings.data.image_size,
        "resize": store.manifest["resize"],
    }
    backbones.write(Path("models/model.safetensors"), model.state_dict(), about_model)


def choose_trainable(model: torch.nn.Module, missing: list[str], trainable: str) -> None:
    """Freeze what does not train, and say what does."""
    head = backbones.head_name(model)
    chosen = backbones.trainable_layers(backbones.layers(model), head, missing, trainable)
    backbones.freeze(model, chosen)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    what = "all layers" if count == total else listing(chosen)
    print(f"training {count:,} of {total:,} parameters: {what}")


def go_on(session: checkpoint.Session, run: runs.Run, epochs: int) -> None:
    """Take the run up where the store has it, and say so."""
    found = checkpoint.newest(run, epochs)
    if not found:
        return
    state, path = found
    session.restore(state)
    done = len(session.history)
    if done == epochs:
        print(f"this run is finished, nothing to train: {path}")
    else:
        print(f"going on after {done} epochs and {checkpoint.steps(state)} steps: {path}")


def train(
    session: checkpoint.Session,
    settings: params.Params,
    store: ImageStore,
    backbone: dict,
    epochs: int,
    writer: checkpoint.Writer,
    live: Live,
    stopped: Stopped,
) -> None:
    """Train the session's model until it has `epochs` epochs; log and save each. Raises UserError, Interrupted."""
    model, optimizer, run = session.model, session.optimizer, writer.run
    place, size = next(model.parameters()).device, settings.data.image_size
    normalize = functools.partial(augment.normalize, mean=backbone["mean"], std=backbone["std"])
    steps = len(training.slices(len(store.indices("train")), settings.batch_size))
    labels = store.labels[store.indices("val")]
    saved = time.monotonic()

    def watched(batches: Iterator[training.Batch], sums: training.Sums) -> Iterator[training.Batch]:
        """Yield the batches; between them, save when it is time to, and stop when asked to."""
        nonlocal saved
        for batch in batches:
            signal_ = stopped()
            if sums.steps and (signal_ or time.monotonic() - saved > 60 * settings.checkpoint_minutes):
                session.sums = sums.values()
                writer.save(session)
                saved = time.monotonic()
            if signal_:
                writer.wait()
                raise stage.Interrupted(
                    signal_,
                    f"stopped in epoch {len(session.history) + 1} of {epochs} after {sums.steps} of {steps} steps, "
                    "all of them saved.\nThe same command goes on from there (a queued experiment: queue it again).",
                )
            yield batch

    try:
        while len(session.history) < epochs:
            epoch = len(session.history)
            sums = training.Sums(place, epoch, session.sums)
            backbones.train_mode(model)
            batches = training.training_batches(
                store, settings.seed, epoch, settings.batch_size, size, settings.augment.min_scale, first=sums.steps
            )
            with tqdm(total=steps, initial=sums.steps, desc=f"epoch {epoch + 1}/{epochs}", disable=None) as bar:
                training.train_epoch(model, optimizer, watched(batches, sums), normalize, sums, bar)
            batches = watched(training.plain_batches(store, "val", size), sums)
            logits = training.predict(model, batches, normalize)
            val_loss = float(metrics.cross_entropy(logits, labels).mean())
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"the loss in the validation after epoch {epoch + 1}")

            means = sums.means()
            row = {
                "step": epoch,
                "acc": means["acc"],
                "loss": means["loss"],
                "training_time": session.elapsed(),  # seconds, since the run began
                "val_acc": metrics.accuracy(logits, labels),
                "val_loss": val_loss,
                "lr": optimizer.param_groups[0]["lr"],
            }
            session.history = [*session.history, row]
            session.sums = {}
            optim.step(session.schedule, val_loss)
            writer.save(session)
            saved = time.monotonic()
            log(live, row)
            tqdm.write(
                f"epoch {epoch + 1}/{epochs}: loss {row['loss']:.4f}  acc {row['acc']:.4f}  "
                f"val_loss {row['val_loss']:.4f}  val_acc {row['val_acc']:.4f}  {row['training_time']:.1f} s"
            )
        writer.wait()
    except FloatingPointError as error:
        with contextlib.suppress(FloatingPointError):
            writer.wait()
        kept = run.checkpoints()
        last = f"The last good checkpoint is kept: {kept[-1].path}" if kept else "No epoch was complete."
        raise training.diverged(str(error), settings.lr, settings.momentum, last) from None
    except (torch.OutOfMemoryError, ValueError) as error:  # the latter from batch norm
        raise training.batch_does_not_fit(error, settings.batch_size, size) from None


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[Live]:
    """Yield DVCLive's log in the folder. Where it can't be written, none is left rather than half of one."""
    try:
        with Live(str(folder), dvcyaml=None, save_dvc_exp=False) as live:
            yield live
    except OSError as error:
        ours = error.filename is None or Path(error.filename).is_relative_to(folder)
        if ours and explained(error):
            shutil.rmtree(folder, ignore_errors=True)  # the checkpoints have the history: the next run writes it all
            error.filename = str(folder)
        raise


def log(live: Live, row: dict) -> None:
    """Log an epoch to DVCLive."""
    live.step = row["step"]
    for name, value in row.items():
        if name != "step":
            live.log_metric(name, value)
    # A curve alone: as a metric, it would have `dvc exp show` rename the column of the parameter.
    del live.summary["lr"]
    live.make_summary()


if __name__ == "__main__":
    stage.run(main)
