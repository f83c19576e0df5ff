"""How the tests are run."""


def pytest_collection_modifyitems(items):
    """Begin with the longest, those of the whole pipeline, so that no core waits for one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_pipeline", "test_lineage", "test_killed"))
