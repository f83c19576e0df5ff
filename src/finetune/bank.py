"""The feature bank: what the frozen part of a network made of pictures, kept for the runs that need the same.

    <digest of the key>.features    rows of numbers, each packed and with its checksum; an index; a line about these

A cache, no store: what is damaged, was dropped or does not fit is computed anew, and no run fails for it.
"""

import hashlib
import json
import os
import struct
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
ABANDONED = 3600.0  # seconds without a write, after which an unfinished file is taken for a killed process's
BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}
FOOTER = struct.Struct("<QII")  # where the index begins, its checksum, and the format


class Bank:
    """A folder of entries, within `limit` bytes."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        self._used: set[Path] = set()
        self._said = False

    def entry(self, key: dict[str, Any], rows: int) -> "Entry":
        """Return the entry of a key, plain values that say all that its rows follow from."""
        name = hashlib.sha256(json.dumps(key | {"format": FORMAT}, sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.features"
        self._used.add(path)
        return Entry(self, path, rows)

    def make_room(self, size: int) -> bool:
        """Drop the entries used longest ago until there is room for `size` bytes more; tell whether there is.

        Not those that this bank has been asked for: a run with more features than fit would drop what the next one, in
        the same order, asks for first.
        """
        total, droppable = size, []
        for path in self.folder.glob("*"):
            with suppress(FileNotFoundError):  # another process dropped it
                status = path.stat()
                total += status.st_size
                abandoned = path.suffix == ".tmp" and status.st_mtime < time.time() - ABANDONED
                if abandoned or (path.suffix == ".features" and path not in self._used):
                    droppable.append((not abandoned, status.st_mtime, status.st_size, path))
        fits = total - sum(each for *_, each, _ in droppable) <= self.limit
        if not fits:
            total -= size  # what is there has to be within the limit all the same
        for *_, each, path in sorted(droppable):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= each
        return fits

    def complain(self, error: OSError) -> None:
        """Say, once, that the disk does not take features."""
        if not self._said:
            self._said = True
            print(f"warning: features are not kept: {error.strerror}: {self.folder}", file=sys.stderr)


class Entry:
    """Rows of one shape and type. They can be read once all are there, and put until then. Threads may share it."""

    def __init__(self, bank: Bank, path: Path, rows: int):
        self._bank, self._path = bank, path
        self._rows = rows
        self._file: int | None = None  # of what is read
        self._index: np.ndarray | None = None  # [rows, 3] int64: offset, length in bytes, and checksum of each
        self._about: dict[str, Any] = {}
        self._draft: _Draft | None = None
        with suppress(OSError, ValueError, OverflowError, struct.error):
            self._open()
        if not self.is_readable:
            self._draft = _Draft(bank, path, rows)

    @property
    def is_readable(self) -> bool:
        """Whether all rows are there."""
        return self._file is not None

    def read(self, rows: Sequence[int] | np.ndarray) -> Tensor | None:
        """Return some of the rows, [n, …]; None where one is damaged, and then the entry is dropped."""
        if self._file is None or self._index is None:
            return None
        count, bits = int(np.prod(self._about["shape"])), np.dtype(self._about["bits"])
        result = np.zeros((len(rows), count), bits)
        try:
            for out, (offset, length, checksum) in zip(result, self._index[np.asarray(rows)].tolist(), strict=True):
                packed = os.pread(self._file, length, offset)
                if zlib.crc32(packed) != checksum:
                    raise OSError("damaged")
                unpack(packed, out)
        except OSError:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            return None
        tensor = torch.from_numpy(result).view(getattr(torch, self._about["dtype"]))
        tensor = tensor.view(len(rows), *self._about["shape"])
        return tensor.permute(0, 3, 1, 2) if self._about["channels_last"] else tensor

    def put(self, rows: Sequence[int] | np.ndarray, values: Tensor) -> None:
        """Keep some of the rows, [n, …]; as long as there is room."""
        if self._draft:
            self._draft.put(rows, values)

    def close(self) -> None:
        """Have the entry in the bank, if all of its rows were put; forget it otherwise."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._draft:
            self._draft.close()
            self._draft = None

    def _open(self) -> None:
        file = os.open(self._path, os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            start, checksum, version = FOOTER.unpack(os.pread(file, FOOTER.size, size - FOOTER.size))
            packed = os.pread(file, size - FOOTER.size - start, start)
            about, _, index = packed.partition(b"\n")
            if version != FORMAT or zlib.crc32(packed) != checksum or len(index) != self._rows * 3 * 8:
                raise ValueError("damaged")
            with suppress(OSError):  # another user's, or dropped just now
                os.utime(self._path)  # it is used now
        except BaseException:
            os.close(file)
            self._path.unlink(missing_ok=True)
            raise
        self._file, self._about = file, json.loads(about)
        self._index = np.frombuffer(index, np.int64).reshape(-1, 3)


class _Draft:
    """An entry that is being written: in a file of its own, which becomes the entry once it is whole."""

    def __init__(self, bank: Bank, path: Path, rows: int):
        self._bank, self._path = bank, path
        self._temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        self._index = np.zeros((rows, 3), np.int64)
        self._about: dict[str, Any] = {}
        self._size = 0
        self._file: int | None = None
        self._given_up = False
        self._lock = threading.Lock()

    def put(self, rows: Sequence[int] | np.ndarray, values: Tensor) -> None:
        if self._given_up:
            return
        channels_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
        values = (values.permute(0, 2, 3, 1) if channels_last else values).contiguous().cpu()
        about: dict[str, Any] = {"shape": list(values.shape[1:]), "dtype": str(values.dtype).removeprefix("torch.")}
        bits = values.view(len(values), -1).view(getattr(torch, np.dtype(BITS[values.dtype]).name)).numpy()
        packed = [pack(row) for row in bits]
        checksums = [zlib.crc32(each) for each in packed]
        about |= {"bits": bits.dtype.name, "channels_last": channels_last}
        with self._lock:
            self._about = self._about or about
            size = sum(map(len, packed))
            try:
                if self._given_up or about != self._about or not self._bank.make_room(size):
                    self._give_up()
                    return
                if self._file is None:
                    self._bank.folder.mkdir(parents=True, exist_ok=True)
                    self._file = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                for row, each, checksum in zip(rows, packed, checksums, strict=True):
                    self._index[row] = self._size, len(each), checksum
                    self._write(each)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                if not self._index[:, 1].all():  # the epoch was not whole
                    self._give_up()
                    return
                start, about = self._size, json.dumps(self._about).encode() + b"\n"
                packed = about + self._index.tobytes()
                packed += FOOTER.pack(start, zlib.crc32(packed), FORMAT)
                if not self._bank.make_room(len(packed)):
                    self._give_up()
                    return
                self._write(packed)
                file, self._file = self._file, None
                os.close(file)
                os.replace(self._temporary, self._path)
            except OSError as error:
                self._give_up(error)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._size += len(data)

    def _give_up(self, error: OSError | None = None) -> None:
        """Go on without the entry; say so once where the disk would not take it."""
        if error:
            self._bank.complain(error)
        self._given_up = True
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):
                os.close(file)
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def pack(row: np.ndarray) -> bytes:
    """Return a row of whole numbers without its zeros: a bit for each number, then those that are not zero.

    Behind a ReLU most are: of SqueezeNet's features 93 in 100, which makes 346 KB a picture 30 KB, in 50 us either way.
    """
    filled = row != 0
    return np.packbits(filled).tobytes() + row[filled].tobytes()


def unpack(packed: bytes, out: np.ndarray) -> None:
    """Write what `pack` was given into a row of zeros."""
    bits = -(-out.size // 8)
    filled = np.unpackbits(np.frombuffer(packed, np.uint8, bits), count=out.size).view(bool)
    out[filled] = np.frombuffer(packed, out.dtype, offset=bits)
