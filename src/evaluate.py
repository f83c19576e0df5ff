"""Stage `evaluate`: how good models/model.safetensors is on the pictures of val (and of test, where there is one).

    dvc repro evaluate && dvc metrics show && dvc plots show

Writes results/evaluate/: metrics.json, predictions.csv (a row a picture), and the plots' data.
"""

import csv
import functools
import json
from pathlib import Path

from finetune import augment, backbones, device, inference, metrics, params, runs, stage, training
from finetune.files import replaced
from finetune.images import ImageStore

import numpy as np
import torch

OUTPUT = Path("results/evaluate")


def main() -> None:
    settings = params.load()
    store = ImageStore("data/prepared")
    device.make_deterministic()
    device.keep_freed_memory()
    place = device.claim(settings.device, runs.scratch() / "gpus")
    tensors, about = backbones.read(Path("models/model.safetensors"))
    size = about["image_size"]
    model = backbones.build(about["model_name"], len(about["classes"]), size, params.Head(**about["head"]))
    backbones.load_tensors(model, tensors, strict=True)
    model = device.in_precision(
        model.to(place).to(memory_format=torch.channels_last), device.precision(settings.precision, place)
    )
    inputs_of = functools.partial(augment.normalize, mean=about["mean"], std=about["std"])

    results, predictions = {}, []
    for split, group in (("val", "eval"), ("test", "test")):
        indices = store.indices(split)
        if not len(indices):
            continue
        views = training.views(store, split, size, device.LOT[place.type], settings.evaluate.tta)
        logits = metrics.mean_prediction([inference.predict(model, batches, inputs_of) for batches in views])
        labels = store.labels[indices]
        results[group] = metrics.summary(logits, labels)
        paths = [store.paths[i] for i in indices]
        predictions += prediction_rows(split, paths, labels, logits, store.classes)
        if split == "val":
            write_plots(logits, labels, store.classes)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in results[group].items())
        print(f"{split} ({len(indices)} pictures): {shown}")

    write_csv(OUTPUT / "predictions.csv", predictions)
    with replaced(OUTPUT / "metrics.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


def prediction_rows(split: str, paths: list[str], labels: np.ndarray, logits: np.ndarray, classes: list[str]):
    """Return a row a picture: split, path, label, prediction, a probability for each class, loss."""
    probabilities = np.exp(metrics.log_softmax(logits))
    losses = metrics.cross_entropy(logits, labels)
    return [
        {"split": split, "path": path, "label": classes[label], "prediction": classes[p.argmax()]}
        | {f"p_{name}": f"{value:.6f}" for name, value in zip(classes, p, strict=True)}
        | {"loss": f"{loss:.6f}"}
        for path, label, p, loss in zip(paths, labels, probabilities, losses, strict=True)
    ]


def write_plots(logits: np.ndarray, labels: np.ndarray, classes: list[str]) -> None:
    """Write the data of the plots that dvc.yaml draws: confusion matrix, ROC and precision-recall curve."""
    roc, precision_recall = metrics.curves(logits, labels)
    pairs = zip(labels, logits.argmax(axis=1), strict=True)
    confusion = [{"actual": classes[label], "predicted": classes[guess]} for label, guess in pairs]
    write_csv(OUTPUT / "plots/confusion.csv", confusion)
    write_csv(OUTPUT / "plots/roc.csv", roc)
    write_csv(OUTPUT / "plots/precision_recall.csv", precision_recall)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write the rows, which all have the first one's keys, under a header line."""
    with replaced(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    stage.run(main)
