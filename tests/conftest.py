"""Starts pytest: what tests share is in shared_fixtures.py."""

import gc

# Nothing is freed of what imports and the collection of tests create.
gc.disable()


def pytest_configure(config):
    # A process that only distributes the tests need not wait for torch.
    distributes = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not distributes:
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    gc.enable()
    gc.freeze()
