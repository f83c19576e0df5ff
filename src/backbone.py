"""Stage `backbone`: the pretrained weights of the chosen network, as models/backbone.safetensors.

    dvc repro backbone
    WEIGHTS_DIR=~/weights dvc repro backbone    # look there first: torchvision's file name, then <model_name>.pth

The file holds the tensors of every layer but the head; its metadata say where they came from (with the source's
digest), which layers had none, and the mean and standard deviation that the network expects.
"""

import os
import sys
from pathlib import Path

from finetune import backbones, params
from finetune.errors import UserError, run_stage
from finetune.files import resolve_user_path, sha256_of

OUTPUT = Path("models/backbone.safetensors")


def main() -> None:
    settings = params.load()
    name = backbones.canonical_name(settings.model_name)
    weights = settings.backbone.weights
    model = backbones.build(name, num_classes=2, image_size=settings.data.image_size)
    source, state = find_weights(name, weights, os.environ.get("WEIGHTS_DIR"))
    tensors = backbones.fitting_tensors(model, state) if state else {}
    missing = backbones.missing_layers(model, tensors)
    mean, std = backbones.normalization(name, weights)

    about = {"model_name": name, "missing": missing, "mean": mean, "std": std}
    backbones.write(OUTPUT, tensors, about | source)

    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{name}: {count:,} pretrained parameters from {source['source']}")
    if tensors and missing:
        print(f"{len(missing)} layers have none and will train: {', '.join(missing)}")


def find_weights(name: str, weights: str, folder: str | None) -> tuple[dict[str, str], dict]:
    """Return where the weights come from (source, and sha256 of a file) and the state dict, empty for `none`."""
    if weights == "none":
        return {"source": "random initialisation"}, {}
    if weights != "imagenet":
        files = [Path("weights") / weights]
    elif folder:
        place = resolve_user_path(folder, "WEIGHTS_DIR")
        files = [place / backbones.official_file(name), place / f"{name}.pth"]
    else:
        files = []
    for file in files:
        if file.is_file():
            return {"source": file.name, "sha256": sha256_of(file)}, backbones.read_file(file)
    if weights != "imagenet":
        raise UserError(f"{files[0]} is missing. Copy the file there, or set backbone.weights to imagenet or none.")
    if folder:
        print(f"WEIGHTS_DIR={folder} has neither {files[0].name} nor {files[1].name}: downloading", file=sys.stderr)
    return {"source": backbones.official_file(name)}, backbones.download_official(name, sys.stderr.isatty())


if __name__ == "__main__":
    run_stage(main)
