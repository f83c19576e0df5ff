"""What is in a folder of pictures: classes, files, splits, and what can't be read.

    train/<class>/…      and, where there are such, val/<class>/… and test/<class>/…
    <class>/…            alone: part of each class is split off for validation

Hidden files and files outside the class folders are ignored.
"""

import hashlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from finetune.errors import UserError
from finetune.files import sha256_of
from finetune.parallel import parallel_map

SPLITS = ("train", "val", "test")
ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
LAYOUT = "Expected train/<class>/…, with val/<class>/… and test/<class>/… where there are such, or <class>/… alone."

Skipped = tuple[str, str]  # a file's path, and why it is not used


@dataclass(frozen=True)
class Picture:
    """A file that should be a picture."""

    path: str  # relative to the data root, with /
    file: Path
    split: str
    label: int  # index of its class
    sha256: str  # of the file


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder, sorted by path, and the files that can't be read."""

    classes: list[str]
    splits: list[str]  # whose folders there are
    pictures: list[Picture]
    skipped: list[Skipped]
    digest: str  # of the pictures' paths and contents, see contents_digest


def read(folder: Path, source: str, exclude: Sequence[str] = ()) -> Dataset:
    """Return the data set in `folder`; `source` is its name in messages, `exclude` are patterns of file names.

    Raises UserError where the folders are not laid out as expected.
    """
    root = data_root(folder)
    folders = split_folders(root, source)
    classes = class_names(folders, source)
    found = sorted(_find_files(root, folders, classes, exclude), key=lambda picture: picture.path)
    hashed = list(parallel_map(_hashed, found))
    pictures = [picture for picture in hashed if isinstance(picture, Picture)]
    skipped = [failure for failure in hashed if not isinstance(failure, Picture)]
    return Dataset(classes, list(folders), pictures, skipped, contents_digest(pictures))


def with_val(dataset: Dataset, val_fraction: float, split_seed: int) -> Dataset:
    """Return the data set with a validation split: its own, or else a part of each class's training pictures.

    A picture's rank in its class follows from the seed and its contents alone, so neither names, order nor machine
    matter, a new picture moves few others, and identical files stand side by side. At least one picture of a class
    validates, and at least one trains.
    """
    if "val" in dataset.splits:
        return dataset
    chosen: set[str] = set()
    for (split, _), group in _groups(dataset).items():
        if split == "train":
            number = min(max(round(len(group) * val_fraction), 1), len(group) - 1)
            chosen.update(picture.path for picture in _ranked(group, split_seed)[:number])
    pictures = [replace(each, split="val") if each.path in chosen else each for each in dataset.pictures]
    return replace(dataset, splits=[*dataset.splits, "val"], pictures=pictures)


def with_fold(dataset: Dataset, folds: int, fold: int, split_seed: int, source: str) -> Dataset:
    """Return the data set with part `fold` of the `folds` parts of its training pictures as `val`.

    The `val` that it had is set aside. Raises UserError, which names `source`, where a class has too few pictures.
    """
    training = [(picture.label, picture.sha256) for picture in dataset.pictures if picture.split == "train"]
    for label, name in enumerate(dataset.classes):
        number = len({sha256 for each, sha256 in training if each == label})
        if 0 < number < folds:
            lower = f"Lower it with -S data.folds={number}, or a" if number > 1 else "A"
            raise UserError(
                f"data.folds = {folds}, but {source} has {number} different pictures of {name} to train on.\n"
                f"{lower}dd pictures of {name}."
            )
    part_of = parts(training, folds, split_seed)
    has_val = "val" in dataset.splits
    pictures = [
        replace(each, split="val") if each.split == "train" and part_of[each.sha256] == fold else each
        for each in dataset.pictures
        if each.split != "val"
    ]
    return replace(
        dataset,
        splits=dataset.splits if has_val else [*dataset.splits, "val"],
        pictures=pictures,
        skipped=[each for each in dataset.skipped if not (has_val and each[0].startswith("val/"))],
    )


def parts(files: Iterable[tuple[int, str]], folds: int, split_seed: int) -> dict[str, int]:
    """Return the part, from 0 on, that each file belongs to: {sha256: part}, of files given as (label, sha256).

    Of each class, and of all classes together, the parts' sizes differ by one at most; what is in several classes
    counts in the first. As in `with_val`, seed and contents alone decide, and a new file moves few others: a part is a
    stretch of the class's files in the order of their ranks, and the files that are left over go on from the part at
    which those of the class before ended.
    """
    label_of = {sha256: label for label, sha256 in sorted(files, reverse=True)}
    ordered = sorted(label_of, key=lambda sha256: (label_of[sha256], _rank(split_seed, sha256)))
    part_of: dict[str, int] = {}
    first = 0
    for _, names in itertools.groupby(ordered, label_of.get):
        group = list(names)
        size, rest = divmod(len(group), folds)
        start = 0
        for part in range(folds):
            end = start + size + ((part - first) % folds < rest)
            part_of |= dict.fromkeys(group[start:end], part)
            start = end
        first = (first + rest) % folds
    return part_of


def limited(dataset: Dataset, limit: int, split_seed: int) -> Dataset:
    """Return the data set with about `limit` pictures of each split, in each class's proportion.

    Chosen as in `with_val`, so a larger limit keeps the pictures of a smaller one. Where some are left out, so are the
    files that can't be read.
    """
    groups = _groups(dataset)
    kept: set[str] = set()
    for split in dataset.splits:
        numbers = shares([len(groups.get((split, label), ())) for label in range(len(dataset.classes))], limit)
        for label, number in enumerate(numbers):
            ranked = _ranked(groups.get((split, label), []), split_seed)
            kept.update(picture.path for picture in ranked[:number])
    if len(kept) == len(dataset.pictures):
        return dataset
    return replace(dataset, pictures=[each for each in dataset.pictures if each.path in kept], skipped=[])


def shares(counts: Sequence[int], limit: int) -> list[int]:
    """Return how many to take of each class of `counts` pictures: `limit` in all, but one of each class at least.

    By Webster's method. With that of the largest remainders, a larger limit may take fewer of a class.
    """
    turns = sorted((i > 0, (2 * i + 1) / count, label) for label, count in enumerate(counts) for i in range(count))
    taken = Counter(label for _, _, label in turns[: max(limit, sum(count > 0 for count in counts))])
    return [taken[label] for label in range(len(counts))]


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is the system's rather than the user's."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def data_root(folder: Path) -> Path:
    """Return the folder that holds the split or class folders: `folder`, or the one inside that encloses them all."""
    while True:
        folders = _folders(folder)
        if len(folders) != 1 or folders[0].name in SPLITS or not _folders(folders[0]):
            return folder
        folder = folders[0]


def split_folders(root: Path, source: str) -> dict[str, Path]:
    """Return each split's folder; `train` alone, the root itself, where the root holds the class folders.

    Raises UserError where a folder beside `train` is no split, or where one of its names is a split's but none `train`.
    """
    folders = {folder.name: folder for folder in _folders(root)}
    odd = folders.keys() - set(SPLITS)
    if "train" not in folders:
        odd = {name for name in folders if name in SPLITS or _alias(name)}
        if not odd:
            return {"train": root}
    if not odd:
        return folders
    hints = [f"Rename {name} to {_alias(name)}." for name in sorted(odd) if _alias(name) not in (None, name)]
    problem = "beside train" if "train" in folders else "but no train"
    raise UserError(" ".join([f"{source} has {listing(sorted(odd))} {problem}.", *hints]) + f"\n{LAYOUT}")


def class_names(folders: dict[str, Path], source: str) -> list[str]:
    """Return the classes: the sorted names of train's folders. Raises UserError where they can't be."""
    classes = [folder.name for folder in _folders(folders["train"])]
    if len(classes) < 2:
        found = f"one class folder ({classes[0]})" if classes else "no class folders"
        raise UserError(f"{source} has {found}, and a classifier needs two or more.\n{LAYOUT}")
    for split, folder in folders.items():
        unknown = [each.name for each in _folders(folder) if each.name not in classes]
        if unknown:
            raise UserError(
                f"{source}: {split} has {listing(unknown)}, and train has no such class.\n"
                f"Train has {listing(classes)}. Rename the folder, or move pictures of the class to train."
            )
    return classes


def contents_digest(pictures: Iterable[Picture]) -> str:
    """Return the sha256 of the sorted lines `<sha256>  <path>`, as `sha256sum` prints them.

    So it is the same for the same pictures, however they are packed, on any machine.
    """
    lines = sorted(f"{picture.sha256}  {picture.path}\n" for picture in pictures)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def count(pictures: Iterable[Picture], dataset: Dataset) -> dict[str, dict[str, int]]:
    """Return the number of the pictures in each split and class of the data set: {split: {class: number}}."""
    numbers = {split: dict.fromkeys(dataset.classes, 0) for split in SPLITS if split in dataset.splits}
    for picture in pictures:
        numbers[picture.split][dataset.classes[picture.label]] += 1
    return numbers


def check_counts(counts: dict[str, dict[str, int]], source: str) -> None:
    """Raise UserError where a class has no picture in a split."""
    for split, numbers in counts.items():
        empty = [name for name, number in numbers.items() if not number]
        if empty:
            raise UserError(
                f"{source}: {split} has no picture of {listing(empty)}.\n"
                "Every class needs one or more in each split: add pictures, or remove the class's folders."
            )


def check_num_classes(num_classes: int, classes: Sequence[str], source: str) -> None:
    """Raise UserError where the parameter num_classes is not the number of classes in the data."""
    if num_classes != len(classes):
        raise UserError(
            f"num_classes is {num_classes}, but {source} has {len(classes)} classes ({listing(classes)}): "
            f"set it with -S num_classes={len(classes)}"
        )


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Return the names, separated by commas; of more than `limit`, the first ones and an ellipsis."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _folders(parent: Path) -> list[Path]:
    """Return the folders in `parent` that are not hidden, sorted by name."""
    return sorted(folder for folder in parent.iterdir() if folder.is_dir() and not is_hidden(folder.name))


def _alias(name: str) -> str | None:
    """Return the split that a folder's name means, or None: `val` for `Validation`, and for `Val`."""
    name = name.lower()
    return name if name in SPLITS else ALIASES.get(name)


def _find_files(
    root: Path, folders: dict[str, Path], classes: Sequence[str], exclude: Sequence[str]
) -> Iterator[Picture]:
    """Yield the files below the class folders, not hashed yet."""
    for split, folder in folders.items():
        for label, name in enumerate(classes):
            for file in files_below(folder / name) if (folder / name).exists() else ():
                path = file.relative_to(root).as_posix()
                if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
                    raise UserError(f"{path!a} has control characters, or is not UTF-8: rename it.")
                if not any(fnmatchcase(file.name, pattern) for pattern in exclude):
                    yield Picture(path, file, split, label, sha256="")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all that is below the folder, hidden parts and folders apart. Links to folders are not followed."""
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(parent, name) for name in names + links if not is_hidden(name))


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} can't be read: {error.strerror}")


def no_file(path: Path) -> str | None:
    """Return why what a folder lists can't be read as a file, or None where it can."""
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "link to a folder" if path.is_dir() else "not a file"
    return None


def _hashed(picture: Picture) -> Picture | Skipped:
    """Return the picture with its file's sha256, or why the file can't be read."""
    if reason := no_file(picture.file):
        return picture.path, reason
    try:
        return replace(picture, sha256=sha256_of(picture.file))
    except OSError as error:
        return picture.path, f"can't be read: {error.strerror}"


def _groups(dataset: Dataset) -> dict[tuple[str, int], list[Picture]]:
    """Return the pictures of each split and label."""
    groups = defaultdict(list)
    for picture in dataset.pictures:
        groups[picture.split, picture.label].append(picture)
    return groups


def _ranked(pictures: Sequence[Picture], split_seed: int) -> list[Picture]:
    return sorted(pictures, key=lambda picture: (_rank(split_seed, picture.sha256), picture.path))


def _rank(split_seed: int, sha256: str) -> str:
    return hashlib.sha256(f"{split_seed}:{sha256}".encode()).hexdigest()
