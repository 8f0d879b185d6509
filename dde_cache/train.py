"""Recipe: train a dual encoder on targets streamed from a cache; the teacher is never opened.

For comparison the same procedure trains on labels only, or with the teacher run online at every step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from dde_cache import __version__
from dde_cache.batches import Batch, PairDataset, batch_loader, check_batch_size, to_device
from dde_cache.distill import TrainConfig, student_output
from dde_cache.files import replaced_folder
from dde_cache.fit import Fit, FitResult, Progress
from dde_cache.initial import MODEL
from dde_cache.matching import Scores
from dde_cache.model_card import CARD, student_card
from dde_cache.prepare import TrainingPlan, likeness, plan_training
from dde_cache.ranking import RankingReader, check_ranking, with_ranking
from dde_cache.ranks import Ranks
from dde_cache.ready import Ready, exported, ready_student
from dde_cache.replay import check_first_views, order_in_views
from dde_cache.runs import open_run, with_steps
from dde_cache.samples import Shard
from dde_cache.scores import Baselines
from dde_cache.several import losses_of, source_of
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets, SeveralTargets, Targets, caches_of
from dde_cache.spec import Model, hash_json
from dde_cache.store import write_text
from dde_cache.stream import PairTable, Share
from dde_cache.student import DualEncoderOutput, Head
from dde_cache.tasks import load_task
from dde_cache.terms import Objective

RUN = "run.json"
BASELINES = "baselines.json"

Stage = Literal["pretrain", "finetune"]
USUAL: Stage = "finetune"


class RunRecord(Model):
    """`run.json`: what a run was trained on, and how it ended."""

    version: str
    stage: Stage = USUAL
    task: str = "classification"
    shards: str
    valid: str | None
    targets: str
    cache_fingerprint: str | None = Field(description="of several caches all, with commas; null without a cache")
    init: str | None
    preset: str | None
    labels: tuple[str, ...]
    steps: int
    best_accuracy: float | None
    best_step: int | None
    seconds: float
    wait_seconds: float
    mining_round: int = Field(default=0, ge=0, description="of the candidates that were learned from; 0: none")


def train(
    shards: Sequence[Shard],
    targets: Targets,
    out: Path,
    config: TrainConfig,
    *,
    init: str | None = None,
    valid: Sequence[Shard] = (),
    candidates: Scores | None = None,
    resume: bool = False,
    about: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> RunRecord:
    """Train a student and keep the best checkpoint in `out/model` (the last, without validation shards).

    Args:
        shards: training data.
        targets: where the teacher's signals come from.
        out: the run's folder.
        config: losses and fit.
        init: ViLT checkpoint that both towers start from, or a run whose parts are taken; None: random weights.
        valid: data that chooses the best checkpoint.
        candidates: mined ones, whose ranking by a teacher is learned.
        resume: go on from the newest checkpoint in `out`.
        about: `shards`, `valid`, `targets`, `init`, `preset` in the user's words, for the record.
        progress: hooks to show what happens.

    Raises:
        InputError, CacheError, TeacherError, RunError: the parts do not fit each other; nothing was trained.
    """
    task = load_task(config.task)
    plan = plan_training(shards, valid, targets, config, task)
    check_ranking(candidates, shards, targets, config, task, init)
    torch.manual_seed(config.seed)
    ready = ready_student(plan, targets, config, init, Head(task.head, plan.images, config.task), shards)
    student, reads = ready.student, ready.preprocessor
    others = None if candidates is None else RankingReader(candidates, shards, reads, config.ranking_top)
    dataset = PairDataset(
        shards,
        plan.table.in_views(plan.views, 1 + config.remap_flips),
        ready.reads,
        plan.labels,
        plan.reader,
        full_text=config.queries == "all",
        encode=task.targets,
        recipe=plan.recipe,
        others=others,
        tokens=ready.tokens,
        identities=task.head == "similarity",
    )
    held_out = PairDataset(valid, PairTable.of(valid), reads, plan.labels, encode=task.targets)
    course = Course(
        stage=USUAL,
        plan=plan,
        model=student,
        ready=ready,
        objective=with_ranking(losses_of(config, targets, plan.mean_heads, ready.matched.axes), config),
        dataset=dataset,
        score=lambda: task.score(task.predict(output_of(student), held_out)),
        candidates=candidates,
    )
    return follow(
        course, shards, targets, out, config, init=init, valid=valid, resume=resume, about=about, progress=progress
    )


@dataclass(frozen=True)
class Course:
    """What one stage of training does that the other does not.

    Attributes:
        stage: its name.
        plan: what is read.
        model: what is fitted: the student, or what holds it.
        ready: the student, which is saved, and how it stands to the teacher.
        objective: what is minimised.
        dataset: what a step reads, by the numbers of the plan's pairs in their views.
        score: figures of the student on held-out data.
        candidates: mined ones whose ranking is learned.
    """

    stage: Stage
    plan: TrainingPlan
    model: nn.Module
    ready: Ready
    objective: Objective[Any]
    dataset: PairDataset
    score: Callable[[], float | Mapping[str, float]]
    candidates: Scores | None = None


def follow(
    course: Course,
    shards: Sequence[Shard],
    targets: Targets,
    out: Path,
    config: TrainConfig,
    *,
    init: str | None,
    valid: Sequence[Shard],
    resume: bool,
    about: Mapping[str, str | None] | None,
    progress: Progress | None,
) -> RunRecord:
    """Begin a run or go on with it, fit, and keep its student; arguments as for `train`.

    Raises:
        InputError, CacheError, RunError: the data fill no batch, are drawn otherwise than the teacher saw them, or the
            run's folder is another's.
    """
    plan, ready, ranks = course.plan, course.ready, Ranks()
    check_batch_size(plan.table, config.batch_size)
    for one in caches_of(targets):
        check_first_views(one.cache, shards, plan.table, config, allow_drift=one.allow_pixel_drift)
    config = with_steps(config, len(plan.table))

    card = student_card(ready.student, targets, config, shards, valid, init, ready.matched.notes)

    def begin() -> None:
        for note in ready.matched.notes if progress else ():
            progress.note(note)  # type: ignore[union-attr]
        inputs = inputs_of(shards, valid, plan, targets, init)
        # Fine-tuning says nothing, so that runs of versions before there were stages go on.
        inputs |= {"stage": course.stage} if course.stage != USUAL else {}
        inputs |= {} if course.candidates is None else {"candidates": course.candidates.source}
        open_run(out, config, resume=resume, inputs=inputs)
        write_text(out / BASELINES, Baselines.of(shards).model_dump_json(indent=1) + "\n")

    ranks.on_first(begin)

    def save(_model: nn.Module) -> None:
        with replaced_folder(out / MODEL) as folder:
            ready.student.save_pretrained(folder, state_dict=exported(ready.student))
            ready.preprocessor.save(folder)
            write_text(folder / CARD, card)

    def loader(step: int, share: Share) -> Iterable[Batch]:
        sides = 1 + config.remap_flips
        order = order_in_views(plan.table, plan.views, config, step, config.steps, share, sides=sides)
        return batch_loader(course.dataset, order, config.workers)

    validate = (lambda _model: course.score()) if valid else None
    fit = Fit(course.model, course.objective, config, out, validate=validate, save_best=save, progress=progress)
    if resume:
        fit.resume()
    record = record_of(fit(loader), course, targets, about or {}, config.task)
    ranks.on_first(lambda: write_text(out / RUN, record.model_dump_json(indent=2) + "\n"))
    return record


def inputs_of(
    shards: Sequence[Shard], valid: Sequence[Shard], plan: TrainingPlan, targets: Targets, init: str | None
) -> dict[str, str | int | None]:
    """What a resumed run must share with its beginning, beside the settings."""
    if isinstance(targets, CachedTargets):
        source = f"cache {targets.cache.manifest.fingerprint}"
    elif isinstance(targets, SeveralTargets):
        source = source_of(targets)
    elif isinstance(targets, OnlineTargets):
        source = f"teacher {targets.teacher.weights_hash()}"
    else:
        source = "labels"
    names, held_out = (hash_json([shard.name for shard in some]) for some in (shards, valid))
    inputs = {"targets": source, "init": init, "shards": names, "valid": held_out, "pairs": len(plan.table)}
    return inputs | ({"like": likeness(targets)} if isinstance(targets, LabelsOnly) else {})


def output_of(model: nn.Module) -> Callable[[Batch], DualEncoderOutput]:
    """A student as a function from batches to its output, in eval mode."""
    device = next(model.parameters()).device
    model.eval()

    def run(batch: Batch) -> DualEncoderOutput:
        return student_output(model, to_device(batch, device))

    return run


def record_of(
    result: FitResult, course: Course, targets: Targets, about: Mapping[str, str | None], task: str
) -> RunRecord:
    """The record of a run that has ended; `about` as for `train`."""
    return RunRecord(
        version=__version__,
        stage=course.stage,
        task=task,
        shards=about.get("shards") or "",
        valid=about.get("valid"),
        targets=about.get("targets") or "",
        cache_fingerprint=", ".join(one.cache.manifest.fingerprint for one in caches_of(targets)) or None,
        init=about.get("init"),
        preset=about.get("preset"),
        labels=tuple(course.plan.labels),
        steps=result.steps,
        best_accuracy=result.best_accuracy,
        best_step=result.best_step,
        seconds=round(result.seconds, 3),
        wait_seconds=round(result.wait_seconds, 3),
        mining_round=0 if course.candidates is None else course.candidates.index.round,
    )
