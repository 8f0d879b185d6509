"""A student before its first step: begun, and given what its losses compare with the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dde_cache.choices import check_blocks
from dde_cache.distill import ATTENTION_MAPS, PROJECTIONS, TrainConfig
from dde_cache.errors import InputError
from dde_cache.initial import begin_student
from dde_cache.match import (
    Matched,
    Raw,
    attention_maps,
    axes_of,
    check_grids,
    check_texts,
    describe_axes,
    describe_maps,
)
from dde_cache.prepare import TrainingPlan
from dde_cache.preprocess import Preprocessor
from dde_cache.ranks import Ranks
from dde_cache.samples import Shard
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets, Targets, averages_heads, layers_of, parts_of
from dde_cache.store import Cache
from dde_cache.student import DualEncoder, Head
from dde_cache.tokens import TokenAligner, same_tokens


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
    kept: list[int] = []
    projections: list[nn.Module] = []
    heads: list[nn.Module] = []
    caches: list[Cache] = []
    parts = [one for one in parts_of(targets, config) if not isinstance(one[0], LabelsOnly) and one[1].reads_records]
    notes: list[str] = []
    for part, own in parts:
        pairs = layers_of(part, own)
        if isinstance(part, OnlineTargets):
            wrong = [pair.name for pair in pairs if pair.teacher >= part.teacher.layers]
            if wrong:
                raise InputError(
                    f"expected the teacher's layers 0 to {part.teacher.layers - 1}, got {', '.join(wrong)}"
                )
        check_blocks(pairs, min(tower.depth for tower in student.towers))
        kept += [pair.student for pair in pairs if pair.student is not None]
        cached = isinstance(part, CachedTargets)
        if own.attention_weight:
            want = part.cache.spec.teacher_heads if cached else plan.tower.num_attention_heads  # type: ignore[union-attr]
            maps = attention_maps(student, plan.tower, want, len(pairs), mean_heads=averages_heads(part, own))
            heads += maps
            caches += [part.cache] if cached else []  # type: ignore[union-attr]
            if not isinstance(maps[0], Raw):
                notes.append(describe_maps(student, want, plan.tower.hidden_size // plan.tower.num_attention_heads))
        for kind in own.states:
            width = getattr(part.cache.spec, f"{kind}_width") if cached else part.teacher.width  # type: ignore[union-attr]
            projections += [nn.Linear(student.towers[0].width, width) for _ in pairs]
    student.keep_blocks(sorted(set(kept)))
    if not all(isinstance(one, Raw) for one in heads):
        student.add_module(ATTENTION_MAPS, nn.ModuleList(heads))
    if projections:
        student.add_module(PROJECTIONS, nn.ModuleList(projections))
    if not parts:
        return Matched()
    return _matched(student, config, plan, tokens, shards, caches, tuple(dict.fromkeys(notes)))


def _matched(
    student: DualEncoder,
    config: TrainConfig,
    plan: TrainingPlan,
    tokens: TokenAligner | None,
    shards: Sequence[Shard],
    caches: Sequence[Cache],
    notes: tuple[str, ...],
) -> Matched:
    """How a student's tokens stand to the teacher's. What is said of all texts is known to the first rank, which says
    it; `caches` are those whose attention is compared."""
    axes = axes_of(student, tokens, config)
    found: list[str] = []
    if config.missing_tokens == "drop" and (axes.alike or not config.attention_weight):
        raise InputError(
            "expected missing_tokens drop where attention is compared on other tokens than the teacher's; leave it out"
        )
    if config.attention_weight and not axes.alike:
        ranks = Ranks()
        # Before one picture is looked at, so that all that differ are named; one rank opens the units.
        ranks.on_first(lambda: check_grids(shards, caches, axes))
        picture = shards[0].read(shards[0].keys[0]).images[0]
        found += describe_axes(student, axes, plan.preprocessor.grid(*picture.size()))
        if tokens is not None:
            # Reading and cutting every text takes minutes where there are millions.
            ranks.on_first(lambda: found.extend(check_texts(shards, tokens, drop=axes.drop)))
    return Matched(axes, (*notes, *found))


def exported(student: nn.Module) -> dict[str, Tensor]:
    """The weights of a student without what served its training alone."""
    alone = tuple(f"{name}." for name in (PROJECTIONS, ATTENTION_MAPS))
    return {name: value for name, value in student.state_dict().items() if not name.startswith(alone)}
