"""The commands of the README run as they stand, and its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = str(Path(sys.executable).with_name("dde-cache"))


def commands(section: str) -> list[str]:
    text = (ROOT / "README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^    (dde-cache .*)$", text, flags=re.MULTILINE)


def test_the_main_job_of_the_readme_runs_as_it_stands(tmp_path):
    lines = commands("The main job")
    assert len(lines) >= 6
    for line in lines:
        done = subprocess.run([COMMAND, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs/first/model/model.safetensors").is_file()
    python = re.search(r"## In Python\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text()).group(1)
    program = "\n".join(line[4:] for line in python.splitlines()).replace("runs/first", "runs/second")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/second/run.json").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
