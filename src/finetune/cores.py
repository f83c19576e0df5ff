"""The machine's cores, shared among the runs that train on it side by side."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune import claims
from finetune.parallel import cores

LOOK = 1.0  # seconds between two looks at who else is there


@contextmanager
def shared(folder: Path) -> Iterator[Callable[[], int]]:
    """Yield a function that returns this process's part of the cores, at least one, among those that share now.

    Threads that wait for each other while they have no core cost more than the cores that they want: two full
    fine-tunings of SqueezeNet side by side took 36 s with two threads each on 2 cores, 9 s with one each, and 10 s one
    after the other with two.
    """
    part, looked = cores(), -LOOK

    def threads() -> int:
        nonlocal part, looked
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            with suppress(OSError):
                part = max(1, cores() // (1 + claims.others(folder, own)))
        return part

    own = claims.hold(folder)
    try:
        yield threads
    finally:
        claims.let_go(own)
