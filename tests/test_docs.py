"""The commands of the README and of how-to pages run as they stand, and links lead somewhere."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import cli

from dde_cache.samples import open_shards

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def section(title: str) -> str:
    return (ROOT / "README.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[str]:
    return re.findall(r"^    (dde-cache .*)$", text, flags=re.MULTILINE)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def program(text: str) -> str:
    """The lines of an indented Python example."""
    return "\n".join(
        line[4:] for line in re.search(r"^    (?:from|import) (?:.*\n)(?:    .*\n|\n)+", text, re.M)[0].splitlines()
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Where the main job of the README has been run as it stands."""
    folder = tmp_path_factory.mktemp("road")
    lines = commands(section("The main job"))
    assert len(lines) >= 6
    # In this process: torch takes seconds to import. (test_cli.py runs the installed program.)
    with contextlib.chdir(folder):
        for line in lines:
            done = cli(*shlex.split(line)[1:])
            assert done.code == 0, (line, done.err)
    return folder


def test_the_main_job_of_the_readme_runs_as_it_stands(road):
    assert (road / "runs/first/model/model.safetensors").is_file()
    run([sys.executable, "-c", program(section("In Python")).replace("runs/first", "runs/second")], road)
    assert (road / "runs/second/run.json").is_file()


@pytest.fixture(scope="module")
def used(road):
    """The same after the README's section on students at work, with what its Python example prints."""
    with contextlib.chdir(road):
        for line in commands(section("Using a student")):
            done = cli(*shlex.split(line)[1:])
            assert done.code == 0, (line, done.err)
    return road, run([sys.executable, "-c", program(section("Using a student"))], road)


def test_using_a_student_as_the_readme_says(used):
    folder, printed = used
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 600
    assert printed.count("Answer(answer=") == 2
    assert printed.count("tensor([[") == 1


def test_how_to_use_a_student(used, monkeypatch):
    """Its commands in this process, in their order; its files and programs as they stand."""
    folder, _ = used
    page = (ROOT / "docs/how-to/use-a-student.md").read_text()
    blocks = dict(
        zip(("json", "answer", "onnx", "store"), re.findall(r"```(?:json|python)\n(.*?)```", page, re.S), strict=True)
    )
    monkeypatch.chdir(folder)
    (folder / "album/deep").mkdir(parents=True)
    for name, sample in zip(("one.png", "deep/two.png"), open_shards("data/test")[0], strict=False):
        (folder / "album" / name).write_bytes(sample.images[0].content)
    (folder / "questions.jsonl").write_text(blocks["json"])
    outcomes = {}
    for line in commands(page):
        if (folder / line.partition("--out ")[2].split(" ")[0] / "run.json").is_file():
            continue  # the README has trained it
        outcomes[line] = cli(*shlex.split(line)[1:])
        assert outcomes[line].code == 0, (line, outcomes[line].err)
    answers = [
        json.loads(line)
        for line in outcomes[next(one for one in outcomes if "questions.jsonl" in one)].out.splitlines()
    ]
    assert [answer["images"] for answer in answers] == [["one.png"], ["deep/two.png"], ["deep/two.png"]]
    assert answers[0].keys() == json.loads(blocks["answer"]).keys()
    found: dict[str, Any] = {}
    exec(blocks["onnx"] + blocks["store"], found)
    assert torch.from_numpy(found["logits"]).softmax(-1).max() == pytest.approx(
        found["answers"][0].probability, abs=1e-3
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
