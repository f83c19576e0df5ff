"""Stage `evaluate`: how good models/model.safetensors is on the pictures of val (and of test, where there is one).

    dvc repro evaluate && dvc metrics show && dvc plots show

Writes results/evaluate/: metrics.json, predictions.csv (a row a picture), the plots' data, and pictures/: charts, and
galleries of predictions with what decided them.
"""

import functools
import json
import shutil
from pathlib import Path

from finetune import classifier, metrics, params, pictures, stage, training
from finetune.files import replaced
from finetune.images import ImageStore
from finetune.tables import csv_text

import numpy as np
from tqdm import tqdm

OUTPUT = Path("results/evaluate")
PICTURES = OUTPUT / "pictures"


def main() -> None:
    settings = params.load()
    store = ImageStore("data/prepared")
    model = classifier.load(classifier.MODEL, settings.device)

    done: dict[str, pictures.Evaluated] = {}
    for split in ("val", "test"):
        indices = store.indices(split)
        if not len(indices):
            continue
        bar = tqdm(indices, f"predict {split}", unit=" pictures", delay=2, leave=False, disable=None)
        logits = np.concatenate(list(model.logits((store[i] for i in bar), settings.evaluate.tta)))
        paths = [store.paths[i] for i in indices]
        done[split] = pictures.Evaluated(store.labels[indices], logits, paths, store.classes)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in done[split].metrics.items())
        print(f"{split} ({len(indices)} pictures): {shown}")

    if "val" in done:
        write_plots(done["val"])
    write_csv(OUTPUT / "predictions.csv", [row for split in done for row in prediction_rows(split, done[split])])
    empty(PICTURES)  # DVC wants the folder, with or without pictures
    if settings.evaluate.gallery and "val" in done:
        size, indices = model.about["image_size"], store.indices("val")
        pictures.draw_charts(PICTURES, done["val"])
        pictures.draw_galleries(
            PICTURES,
            done["val"],
            settings.evaluate.gallery,
            settings.seed,
            pictures_at=lambda positions: training.cropped([store[i] for i in indices[positions]], size),
            decided=functools.partial(pictures.what_decided, model),
        )
    results = {{"val": "eval"}.get(split, split): each.metrics for split, each in done.items()}
    with replaced(OUTPUT / "metrics.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


def prediction_rows(split: str, done: pictures.Evaluated) -> list[dict]:
    """Return a row a picture: split, path, label, prediction, a probability for each class, loss."""
    probabilities = np.exp(metrics.log_softmax(done.logits))
    losses = metrics.cross_entropy(done.logits, done.labels)
    return [
        {"split": split, "path": path, "label": done.classes[label], "prediction": done.classes[p.argmax()]}
        | classifier.probability_columns(p, done.classes)
        | {"loss": f"{loss:.6f}"}
        for path, label, p, loss in zip(done.paths, done.labels, probabilities, losses, strict=True)
    ]


def write_plots(done: pictures.Evaluated) -> None:
    """Write the data of the plots that dvc.yaml draws: confusion matrix, ROC and precision-recall curve."""
    roc, precision_recall = done.curves
    pairs = zip(done.labels, done.guesses, strict=True)
    confusion = [{"actual": done.classes[label], "predicted": done.classes[guess]} for label, guess in pairs]
    write_csv(OUTPUT / "plots/confusion.csv", confusion)
    write_csv(OUTPUT / "plots/roc.csv", roc)
    write_csv(OUTPUT / "plots/precision_recall.csv", precision_recall)


def empty(folder: Path) -> None:
    """Make the folder anew, with nothing in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write the rows, which all have the first one's keys, under a header line."""
    with replaced(path) as temporary:
        temporary.write_bytes(csv_text(rows).encode())


if __name__ == "__main__":
    stage.run(main)
