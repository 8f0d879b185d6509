"""Recipe: train a dual encoder on targets streamed from a cache; the teacher is never opened.

For comparison the same procedure trains on labels only, or with the teacher run online at every step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
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
from dde_cache.replay import check_first_views, order_in_views
from dde_cache.runs import open_run
from dde_cache.samples import Shard
from dde_cache.scores import Baselines
from dde_cache.spec import Model, hash_json
from dde_cache.store import MANIFEST, Cache, write_text
from dde_cache.stream import PairTable
from dde_cache.student import DualEncoder, DualEncoderOutput, Head, new_student, student_from_vilt
from dde_cache.targets import CacheTargets
from dde_cache.tasks import Task, load_task
from dde_cache.teacher import read_config, resolve
from dde_cache.views import ViewRecipe, parse_recipe

MODEL = "model"
RUN = "run.json"
BASELINES = "baselines.json"


class RunRecord(Model):
    """`run.json`: what a run was trained on, and how it ended."""

    version: str
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


def labels_only(like: str | Cache) -> LabelsOnly:
    """Take processor, answers and tower shape from a cache or from a teacher, whose weights are not opened.

    Raises:
        CacheError, TeacherError: `like` is neither.
    """
    if isinstance(like, Cache) or (Path(like) / MANIFEST).is_file():
        cache = like if isinstance(like, Cache) else Cache(Path(like))
        tower, labels, preprocessor = tower_of(cache), cache.labels, cache.preprocessor()
    else:
        tower = read_config(resolve(like))
        # What has no task head has the library's LABEL_0 and LABEL_1 for answers; only retrieval takes it.
        labels = tuple(tower.id2label[number] for number in range(tower.num_labels))
        preprocessor = Preprocessor.load(resolve(like), tower.patch_size, tower.max_position_embeddings)
    return LabelsOnly(preprocessor, tower, labels or ())


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
    recipe: ViewRecipe | None = None
    views: int = 1


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
    task = load_task(config.task)
    if config.remap_flips and not isinstance(targets, CachedTargets):
        raise InputError("expected remap_flips with targets of a cache, whose maps it mirrors; leave it out")
    plan = _plan(shards, targets, config, task)
    images = _count_pictures(shards, valid, task, targets)
    if config.remap_flips and images > 1:
        raise InputError("expected remap_flips with samples of one image, got two; leave it out")
    for name, some in (("training shards", shards), ("validation shards", valid)):
        if task.closed:
            check_labels(some, plan.labels, name)
    torch.manual_seed(config.seed)
    student = build_student(plan.tower, plan.labels, config, init, Head(task.head, images, config.task))
    if config.attention_weight and not isinstance(targets, LabelsOnly):
        _check_heads(student, targets, plan)
    sides, full_text = 1 + config.remap_flips, config.queries == "all"
    table = plan.table.in_views(plan.views, sides)
    read = plan.preprocessor, plan.labels
    dataset = PairDataset(
        shards, table, *read, plan.reader, full_text=full_text, encode=task.targets, recipe=plan.recipe
    )
    check_batch_size(plan.table, config.batch_size)
    if isinstance(targets, CachedTargets):
        check_first_views(targets.cache, shards, plan.table, config, allow_drift=targets.allow_pixel_drift)
    held_out = PairDataset(valid, PairTable.of(valid), *read, encode=task.targets)
    open_run(out, config, resume=resume, inputs=_inputs(shards, plan, targets, init))
    baselines = Baselines.of(shards)
    write_text(out / BASELINES, baselines.model_dump_json(indent=1) + "\n")

    def save(model: nn.Module) -> None:
        model.save_pretrained(out / MODEL)  # type: ignore[operator]
        plan.preprocessor.save(out / MODEL)

    def loader(step: int) -> Iterable[Batch]:
        order = order_in_views(plan.table, plan.views, config, step, config.steps, sides)
        return batch_loader(dataset, order, config.workers)

    fit = Fit(
        student,
        StudentLosses(config, targets, plan.mean_heads),
        config,
        out,
        validate=(lambda model: task.score(task.predict(output_of(model), held_out))) if valid else None,
        save_best=save,
        progress=progress,
    )
    if resume:
        fit.resume()
    result = fit(loader)
    record = _record(result, plan.labels, targets, about or {}, config.task)
    write_text(out / RUN, record.model_dump_json(indent=2) + "\n")
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


def output_of(model: nn.Module) -> Callable[[Batch], DualEncoderOutput]:
    """A student as a function from batches to its output, in eval mode."""
    device = next(model.parameters()).device
    model.eval()

    def run(batch: Batch) -> DualEncoderOutput:
        return student_output(model, to_device(batch, device))

    return run


def build_student(
    tower: ViltConfig, labels: Sequence[str], config: TrainConfig, init: str | None, head: Head
) -> DualEncoder:
    """A new student, with towers from `init` or random.

    Raises:
        TeacherError: `init` is no ViLT, or its towers would read other tokens or patches than the teacher.
    """
    if init is None:
        return new_student(tower, labels, config.dropout, head)
    student = student_from_vilt(init, labels, config.dropout, head)
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


def _answers(labels: Sequence[str] | None, task: Task) -> tuple[str, ...]:
    """The answers that a student's head has: the teacher's, or none where the task has no classifier.

    Raises:
        InputError: the teacher's are not the task's.
        TeacherError: it has none.
    """
    if task.head == "similarity":
        return ()
    if not labels:
        raise TeacherError("expected a teacher with a task head, whose answers the student learns")
    task.check_answers(labels)
    return tuple(labels)


def _plan(shards: Sequence[Shard], targets: Targets, config: TrainConfig, task: Task) -> _Plan:
    """Settle what to read, and refuse what the targets do not have.

    Raises:
        CacheError: the cache lacks rows, layers, logits or samples that the configuration asks for.
        TeacherError: the teacher has no task head.
        InputError: its answers are not the task's, the task has no soft labels to give weight to, or the cache has
            views of a recipe that this version does not know.
    """
    if isinstance(targets, LabelsOnly):
        labels = _answers(targets.labels, task)
        return _Plan(targets.preprocessor, targets.tower, labels, PairTable.of(shards), None, False)
    if config.soft_weight and not task.soft:
        raise InputError(f"task {config.task} has no soft labels; train with --set soft_weight=0")
    if isinstance(targets, OnlineTargets):
        teacher = targets.teacher
        labels = _answers(teacher.labels, task)
        return _Plan(teacher.preprocessor, teacher.config, labels, PairTable.of(shards), None, False)
    cache, spec = targets.cache, targets.cache.spec
    lacking = []
    layer = config.layer if config.layer is not None else spec.layers[-1] if spec.layers else 0
    if config.attention_weight and not spec.layers:
        lacking.append("attention maps: it keeps predictions alone; train with --set attention_weight=0")
    elif config.attention_weight and len(spec.directions) < 2:
        lacking.append(f"both directions of attention: it has {spec.directions[0]} alone")
    elif config.attention_weight and layer not in spec.layers:
        lacking.append(f"layer {layer}: it has {list(spec.layers)}")
    if config.attention_weight and config.queries == "all" and spec.queries != "all":
        lacking.append("padded query rows (queries all): extract with --queries all, or train with --queries valid")
    if config.soft_weight and spec.classes is None:
        lacking.append("logits: its teacher has no task head, or they were cut away; train with --set soft_weight=0")
    if cache.labels is None and task.head == "classes":
        lacking.append("the answers that the student's head should have")
    if lacking:
        raise CacheError(f"{cache.name}: this training needs what the cache does not have:{bullet_list(lacking)}")
    recipe = parse_recipe(spec.view)
    reader = None
    table = join(shards, cache, targets.on_missing).table
    if config.attention_weight or config.soft_weight:
        every, drift = config.queries == "all", targets.allow_pixel_drift
        reader = CacheTargets(
            cache, shards, layer, attention=config.attention_weight > 0, padded_queries=every, allow_drift=drift
        )
    tower, mean_heads, labels = tower_of(cache), spec.heads == "mean", _answers(cache.labels, task)
    return _Plan(cache.preprocessor(), tower, labels, table, reader, mean_heads, recipe, spec.views)


def _count_pictures(shards: Sequence[Shard], valid: Sequence[Shard], task: Task, targets: Targets) -> int:
    """How many images a sample has.

    Raises:
        InputError: the shards differ, or have another number than the task or the teacher.
    """
    expected = task.images
    if not isinstance(targets, LabelsOnly):
        cached = isinstance(targets, CachedTargets)
        expected = expected or (targets.cache.spec.images if cached else targets.teacher.images)  # type: ignore[union-attr]
    for shard in (*shards, *valid):
        found = len(shard.read(shard.keys[0]).images)
        expected = expected or found
        if found != expected:
            raise InputError(
                f"{shard.path}: expected samples with {expected} image{'s' if expected > 1 else ''} for this task and "
                f"teacher, got {found}"
            )
    return expected or 1


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


def _record(
    result: FitResult, labels: Sequence[str], targets: Targets, about: Mapping[str, str | None], task: str
) -> RunRecord:
    return RunRecord(
        version=__version__,
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
