"""Recipe: training runs side by side on one page: curves, accuracy by kind, confusion, times, kept mass, settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from pydantic import ValidationError

from dde_cache.batches import NO_LABEL
from dde_cache.configs import read_yaml
from dde_cache.errors import InputError, RunError, first_line
from dde_cache.evaluate import load_subject, predictions_of
from dde_cache.runs import CONFIG, METRICS
from dde_cache.samples import Shard
from dde_cache.scores import OTHER_KIND, EvaluationReport, Predictions, texts_of
from dde_cache.store import Cache
from dde_cache.summary import count_masses
from dde_cache.tasks import is_own
from dde_cache.train import MODEL, RUN, RunRecord

WORST_KINDS = 3
"""Kinds of question of which the confusion is shown."""

CONFUSED = 8
"""Answers in a table of confusion; what comes less often is counted together."""


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        name: unique on the page.
        folder: of the run.
        settings: its resolved configuration.
        lines: of its metrics.
        record: how it ended; None while it has not.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    record: RunRecord | None

    @property
    def task(self) -> str:
        """The task that it was trained for; empty where its settings do not say."""
        return str(self.settings.get("task", ""))

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one metric."""
        return [(line["step"], line[name]) for line in self.lines if name in line]

    def times(self) -> Mapping[str, float]:
        """Milliseconds a step by part, over the whole run. Runs of older versions have `wait` and `rest` alone."""
        timed = [line for line in self.lines if "seconds" in line]
        if not timed:
            return {}
        last = timed[-1]
        parts = {
            name: 1000 * last[f"{name}_seconds"] / last["step"]
            for name in ("wait", "forward", "backward")
            if f"{name}_seconds" in last
        }
        return {**parts, "rest": max(1000 * last["seconds"] / last["step"] - sum(parts.values()), 0.0)}


@dataclass(frozen=True)
class Judged:
    """A run's student on some shards: its report and, where there is one right answer a pair, what it confuses."""

    report: EvaluationReport
    confusions: Mapping[str, "Confusion"]


@dataclass(frozen=True)
class Confusion:
    """How often each label was answered with each answer; the last row and column may stand for all others."""

    labels: tuple[str, ...]
    counts: Int[np.ndarray, "n n"]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of some runs, finished or not.

    Raises:
        RunError: one is no run, or its files are damaged.
        InputError: its configuration cannot be read.
    """
    return [_read_run(folder, number) for number, folder in enumerate(folders, start=1)]


def _read_run(folder: Path, number: int) -> Run:
    if not (folder / CONFIG).is_file() or not (folder / METRICS).is_file():
        raise RunError(f"{folder}: expected the folder of a run with {CONFIG} and {METRICS}, found none")
    try:
        # The last line may be cut short while the run goes on.
        text = (folder / METRICS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not all(isinstance(line, dict) and _numbers(line) for line in lines):
            raise ValueError("expected numbers by name in every line")
        record = None
        if (folder / RUN).is_file():
            record = RunRecord.model_validate_json((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        raise RunError(
            f"{folder}: its {METRICS} or {RUN} cannot be read ({first_line(error)}); leave this run out"
        ) from error
    return Run(f"{number}: {folder.resolve().name}", folder, read_yaml(folder / CONFIG), lines, record)


def _numbers(line: Mapping[str, Any]) -> bool:
    return "step" in line and all(isinstance(value, int | float) for value in line.values()) and line["step"] > 0


def judge(
    run: Run,
    shards: Sequence[Shard],
    *,
    task: str | None = None,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda pairs: None,
) -> Judged:
    """Score a run's student, by kind of question, and count what it confuses in its worst kinds.

    Args:
        run: with a saved model.
        shards: labelled data.
        task: `module:Class` of runs with a task of the user's own; others have theirs.
        device: where it runs.
        advance: called with the number of pairs done.

    Raises:
        RunError: the run has no model, or a task of the user's own that was not named.
        InputError: the shards have no labels, or others than the student knows.
    """
    if not (run.folder / MODEL).is_dir():
        raise RunError(f"{run.folder}: expected a saved model to score, found none; leave --shards out, or this run")
    subject = load_subject(str(run.folder), device, task if is_own(run.task) else None)
    predictions = predictions_of(subject, shards, advance=advance)
    report = subject.task.report(predictions, shards, subject.labels, subject.baselines, None)
    worst = sorted(report.kinds, key=lambda kind: report.kinds[kind].accuracy)[:WORST_KINDS]
    if not isinstance(predictions, Predictions) or predictions.score is not None:
        return Judged(report, {})
    kinds = [text.kind or OTHER_KIND for _, _, text in texts_of(shards)]
    found = {kind: _confusion(predictions, [one == kind for one in kinds], subject.labels) for kind in worst}
    return Judged(report, {kind: one for kind, one in found.items() if one.labels})


def _confusion(predictions: Predictions, chosen: Sequence[bool], labels: Sequence[str]) -> Confusion:
    rows = torch.tensor(chosen) & (predictions.label != NO_LABEL)
    truth, answer = predictions.label[rows].numpy(), predictions.answer[rows].numpy()
    return confusion(truth, answer, labels)


def confusion(truth: Int[np.ndarray, " n"], answer: Int[np.ndarray, " n"], labels: Sequence[str]) -> Confusion:
    """Count answers by label; of many labels the `CONFUSED` most frequent, and all others as one.

    Args:
        truth: class numbers of the labels.
        answer: class numbers of the answers.
        labels: names of the classes.
    """
    often = np.bincount(np.concatenate([truth, answer]), minlength=len(labels))
    order = [int(number) for number in np.argsort(-often, kind="stable") if often[number]]
    shown = sorted(order[:CONFUSED])
    place = np.full(len(labels), len(shown))
    place[shown] = np.arange(len(shown))
    size = len(shown) + (len(order) > CONFUSED)
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (place[truth], place[answer]), 1)
    others = ("(all others)",) if size > len(shown) else ()
    return Confusion((*(labels[number] for number in shown), *others), counts)


def kept_masses(
    cache: Cache, bins: int = 50, advance: Callable[[int], None] = lambda units: None
) -> dict[str, list[int]]:
    """How many valid rows of a cache keep how much of their mass, by direction; {} where every key is kept.

    Args:
        cache: whose units are all read.
        bins: equal ones from 0 to 1; a divisor of 1,000.
        advance: called after each unit.
    """
    if cache.spec.steps is not None or not cache.spec.layers:
        return {}
    counts = {direction: np.zeros(1001, np.int64) for direction in cache.spec.directions}
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        for direction, counted in counts.items():
            counted += count_masses(unit, direction)
        unit.close()
        advance(1)
    names = {"t2i": "text to image", "i2t": "image to text"}
    folded = {}
    for direction, counted in counts.items():
        last = counted[:1000].reshape(bins, -1).sum(1)
        last[-1] += counted[1000]
        folded[names[direction]] = last.tolist()
    return folded


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(name, value in each run, whether they differ) of every setting, those that differ first."""
    about = [
        {**run.settings, **({} if run.record is None else {f"({name})": getattr(run.record, name) for name in _ABOUT})}
        for run in runs
    ]
    names = dict.fromkeys(name for settings in about for name in settings)
    rows = []
    for name in names:
        values = [json.dumps(settings[name]) if name in settings else "-" for settings in about]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


_ABOUT = ("shards", "valid", "targets", "init", "preset", "version")


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most so many points of a curve, each the mean of its neighbours."""
    if len(points) <= most:
        return list(points)
    return [tuple(part.mean(0).tolist()) for part in np.array_split(np.array(points), most)]


def check_shards(run: Run) -> str | None:
    """The validation shards that a run names, where they are on this machine."""
    named = run.record.valid if run.record else None
    return named if named and (Path(named).exists() or "{" in named) else None


def why_unscored(run: Run, task: str | None) -> str | None:
    """Why a run cannot be scored, in words: its task is one of the user's own, and another or none was named.

    What a run's files name is never imported by itself: they may be a stranger's.
    """
    if not is_own(run.task) or run.task == task:
        return None
    return f"not scored: trained for a task of its own; pass --task {run.task} to run that code"


def check_task(runs: Sequence[Run], task: str | None) -> None:
    """Refuse a task that none of the runs was trained for as its own.

    Raises:
        InputError: so it is.
    """
    own = sorted({run.task for run in runs if is_own(run.task)})
    if task is not None and task not in own:
        which = ", ".join(own) or "none: leave --task out"
        raise InputError(f"expected --task of runs with a task of your own ({which}), got {task!r}")


def check_unique(folders: Sequence[Path]) -> None:
    """Refuse a run that is named twice.

    Raises:
        InputError: it is.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("expected each run once, got one of them twice; leave it out")
