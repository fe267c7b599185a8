"""The order of the tests: files that take long run first, so that no worker ends alone with one."""

# The longest first; every other file takes seconds.
LONG = (
    "test_demo.py",
    "test_examples.py",
    "test_processes.py",
    "test_docs.py",
    "test_fetch.py",
    "test_train.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
