"""Recipe: train students in cells that differ in one thing, with several seeds, and keep what each answered.

Everything lies in one folder and is made once: shards, teacher, caches, runs. A finished run is a small file; one that
was cut short goes on from its checkpoint. Several calls may work on one folder: each run is locked by whoever has it.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

import dde_cache
from dde_cache.batches import NO_LABEL, PairDataset, check_labels
from dde_cache.cells import Cell, Run
from dde_cache.claims import SkippedRun
from dde_cache.evaluate import Subject, load_subject
from dde_cache.extract import ExtractConfig, ExtractProgress, extract
from dde_cache.fit import Progress
from dde_cache.importers.common import Source, import_samples
from dde_cache.manifest import MANIFEST, write_bytes
from dde_cache.outcomes import (
    QUESTIONS,
    TEACHER_ANSWERS,
    Questions,
    StudyResult,
    finished,
    has_answers,
    read_result,
    write_correct,
    write_questions,
    write_result,
)
from dde_cache.prepare import labels_only
from dde_cache.runs import CHECKPOINTS, METRICS
from dde_cache.samples import Shard, open_shards
from dde_cache.scores import OTHER_KIND
from dde_cache.sources import CachedTargets, OnlineTargets, Targets
from dde_cache.spec import hash_json
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.study_folder import check_results, extraction, hash_code, open_study, training
from dde_cache.teach import train_teacher
from dde_cache.teacher import FusionTeacher
from dde_cache.testbeds import TEACHER, StudyConfig, part_source, source_of
from dde_cache.train import train

Stage = Callable[[str, int], Callable[[int], None]]
"""Takes a stage's name and its number of steps; returns what is called with the steps done so far."""


def run_study(
    out: Path, config: StudyConfig, runs: Sequence[Run], stage: Stage, *, budget: float | None = None
) -> tuple[SkippedRun, ...]:
    """Make the runs that are not finished yet, in their order; return those that were not made.

    Args:
        out: folder of the study; new, empty, or begun with the same settings.
        config: what all cells share.
        runs: in their order.
        stage: called when a stage begins.
        budget: minutes; a run that would probably not end in them is skipped, unless nothing is known of it.

    Raises:
        RunError: the folder holds another study, or runs of other settings.
        InputError, TeacherError, CacheError: see the parts.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept.
    """
    clock = _Clock(out, time.monotonic() + budget * 60 if budget is not None else None)
    open_study(out, config)
    check_results(out, config)
    place = _Place(out, config, stage)
    place.prepare()
    skipped = {}
    for run in [one for one in runs if not finished(out, one)]:
        why = place.make(run) if clock.fits(run, runs) else "budget"
        if why is not None:
            skipped[run.name] = run, why
    # Another call may have made some meanwhile.
    left = [(run, why) for run, why in skipped.values() if not finished(out, run)]
    return tuple(SkippedRun(cell=run.cell.name, seed=run.seed, why=why) for run, why in left)


class _Clock:
    """What still fits into a budget, by how long finished runs took."""

    def __init__(self, out: Path, deadline: float | None) -> None:
        self._out, self._deadline = out, deadline

    def fits(self, run: Run, runs: Sequence[Run]) -> bool:
        """Whether a run will probably end in time; what nothing is known of, is begun while there is time."""
        if self._deadline is None:
            return True
        left = self._deadline - time.monotonic()
        known = [read_result(self._out, one) for one in runs if finished(self._out, one)]
        same = [one.wall_seconds for one in known if one.cell == run.cell.name]
        some = same or [one.wall_seconds for one in known]
        return left > (sum(some) / len(some) if some else 0.0)


class _Place:
    """The folder of a study, and what its runs read."""

    def __init__(self, out: Path, config: StudyConfig, stage: Stage) -> None:
        self.out, self._config, self._stage = out, config, stage
        self._opened: dict[str, list[Shard]] = {}

    def lock(self, name: str) -> FileLock:
        """Held by whoever makes something."""
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Make something that another call may be making: then it is waited for, and said so."""
        lock = self.lock(name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waited = self._stage(f"wait for another call ({name})", 1)
            lock.acquire()
            waited(1)
        try:
            yield
        finally:
            lock.release()

    @property
    def teacher(self) -> str:
        """The teacher's name or folder."""
        return self._config.teacher or str(self.out / "teacher")

    def prepare(self) -> None:
        """Shards, teacher, and what the teacher answers; each is made once."""
        config, out = self._config, self.out
        with self.alone("prepare"):
            shards = self._shards("train", lambda: source_of(config, "train"))
            test = self._shards("test", lambda: source_of(config, "test"))
            if config.teach is not None and not (out / "teacher" / "README.md").is_file():
                done = self._stage("teacher", config.teach.steps)
                begun = (out / "teacher").exists()
                if begun and not _has_checkpoint(out / "teacher" / "training"):
                    shutil.rmtree(out / "teacher")
                    begun = False
                train_teacher(
                    shards,
                    out / "teacher",
                    config.teach,
                    init=config.teach_init,
                    resume=begun,
                    source=f"testbed {config.testbed} of a study",
                    progress=_steps(done),
                )
            if not has_answers(out, QUESTIONS):
                write_questions(out, _questions(test))
            if not has_answers(out, TEACHER_ANSWERS):
                write_correct(out, TEACHER_ANSWERS, _answers(load_subject(self.teacher), test))

    def make(self, run: Run) -> str | None:
        """Make a run, unless another process has it or has made it; why it was not made."""
        shards = self._part(run.cell, bare=run.cell.targets != "none")
        if len(PairTable.of(shards)) < self._config.train.batch_size:
            return "fewer pairs than a batch"
        try:
            with self.lock(run.name).acquire(blocking=False):
                if not finished(self.out, run):
                    self._make(run, shards)
        except Timeout:
            return "another call has it"
        return None

    def _make(self, run: Run, shards: Sequence[Shard]) -> None:
        """Train and test one student; keep its answers and figures, and drop its weights."""
        cell, folder = run.cell, self.out / "runs" / run.name
        targets = self._targets(cell, shards)
        begin = time.perf_counter()
        settings = training(self._config.train, cell, run.seed)
        resume = _has_checkpoint(folder)
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        record = train(
            shards,
            targets,
            folder,
            settings,
            init=self.teacher if self._config.init == TEACHER else self._config.init,
            resume=resume,
            about={"shards": "train", "targets": cell.targets},
            progress=_steps(self._stage(run.name, settings.steps)),
        )
        correct = _answers(load_subject(str(folder)), self._opened["test"])
        kinds = _questions(self._opened["test"]).kind
        cache = targets.cache.manifest if isinstance(targets, CachedTargets) else None
        read = cache if settings.reads_records else None
        result = StudyResult(
            cell=cell.name,
            seed=run.seed,
            accuracy=float(correct.mean()),
            kinds={str(kind): float(correct[kinds == kind].mean()) for kind in np.unique(kinds)},
            bytes_a_pair=sum(unit.size for unit in read.units) / sum(unit.pairs for unit in read.units)
            if read
            else None,
            fingerprint=cache.fingerprint if cache else None,
            seconds=record.seconds,
            wall_seconds=round(time.perf_counter() - begin, 3),
            threads=torch.get_num_threads(),
            version=dde_cache.__version__,
            code=hash_code(),
            settings=settings.model_dump(mode="json"),
        )
        write_correct(self.out, run.name, correct)
        write_result(self.out, run.name, result)
        for kept in (CHECKPOINTS, "model"):
            shutil.rmtree(folder / kept, ignore_errors=True)

    def _shards(self, name: str, source: Callable[[], Source]) -> list[Shard]:
        if name not in self._opened:
            folder = self.out / "shards" / name
            if not folder.is_dir():
                found = source()
                import_samples(found, folder, progress=self._stage(f"{name} pictures", found.total or 0))
            self._opened[name] = open_shards(folder)
        return self._opened[name]

    def _part(self, cell: Cell, *, bare: bool) -> list[Shard]:
        """The training shards of a cell."""
        whole = self._opened["train"]
        if cell.pictures is None and cell.labelled is None:
            return whole
        shares = [f"{share:g}" if share is not None else "all" for share in (cell.pictures, cell.labelled)]
        name = f"pictures-{shares[0]}-labels-{shares[1]}{'' if bare else '-alone'}".replace(".", "-")
        with self.alone(name):
            return self._shards(name, lambda: part_source(whole, cell.pictures, cell.labelled, bare=bare))

    def _watched(self, shards: Sequence[Shard], cell: Cell, config: ExtractConfig) -> ExtractProgress:
        """Shows how an extraction goes on."""
        total, seen = len(PairTable.of(shards)) * config.shown, 0
        done = self._stage(f"extract for {cell.name}", total)

        def batch(size: int, _kept: float) -> None:
            nonlocal seen
            seen += size
            done(seen)

        return ExtractProgress(batch=batch)

    def _targets(self, cell: Cell, shards: Sequence[Shard]) -> Targets:
        """Where a cell's signals come from; what it needs of the teacher is extracted once."""
        if cell.targets == "none":
            return labels_only(self.teacher)
        if cell.targets == "online":
            teacher = FusionTeacher.load(self.teacher)
            return OnlineTargets(teacher, teacher.layers - 1)
        config = extraction(self._config.extract, cell)
        # Shards that differ in labels alone have the same pictures and texts, so one cache serves them.
        part = "" if cell.pictures is None else f"{cell.pictures:g} "
        name = hash_json(f"{part}{config.model_dump_json(exclude={'batch_size', 'workers', 'device'})}")[:16]
        folder = self.out / "caches" / name
        with self.alone(f"cache-{name}"):
            done = self.out / "caches" / f"{name}.json"
            if not (done.is_file() and (folder / MANIFEST).is_file()):
                found = extract(shards, self.teacher, folder, config, self._watched(shards, cell, config))
                write_bytes(done, (found.model_dump_json(indent=1) + "\n").encode())
        return CachedTargets(Cache(folder))


def _has_checkpoint(run: Path) -> bool:
    return (run / METRICS).is_file() and any(path.name.isdigit() for path in (run / CHECKPOINTS).glob("*"))


def _steps(done: Callable[[int], None]) -> Progress:
    return Progress(step=lambda number, _record: done(number))


def _questions(shards: Sequence[Shard]) -> Questions:
    """Picture and kind of every question that has an answer; permutations of one NLVR example count as one picture."""
    asked = [
        (str(sample.meta.get("example", sample.key)), text.kind or OTHER_KIND)
        for shard in shards
        for sample in shard
        for text in sample.texts
        if text.label is not None
    ]
    _, picture = np.unique([name for name, _ in asked], return_inverse=True)
    return Questions(picture, np.array([kind for _, kind in asked]))


def _answers(subject: Subject, shards: Sequence[Shard]) -> np.ndarray:
    """Which of these questions are answered right."""
    check_labels(shards, subject.labels, "the test shards")
    table = PairTable.of(shards)
    dataset = PairDataset(shards, table, subject.preprocessor, subject.labels, encode=subject.task.targets)
    found = subject.task.predict(subject.output_of, dataset)
    known = found.label != NO_LABEL
    return (found.answer == found.label)[known].numpy()
