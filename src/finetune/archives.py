"""Archives of pictures: fetched once and verified, unpacked without trusting what is in them."""

import functools
import hashlib
import lzma
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.request import Request, urlopen

from finetune.datasets import is_hidden
from finetune.errors import UserError, disk_is_full

from tqdm import tqdm

TIMEOUT = 30  # seconds without a byte
CHUNK = 2**20  # bytes read at a time

# Pictures hardly compress, so an archive that would grow by more than this is none of pictures.
MAX_GROWTH = 100  # times the archive's size
MAX_TOTAL = 2**30  # bytes that a small archive may grow to nevertheless
MAX_MEMBERS = 10**7

WAYS_OUT = "Set DATA_ARCHIVE=<path or URL of the archive>, or try drawn pictures: -S data.source=data/sample.yaml"


def fetch(url: str, target: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download `url` to `target`, verified where `size` (bytes) and `sha256` are given; whole or not at all.

    Raises UserError where the server can't be reached or what it sends is not what was expected.
    """
    print(f"fetching {url}" + (f" ({size / 1e6:,.0f} MB)" if size else ""), flush=True)
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, so that two runs at the same time don't write into one file.
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            received, digest = _download(url, file, size)
        if size and received != size:
            raise UserError(f"{url} sent {received:,} bytes or more, expected {size:,}.\n{WAYS_OUT}")
        if sha256 and digest != sha256:
            raise UserError(f"{url} has changed: its sha256 is {digest}, expected {sha256}.\n{WAYS_OUT}")
        partial.replace(target)
    except (OSError, HTTPException, ValueError) as error:
        if disk_is_full(error):
            raise
        reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
        raise UserError(f"can't fetch {url}: {reason}\n{WAYS_OUT}") from None
    finally:
        if partial:
            partial.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> None:
    """Write the archive's files (zip, or tar with any of gzip, bzip2, xz) into `folder`; hidden ones are left out.

    Nothing is written outside `folder`, no links or devices are made, and no more bytes are written than the archive
    declares and its size makes plausible. Raises UserError, naming the member, where one is refused, and where the
    archive is damaged or is none.
    """
    packed, total = archive.stat().st_size, 0
    try:
        for number, member in enumerate(_members(archive), start=1):
            total += member.size
            reason = member.refusal or _unsafe_name(member.name)
            if total > max(MAX_TOTAL, MAX_GROWTH * packed) or number > MAX_MEMBERS:
                reason = f"too large: {total:,} bytes in {number:,} files so far, from an archive of {packed:,} bytes"
            if reason:
                raise _refused(archive, member.name, reason)
            path = PurePosixPath(member.name)
            if not any(is_hidden(part) for part in path.parts):
                _write(archive, member, folder / path)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error) as error:
        raise _damaged(archive, error) from None
    except (EOFError, OSError, ValueError) as error:  # also from the depths of those modules
        if disk_is_full(error):
            raise
        raise _damaged(archive, error) from None


@dataclass(frozen=True)
class _Member:
    name: str
    is_folder: bool
    size: int  # bytes, as declared
    refusal: str | None  # why it must not be unpacked
    open: Callable[[], Any]  # a binary file


def _download(url: str, file: IO[bytes], size: int | None) -> tuple[int, str]:
    """Write what `url` sends to `file`; return its length in bytes and its sha256."""
    request = Request(url, headers={"User-Agent": "finetune"})  # some servers refuse Python's own name
    digest, received = hashlib.sha256(), 0
    with (
        urlopen(request, timeout=TIMEOUT) as response,
        tqdm(total=size, unit="B", unit_scale=True, desc="fetch", disable=None) as bar,
    ):
        while chunk := response.read(CHUNK):
            received += len(chunk)
            if size and received > size:
                break  # the caller says so; the rest is not needed for that
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return received, digest.hexdigest()


def _members(archive: Path) -> Iterator[_Member]:
    """Yield what is in the archive, in its order. Raises ValueError for a file that is no archive."""
    with open(archive, "rb") as file:
        start = file.read(4)
    if start in (b"PK\3\4", b"PK\5\6"):
        yield from _zip_members(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    else:
        raise ValueError("it is neither a zip nor a tar archive")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where packed without Unix modes
            refusal = None
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                refusal = "a link or a device"
            elif info.flag_bits & 1:
                refusal = "encrypted"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refusal = "compressed in an unusual way"  # Python would decompress it whole, in memory
            yield _Member(info.filename, info.is_dir(), info.file_size, refusal, functools.partial(file.open, info))


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive) as file:
        for info in file:
            refusal = None if info.isfile() or info.isdir() else "a link or a device"
            yield _Member(info.name, info.isdir(), info.size, refusal, functools.partial(file.extractfile, info))
        # tarfile ends without a word at a header that is damaged or missing.
        file.fileobj.seek(file.offset)
        if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("its end is missing")


def _unsafe_name(name: str) -> str | None:
    """Return why a member's name must not be used as a path, or None."""
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "an absolute path"
    if "\\" in name:
        return "a path with a backslash"
    if ".." in PurePosixPath(name).parts:
        return "a path that leaves the archive's folder"
    return None


def _write(archive: Path, member: _Member, target: Path) -> None:
    """Write one file, of exactly the declared size, or make one folder."""
    try:
        if member.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, CHUNK)  # zipfile and tarfile read no further than the declared size
            written = file.tell()
    except (FileExistsError, NotADirectoryError):
        raise _refused(archive, member.name, "a name that another member has") from None
    if written != member.size:
        raise _refused(archive, member.name, f"not of the declared size of {member.size:,} bytes")


def _refused(archive: Path, name: str, reason: str) -> UserError:
    return UserError(f"{archive} is refused: {name!r} is {reason}.\nPack the pictures anew, as plain files.")


def _damaged(archive: Path, error: Exception) -> UserError:
    return UserError(f"{archive} can't be unpacked: {error}.\nGet or pack it again.")
