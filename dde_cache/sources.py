"""Where the teacher's signals come from: a cache, a teacher run beside the student, or nowhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import ViltConfig

from dde_cache.attention import Attention, sparsify
from dde_cache.batches import Batch, pictures_of, tokens_of
from dde_cache.choices import SAME, DistillConfig, LayerPair
from dde_cache.join import OnMissing
from dde_cache.layout import HIDDEN_ARRAYS
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import HIDDEN, POOLED, Rows
from dde_cache.states import decode_int8, mean_of_valid
from dde_cache.store import Cache
from dde_cache.targets import decoded, slot_name
from dde_cache.teacher import FusionTeacher, HiddenStates
from dde_cache.vilt import image_tokens, token_mask


@dataclass(frozen=True)
class LabelsOnly:
    """No teacher: processor, labels and tower shape come from a cache's assets or from a checkpoint."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]


@dataclass(frozen=True)
class CachedTargets:
    """Stream the targets from a cache; where it has views, on their pixels, or with `allow_pixel_drift` on others."""

    cache: Cache
    on_missing: OnMissing = "error"
    allow_pixel_drift: bool = False


@dataclass(frozen=True)
class OnlineTargets:
    """Run a teacher at every step, for comparison; `layer` counts from 0."""

    teacher: FusionTeacher
    layer: int


@dataclass(frozen=True)
class CachedTeacher:
    """One of several teachers: its cache, and its shares in the losses of each kind (0: none, and nothing is read).

    Attributes:
        name: in metrics and messages.
        targets: its cache.
        attention, soft, hidden: shares; each kind's are divided by their sum. `hidden` is of pooled states too.
        layer, layer_map: instead of the settings of these names, where one is given.
    """

    name: str
    targets: CachedTargets
    attention: float = 1.0
    soft: float = 1.0
    hidden: float = 1.0
    layer: int | None = None
    layer_map: str | None = None


@dataclass(frozen=True)
class SeveralTargets:
    """Stream the targets of several teachers from caches of the same samples; the first gives tower and processor."""

    teachers: tuple[CachedTeacher, ...]


Targets = LabelsOnly | CachedTargets | OnlineTargets | SeveralTargets
Alone = LabelsOnly | CachedTargets | OnlineTargets
"""Of one teacher, or of none."""

Config = TypeVar("Config", bound=DistillConfig)


class Taught(NamedTuple):
    """What the teacher gave for a batch; empty where nobody asks.

    Attributes:
        rows: attention rows by (kind, image slot, number of the layer pair).
        hidden: hidden states of text and picture by (image slot, number of the layer pair).
        logits: [b, c].
        pooled: pooled states of text and picture [b, w], likewise.
    """

    rows: Mapping[tuple[Rows, int, int], Attention]
    hidden: Mapping[tuple[int, int], HiddenStates]
    logits: Any = None
    pooled: Mapping[tuple[int, int], tuple[Tensor, Tensor]] = MappingProxyType({})


def caches_of(targets: Targets) -> tuple[CachedTargets, ...]:
    """The caches that are read; the first is the one that others must be like."""
    if isinstance(targets, SeveralTargets):
        return tuple(teacher.targets for teacher in targets.teachers)
    return (targets,) if isinstance(targets, CachedTargets) else ()


def drift_allowed(targets: Targets) -> Targets:
    """The same targets, also on views drawn with other pixels; what is no cache has none."""
    if isinstance(targets, CachedTargets):
        return replace(targets, allow_pixel_drift=True)
    if isinstance(targets, SeveralTargets):
        each = (replace(one, targets=replace(one.targets, allow_pixel_drift=True)) for one in targets.teachers)
        return SeveralTargets(tuple(each))
    return targets


def parts_of(targets: Targets, config: Config) -> list[tuple[Alone, Config]]:
    """Each teacher's targets, with the settings of its part in the losses: weights times shares, and layers.

    Labels count once, with the first.
    """
    if not isinstance(targets, SeveralTargets):
        return [(targets, config)]
    kinds = ("attention", "soft", "hidden")
    sums = {kind: sum(getattr(teacher, kind) for teacher in targets.teachers) or 1.0 for kind in kinds}
    parts: list[tuple[Alone, Config]] = []
    for number, teacher in enumerate(targets.teachers):
        weights = {
            f"{name}_weight": getattr(config, f"{name}_weight") * getattr(teacher, kind) / sums[kind]
            for name, kind in (*zip(kinds, kinds, strict=True), ("pooled", "hidden"))
        }
        change: dict[str, Any] = weights | ({} if number == 0 else {"hard_weight": 0.0})
        if (teacher.layer, teacher.layer_map) != (None, None):
            change |= {"layer": teacher.layer, "layer_map": teacher.layer_map}
        parts.append((teacher.targets, config.model_copy(update=change)))
    return parts


def averages_heads(targets: Alone, config: DistillConfig) -> bool:
    """Whether attention is compared by its mean over heads."""
    stored = targets.cache.spec.heads if isinstance(targets, CachedTargets) else None
    return "mean" in (stored, config.heads)


def images_of(targets: Targets) -> int | None:
    """Images that the teacher reads for one logit vector; None without a teacher."""
    if isinstance(targets, LabelsOnly):
        return None
    if isinstance(targets, SeveralTargets):
        return images_of(targets.teachers[0].targets)
    return targets.cache.spec.images if isinstance(targets, CachedTargets) else targets.teacher.images


def layers_of(targets: Alone, config: DistillConfig) -> tuple[LayerPair, ...]:
    """The pairs of layers that are compared; without a teacher they mean nothing."""
    if isinstance(targets, OnlineTargets):
        # The layer that it was made for is the last of those that can be had.
        last = targets.layer
        return config.pairs([*range(targets.teacher.layers)] if config.layer_map == SAME else [last])
    return config.pairs(targets.cache.spec.layers if isinstance(targets, CachedTargets) else ())


def cached_targets(targets: CachedTargets, batch: Batch, config: DistillConfig, pairs: Sequence[LayerPair]) -> Taught:
    """Decode what the reader put into the batch."""
    spec, numbers = targets.cache.spec, range(len(pairs))
    places = [(image, number) for image in range(spec.images) for number in numbers]
    rows = {
        (name, image, number): decoded(batch, name, spec.steps, image, number)
        for name in config.rows
        for image, number in places
    }
    sides = {
        (kind, *place): [_vectors(batch, f"{kind}/{side}", *place) for side in HIDDEN_ARRAYS]
        for kind in config.states
        for place in places
    }
    hidden = {place: HiddenStates(*sides[HIDDEN, *place]) for place in places if config.hidden_weight}
    pooled = {place: (*sides[POOLED, *place],) for place in places if config.pooled_weight}
    return Taught(rows, hidden, batch.get("target.logits"), pooled)  # type: ignore[arg-type]


def _vectors(batch: Batch, name: str, image: int, number: int) -> Tensor:
    """Hidden or pooled states of a batch, decoded where they are."""
    stored, scale = (batch.get(f"target.{slot_name(part, image, number)}") for part in (name, f"{name}_scale"))
    return stored if scale is None else decode_int8(stored, scale)  # type: ignore[arg-type, return-value]


def online_targets(targets: OnlineTargets, batch: Batch, config: DistillConfig, pairs: Sequence[LayerPair]) -> Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one.

    Without a weight of soft labels nothing behind the last layer that is compared is computed; with it alone, no maps.
    """
    whole, hidden = config.attention == "whole" and bool(config.rows), bool(config.states)
    # The teacher's numbers are those of an extraction: in its own precision, not the student's.
    with torch.autocast(batch["input_ids"].device.type, enabled=False):
        output = targets.teacher(
            tokens_of(batch),
            pictures_of(batch),
            [pair.teacher for pair in pairs] if config.reads_records else [],
            padded_queries=config.queries == "all",
            whole=whole,
            hidden=hidden,
            logits=bool(config.soft_weight),
        )
    places = [(image, number) for image in range(targets.teacher.images) for number in range(len(pairs))]
    rows: dict[tuple[Rows, int, int], Attention] = {}
    for name in config.rows:
        for image, number in places:
            # Sparse, so that the padded image token of a teacher's query row, no key of the student's, is left out.
            rows[name, image, number] = sparsify(output.rows(name, image, pairs[number].teacher), None)
    states = {(image, number): output.hidden[image, pairs[number].teacher] for image, number in places if hidden}
    words = batch["attention_mask"].sum(-1)
    pooled = {}
    for (image, number), held in states.items() if config.pooled_weight else ():
        counts = (words, image_tokens(batch[f"grid{image}"]).to(words.device))
        each = zip((held.text, held.image), counts, strict=True)
        text, picture = (mean_of_valid(one, token_mask(count, one.shape[1])) for one, count in each)
        pooled[image, number] = (text, picture)
    return Taught(rows, states, output.logits, pooled)
