"""For `pytest --nbval`: notebooks here are stored without execution counts (nbdev_clean), which nbval takes for "never run"."""


def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("execution_count", 0) is None:
            cell.execution_count = 1
