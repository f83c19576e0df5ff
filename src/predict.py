"""Classify pictures with a fine-tuned model: files, folders with all that is below them, patterns, or a list of these.

    python src/predict.py photos/ new.jpg                      # a table: path, prediction, probability, next best
    python src/predict.py photos/ --experiment agley-scut      # with that experiment's model instead of the workspace's
    python src/predict.py 'photos/**/*.jpg' --csv -o predictions.csv
    find photos -mtime -1 | python src/predict.py - --json --top 3

A picture is decoded, resized, cropped and classified as in the stage evaluate, to the bit. What is no picture is named
on stderr with the reason, and skipped; the exit status is 1 where none is left.
"""

import functools
import glob
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune import classifier, datasets, decoding, images, metrics, models, params, stage
from finetune.errors import UserError
from finetune.files import replaced
from finetune.parallel import parallel_map
from finetune.tables import aligned, csv_text

import numpy as np
from tqdm import tqdm


def main() -> None:
    arguments = parsed()
    files = listed(arguments.pictures)
    model = classifier.load(models.path(arguments), arguments.device)

    paths: list[str] = []
    skipped: list[datasets.Skipped] = []
    logits = list(model.logits(decoded(files, model.about["resize"], paths, skipped), arguments.tta))
    for path, reason in skipped:
        print(f"skipped {printable(path)}: {reason}", file=sys.stderr)
    if not logits:
        raise UserError(f"there is no picture among {len(files):,} file{'s'[: len(files) != 1]}.")
    probabilities = np.exp(metrics.log_softmax(np.concatenate(logits)))
    write(formatted(paths, probabilities, model.classes, arguments), arguments.output)


def parsed() -> Namespace:
    """Return the arguments. Ends the process where they contradict each other."""
    parser = models.parser(__doc__)
    parser.add_argument("pictures", nargs="+", metavar="PICTURES", help="file, folder, pattern; -: lines of stdin")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print an array with an object for each picture")
    forms.add_argument("--csv", action="store_true", help="print a row a picture, with all probabilities")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="write there instead; .json or .csv say the form, too"
    )
    parser.add_argument("--top", type=int, metavar="K", help="classes of each picture (table: 2, JSON: all)")
    parser.add_argument("--tta", choices=classifier.WAYS, default="none", help="as evaluate.tta (%(default)s)")
    parser.add_argument("--device", type=params.device, default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    if arguments.output and not (arguments.json or arguments.csv):
        arguments.json, arguments.csv = (arguments.output.suffix == suffix for suffix in (".json", ".csv"))
    if arguments.top is not None and (arguments.csv or arguments.top < 1):
        parser.error("--top should be 1 or more" if not arguments.csv else "--csv has all classes: leave out --top")
    if arguments.output and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a folder")
    return arguments


# Pictures -------------------------------------------------------------------------------------------------------------


def listed(names: Sequence[str]) -> list[str]:
    """Return the paths of the files that the names mean, each once; `-` stands for the lines of stdin.

    Raises UserError where something named is not there.
    """
    lines = sys.stdin.buffer.read().splitlines() if "-" in names else []
    from_stdin = [os.fsdecode(line) for line in lines if line]
    files = {name: below(name) for each in names for name in (from_stdin if each == "-" else [each])}
    if missing := [printable(name) for name, found in files.items() if found is None]:
        raise UserError(f"{datasets.listing(missing)}: no such file, and no file of such a pattern.")
    paths: dict[str, str] = {}  # by what is the same however it is written
    for path in (path for found in files.values() for path in found or ()):
        paths.setdefault(os.path.normpath(path), path)
    return list(paths.values())


def below(name: str) -> list[str] | None:
    """Return the paths of a file, of the files in a folder, or of those that a pattern stands for; None of nothing."""
    if os.path.isdir(name):
        return sorted(str(file) for file in datasets.files_below(Path(name)))
    if os.path.lexists(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    return [path for each in found for path in below(each) or ()] if found else None


def decoded(
    files: Sequence[str], resize: int, paths: list[str], skipped: list[datasets.Skipped]
) -> Iterator[np.ndarray]:
    """Yield the pictures as the stage prepare keeps them, shorter side `resize` px; several are decoded at a time.

    Add the path of each to `paths`, and that of what is no picture, with the reason, to `skipped`.
    """
    decode = functools.partial(decoding.decode, resize=resize)

    def pixels(path: str) -> np.ndarray | str:
        return datasets.no_file(Path(path)) or images.read_pixels(Path(path), decode)

    results = zip(files, parallel_map(pixels, files), strict=True)
    for path, result in tqdm(results, "predict", len(files), unit=" pictures", delay=2, leave=False, disable=None):
        if isinstance(result, str):
            skipped.append((path, result))
        else:
            paths.append(path)
            yield result


# What is told of them -------------------------------------------------------------------------------------------------


def formatted(paths: Sequence[str], probabilities: np.ndarray, classes: list[str], arguments: Namespace) -> str:
    """Return the predictions as a table, as JSON or as CSV; `probabilities` are [n, classes]."""
    orders = np.argsort(-probabilities, axis=1, kind="stable")  # of equal ones, the first class is the prediction
    if arguments.csv:
        rows = [
            {"path": path, "prediction": classes[order[0]], "probability": f"{p[order[0]]:.6f}"}
            | classifier.probability_columns(p, classes)
            for path, p, order in zip(paths, probabilities, orders, strict=True)
        ]
        return csv_text(rows)
    if arguments.json:
        found = [
            {"path": path, "prediction": classes[order[0]], "probability": round(float(p[order[0]]), 6)}
            | {"probabilities": {classes[i]: round(float(p[i]), 6) for i in order[: arguments.top]}}
            for path, p, order in zip(paths, probabilities, orders, strict=True)
        ]
        return "[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n"
    table = [["path", "prediction", "probability", "next best"]]
    for path, p, (first, *others) in zip(paths, probabilities, orders[:, : arguments.top or 2], strict=True):
        next_best = ", ".join(f"{classes[i]} {p[i]:.4f}" for i in others)
        table.append([printable(path), classes[first], f"{p[first]:.4f}", next_best])
    return "\n".join(aligned([row[:3] if arguments.top == 1 else row for row in table])) + "\n"


def printable(path: str) -> str:
    """Return a path as a line of text can show it: escaped where it has control characters or is no UTF-8."""
    return path if path.isprintable() else ascii(path)


def write(text: str, output: Path | None) -> None:
    """Write the text to a file, which is whole at any moment, or print it; a path that is no UTF-8 as it is."""
    data = text.encode(errors="surrogateescape")
    if output:
        with replaced(output) as temporary:
            temporary.write_bytes(data)
        return
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly where a reader such as `head` has enough
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    stage.run(main)
