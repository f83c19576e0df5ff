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
    store: ImageStore, seed: int, epoch: int, batch_size: int, image_size: int, min_scale: float
) -> Iterator[Batch]:
    """Yield the epoch's training pictures, shuffled and augmented: random resized crop and horizontal flip."""
    indices = store.indices("train")
    draws = augment.epoch_draws(seed, epoch, len(indices))
    boxes = augment.random_resized_crops(draws[:, :-1], store.heights[indices], store.widths[indices], min_scale)
    order = augment.epoch_order(seed, epoch, len(indices))
    for part in slices(len(indices), batch_size):
        chosen = order[part]
        pictures = augment.crop_resize([store[i] for i in indices[chosen]], boxes[chosen], image_size)
        yield augment.horizontal_flip(pictures, draws[chosen, -1]), store.labels[indices[chosen]]


def plain_batches(store: ImageStore, split: str, image_size: int, batch_size: int = 64) -> Iterator[Batch]:
    """Yield a split's pictures in the store's order, cropped to their middle."""
    indices = store.indices(split)
    boxes = augment.center_crops(store.heights[indices], store.widths[indices], image_size)
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        pictures = augment.crop_resize([store[i] for i in indices[part]], boxes[part], image_size)
        yield pictures, store.labels[indices[part]]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    normalize: Callable[[Tensor], Tensor],
    bar: tqdm,
) -> tuple[float, float]:
    """Train on each batch once; return mean loss (nats) and accuracy over the pictures, as seen while training.

    Raises FloatingPointError with the step (from 0) from which on the loss was not a number.
    """
    device = next(model.parameters()).device
    # Sums stay on the device: asking for their values would wait for it at every step.
    loss_sum, hits, finite_steps = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    count = 0

    def means() -> dict[str, float]:
        if not loss_sum.isfinite():  # and never again
            raise FloatingPointError(int(finite_steps))
        return {"loss": float(loss_sum) / count, "acc": float(hits) / count}

    for pictures, labels in batches:
        labels = torch.from_numpy(labels).to(device)
        logits = model(normalize(pictures.to(device)))
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count += len(labels)
        loss_sum += loss.detach() * len(labels)
        hits += (logits.detach().argmax(1) == labels).sum()
        finite_steps += loss_sum.isfinite()
        if bar.update():  # it was drawn
            bar.set_postfix(means(), refresh=False)
    result = means()
    bar.set_postfix(result)
    return result["loss"], result["acc"]


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], normalize: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the logits of all pictures, [n, classes] float32, from the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(normalize(pictures.to(device))).float().cpu() for pictures, _ in batches]).numpy()


def diverged(epoch: int, step: int | None, lr: float, momentum: float) -> UserError:
    """Return the error for a loss that is no number any more, with the settings to look at."""
    where = f"epoch {epoch}, step {step}" if step is not None else f"the validation after epoch {epoch}"
    return UserError(
        f"the loss became NaN or infinite in {where}: training diverged.\n"
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
