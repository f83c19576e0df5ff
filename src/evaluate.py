"""Stage `evaluate`: how good models/model.safetensors is on the pictures of val (and of test, where there is one).

    dvc repro evaluate && dvc metrics show && dvc plots show

Writes results/evaluate/: metrics.json, predictions.csv (a row a picture), and the plots' data.
"""

import json
from pathlib import Path

from finetune import classifier, metrics, params, stage
from finetune.files import replaced
from finetune.images import ImageStore
from finetune.tables import csv_text

import numpy as np

OUTPUT = Path("results/evaluate")


def main() -> None:
    settings = params.load()
    store = ImageStore("data/prepared")
    model = classifier.load(classifier.MODEL, settings.device)

    results, predictions = {}, []
    for split, group in (("val", "eval"), ("test", "test")):
        indices = store.indices(split)
        if not len(indices):
            continue
        logits = np.concatenate(list(model.logits((store[i] for i in indices), settings.evaluate.tta)))
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


def prediction_rows(
    split: str, paths: list[str], labels: np.ndarray, logits: np.ndarray, classes: list[str]
) -> list[dict]:
    """Return a row a picture: split, path, label, prediction, a probability for each class, loss."""
    probabilities = np.exp(metrics.log_softmax(logits))
    losses = metrics.cross_entropy(logits, labels)
    return [
        {"split": split, "path": path, "label": classes[label], "prediction": classes[p.argmax()]}
        | classifier.probability_columns(p, classes)
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
    with replaced(path) as temporary:
        temporary.write_bytes(csv_text(rows).encode())


if __name__ == "__main__":
    stage.run(main)
