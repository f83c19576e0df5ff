"""Stage `backbone`: the pretrained weights of the chosen network, as models/backbone.safetensors.

    dvc repro backbone
    WEIGHTS_DIR=~/weights dvc repro backbone    # look there first: torchvision's file name, then <model_name>.pth

The file holds the tensors of every layer but the head; its metadata their digest, which layers had none, and the mean
and standard deviation that the network expects. The same weights give the same bytes, wherever they were found.
"""

from pathlib import Path

from finetune import backbones, device, params, stage

OUTPUT = Path("models/backbone.safetensors")


def main() -> None:
    settings = params.load()
    device.choose(settings.device)  # its errors now, rather than after the pictures were prepared
    tensors, about, source = backbones.pretrained(settings.model_name, settings.backbone.weights)
    backbones.fine_tuned(settings, tensors, about["missing"])  # likewise, such as a layer that there is not
    backbones.write(OUTPUT, tensors, about)

    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{about['model_name']}: {count:,} pretrained parameters from {source}")
    if tensors and about["missing"]:
        print(f"{len(about['missing'])} layers have none and will train: {', '.join(about['missing'])}")


if __name__ == "__main__":
    stage.run(main)
