"""Decoding a picture, and the store of decoded pictures."""

import io
import json
import struct
import zlib

from finetune import datasets, images, params
from finetune.decoding import MAX_PIXELS, Undecodable, decode
from finetune.errors import UserError
from helpers import ROOT, make_pictures

import numpy as np
import pytest
from PIL import Image


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def flat(mode: str, colour, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new(mode, size, colour)


def gray(values: np.ndarray | list, dtype) -> Image.Image:
    return Image.fromarray(np.broadcast_to(np.array(values, dtype), (10, 12)).copy())


def palette(transparent: int | None = None) -> bytes:
    picture = flat("P", 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(picture, **({} if transparent is None else {"transparency": transparent}))


def animation() -> bytes:
    frames = [flat("RGB", "red"), flat("RGB", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


HALF = (0, 0, 0, 128)
PICTURES = {
    "RGB": (encoded(flat("RGB", (10, 20, 30))), (10, 20, 30)),
    "L": (encoded(flat("L", 77)), (77, 77, 77)),
    "1": (encoded(flat("1", 1)), (255, 255, 255)),
    "P": (palette(), (200, 100, 50)),
    "P, another colour transparent": (palette(transparent=0), (200, 100, 50)),
    "P, its colour transparent": (palette(transparent=1), (255, 255, 255)),
    "RGB, its colour transparent": (encoded(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "RGBA, opaque": (encoded(flat("RGBA", (9, 8, 7, 255))), (9, 8, 7)),
    "RGBA, transparent": (encoded(flat("RGBA", (9, 8, 7, 0))), (255, 255, 255)),
    "RGBA, half": (encoded(flat("RGBA", HALF)), (127, 127, 127)),
    "LA, half": (encoded(flat("LA", (0, 128))), (127, 127, 127)),
    "WebP, half": (encoded(flat("RGBA", HALF), "WEBP", lossless=True), (127, 127, 127)),
    "CMYK JPEG": (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
    "CMYK TIFF": (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "YCbCr TIFF": (encoded(flat("YCbCr", (100, 128, 128)), "TIFF"), (100, 100, 100)),
    "16-bit white": (encoded(gray(65535, np.uint16)), (255, 255, 255)),
    "16-bit middle": (encoded(gray(0x8080, np.uint16)), (128, 128, 128)),
    "16-bit dark": (encoded(gray(200, np.uint16)), (1, 1, 1)),
    "16-bit TIFF, big-endian": (encoded(Image.new("I;16B", (12, 10), 0x8080), "TIFF"), (128, 128, 128)),
    "32-bit of 8": (encoded(gray(200, np.int32), "TIFF"), (200, 200, 200)),
    "32-bit of 16": (encoded(gray(0x8080, np.int32), "TIFF"), (128, 128, 128)),
    "float to 1": (encoded(gray(0.5, np.float32), "TIFF"), (128, 128, 128)),
    "float to 255": (encoded(gray(200.0, np.float32), "TIFF"), (200, 200, 200)),
    "float, not a number": (encoded(gray(np.nan, np.float32), "TIFF"), (0, 0, 0)),
    "PGM of 16 bits": (b"P5 12 10 65535\n" + b"\xff" * 240, (255, 255, 255)),
    "animation": (animation(), (254, 0, 0)),
    "BMP": (encoded(flat("RGB", (10, 20, 30)), "BMP"), (10, 20, 30)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_becomes_rgb(name):
    data, expected = PICTURES[name]
    pixels = decode(data, 10)
    assert pixels.shape == (10, 12, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1, pixels[0, 0]


def test_a_gradient_keeps_its_values():
    column = np.linspace(0, 65535, 256).astype(np.uint16)
    picture = Image.fromarray(np.tile(column, (256, 1)))
    assert np.abs(decode(encoded(picture), 256)[0, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    # What the file holds for each orientation, so that the upright picture is red above, with blue at the right.
    upright = flat("RGB", (0, 0, 0), (32, 16))
    upright.paste((200, 0, 0), (0, 0, 32, 8))
    upright.paste((0, 0, 200), (24, 0, 32, 16))
    turns = [[], [0], [3], [1], [5], [2], [6], [4]]  # PIL's Transpose that undoes each of 1 to 8
    stored = upright
    for turn in turns[orientation - 1]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format in ("JPEG", "WEBP") else {}
    pixels = decode(encoded(stored, format, exif=exif, **options), 16).astype(int)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels[4, 8] - (200, 0, 0)).max() < 30
    assert np.abs(pixels[12, 8] - (0, 0, 0)).max() < 30
    assert np.abs(pixels[8, 28] - (0, 0, 200)).max() < 30


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_does_not_cost_the_picture():
    data = encoded(flat("RGB", (10, 20, 30)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    assert decode(data, 10).shape == (10, 12, 3)


@pytest.mark.parametrize(
    ("size", "resize", "shape"),
    [
        ((500, 300), 256, (256, 427, 3)),
        ((300, 500), 256, (427, 256, 3)),
        ((3, 2), 64, (64, 96, 3)),  # enlarged
        ((1, 1), 64, (64, 64, 3)),
        ((2000, 1501), 128, (128, 171, 3)),  # a JPEG that is reduced while decoding
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_the_shorter_side_is_resize(format, size, resize, shape):
    assert decode(encoded(flat("RGB", "gray", size), format), resize).shape == shape


def test_reducing_a_jpeg_while_decoding_changes_little():
    y, x = np.mgrid[0:1200, 0:1600]
    pixels = np.stack([x / 1600, y / 1200, (np.sin(x / 40) + 1) / 2], axis=-1)
    picture = Image.fromarray((pixels * 255).astype(np.uint8))
    plain = np.asarray(picture.resize((128, 96), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(encoded(picture, "JPEG", quality=98), 96) - plain).max() <= 6


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG file that declares a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"It was a dark and stormy night.", "not a picture"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "half a JPEG": (encoded(Image.fromarray(NOISE), "JPEG")[:2000], "truncated"),
    "half a PNG": (encoded(Image.fromarray(NOISE))[:2000], "truncated"),
    "half a TIFF": (encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw")[:-3000], "not a picture"),
    "half a WebP": (encoded(Image.fromarray(NOISE), "WEBP")[:1000], "truncated"),
    "half a GIF": (encoded(Image.fromarray(NOISE), "GIF")[:1500], "truncated"),
    "half a BMP": (encoded(Image.fromarray(NOISE), "BMP")[:1500], "truncated"),
    "a JPEG's first bytes": (encoded(Image.fromarray(NOISE), "JPEG")[:20], "not a picture"),
    "a bomb": (png_of_size(30_000, 30_000), "too large"),
    "large": (png_of_size(10_001, MAX_PIXELS // 10_000), "too large"),
    "a line": (encoded(flat("RGB", "red", (5000, 1))), "too narrow: 5000 × 1 px"),
}


@pytest.mark.filterwarnings("ignore")  # that they stay off the screen outside pytest is test_prepare's
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_says_why(name, capfd):
    data, reason = BROKEN[name]
    with pytest.raises(Undecodable, match=reason) as raised:
        decode(data, 64)
    assert "\n" not in str(raised.value)
    assert "0x" not in str(raised.value)  # an address, another in every run
    assert capfd.readouterr() == ("", "")


def store_of(folder, target, resize=16):
    """Return the store of the pictures in a folder, written to `target`."""
    dataset = datasets.with_val(datasets.read(folder, "pictures"), 0.25, 0)
    shards = images.write_shards(dataset.pictures, target, lambda data: decode(data, resize))
    images.write_manifest(target, dataset, shards, "pictures", resize)
    return images.ImageStore(target)


@pytest.fixture
def pictures(tmp_path):
    make_pictures(tmp_path / "pictures", {"ants": 8, "bees": 4})
    return tmp_path / "pictures"


def test_the_store_gives_back_what_was_decoded(pictures, tmp_path):
    store = store_of(pictures, tmp_path / "store")
    assert len(store) == 12
    assert store.classes == ["ants", "bees"]
    order = list(zip(store.splits, store.paths, strict=True))
    assert order == sorted(order)
    assert list(store.indices("train")) == list(range(9))
    assert list(store.indices("val")) == list(range(9, 12))
    assert len(store.indices("test")) == 0
    assert store.labels.dtype == np.int64
    for i, path in enumerate(store.paths):
        expected = decode((pictures / path).read_bytes(), 16)
        np.testing.assert_array_equal(store[i], expected)
        assert (store.heights[i], store.widths[i]) == expected.shape[:2]
        assert store.classes[store.labels[i]] == path.split("/")[0]
    with pytest.raises(ValueError, match="read-only"):
        store[0][:] = 0


def test_mean_and_std_are_those_of_the_training_pixels(pictures, tmp_path):
    store = store_of(pictures, tmp_path / "store")
    pixels = np.concatenate([store[i].reshape(-1, 3) for i in store.indices("train")]) / 255
    np.testing.assert_allclose(store.manifest["mean"], pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(store.manifest["std"], pixels.std(axis=0), atol=1e-6)


def test_identical_pictures_in_both_splits_are_counted(tmp_path):
    make_pictures(tmp_path / "pictures", {"train/ants": 3, "train/bees": 3, "val/ants": 1, "val/bees": 1})
    copied = (tmp_path / "pictures/train/ants/1.png").read_bytes()
    (tmp_path / "pictures/val/ants/copy.png").write_bytes(copied)
    assert store_of(tmp_path / "pictures", tmp_path / "store").manifest["duplicates"] == 1


def test_one_more_picture_changes_one_shard(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARD_PICTURES", 3)
    before = store_of(pictures, tmp_path / "before").manifest["files"]
    make_pictures(pictures, {"ants": 9})
    after = store_of(pictures, tmp_path / "after").manifest["files"]
    assert before.keys() == after.keys()
    assert len(before) == 1 + 4
    changed = {name for name in before if before[name] != after[name]}
    assert len(changed) == 2
    assert "pictures.csv" in changed


@pytest.mark.parametrize("damage", ["missing", "shorter", "manifest missing", "manifest cut", "format"])
def test_a_damaged_store_says_what_to_do(damage, pictures, tmp_path):
    store_of(pictures, tmp_path / "store")
    shard, manifest = tmp_path / "store/shard-000.bin", tmp_path / "store/manifest.json"
    if damage == "missing":
        shard.unlink()
    elif damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "manifest missing":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:100])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match=r"(manifest.json|shard-000.bin) is (damaged|missing).*dvc repro"):
        images.ImageStore(tmp_path / "store")


def test_a_file_too_large_to_be_a_picture_is_not_read(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE", 10_000)
    (pictures / "ants/film.png").write_bytes(bytes(20_000))
    skipped = store_of(pictures, tmp_path / "store").manifest["skipped"]
    assert skipped == [["ants/film.png", "too large: 0 MB"]]


MADE = {"val_fraction": 0.2, "folds": 0, "fold": 0, "split_seed": 0, "limit": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"image_size": 64, "max_skipped": 1.0, "balance": "loss"}, None),
        ({"limit": 20}, "was made with data.limit = 0, and now it is 20: run `dvc repro prepare`."),
        ({"resize": 300}, "was made with data.resize = 256, and now it is 300: run"),
        (
            {"source": "data/sample.yaml"},
            "with data.source = data/hymenoptera.yaml, and now it is data/sample.yaml: run",
        ),
        ({"folds": 5, "fold": 1}, "data.folds = 0, and now it is 5; data.fold = 0, and now it is 1: run"),
    ],
)
def test_a_store_of_other_settings_is_told_from_todays(changes, message, pictures, tmp_path):
    dataset = datasets.read(pictures, "pictures")
    shards = images.write_shards(dataset.pictures, tmp_path / "store", lambda data: decode(data, 16))
    images.write_manifest(tmp_path / "store", dataset, shards, "data/hymenoptera.yaml", 256, **MADE)
    manifest = images.ImageStore(tmp_path / "store").manifest
    settings = params.load(ROOT / "params.yaml").data.model_copy(update=changes)
    if message is None:
        images.check_settings(manifest, settings)
    else:
        with pytest.raises(UserError) as raised:
            images.check_settings(manifest, settings)
        assert message in str(raised.value)
