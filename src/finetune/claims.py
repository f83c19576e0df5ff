"""What processes of one machine claim of it, by locks: the system frees a killed one's at once."""

import uuid
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def hold(folder: Path) -> FileLock:
    """Return a lock of this process's own in the folder, held. Where that can't be, the others do not know of it."""
    lock = FileLock(folder / f"{uuid.uuid4().hex}.lock")
    with suppress(OSError):  # no reason to stop
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    return lock


def let_go(lock: FileLock) -> None:
    """Release what `hold` returned."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def others(folder: Path, own: FileLock | None = None) -> int:
    """Return how many locks of the folder are held, but for `own`; remove those that no process holds any more."""
    held = 0
    for path in folder.glob("*.lock"):
        if own and path == Path(own.lock_file):
            continue
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held += 1
            continue
        let_go(lock)
    return held
