"""Recipe: train a dual encoder on targets streamed from a cache; the teacher is never opened.

For comparison the same procedure trains on labels only, or with the teacher run online at every step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dde_cache import __version__
from dde_cache.batches import Batch, PairDataset, batch_loader, check_batch_size, to_device
from dde_cache.distill import StudentLosses, TrainConfig, student_output
from dde_cache.fit import Fit, FitResult, Progress
from dde_cache.initial import MODEL
from dde_cache.model_card import CARD, student_card
from dde_cache.prepare import Ready, TrainingPlan, exported, plan_training, ready_student
from dde_cache.ranks import Ranks
from dde_cache.replay import check_first_views, order_in_views
from dde_cache.runs import open_run, with_steps
from dde_cache.samples import Shard
from dde_cache.scores import Baselines
from dde_cache.sources import CachedTargets, OnlineTargets, Targets
from dde_cache.spec import Model, hash_json
from dde_cache.store import write_text
from dde_cache.stream import PairTable, Share
from dde_cache.student import DualEncoderOutput, Head
from dde_cache.tasks import load_task

RUN = "run.json"
BASELINES = "baselines.json"

Stage = Literal["pretrain", "finetune"]


class RunRecord(Model):
    """`run.json`: what a run was trained on, and how it ended."""

    version: str
    stage: Stage = "finetune"
    task: str = "classification"
    shards: str
    valid: str | None
    targets: str
    cache_fingerprint: str | None
    init: str | None
    preset: str | None
    labels: tuple[str, ...]
    steps: int
    best_accuracy: float | None
    best_step: int | None
    seconds: float
    wait_seconds: float


def train(
    shards: Sequence[Shard],
    targets: Targets,
    out: Path,
    config: TrainConfig,
    *,
    init: str | None = None,
    valid: Sequence[Shard] = (),
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
        resume: go on from the newest checkpoint in `out`.
        about: `shards`, `valid`, `targets`, `init`, `preset` in the user's words, for the record.
        progress: hooks to show what happens.

    Raises:
        InputError, CacheError, TeacherError, RunError: the parts do not fit each other; nothing was trained.
    """
    task = load_task(config.task)
    plan = plan_training(shards, valid, targets, config, task)
    torch.manual_seed(config.seed)
    ready = ready_student(plan, targets, config, init, Head(task.head, plan.images, config.task), shards)
    student = ready.student
    sides, full_text = 1 + config.remap_flips, config.queries == "all"
    table = plan.table.in_views(plan.views, sides)
    read = ready.reads, plan.labels, plan.reader
    dataset = PairDataset(
        shards, table, *read, full_text=full_text, encode=task.targets, recipe=plan.recipe, tokens=ready.tokens
    )
    check_batch_size(plan.table, config.batch_size)
    if isinstance(targets, CachedTargets):
        check_first_views(targets.cache, shards, plan.table, config, allow_drift=targets.allow_pixel_drift)
    held_out = PairDataset(valid, PairTable.of(valid), ready.preprocessor, plan.labels, encode=task.targets)
    config = with_steps(config, len(plan.table))
    ranks = Ranks()
    card = student_card(student, targets, config, shards, valid, init, ready.matched.notes)

    def begin() -> None:
        announce(ready, progress)
        open_run(out, config, resume=resume, inputs=inputs_of(shards, valid, plan, targets, init))
        write_text(out / BASELINES, Baselines.of(shards).model_dump_json(indent=1) + "\n")

    ranks.on_first(begin)

    def save(model: nn.Module) -> None:
        model.save_pretrained(out / MODEL, state_dict=exported(model))  # type: ignore[operator]
        ready.preprocessor.save(out / MODEL)
        write_text(out / MODEL / CARD, card)

    def loader(step: int, share: Share) -> Iterable[Batch]:
        order = order_in_views(plan.table, plan.views, config, step, config.steps, share, sides=sides)
        return batch_loader(dataset, order, config.workers)

    fit = Fit(
        student,
        StudentLosses(config, targets, plan.mean_heads, ready.matched.axes),
        config,
        out,
        validate=(lambda model: task.score(task.predict(output_of(model), held_out))) if valid else None,
        save_best=save,
        progress=progress,
    )
    if resume:
        fit.resume()
    result = fit(loader)
    record = record_of(result, plan.labels, targets, about or {}, config.task, "finetune")
    ranks.on_first(lambda: write_text(out / RUN, record.model_dump_json(indent=2) + "\n"))
    return record


def announce(ready: Ready, progress: Progress | None) -> None:
    """Say how a student stands to its teacher, where it is not token by token and head by head."""
    for note in ready.matched.notes if progress else ():
        progress.note(note)  # type: ignore[union-attr]


def inputs_of(
    shards: Sequence[Shard], valid: Sequence[Shard], plan: TrainingPlan, targets: Targets, init: str | None
) -> dict[str, str | int | None]:
    """What a resumed run must share with its beginning, beside the settings."""
    if isinstance(targets, CachedTargets):
        source = f"cache {targets.cache.manifest.fingerprint}"
    elif isinstance(targets, OnlineTargets):
        source = f"teacher {targets.teacher.weights_hash()}"
    else:
        source = "labels"
    names, held_out = (hash_json([shard.name for shard in some]) for some in (shards, valid))
    return {"targets": source, "init": init, "shards": names, "valid": held_out, "pairs": len(plan.table)}


def output_of(model: nn.Module) -> Callable[[Batch], DualEncoderOutput]:
    """A student as a function from batches to its output, in eval mode."""
    device = next(model.parameters()).device
    model.eval()

    def run(batch: Batch) -> DualEncoderOutput:
        return student_output(model, to_device(batch, device))

    return run


def record_of(
    result: FitResult,
    labels: Sequence[str],
    targets: Targets,
    about: Mapping[str, str | None],
    task: str,
    stage: Stage,
) -> RunRecord:
    """The record of a run that has ended; `about` as for `train`."""
    return RunRecord(
        version=__version__,
        stage=stage,
        task=task,
        shards=about.get("shards") or "",
        valid=about.get("valid"),
        targets=about.get("targets") or "",
        cache_fingerprint=targets.cache.manifest.fingerprint if isinstance(targets, CachedTargets) else None,
        init=about.get("init"),
        preset=about.get("preset"),
        labels=tuple(labels),
        steps=result.steps,
        best_accuracy=result.best_accuracy,
        best_step=result.best_step,
        seconds=round(result.seconds, 3),
        wait_seconds=round(result.wait_seconds, 3),
    )
