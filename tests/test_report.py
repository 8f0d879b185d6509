"""The page of `dde-cache report`: its numbers against oracles, its markup, and what a browser shows."""

import base64
import json
import re
import sys
import time
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pipeline import cli, make_cache, make_samples, make_shards

from dde_cache.clock import Clock
from dde_cache.compare import (
    CONFUSED,
    Judged,
    Run,
    check_unique,
    confusion,
    judge,
    kept_masses,
    read_runs,
    settings_table,
    thinned,
)
from dde_cache.distill import TrainConfig
from dde_cache.errors import InputError, RunError
from dde_cache.evaluate import evaluate, load_subject
from dde_cache.figures import line_chart
from dde_cache.sheet import write_report
from dde_cache.sources import CachedTargets
from dde_cache.train import train

QUICK = {"steps": 4, "batch_size": 4, "workers": 0, "log_every": 1}
HOSTILE = "</title><script>document.title='taken'</script>$x^2$ & <b>"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    samples = make_samples(9)
    return make_shards(tmp_path_factory.mktemp("shards") / "train", samples, size=5)


@pytest.fixture(scope="module")
def sparse(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache", k=2)


@pytest.fixture(scope="module")
def runs(shards, sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    place = str(shards[0].path.parent)
    about = {"shards": place, "targets": str(sparse.folder)}
    for name, settings, valid in (("one", {}, shards), ("two", {"learning_rate": 1e-3, "accumulate": 2}, ())):
        config = TrainConfig(**QUICK, **settings)
        named = {**about, "valid": place if valid else None}
        train(shards, CachedTargets(sparse), folder / name, config, valid=valid, about=named)
    return [folder / "one", folder / "two"]


class Page(HTMLParser):
    """Tags, and the rows of every table by the heading above it."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self._heading, self._cell = [], {}, "", None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "h2":
            self._heading = ""
        elif tag == "table":
            self.tables.setdefault(self._heading, []).append([])
        elif tag == "tr":
            self.tables[self._heading][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1][-1].append("")
        self._cell = tag

    def handle_endtag(self, tag):
        self._cell = None

    def handle_data(self, content):
        if self._cell == "h2":
            self._heading += content
        elif self._cell in ("td", "th"):
            self.tables[self._heading][-1][-1][-1] += content


def drawings(page):
    """The SVG pictures of a page, as text."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page.source)
    return [base64.b64decode(one).decode() for one in found]


# --- numbers


def test_times_of_a_step_add_up(runs):
    for run in read_runs(runs):
        last = [line for line in run.lines if "seconds" in line][-1]
        times = run.times()
        assert set(times) == {"wait", "forward", "backward", "rest"}
        assert sum(times.values()) == pytest.approx(1000 * last["seconds"] / last["step"], rel=1e-3)
        assert all(value > 0 for value in times.values())
        for earlier, later in zip(run.lines[:-1], run.lines[1:], strict=True):
            if "seconds" in earlier and "seconds" in later:
                assert earlier["forward_seconds"] <= later["forward_seconds"]


def test_old_runs_have_no_forward_and_backward(tmp_path):
    run = Run("1: old", tmp_path, {}, [{"step": 10, "loss": 1.0, "seconds": 2.0, "wait_seconds": 0.5}], None)
    assert run.times() == {"wait": 50.0, "rest": 150.0}
    assert Run("1: new", tmp_path, {}, [], None).times() == {}


def test_a_clock_adds_up_its_parts_until_they_are_taken():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.part("forward"):
            time.sleep(0.01)
    with clock.part("backward"):
        pass
    taken = clock.take()
    assert taken["forward"] >= 0.02
    assert set(taken) == {"forward", "backward"}
    assert clock.take() == {}


def test_scores_are_those_of_eval_and_confusions_add_up(runs, shards):
    run = read_runs(runs)[0]
    judged = judge(run, shards)
    expected = evaluate(load_subject(str(run.folder)), shards)
    assert judged.report == expected
    for kind, found in judged.confusions.items():
        assert found.counts.sum() == expected.kinds[kind].pairs
        assert np.trace(found.counts) / found.counts.sum() == pytest.approx(expected.kinds[kind].accuracy)
    worst = sorted(expected.kinds, key=lambda kind: expected.kinds[kind].accuracy)
    assert list(judged.confusions) == worst[:3]


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=1))
def test_confusion_counts_every_pair(pairs):
    labels = [f"label {number}" for number in range(12)]
    truth, answer = (np.array(column) for column in zip(*pairs, strict=True))
    found = confusion(truth, answer, labels)
    assert found.counts.sum() == len(pairs)
    oracle = Counter((labels[one], labels[other]) for one, other in pairs)
    for row, label in enumerate(found.labels):
        for column, other in enumerate(found.labels):
            if "(all others)" not in (label, other):
                assert found.counts[row, column] == oracle[label, other]
    assert len(found.labels) == min(len(set(truth) | set(answer)), CONFUSED + 1)


def test_kept_mass_is_that_of_the_rows(sparse):
    counts = kept_masses(sparse, bins=10)
    for direction, name in (("t2i", "text to image"), ("i2t", "image to text")):
        kept = []
        for entry in sparse.manifest.units:
            unit = sparse.unit(entry)
            tokens = unit.maps.text_tokens if direction == "t2i" else unit.maps.image_tokens
            tail = unit.attention(direction).parts["tail"].numpy().astype(float)
            mass = np.where(tail < 0, -tail, 1 - tail)
            kept += [mass[row, :, : tokens[row]].ravel() for row in range(len(tokens))]
            unit.close()
        expected = np.histogram(np.concatenate(kept).round(3), bins=10, range=(0, 1))[0]
        # A value on the edge of two bins may fall to either side.
        assert sum(counts[name]) == expected.sum()
        assert np.abs(np.array(counts[name]) - expected).max() <= 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 20))
def test_thinned_curves_keep_their_mean_and_ends(values, most):
    points = [(float(step), value) for step, value in enumerate(values)]
    found = thinned(points, most)
    assert len(found) == min(len(points), most)
    assert min(values) - 1e-6 <= min(y for _, y in found)
    assert max(y for _, y in found) <= max(values) + 1e-6
    assert [x for x, _ in found] == sorted(x for x, _ in found)


def test_settings_that_differ_come_first_and_are_marked(runs):
    rows = settings_table(read_runs(runs))
    differ = {name for name, _, differs in rows if differs}
    assert differ == {"learning_rate", "accumulate", "(valid)"}
    assert [differs for _, _, differs in rows] == sorted((one for _, _, one in rows), reverse=True)
    values = {name: cells for name, cells, _ in rows}
    assert values["learning_rate"] == ["0.0005", "0.001"]
    assert values["batch_size"] == ["4", "4"]


# --- the page


def test_the_command_writes_runs_side_by_side(runs, sparse, shards, tmp_path):
    out = tmp_path / "report.html"
    done = cli("report", *runs, "--targets", sparse.folder, "--out", out)
    assert done.code == 0, done.err
    assert "2: two: not scored" in done.out
    page = Page(out)
    assert {"script", "svg", "b"} & set(page.tags) == set()
    assert "http:" not in re.sub(r'"data:image[^"]+"', "", page.source)
    runs_table = page.tables["Runs"][0]
    assert [row[0] for row in runs_table] == ["run", "1: one", "2: two"]
    report = json.loads(cli("report", *runs, "--shards", shards[0].path.parent, "--out", out, "--json").out)
    page = Page(out)
    kinds = {row[0]: row[1:] for row in page.tables["Accuracy by kind"][0]}
    for place, name in enumerate(("1: one", "2: two")):
        assert kinds["all"][place] == f"{report['scores'][name]['overall']['accuracy']:.3f}"
    settings = {row[0]: row[1:] for row in page.tables["Settings"][0]}
    assert settings["learning_rate"] == ["0.0005", "0.001"]
    titles = " ".join(drawings(page))
    for name in ("loss", "t2i", "i2t", "soft", "valid accuracy", "learning rate", "milliseconds a step", "accuracy"):
        assert f">{name}<" in titles, name
    assert "pass --targets" in page.source


def test_unfinished_runs_are_shown(runs, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 3, "lo')
    done = cli("report", folder, "--out", tmp_path / "report.html")
    assert done.code == 0, done.err
    assert Page(tmp_path / "report.html").tables["Runs"][0][1][1] == "step 2, not finished"


def test_strangers_names_stay_text(tmp_path, shards):
    folder = tmp_path / "run"
    settings = {"task": HOSTILE, HOSTILE: 1}
    lines = [{"step": 1, HOSTILE: 2.0, "seconds": 1.0, "wait_seconds": 0.1}]
    run = Run(f"1: {HOSTILE}", folder, settings, lines, None)
    write_report(tmp_path / "page.html", [run], {run.name: f"no {HOSTILE}"}, HOSTILE)
    page = Page(tmp_path / "page.html")
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("title") == 1
    assert json.dumps(HOSTILE) in [row[1] for row in page.tables["Settings"][0]]
    assert any("taken" in drawing for drawing in drawings(page))
    for drawing in drawings(page):
        assert "<script" not in drawing


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'dde-cache\[report\]'"):
        line_chart({"a": [(1, 1)]}, "loss")


def test_what_is_no_run_is_refused(runs, shards, tmp_path):
    with pytest.raises(RunError, match="expected the folder of a run"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="once"):
        check_unique([runs[0], runs[0]])
    for name, content in (
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n'),
        ("run.json", "{"),
    ):
        folder = tmp_path / f"bad-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for held in ("config.yaml", "metrics.jsonl", "run.json"):
            (folder / held).write_text((runs[0] / held).read_text())
        (folder / name).write_text(content)
        with pytest.raises(RunError, match="cannot be read"):
            read_runs([folder])
    begun = Run("1: begun", tmp_path, yaml.safe_load("steps: 1"), [], None)
    with pytest.raises(RunError, match="expected a saved model"):
        judge(begun, shards)


def test_a_browser_shows_every_chart_in_both_schemes(runs, sparse, tmp_path, browser):
    out = tmp_path / "report.html"
    assert cli("report", *runs, "--targets", sparse.folder, "--out", out).code == 0
    shown = []
    for dark in (False, True):
        browser.open(out, dark=dark)
        images = "[...document.images]"
        assert browser.run(f"{images}.length") == out.read_text().count("<picture>")
        assert browser.run(f"{images}.every(one => one.complete && one.naturalWidth > 100)")
        assert browser.run(f"{images}.every(one => one.alt.length > 3)")
        shown.append(browser.run(f"{images}.map(one => one.currentSrc)"))
        assert browser.complaints() == []
    assert all(one != other for one, other in zip(*shown, strict=True))
    browser.open(out, width=400)
    assert browser.run("document.documentElement.scrollWidth <= 400")


def test_judged_of_retrieval_has_no_confusion(shards, sparse, tmp_path):
    settings = {"task": "retrieval", "hard_weight": 1.0, "soft_weight": 0.0}
    train(shards, CachedTargets(sparse), tmp_path / "run", TrainConfig(**QUICK, **settings))
    found = judge(read_runs([tmp_path / "run"])[0], shards)
    assert isinstance(found, Judged)
    assert found.confusions == {}
    assert found.report.metrics


OWN = """
from dde_cache.tasks import SingleLabel

class Own(SingleLabel):
    pass
"""


def test_a_task_of_ones_own_does_not_keep_the_others_from_being_scored(runs, shards, sparse, tmp_path, monkeypatch):
    (tmp_path / "reported.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own, place = tmp_path / "run", shards[0].path.parent
    train(shards, CachedTargets(sparse), own, TrainConfig(**QUICK, task="reported:Own"))
    command = ["report", runs[0], own, "--shards", place, "--json", "--out", tmp_path / "page.html"]
    unnamed = cli(*command)
    assert unnamed.code == 0, unnamed.err
    assert [name[:2] for name in json.loads(unnamed.out)["scores"]] == ["1:"]
    assert "pass --task reported:Own to run that code" in (tmp_path / "page.html").read_text()
    named = cli(*command, "--task", "reported:Own")
    assert named.code == 0, named.err
    assert [name[:2] for name in json.loads(named.out)["scores"]] == ["1:", "2:"]
    wrong = cli(*command, "--task", "reported:Other")
    assert wrong.code == 1
    assert "(reported:Own), got 'reported:Other'" in wrong.message


def test_labels_that_the_student_does_not_know_are_refused(runs, tmp_path):
    """As by `eval`: they would count as if they had none."""
    samples = make_samples(3)
    texts = tuple(text.model_copy(update={"label": "purple"}) for text in samples[0].texts)
    samples[0] = type(samples[0])(samples[0].key, samples[0].images, texts)
    make_shards(tmp_path / "data", samples)
    refused = cli("report", runs[0], "--shards", tmp_path / "data", "--out", tmp_path / "page.html")
    assert refused.code == 1
    assert "got 1 others: - 'purple'" in refused.message
