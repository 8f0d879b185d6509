"""Recipe: the main job on generated pictures with the sample teacher, from data to one table.

Three students of the same initialisation, data order and steps: labels only; soft labels; soft labels and attention.
The last two never open the teacher: they read the cache.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import Field

from dde_cache.distill import TrainConfig
from dde_cache.errors import InputError
from dde_cache.evaluate import evaluate, load_subject
from dde_cache.extract import ExtractConfig, ExtractProgress, ExtractSummary, extract
from dde_cache.fit import Progress
from dde_cache.importers.common import import_samples
from dde_cache.importers.shapes import shapes_source
from dde_cache.prepare import labels_only
from dde_cache.samples import Shard, open_shards
from dde_cache.scores import EvaluationReport
from dde_cache.sources import CachedTargets
from dde_cache.spec import Model
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.teacher import SAMPLE_TEACHER
from dde_cache.train import RunRecord, train

STUDENTS = {
    "labels only": {"hard_weight": 1.0, "soft_weight": 0.0, "attention_weight": 0.0},
    "soft labels": {"hard_weight": 0.0, "soft_weight": 1.0, "attention_weight": 0.0},
    "soft labels + attention": {"hard_weight": 0.0, "soft_weight": 1.0, "attention_weight": 1.0},
}
"""The demo's students, by the weights of their losses."""


Stage = Callable[[str, int], Callable[[int], None]]
"""Takes a stage's name and its number of steps; returns what is called with the steps done so far."""


class DemoConfig(Model):
    """Size of the demo; the defaults take under ten minutes on two CPU cores."""

    pictures: int = Field(default=4000, ge=1, description="training pictures, six questions each")
    test_pictures: int = Field(default=1000, ge=1)
    steps: int = Field(default=1000, ge=1, description="of each student")
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    init: str | None = Field(
        default=SAMPLE_TEACHER, description="checkpoint that the towers of every student start from"
    )
    seed: int = 0
    workers: int = 1


class DemoStudent(Model):
    """One trained student."""

    score: EvaluationReport
    run: RunRecord


class DemoReport(Model):
    """What the demo measured."""

    teacher: EvaluationReport
    students: dict[str, DemoStudent]
    extraction: ExtractSummary
    conclusion: str


def demo(
    out: Path,
    config: DemoConfig,
    stage: Stage,
) -> DemoReport:
    """Run the whole road in `out`.

    Args:
        out: new or empty folder.
        config: sizes.
        stage: called when a stage begins.

    Raises:
        InputError: `out` is taken.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: expected a new or empty folder for the demo; delete it or choose another --out")
    for split, count in (("train", config.pictures), ("test", config.test_pictures)):
        source = shapes_source(split, count, seed=config.seed)
        import_samples(source, out / split, progress=stage(f"{split} pictures", count))
    shards, test = open_shards(out / "train"), open_shards(out / "test")
    extraction = _extract(shards, out / "cache", stage)
    cache = Cache(out / "cache")
    students = {}
    for name, weights in STUDENTS.items():
        settings = TrainConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=config.seed,
            workers=config.workers,
            log_every=10,
            **weights,
        )
        done = stage(name, config.steps)
        targets = labels_only(str(out / "cache")) if name == "labels only" else CachedTargets(cache)
        run = out / name.replace(" + ", "-").replace(" ", "-")
        record = train(
            shards,
            targets,
            run,
            settings,
            init=config.init,
            about={"shards": "train", "targets": name, "init": config.init},
            progress=_steps(done),
        )
        students[name] = DemoStudent(score=evaluate(load_subject(str(run)), test), run=record)
    teacher = evaluate(load_subject(SAMPLE_TEACHER), test, baseline_shards=shards)
    return DemoReport(
        teacher=teacher, students=students, extraction=extraction, conclusion=conclusion(teacher, students)
    )


def _steps(done: Callable[[int], None]) -> Progress:
    return Progress(step=lambda number, _record: done(number))


def _extract(shards: Sequence[Shard], out: Path, stage: Stage) -> ExtractSummary:
    pairs = len(PairTable.of(shards))
    done = stage("extract", pairs)
    finished = 0

    def batch(size: int, _kept: float) -> None:
        nonlocal finished
        finished += size
        done(finished)

    return extract(shards, SAMPLE_TEACHER, out, ExtractConfig(), ExtractProgress(batch=batch))


def conclusion(teacher: EvaluationReport, students: dict[str, DemoStudent]) -> str:
    """Say in words what the table shows, with the difference that chance alone could make."""
    accuracy = {name: student.score.overall.accuracy for name, student in students.items()}
    plain, soft, full = (accuracy[name] for name in STUDENTS)
    pairs = teacher.overall.pairs
    # Two standard errors of a difference of two accuracies near one half, as if measured on different questions:
    # on the same questions the true error is smaller.
    chance = 2 * math.sqrt(2 * 0.25 / pairs)
    verdicts = []
    for what, gain in (("labels only", full - plain), ("soft labels", full - soft)):
        size = f"{abs(gain) * 100:.1f} points {'above' if gain >= 0 else 'below'} {what}"
        verdicts.append(size if abs(gain) > chance else f"{size}, which chance alone could make")
    left = (teacher.overall.accuracy - full) * 100
    return (
        f"With soft labels and attention from the cache the student answers {full:.1%} of {pairs:,} test questions: "
        f"{verdicts[0]}; {verdicts[1]}; {abs(left):.1f} points {'below' if left >= 0 else 'above'} its teacher. "
        f"(Chance alone makes differences up to {chance * 100:.1f} points; this is one seed.)"
    )
