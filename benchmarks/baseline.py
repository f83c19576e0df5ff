"""The loop that most fine-tuning scripts have: a folder of pictures, a DataLoader, the whole network in each step.

    python benchmarks/baseline.py PICTURES MODEL [--trainable head|classifier|all] [--weights FILE] [--workers 4]

PICTURES holds train/ and val/, a folder a class. In the spirit of torch's tutorial of transfer learning: decoding and
cropping anew in every epoch, batches of 8, SGD, the model in training mode with its frozen parameters, validation after
each epoch. Prints an epoch's seconds and results as a line of JSON, and at the end the peak of its memory.
https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

BATCH_SIZE = 8
NORMALIZE = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
TRANSFORMS = {
    "train": transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]
    ),
    "val": transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), NORMALIZE]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("model", choices=["alexnet", "squeezenet1_1", "resnet18"])
    parser.add_argument("--trainable", choices=["head", "classifier", "all"], default="head")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--momentum", type=float, default=0.09)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = {split: datasets.ImageFolder(arguments.pictures / split, TRANSFORMS[split]) for split in TRANSFORMS}
    loaders = {
        split: DataLoader(pictures[split], BATCH_SIZE, shuffle=split == "train", num_workers=arguments.workers)
        for split in pictures
    }
    model = network(arguments.model, arguments.weights, len(pictures["train"].classes), arguments.trainable).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=arguments.lr, momentum=arguments.momentum)
    for _ in range(arguments.epochs):
        start = time.perf_counter()
        loss, acc = run_epoch(model, loaders["train"], device, optimizer)
        between = time.perf_counter()
        val_loss, val_acc = run_epoch(model, loaders["val"], device)
        seconds = {"train_seconds": between - start, "val_seconds": time.perf_counter() - between}
        print(json.dumps(seconds | {"loss": loss, "acc": acc, "val_loss": val_loss, "val_acc": val_acc}), flush=True)
    kilobytes = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"peak_mb": kilobytes[0] / 1024, "peak_worker_mb": kilobytes[1] / 1024}))


def network(name: str, weights: Path | None, num_classes: int, trainable: str) -> nn.Module:
    """Return the pretrained network with a new last layer, and what does not train frozen."""
    model = models.get_model(name)
    if weights:
        model.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    if trainable != "all":
        for parameter in model.parameters():
            parameter.requires_grad = False
    if trainable == "classifier":
        for parameter in model.classifier.parameters():
            parameter.requires_grad = True
    if name == "alexnet":
        model.classifier[6] = nn.Linear(4096, num_classes)
    elif name == "squeezenet1_1":
        model.classifier[1] = nn.Conv2d(512, num_classes, kernel_size=1)
    else:
        model.fc = nn.Linear(512, num_classes)
    return model


def run_epoch(
    model: nn.Module, loader: DataLoader, device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> tuple[float, float]:
    """Return loss and accuracy a picture; train where there is an optimizer."""
    model.train(optimizer is not None)
    loss_function = nn.CrossEntropyLoss()
    total, hits = 0.0, 0
    with torch.set_grad_enabled(optimizer is not None):
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)
            outputs = model(inputs)
            loss = loss_function(outputs, labels)
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item() * len(labels)
            hits += int((outputs.argmax(1) == labels).sum())
    return total / len(loader.dataset), hits / len(loader.dataset)


if __name__ == "__main__":
    main()
