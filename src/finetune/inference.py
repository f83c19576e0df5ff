"""Networks, and parts of them, without gradients: lots of pictures side by side, a thread each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from finetune import device, distributed
from finetune.parallel import parallel_map
from finetune.training import Batch

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")


def as_they_are(inputs: Tensor) -> Tensor:
    """Return inputs that a module takes as they are, such as features."""
    return inputs


@dataclass(frozen=True)
class Inference:
    """A module as a function of up to a lot of inputs, of which each gives the same whatever comes beside it."""

    module: nn.Module
    inputs_of: Callable[[Tensor], Tensor]  # makes of a batch's inputs what the module takes
    place: torch.device

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        # Filled up to a lot: the number of pictures may change a result's last bits.
        whole = torch.arange(device.LOT[self.place.type]).clamp(max=len(inputs) - 1)  # an index keeps channels_last
        filled = inputs[whole] if len(inputs) < len(whole) else inputs
        return self.module(self.inputs_of(filled.to(self.place)))[: len(inputs)]


def side_by_side(function: Callable[[T], R], items: Iterable[T], place: torch.device) -> Iterator[R]:
    """Yield function(item) for each item, in order; several at a time, each on one thread of the processor."""

    def on_one_thread(item: T) -> R:
        torch.set_num_threads(1)  # of this thread's own
        return function(item)

    return parallel_map(on_one_thread, items, device.WORKERS[place.type])


def logits(model: nn.Module, inputs: Iterable[Tensor], inputs_of: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Yield the logits of each lot of inputs, [n, classes] float32 on the CPU, from the model in evaluation mode."""
    model.eval()
    place = next(model.parameters()).device
    for each in side_by_side(Inference(model, inputs_of, place), inputs, place):
        yield each.float().cpu()


def predict(model: nn.Module, batches: Iterable[Batch], inputs_of: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the logits of all pictures, [n, classes] float32, from the model in evaluation mode.

    Where several processes train together, of those of each.
    """
    found = logits(model, (batch.inputs for batch in batches), inputs_of)
    return torch.cat(distributed.joined(list(found))).numpy()
