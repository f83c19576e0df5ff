"""What trains, from which epoch on and how fast: a network's blocks, and the plan that the settings make of them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from finetune.errors import UserError, nearest

from torch import fx, nn

CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)  # exactly these, which only hold others
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Block:
    """A part of a network that thaws as one: its name, and those of its layers."""

    name: str
    layers: list[str]


@dataclass(frozen=True)
class Group:
    """Layers that train alike."""

    name: str
    layers: list[str]
    thaws: int | None = None  # the epoch from which on it trains, counted from 0; None: never
    lr_scale: float = 1.0  # share of the head's learning rate
    without_weights: int = 0  # how many of its layers have no pretrained weights, and so train with the head

    def trains_in(self, epoch: int) -> bool:
        """Tell whether it trains in an epoch, counted from 0."""
        return self.thaws is not None and self.thaws <= epoch


# A network's structure ------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the modules that own tensors, each with its tensors' names, in the model's order."""
    owned: dict[str, list[str]] = {}
    for tensor in model.state_dict():
        owned.setdefault(layer_of(tensor), []).append(tensor)
    return owned


def layer_of(tensor: str) -> str:
    """Return the name of the module that owns the tensor of that name; '' for one that is the model's own."""
    return tensor.rpartition(".")[0]


def blocks(model: nn.Module, head: Iterable[str]) -> list[Block]:
    """Return the network's blocks from the pictures to the head, whose layers are in none.

    A block is a module of its own kind (a residual block, a Fire, a dense block, a transformer's layer), or a
    convolution or linear layer with the norm that belongs to it. Containers are looked into, and so are the modules of
    a kind of which one alone holds more than half of the parameters, in modules of their own kind: a transformer's
    encoder, a RegNet's stages. What such a one owns itself, as a class token, belongs to the first block.
    """
    head = set(head)
    rest = [layer for layer in layers(model) if layer not in head]
    total = sum(p.numel() for name, p in model.named_parameters() if layer_of(name) not in head)
    stages = {type(module) for module in model.modules() if 2 * _size(module) > total and _is_made_of_modules(module)}

    def within(parent: nn.Module, prefix: str) -> list[Block]:
        found: list[Block] = []
        for name, module in ((prefix + name, child) for name, child in parent.named_children()):
            below = [layer for layer in rest if is_in(layer, name)]
            is_open = type(module) in (*CONTAINERS, *stages) or any(is_in(layer, name) for layer in head - {name})
            new = within(module, f"{name}.") if is_open else [Block(name, below)] if below else []
            if (
                found
                and len(new) == 1
                and (only_norms(new[0]) or (only_norms(found[-1]) and not any(module.children())))
            ):
                found[-1].layers.extend(new[0].layers)
            else:
                found += new
        return found

    def only_norms(block: Block) -> bool:
        return all(isinstance(model.get_submodule(layer), NORMS) for layer in block.layers)

    result = within(model, "")
    placed = {layer for block in result for layer in block.layers}
    if result:
        result[0].layers.extend(layer for layer in rest if layer not in placed)
    return result


def is_in(layer: str, name: str) -> bool:
    """Tell whether a layer is the module of that name, or within it."""
    return layer == name or layer.startswith(f"{name}.")


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_made_of_modules(module: nn.Module) -> bool:
    """Tell whether most of a module's parameters are in modules that hold others, rather than in its own layers."""
    parts = list(module.children())
    while any(type(part) in CONTAINERS for part in parts):
        parts = [each for part in parts for each in (part.children() if type(part) in CONTAINERS else [part])]
    return 2 * sum(_size(part) for part in parts if any(part.children())) > _size(module)


class Tracer(fx.Tracer):
    """Follows a network through its containers, and `opened` modules; what another one does stays its own affair."""

    def __init__(self, opened: Collection[str] = ()):
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return type(module) not in CONTAINERS and qualified_name not in self._opened


# The plan -------------------------------------------------------------------------------------------------------------


def plan(
    blocks: Sequence[Block],
    head: Sequence[str],
    missing: Sequence[str],
    trainable: str | int | list[str],
    unfreeze_epoch: int = 0,
    unfreeze_every: int = 0,
    backbone_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
) -> list[Group]:
    """Return the groups of layers, from the head to the first block.

    The head, with the layers of `missing` that have no pretrained weights, trains from the start. The blocks that are
    `trainable` (all, the last n, or those with layers of such names) thaw at `unfreeze_epoch`; the last one of them
    then and each other `unfreeze_every` epochs after the one behind it. Raises UserError where there is no such layer,
    or nothing to thaw.
    """
    new = set(missing)
    pretrained = [Block(block.name, [layer for layer in block.layers if layer not in new]) for block in blocks]
    pretrained = [block for block in pretrained if block.layers]
    if isinstance(trainable, int) and trainable > len(pretrained) > 0:
        raise UserError(
            f"params.yaml: backbone.trainable = {trainable}, but the network has {len(pretrained)} pretrained blocks: "
            f"{', '.join(block.name for block in pretrained)}."
        )
    names = _checked(trainable, [*head, *(layer for block in blocks for layer in block.layers)])

    groups = [Group("head", [*missing, *head], thaws=0, without_weights=len(missing))]
    thaws = unfreeze_epoch
    for distance, block in enumerate(reversed(pretrained)):
        if names is None:
            is_chosen = trainable == "all" or (isinstance(trainable, int) and distance < trainable)
            chosen = block.layers if is_chosen else []
        else:
            chosen = [layer for layer in block.layers if any(is_in(layer, name) for name in names)]
        if chosen:
            groups.append(Group(block.name, chosen, thaws, backbone_lr_scale * layer_decay**distance))
            thaws += unfreeze_every
        frozen = [layer for layer in block.layers if layer not in chosen]
        if frozen:
            groups.append(Group(block.name, frozen))
    if unfreeze_epoch + unfreeze_every and all(group.thaws is None for group in groups[1:]):
        raise UserError(
            "params.yaml: backbone.unfreeze_epoch and unfreeze_every: nothing can thaw, as no layer with pretrained "
            f"weights trains with backbone.trainable = {trainable}. Set both to 0."
        )
    return groups


def table(groups: Sequence[Group], sizes: dict[str, int], lr: float, num_epochs: int) -> list[str]:
    """Return the lines that say what trains in so many epochs: layers, parameters, from when on, learning rate.

    `sizes` are the numbers of the layers' parameters. Groups side by side that train alike share a line; the head's is
    its own.
    """
    rows: list[list] = []
    for group in groups:
        size = sum(sizes.get(layer, 0) for layer in group.layers)
        rate = f"{lr * group.lr_scale:.4g}"
        if group.thaws is None:
            trains, rate = "frozen", ""
        elif group.thaws >= num_epochs:
            trains, rate = f"frozen: {num_epochs} epochs are too few to thaw", ""
        else:
            trains = f"from epoch {group.thaws + 1}" if group.thaws else "trains"
        if rows and rows[-1][2:] == [trains, rate] and len(rows) > 1:
            rows[-1][0] = f"{rows[-1][0].partition(' … ')[0]} … {group.name}"
            rows[-1][1] += size
        else:
            others = f" and {group.without_weights} layer{'s' * (group.without_weights > 1)} without weights"
            rows.append([group.name + (others if group.without_weights else ""), size, trains, rate])
    rows = [["layers", "parameters", "", "lr"], *([name, f"{size:,}", *rest] for name, size, *rest in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {trains:<{widths[2]}}  {rate}".rstrip()
        for name, size, trains, rate in rows
    ]


def _checked(trainable: str | int | list[str], known: Sequence[str]) -> list[str] | None:
    """Return the names of layers that `trainable` holds, or None where it says it otherwise. Raises UserError."""
    if isinstance(trainable, int) or trainable in ("head", "all"):
        return None
    names = trainable if isinstance(trainable, list) else [trainable]
    for name in names:
        if not any(is_in(layer, name) for layer in known):
            parents = {".".join(layer.split(".")[:end]) for layer in known for end in range(1, layer.count(".") + 2)}
            top = dict.fromkeys(layer.split(".")[0] for layer in known if layer)
            hint = nearest(name, sorted(parents)) or f" It has {', '.join(top)}."
            raise UserError(
                f"params.yaml: backbone.trainable: the network has no layer {name!r} (nor is it head, all or a number)."
                f"{hint}"
            )
    return names


# The model follows it -------------------------------------------------------------------------------------------------


def thaw(model: nn.Module, groups: Sequence[Group], epoch: int) -> None:
    """Make the parameters of the groups that train in that epoch, and no others, require gradients."""
    training = {layer for group in groups if group.trains_in(epoch) for layer in group.layers}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_of(name) in training)


def train_mode(model: nn.Module, frozen_batch_norm: str = "frozen") -> None:
    """Put the model into training mode; frozen batch norm keeps its statistics, unless it is told to `train`."""
    model.train()
    if frozen_batch_norm == "train":
        return
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()
