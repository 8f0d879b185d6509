"""Recipe: train a dual encoder on targets streamed from a cache; the teacher is never opened.

For comparison the same procedure trains on labels only, or with the teacher run online at every step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache import __version__
from dde_cache.attention import SparseAttention, sparsify
from dde_cache.batches import Batch, PairDataset, batch_loader, check_labels, pictures_of, to_device, tokens_of
from dde_cache.errors import CacheError, InputError, TeacherError, bullet_list
from dde_cache.fit import Fit, FitConfig, FitResult, Losses, Progress, open_run
from dde_cache.losses import Tail, label_loss, log_attention, soft_label_loss, sparse_kl, weighted_mean
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Shard
from dde_cache.scores import Baselines, accuracy, predict
from dde_cache.spec import Model
from dde_cache.store import MANIFEST, Cache, write_text
from dde_cache.stream import BatchOrder, PairTable
from dde_cache.student import DualEncoder, DualEncoderOutput, new_student, student_from_vilt
from dde_cache.targets import CacheTargets, OnMissing, decoded, join
from dde_cache.teacher import FusionTeacher, read_config, resolve

MODEL = "model"
RUN = "run.json"
BASELINES = "baselines.json"


class TrainConfig(FitConfig):
    """How a student is trained. A weight of 0 leaves a loss out, and its targets are then not read."""

    attention_weight: float = Field(default=1.0, ge=0)
    soft_weight: float = Field(default=1.0, ge=0)
    hard_weight: float = Field(default=0.0, ge=0)
    tail: Tail = "bucket"
    queries: Literal["valid", "all"] = Field(
        default="valid",
        description="query rows in the mean of the attention loss: valid ones, or padding too (published)",
    )
    layer: int | None = Field(default=None, ge=0, description="the cache's layer to learn from; null: its last")
    dropout: float = Field(default=0.0, ge=0, lt=1)


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


@dataclass(frozen=True)
class LabelsOnly:
    """No teacher: processor, labels and tower shape come from a cache's assets or from a checkpoint."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]


def labels_only(like: str) -> LabelsOnly:
    """Take processor, answers and tower shape from a cache or from a teacher, whose weights are not opened.

    Raises:
        CacheError, TeacherError: `like` is neither, or has no task head.
    """
    if (Path(like) / MANIFEST).is_file():
        cache = Cache(Path(like))
        tower, labels, preprocessor = (
            ViltConfig.from_dict(dict(cache.teacher_config)),
            cache.labels,
            cache.preprocessor(),
        )
    else:
        tower = read_config(resolve(like))
        labels = tuple(tower.id2label[number] for number in range(tower.num_labels))
        preprocessor = Preprocessor.load(resolve(like), tower.patch_size, tower.max_position_embeddings)
    if labels is None:
        raise CacheError(f"{like}: expected a teacher with a task head, for its answers")
    return LabelsOnly(preprocessor, tower, labels)


@dataclass(frozen=True)
class CachedTargets:
    """Stream the targets from a cache."""

    cache: Cache
    on_missing: OnMissing = "error"


@dataclass(frozen=True)
class OnlineTargets:
    """Run a teacher at every step, for comparison; `layer` counts from 0."""

    teacher: FusionTeacher
    layer: int


Targets = LabelsOnly | CachedTargets | OnlineTargets


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
    if len(plan.table) < config.batch_size:
        raise InputError(
            f"expected at least one batch of {config.batch_size} pairs, got {len(plan.table)} pairs; lower --batch-size"
        )
    held_out = PairDataset(valid, PairTable.of(valid), plan.preprocessor, plan.labels)
    open_run(out, config, resume=resume)
    baselines = Baselines.of(shards)
    write_text(out / BASELINES, baselines.model_dump_json(indent=1) + "\n")

    def save(model: nn.Module) -> None:
        model.save_pretrained(out / MODEL)  # type: ignore[operator]
        plan.preprocessor.processor.save_pretrained(out / MODEL)

    def loader(step: int) -> Iterable[Batch]:
        order = BatchOrder(plan.table, config.shuffle(), config.batch_size, step, config.steps)
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
    write_text(out / RUN, record.model_dump_json(indent=2) + "\n")
    return record


def logits_of(model: nn.Module) -> Callable[[Batch], Float[Tensor, "b c"]]:
    """A student as a function from batches to logits, in eval mode."""
    device = next(model.parameters()).device
    model.eval()

    def run(batch: Batch) -> Float[Tensor, "b c"]:
        return student_output(model, to_device(batch, device)).logits

    return run


def student_output(model: nn.Module, batch: Batch) -> DualEncoderOutput:
    """Run a student on a batch of samples with one image."""
    return model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])


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


class StudentLosses:
    """The terms of a batch: `attention` (with its two directions), `soft`, `hard`, and their weighted sum `loss`."""

    def __init__(self, config: TrainConfig, targets: Targets, mean_heads: bool) -> None:
        self._config, self._targets, self._mean_heads = config, targets, mean_heads

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the student and compare."""
        config = self._config
        output = student_output(model, batch)
        terms: dict[str, Tensor] = {}
        total = output.logits.new_zeros((), dtype=torch.float32)
        if isinstance(self._targets, LabelsOnly):
            terms["hard"] = label_loss(output.logits, batch["label"])
            return {"loss": terms["hard"], **terms}
        if isinstance(self._targets, OnlineTargets):
            taught = online_targets(self._targets, batch, config)
            maps, logits = (taught.t2i, taught.i2t) if config.attention_weight else None, taught.logits
        else:
            maps = (decoded(batch, "t2i"), decoded(batch, "i2t")) if config.attention_weight else None
            logits = batch.get("target.logits")
        if maps is not None:
            t2i, i2t = attention_losses(output, *maps, batch, config, mean_heads=self._mean_heads)
            terms |= {"t2i": t2i, "i2t": i2t}
            total = total + config.attention_weight * (t2i + i2t)
        if config.soft_weight and logits is not None:
            terms["soft"] = soft_label_loss(output.logits, logits)
            total = total + config.soft_weight * terms["soft"]
        if config.hard_weight:
            terms["hard"] = label_loss(output.logits, batch["label"])
            total = total + config.hard_weight * terms["hard"]
        return {"loss": total, **terms}


def attention_losses(
    output: DualEncoderOutput,
    t2i: SparseAttention,
    i2t: SparseAttention,
    batch: Batch,
    config: TrainConfig,
    *,
    mean_heads: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-modal attention loss of both directions: mean over heads and query rows of the batch (DiDE, L_attn).

    With queries `all`, every padded row counts, as published: padded text rows one by one; padded image rows of a
    sample are all alike, so the one that the teacher stored, behind its last valid row, stands for each of them.
    """
    text, image = output.text, output.image
    every = config.queries == "all"
    log_t2i = log_attention(text.query_key.query, image.query_key.key, image.mask, mean_heads=mean_heads)
    log_i2t = log_attention(image.query_key.query, text.query_key.key, text.mask, mean_heads=mean_heads)
    text_rows = torch.ones_like(text.mask) if every else text.mask
    image_rows = torch.ones_like(image.mask) if every else image.mask
    if every:
        position = torch.arange(image.mask.shape[1], device=image.mask.device)[None]
        i2t = i2t.rows(torch.minimum(position, image.mask.sum(-1, keepdim=True)))
    return (
        weighted_mean(sparse_kl(t2i, log_t2i, image.mask, config.tail), text_rows.float()),
        weighted_mean(sparse_kl(i2t, log_i2t, text.mask, config.tail), image_rows.float()),
    )


@dataclass(frozen=True)
class _Taught:
    t2i: SparseAttention
    i2t: SparseAttention
    logits: Float[Tensor, "b c"] | None


def online_targets(targets: OnlineTargets, batch: Batch, config: TrainConfig) -> _Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one."""
    output = targets.teacher(
        tokens_of(batch), pictures_of(batch), [targets.layer], padded_queries=config.queries == "all"
    )
    maps = output.attention[0, targets.layer]
    # The padded image token that a teacher needs for its query row is no key of the student's.
    return _Taught(sparsify(maps.t2i, None), sparsify(maps.i2t, None), output.logits)


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
    layer = spec.layers[-1] if config.layer is None else config.layer
    if config.attention_weight and layer not in spec.layers:
        lacking.append(f"layer {layer}: it has {list(spec.layers)}")
    if config.attention_weight and config.queries == "all" and spec.queries != "all":
        lacking.append("padded query rows (queries all): extract with --queries all, or train with --queries valid")
    if config.soft_weight and spec.classes is None:
        lacking.append("logits: its teacher has no task head; train with --set soft_weight=0")
    if cache.labels is None:
        lacking.append("the answers that the student's head should have")
    if lacking or cache.labels is None:
        raise CacheError(f"{cache.folder}: this training needs what the cache does not have:{bullet_list(lacking)}")
    reader = None
    table = join(shards, cache, targets.on_missing).table
    if config.attention_weight or config.soft_weight:
        reader = CacheTargets(
            cache, shards, layer, attention=config.attention_weight > 0, padded_queries=config.queries == "all"
        )
    tower = ViltConfig.from_dict(dict(cache.teacher_config))
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
    if isinstance(targets, CachedTargets) and targets.cache.spec.k is not None:
        lacking.append(
            f"whole attention rows: the cache keeps the {targets.cache.spec.k} strongest keys and the tail mass"
        )
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
