"""Where the teacher's signals come from: a cache, a teacher run beside the student, or nowhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import ViltConfig

from dde_cache.attention import Attention, sparsify
from dde_cache.batches import Batch, pictures_of, tokens_of
from dde_cache.choices import SAME, DistillConfig, LayerPair
from dde_cache.join import OnMissing
from dde_cache.layout import HIDDEN_ARRAYS
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import HIDDEN, Rows
from dde_cache.store import Cache
from dde_cache.targets import decoded, slot_name
from dde_cache.teacher import FusionTeacher, HiddenStates


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


Targets = LabelsOnly | CachedTargets | OnlineTargets


class Taught(NamedTuple):
    """What the teacher gave for a batch; empty where nobody asks.

    Attributes:
        rows: attention rows by (kind, image slot, number of the layer pair).
        hidden: hidden states of text and picture by (image slot, number of the layer pair).
        logits: [b, c].
    """

    rows: Mapping[tuple[Rows, int, int], Attention]
    hidden: Mapping[tuple[int, int], HiddenStates]
    logits: Any = None


def images_of(targets: Targets) -> int | None:
    """Images that the teacher reads for one logit vector; None without a teacher."""
    if isinstance(targets, LabelsOnly):
        return None
    return targets.cache.spec.images if isinstance(targets, CachedTargets) else targets.teacher.images


def layers_of(targets: Targets, config: DistillConfig) -> tuple[LayerPair, ...]:
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
    hidden = {
        (image, number): HiddenStates(
            *(batch[f"target.{slot_name(f'{HIDDEN}/{name}', image, number)}"] for name in HIDDEN_ARRAYS)
        )
        for image, number in places
        if config.hidden_weight
    }
    return Taught(rows, hidden, batch.get("target.logits"))


def online_targets(targets: OnlineTargets, batch: Batch, config: DistillConfig, pairs: Sequence[LayerPair]) -> Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one."""
    whole, hidden = config.attention == "whole" and bool(config.rows), bool(config.hidden_weight)
    # The teacher's numbers are those of an extraction: in its own precision, not the student's.
    with torch.autocast(batch["input_ids"].device.type, enabled=False):
        output = targets.teacher(
            tokens_of(batch),
            pictures_of(batch),
            [pair.teacher for pair in pairs],
            padded_queries=config.queries == "all",
            whole=whole,
            hidden=hidden,
        )
    places = [(image, number) for image in range(targets.teacher.images) for number in range(len(pairs))]
    rows: dict[tuple[Rows, int, int], Attention] = {}
    for name in config.rows:
        for image, number in places:
            # Sparse, so that the padded image token of a teacher's query row, no key of the student's, is left out.
            rows[name, image, number] = sparsify(output.rows(name, image, pairs[number].teacher), None)
    states = {(image, number): output.hidden[image, pairs[number].teacher] for image, number in places if hidden}
    return Taught(rows, states, output.logits)
