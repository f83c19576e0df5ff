"""Stage `evaluate`: how good models/model.safetensors is on the pictures of val (and of test, where there is one).

    dvc repro evaluate && dvc metrics show && dvc plots show

Writes results/evaluate/: metrics.json, predictions.csv (a row a picture), the plots' data, and pictures/: charts, and
galleries of predictions with what decided them.
"""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune import backbones, classifier, device, inference, metrics, params, pictures, stage, training
from finetune.features import Features, bank_of
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
        lots, what = [], f"predict {split}"
        with tqdm(total=len(indices), desc=what, unit=" pictures", delay=2, leave=False, disable=None) as bar:
            for lot in logits_of(split, model, store, settings):
                lots.append(lot)
                bar.update(len(lot))
        logits = np.concatenate(lots)
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


def logits_of(
    split: str, model: classifier.Classifier, store: ImageStore, settings: params.Params
) -> Iterator[np.ndarray]:
    """Yield the logits of a split's pictures, [n, classes] of some at a time.

    Those of val come from the features that the training kept in the bank, where it did: the same to the bit as those
    of the pictures.
    """
    asked = {
        "model_name": backbones.canonical_name(settings.model_name),
        "image_size": settings.data.image_size,
        "precision": settings.precision,
    }
    is_of_settings = all(model.about.get(key) == value for key, value in asked.items())
    if split == "val" and settings.evaluate.tta == "none" and is_of_settings and (cut := model.cut()):
        normalization = {key: model.about[key] for key in ("mean", "std")}
        features = Features(store, settings, normalization, model.device, bank_of(settings))
        rest = device.in_precision(cut.rest, device.precision(settings.precision, model.device))
        inputs = (batch.inputs for batch in features.validation_batches(cut))
        for lot in inference.logits(rest, inputs, inference.as_they_are):
            yield lot.numpy()
    else:
        yield from model.logits((store[i] for i in store.indices(split)), settings.evaluate.tta)


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
