"""Stage `train`: fine-tune the backbone on the prepared pictures; one experiment, from settings to model.

    dvc exp run -S lr=0.025 -S momentum=0.5 -S num_epochs=2
    dvc exp run -S backbone.trainable=all -S backbone.unfreeze_epoch=2 -S optimizer.backbone_lr_scale=0.1
    dvc exp run -S resume=last -S lr=0.0001      # train on top of the workspace's checkpoint

Each epoch is logged to results/train/ (DVCLive) and saved to the store of checkpoints. A run that was killed goes on
from there, and one that is finished there is not trained again. At the end its checkpoint becomes
models/checkpoint.pt, and its weights models/model.safetensors.
"""

import contextlib
import datetime
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetune import (
    backbones,
    checkpoint,
    cores,
    distributed,
    experiment,
    layers,
    lineage,
    optim,
    params,
    runs,
    stage,
    training,
)
from finetune.errors import explained
from finetune.images import ImageStore

import torch
from dvclive import Live
from tqdm import tqdm

Stopped = Callable[[], signal.Signals | None]


def main() -> None:
    settings = params.load()
    processes = distributed.processes(settings.device)
    if processes > 1:
        distributed.launch(Path(__file__), processes)  # this script in each
        return
    with distributed.ended_together():
        fine_tune(settings)


def fine_tune(settings: params.Params) -> None:
    """Train and write the model, or have a part in that; see finetune.distributed."""
    started = time.perf_counter()
    store = ImageStore(experiment.STORE)
    tensors, backbone = backbones.read(experiment.BACKBONE)
    # What a checkpoint on top of which another run trains must agree in with that one's settings.
    base = {"model_name": backbone["model_name"], "classes": store.classes, "weights": backbone["digest"]}
    parent = lineage.find(settings.resume, base)

    this = experiment.build(settings, store, tensors, backbone)
    say_what_trains(this)
    session = checkpoint.Session(this.model, *this.optimizer(), started=started)
    if parent:
        session.inherit(*parent)
        print(f"on top of {parent[0]}, which has {len(session.history)} epochs")
    epochs = len(session.history) + settings.num_epochs

    origin = {key: session.lineage[-1][key] for key in ("run", "epochs")} if parent else None
    identity = runs.identity(
        settings, store.manifest["files"], store.classes, backbone, [this.device.type, this.precision], origin
    )
    run = runs.Run(runs.store_folder(), runs.run_id(identity))
    about = base | {"run": run.name, "experiment": os.environ.get("DVC_EXP_NAME")}
    if not distributed.is_first():
        return take_part(this, session, run, epochs)
    with run.held(about | {"parent": parent and parent[0], "identity": identity}):
        distributed.begin()
        if settings.resume == "never":
            run.begin_anew()
        go_on(session, run, epochs, settings)
        limit = settings.checkpoint_store_gb * 1e9
        with (
            checkpoint.Writer(run, epochs, about, limit) as writer,
            logged(Path("results/train")) as live,
            cores.shared(runs.scratch() / "cores") as threads,
        ):
            if parent:
                live.summary["continues"] = parent[0]
            for row in session.history:
                log(live, row)
            with stage.deferred_signals() as stopped:
                train(this, session, epochs, writer, live, stopped, threads)
            if settings.keep == "best":
                session.take_best()
                live.summary["best_step"] = session.best["row"]["step"]
        checkpoint.put(run.finish(len(session.history)), Path("models/checkpoint.pt"))
    about_model = {
        "model_name": backbone["model_name"],
        "head": settings.head.model_dump(),
        "classes": store.classes,
        "image_size": settings.data.image_size,
        "resize": store.manifest["resize"],
        "precision": settings.precision,
        "trained": this.trained,
    }
    backbones.write(Path("models/model.safetensors"), this.model.state_dict(), about_model | this.normalization)


def take_part(this: experiment.Experiment, session: checkpoint.Session, run: runs.Run, epochs: int) -> None:
    """Train along with the first process, which writes."""
    distributed.begin()
    go_on(session, run, epochs, this.settings)
    with (
        checkpoint.Writer(run, epochs, {}, 0) as writer,
        cores.shared(runs.scratch() / "cores") as threads,
        stage.deferred_signals() as stopped,
    ):
        train(this, session, epochs, writer, None, stopped, threads)


def say_what_trains(this: experiment.Experiment) -> None:
    """Print the table of what trains."""
    sizes: Counter[str] = Counter()
    for name, parameter in this.model.named_parameters():
        sizes[layers.layer_of(name)] += parameter.numel()
    epochs = this.settings.num_epochs
    trained = [layer for group in this.groups if group.trains_in(epochs - 1) for layer in group.layers]
    print(f"training {sum(sizes[layer] for layer in trained):,} of {sizes.total():,} parameters:")
    print("\n".join(layers.table(this.groups, sizes, this.settings.lr, epochs)))


def go_on(session: checkpoint.Session, run: runs.Run, epochs: int, settings: params.Params) -> None:
    """Take the run up where the store has it, and say so."""
    found = distributed.from_first(checkpoint.newest(run, epochs) if distributed.is_first() else None)
    if not found:
        return
    state, path = found
    session.restore(state)
    done = len(session.history)
    own = session.history[epochs - settings.num_epochs :]
    if done == epochs or training.stopped_early(own, settings.early_stopping):
        print(f"this run is finished, nothing to train: {path}")
    else:
        print(f"going on after {done} epochs and {checkpoint.steps(state)} steps: {path}")


def train(
    this: experiment.Experiment,
    session: checkpoint.Session,
    epochs: int,
    writer: checkpoint.Writer,
    live: Live | None,
    stopped: Stopped,
    threads: Callable[[], int],
) -> None:
    """Train the model until the session has `epochs` epochs, or stops early; log and save each.

    Raises UserError, Interrupted.
    """
    settings, optimizer, schedule, steps = this.settings, session.optimizer, session.schedule, this.steps
    first = epochs - settings.num_epochs  # of this run, on top of another's
    saved = time.monotonic()

    def watched(batches: Iterator[training.Batch], sums: training.Sums) -> Iterator[training.Batch]:
        """Yield the batches; between them, save when it is time to, and stop when asked to."""
        nonlocal saved
        for batch in batches:
            torch.set_num_threads(threads() if this.is_heavy else 1)
            is_late = time.monotonic() - saved > 60 * settings.checkpoint_minutes
            signal_, is_due = distributed.largest(stopped() or 0, is_late)  # all stop after the same batch
            if sums.steps and (signal_ or is_due):
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

    def kept() -> str:
        """Say which checkpoint there is, once all that are good are written."""
        with contextlib.suppress(FloatingPointError):
            writer.wait()
        found = writer.run.checkpoints()
        return f"The last good checkpoint is kept: {found[-1].path}" if found else "No epoch was complete."

    with training.errors_explained(settings, kept):
        while len(session.history) < epochs:
            epoch = len(session.history)
            if training.stopped_early(session.history[first:], settings.early_stopping):
                print(f"stopped early: val_loss is not lower since {settings.early_stopping.patience} epochs")
                break
            sums = training.Sums(this.device, epoch, session.sums)
            if not sums.steps:
                session.rates = optim.rates(optimizer)
            this.begin_epoch(epoch - first)
            batches = watched(this.training_batches(epoch, first=sums.steps), sums)
            with tqdm(total=steps, initial=sums.steps, desc=f"epoch {epoch + 1}/{epochs}", disable=None) as bar:
                this.train_epoch(optimizer, schedule, batches, sums, bar)
            total, what = len(this.store.indices("val")), f"epoch {epoch + 1}/{epochs}, validation"
            batches = counted(this.val_batches(), total, what)
            if distributed.size() == 1:  # of several processes, each may have another number of them
                batches = watched(batches, sums)
            val_loss, val_acc = this.validate(batches)
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"the loss in the validation after epoch {epoch + 1}")

            means = sums.means()
            row = {
                "step": epoch,
                "acc": means["acc"],
                "loss": means["loss"],
                "training_time": session.elapsed(),  # seconds, since the run began
                "val_acc": val_acc,
                "val_loss": val_loss,
                "lr": session.rates,
            }
            session.history = [*session.history, row]
            session.sums = {}
            schedule.after_epoch(val_loss)
            if settings.keep == "best":
                session.keep_if_best()
            writer.save(session)
            saved = time.monotonic()
            if live:
                log(live, row)
            tqdm.write(
                f"epoch {epoch + 1}/{epochs}: loss {row['loss']:.4f}  acc {row['acc']:.4f}  "
                f"val_loss {row['val_loss']:.4f}  val_acc {row['val_acc']:.4f}  "
                f"{row['training_time']:.1f} s{time_left(session.history, epochs)}"
            )
        writer.wait()


def counted(batches: Iterator[training.Batch], pictures: int, what: str) -> Iterator[training.Batch]:
    """Yield the batches, and show on a terminal how far they are, where that takes a while."""
    with tqdm(total=pictures, desc=what, unit=" pictures", delay=2, leave=False, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.labels))


def time_left(history: Sequence[dict], epochs: int) -> str:
    """Return how long the epochs to come take if each does as the last one did; '' of a moment."""
    before, last = [0.0, *(row["training_time"] for row in history)][-2:]
    seconds = round((last - before) * (epochs - len(history)))
    return f", about {datetime.timedelta(seconds=seconds)} left" if seconds >= 2 else ""


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
        if name not in ("step", "lr"):
            live.log_metric(name, value)
    head, *others = row["lr"].items()
    live.log_metric("lr", head[1])
    for name, rate in others:
        live.log_metric(f"lr_of/{name}", rate)
    # Curves alone: as a metric, `lr` would have `dvc exp show` rename the column of the parameter.
    del live.summary["lr"]
    live.summary.pop("lr_of", None)
    live.make_summary()


if __name__ == "__main__":
    stage.run(main)
