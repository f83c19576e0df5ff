"""Where a network is cut: what lies before its first part that trains, or is random, follows from the picture alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune import heads, layers
from finetune.digests import digest

import torch
from torch import Tensor, fx, nn

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
PICTURES = 5  # that show a network's way: few, and hardly the size of something else (queries, keys and values are 3)


@dataclass(frozen=True)
class Cut:
    """A network in two parts, one after the other. They share its modules, and so their tensors and modes."""

    trunk: fx.GraphModule  # pictures -> features; nothing in it changes
    rest: fx.GraphModule  # features -> logits

    @cached_property
    def digest(self) -> str:
        """The digest of the trunk's tensors and of what it does with them."""
        tensors = dict(self.trunk.named_parameters()) | dict(self.trunk.named_buffers())
        return digest([str(self.trunk), tensors])


class Network:
    """A network whose way from pictures to logits is known, step by step."""

    def __init__(self, model: nn.Module, graphs: dict[bool, fx.Graph]):
        self._model = model
        self._graphs = graphs  # by whether it is the way in training

    def cut(self, training: bool) -> Cut | None:
        """Return the network, in training mode now, cut as late as can be; None where nothing can be cut off.

        Before the first step that trains, or is random in that mode, as dropout is in training alone. What trains is
        what requires gradients, and batch norm that is not frozen.
        """
        graph = self._graphs[training]
        nodes = list(graph.nodes)
        place = {node: position for position, node in enumerate(nodes)}
        last_use = [max((place[user] for user in node.users), default=0) for node in nodes]
        found, has_layers, needed = None, False, 0
        for position, node in enumerate(nodes):
            if node.op == "output" or self._trains(node) or node.meta["random"]:
                break
            has_layers = has_layers or bool(self._tensors(node))
            if has_layers and node.meta["is_batch"] and needed <= position:  # it alone is used from here on
                found = node
            needed = max(needed, last_use[position])
        return found and _split(self._model, graph, found)

    def _trains(self, node: fx.Node) -> bool:
        modules = self._model.get_submodule(str(node.target)).modules() if node.op == "call_module" else []
        return any(tensor.requires_grad for tensor in self._tensors(node)) or any(
            isinstance(each, BATCH_NORMS) and (each.training or each.running_mean is None) for each in modules
        )

    def _tensors(self, node: fx.Node) -> list[Tensor]:
        """Return the tensors of the model that a step uses."""
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            return [*module.parameters(), *module.buffers()]
        if node.op == "get_attr":
            value = getattr(
                self._model.get_submodule(layers.layer_of(str(node.target))), str(node.target).rpartition(".")[2]
            )
            return [value] if isinstance(value, Tensor) else []
        return []


def follow(model: nn.Module, image_size: int, modes: Sequence[bool] = (False, True)) -> Network | None:
    """Return the network whose way some pictures show; None where it can't be followed. The model stays as it was.

    `modes` says of which ways it is to be known, those in evaluation (False) and in training.
    """
    head = heads.head_layers(model)
    whole = [block.name for block in layers.blocks(model, head)] + head  # no cut is within these
    parents = {name.rpartition(".")[0] for name in whole}
    opened = parents | {name[:end] for name in parents for end in range(len(name)) if name[end] == "."}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = {module: module.training for module in model.modules()}
    graphs = {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for is_training in modes:
                graphs[is_training] = layers.Tracer(opened).trace(model.train(is_training))
                walk = _Walk(fx.GraphModule(model, graphs[is_training]))
                walk.run(torch.zeros(PICTURES, 3, image_size, image_size))
    except Exception:  # whatever a forward pass stumbles over: it is not made for tracing
        return None
    finally:
        for module, was_training in training.items():
            module.training = was_training
        with torch.no_grad():  # batch norm has taken the pictures in
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    return Network(model, graphs)


class _Walk(fx.Interpreter):
    """Runs a network on some pictures, and notes which steps draw random numbers, and which return a row a picture."""

    def run_node(self, node: fx.Node) -> Any:
        before = torch.get_rng_state()
        result = super().run_node(node)
        node.meta["random"] = not torch.equal(before, torch.get_rng_state())
        node.meta["is_batch"] = isinstance(result, Tensor) and result.ndim > 1 and len(result) == PICTURES
        return result


def _split(model: nn.Module, graph: fx.Graph, node: fx.Node) -> Cut:
    """Return the two parts of a way: up to a step, and from what comes out of it."""
    trunk, rest = fx.Graph(), fx.Graph()
    nodes = list(graph.nodes)
    first = nodes[: nodes.index(node) + 1]
    copied: dict[fx.Node, fx.Node] = {}
    for each in first:
        copied[each] = trunk.node_copy(each, lambda old: copied[old])
    trunk.output(copied[node])
    copied = {node: rest.placeholder("features")}
    for each in nodes[len(first) :]:
        copied[each] = rest.node_copy(each, lambda old: copied[old])
    return Cut(fx.GraphModule(model, trunk), fx.GraphModule(model, rest))
