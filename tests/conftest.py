"""How the tests are run."""

import math
import signal

# Through DVC, and without a fixture that takes long.
LONG = ("test_pipeline", "test_lineage", "test_queue", "test_ray", "test_summarize", "test_sweep")

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored, and below, too


def pytest_collection_modifyitems(config, items):
    """Have each of pytest-xdist's workers begin with its share of the longest tests.

    A worker's first tests are a stretch of the list, and others take from its end what it does not get to.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    long, rest = ([item for item in items if (item.path.stem in LONG) == wanted] for wanted in (True, False))
    size = math.ceil(len(items) / workers)
    items[:] = []
    for worker in range(workers):
        share = long[worker::workers]
        items += share + [rest.pop(0) for _ in range(min(size - len(share), len(rest)))]
