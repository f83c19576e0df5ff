"""Files: written whole or not at all, identified by their digest, found from where the user stands."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import starters
from finetune.errors import UserError, disk_is_full

import psutil


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` at the end, or nothing does.

    So `path` is whole at any moment, and a link into DVC's cache is replaced rather than written through. Raises
    OSError with ENOSPC for a full disk, whatever the writer raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed; it may be a link to another file
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except Exception as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        if disk_is_full(error) or shutil.disk_usage(path.parent).free < max(written, 2**20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have a file's new name survive a power cut, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_user_path(value: str, what: str) -> Path:
    """Return the path of an existing file or folder that `value` means, which the user gave in the variable `what`.

    A relative path is relative to the folder in which the user typed the command. Raises UserError where nothing is
    there, naming the places looked at.
    """
    path = Path(os.path.expanduser(value))
    folders = dict.fromkeys(_user_folders())
    for folder in folders:
        if os.path.exists(folder / path):
            return folder / path
    if path.is_absolute():
        raise UserError(f"{what}={value} does not exist.")
    looked = ", ".join(map(str, list(folders)[:3]))
    raise UserError(f"{what}={value} is in none of {looked}.\nGive the full path: {what}=/…/{path.name}")


def _user_folders() -> Iterator[Path]:
    """Yield the folders in which the user may have typed the command, the likeliest first.

    DVC runs a stage in the project's top folder, or in a temporary copy of the project. Its own process keeps in PWD
    the folder of the shell it was started from; a queue's worker, that of the shell of `dvc queue start`. DVC_ROOT is
    the main checkout. Without DVC_ROOT the user started the script, and is here.
    """
    root = os.environ.get("DVC_ROOT")
    if root:
        for process in _parents():
            try:
                folder = process.environ().get("PWD")
            except psutil.Error:  # another user's process, or one that has just ended
                continue
            if folder:
                yield Path(folder)
        yield Path(root)
    yield Path.cwd()


def _parents() -> list[psutil.Process]:
    """Return the processes above this one, the nearest first."""
    try:
        return starters.process().parents()
    except psutil.Error:
        return []
