"""What a training needs of shards, targets and task, refused where they do not fit before anything is trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import ViltConfig

from dde_cache.asked import asked_parts, joined, numbers_of
from dde_cache.assets import family_of
from dde_cache.batches import check_labels
from dde_cache.canonical import without_place
from dde_cache.checkpoint import load_preprocessor, read_family, resolve
from dde_cache.distill import TrainConfig
from dde_cache.errors import CacheError, InputError, TeacherError, bullet_list, first_line
from dde_cache.passes import PassName
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Shard
from dde_cache.several import SeveralReaders, answering, disagreements
from dde_cache.sources import (
    LabelsOnly,
    OnlineTargets,
    SeveralTargets,
    Targets,
    averages_heads,
    caches_of,
    images_of,
    parts_of,
)
from dde_cache.spec import hash_json
from dde_cache.store import MANIFEST, Cache
from dde_cache.stream import PairTable
from dde_cache.targets import CacheTargets
from dde_cache.tasks import Task
from dde_cache.teacher import FusionTeacher
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
        path = resolve(like)
        config, family, architecture = read_family(path)
        tower, preprocessor = family.towers(config.to_dict()), load_preprocessor(path, config, family)
        labels = family.answers(architecture, config)
    return LabelsOnly(preprocessor, tower, labels or ())


def likeness(targets: LabelsOnly) -> str:
    """What a run on labels takes from a cache or a teacher, in one line: equal for a teacher and its cache."""
    tower, processor = targets.tower, targets.preprocessor.processor
    shape = without_place(json.loads(json.dumps(tower.to_dict(), default=str)))
    for name in ("id2label", "label2id"):
        shape.pop(name, None)
    pictures = json.loads(processor.image_processor.to_json_string())
    reads = [shape, pictures, targets.preprocessor.tokenizer_json()]
    return (
        f"width {tower.hidden_size}, {tower.num_hidden_layers} blocks, {tower.num_attention_heads} heads, "
        f"{len(targets.labels)} answers, SHA-256 {hash_json([*reads, list(targets.labels)])[:12]}"
    )


def tower_of(cache: Cache) -> ViltConfig:
    """The towers of a new student of a cache: of the teacher's shape, as far as its family has one.

    Raises:
        CacheError: the configuration in the cache's assets is none that the model library takes.
    """
    try:
        return family_of(cache.spec).towers(cache.teacher_config)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CacheError(f"{cache.folder}: the teacher's configuration cannot be used: {first_line(error)}") from error


Reader = CacheTargets | SeveralReaders
"""What reads the targets of one cache, or of several."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs, whatever its targets come from."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]
    table: PairTable
    reader: Reader | None
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
    if caches_of(targets) and (config.views, config.view) != (None, None):
        cache = caches_of(targets)[0].cache
        raise InputError(
            f"expected views and view without a cache alone: {cache.name} has those that its teacher saw "
            f"({cache.spec.views}, {cache.spec.view}); leave them out"
        )
    if config.remap_flips and not caches_of(targets):
        raise InputError("expected remap_flips with targets of a cache, whose maps it mirrors; leave it out")
    if task.head == "similarity" and config.head_learning_rate_factor != 1:
        raise InputError(
            f"expected head_learning_rate_factor 1 for task {config.task}, whose students have no task head, got "
            f"{config.head_learning_rate_factor:g}"
        )
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
        return TrainingPlan(
            targets.preprocessor, targets.tower, labels, PairTable.of(shards), None, False, *config.drawn
        )
    if config.soft_weight and not task.soft:
        raise InputError(f"task {config.task} has no soft labels; train with --set soft_weight=0")
    if isinstance(targets, OnlineTargets):
        teacher = targets.teacher
        labels = _answers(teacher.labels, task)
        mean_heads = config.heads == "mean"
        _check_teacher(teacher, config)
        table = PairTable.of(shards)
        return TrainingPlan(teacher.preprocessor, teacher.tower, labels, table, None, mean_heads, *config.drawn)
    caches = caches_of(targets)
    lacking = [line for place in asked_parts(targets, config) for line in place.lacking(task)]
    several = isinstance(targets, SeveralTargets)
    if isinstance(targets, SeveralTargets):
        lacking = disagreements(targets, config, classes=task.head == "classes") + lacking
    if lacking:
        name = "these teachers" if several else caches[0].cache.name
        what = "do not go together" if several else "this training needs what the cache does not have"
        raise CacheError(f"{name}{'' if several else ':'} {what}:{bullet_list(lacking, 20)}")
    spec = caches[0].cache.spec
    recipe = parse_recipe(spec.view)
    numbers = numbers_of(caches[0].cache, passes)
    table = joined(shards, caches)
    readers = [place.reader(shards, numbers) for place in asked_parts(targets, config)]
    reader: Reader | None = readers[0]
    if isinstance(targets, SeveralTargets):
        names = [teacher.name for teacher in targets.teachers]
        reader = SeveralReaders(names, readers) if any(readers) else None
    mean_heads = any(averages_heads(part, own) for part, own in parts_of(targets, config))
    answers = answering(targets)[0].targets.cache if isinstance(targets, SeveralTargets) else caches[0].cache
    tower, labels = tower_of(caches[0].cache), _answers(answers.labels, task)
    return TrainingPlan(caches[0].cache.preprocessor(), tower, labels, table, reader, mean_heads, recipe, spec.views)


def _check_teacher(teacher: FusionTeacher, config: TrainConfig) -> None:
    """Refuse a teacher that cannot give, at each step, what the losses compare.

    Raises:
        TeacherError: its family lacks it.
    """
    lacking = teacher.lacks(
        padded_queries=bool(config.rows) and config.queries == "all",
        whole=any(name in ("t2w", "i2w") for name in config.rows),
        hidden=bool(config.states),
    )
    if any(name not in teacher.directions for name in config.rows if name in ("t2i", "i2t")):
        only = teacher.directions[0]
        lacking.append(f"it has {only} attention alone: train with --directions {only}")
    if lacking:
        raise TeacherError(f"a teacher of family {teacher.family.name} does not have this:{bullet_list(lacking)}")


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
