"""Stage `backbone`: the pretrained weights of the chosen network, as models/backbone.safetensors.

    dvc repro backbone
    WEIGHTS_DIR=~/weights dvc repro backbone    # look there first: torchvision's file name, then <model_name>.pth

The file holds the tensors of every layer but the head; its metadata their digest, which layers had none, and the mean
and standard deviation that the network expects. The same weights give the same bytes, wherever they were found.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune import backbones, device, params, stage
from finetune.errors import UserError
from finetune.files import resolve_user_path

OUTPUT = Path("models/backbone.safetensors")


def main() -> None:
    settings = params.load()
    device.choose(settings.device)  # its errors now, rather than after the pictures were prepared
    name = backbones.canonical_name(settings.model_name)
    weights = settings.backbone.weights
    model = backbones.build(name, num_classes=2, image_size=settings.data.image_size)
    tensors, source = {}, "random initialisation"
    if weights != "none":
        state, source = find_weights(name, weights, os.environ.get("WEIGHTS_DIR"))
        tensors = backbones.fitting_tensors(model, state)
    missing = backbones.missing_layers(model, tensors)
    mean, std = backbones.normalization(name, weights)
    about = {"model_name": name, "missing": missing, "mean": mean, "std": std}
    backbones.write(OUTPUT, tensors, about)

    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{name}: {count:,} pretrained parameters from {source}")
    if tensors and missing:
        print(f"{len(missing)} layers have none and will train: {', '.join(missing)}")


def find_weights(name: str, weights: str, folder: str | None) -> tuple[Mapping, str]:
    """Return the state dict that `backbone.weights` names, and where it was found. Raises UserError."""
    if weights != "imagenet":
        file = Path("weights") / weights
        if not file.is_file():
            raise UserError(f"{file} is missing. Copy the file there, or set backbone.weights to imagenet or none.")
        return backbones.read_file(file), str(file)
    if folder:
        place = resolve_user_path(folder, "WEIGHTS_DIR")
        names = [backbones.official_file(name), f"{name}.pth"]
        for file in [place / each for each in names]:
            if file.is_file():
                return backbones.read_file(file), file.name
        print(f"WEIGHTS_DIR={folder} has neither {names[0]} nor {names[1]}: downloading", file=sys.stderr)
    return backbones.download_official(name, sys.stderr.isatty()), backbones.official_file(name)


if __name__ == "__main__":
    stage.run(main)
