"""What the README and docs/ show works: commands, programs, links, options, and the generated reference."""

import json
import re
import shutil

import numpy as np
import pytest
from dde_cache.cli.reference import SETTINGS, reference
from documents import ROOT, anchors, blocks, parse, play, runs, words_of

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BESIDE = [ROOT / "dde_cache/sample_teacher/README.md"]
ELSEWHERE = {
    found.rsplit("/", 1)[-1]
    for test in set((ROOT / "tests").glob("test_*.py")) - {ROOT / "tests/test_docs.py"}
    for found in re.findall(r"\b(?:page|PAGE) = .*?([\w/-]+\.md)\b", test.read_text())
}
"""Pages that another test file reads and runs, with more to say about what comes out."""
REFERENCE = DOCS / "cli.md"
OWN_FOLDER = ("tutorial.md",)
"""Pages that begin in an empty folder, and not where the README ends."""
SHOWING = [page for page in PAGES if page != REFERENCE and any(one.commands or one.program for one in blocks(page))]
PLAYED = [
    page
    for page in SHOWING
    if page.name not in ELSEWHERE
    and any(one.program or any(runs(one, command) for command in one.commands) for one in blocks(page))
]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Where everything that the README says has been done as it stands."""
    folder = tmp_path_factory.mktemp("road")
    return folder, play(README, folder)


def printed(steps, begin):
    return next(step.outcome.out for step in steps if step.command.startswith(begin))


def test_the_readme_runs_as_it_stands(road):
    folder, steps = road
    assert (folder / "runs/first/model/model.safetensors").is_file()
    assert (folder / "runs/again/run.json").is_file(), "the program of the section on Python"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 300
    shown = printed(steps, "from dde_cache.inference")
    assert shown.count("Answer(answer=") == 2
    assert shown.count("tensor([[") == 1


@pytest.fixture(scope="module")
def played(road, tmp_path_factory):
    """Play a page, once: in a copy of the README's folder, where the pages go on."""
    done = {}

    def play_once(page):
        if page not in done:
            folder = tmp_path_factory.mktemp(page.stem) / "here"
            if page.name in OWN_FOLDER:
                folder.mkdir()
            else:
                shutil.copytree(road[0], folder)
            done[page] = folder, play(page, folder)
        return done[page]

    return play_once


@pytest.mark.parametrize("page", PLAYED, ids=name_of)
def test_a_page_runs_as_it_stands(page, played):
    assert played(page)[1]


def test_how_to_use_a_student(played):
    page = DOCS / "how-to/use-a-student.md"
    _, steps = played(page)
    answers = [
        json.loads(line)
        for line in printed(steps, "dde-cache predict runs/first --image-store stores/album").splitlines()
    ]
    assert [answer["images"] for answer in answers] == [["one.png"], ["deep/two.png"], ["deep/two.png"]]
    shown = next(one for one in blocks(page) if one.language == "json" and '"probabilities"' in one.text)
    assert answers[0].keys() == json.loads(shown.text).keys()


def test_the_tutorial_shows_what_comes_out(played):
    """Its tables, cell by cell: counts are exact, and what a machine's rounding changes is near."""
    folder, steps = played(DOCS / "tutorial.md")
    shown = [one.text for one in blocks(DOCS / "tutorial.md") if one.language == "text"]
    for text in shown:
        title = text.splitlines()[0].strip()
        real = next((step.outcome.out for step in steps if title in step.outcome.out), None)
        if text.startswith("{"):
            assert folder.joinpath("questions.jsonl").read_text().count("\n") == 3
            continue
        assert real is not None, title
        if " on data/test" in title:
            for kind, pairs, *scores in re.findall(r"│ (\w+) +│ +([\d,]+) │ +(0\.\d+)", text):
                found = re.search(rf"│ {kind} +│ +{pairs} │ +(0\.\d+)", real)
                assert float(found[1]) == pytest.approx(float(scores[0]), abs=0.08), (title, kind)
    scores = {
        run: float(re.search(r"│ all .*?(0\.\d+)", printed(steps, f"dde-cache eval {run}"))[1])
        for run in ("teacher", "runs/attention", "runs/labels")
    }
    assert scores["teacher"] > 0.95
    assert scores["runs/attention"] > scores["runs/labels"] + 0.05, "what the page says about attention"
    answered = [json.loads(line) for line in printed(steps, "dde-cache predict").splitlines()]
    assert [one["images"] for one in answered] == [["test-0000.png"], ["test-0000.png"], ["test-0001.png"]]
    assert (folder / "onnx/head.onnx").is_file()


def shown_commands():
    """Every command line that a page, a recipe or a card shows, with its block."""
    for page in [README, *SHOWING, *BESIDE]:
        for block in blocks(page):
            for command in block.commands:
                yield page, block, command


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(page, command, id=f"{page.stem}-{number}")
        for number, (page, block, command) in enumerate(shown_commands())
        if words_of(command)[0] not in ("printf", "cp", "rm", "tail", "export") and not runs(block, command)
    ],
)
def test_a_command_that_is_not_run_is_one_that_the_parser_takes(page, command):
    parse(command)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_opens_with_a_command_that_the_parser_takes(recipe):
    parse(recipe.read_text().splitlines()[0].removeprefix("# "))


@pytest.mark.parametrize(
    "command",
    [
        "dde-cache train A --outt B",
        "dde-cache trane",
        "dde-cache data import shapes",
        "dde-cache train A --out B --set no_such=1",
        "pip install 'dde-cache[s4]'",
    ],
)
def test_the_parser_refuses_what_there_is_not(command):
    with pytest.raises(BaseException):  # noqa: B017, PT011 - click's errors, or ours
        parse(command)


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name}: {target}; there are {sorted(anchors(other))}"


def known_options():
    """Every option of a command, of a benchmark, and of the two programs that pages name beside them."""
    sources = [REFERENCE.read_text(), *(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))]
    found = {one for text in sources for one in re.findall(r"--[a-z][a-z-]+", text)}
    return found | {"--version", "--help", "--nproc-per-node", "--no-python", "--nnodes"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_options_that_a_page_names_exist(page):
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
    assert {one for span in spans for one in re.findall(r"(?<!\S)--[a-z][a-z-]+", span)} <= known_options()


def test_the_reference_is_what_the_program_says():
    page = REFERENCE.read_text()
    assert page == reference(), "run `make cli-docs`"
    assert max(map(len, page.splitlines())) <= 80


def test_every_option_has_a_help():
    bare = re.findall(r"^- `(--\S+[^`]*)`:\s*(?:\*.*)?$", REFERENCE.read_text(), re.M)
    assert bare == []


def test_defaults_in_helps_are_those_of_the_settings():
    """Of options that are settings too: what the help calls their default is it."""
    page = REFERENCE.read_text()
    compared = 0
    for command, models in SETTINGS.items():
        section = page.split(f"\n## dde-cache {command}\n")[1].split("\n## ")[0]
        for name, field in models[0].model_fields.items():
            option = re.search(rf"^- `--{name.replace('_', '-')}[ `].*?(?=\n- |\n\n)", section, re.M | re.S)
            said = option and re.search(r"Default\s+([\w.-]+?)\.?$", " ".join(option[0].split()))
            if said and said[1] not in ("last:last",):
                default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
                same = str(default) == said[1] or (isinstance(default, float) and np.isclose(default, float(said[1])))
                assert same, (command, name, said[1], default)
                compared += 1
    assert compared > 8


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s:]+)\)", index)}
    assert set(PAGES) - {DOCS / "README.md"} <= linked
