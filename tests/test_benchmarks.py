"""Every benchmark runs at its small size and prints a ratio, every campaign a count; today's speed is not tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    "bucketing", "extraction", "inference", "memory", "plan", "reading", "remap", "sample_teacher", "size", "teachers",
    "training_step",
)  # fmt: skip
CAMPAIGNS = ("faults", "fuzz")
TABLES = ("compression",)
STUDIES = ("rerun",)
"""Too long for a test, even small; their parts are tested."""


def run(name, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / f"{name}.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_benchmark_is_listed():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(
        [*NAMES, *CAMPAIGNS, *TABLES, *STUDIES, "common"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_ratios_limits_and_the_machine(name):
    printed = run(name, "--size", "small")
    ratios = re.findall(r"^RATIO .+: (\d+\.\d+) \(.+\); reach: .+$", printed, re.MULTILINE)
    assert ratios
    assert all(float(ratio) > 0 for ratio in ratios)
    assert "limit: " in printed
    assert "machine: " in printed


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_campaign_holds_every_time(name):
    """It ends with an error where one fault was not met as promised."""
    counts = re.findall(r"^COUNT .*?: .*?([\d,]+) of ([\d,]+)", run(name, "--size", "small"), re.MULTILINE)
    assert counts
    assert all(int(total.replace(",", "")) > 0 for _, total in counts)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_our_rules_and_a_limit(name):
    printed = run(name, "--size", "small")
    rows = re.findall(r"^\| (sqrt8, .*|log8, .*) \| [\d,]+ \| \d+\.\d+ \|", printed, re.MULTILINE)
    assert len(rows) > 10
    assert "limit: " in printed
    assert "machine: " in printed


def test_docs_name_every_benchmark():
    page = (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    assert [name for name in (*NAMES, *CAMPAIGNS, *TABLES, *STUDIES) if f"benchmarks/{name}.py" not in page] == []
