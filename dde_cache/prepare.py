"""What a training needs of shards, targets and task, refused where they do not fit before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.batches import check_labels
from dde_cache.choices import check_blocks
from dde_cache.distill import ATTENTION_MAPS, PROJECTIONS, TrainConfig
from dde_cache.errors import CacheError, InputError, TeacherError, bullet_list
from dde_cache.initial import begin_student
from dde_cache.join import join
from dde_cache.match import Matched, attention_maps, axes_of, check_texts, describe_axes, describe_maps
from dde_cache.passes import RECIPES, PassName, ordered
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Shard
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets, Targets, images_of, layers_of
from dde_cache.spec import TargetSpec
from dde_cache.store import MANIFEST, Cache
from dde_cache.stream import PairTable
from dde_cache.student import DualEncoder, Head
from dde_cache.targets import CacheTargets
from dde_cache.tasks import Task
from dde_cache.teacher import read_config, resolve
from dde_cache.tokens import TokenAligner, same_tokens
from dde_cache.views import ViewRecipe, parse_recipe


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
class TrainingPlan:
    """What a run needs, whatever its targets come from."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]
    table: PairTable
    reader: CacheTargets | None
    mean_heads: bool
    recipe: ViewRecipe | None = None
    views: int = 1
    images: int = 1


def plan_training(
    shards: Sequence[Shard],
    valid: Sequence[Shard],
    targets: Targets,
    config: TrainConfig,
    task: Task,
    passes: Sequence[PassName] = ("matched",),
) -> TrainingPlan:
    """Settle what to read, and refuse what the data or the targets do not have.

    Args:
        shards: training data.
        valid: held-out data.
        targets: where the teacher's signals come from.
        config: losses and fit.
        task: what is learned.
        passes: whose maps are read.

    Raises:
        CacheError: the cache lacks rows, layers, passes, logits or samples that the configuration asks for.
        TeacherError: the teacher has no task head.
        InputError: its answers are not the task's, the task has no soft labels to give weight to, the cache has views
            of a recipe that this version does not know, or labels or pictures are not what was expected.
    """
    if config.remap_flips and not isinstance(targets, CachedTargets):
        raise InputError("expected remap_flips with targets of a cache, whose maps it mirrors; leave it out")
    if config.accumulate > 1 and task.head == "similarity" and config.hard_weight:
        raise InputError(
            "expected accumulate 1: pairs are contrasted with the whole batch, which must be there at once; use more "
            "ranks, or a smaller batch"
        )
    plan = replace(_plan(shards, targets, config, task, passes), images=_count_pictures(shards, valid, task, targets))
    if config.remap_flips and plan.images > 1:
        raise InputError("expected remap_flips with samples of one image, got two; leave it out")
    for name, some in (("training shards", shards), ("validation shards", valid)):
        if task.closed:
            check_labels(some, plan.labels, name)
    return plan


def _plan(
    shards: Sequence[Shard], targets: Targets, config: TrainConfig, task: Task, passes: Sequence[PassName]
) -> TrainingPlan:
    """What is read, from where the targets come from."""
    if isinstance(targets, LabelsOnly):
        labels = _answers(targets.labels, task)
        return TrainingPlan(targets.preprocessor, targets.tower, labels, PairTable.of(shards), None, False)
    if config.soft_weight and not task.soft:
        raise InputError(f"task {config.task} has no soft labels; train with --set soft_weight=0")
    if isinstance(targets, OnlineTargets):
        teacher = targets.teacher
        labels = _answers(teacher.labels, task)
        mean_heads = config.heads == "mean"
        return TrainingPlan(teacher.preprocessor, teacher.config, labels, PairTable.of(shards), None, mean_heads)
    cache, spec = targets.cache, targets.cache.spec
    layers = [pair.teacher for pair in layers_of(targets, config)]
    lacking = _lacking_records(spec, config, layers) if config.reads_records else []
    if config.soft_weight and spec.classes is None:
        lacking.append("logits: its teacher has no task head, or they were cut away; train with --set soft_weight=0")
    if cache.labels is None and task.head == "classes":
        lacking.append("the answers that the student's head should have")
    if lacking:
        raise CacheError(f"{cache.name}: this training needs what the cache does not have:{bullet_list(lacking)}")
    recipe = parse_recipe(spec.view)
    numbers = _numbers_of(cache, passes)
    reader = None
    table = join(shards, cache, targets.on_missing).table
    if config.reads_records or config.soft_weight:
        reader = CacheTargets(
            cache,
            shards,
            layers,
            rows=config.rows,
            hidden=config.hidden_weight > 0,
            padded_queries=config.queries == "all",
            allow_drift=targets.allow_pixel_drift,
            passes=numbers,
        )
    tower, mean_heads, labels = tower_of(cache), "mean" in (spec.heads, config.heads), _answers(cache.labels, task)
    return TrainingPlan(cache.preprocessor(), tower, labels, table, reader, mean_heads, recipe, spec.views)


def _numbers_of(cache: Cache, passes: Sequence[PassName]) -> list[int]:
    """The numbers of passes in a cache.

    Raises:
        CacheError: it lacks some.
    """
    held = cache.spec.passes
    lacking = [name for name in passes if RECIPES[name] not in held]
    if lacking:
        raise CacheError(
            f"{cache.name}: expected the passes {', '.join(passes)}, but it has {'; '.join(held)}; extract with "
            f"--passes {','.join(ordered({'matched', *passes}))}, or train with fewer --passes"
        )
    return [held.index(RECIPES[name]) for name in passes]


def _lacking_records(spec: TargetSpec, config: TrainConfig, layers: Sequence[int]) -> list[str]:
    """What attention or hidden states need of a cache and it does not have, and how it would be had."""
    if not spec.layers:
        return ["attention maps: it keeps predictions alone; train with --set attention_weight=0"]
    lacking = []
    one_way = config.attention_weight and config.directions == "both" and len(spec.directions) < 2
    if one_way:
        lacking.append(f"both directions of attention: it has {spec.directions[0]} alone")
    elif any(name.startswith(("t2", "i2")) and name not in spec.rows for name in config.rows):
        rows = ", ".join(spec.rows)
        how = "extract with --targets cross,whole" if config.attention == "whole" else "train with other --directions"
        lacking.append(f"attention rows {', '.join(config.rows)}: it has {rows}; {how}")
    lacking += [
        f"layer {layer}: it has {list(spec.layers)}; extract with --layers"
        for layer in layers
        if layer not in spec.layers
    ]
    if config.attention_weight and config.queries == "all" and spec.queries != "all":
        lacking.append("padded query rows (queries all): extract with --queries all, or train with --queries valid")
    if config.attention_weight and config.heads == "all" and spec.heads == "mean":
        lacking.append("attention head by head: it has their mean; extract with --heads all, or leave heads out")
    whole = spec.steps is not None or (spec.k, spec.mass) == (None, None)
    if config.attention_weight and config.heads == "mean" and spec.heads == "all" and not whole:
        lacking.append("whole rows to average over the heads: it keeps " + spec.kept + "; extract with --heads mean")
    if config.hidden_weight and spec.hidden_width is None:
        lacking.append("hidden states: extract with --targets cross,hidden")
    return lacking


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


def _count_pictures(shards: Sequence[Shard], valid: Sequence[Shard], task: Task, targets: Targets) -> int:
    """How many images a sample has.

    Raises:
        InputError: the shards differ, or have another number than the task or the teacher.
    """
    expected = task.images or images_of(targets)
    for shard in (*shards, *valid):
        found = len(shard.read(shard.keys[0]).images)
        expected = expected or found
        if found != expected:
            raise InputError(
                f"{shard.path}: expected samples with {expected} image{'s' if expected > 1 else ''} for this task and "
                f"teacher, got {found}"
            )
    return expected or 1


@dataclass(frozen=True)
class Ready:
    """A student that can be trained.

    Attributes:
        student: with what its losses need.
        preprocessor: that it will be used with.
        reads: that makes the training batches; the teacher's where targets are of its tokens.
        tokens: reads texts for the student too, where its tokens are others than those of `reads`.
        matched: how it stands to the teacher.
    """

    student: DualEncoder
    preprocessor: Preprocessor
    reads: Preprocessor
    tokens: TokenAligner | None
    matched: Matched


def ready_student(
    plan: TrainingPlan, targets: Targets, config: TrainConfig, init: str | None, head: Head, shards: Sequence[Shard]
) -> Ready:
    """Begin a student, and let it give what the losses compare.

    Raises:
        TeacherError, RunError, InputError: as `begin_student` and `fit_student`.
    """
    named = {"text_tower": config.text_tower, "image_tower": config.image_tower}
    begun = begin_student(plan.tower, plan.labels, config.dropout, init, head, plan.preprocessor, **named)
    alone = isinstance(targets, LabelsOnly) or same_tokens(plan.preprocessor, begun.preprocessor)
    tokens = None if alone else TokenAligner(plan.preprocessor, begun.preprocessor)
    matched = fit_student(begun.student, targets, config, plan, tokens, shards)
    reads = begun.preprocessor if alone else plan.preprocessor
    return Ready(begun.student, begun.preprocessor, reads, tokens, matched)


def fit_student(
    student: DualEncoder,
    targets: Targets,
    config: TrainConfig,
    plan: TrainingPlan,
    tokens: TokenAligner | None = None,
    shards: Sequence[Shard] = (),
) -> Matched:
    """Let a student give what the losses compare: the blocks of the layer map, maps of its heads and hidden states.

    Args:
        student: gets the maps as modules.
        targets: what it is compared with.
        config: losses.
        plan: of the training.
        tokens: where the student has a tokenizer of its own.
        shards: whose texts and first picture are looked at where the student has tokens of its own.

    Raises:
        TeacherError: its heads cannot be compared with the teacher's.
        InputError: the layer map names blocks that it does not have, or layers that the teacher does not have; or its
            tokens cannot be compared with the teacher's.
    """
    if isinstance(targets, LabelsOnly) or not config.reads_records:
        return Matched()
    pairs = layers_of(targets, config)
    if isinstance(targets, OnlineTargets):
        wrong = [pair.name for pair in pairs if pair.teacher >= targets.teacher.layers]
        if wrong:
            raise InputError(f"expected the teacher's layers 0 to {targets.teacher.layers - 1}, got {', '.join(wrong)}")
    check_blocks(pairs, min(tower.depth for tower in student.towers))
    student.keep_blocks([pair.student for pair in pairs if pair.student is not None])
    axes = axes_of(student, tokens, config)
    notes: list[str] = []
    if config.attention_weight:
        cached = isinstance(targets, CachedTargets)
        heads = targets.cache.spec.teacher_heads if cached else plan.tower.num_attention_heads  # type: ignore[union-attr]
        maps = attention_maps(student, plan.tower, heads, len(pairs), mean_heads=plan.mean_heads)
        if maps is not None:
            student.add_module(ATTENTION_MAPS, maps)
            notes.append(describe_maps(student, heads, plan.tower.hidden_size // plan.tower.num_attention_heads))
        if axes.image is not None:
            picture = shards[0].read(shards[0].keys[0]).images[0]
            notes += describe_axes(student, axes, plan.preprocessor.grid(*picture.size()))
        elif not axes.alike:
            notes += describe_axes(student, axes, (0, 0))
        if tokens is not None:
            notes += check_texts(shards, tokens, drop=axes.drop)
    if config.hidden_weight:
        cached = isinstance(targets, CachedTargets)
        width = targets.cache.spec.hidden_width if cached else targets.teacher.width  # type: ignore[union-attr]
        projections = [nn.Linear(student.towers[0].width, width or 0) for _ in pairs]
        student.add_module(PROJECTIONS, nn.ModuleList(projections))
    return Matched(axes, tuple(notes))


def exported(student: nn.Module) -> dict[str, Tensor]:
    """The weights of a student without what served its training alone."""
    alone = tuple(f"{name}." for name in (PROJECTIONS, ATTENTION_MAPS))
    return {name: value for name, value in student.state_dict().items() if not name.startswith(alone)}
