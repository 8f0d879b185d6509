"""What a whole run of the suite may leave out: the hooks that read DDE_CACHE_NO_SKIPS and DDE_CACHE_NO_BROWSER.

With pytest-xdist they run in the worker processes and in the one that gathers their reports; both have to agree.
"""

import os
from types import SimpleNamespace

import pytest

LEFT_OUT = "left_out"


def pytest_collection_modifyitems(config, items):
    """`.ci/run` says so where no browser can be installed: then the tests that need one are left out, and counted."""
    if not os.environ.get("DDE_CACHE_NO_BROWSER"):
        return
    left_out = [item for item in items if "browser" in item.fixturenames]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput[LEFT_OUT] = [item.nodeid for item in left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker collects all tests, so the first one that ends knows what was left out."""
    config, left_out = node.config, getattr(node, "workeroutput", {}).get(LEFT_OUT)
    if left_out and not config.pluginmanager.get_plugin("terminalreporter").stats.get("deselected"):
        config.hook.pytest_deselected(items=[SimpleNamespace(nodeid=name) for name in left_out])


def pytest_terminal_summary(terminalreporter):
    """Where nothing may skip (CI has everything that the tests need), a skip is a failure."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("DDE_CACHE_NO_SKIPS"):
        terminalreporter.write_line(f"{len(skipped)} tests were skipped, and none may be here", red=True)


def pytest_sessionfinish(session):
    """Only the process that gathers the reports has a terminal reporter, and gives the exit status."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    strict = os.environ.get("DDE_CACHE_NO_SKIPS") and session.testscollected
    if strict and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1
