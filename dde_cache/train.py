"""Recipe: train a dual encoder on targets streamed from a cache; the teacher is never opened.

For comparison the same procedure trains on labels only, or with the teacher run online at every step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache import __version__
from dde_cache.batches import Batch, PairDataset, batch_loader, check_batch_size, check_labels, to_device
from dde_cache.distill import (
    CachedTargets,
    LabelsOnly,
    OnlineTargets,
    StudentLosses,
    Targets,
    TrainConfig,
    student_output,
)
from dde_cache.errors import CacheError, InputError, TeacherError, bullet_list
from dde_cache.fit import Fit, FitResult, Progress
from dde_cache.join import join
from dde_cache.preprocess import Preprocessor
from dde_cache.ranks import Ranks
from dde_cache.runs import open_run, with_steps
from dde_cache.samples import Shard
from dde_cache.scores import Baselines, accuracy, predict
from dde_cache.spec import Model, hash_json
from dde_cache.store import MANIFEST, Cache, write_text
from dde_cache.stream import BatchOrder, PairTable, Share
from dde_cache.student import DualEncoder, new_student, student_from_vilt
from dde_cache.targets import CacheTargets
from dde_cache.teacher import read_config, resolve

MODEL = "model"
RUN = "run.json"
BASELINES = "baselines.json"


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dide": {
        "learning_rate": 1e-4,
        "batch_size": 256,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "dropout": 0.1,
        "hard_weight": 0.0,
        "soft_weight": 1.0,
        "attention_weight": 1.0,
        "queries": "all",
        "tail": "bucket",
    }
}
"""Published recipes. `dide`: arXiv 2112.08723, VQAv2 and SNLI-VE columns (NLVR2: batch 128)."""


class RunRecord(Model):
    """`run.json`: what a run was trained on, and how it ended."""

    version: str
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


def labels_only(like: str | Cache) -> LabelsOnly:
    """Take processor, answers and tower shape from a cache or from a teacher, whose weights are not opened.

    Raises:
        CacheError, TeacherError: `like` is neither, or has no task head.
    """
    if isinstance(like, Cache) or (Path(like) / MANIFEST).is_file():
        cache = like if isinstance(like, Cache) else Cache(Path(like))
        tower, labels, preprocessor = (
            tower_of(cache),
            cache.labels,
            cache.preprocessor(),
        )
    else:
        tower = read_config(resolve(like))
        labels = tuple(tower.id2label[number] for number in range(tower.num_labels))
        preprocessor = Preprocessor.load(resolve(like), tower.patch_size, tower.max_position_embeddings)
    if labels is None:
        raise CacheError(
            f"{like.name if isinstance(like, Cache) else like}: expected a teacher with a task head, for its answers"
        )
    return LabelsOnly(preprocessor, tower, labels)


def tower_of(cache: Cache) -> ViltConfig:
    """The shape of the teacher's towers, which a new student takes over.

    Raises:
        CacheError: the configuration in the cache's assets is none that the model library takes.
    """
    try:
        return ViltConfig.from_dict(dict(cache.teacher_config))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CacheError(f"{cache.folder}: the teacher's configuration cannot be used: {first}") from error


@dataclass(frozen=True)
class _Plan:
    """What a run needs, whatever its targets come from."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]
    table: PairTable
    reader: CacheTargets | None
    mean_heads: bool


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
        init: ViLT checkpoint that both towers start from; None: random weights.
        valid: data that chooses the best checkpoint.
        resume: go on from the newest checkpoint in `out`.
        about: `shards`, `valid`, `targets`, `init`, `preset` in the user's words, for the record.
        progress: hooks to show what happens.

    Raises:
        InputError, CacheError, TeacherError, RunError: the parts do not fit each other; nothing was trained.
    """
    plan = _plan(shards, targets, config)
    _check_pictures(shards, valid)
    for name, some in (("training shards", shards), ("validation shards", valid)):
        check_labels(some, plan.labels, name)
    torch.manual_seed(config.seed)
    student = build_student(plan.tower, plan.labels, config, init)
    if config.attention_weight and not isinstance(targets, LabelsOnly):
        _check_heads(student, targets, plan)
    dataset = PairDataset(
        shards, plan.table, plan.preprocessor, plan.labels, plan.reader, full_text=config.queries == "all"
    )
    check_batch_size(plan.table, config.batch_size)
    held_out = PairDataset(valid, PairTable.of(valid), plan.preprocessor, plan.labels)
    config = with_steps(config, len(plan.table))
    ranks = Ranks()

    def begin() -> None:
        open_run(out, config, resume=resume, inputs=_inputs(shards, plan, targets, init))
        write_text(out / BASELINES, Baselines.of(shards).model_dump_json(indent=1) + "\n")

    ranks.on_first(begin)

    def save(model: nn.Module) -> None:
        model.save_pretrained(out / MODEL)  # type: ignore[operator]
        plan.preprocessor.save(out / MODEL)

    def loader(step: int, share: Share) -> Iterable[Batch]:
        order = BatchOrder(plan.table, config.shuffle(), config.batch_size, step, config.steps, share)
        return batch_loader(dataset, order, config.workers)

    fit = Fit(
        student,
        StudentLosses(config, targets, plan.mean_heads),
        config,
        out,
        validate=(lambda model: accuracy(predict(logits_of(model), held_out))) if valid else None,
        save_best=save,
        progress=progress,
    )
    if resume:
        fit.resume()
    result = fit(loader)
    record = _record(result, plan.labels, targets, about or {})
    ranks.on_first(lambda: write_text(out / RUN, record.model_dump_json(indent=2) + "\n"))
    return record


def _inputs(shards: Sequence[Shard], plan: _Plan, targets: Targets, init: str | None) -> dict[str, str | int | None]:
    """What a resumed run must share with its beginning, beside the settings."""
    if isinstance(targets, CachedTargets):
        source = f"cache {targets.cache.manifest.fingerprint}"
    elif isinstance(targets, OnlineTargets):
        source = f"teacher {targets.teacher.weights_hash()}"
    else:
        source = "labels"
    names = hash_json([shard.name for shard in shards])
    return {"targets": source, "init": init, "shards": names, "pairs": len(plan.table)}


def logits_of(model: nn.Module) -> Callable[[Batch], Float[Tensor, "b c"]]:
    """A student as a function from batches to logits, in eval mode."""
    device = next(model.parameters()).device
    model.eval()

    def run(batch: Batch) -> Float[Tensor, "b c"]:
        return student_output(model, to_device(batch, device)).logits

    return run


def build_student(tower: ViltConfig, labels: Sequence[str], config: TrainConfig, init: str | None) -> DualEncoder:
    """A new student, with towers from `init` or random.

    Raises:
        TeacherError: `init` is no ViLT, or its towers would read other tokens or patches than the teacher.
    """
    if init is None:
        return new_student(tower, labels, config.dropout)
    student = student_from_vilt(init, labels, config.dropout)
    shape = student.config.vilt()
    wrong = [
        f"{name}: expected {getattr(tower, name)}, got {getattr(shape, name)}"
        for name in ("patch_size", "vocab_size")
        if getattr(shape, name) != getattr(tower, name)
    ]
    if shape.max_position_embeddings < tower.max_position_embeddings:
        wrong.append(f"text length: expected {tower.max_position_embeddings}, got {shape.max_position_embeddings}")
    if wrong:
        raise TeacherError(f"{init}: its towers do not read what the teacher read:{bullet_list(wrong)}")
    return student


def _plan(shards: Sequence[Shard], targets: Targets, config: TrainConfig) -> _Plan:
    """Settle what to read, and refuse what the targets do not have.

    Raises:
        CacheError: the cache lacks rows, layers, logits or samples that the configuration asks for.
        TeacherError: the online teacher has no task head.
    """
    if isinstance(targets, LabelsOnly):
        table = PairTable.of(shards)
        return _Plan(targets.preprocessor, targets.tower, targets.labels, table, None, False)
    if isinstance(targets, OnlineTargets):
        teacher = targets.teacher
        if teacher.labels is None:
            raise TeacherError("expected an online teacher with a task head, whose answers the student learns")
        return _Plan(teacher.preprocessor, teacher.config, teacher.labels, PairTable.of(shards), None, False)
    cache, spec = targets.cache, targets.cache.spec
    lacking = []
    layer = config.layer if config.layer is not None else spec.layers[-1] if spec.layers else 0
    if config.attention_weight and not spec.layers:
        lacking.append("attention maps: it keeps predictions alone; train with --set attention_weight=0")
    elif config.attention_weight and layer not in spec.layers:
        lacking.append(f"layer {layer}: it has {list(spec.layers)}")
    if config.attention_weight and config.queries == "all" and spec.queries != "all":
        lacking.append("padded query rows (queries all): extract with --queries all, or train with --queries valid")
    if config.soft_weight and spec.classes is None:
        lacking.append("logits: its teacher has no task head, or they were cut away; train with --set soft_weight=0")
    if cache.labels is None:
        lacking.append("the answers that the student's head should have")
    if lacking or cache.labels is None:
        raise CacheError(f"{cache.name}: this training needs what the cache does not have:{bullet_list(lacking)}")
    reader = None
    table = join(shards, cache, targets.on_missing).table
    if config.attention_weight or config.soft_weight:
        reader = CacheTargets(
            cache, shards, layer, attention=config.attention_weight > 0, padded_queries=config.queries == "all"
        )
    tower = tower_of(cache)
    return _Plan(cache.preprocessor(), tower, cache.labels, table, reader, spec.heads == "mean")


def _check_pictures(shards: Sequence[Shard], valid: Sequence[Shard]) -> None:
    """Refuse samples with two images: this student's head reads one."""
    for shard in (*shards, *valid):
        images = len(shard.read(shard.keys[0]).images)
        if images != 1:
            raise InputError(f"{shard.path}: expected samples with one image, got {images}; this student reads one")


def _check_heads(student: DualEncoder, targets: Targets, plan: _Plan) -> None:
    """Refuse towers whose heads cannot be compared with the teacher's one by one."""
    have = student.config.vilt().num_attention_heads
    cached = isinstance(targets, CachedTargets)
    want = targets.cache.spec.teacher_heads if cached else plan.tower.num_attention_heads  # type: ignore[union-attr]
    if not plan.mean_heads and have != want:
        raise TeacherError(
            f"expected a student with the teacher's {want} attention heads, got {have}; extract with --heads mean to "
            "compare their averages"
        )


def lacking_of_preset(preset: str, targets: Targets, init: str | None) -> list[str]:
    """What keeps a run from following a published recipe to the letter, in words.

    Raises:
        InputError: the recipe needs `--init`.
    """
    if preset not in PRESETS:
        raise InputError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}")
    if init is None:
        raise InputError("the dide recipe starts both towers from a ViLT checkpoint: pass --init CHECKPOINT")
    lacking = ["random augmentation (RandAugment): the targets hold one view of each sample"]
    if isinstance(targets, CachedTargets) and (targets.cache.spec.k, targets.cache.spec.mass) != (None, None):
        lacking.append(f"whole attention rows: the cache keeps {targets.cache.spec.kept} and the tail mass")
    return lacking


def _record(result: FitResult, labels: Sequence[str], targets: Targets, about: Mapping[str, str | None]) -> RunRecord:
    return RunRecord(
        version=__version__,
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
