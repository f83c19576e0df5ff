"""Which part of a picture spoke for a class: Grad-CAM, Selvaraju et al. 2017, arXiv:1610.02391."""

import threading
from collections.abc import Callable
from typing import Any

from finetune import heads
from finetune.inference import side_by_side
from finetune.layers import is_in

import numpy as np
import torch
from torch import Tensor, nn

LOT = 4  # pictures at a time, on one thread
POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def map_layer(network: nn.Module, image: Tensor) -> str | None:
    """Return the name of the last layer before the head that puts out feature maps, other than by pooling them.

    None where the network has none of more than one pixel, or goes on from them with tokens, as a vision transformer
    does from its patches. `image` is [1, 3, size, size] as the network expects it; it is in evaluation mode.
    """
    head, seen, pooled, is_over = heads.head_layers(network), [], [], False

    def note(name: str) -> Callable:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            nonlocal is_over
            is_over = is_over or any(is_in(name, each) for each in head)
            if is_over or not isinstance(output, Tensor) or len(output) != 1:
                return
            if isinstance(layer, POOLING):
                pooled.append(output)
            if not any(output is each for each in pooled):  # a container's output is its last layer's
                seen.append((name, output.shape))

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in network.named_modules() if name]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    places = [place for place, (_, shape) in enumerate(seen) if heads.is_map(shape) and shape[2] > 1]
    after = [shape for _, shape in seen[places[-1] :]] if places else []
    if not places or any(map(_is_of_tokens, after)):
        return None
    return seen[places[-1]][0]


def heat_maps(
    network: nn.Module,
    layer: str,
    pictures: Tensor,
    classes: np.ndarray,
    inputs_of: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """Return how much each part of the pictures speaks for a class of each: [n, rows, columns], from 0 to 1.

    The layer's maps, weighted by their mean gradients; what speaks against it counts as 0. Where nothing speaks for it,
    all are 0. No bit depends on the number of threads. `inputs_of` makes of pictures what the network takes; none of
    the network's parameters may require gradients.
    """
    place = pictures.device
    maps: dict[int, Tensor] = {}  # by the thread that computes them

    def cut(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        maps[threading.get_ident()] = start = output.detach().requires_grad_()
        return start.clone()  # which the next layer may change in place

    def of_lot(rows: slice) -> Tensor:
        inputs = inputs_of(pictures[rows])
        chosen = torch.tensor(classes[rows], device=place)
        with torch.enable_grad():
            logits = network(inputs)
            start = maps.pop(threading.get_ident())
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), start)
        speaks = (gradient.mean(dim=(2, 3), keepdim=True) * start.detach()).sum(dim=1).relu()
        return speaks / speaks.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(speaks.dtype).tiny)

    lots = [slice(start, start + LOT) for start in range(0, len(pictures), LOT)]
    hook = network.get_submodule(layer).register_forward_hook(cut)
    try:
        return torch.cat([each.cpu() for each in side_by_side(of_lot, lots, place)]).numpy()
    finally:
        hook.remove()


def _is_of_tokens(shape: torch.Size) -> bool:
    """Tell whether it is the shape of tokens [1, n, width], or of [1, side, side, width], more than one of them."""
    return len(shape) == 3 or (len(shape) == 4 and shape[1] > 1 and not heads.is_map(shape))
