"""A study: cells and their order, its folder through kill -9 and budgets, and verdicts where the truth is known."""

import json
import shutil
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from pipeline import Child, cli, killed_in, tree
from test_published_sources import small_nlvr

from dde_cache.cells import CELLS, DEFAULT, FAMILIES, chosen, ordered
from dde_cache.claims import SkippedRun, study_report
from dde_cache.equivalence import Requirements
from dde_cache.errors import InputError, RunError
from dde_cache.outcomes import (
    Outcomes,
    Questions,
    StudyResult,
    read_outcomes,
    write_correct,
    write_questions,
    write_result,
)
from dde_cache.samples import open_shards
from dde_cache.study import run_study
from dde_cache.study_folder import extraction, open_study, read_study, training
from dde_cache.study_report import markdown, placed, sum_up, write_plots
from dde_cache.testbeds import GROUPS, TEACHER, TESTBEDS, part_source, study_config

TINY = ("pictures=20", "test_pictures=8", "train.steps=3", "train.batch_size=8", "train.save_every=1")
"""Two cells with two seeds, three steps each."""


def study(out, *more, settings=TINY, families="online", seeds=2):
    given = [part for one in settings for part in ("--set", one)]
    return ["study", "--out", out, "--families", families, "--seeds", seeds, *given, *more]


def done(*command):
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    return outcome


def answers(out):
    return {name: content for name, content in tree(out / "results").items() if name.endswith(".npz")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "study"
    done(*study(out))
    return out


def test_a_study_keeps_a_table_and_every_answer(whole):
    report = json.loads((whole / "report.json").read_text())
    assert [(row["cell"], row["seeds"]) for row in report["rows"]] == [(DEFAULT, 2), ("online teacher", 2)]
    assert report["questions"] == 48
    outcomes = read_outcomes(whole)
    for cell, runs in outcomes.results.items():
        for seed, result in runs.items():
            assert result.accuracy == pytest.approx(outcomes.correct[cell][seed].mean())
            assert result.settings["seed"] == seed
    assert outcomes.results[DEFAULT][0].bytes_a_pair > 0
    assert outcomes.results["online teacher"][0].bytes_a_pair is None
    assert not list((whole / "runs").glob("*/checkpoints")), "weights are dropped"
    assert "| online teacher | 2 |" in (whole / "report.md").read_text()


def test_a_study_is_summed_up_again_without_training(whole):
    before = tree(whole)
    printed = done("study", "--out", whole, "--report-only", "--json").out
    assert json.loads(printed) == json.loads(before["report.json"])
    assert tree(whole) == before
    done("study", "--out", whole, "--cell", DEFAULT, "--seeds", 1)
    assert tree(whole) == before, "a call for less does not forget the rest"


@pytest.mark.parametrize(
    ("function", "count", "name"),
    [
        ("replace", 1, "results/default.1.npz"),
        ("replace", 1, "results/default.1.json"),
        ("replace", 2, "checkpoints/00000002"),
        ("replace", 1, "shards/train"),
        ("link", 1, ".zarr.zip"),
    ],
)
def test_killed_and_continued_to_the_same_table(whole, tmp_path, function, count, name):
    """Before answers or figures of a run are there, in the middle of a run, of the import, and of the extraction."""
    out = tmp_path / "study"
    child = Child(*study(out), folder=tmp_path, before=killed_in(function, count, name))
    assert child.wait() == -9, child.printed
    assert not (out / "report.md").exists()
    done(*study(out))
    assert (out / "report.md").read_text() == (whole / "report.md").read_text()
    assert answers(out) == answers(whole)


def test_what_does_not_fit_the_budget_is_skipped_and_named(tmp_path):
    out = tmp_path / "study"
    first = done(*study(out, "--budget", 0.0))
    assert "Skipped 4 runs: default (budget): seeds 0, 1; online teacher (budget): seeds 0, 1." in " ".join(
        first.out.split()
    )
    assert not list((out / "results").glob("*.json")), "nothing was trained"
    done(*study(out, "--budget", 60, seeds=1))
    path = out / "results/default.0.json"
    slow = json.loads(path.read_text()) | {"wall_seconds": 4000.0}
    path.write_text(json.dumps(slow))
    report = json.loads(done(*study(out, "--budget", 60, "--json")).out)
    assert [(one["cell"], one["seed"]) for one in report["skipped"]] == [(DEFAULT, 1)], "the other cell is fast"
    assert [row["seeds"] for row in report["rows"]] == [1, 2]


def test_another_call_may_work_on_the_same_study(tmp_path, whole):
    """What the one has, the other skips; both together make every run once."""
    out = tmp_path / "study"
    children = [Child(*study(out), folder=tmp_path) for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0], [child.printed for child in children]
    assert answers(out) == answers(whole)


def test_a_study_has_one_set_of_settings(whole, tmp_path):
    refused = cli(*study(whole, settings=("pictures=21", *TINY[1:])))
    assert refused.code == 1
    assert "pictures: begun with 20, now 21" in refused.message
    (tmp_path / "mine").write_text("")
    assert "new or empty folder, or a study" in cli(*study(tmp_path)).message
    assert "expected --report-only alone" in cli(*study(whole, "--report-only")).message
    missing = cli("study", "--out", tmp_path / "none", "--report-only")
    assert missing.code == 1
    assert "expected the settings of a study" in missing.message
    assert read_study(whole).train.steps == 3


@pytest.fixture
def copied(whole, tmp_path):
    """Settings and results of a study, to be spoilt."""
    for name, content in tree(whole).items():
        if name.startswith(("results", "study.yaml")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    return tmp_path


def test_damaged_answers_are_named(copied):
    results = copied / "results"
    for content in (b"nothing", (results / "teacher.npz").read_bytes()[:-30]):
        (results / "default.1.npz").write_bytes(content)
        with pytest.raises(RunError, match=r"default\.1\.npz: expected what a study keeps"):
            read_outcomes(copied)
    (results / "default.1.npz").unlink()
    assert list(read_outcomes(copied).correct[DEFAULT]) == [0], "a run without its answers is not finished"


def spoil(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_results_of_other_runs_are_named(copied):
    results = copied / "results"
    right = (results / "default.1.json").read_bytes()
    (results / "default.1.json").write_bytes((results / "default.0.json").read_bytes())
    with pytest.raises(RunError, match=r"default\.1\.json: .* it is of default, seed 0"):
        sum_up(copied, read_study(copied))
    (results / "default.1.json").write_bytes(right)
    spoil(results / "default.1.json", accuracy=0.123)
    with pytest.raises(RunError, match=r"default\.1\.npz: .* in its neighbour 0\.1230"):
        sum_up(copied, read_study(copied))
    (results / "default.1.json").write_bytes(right)
    (results / "top-3.0.json").write_bytes(right)
    with pytest.raises(RunError, match=r"cells that this version knows, got others:\s+- top-3\.0\s"):
        sum_up(copied, read_study(copied))


def test_runs_of_other_settings_are_refused_before_anything_is_trained(copied):
    path = copied / "results/default.0.json"
    settings = json.loads(path.read_text())["settings"]
    spoil(path, settings=settings | {"attention_weight": 3.0, "steps": 4})
    refused = cli(*study(copied, seeds=3))
    assert refused.code == 1
    assert "default.0: steps: expected 3, got 4" in refused.message
    assert "default.0: attention_weight: expected 10.0, got 3.0" in refused.message
    assert not (copied / "shards").exists()
    spoil(path, settings={"steps": 0, "unknown": 1})
    assert "default.0: unknown: Extra inputs are not permitted" in cli(*study(copied)).message


def test_runs_of_other_code_are_told(copied):
    assert sum_up(copied, read_study(copied)).codes == 1
    spoil(copied / "results/default.0.json", code="0" * 64)
    printed = done("study", "--out", copied, "--report-only").out
    assert "made by 2 states of the code" in printed
    assert "Made by 2 states of the code" in (copied / "report.md").read_text()


OWN = (
    *("teach.steps=3", "teach.batch_size=8", "teach.save_every=1", "teach.hidden_size=32", "teach.layers=2"),
    *("train.steps=1", "train.batch_size=8"),
)
"""A teacher of the study's own, which knows nothing, and one cell."""


def with_own_teacher(out, testbed, *settings):
    pictures = () if testbed == "nlvr" else ("pictures=6", "test_pictures=3")
    given = [part for one in (*OWN, *pictures, *settings) for part in ("--set", one)]
    return ["study", "--out", out, "--testbed", testbed, "--cell", DEFAULT, "--seeds", 1, *given]


def accuracy_of_teacher(out):
    printed = done("eval", out / "teacher", out / "shards" / "test", "--json").out
    return json.loads(printed)["overall"]["accuracy"]


@pytest.mark.parametrize("testbed", ["sort-of-clevr", "shapes-grid10"])
def test_a_teacher_is_trained_once(tmp_path, testbed):
    out = tmp_path / "study"
    done(*with_own_teacher(out, testbed))
    report = json.loads((out / "report.json").read_text())
    assert report["testbed"] == testbed
    assert report["teacher"] == pytest.approx(accuracy_of_teacher(out))
    assert report["teacher_groups"].keys() == set(GROUPS[testbed]) & (
        {"objects"} if testbed == "shapes-grid10" else {"objects", "relations"}
    )
    before = tree(out / "teacher")
    done(*with_own_teacher(out, testbed))
    assert tree(out / "teacher") == before
    assert json.loads((out / "report.json").read_text()) == report


@pytest.mark.parametrize(("count", "name"), [(1, "checkpoints/00000002"), (1, "results/teacher.npz")])
def test_killed_while_the_teacher_is_made(tmp_path, count, name):
    expected, out = tmp_path / "whole", tmp_path / "study"
    done(*with_own_teacher(expected, "sort-of-clevr"))
    child = Child(*with_own_teacher(out, "sort-of-clevr"), folder=tmp_path, before=killed_in("replace", count, name))
    assert child.wait() == -9, child.printed
    done(*with_own_teacher(out, "sort-of-clevr"))
    assert (out / "teacher/model.safetensors").read_bytes() == (expected / "teacher/model.safetensors").read_bytes()
    assert answers(out) == answers(expected)


def test_the_pictures_of_an_nlvr_example_count_as_one(tmp_path):
    for split in ("hidden", "test"):
        folder = small_nlvr(tmp_path / split, split=split, lacking=False)
        shutil.make_archive(str(tmp_path / split), "tar", folder)
    out = tmp_path / "study"
    settings = (f"source={tmp_path}", "teach.image_size=40", "teach.patch_size=10", "train.batch_size=4")
    done(*with_own_teacher(out, "nlvr", *settings))
    report = json.loads((out / "report.json").read_text())
    assert (report["questions"], report["pictures"]) == (12, 2)
    assert report["teacher"] == pytest.approx(accuracy_of_teacher(out))


@pytest.mark.parametrize("testbed", TESTBEDS)
def test_every_testbed_has_settings_and_a_teacher(testbed):
    config = study_config(None, ["source=somewhere"] if testbed == "nlvr" else [], testbed)
    assert config.testbed == testbed
    assert (config.teacher is None) != (config.teach is None)
    assert config.init == (TEACHER if testbed.startswith(("shapes", "sort")) else None)


def test_what_is_wrong_with_settings_is_said_at_once_and_leaves_nothing(tmp_path):
    out = tmp_path / "study"
    refused = cli("study", "--out", out, "--set", "a", "--set", "b=[", "--set", "seeds=3")
    assert (refused.code, "got 'a', 'b=['" in refused.message) == (1, True)
    refused = cli("study", "--out", out, "--set", "needs.seeds=1", "--set", "needs.margin=.nan", "--set", "pictures=0")
    assert all(name in refused.message for name in ("needs.seeds", "needs.margin", "pictures"))
    assert "expected a testbed of" in cli("study", "--out", out, "--set", "testbed=[a]").message
    refused = cli("study", "--out", out, "--testbed", "nlvr", "--set", f"source={tmp_path / 'no'}")
    assert (refused.code, "found nothing" in refused.message) == (1, True)
    assert not out.exists(), "so that the call can be put right"
    out.mkdir()
    (out / ".study.yaml.1.partial").write_text("left by a killed call")
    done(*study(out, seeds=1))
    (out / "study.yaml").write_text("testbed: shapes\npictures: none\n")
    assert "pictures: Input should be a valid integer" in cli("study", "--out", out, "--report-only").message


def test_a_cache_that_was_deleted_is_made_again(tmp_path):
    out = tmp_path / "study"
    done(*study(out, seeds=1))
    for cache in (out / "caches").iterdir():
        if cache.is_dir():
            shutil.rmtree(cache)
    done(*study(out, seeds=2))
    assert len(list((out / "results").glob("default.*.json"))) == 2


def test_a_cell_stands_below_the_one_that_it_is_compared_with():
    report, _ = verdicts(outcomes_of(GOOD, seeds=2))
    found = [(depth, row.cell) for depth, row in placed(report.rows)]
    assert found[0] == (0, DEFAULT)
    assert sorted(name for _, name in found) == sorted(GOOD)
    assert found[found.index((1, "lossless")) + 1] == (2, "top-8")
    assert found[found.index((1, "1% labels")) + 1] == (2, "1% labels + cache")
    alone, _ = verdicts(outcomes_of({"top-8": 0.9, "lossless": 0.9}, seeds=2))
    assert [(depth, row.cell) for depth, row in placed(alone.rows)] == [(0, "lossless"), (1, "top-8")]


SORTS = (
    *(DEFAULT, "labels alone", "soft labels", "online teacher", "lossless", "whole attention", "hidden states"),
    *("mass 0.9", "top-4, even tail", "1% labels", "1% labels + cache", "few, 4 views"),
)
"""One cell of each sort."""


def test_every_sort_of_cell_runs(tmp_path):
    out, config = tmp_path / "study", study_config(None, [*TINY[:2], "train.steps=1", "train.batch_size=4"])
    cells = [cell for cell in CELLS if cell.name in SORTS]
    runs = ordered(cells, 1)
    assert run_study(out, config, runs, lambda name, total: lambda done: None) == ()
    report = sum_up(out, config)
    assert {row.cell for row in report.rows} == set(SORTS)
    sizes = {row.cell: row.bytes_a_pair for row in report.rows}
    assert sizes["lossless"] > sizes[DEFAULT] > 0
    assert [sizes[cell] for cell in ("labels alone", "soft labels", "online teacher")] == [None] * 3


def test_a_cell_with_less_than_a_batch_is_skipped(tmp_path):
    settings = (*TINY[:2], "train.steps=1", "train.batch_size=8")
    printed = done(*study(tmp_path / "study", settings=settings, families="labels", seeds=1)).out
    assert "1% labels (fewer pairs than a batch): seed 0" in " ".join(printed.split())


def test_cells_are_one_change_away_and_come_after_their_base():
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(CELLS):
        assert cell.base in names[: number + 1]
        assert cell.importance >= next(one for one in CELLS if one.name == cell.base).importance
        assert cell.family in FAMILIES
    files = [run.name for run in ordered(CELLS, 2)]
    assert len(set(files)) == len(files)
    assert all(name.replace("-", "").replace(".", "").isalnum() for name in files)


def test_what_claims_need_comes_first_and_seeds_go_together():
    runs = ordered(chosen(), 3)
    places = [(run.cell.importance, run.seed) for run in runs]
    assert places == sorted(places)
    assert {run.name for run in runs} == {f"{name}" for cell in CELLS for name in [r.name for r in ordered([cell], 3)]}
    assert {cell.name for cell in chosen(["labels"])} >= {DEFAULT, "labels alone", "1% labels"}

    def names(*asked):
        return [cell.name for cell in chosen(*asked)]

    assert names(None, ["top-4"]) == [DEFAULT, "lossless", "top-4"]
    beside = {DEFAULT, "online teacher", "10% labels", "10% labels + cache"}
    assert set(names(["online"], ["10% labels + cache"])) == beside
    with pytest.raises(InputError, match=r"expected a cell of default; .*; got top-5"):
        chosen(None, ["top-4", "top-5"])
    for wrong in (["key"], []):
        with pytest.raises(InputError, match="expected families of"):
            chosen(wrong)


def test_settings_of_a_cell_change_what_it_names_and_nothing_else():
    config = study_config()
    for cell in CELLS:
        before, after = config.train.model_dump(), training(config.train, cell, 7).model_dump()
        changed = {name for name in before if before[name] != after[name]}
        assert changed <= {*cell.train, "seed"}
    by_name = {cell.name: extraction(config.extract, cell) for cell in CELLS}
    assert (by_name["top-4"].weights, by_name["top-4"].k) == ("log8", 4)
    assert (by_name["lossless"].weights, by_name["lossless"].k) == ("float32", None)
    assert (by_name["mass 0.9"].mass, by_name["mass 0.9"].k) == (0.9, 32)
    assert by_name[DEFAULT] == config.extract


def test_settings_come_from_the_testbed_the_file_and_assignments(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("pictures: 7\ntrain: {steps: 5, batch_size: 3}\n")
    config = study_config(file, ["train.steps=9", "needs.seeds=2"])
    assert (config.pictures, config.train.steps, config.train.batch_size, config.needs.seeds) == (7, 9, 3, 2)
    assert config.train.learning_rate == study_config().train.learning_rate
    with pytest.raises(InputError, match="expected a testbed of"):
        study_config(testbed="circles")
    with pytest.raises(InputError, match=r"(?s)train.steps.*train.colour"):
        study_config(None, ["train.steps=0", "train.colour=red"])
    with pytest.raises(InputError, match="needs source"):
        study_config(testbed="nlvr")
    with pytest.raises(InputError, match="testbed easy-vqa has no kinds, pictures; leave them out"):
        study_config(None, ["pictures=3", "kinds=[row]"], "easy-vqa")
    with pytest.raises(InputError, match="testbed shapes has no source"):
        study_config(None, ["source=folder"])
    with pytest.raises(InputError, match="either a teacher"):
        study_config(None, ["teacher=null"])
    with pytest.raises(InputError, match="name=value"):
        study_config(None, ["steps"])


def test_parts_of_the_pictures_are_nested_and_labels_are_taken_from_the_others(whole):
    shards = open_shards(whole / "shards/train")
    known = {}
    for share in (0.1, 0.5):
        found = list(part_source(shards, None, share, bare=True).found)
        assert [one.key for one in found] == [key for shard in shards for key in shard.keys]
        known[share] = {one.key for one in found if one.texts[0].label is not None}
        assert all(text.label is None for one in found if one.key not in known[share] for text in one.texts)
        alone = part_source(shards, None, share, bare=False).found
        assert {one.key for one in alone} == known[share]
    assert known[0.1] < known[0.5]
    assert [len(known[share]) for share in known] == [2, 10]
    assert len(list(part_source(shards, 0.3, None, bare=True).found)) == 6


QUESTIONS, PICTURES = 6000, 1000


def outcomes_of(accuracy, teacher=0.99, noise=0.002, seeds=5):
    """Answers of cells that are right with known chances, independent but for the picture."""
    random = np.random.default_rng(0)
    luck = random.random(QUESTIONS)
    found = {}
    for cell, chance in accuracy.items():
        # Nearly the same questions are hard for all: a few flip by chance.
        rows = [((luck < chance) ^ (random.random(QUESTIONS) < noise)).astype(bool) for _ in range(seeds)]
        found[cell] = dict(enumerate(rows))
    results = {
        cell: {
            seed: StudyResult(
                cell=cell, seed=seed, accuracy=float(row.mean()), kinds={}, bytes_a_pair=None, fingerprint=None,
                seconds=1.0, wall_seconds=1.0, threads=1, version="0", settings={},
            )
            for seed, row in rows.items()
        }
        for cell, rows in found.items()
    }  # fmt: skip
    picture = np.repeat(np.arange(PICTURES), QUESTIONS // PICTURES)
    kind = np.array(["exists", "row"] * (QUESTIONS // 2))
    return Outcomes(Questions(picture, kind), luck < teacher, results, found)


def verdicts(outcomes, needs=None):
    report = study_report("shapes", outcomes, needs or Requirements(), {"objects": ("exists",)})
    return report, {claim.claim: claim.verdict for claim in report.claims}


GOOD = {
    **dict.fromkeys((DEFAULT, "online teacher", "lossless", "top-8", "top-8, even tail"), 0.989),
    **{"labels alone": 0.7, "soft labels": 0.8, "t2i alone": 0.95, "i2t alone": 0.9},
    **{"10% labels": 0.7, "10% labels + cache": 0.989, "1% labels": 0.6, "1% labels + cache": 0.989},
}


def test_claims_that_are_true_are_established():
    report, found = verdicts(outcomes_of(GOOD))
    assert set(found.values()) == {"established"}, report.claims
    assert report.proves_nothing is False
    assert report.rows[0].groups.keys() == {"objects"}


def test_claims_that_are_false_are_refuted():
    false = GOOD | {
        **{"t2i alone": 0.99, "i2t alone": 0.9895, "online teacher": 0.95, DEFAULT: 0.97},
        **{"top-8": 0.9, "top-8, even tail": 0.9, "10% labels": 0.989, "1% labels + cache": 0.97},
    }
    _, found = verdicts(outcomes_of(false))
    assert found["both directions beat t2i alone"] == "refuted"
    assert found["both directions beat labels alone"] == "established"
    assert found["cached equals online"] == "refuted"
    for tail in ("as one outcome", "spread evenly"):
        assert found[f"top-8 equals dense, its tail {tail}"] == "refuted"
    for labels in ("", "with 10% of labels, ", "with 1% of labels, "):
        assert found[f"{labels}distilled keeps 99% of the teacher, undistilled does not"] == "refuted"


def test_a_gain_that_is_certain_and_small_is_no_gain():
    report, found = verdicts(outcomes_of(GOOD | {"t2i alone": 0.984}, noise=0.0))
    row = next(one for one in report.rows if one.cell == "t2i alone")
    assert row.difference.high < 0
    assert row.verdict == "equal"
    assert found["both directions beat t2i alone"] == "refuted"


def test_a_set_on_which_a_plain_student_is_as_good_proves_nothing():
    report, _ = verdicts(outcomes_of(GOOD | {"labels alone": 0.989}))
    assert report.proves_nothing is True
    assert any("proves nothing" in line for line in markdown(report))


@pytest.mark.parametrize(("seeds", "needs"), [(4, {}), (5, {"questions": 6001}), (5, {"seeds": 6})])
def test_less_than_what_was_fixed_beforehand_is_no_verdict(seeds, needs):
    report, found = verdicts(outcomes_of(GOOD, seeds=seeds), Requirements(**needs))
    assert set(found.values()) == {"not enough data"}
    assert report.proves_nothing is None
    lacking = "6,000 of 6,001 questions" if "questions" in needs else f"{seeds} of {needs.get('seeds', 5)} seeds"
    assert all(one.because.endswith(lacking) for one in report.claims)


def test_differences_within_chance_are_no_verdict_either():
    close = GOOD | {"t2i alone": 0.985, "online teacher": 0.982}
    _, found = verdicts(outcomes_of(close, noise=0.3))
    assert found["both directions beat t2i alone"] == "undecided"
    assert found["cached equals online"] == "undecided"


def test_cells_without_runs_are_no_reason_to_stop():
    report, found = verdicts(outcomes_of({DEFAULT: 0.9}))
    assert set(found.values()) == {"not enough data"}
    assert [row.cell for row in report.rows] == [DEFAULT]


def test_every_cell_stands_whole_in_80_columns(tmp_path):
    outcomes = outcomes_of({cell.name: 0.9 if cell.name == DEFAULT else 0.5 for cell in CELLS}, seeds=2)
    config = study_config()
    open_study(tmp_path / "study", config)
    write_questions(tmp_path / "study", outcomes.questions)
    write_correct(tmp_path / "study", "teacher", outcomes.teacher)
    for run in ordered(CELLS, 2):
        write_correct(tmp_path / "study", run.name, outcomes.correct[run.cell.name][run.seed])
        settings = training(config.train, run.cell, run.seed).model_dump(mode="json")
        updates = {"bytes_a_pair": 23_171.0, "settings": settings}
        result = outcomes.results[run.cell.name][run.seed].model_copy(update=updates)
        write_result(tmp_path / "study", run.name, result)
    done = cli("study", "--out", tmp_path / "study", "--report-only")
    assert done.code == 0, done.err
    assert "…" not in done.out
    lines = done.out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = [line for line in lines if line.strip().startswith(tuple(cell.name for cell in CELLS)) and "±" in line]
    assert len(rows) == len(CELLS)
    assert sum(line.endswith("]") for line in rows) == sum(cell.base != cell.name for cell in CELLS)


def test_plots_are_svg_with_every_cell(tmp_path):
    pytest.importorskip("matplotlib")
    outcomes = outcomes_of({name: 0.9 for name in (DEFAULT, "lossless", "top-8", "labels alone", "10% labels")})
    report = study_report("shapes", outcomes, Requirements(), {}, [SkippedRun(cell="a", seed=1, why="budget")])
    rows = [row.model_copy(update={"bytes_a_pair": 100.0 + number}) for number, row in enumerate(report.rows)]
    names = write_plots(tmp_path, report.model_copy(update={"rows": tuple(rows)}))
    assert names == ("accuracy-bytes.svg", "accuracy-labels.svg")
    texts = [xml.parse(tmp_path / name).getroot().itertext() for name in names]
    texts = [set(map(str.strip, one)) for one in texts]
    assert {"sqrt8", "lossless", "top-8", "bytes a pair", "points"} <= texts[0]
    assert {"labels alone", "pictures with labels, %", "accuracy"} <= texts[1]
    assert write_plots(tmp_path, report) == ("accuracy-labels.svg",)
