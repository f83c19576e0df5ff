"""The epoch loop: what a step minimises, batches from the store, a pass that trains."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune import augment, device, distributed, optim
from finetune.errors import UserError
from finetune.images import ImageStore
from finetune.params import EarlyStopping, Params

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm


class Batch(NamedTuple):
    """What a network, or the part of it that trains, takes in; and what goes with it."""

    # [n, 3, size, size] uint8 pictures; or [n, …] features of them, as the frozen part returned them. Where several
    # processes train together, this one's share of the n, see finetune.distributed.
    inputs: Tensor
    labels: np.ndarray  # [n] int64
    mixup: np.ndarray | None = None  # [n], the share of itself that each picture keeps; None: it stays alone


@dataclass(frozen=True)
class Objective:
    """What a step minimises: cross-entropy, but for the penalties of the weights, which are the optimizer's."""

    num_classes: int
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None  # [classes], on the model's device; None: all alike
    grad_clip: float = 0.0  # largest norm of its gradient; 0: any

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch; `targets` are labels [n], or probabilities [n, classes]."""
        return functional.cross_entropy(
            logits, targets, weight=self.class_weights, label_smoothing=self.label_smoothing
        )


def objective(settings: Params, labels: np.ndarray, device: torch.device) -> Objective:
    """Return the objective of these settings; `labels` are those of the training pictures."""
    weights = None
    if settings.data.balance == "loss":
        counts = np.bincount(labels, minlength=settings.num_classes).clip(1)  # one without pictures weighs in no batch
        weights = torch.tensor(len(labels) / (settings.num_classes * counts), dtype=torch.float32, device=device)
    return Objective(settings.num_classes, settings.optimizer.label_smoothing, weights, settings.optimizer.grad_clip)


# Batches --------------------------------------------------------------------------------------------------------------


def slices(count: int, batch_size: int) -> list[slice]:
    """Return the parts of range(count) that are the batches.

    A last batch of one picture joins the one before: batch norm can't train on a single one.
    """
    starts = list(range(0, count, batch_size))
    if batch_size > 1 and len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def epoch_order(seed: int, epoch: int, labels: np.ndarray, balanced: bool) -> np.ndarray:
    """Return the positions in `labels` that the epoch visits, one after another, as many as there are labels.

    Each once; or `balanced`, so that all classes come equally often (but for a remainder), and the pictures of one
    class, too.
    """
    if not balanced:
        return augment.epoch_order(seed, epoch, len(labels))
    generator = augment.generator(seed, epoch, augment.SAMPLER)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    size, rest = divmod(len(labels), len(classes))
    more = set(generator.permutation(len(classes))[:rest].tolist())
    chosen = []
    for position, members in enumerate(classes):
        number = size + (position in more)
        rounds = [generator.permutation(members) for _ in range(-(-number // len(members)))]
        chosen.append(np.concatenate(rounds)[:number])
    return generator.permutation(np.concatenate(chosen))


def rows_of_draws(order: np.ndarray) -> np.ndarray:
    """Return the row of the epoch's random draws that each entry of the order takes: [n].

    A picture's own; where it comes again, one behind those of all pictures, so that it looks different.
    """
    again = np.ones(len(order), bool)
    again[np.unique(order, return_index=True)[1]] = False
    rows = order.copy()
    rows[again] = len(order) + np.arange(again.sum())
    return rows


@dataclass(frozen=True)
class Visits:
    """An epoch's way through the training pictures. The arrays have an entry for each picture visited, in order."""

    indices: np.ndarray  # in the store
    positions: np.ndarray  # in the training split
    draws: augment.Draws  # its random numbers
    rows: np.ndarray  # of what is kept of the pictures as they look in this epoch
    drawn: dict[str, Any]  # what these looks follow from, beside the pictures; equal for epochs that have the same
    steps: list[slice]  # the batches
    seeds: list[int]  # of torch's generator, for each batch


def visits(settings: Params, store: ImageStore, epoch: int) -> Visits:
    """Return whom the epoch visits. A picture that comes more than once looks different each time.

    With `augment.views`, the looks are those of one of the first epochs, in another order.
    """
    indices = store.indices("train")
    count, seed, views = len(indices), settings.seed, settings.augment.views
    view = epoch % views if views else epoch
    order = augment.epoch_order(seed, epoch, count)
    chosen = own = np.arange(count)
    balanced = settings.data.balance == "sampler"
    if balanced:
        chosen = epoch_order(seed, view, store.labels[indices], balanced)
        own = rows_of_draws(chosen)
        order = order if views else np.arange(count)
    draws = augment.epoch_draws(seed, view, own.max() + 1, settings.augment)
    steps = slices(count, settings.batch_size)
    varies = bool(draws) or balanced  # from epoch to epoch, and not in the order alone
    drawn = settings.augment.drawn() | {"seed": seed, "view": view, "balanced": balanced} if varies else {}
    return Visits(
        indices=indices[chosen[order]],
        positions=chosen[order],
        draws=augment.rows_of(draws, own[order]),
        rows=order if varies else chosen[order],
        drawn=drawn,
        steps=steps,
        seeds=augment.dropout_seeds(seed, epoch, len(steps)),
    )


def augmented(store: ImageStore, settings: Params, visits: Visits, part: slice | np.ndarray) -> Tensor:
    """Return some of the pictures of an epoch, [n, 3, size, size] uint8."""
    own = augment.rows_of(visits.draws, np.arange(len(visits.indices))[part])
    pictures = [store[i] for i in visits.indices[part]]
    return augment.augmented(pictures, own, settings.augment, settings.data.image_size)


def training_batches(store: ImageStore, settings: Params, epoch: int, first: int = 0) -> Iterator[Batch]:
    """Yield the epoch's training pictures, shuffled and augmented, from the batch `first` on.

    Before each batch, torch's generator is seeded for its step, so a model's dropout follows from (seed, epoch, step),
    too.
    """
    visited = visits(settings, store, epoch)
    for part, seed in list(zip(visited.steps, visited.seeds, strict=True))[first:]:
        mixup = visited.draws["mixup"][part] if "mixup" in visited.draws else None
        # A picture is mixed with one that may be another process's.
        pictures = augmented(store, settings, visited, distributed.share(part) if mixup is None else part)
        device.seed(seed)
        yield Batch(pictures, store.labels[visited.indices[part]], mixup)


def plain_batches(store: ImageStore, split: str, image_size: int, batch_size: int) -> Iterator[Batch]:
    """Yield a split's pictures in the store's order, cropped to their middle."""
    indices = store.indices(split)
    indices = indices[distributed.rows(slice(0, len(indices)))]
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield Batch(cropped([store[i] for i in part], image_size), store.labels[part])


def cropped(pictures: Sequence[np.ndarray], image_size: int, crop: int | None = None) -> Tensor:
    """Return [height, width, 3] uint8 pictures cropped to their middle, [n, 3, size, size] uint8.

    Or, with `crop`, to the one of that number of the five of `augment.five_crops`.
    """
    heights, widths = np.array([picture.shape[:2] for picture in pictures]).T
    if crop is None:
        boxes = augment.center_crops(heights, widths, image_size)
    else:
        boxes = augment.five_crops(heights, widths, image_size)[:, crop]
    return augment.crop_resize(pictures, boxes, image_size)


# Passes ---------------------------------------------------------------------------------------------------------------


class Sums:
    """Running sums over the pictures of an epoch. They stay on the device: asking for their values waits for it."""

    def __init__(self, device: torch.device, epoch: int, start: dict[str, float]):
        """Begin at what `values` returned once, or at zero where `start` is empty."""
        self.epoch = epoch
        self.steps, self.count = int(start.get("steps", 0)), int(start.get("count", 0))
        number: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.loss, self.hits = (torch.tensor(start.get(name, 0.0), **number) for name in ("loss", "hits"))
        self.finite_steps = torch.tensor(float(self.steps), **number)

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Take in a batch: logits [n, classes], labels [n], and their mean loss."""
        self.steps += 1
        self.count += len(labels)
        self.loss += loss * len(labels)
        self.hits += (logits.argmax(1) == labels).sum()
        self.finite_steps += self.loss.isfinite()

    def values(self) -> dict[str, float]:
        """Return the sums. Raises FloatingPointError, saying from which step on the loss was not a number."""
        if not self.loss.isfinite():  # and never again
            raise FloatingPointError(f"the loss in epoch {self.epoch + 1}, step {int(self.finite_steps) + 1}")
        return {"steps": self.steps, "count": self.count, "loss": float(self.loss), "hits": float(self.hits)}

    def means(self) -> dict[str, float]:
        """Return loss (nats) and accuracy a picture, as seen while training. Raises FloatingPointError as `values`."""
        sums = self.values()
        return {"loss": sums["loss"] / self.count, "acc": sums["hits"] / self.count}


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: optim.LearningRate,
    batches: Iterable[Batch],
    inputs_of: Callable[[Tensor], Tensor],
    objective: Objective,
    sums: Sums,
    bar: tqdm,
) -> None:
    """Train on each batch once, and add what comes of it to `sums`.

    Whenever `batches` is asked for the next one, the model, the optimizer, the schedule and the sums have taken in the
    one before. `inputs_of` makes of a batch's inputs what the model takes.
    """
    for batch in batches:
        logits, labels, loss = step(model, optimizer, batch, inputs_of, objective)
        schedule.after_step()
        sums.add(logits, labels, loss)
        if bar.update():  # it was drawn
            bar.set_postfix(sums.means(), refresh=False)
    bar.set_postfix(sums.means())


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    inputs_of: Callable[[Tensor], Tensor],
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """Train on a batch; return its logits [n, classes], labels [n] and mean loss, as they were before."""
    logits, labels, loss = forward(model, batch, inputs_of, objective)
    optimizer.zero_grad()
    loss.backward()
    optim.finish_gradients(optimizer, objective.grad_clip)
    optimizer.step()
    return logits.detach(), labels, loss.detach()


def forward(
    model: nn.Module, batch: Batch, inputs_of: Callable[[Tensor], Tensor], objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits [n, classes], labels [n] and mean loss of a batch."""
    place = next(model.parameters()).device
    labels = torch.from_numpy(batch.labels).to(place)
    inputs, targets = inputs_of(batch.inputs.to(place)), labels
    if batch.mixup is not None:
        one_hot = functional.one_hot(labels, objective.num_classes).to(inputs.dtype)
        inputs, targets = augment.mixup(inputs, one_hot, batch.mixup)
        inputs = inputs[distributed.share(slice(0, len(inputs)))]
    logits = distributed.logits(model, inputs, len(labels))
    return logits, labels, objective.loss(logits, targets)


def stopped_early(history: Sequence[dict], settings: EarlyStopping) -> bool:
    """Tell whether the last `patience` epochs of a run had no val_loss lower than all before them by `min_delta`."""
    best, waited = math.inf, 0
    for row in history:
        better = row["val_loss"] < best - settings.min_delta
        best, waited = (row["val_loss"], 0) if better else (best, waited + 1)
    return 0 < settings.patience <= waited


@contextmanager
def errors_explained(settings: Params, kept: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """Raise, for an error of training that the user can mend, a UserError; `kept` says what is, where it diverged."""
    try:
        yield
    except FloatingPointError as error:
        raise diverged(str(error), settings.lr, kept()) from None
    except (torch.OutOfMemoryError, ValueError) as error:  # the latter from batch norm
        raise batch_does_not_fit(error, settings.batch_size, settings.data.image_size) from None


def diverged(what: str, lr: float, kept: str) -> UserError:
    """Return the error for a number that is none any more, with the setting to look at and what is `kept`."""
    return UserError(
        f"{what} became NaN or infinite: training diverged. {kept}\n"
        f"Try a smaller lr (now {lr:g}), for instance -S lr={lr / 10:g}, or see what fits: python src/find_lr.py"
    )


def batch_does_not_fit(error: Exception, batch_size: int, image_size: int) -> Exception:
    """Return the error for a batch that the device's memory or the network's batch norm can't take."""
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "the device's memory is full: " + str(error).partition("\n")[0][:150] + "\n"
            f"Try a smaller batch_size (now {batch_size}) or data.image_size (now {image_size})."
        )
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            f"batch norm can't train on single values: set batch_size (now {batch_size}) to 2 or more,\n"
            f"or a larger data.image_size (now {image_size})."
        )
    return error
