"""A training step with cached targets, with labels only, and with the teacher run online.

Measured, by turns in one run of the training loop (`Fit`, one student, one optimizer): the step with labels only, the
same step with cached attention and soft labels, and the step that runs the teacher itself; forward, losses, backward,
clipping, AdamW. The wait for batches (pictures, tokens and targets, by worker processes as a user has them) is measured
in a run with cached targets alone. Peak memory is that of a process which trains a few steps one way (`ru_maxrss`),
workers not counted.

Limit: the step with labels only, which a distillation step contains; for the online step, the teacher's forward pass
on top of the cached one.

    python benchmarks/training_step.py
"""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import TINY, VILT_B32, arguments, pictures_with_questions, print_machine, print_ratio, save_teacher
from torch import Tensor, nn

from dde_cache.batches import Batch, PairDataset, batch_loader
from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.extract import ExtractConfig, extract
from dde_cache.fit import Fit, Progress
from dde_cache.prepare import labels_only
from dde_cache.samples import Shard, open_shards
from dde_cache.sources import CachedTargets, OnlineTargets, Targets
from dde_cache.store import Cache
from dde_cache.stream import BatchOrder, PairTable
from dde_cache.student import new_student
from dde_cache.targets import CacheTargets
from dde_cache.teacher import FusionTeacher
from dde_cache.terms import Losses, Objective, Sizes

WAYS = ("labels", "cached", "online")


class Enough(Exception):
    """Ends a run before it writes a checkpoint, which takes more memory than a step."""


class Turns(Objective[Any]):
    """Losses of several ways, one after the other, step by step."""

    def __init__(self, config: TrainConfig, ways: Sequence[Targets]) -> None:
        self._ways = [StudentLosses(config, targets, False) for targets in ways]
        self._step = -1

    def sizes(self, batches: Sequence[Batch]) -> Sizes:
        """Go on to the next way: a step begins here."""
        self._step += 1
        return self._way.sizes(batches)

    def rows(self, batches: Sequence[Batch], sizes: Sizes) -> Mapping[str, float]:
        """Rows of this turn's terms."""
        return self._way.rows(batches, sizes)

    def sums(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Mapping[str, Tensor]:
        """Sums of this turn's terms."""
        return self._way.sums(model, batch, sizes)

    def means(self, sums: Mapping[str, Tensor], rows: Mapping[str, float]) -> Losses:
        """Means of this turn's terms."""
        return self._way.means(sums, rows)

    @property
    def _way(self) -> StudentLosses:
        return self._ways[self._step % len(self._ways)]


def targets_of(way: str, folder: Path) -> Targets:
    """The targets of one way."""
    if way == "labels":
        return labels_only(str(folder / "cache"))
    if way == "cached":
        return CachedTargets(Cache(folder / "cache"))
    teacher = FusionTeacher.load(folder / "teacher")
    return OnlineTargets(teacher, teacher.layers - 1)


def run_steps(folder: Path, run: Path, ways: Sequence[str], steps: int, batch_size: int) -> list[Mapping[str, float]]:
    """Train `steps` steps, the ways by turns; return seconds, wait and peak memory (KiB) after each step."""
    shards: list[Shard] = open_shards(folder / "shards")
    like = labels_only(str(folder / "cache"))
    config = TrainConfig(steps=steps, batch_size=batch_size, learning_rate=1e-4, log_every=1, hard_weight=0.0)
    table = PairTable.of(shards)
    cached = "cached" in ways
    cache = Cache(folder / "cache")
    reader = CacheTargets(cache, shards, cache.spec.layers[-1]) if cached else None
    dataset = PairDataset(shards, table, like.preprocessor, like.labels, reader)
    torch.manual_seed(0)
    marks: list[Mapping[str, float]] = []

    def mark(step: int, record: Mapping[str, float]) -> None:
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        marks.append(
            {"seconds": record["seconds"], "wait": record["wait_seconds"], "peak": peak, "cpu": time.process_time()}
        )
        if step == steps:
            raise Enough

    fit = Fit(
        new_student(like.tower, like.labels),
        Turns(config, [targets_of(way, folder) for way in ways]),
        config,
        run,
        save_best=lambda _model: None,
        progress=Progress(step=mark),
    )
    with contextlib.suppress(Enough):
        fit(
            lambda step, share: batch_loader(
                dataset, BatchOrder(table, config.shuffle(), batch_size, step, steps, share), config.workers
            )
        )
    return marks


def per_step(marks: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Increments of a running total."""
    totals = [mark[name] for mark in marks]
    return [after - before for before, after in zip([0.0, *totals], totals, strict=False)]


def alone(folder: Path, way: str, steps: int, batch_size: int) -> list[Mapping[str, float]]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--alone", way, "--folder", str(folder), "--steps", str(steps)]
    done = subprocess.run([*command, "--batch-size", str(batch_size)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--alone", choices=WAYS, help="internal: measure one way in this process")
    parser.add_argument("--folder", type=Path, help="internal: where teacher, shards and cache are")
    parser.add_argument("--steps", type=int, help="internal")
    given = parser.parse_args()
    full = given.size == "full"
    if given.alone:
        run = Path(tempfile.mkdtemp(dir=given.folder))
        print(json.dumps(run_steps(given.folder, run, [given.alone], given.steps, given.batch_size)))
        return
    shape, rounds = (VILT_B32, given.repeats or 8) if full else (TINY, given.repeats or 2)
    warm_up, alone_steps = 1, 6 if full else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", shape)
        shards = pictures_with_questions(folder / "shards", shape, alone_steps * given.batch_size)
        extract(shards, str(folder / "teacher"), folder / "cache", ExtractConfig(batch_size=16))
        steps = len(WAYS) * (rounds + warm_up)
        # First, because Linux counts the peak of the process that starts another one as that one's own.
        measured = {way: alone(folder, way, alone_steps, given.batch_size) for way in ("cached", "online")}
        marks = run_steps(folder, folder / "turns", WAYS, steps, given.batch_size)
    busy = [seconds - wait for seconds, wait in zip(per_step(marks, "seconds"), per_step(marks, "wait"), strict=True)]
    if given.clock == "cpu":
        busy = per_step(marks, "cpu")
    times = {way: busy[number + len(WAYS) * warm_up :: len(WAYS)] for number, way in enumerate(WAYS)}
    middle = {way: statistics.median(values) for way, values in times.items()}
    print_ratio(
        "cached step / step with labels only",
        times["cached"],
        times["labels"],
        reach="<= 1.08",
        limit=f"{middle['labels']:.3f} s: the step with labels only",
    )
    wait, seconds = per_step(measured["cached"], "wait"), per_step(measured["cached"], "seconds")
    print_ratio(
        "data wait / cached step",
        wait[1:],
        seconds[1:],
        reach="<= 0.05",
        limit=f"0: batches that are always there; one worker, the first batch ({wait[0]:.2f} s) left out",
    )
    print_ratio(
        "online step / cached step",
        times["online"],
        times["cached"],
        limit=f"{middle['cached']:.3f} s: the cached step; the teacher's forward pass is added to it",
    )
    peaks = {way: measured[way][-1]["peak"] / 2**20 for way in measured}
    print_ratio(
        "online / cached peak memory",
        [peaks["online"]],
        [peaks["cached"]],
        limit=f"{peaks['cached']:.2f} GiB: student, gradients, AdamW moments, activations; online "
        f"{peaks['online']:.2f} GiB",
    )
    print(
        f"  batch {given.batch_size}, {shape.side} px, width {shape.hidden_size}, {shape.layers} blocks, float32, "
        + f"{given.clock} time; "
        + "seconds a step: "
        + ", ".join(f"{way} {value:.3f}" for way, value in middle.items())
    )
    print_machine()


if __name__ == "__main__":
    main()
