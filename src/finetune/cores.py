"""The machine's cores, shared among the runs that train on it side by side."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.parallel import cores

from filelock import FileLock, Timeout

LOOK = 1.0  # seconds between two looks at who else is there


@contextmanager
def shared(folder: Path) -> Iterator[Callable[[], int]]:
    """Yield a function that returns this process's part of the cores, at least one, among those that share now.

    Each holds a lock in the folder, which the system frees with the process. Threads that wait for each other while
    they have no core cost more than the cores that they want: two full fine-tunings of SqueezeNet side by side took
    36 s with two threads each on 2 cores, 9 s with one each, and 10 s one after the other with two.
    """
    own = folder / f"{uuid.uuid4().hex}.lock"
    part, looked = cores(), -LOOK

    def threads() -> int:
        nonlocal part, looked
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            with suppress(OSError):
                part = max(1, cores() // (1 + _others(folder, own)))
        return part

    lock = FileLock(own)
    with suppress(OSError):  # then the others do not know of it, which is no reason to stop
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield threads
    finally:
        own.unlink(missing_ok=True)
        lock.release()


def _others(folder: Path, own: Path) -> int:
    """Return how many locks of the folder are held by others; remove those that no process holds any more."""
    held = 0
    for path in folder.glob("*.lock"):
        if path == own:
            continue
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held += 1
            continue
        path.unlink(missing_ok=True)
        lock.release()
    return held
