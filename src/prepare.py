"""Stage `prepare`: decode the pictures once, into a memory-mapped store; data/prepared/.

    dvc repro prepare
    DATA_ARCHIVE=~/hymenoptera_data.zip dvc repro prepare    # instead of downloading the recipe's archive
    dvc exp run -S data.source=data/flowers -S num_classes=5 # <class>/…, or train/<class>/… and val/<class>/…
    dvc exp run --queue -S data.folds=5 -S 'data.fold=range(5)'  # cross-validation; src/summarize.py tells the mean
    dvc exp run -S data.limit=40                             # 40 pictures of each split, for a quick try

Its manifest.json says what is in the store: classes, counts, mean and std, and what was skipped and why.
"""

import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from finetune import datasets, decoding, images, params, sources, stage
from finetune.errors import UserError

from platformdirs import user_cache_dir

OUTPUT = Path("data/prepared")
SHOWN = 20  # skipped files on the screen


def main() -> None:
    start = time.perf_counter()
    settings = params.load()
    cache = Path(user_cache_dir("finetune"))
    with images.scratch_beside(OUTPUT) as scratch:
        dataset = sources.load(settings.data.source, os.environ.get("DATA_ARCHIVE"), cache, scratch / "source")
        datasets.check_num_classes(settings.num_classes, dataset.classes, settings.data.source)
        split: dict[str, Any] = {
            "val_fraction": settings.data.val_fraction,
            "folds": settings.data.folds,
            "fold": settings.data.fold,
            "split_seed": settings.data.split_seed,
            "limit": settings.data.limit,
        }
        dataset = choose(dataset, settings.data.source, **split)
        datasets.check_counts(datasets.count(dataset.pictures, dataset), settings.data.source)

        needed = len(dataset.pictures) * 4 * settings.data.resize**2 / 1e6  # RGB, sides 4:3
        print(f"decoding {len(dataset.pictures):,} pictures, to about {needed:,.0f} MB", flush=True)
        decode = functools.partial(decoding.decode, resize=settings.data.resize)
        shards = images.write_shards(dataset.pictures, scratch / "store", decode)
        check_skipped(dataset, shards, settings.data.max_skipped)
        datasets.check_counts(datasets.count((each.picture for each in shards.stored), dataset), settings.data.source)

        made_with: dict[str, Any] = {"source": settings.data.source, "resize": settings.data.resize} | split
        manifest = images.write_manifest(scratch / "store", dataset, shards, **made_with)
        images.replace(scratch / "store", OUTPUT)
    report(manifest, time.perf_counter() - start)


def choose(
    dataset: datasets.Dataset, source: str, *, val_fraction: float, folds: int, fold: int, split_seed: int, limit: int
) -> datasets.Dataset:
    """Return the data set split and limited as the settings say; tell the user what is left out by them."""
    if folds:
        before = sum(picture.split == "val" for picture in dataset.pictures)
        dataset = datasets.with_fold(dataset, folds, fold, split_seed, source)
        aside = f", {before:,} val pictures set aside" if before else ""
        print(f"fold {fold} of {folds} (0 to {folds - 1}) validates{aside}")
    else:
        dataset = datasets.with_val(dataset, val_fraction, split_seed)
    if limit:
        before = len(dataset.pictures)
        dataset = datasets.limited(dataset, limit, split_seed)
        print(f"limited to {len(dataset.pictures):,} of {before:,} pictures: data.limit = {limit}")
    return dataset


def check_skipped(dataset: datasets.Dataset, shards: images.Shards, max_skipped: float) -> None:
    """Name the skipped files on the screen. Raises UserError where more than the share `max_skipped` are."""
    skipped = sorted(dataset.skipped + shards.skipped)
    files = len(skipped) + len(shards.stored)
    if len(skipped) > max_skipped * files:
        share = len(skipped) / files
        first = datasets.listing([f"{path} ({reason})" for path, reason in skipped], limit=3)
        raise UserError(
            f"{len(skipped):,} of {files:,} files ({share:.1%}) are unreadable, more than data.max_skipped = "
            f"{max_skipped:g} allows: {first}.\n"
            f"Mend or remove them, or set -S data.max_skipped={math.ceil(share * 100) / 100:g}"
        )
    for path, reason in skipped[:SHOWN]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"and {len(skipped) - SHOWN:,} more, see {OUTPUT}/manifest.json", file=sys.stderr)


def report(manifest: dict, seconds: float) -> None:
    """Say what the store holds, and warn of pictures that both train and validate."""
    numbers = [f"{sum(classes.values()):,} {split}" for split, classes in manifest["counts"].items()]
    classes = manifest["classes"]
    if manifest["duplicates"]:
        print(
            f"warning: {manifest['duplicates']:,} of the val and test pictures are in train too, byte for byte: "
            "the metrics will look better than they are",
            file=sys.stderr,
        )
    print(
        f"prepared {' and '.join(numbers)} pictures of {len(classes)} classes ({datasets.listing(classes)}) "
        f"in {seconds:.1f} s, {len(manifest['skipped'])} skipped"
    )


if __name__ == "__main__":
    stage.run(main)
