"""The epoch loop: batches from the store, a pass that trains, a pass that predicts."""

from collections.abc import Callable, Iterable, Iterator

from finetune import augment
from finetune.errors import UserError
from finetune.images import ImageStore

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = tuple[Tensor, np.ndarray]  # pictures [n, 3, size, size] uint8, and their labels [n] int64


def slices(count: int, batch_size: int) -> list[slice]:
    """Return the parts of range(count) that are the batches.

    A last batch of one picture joins the one before: batch norm can't train on a single one.
    """
    starts = list(range(0, count, batch_size))
    if batch_size > 1 and len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def training_batches(
    store: ImageStore, seed: int, epoch: int, batch_size: int, image_size: int, min_scale: float, first: int = 0
) -> Iterator[Batch]:
    """Yield the epoch's training pictures, shuffled and augmented: random resized crop and horizontal flip.

    From the batch `first` on. Before each, torch's generator is seeded for its step, so a model's dropout follows from
    (seed, epoch, step), too.
    """
    indices = store.indices("train")
    draws = augment.epoch_draws(seed, epoch, len(indices))
    boxes = augment.random_resized_crops(draws[:, :-1], store.heights[indices], store.widths[indices], min_scale)
    order = augment.epoch_order(seed, epoch, len(indices))
    parts = slices(len(indices), batch_size)
    dropout_seeds = augment.dropout_seeds(seed, epoch, len(parts))
    for part, dropout_seed in list(zip(parts, dropout_seeds, strict=True))[first:]:
        chosen = order[part]
        pictures = augment.crop_resize([store[i] for i in indices[chosen]], boxes[chosen], image_size)
        pictures = augment.horizontal_flip(pictures, draws[chosen, -1])
        torch.manual_seed(dropout_seed)
        yield pictures, store.labels[indices[chosen]]


def plain_batches(store: ImageStore, split: str, image_size: int, batch_size: int = 64) -> Iterator[Batch]:
    """Yield a split's pictures in the store's order, cropped to their middle."""
    indices = store.indices(split)
    boxes = augment.center_crops(store.heights[indices], store.widths[indices], image_size)
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        pictures = augment.crop_resize([store[i] for i in indices[part]], boxes[part], image_size)
        yield pictures, store.labels[indices[part]]


class Sums:
    """Running sums over the pictures of an epoch. They stay on the device: asking for their values waits for it."""

    def __init__(self, device: torch.device, epoch: int, start: dict[str, float]):
        """Begin at what `values` returned once, or at zero where `start` is empty."""
        self.epoch = epoch
        self.steps, self.count = int(start.get("steps", 0)), int(start.get("count", 0))
        number = {"dtype": torch.float64, "device": device}
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
    batches: Iterable[Batch],
    normalize: Callable[[Tensor], Tensor],
    sums: Sums,
    bar: tqdm,
) -> None:
    """Train on each batch once, and add what comes of it to `sums`.

    Whenever `batches` is asked for the next one, the model, the optimizer and the sums have taken in the one before.
    """
    for pictures, labels in batches:
        labels = torch.from_numpy(labels).to(sums.loss.device)
        logits = model(normalize(pictures.to(sums.loss.device)))
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums.add(logits.detach(), labels, loss.detach())
        if bar.update():  # it was drawn
            bar.set_postfix(sums.means(), refresh=False)
    bar.set_postfix(sums.means())


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], normalize: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the logits of all pictures, [n, classes] float32, from the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(normalize(pictures.to(device))).float().cpu() for pictures, _ in batches]).numpy()


def diverged(what: str, lr: float, momentum: float, kept: str) -> UserError:
    """Return the error for a number that is none any more, with the settings to look at and what is `kept`."""
    return UserError(
        f"{what} became NaN or infinite: training diverged. {kept}\n"
        f"Try a smaller lr (now {lr:g}) or momentum (now {momentum:g}), for instance -S lr={lr / 10:g}."
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
