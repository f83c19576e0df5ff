"""What turns a backbone's features into logits: the network's own last layer, or concat pooling."""

from collections.abc import Sequence

from finetune.errors import UserError
from finetune.layers import CONTAINERS, layers

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

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
    """Return the names of the layers of the head: those of concat pooling, or the last one."""
    return [name for name in layers(model) if name.startswith(f"{NAME}.")] or [last_layer(model)]


def with_concat_pool(
    model: nn.Module, name: str, num_classes: int, hidden: int, dropout: float, image_size: int
) -> nn.Module:
    """Return the network up to its last feature map, and a new head on it; the layers between are left out.

    So AlexNet's fc6 and fc7 are. The trunk's tensors keep their names. Raises UserError where the network has no such
    map, as a vision transformer.
    """
    graph = _Tracer().trace(model)
    network = fx.GraphModule(model, graph)
    _note_shapes(network.eval(), image_size)
    nodes = list(graph.nodes)
    last = next(node for node in nodes if node.target == last_layer(model))
    maps = [node for node in nodes[: nodes.index(last)] if len(_shape(node)) == 4 and _shape(node)[-1] > 1]
    after = [_shape(node) for node in nodes[nodes.index(maps[-1]) :]] if maps else []
    if not maps or any(len(shape) == 3 for shape in after):  # the latter: tokens
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


class _Tracer(fx.Tracer):
    """Follows a network through its containers alone, so that what a module does in training stays its own affair."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return type(module) not in CONTAINERS


def _note_shapes(network: fx.GraphModule, image_size: int) -> None:
    """Note the shape of what comes out of each node, for pictures so large that the feature map has some pixels."""
    for size in (max(image_size, 224), image_size):  # the latter where the network takes no others
        try:
            with torch.no_grad():
                ShapeProp(network).propagate(torch.zeros(1, 3, size, size))
            return
        except RuntimeError:
            continue


def _shape(node: fx.Node) -> Sequence[int]:
    found = node.meta.get("tensor_meta")
    return getattr(found, "shape", ())


def _is_pooling(network: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node only pools what comes in, or drops some of it."""
    kinds = (nn.AdaptiveAvgPool2d, nn.Dropout)
    return node.op == "call_module" and isinstance(network.get_submodule(node.target), kinds)
