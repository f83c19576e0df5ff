"""The image store: pictures decoded once, as uint8, read by index from memory-mapped files.

    manifest.json    what is in it: classes, counts, mean and std, skipped files, and every file's digest, its own too
    pictures.csv     a row a picture, sorted by split and path: where it lies, its size, its file's sha256
    shard-000.bin …  the pixels, [height, width, 3] a picture, one after another

Nothing in it depends on time, machine or the order of the work: the same pictures give the same bytes.
"""

import csv
import hashlib
import itertools
import json
import math
import mmap
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.datasets import Dataset, Picture, Skipped, count
from finetune.errors import UserError
from finetune.files import sha256_of
from finetune.parallel import parallel_map
from finetune.params import Data

import numpy as np
from tqdm import tqdm

FORMAT = 3
SHARD_PICTURES = 256  # about; one picture changed is one shard to store and push anew
MAX_FILE = 2**28  # bytes of an encoded picture: what is larger is something else, and is not read into memory
COLUMNS = ("path", "split", "class", "shard", "offset", "height", "width", "sha256")


# Reading ------------------------------------------------------------------------------------------------------------


class ImageStore:
    """The store in a folder: `store[i]` is picture i, [height, width, 3] uint8, a read-only view of the file.

    `manifest` is manifest.json; `classes` are the names that `labels` count; `paths`, `splits`, `labels`, `heights`
    and `widths` (px) have an entry a picture. Raises UserError where a file is not what was written: at once where one
    is missing or has another size, and for another digest when its first picture is asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        with open(self.folder / "pictures.csv", newline="", encoding="utf-8") as file:
            columns = zip(*[[row[name] for name in COLUMNS] for row in csv.DictReader(file)], strict=True)
        self.paths, splits, names, self._shards, offsets, heights, widths, _ = map(list, columns)
        self.splits = np.array(splits)
        self.classes: list[str] = self.manifest["classes"]
        label = {name: index for index, name in enumerate(self.classes)}
        self.labels = np.array([label[name] for name in names], np.int64)
        self._offsets = [int(offset) for offset in offsets]
        self.heights, self.widths = np.array(heights, np.int64), np.array(widths, np.int64)
        self._mapped: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        start, height, width = self._offsets[index], self.heights[index], self.widths[index]
        return self._map(self._shards[index])[start : start + height * width * 3].reshape(height, width, 3)

    def indices(self, split: str) -> np.ndarray:
        """Return the indices of the split's pictures, ascending; none where there is no such split."""
        return np.flatnonzero(self.splits == split)

    def _map(self, shard: str) -> np.ndarray:
        if shard not in self._mapped:
            with open(self.folder / shard, "rb") as file:
                pixels = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hashlib.sha256(pixels).hexdigest() != self.manifest["files"][shard]["sha256"]:
                raise _damaged(self.folder / shard, "its digest is another")
            self._mapped[shard] = np.frombuffer(pixels, np.uint8)
        return self._mapped[shard]

    def _read_manifest(self) -> dict:
        """Return the manifest of a store whose files are all there, with the sizes that it says."""
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: run `dvc repro prepare`.") from None
        except ValueError:
            raise _damaged(path, "is not JSON") from None
        if manifest.get("format") != FORMAT:
            raise _damaged(path, f"has format {manifest.get('format')}, not {FORMAT}")
        if manifest.pop("sha256", None) != _digest_of(manifest):
            raise _damaged(path, "its digest is another")
        for name, expected in manifest["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected["bytes"]:
                raise _damaged(path, f"has {size:,} bytes, not {expected['bytes']:,}")
        if sha256_of(self.folder / "pictures.csv") != manifest["files"]["pictures.csv"]["sha256"]:
            raise _damaged(self.folder / "pictures.csv", "its digest is another")
        return manifest


def check_settings(manifest: dict, settings: Data) -> None:
    """Raise UserError where a store was made with other settings than these, of the group `data`."""
    made = {"source": manifest["source"], "resize": manifest["resize"]} | manifest["split"]
    other = [
        f"data.{key} = {value}, and now it is {getattr(settings, key)}"
        for key, value in made.items()
        if value != getattr(settings, key)
    ]
    if other:
        raise UserError(
            f"data/prepared was made with {'; '.join(other)}: run `dvc repro prepare`.\n"
            "It reads params.yaml, so put there first what you gave with -S."
        )


def _digest_of(manifest: dict) -> str:
    """Return the sha256 of what a manifest says, but for this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is damaged ({problem}): run `dvc repro --force prepare`.")


# Writing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A picture in the store."""

    picture: Picture
    shard: str
    offset: int  # bytes
    height: int  # px
    width: int  # px


@dataclass(frozen=True)
class Shards:
    """What was written, and what could not be."""

    stored: list[Stored]
    skipped: list[Skipped]
    histogram: np.ndarray  # [3, 256]: how often each channel of the training pictures has each value


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder on the target's disk, which is removed at the end, whatever happens.

    Its name is fixed, so that what a killed run left goes with the next one. (DVC runs a stage once at a time.)
    """
    scratch = target.with_name(target.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`; what was there goes beside where `new` was."""
    if target.exists():
        target.rename(new.with_name(new.name + ".old"))
    new.rename(target)


def write_shards(pictures: Sequence[Picture], folder: Path, decode: Callable[[bytes], np.ndarray]) -> Shards:
    """Decode the pictures into shards in the new folder, in parallel, with few of them in memory at a time.

    In a shard they keep their order. Skipped are those for which `decode` raises a ValueError, with its message as the
    reason. A full disk raises OSError, with the shard's name.
    """
    folder.mkdir()
    number = 2 ** max(0, round(math.log2(max(1, len(pictures)) / SHARD_PICTURES)))
    shard_of = {picture.path: _shard_name(picture.path, number) for picture in pictures}
    ordered = sorted(pictures, key=lambda picture: shard_of[picture.path])
    results = parallel_map(lambda picture: read_pixels(picture.file, decode), ordered)
    bar = tqdm(zip(ordered, results, strict=True), "prepare", len(ordered), unit=" pictures", disable=None)

    stored, skipped, histogram = [], [], np.zeros((3, 256), np.int64)
    for shard, group in itertools.groupby(bar, lambda pair: shard_of[pair[0].path]):
        with _named(folder / shard), open(folder / shard, "wb") as file:
            for picture, pixels in group:
                if isinstance(pixels, str):
                    skipped.append((picture.path, pixels))
                    continue
                stored.append(Stored(picture, shard, file.tell(), *pixels.shape[:2]))
                file.write(pixels)
                if picture.split == "train":
                    histogram += _histogram(pixels)
    return Shards(stored, skipped, histogram)


def write_manifest(folder: Path, dataset: Dataset, shards: Shards, source: str, resize: int, **split: float) -> dict:
    """Write pictures.csv and manifest.json beside the shards; return the manifest.

    `split` are the settings, of those of the group `data`, by which pictures were chosen and split; they are recorded.
    `mean` and `std` are of the training pictures' channels, on a scale where white is 1; `duplicates` are pictures of
    val and test that are in train too, byte for byte.
    """
    stored = sorted(shards.stored, key=lambda each: (each.picture.split, each.picture.path))
    with _named(folder / "pictures.csv"), open(folder / "pictures.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for each in stored:
            picture = each.picture
            name = dataset.classes[picture.label]
            place = (each.shard, each.offset, each.height, each.width)
            writer.writerow((picture.path, picture.split, name, *place, picture.sha256))
    pictures = [each.picture for each in stored]
    trained = {picture.sha256 for picture in pictures if picture.split == "train"}
    mean, std = _mean_and_std(shards.histogram)
    manifest = {
        "format": FORMAT,
        "source": source,
        "digest": dataset.digest,
        "classes": dataset.classes,
        "counts": count(pictures, dataset),
        "resize": resize,
        "split": split,
        "mean": mean,
        "std": std,
        "duplicates": sum(picture.split != "train" and picture.sha256 in trained for picture in pictures),
        "skipped": sorted(dataset.skipped + shards.skipped),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())
        },
    }
    path = folder / "manifest.json"
    sealed = manifest | {"sha256": _digest_of(manifest)}
    with _named(path):
        path.write_text(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _shard_name(path: str, number: int) -> str:
    """Return the shard that the picture at `path` belongs to, of `number`, a power of two.

    By the path's hash, so that a picture that comes or goes changes one shard.
    """
    return f"shard-{int(hashlib.sha256(path.encode()).hexdigest(), 16) % number:03}.bin"


def read_pixels(file: Path, decode: Callable[[bytes], np.ndarray]) -> np.ndarray | str:
    """Return the decoded picture, or why there is none."""
    try:
        size = file.stat().st_size
        if size > MAX_FILE:
            return f"too large: {size / 1e6:,.0f} MB"
        return np.ascontiguousarray(decode(file.read_bytes()))
    except OSError as error:
        return f"can't be read: {error.strerror}"
    except ValueError as error:
        return str(error)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, -1, 0)])


def _mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, values from 0 to 1; from whole numbers, so exactly."""
    count, values = int(histogram[0].sum()), np.arange(256)
    sums = [int(each) for each in histogram @ values]
    squares = [int(each) for each in histogram @ values**2]
    mean = [total / count / 255 for total in sums]
    std = [math.sqrt(count * square - total**2) / count / 255 for total, square in zip(sums, squares, strict=True)]
    return [round(value, 6) for value in mean], [round(value, 6) for value in std]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an OSError of writing, which has no name of a file, that of `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
