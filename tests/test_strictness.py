"""A run of the suite that leaves something out says so, in one process and spread over two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

@pytest.fixture
def browser():
    pytest.skip("no Chromium here")

def test_page(browser): pass
def test_page_again(browser): pass
def test_else(): pass
"""


@pytest.fixture(params=[(), ("-n", "2", "--dist", "loadfile")], ids=["one", "two"])
def suite(request, tmp_path):
    """Run a suite of three tests, of which two skip where there is no browser; gives its status and what it printed."""
    hooks = "pytest_collection_modifyitems, pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown"
    (tmp_path / "conftest.py").write_text(f"from strictness import {hooks}\n")
    (tmp_path / "test_one.py").write_text(SUITE)

    def run(**variables):
        # The other plugins take seconds to import; Hypothesis reads every report.
        ours = {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("DDE_CACHE_NO", "PYTEST"))}
        plugins = ("-p", "no:cacheprovider", "-p", "xdist", "-p", "_hypothesis_pytestplugin")
        command = [sys.executable, "-m", "pytest", *plugins, *request.param]
        done = subprocess.run(command, cwd=tmp_path, env=clean | ours | variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_skip_is_counted_and_nothing_else(suite):
    code, printed = suite()
    assert code == 0
    assert "1 passed, 2 skipped in" in printed.splitlines()[-1]
    assert "none may be here" not in printed


def test_a_skip_fails_where_none_may_be(suite):
    code, printed = suite(DDE_CACHE_NO_SKIPS="1")
    assert code == 1
    assert "2 tests were skipped, and none may be here" in printed
    assert "INTERNALERROR" not in printed
    assert "1 passed, 2 skipped in" in printed.splitlines()[-1]


def test_without_a_browser_its_tests_are_left_out_and_counted(suite):
    code, printed = suite(DDE_CACHE_NO_SKIPS="1", DDE_CACHE_NO_BROWSER="1")
    assert code == 0
    assert "1 passed, 2 deselected in" in printed.splitlines()[-1]
