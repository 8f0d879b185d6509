"""Recipe: score a trained run or a teacher on shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dde_cache.batches import Batch, PairDataset, check_labels, pictures_of, to_device, tokens_of, torch_device
from dde_cache.errors import CacheError, InputError, RunError, first_line
from dde_cache.initial import MODEL, load_student
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Shard
from dde_cache.scores import Baselines, EvaluationReport
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.student import DualEncoderOutput
from dde_cache.targets import teacher_logits
from dde_cache.tasks import Task, is_own, load_task
from dde_cache.teacher import FusionTeacher
from dde_cache.train import BASELINES, RUN, output_of


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a function from batches to outputs, its task, processor, answers, and its run's baselines."""

    name: str
    task: Task
    output_of: Callable[[Batch], DualEncoderOutput]
    preprocessor: Preprocessor
    labels: tuple[str, ...]
    baselines: Baselines | None


def load_subject(name: str, device: str = "cpu", task: str | None = None) -> Subject:
    """Load a run of `dde-cache train`, or a teacher (folder, hub id, or `sample`).

    A run knows its task, a teacher does not: without `task` it classifies. A task of the user's own must be named,
    because a run's files may be a stranger's: what they name is never imported.

    Raises:
        RunError: a run that was cut short or damaged, or of another task.
        TeacherError: no teacher that can be read.
        InputError: a teacher without a task head; or no such task.
    """
    torch_device(device)
    run = Path(name)
    if (run / MODEL).is_dir() or (run / RUN).is_file() or (run / BASELINES).is_file():
        return _load_run(run, device, task)
    chosen = load_task(task or "classification")
    if chosen.head == "similarity":
        raise InputError(f"task {task} ranks by the vectors of a dual encoder: evaluate a run, not a teacher")
    teacher = FusionTeacher.load(name, device=device)
    if teacher.labels is None:
        raise InputError(f"{name}: expected a teacher with a task head to evaluate, got none")

    def run_teacher(batch: Batch) -> DualEncoderOutput:
        moved = to_device(batch, torch.device(device))
        return DualEncoderOutput(logits=teacher(tokens_of(moved), pictures_of(moved), ()).logits)

    chosen.check_answers(teacher.labels)
    return Subject(name, chosen, run_teacher, teacher.preprocessor, teacher.labels, None)


def _load_run(run: Path, device: str, task: str | None) -> Subject:
    student, preprocessor = load_student(run)
    try:
        baselines = Baselines.model_validate_json((run / BASELINES).read_text())
    except (OSError, ValueError, ValidationError) as error:
        raise RunError(
            f"{run / BASELINES}: expected what a run keeps of its training labels, but it cannot be read "
            f"({first_line(error)}); go on with `dde-cache train ... --resume`"
        ) from error
    labels = tuple(student.config.id2label[number] for number in range(student.config.num_labels))
    trained = str(student.config.task)
    if task is None and is_own(trained):
        raise RunError(f"{run}: trained for a task of its own, {trained}; pass --task {trained} to run that code")
    if task is not None and task != trained:
        raise RunError(f"{run}: expected --task {trained}, for which it was trained, got {task}")
    return Subject(str(run), load_task(trained), output_of(student.to(device)), preprocessor, labels, baselines)


def evaluate(
    subject: Subject,
    shards: Sequence[Shard],
    *,
    cache: Cache | None = None,
    baseline_shards: Sequence[Shard] = (),
    batch_size: int = 256,
    advance: Callable[[int], None] = lambda pairs: None,
) -> EvaluationReport:
    """Score a subject on shards.

    Args:
        subject: what is evaluated.
        shards: labelled data.
        cache: the teacher's logits on these shards, for the agreement with the teacher.
        baseline_shards: training data of the baselines, for a teacher; a run keeps its own.
        batch_size: pairs a forward pass.
        advance: called with the number of pairs done.

    Raises:
        InputError: labels that the subject does not know, or none at all.
        CacheError: a cache without logits, with other answers, or of other samples.
    """
    taught: Mapping[tuple[str, int], Tensor] | None = None
    if cache is not None:
        if cache.labels != subject.labels:
            raise CacheError(f"{cache.name}: expected the answers {subject.labels[:5]}, got {(cache.labels or ())[:5]}")
        taught = teacher_logits(cache, shards)
    predictions = predictions_of(subject, shards, batch_size, advance)
    baselines = Baselines.of(baseline_shards) if baseline_shards else subject.baselines
    return subject.task.report(predictions, shards, subject.labels, baselines, taught)


def predictions_of(
    subject: Subject,
    shards: Sequence[Shard],
    batch_size: int = 256,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Any:
    """Run a subject over every pair of some shards; what comes back is what its task reports on.

    Raises:
        InputError: labels that the subject does not know.
    """
    task = subject.task
    if task.closed:
        check_labels(shards, subject.labels, "the shards")
    dataset = PairDataset(shards, PairTable.of(shards), subject.preprocessor, subject.labels, encode=task.targets)
    return task.predict(subject.output_of, dataset, batch_size, advance=advance)
