"""A function over many items in threads, with few results waiting at any time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_WORKERS = 16  # more gained nothing: the thread that takes the results is the limit by then


def cores() -> int:
    """Return how many cores this process may use: OMP_NUM_THREADS where it is set, else those that the system gives."""
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    with suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_map(function: Callable[[T], R], items: Iterable[T], most_workers: int = MAX_WORKERS) -> Iterator[R]:
    """Yield function(item) for each item, in the items' order, computed in as many threads as there are cores.

    At most two results a thread are under way or waiting, so memory does not grow with the number of items.
    The first exception that `function` raises ends the iteration.
    """
    workers = min(most_workers, cores())
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
