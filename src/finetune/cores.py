"""The machine's cores, shared among the runs that train on it side by side."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    folder.mkdir(parents=True, exist_ok=True)
    own = FileLock(folder / f"{uuid.uuid4().hex}.lock")
    part, looked = 0, 0.0

    def threads() -> int:
        nonlocal part, looked
        if not part or time.monotonic() - looked > LOOK:
            part, looked = max(1, cores() // (1 + _others(folder, Path(own.lock_file)))), time.monotonic()
        return part

    with own:
        try:
            yield threads
        finally:
            Path(own.lock_file).unlink(missing_ok=True)


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
