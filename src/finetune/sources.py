"""From `data.source` to a folder of pictures: a recipe, a folder, or an archive.

A recipe is a YAML file that says where an archive is and what is in it, or what to draw.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from finetune import datasets, drawing, schema
from finetune.archives import fetch, unpack
from finetune.datasets import Dataset
from finetune.errors import UserError, nearest
from finetune.files import resolve_user_path, sha256_of

import numpy as np
from pydantic import AfterValidator, Field

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _drawable(name: str) -> str:
    if name not in drawing.CLASSES:
        known = f" Known: {', '.join(drawing.CLASSES)}."
        raise ValueError(f"is nothing that can be drawn.{nearest(name, drawing.CLASSES) or known}")
    return name


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("should name every class once")
    return names


class ArchiveRecipe(schema.Section):
    """Pictures in an archive that is fetched."""

    url: Annotated[str, Field(pattern="^https?://")]
    bytes: Annotated[int, Field(ge=1)]  # of the archive
    sha256: Sha256  # of the archive
    digest: Sha256  # of the contents (datasets.contents_digest), which stays when they are packed anew
    exclude: list[str] = Field(default_factory=list)  # patterns of file names that are no pictures of their class


class DrawnRecipe(schema.Section):
    """Pictures that are drawn on the spot."""

    drawn: Annotated[list[Annotated[str, AfterValidator(_drawable)]], Field(min_length=2), AfterValidator(_distinct)]
    train: Annotated[int, Field(ge=1)]  # pictures a class
    val: Annotated[int, Field(ge=1)]  # pictures a class
    size: Annotated[int, Field(ge=8, le=4096)]  # px, both sides
    seed: Annotated[int, Field(ge=0)]


def load(source: str, override: str | None, cache: Path, scratch: Path) -> Dataset:
    """Return the data set that `source` names; what must be unpacked or drawn for it is written into `scratch`.

    `override` is a path or URL to take instead of a recipe's URL; `cache` is the folder that keeps fetched archives.
    Raises UserError where the source is missing, can't be fetched or read, or is not what the recipe says.
    """
    path = Path(source)
    if not path.exists():
        beside = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.source = {source} does not exist.{nearest(source, beside)}")
    if path.suffix not in (".yaml", ".yml"):
        return datasets.read(_folder_of(path, scratch), source)
    recipe = read_recipe(path)
    if isinstance(recipe, DrawnRecipe):
        draw(recipe, scratch)
        return datasets.read(scratch, source)
    return _load_archive(recipe, source, override, cache, scratch)


def read_recipe(path: Path) -> ArchiveRecipe | DrawnRecipe:
    """Return the validated recipe in a YAML file. Raises UserError, one line for each key that is wrong."""

    def kind_of(contents: Any) -> type[ArchiveRecipe | DrawnRecipe]:
        return DrawnRecipe if isinstance(contents, dict) and "drawn" in contents else ArchiveRecipe

    return schema.read(path, kind_of)


def draw(recipe: DrawnRecipe, folder: Path) -> None:
    """Write the recipe's pictures to folder/<split>/<class>/<number>.ppm.

    Each has a generator of its own, so that more pictures or classes leave the others as they are. PPM, for its bytes
    are the same whatever version of an encoder is installed.
    """
    for split, number in (("train", recipe.train), ("val", recipe.val)):
        for name in recipe.drawn:
            target = folder / split / name
            target.mkdir(parents=True)
            for index in range(number):
                key = hashlib.sha256(f"{recipe.seed}/{split}/{name}/{index}".encode()).digest()
                rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16])))
                drawing.CLASSES[name](rng, recipe.size).save(target / f"{index:04}.ppm")


def _load_archive(recipe: ArchiveRecipe, name: str, override: str | None, cache: Path, scratch: Path) -> Dataset:
    """Return the data set in the recipe's archive, or in `override`, if its contents are what the recipe says."""
    if override and "://" not in override:
        return _read_verified(resolve_user_path(override, "DATA_ARCHIVE"), recipe, name, scratch)
    if not override:
        archive = cache / _cached_name(recipe.url, recipe.sha256)
        if not (archive.is_file() and sha256_of(archive) == recipe.sha256):
            fetch(recipe.url, archive, recipe.bytes, recipe.sha256)
        return _read_verified(archive, recipe, name, scratch)
    archive = cache / _cached_name(override, hashlib.sha256(override.encode()).hexdigest())
    if not archive.is_file():
        fetch(override, archive)
    try:
        return _read_verified(archive, recipe, name, scratch)
    except UserError:
        archive.unlink()  # or it would be found again, whatever the URL holds by then
        raise


def _read_verified(archive: Path, recipe: ArchiveRecipe, name: str, scratch: Path) -> Dataset:
    dataset = datasets.read(_folder_of(archive, scratch), str(archive), recipe.exclude)
    if dataset.digest != recipe.digest and not (archive.is_file() and sha256_of(archive) == recipe.sha256):
        raise UserError(
            f"{archive} has other pictures than {name} says: digest {dataset.digest}, expected {recipe.digest}.\n"
            "Take another archive, or correct the recipe if these are the pictures you mean."
        )
    return dataset


def _folder_of(path: Path, scratch: Path) -> Path:
    """Return the folder at `path`, or the one that the archive at `path` was unpacked to."""
    if path.is_dir():
        return path
    unpack(path, scratch)
    return scratch


def _cached_name(url: str, digest: str) -> str:
    return digest + Path(urlsplit(url).path).suffix
