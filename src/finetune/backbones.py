"""Pretrained networks by name: built for a number of classes, filled with weights, partly frozen."""

import json
import re
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError

from finetune.digests import digest
from finetune.errors import UserError, nearest
from finetune.files import replaced, sha256_of

import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALIASES = {"squeezenet": "squeezenet1_1"}
POSITION_EMBEDDING = "encoder.pos_embedding"  # a vision transformer's, whose size follows from the picture's
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def canonical_name(model_name: str) -> str:
    """Return torchvision's name of a classification model; UserError with the nearest names for an unknown one."""
    known = torchvision.models.list_models(module=torchvision.models)
    name = ALIASES.get(model_name, model_name)
    if name not in known:
        hint = nearest(name, [*known, *ALIASES]) or f" Known: {', '.join([*known, *ALIASES])}."
        raise UserError(f"params.yaml: model_name = {model_name!r} is no torchvision classification model.{hint}")
    return name


def build(model_name: str, num_classes: int, image_size: int) -> nn.Module:
    """Return the network with random weights, and a head for `num_classes`.

    Weights come from torch's global generator. Raises UserError where the network can't take pictures of
    `image_size` px.
    """
    name = canonical_name(model_name)
    options: dict = {}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        # One output as with all others; and the input as their pretrained weights know it.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{name} can't take pictures of data.image_size = {image_size} px: {_first_line(error)}"
        ) from None
    if name.startswith("squeezenet"):
        # A ReLU after the head's convolution would keep logits from being negative. With a few classes it often dies
        # at 0 for all pictures, and nothing trains any more; without it the head is linear, as the other networks' is.
        model.classifier[2] = nn.Identity()
    return model


def head_name(model: nn.Module) -> str:
    """Return the name of the layer that gives the logits: the last linear or convolution layer."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]


def layers(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the modules that own tensors, each with its tensors' names, in the model's order."""
    owned: dict[str, list[str]] = {}
    for tensor in model.state_dict():
        owned.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    return owned


# Weights ----------------------------------------------------------------------------------------------------------


def official_file(model_name: str) -> str:
    """Return the file name of torchvision's default ImageNet weights, such as alexnet-owt-7be5be79.pth."""
    return _official(model_name).url.rpartition("/")[2]


def download_official(model_name: str, progress: bool) -> Mapping[str, Tensor]:
    """Return torchvision's default ImageNet weights, downloaded once per machine, digest checked. Raises UserError."""
    try:
        return _official(model_name).get_state_dict(progress=progress, check_hash=True)
    except (OSError, RuntimeError, HTTPException, UnpicklingError) as error:
        raise UserError(
            f"could not download {_official(model_name).url} ({_first_line(error)}).\n"
            f"Set WEIGHTS_DIR=<folder with {official_file(model_name)} or {canonical_name(model_name)}.pth>, "
            "or train from random weights with -S backbone.weights=none."
        ) from None


def read_file(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a .safetensors file, or in a torch file that is read without running code.

    A file named as torchvision names its own (name-<start of sha256>.pth) must have that digest. Raises UserError.
    """
    named = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if named and not sha256_of(path).startswith(named[1]):
        raise UserError(
            f"{path} is damaged: its sha256 does not begin with {named[1]}, as its name says. Get it again."
        )
    try:
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the readers raise a dozen types for a file that is none of theirs
        raise UserError(f"{path} holds no weights that can be read safely: {_first_line(error)}") from None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} holds no state dict, that is a mapping from names to tensors.")
    return state


def fitting_tensors(model: nn.Module, state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a state dict that the model's layers, but for the head, can take; the rest is left out.

    Takes a state dict as it is, under a key `state_dict` or `model`, and from DataParallel. Raises UserError where a
    tensor has another shape than the model's, or nothing fits.
    """
    for wrapper in ("state_dict", "model"):
        state = state[wrapper] if isinstance(state.get(wrapper), Mapping) else state
    # Old DenseNet files say `norm.1` for what is now `norm1`.
    old_name = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)")
    state = {old_name.sub(r"\1\2", key.removeprefix("module.")): value for key, value in state.items()}

    head = head_name(model) + "."
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}
    fitting = {name: state[name] for name in wanted if isinstance(state.get(name), Tensor)}
    if not fitting:
        raise UserError(f"none of the weights' tensors ({', '.join(list(state)[:3])} …) belongs to this model.")
    for name, tensor in fitting.items():
        if tensor.shape != wanted[name].shape and name != POSITION_EMBEDDING:
            shapes = f"{tuple(tensor.shape)}, and {tuple(wanted[name].shape)} in the model"
            raise UserError(f"the weights do not fit: {name} is {shapes}. Is it the right model_name?")
    return fitting


def missing_layers(model: nn.Module, tensors: Iterable[str]) -> list[str]:
    """Return the layers, but for the head, that `tensors` do not cover whole."""
    present = set(tensors)
    optional = "num_batches_tracked"  # absent from old files, and only read where momentum is None
    return [
        layer
        for layer, names in layers(model).items()
        if layer != head_name(model) and not present.issuperset(n for n in names if not n.endswith(optional))
    ]


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model; a position embedding of another picture size is interpolated."""
    if POSITION_EMBEDDING in tensors:
        from torchvision.models.vision_transformer import interpolate_embeddings

        tensors = interpolate_embeddings(model.image_size, model.patch_size, dict(tensors))
    model.load_state_dict(tensors, strict=False)


def normalization(model_name: str, weights: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, per channel in [0, 1], of the pictures that the weights were trained on."""
    if weights == "imagenet":
        transforms = _official(model_name).transforms()
        return list(transforms.mean), list(transforms.std)
    return IMAGENET_MEAN, IMAGENET_STD


def write(path: Path, tensors: Mapping[str, Tensor], about: dict) -> None:
    """Write tensors, and what is to be known about them, as a .safetensors file; the same content as the same bytes."""
    # In one string: safetensors writes the entries of its metadata in an order that differs from run to run.
    metadata = {"about": json.dumps(about | {"digest": digest([tensors, about])}, sort_keys=True)}
    with replaced(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the `about` of a file that `write` wrote, with their `digest`.

    Raises UserError where the tensors are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["about"])
    except OSError:
        raise
    except Exception as error:  # its reader's own types
        raise _damaged(path, _first_line(error)) from None
    if digest([tensors, {key: about[key] for key in about if key != "digest"}]) != about.get("digest"):
        raise _damaged(path, "its digest is another")
    return tensors, about


# What trains ------------------------------------------------------------------------------------------------------


def trainable_layers(names: Iterable[str], head: str, missing: Iterable[str], trainable: str) -> list[str]:
    """Return the layers of `names` that train: all, or the head and those without pretrained weights."""
    chosen = {head, *missing}
    return [name for name in names if trainable == "all" or name in chosen]


def freeze(model: nn.Module, trainable: Iterable[str]) -> None:
    """Make the parameters of the `trainable` layers, and no others, require gradients."""
    chosen = set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in chosen)


def train_mode(model: nn.Module) -> None:
    """Put the model into training mode, but for frozen batch norm, which keeps its statistics."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()


def _official(model_name: str):
    return torchvision.models.get_model_weights(canonical_name(model_name)).DEFAULT


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is damaged ({problem}).\nRemove it, then run again: it is made anew.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
