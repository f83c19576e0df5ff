"""Dropout whose random numbers cost less than the layers around it."""

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

LEVELS = 2**16  # of the numbers that are drawn: the probability is rounded to a multiple of 1 / LEVELS


class Dropout(nn.Dropout):
    """torch's dropout, with masks from 16 bits a number instead of 64.

    On 8 feature maps of SqueezeNet, on one core: 1.4 ms instead of 8.7, where the layer behind takes 0.4. The masks
    follow from torch's generator, and are others than torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_torchs = not self.training or round(self.p * LEVELS) in (0, LEVELS) or input.device.type != "cpu"
        return super().forward(input) if is_torchs else drop(input, self.p)


def drop(input: Tensor, p: float) -> Tensor:
    """Return the input with a share `p` of its numbers, not none or all, set to 0 and the others made larger."""
    if has_torch_function_unary(input):  # a mode of torch's is to see it, as it sees torch's own functions
        return handle_torch_function(drop, (input,), input, p)
    dropped = round(p * LEVELS)
    draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: input.numel()] >= dropped - LEVELS // 2
    factors = kept.to(input.dtype).mul_(LEVELS / (LEVELS - dropped))
    # In the order in which the input lies in memory: torch.empty_like tells it.
    strides = torch.empty_like(input, device="meta").stride()
    return input * factors.as_strided(input.shape, strides)


def replace(model: nn.Module) -> None:
    """Have a model use this dropout wherever it has torch's."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
