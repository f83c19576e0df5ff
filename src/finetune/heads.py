"""What turns a backbone's features into logits: the network's own last layer, or concat pooling."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from finetune.errors import UserError
from finetune.layers import Tracer, is_in, layers

import torch
from torch import Tensor, fx, nn

NAME = "concat_pool"  # of the head in the network's state dict


class ConcatPool(nn.Sequential):
    """Logits [n, classes] of a feature map [n, channels, height, width]: the head of fastai's vision learner.

    Its average and its maximum side by side, then batch norm, dropout, a hidden layer with ReLU, and once more; without
    a hidden layer once. https://docs.fast.ai/vision.learner.html#create_head
    """

    def __init__(self, channels: int, num_classes: int, hidden: int, dropout: float):
        wide = 2 * channels
        between = [nn.BatchNorm1d(wide), nn.Dropout(dropout / 2), nn.Linear(wide, hidden), nn.ReLU()] if hidden else []
        width = hidden or wide
        super().__init__(*between, nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))


def last_layer(model: nn.Module) -> str:
    """Return the name of the layer that gives the logits: the last linear or convolution layer."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers of the head: those of concat pooling, what timm calls so, or the last one."""
    if hasattr(model, NAME):
        heads = [model.get_submodule(NAME)]
    elif hasattr(model, "get_classifier"):  # timm's: two of a distilled network, which otherwise has the last one
        found: Any = model.get_classifier()  # type: ignore[operator]
        heads = list(found) if isinstance(found, tuple) else [found]
    else:
        heads = [model.get_submodule(last_layer(model))]
    parts = {part for head in heads for part in head.modules()}
    return [name for name in layers(model) if model.get_submodule(name) in parts]


def with_concat_pool(
    model: nn.Module, name: str, num_classes: int, hidden: int, dropout: float, image_size: int
) -> nn.Module:
    """Return the network up to its last feature map, and a new head on it; the layers between are left out.

    So AlexNet's fc6 and fc7 are. The trunk's tensors keep their names. Raises UserError where the network has no such
    map, as a vision transformer, or its forward pass can't be traced.
    """
    head = head_layers(model)
    try:
        graph = Tracer().trace(model)
        network = fx.GraphModule(model, graph).eval()
        _note_shapes(network, image_size)
    except Exception as error:  # whatever a forward pass stumbles over: it is not made for tracing
        raise UserError(
            f"head.kind = concat_pool needs to follow a picture's way through the network, and {name}'s can't be "
            f"followed ({type(error).__name__}): set head.kind to linear"
        ) from None
    nodes = list(graph.nodes)
    trunk = list(takewhile(lambda node: not any(is_in(layer, str(node.target)) for layer in head), nodes))
    maps = [node for node in trunk if is_map(_shape(node)) and _shape(node)[-1] > 1]
    after = [_shape(node) for node in trunk[trunk.index(maps[-1]) :]] if maps else []
    if not maps or any(len(shape) == 3 or (len(shape) == 4 and not is_map(shape)) for shape in after):  # tokens
        raise UserError(
            f"head.kind = concat_pool, but {name} has no feature map in front of its head: set head.kind to linear"
        )
    features = maps[-1]
    while _is_pooling(network, features):
        features = features.args[0]
    network.add_submodule(NAME, ConcatPool(_shape(features)[1], num_classes, hidden, dropout))
    with graph.inserting_after(features):
        logits = graph.call_module(NAME, (features,))
    next(node for node in nodes if node.op == "output").args = (logits,)
    graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return network


class _Shapes(fx.Interpreter):
    """Runs a network, and notes the shape of what comes out of each node."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        node.meta["shape"] = getattr(result, "shape", ())
        return result


def _note_shapes(network: fx.GraphModule, image_size: int) -> None:
    """Note the nodes' shapes for pictures so large that the feature map has some pixels."""
    with torch.no_grad():
        try:
            _Shapes(network).run(torch.zeros(1, 3, max(image_size, 224), max(image_size, 224)))
        except Exception:  # of any kind; the network takes no other size than its own, perhaps
            _Shapes(network).run(torch.zeros(1, 3, image_size, image_size))


def _shape(node: fx.Node) -> Sequence[int]:
    return node.meta.get("shape", ())


def is_map(shape: Sequence[int]) -> bool:
    """Tell whether it is the shape of a feature map [1, channels, side, side]: not that with its channels last."""
    return len(shape) == 4 and shape[2] == shape[3]


def _is_pooling(network: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node only pools what comes in, or drops some of it."""
    kinds = (nn.AdaptiveAvgPool2d, nn.Dropout)
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), kinds)
