"""Folders, archives and recipes of pictures: what is taken from them, and what is refused."""

import functools
import hashlib
import http.server
import io
import itertools
import os
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

from finetune import archives, datasets, drawing, files, sources
from finetune.errors import UserError
from helpers import ROOT, make_pictures

import pytest
from PIL import Image
from ruamel.yaml import YAML

# Folders ------------------------------------------------------------------------------------------------------------


def paths(dataset: datasets.Dataset, split: str) -> list[str]:
    return [picture.path for picture in dataset.pictures if picture.split == split]


def test_folders_of_splits(tmp_path):
    make_pictures(tmp_path, {"train/bees": 1, "train/ants/nest": 2, "val/ants": 1, "val/bees": 1, "test/ants": 1})
    dataset = datasets.with_val(datasets.read(tmp_path, "pictures"), 0.5, 0)
    assert dataset.classes == ["ants", "bees"]
    assert paths(dataset, "train") == ["train/ants/nest/0.png", "train/ants/nest/1.png", "train/bees/0.png"]
    assert paths(dataset, "val") == ["val/ants/0.png", "val/bees/0.png"]
    assert paths(dataset, "test") == ["test/ants/0.png"]
    assert all(dataset.classes[picture.label] == picture.path.split("/")[1] for picture in dataset.pictures)


def test_hidden_files_and_files_outside_the_class_folders_are_ignored(tmp_path):
    make_pictures(tmp_path, {"ants": 2, "bees": 2, ".cache": 1, "ants/.thumbnails": 1, "__MACOSX/ants": 1})
    expected = datasets.read(tmp_path, "pictures")
    (tmp_path / "README.txt").write_text("no picture")
    (tmp_path / "ants/.DS_Store").write_text("no picture")
    assert datasets.read(tmp_path, "pictures") == expected
    assert len(expected.pictures) == 4


def test_enclosing_folders_are_no_part_of_the_paths(tmp_path):
    make_pictures(tmp_path / "download/pictures", {"ants": 2, "bees": 2})
    (tmp_path / "download/LICENSE").write_text("free")
    dataset = datasets.read(tmp_path, "pictures")
    assert dataset.pictures[0].path == "ants/0.png"
    assert dataset.digest == datasets.read(tmp_path / "download/pictures", "pictures").digest


def test_links_to_files_are_followed_and_broken_ones_skipped(tmp_path):
    make_pictures(tmp_path, {"ants": 2, "bees": 2})
    make_pictures(tmp_path / "elsewhere", {"more": 1})
    shutil.move(tmp_path / "elsewhere", tmp_path / ".elsewhere")
    (tmp_path / "ants/linked.png").symlink_to(tmp_path / ".elsewhere/more/0.png")
    (tmp_path / "ants/broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "ants/folder").symlink_to(tmp_path / ".elsewhere/more")
    os.mkfifo(tmp_path / "ants/pipe")
    dataset = datasets.read(tmp_path, "pictures")
    assert "ants/linked.png" in paths(dataset, "train")
    assert dataset.skipped == [
        ("ants/broken.png", "broken link"),
        ("ants/folder", "link to a folder"),
        ("ants/pipe", "not a file"),
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "pictures has no class folders, and a classifier needs two or more.\nExpected train/<class>/…"),
        (["ants"], r"one class folder \(ants\)"),
        (["train/ants"], r"one class folder \(ants\)"),
        (["train/ants", "train/bees", "valid/ants"], "pictures has valid beside train. Rename valid to val."),
        (["train/ants", "train/bees", "Validation"], "Rename Validation to val"),
        (["train/ants", "train/bees", "extra/ants"], "pictures has extra beside train.\nExpected"),
        (["Train/ants", "Train/bees", "Val/ants"], "Train, Val but no train. Rename Train to train. Rename Val to val"),
        (["val/ants", "val/bees", "test/ants"], "pictures has test, val but no train.\nExpected"),
        (
            ["train/ants", "train/bees", "val/wasps"],
            "val has wasps, and train has no such class.\nTrain has ants",
        ),
    ],
)
def test_other_layouts_are_errors(folders, message, tmp_path):
    make_pictures(tmp_path, dict.fromkeys(folders, 1))
    with pytest.raises(UserError, match=message):
        datasets.read(tmp_path, "pictures")


def test_a_name_that_no_file_of_ours_could_hold_is_an_error(tmp_path):
    make_pictures(tmp_path, {"ants": 1, "bees": 1})
    (tmp_path / "ants/two\nlines.png").write_text("")
    with pytest.raises(UserError, match=r"'ants/two\\nlines.png' .* rename it"):
        datasets.read(tmp_path, "pictures")


def test_the_digest_is_that_of_sha256sum_and_follows_contents_and_paths(tmp_path):
    make_pictures(tmp_path, {"ants": 2, "bees": 1})
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(tmp_path)}\n"
        for file in tmp_path.rglob("*.png")
    ]
    before = datasets.read(tmp_path, "pictures").digest
    assert before == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    (tmp_path / "bees").rename(tmp_path / "wasps")
    assert datasets.read(tmp_path, "pictures").digest != before


def test_num_classes_must_fit():
    classes = ["daisy", "rose", "tulip", "poppy", "iris", "lily"]
    datasets.check_num_classes(6, classes, "data/flowers")
    with pytest.raises(UserError) as raised:
        datasets.check_num_classes(2, classes, "data/flowers")
    assert str(raised.value) == (
        "num_classes is 2, but data/flowers has 6 classes (daisy, rose, tulip, poppy, iris, …): "
        "set it with -S num_classes=6"
    )


# The split ----------------------------------------------------------------------------------------------------------


def dataset_of(contents: list[list[str]], names: str = "picture-{}") -> datasets.Dataset:
    """Return a data set whose class i holds the files of contents[i], named by their place in the list."""
    pictures = [
        datasets.Picture(f"{label}/{names.format(i)}", Path("nowhere"), "train", label, content)
        for label, group in enumerate(contents)
        for i, content in enumerate(group)
    ]
    return datasets.Dataset([str(i) for i in range(len(contents))], ["train"], pictures, [], "")


def validating(dataset: datasets.Dataset, fraction: float = 0.25, seed: int = 0) -> list[tuple[int, str]]:
    return sorted((p.label, p.sha256) for p in datasets.with_val(dataset, fraction, seed).pictures if p.split == "val")


CONTENTS = [[f"{label}-{i}" for i in range(20)] for label in "ab"]


@pytest.mark.parametrize(
    ("size", "fraction", "expected"),
    [(20, 0.25, 5), (20, 0.2, 4), (10, 0.01, 1), (10, 0.99, 9), (2, 0.2, 1), (2, 0.8, 1), (1, 0.5, 0)],
)
def test_each_class_gives_its_share(size, fraction, expected):
    chosen = validating(dataset_of([group[:size] for group in CONTENTS]), fraction)
    assert [sum(label == each for label, _ in chosen) for each in (0, 1)] == [expected, expected]


def test_the_split_depends_on_contents_and_seed_alone():
    expected = validating(dataset_of(CONTENTS))
    assert validating(dataset_of([group[::-1] for group in CONTENTS], names="renamed-{}")) == expected
    assert validating(dataset_of(CONTENTS), seed=1) != expected


def test_a_new_picture_moves_at_most_one_other():
    before = set(validating(dataset_of(CONTENTS)))
    after = set(validating(dataset_of([[*CONTENTS[0], "new"], CONTENTS[1]])))
    assert len(before - after) <= 1


def test_identical_files_stay_together_where_the_share_allows():
    twins = [[name for name in group for _ in "12"] for group in CONTENTS]
    chosen = validating(dataset_of(twins))
    assert len(chosen) == 20
    assert len(set(chosen)) == 10


def test_a_val_folder_is_left_as_it_is(tmp_path):
    make_pictures(tmp_path, {"train/ants": 4, "train/bees": 4, "val/ants": 1, "val/bees": 1})
    dataset = datasets.read(tmp_path, "pictures")
    assert datasets.with_val(dataset, 0.5, 0) is dataset


def with_fold(dataset: datasets.Dataset, folds: int, fold: int, seed: int = 0) -> datasets.Dataset:
    return datasets.with_fold(dataset, folds, fold, seed, "pictures")


def sizes(part_of: dict[str, int], folds: int, names) -> list[int]:
    return [sum(part_of[name] == part for name in names) for part in range(folds)]


@pytest.mark.parametrize("counts", [(20, 20), (7, 8, 9), (6, 6, 6, 6, 6), (5, 5), (11, 13, 17, 9)])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_the_parts_of_each_class_and_of_all_differ_by_one_at_most(counts, folds):
    groups = [[f"{label}-{i}" for i in range(count)] for label, count in enumerate(counts)]
    part_of = datasets.parts([(label, name) for label, group in enumerate(groups) for name in group], folds, 0)
    for names in (*groups, [name for group in groups for name in group]):
        of_part = sizes(part_of, folds, names)
        assert sum(of_part) == len(names)
        assert max(of_part) - min(of_part) <= 1


def test_every_training_picture_validates_in_one_fold():
    dataset = dataset_of([group[:17] for group in CONTENTS])
    validating = [paths(with_fold(dataset, 3, fold), "val") for fold in range(3)]
    assert sorted(path for chosen in validating for path in chosen) == sorted(each.path for each in dataset.pictures)
    for fold, chosen in enumerate(validating):
        split = with_fold(dataset, 3, fold)
        assert split.splits == ["train", "val"]
        assert [each.path for each in split.pictures] == [each.path for each in dataset.pictures]
        assert sorted(chosen + paths(split, "train")) == sorted(each.path for each in dataset.pictures)


def test_the_folds_depend_on_contents_and_seed_alone():
    def contents(names: str, seed: int, turn: int):
        dataset = dataset_of([group[::turn] for group in CONTENTS], names)
        return {each.sha256 for each in with_fold(dataset, 3, 1, seed).pictures if each.split == "val"}

    assert contents("renamed-{}", 0, -1) == contents("picture-{}", 0, 1)
    assert contents("picture-{}", 1, 1) != contents("picture-{}", 0, 1)


@pytest.mark.parametrize("new", [f"new-{i}" for i in range(8)])
def test_a_new_picture_moves_few_others_from_part_to_part(new):
    files = [(label, name) for label, group in enumerate(CONTENTS) for name in group]
    before, after = datasets.parts(files, 5, 0), datasets.parts([(0, new), *files], 5, 0)
    assert sum(before[name] != after[name] for name in before) <= 8  # one at each of 4 borders of 2 classes


def test_identical_files_are_in_one_part_whatever_their_class():
    twins = [[f"{label}-{i}" for i in range(6) for _ in "123"[: i % 3 + 1]] + ["shared"] for label in "ab"]
    for fold in range(4):
        split = with_fold(dataset_of(twins), 4, fold)
        of = {name: {each.sha256 for each in split.pictures if each.split == name} for name in ("train", "val")}
        assert not of["train"] & of["val"]
        assert of["val"]


def test_the_order_of_the_files_does_not_matter_to_the_parts():
    files = [(label, name) for label, group in enumerate(CONTENTS) for name in [*group, "shared"]]
    assert datasets.parts(files[::-1], 3, 0) == datasets.parts(files, 3, 0)


def test_folds_set_the_val_folder_aside_and_leave_test(tmp_path):
    make_pictures(tmp_path, {"train/ants": 4, "train/bees": 4, "val/ants": 2, "val/bees": 1, "test/ants": 1})
    for name in ("train/ants/gone.png", "val/ants/gone.png"):
        (tmp_path / name).symlink_to("nowhere")
    split = with_fold(datasets.read(tmp_path, "pictures"), 2, 0)
    assert sorted(split.splits) == ["test", "train", "val"]
    assert [path.rpartition("/")[0] for path in paths(split, "val")] == ["train/ants"] * 2 + ["train/bees"] * 2
    assert paths(split, "test") == ["test/ants/0.png"]
    assert not any(each.path.startswith("val/") for each in split.pictures)
    assert split.skipped == [("train/ants/gone.png", "broken link")]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            [["a", "b", "c"], ["x", "y", "y", "y"]],
            "data.folds = 3, but pictures has 2 different pictures of 1 to train on.\n"
            "Lower it with -S data.folds=2, or add pictures of 1.",
        ),
        (
            [["a"], ["x", "y", "z"]],
            "data.folds = 3, but pictures has 1 different pictures of 0 to train on.\nAdd pictur",
        ),
    ],
)
def test_a_class_with_fewer_pictures_than_folds_is_an_error(contents, message):
    with pytest.raises(UserError) as raised:
        with_fold(dataset_of(contents), 3, 0)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ([100, 100], 10, [5, 5]),
        ([100, 100], 11, [6, 5]),
        ([123, 121], 20, [10, 10]),
        ([900, 90, 10], 100, [90, 9, 1]),
        ([60, 30, 10], 9, [5, 3, 1]),
        ([50, 30, 20], 8, [4, 2, 2]),
        ([900, 90, 10], 10, [8, 1, 1]),  # one of each at least
        ([50, 50, 50], 1, [1, 1, 1]),
        ([50, 0, 50], 4, [2, 0, 2]),
        ([3, 2], 5, [3, 2]),
        ([3, 2], 99, [3, 2]),
        ([0, 0], 5, [0, 0]),
    ],
)
def test_a_limit_is_shared_in_proportion(counts, limit, expected):
    assert datasets.shares(counts, limit) == expected


def test_a_larger_limit_takes_no_fewer_of_any_class():
    # With the largest remainders, 10 to 11 of these takes one away from the last.
    before = [0, 0, 0]
    for limit in range(1, 1401):
        shares = datasets.shares([600, 600, 200], limit)
        assert all(now >= then for now, then in zip(shares, before, strict=True))
        assert sum(shares) == max(limit, 3)
        assert all(abs(now - limit * count / 1400) <= 1 for now, count in zip(shares, (600, 600, 200), strict=True))
        before = shares


def test_a_limited_split_is_a_part_of_the_whole_one_and_a_larger_limit_contains_it():
    whole = datasets.with_val(dataset_of([CONTENTS[0], CONTENTS[1][:8]]), 0.25, 0)
    chosen = [{each for each in datasets.limited(whole, limit, 0).pictures} for limit in (1, 2, 4, 5, 9, 20)]
    for fewer, more in itertools.pairwise(chosen):
        assert fewer <= more <= set(whole.pictures)
    assert [len(each) for each in chosen] == [4, 4, 8, 10, 9 + 7, 20 + 7]
    assert {each.split for each in chosen[0]} == {"train", "val"}


def test_which_pictures_a_limit_takes_depends_on_contents_and_seed_alone():
    def taken(names: str, seed: int, turn: int):
        dataset = dataset_of([group[::turn] for group in CONTENTS], names)
        return {each.sha256 for each in datasets.limited(dataset, 10, seed).pictures}

    assert taken("renamed-{}", 0, -1) == taken("picture-{}", 0, 1)
    assert taken("picture-{}", 1, 1) != taken("picture-{}", 0, 1)


def test_a_limit_that_leaves_nothing_out_changes_nothing():
    dataset = replace(dataset_of(CONTENTS), skipped=[("0/gone.png", "broken link")])
    assert datasets.limited(dataset, 40, 0) is dataset
    assert datasets.limited(dataset, 39, 0).skipped == []  # or a few such files would be a large share


# Archives -----------------------------------------------------------------------------------------------------------


def zip_of(members: dict[str, bytes], change=lambda info: None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.filename, info.compress_type = name, zipfile.ZIP_DEFLATED  # as it is, also where ZipInfo mends it
            change(info)
            file.writestr(info, data)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "../outside"
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def unix_link(info):
    info.create_system, info.external_attr = 3, 0o120777 << 16


def bzip2(info):
    info.compress_type = zipfile.ZIP_BZIP2


def encrypted() -> bytes:
    data = bytearray(zip_of({"a.png": b"x"}))
    data[6] |= 1  # the flags in the local header, and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def declaring(size: int, data: bytes = b"x" * 100) -> bytes:
    """Return a zip whose directory declares a size of its file other than what it unpacks to."""
    return patched(zip_of({"a.png": data}), len(data).to_bytes(4, "little"), size.to_bytes(4, "little"))


GOOD = {"ants/a.png": b"ant", "bees/b.png": b"bee"}
ARCHIVES = {
    "zip": zip_of(GOOD),
    "tar": tar_of(GOOD),
    "tar.gz": tar_of(GOOD, "w:gz"),
    "tar.bz2": tar_of(GOOD, "w:bz2"),
    "tar.xz": tar_of(GOOD, "w:xz"),
    "tar, with dots": tar_of({f"./{name}": data for name, data in GOOD.items()}),
    "hidden files": zip_of({".DS_Store": b"", "__MACOSX/ants/._a.png": b"", **GOOD}),
}
REFUSED = {
    "zip, up": (zip_of({"../evil.png": b"x"}), "'../evil.png' is a path that leaves"),
    "zip, up, hidden": (zip_of({"ants/../../.evil": b"x"}), "'ants/../../.evil' is a path that leaves"),
    "zip, absolute": (zip_of({"/tmp/evil.png": b"x"}), "'/tmp/evil.png' is an absolute path"),
    "zip, drive": (zip_of({"C:evil.png": b"x"}), "'C:evil.png' is an absolute path"),
    "zip, backslash": (zip_of({"..\\evil.png": b"x"}), r"is a path with a backslash"),
    "zip, link": (zip_of({"a.png": b"/etc/passwd"}, unix_link), "'a.png' is a link or a device"),
    "zip, bzip2": (zip_of({"a.png": b"x"}, bzip2), "'a.png' is compressed in an unusual way"),
    "zip, encrypted": (encrypted(), "'a.png' is encrypted"),
    "zip, twice": (zip_of({"a": b"x", "a/b.png": b"y"}), "'a/b.png' is a name that another member has"),
    "zip, larger than declared": (declaring(50), "a.png"),
    "zip, smaller than declared": (declaring(150), "'a.png' is not of the declared size"),
    "zip, declared huge": (declaring(2**32 - 2), "'a.png' is too large: 4,294,967,294 bytes in 1 files"),
    "tar, up": (tar_of({"../evil.png": b"x"}), "'../evil.png' is a path that leaves"),
    "tar, absolute": (tar_of({"/tmp/evil.png": b"x"}), "'/tmp/evil.png' is an absolute path"),
    "tar, symlink": (tar_of({"a.png": b""}, kind=tarfile.SYMTYPE), "'a.png' is a link or a device"),
    "tar, hard link": (tar_of({"a.png": b""}, kind=tarfile.LNKTYPE), "'a.png' is a link or a device"),
    "tar, device": (tar_of({"a.png": b""}, kind=tarfile.CHRTYPE), "'a.png' is a link or a device"),
    "tar, pipe": (tar_of({"a.png": b""}, kind=tarfile.FIFOTYPE), "'a.png' is a link or a device"),
    "zip, damaged": (patched(zip_of({"a.png": b"x" * 9}), b"PK\1\2", b"PK\1\1"), "can't be unpacked"),
    "zip, cut": (ARCHIVES["zip"][:-30], "can't be unpacked"),
    "zip, wrong bytes": (patched(zip_of(GOOD), zip_of(GOOD)[40:46], bytes(6)), "can't be unpacked"),
    "tar, cut in a file": (ARCHIVES["tar"][:514], "can't be unpacked"),
    "tar, cut between files": (ARCHIVES["tar"][:1024], "can't be unpacked"),
    "tar, damaged header": (patched(ARCHIVES["tar"], b"bees", b"bEEs"), "can't be unpacked"),
    "tar.gz, cut": (ARCHIVES["tar.gz"][:-40], "can't be unpacked"),
    "tar.xz, cut": (ARCHIVES["tar.xz"][:100], "can't be unpacked"),
    "neither": (b"Dear Sir or Madam", "neither a zip nor a tar"),
    "empty": (b"", "neither a zip nor a tar"),
}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_unpacked_without_hidden_files(name, tmp_path):
    (tmp_path / "archive").write_bytes(ARCHIVES[name])
    archives.unpack(tmp_path / "archive", tmp_path / "target")
    assert files_in(tmp_path / "target") == GOOD


@pytest.mark.parametrize("name", REFUSED)
def test_archives_that_would_do_harm_are_refused(name, tmp_path):
    data, message = REFUSED[name]
    (tmp_path / "room").mkdir()
    (tmp_path / "room/archive").write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        archives.unpack(tmp_path / "room/archive", tmp_path / "room/target")
    assert str(tmp_path / "room/archive") in str(raised.value)
    assert sum(len(file) for file in files_in(tmp_path / "room/target").values()) <= 150
    assert not (set(files_in(tmp_path)) - {"room/archive"} - {f"room/target/{name}" for name in ("a", "a.png", *GOOD)})


def test_an_archive_must_not_grow_without_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TOTAL", 100_000)
    bomb = zip_of({f"{i}.png": bytes(90_000) for i in range(40)})
    assert len(bomb) * archives.MAX_GROWTH < 40 * 90_000
    (tmp_path / "bomb.zip").write_bytes(bomb)
    with pytest.raises(UserError, match=r"too large: .* bytes in .* files so far"):
        archives.unpack(tmp_path / "bomb.zip", tmp_path / "target")
    written = sum(map(len, files_in(tmp_path / "target").values()))
    assert written <= max(100_000, archives.MAX_GROWTH * len(bomb))


# Recipes ------------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """A web server of a folder's files, on this machine; `requests` counts."""

    requests = 0

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def room(tmp_path):
    """Return a folder with www/pictures.zip, a recipe.yaml for it, and again.tar: the same pictures, packed anew."""
    make_pictures(tmp_path / "pictures", {"train/ants": 2, "train/bees": 2, "val/ants": 1, "val/bees": 1})
    contents = files_in(tmp_path / "pictures")
    (tmp_path / "www").mkdir()
    (tmp_path / "www/pictures.zip").write_bytes(zip_of(contents | {"train/ants/no.gif": b"no ant"}))
    (tmp_path / "again.tar").write_bytes(tar_of({f"enclosing/{name}": contents[name] for name in sorted(contents)}))
    (tmp_path / "other.zip").write_bytes(zip_of(contents | {"train/ants/new.png": b"another"}))
    server = Server(tmp_path / "www")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Room(tmp_path, server)
    server.shutdown()
    server.server_close()


class Room:
    def __init__(self, folder: Path, server: Server):
        self.folder, self.server = folder, server
        archive = (folder / "www/pictures.zip").read_bytes()
        self.recipe = {
            "url": f"{server.url}/pictures.zip",
            "bytes": len(archive),
            "sha256": hashlib.sha256(archive).hexdigest(),
            "digest": datasets.read(folder / "pictures", "pictures").digest,
            "exclude": ["no.*"],
        }

    def load(self, override: str | None = None, **changes) -> datasets.Dataset:
        recipe = {key: value for key, value in (self.recipe | changes).items() if value is not None}
        YAML().dump(recipe, self.folder / "recipe.yaml")
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        return sources.load(str(self.folder / "recipe.yaml"), override, self.folder / "cache", self.folder / "scratch")

    def cached(self) -> list[str]:
        return sorted(os.listdir(self.folder / "cache"))


def test_an_archive_is_fetched_once(room):
    assert len(room.load().pictures) == 6
    assert len(room.load().pictures) == 6
    assert room.server.requests == 1
    assert room.cached() == [f"{room.recipe['sha256']}.zip"]


def test_a_damaged_archive_in_the_cache_is_fetched_anew(room):
    room.load()
    (room.folder / "cache" / room.cached()[0]).write_bytes(b"damaged")
    assert len(room.load().pictures) == 6
    assert room.server.requests == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "pictures.zip has changed: its sha256 is {sha256}, expected 0000"),
        ({"bytes": 1000}, "bytes or more, expected 1,000"),
        ({"bytes": 10**9}, "bytes or more, expected 1,000,000,000"),
        ({"url": "http://127.0.0.1:9/pictures.zip"}, "can't fetch http://127.0.0.1:9/pictures.zip: .*refused"),
        ({"url": "{server}/nothing.zip"}, "can't fetch .*/nothing.zip: HTTP Error 404"),
    ],
)
def test_what_is_fetched_is_verified_or_not_kept(changes, message, room):
    changes = {key: value.format(server=room.server.url) if key == "url" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message.format(**room.recipe)) as raised:
        room.load(**changes)
    assert "DATA_ARCHIVE=<path or URL" in str(raised.value)
    assert "-S data.source=data/sample.yaml" in str(raised.value)
    assert room.cached() == []


def test_other_contents_than_the_recipe_says_are_an_error(room):
    with pytest.raises(UserError, match=f"digest {room.recipe['digest']}, expected 0000"):
        room.load(str(room.folder / "again.tar"), digest="0" * 64)


def test_the_archive_that_the_recipe_names_is_taken_by_its_own_digest(room):
    assert room.load(digest="0" * 64).digest == room.recipe["digest"]


@pytest.mark.parametrize("name", ["www/pictures.zip", "again.tar", "pictures"])
def test_an_archive_of_ones_own_with_the_same_pictures_is_taken(name, room):
    assert room.load(str(room.folder / name)).digest == room.recipe["digest"]
    assert room.server.requests == 0
    assert not (room.folder / "cache").exists()


def test_an_archive_of_ones_own_with_other_pictures_is_not(room):
    with pytest.raises(UserError, match=r"other.zip has other pictures than .*recipe.yaml says"):
        room.load(str(room.folder / "other.zip"))


def test_another_url_is_fetched_once_and_kept_only_if_it_fits(room):
    shutil.copy(room.folder / "again.tar", room.folder / "www/again.tar")
    shutil.copy(room.folder / "other.zip", room.folder / "www/other.zip")
    with pytest.raises(UserError, match="has other pictures"):
        room.load(f"{room.server.url}/other.zip")
    assert room.cached() == []
    for _ in range(2):
        assert len(room.load(f"{room.server.url}/again.tar").pictures) == 6
    assert room.server.requests == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclud": []}, "unknown key exclud. Nearest: exclude."),
        ({"digest": None}, "the key digest is missing"),
        ({"bytes": "many"}, "bytes = 'many' should be a valid integer"),
        ({"sha256": "abc"}, "sha256 = 'abc'"),
        ({"url": "pictures.zip"}, "url = 'pictures.zip'"),
    ],
)
def test_a_wrong_recipe_says_which_key(changes, message, room):
    with pytest.raises(UserError, match=f"recipe.yaml: {message}"):
        room.load(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drawn: [ants, beez]\ntrain: 1\nval: 1\nsize: 32\nseed: 0", "drawn.1 = 'beez' is nothing.*Nearest: bees"),
        ("drawn: [ants, ants]\ntrain: 1\nval: 1\nsize: 32\nseed: 0", "should name every class once"),
        ("drawn: [ants]\ntrain: 1\nval: 1\nsize: 32\nseed: 0", "drawn = .* at least 2"),
        ("drawn: [ants, bees]\ntrain: 0\nval: 1\nsize: 32\nseed: 0", "train = 0 should be greater"),
        ("- a list", "should hold `key: value` lines"),
        ("", "should hold `key: value` lines"),
        ("url: [", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_of_drawn_pictures_says_which_key(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        sources.read_recipe(tmp_path / "recipe.yaml")


def test_drawn_pictures_follow_from_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(drawing.CLASSES, "bees", drawing.CLASSES["ants"])  # told apart by name alone
    recipe = sources.DrawnRecipe(drawn=["bees", "ants"], train=2, val=1, size=32, seed=5)
    more = sources.DrawnRecipe(drawn=["ants", "bees"], train=3, val=1, size=32, seed=5)
    other = sources.DrawnRecipe(drawn=["bees", "ants"], train=2, val=1, size=32, seed=6)
    for name, each in (("recipe", recipe), ("again", recipe), ("more", more), ("other", other)):
        sources.draw(each, tmp_path / name)
    files = {name: files_in(tmp_path / name) for name in ("recipe", "again", "more", "other")}
    assert len(set(files["recipe"].values())) == 6
    assert files["recipe"] == files["again"]
    assert files["recipe"].items() <= files["more"].items()
    assert not set(files["recipe"].values()) & set(files["other"].values())
    with Image.open(tmp_path / "recipe/train/ants/0000.ppm") as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


@pytest.mark.parametrize("name", ["hymenoptera.yaml", "sample.yaml"])
def test_the_projects_recipes_are_valid(name):
    recipe = sources.read_recipe(ROOT / "data" / name)
    assert name != "sample.yaml" or set(recipe.drawn) <= set(drawing.CLASSES)


def test_a_missing_source_names_the_nearest(tmp_path):
    make_pictures(tmp_path / "flowers", {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"flowes does not exist. Nearest: .*flowers"):
        sources.load(str(tmp_path / "flowes"), None, tmp_path, tmp_path / "scratch")


# Paths in the environment -------------------------------------------------------------------------------------------


def test_a_users_path(tmp_path, monkeypatch):
    (tmp_path / "main").mkdir()
    (tmp_path / "main/here.zip").write_text("")
    monkeypatch.chdir(tmp_path / "main")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert files.resolve_user_path("here.zip", "DATA_ARCHIVE").samefile("here.zip")
    assert files.resolve_user_path(str(tmp_path / "main/here.zip"), "DATA_ARCHIVE").samefile("here.zip")
    monkeypatch.setenv("HOME", str(tmp_path / "main"))
    assert files.resolve_user_path("~/here.zip", "DATA_ARCHIVE").samefile("here.zip")
    with pytest.raises(UserError, match=r"DATA_ARCHIVE=/nowhere/x.zip does not exist"):
        files.resolve_user_path("/nowhere/x.zip", "DATA_ARCHIVE")
    with pytest.raises(UserError, match=f"DATA_ARCHIVE=x.zip is in none of {tmp_path}/main.\nGive the full path"):
        files.resolve_user_path("x.zip", "DATA_ARCHIVE")


def test_a_users_path_in_a_temporary_copy_of_the_project(tmp_path, monkeypatch):
    (tmp_path / "main").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "main/here.zip").write_text("")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert files.resolve_user_path("here.zip", "DATA_ARCHIVE") == tmp_path / "main/here.zip"


def test_parents_that_may_not_be_looked_at_are_passed_over(tmp_path, monkeypatch):
    class Hidden:
        def environ(self):
            raise files.psutil.AccessDenied

    (tmp_path / "here.zip").write_text("")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(files, "_parents", lambda: [Hidden()])
    assert files.resolve_user_path("here.zip", "DATA_ARCHIVE") == tmp_path / "here.zip"
