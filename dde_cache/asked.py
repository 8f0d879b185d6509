"""What a training asks of the caches it learns from, what they lack of it, and how it is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from dde_cache.distill import TrainConfig
from dde_cache.errors import CacheError
from dde_cache.join import join
from dde_cache.passes import RECIPES, PassName, ordered
from dde_cache.samples import Shard
from dde_cache.several import answering
from dde_cache.sources import CachedTargets, SeveralTargets, Targets, layers_of, parts_of
from dde_cache.spec import TargetSpec
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.targets import CacheTargets
from dde_cache.tasks import Task


@dataclass(frozen=True)
class Part:
    """One cache and what is asked of it; `name` of its teacher where there are several."""

    name: str | None
    targets: CachedTargets
    config: TrainConfig
    answers: bool

    @property
    def layers(self) -> list[int]:
        """Those that are read."""
        return [pair.teacher for pair in layers_of(self.targets, self.config)]

    def lacking(self, task: Task) -> list[str]:
        """What is asked and is not there, in words."""
        cache, config = self.targets.cache, self.config
        lacking = _lacking_records(cache.spec, config, self.layers) if config.reads_records else []
        if config.soft_weight and cache.spec.classes is None:
            lacking.append(
                "logits: its teacher has no task head, or they were cut away; train with --set soft_weight=0"
            )
        if self.answers and cache.labels is None and task.head == "classes":
            lacking.append("the answers that the student's head should have")
        return lacking if self.name is None else [f"{self.name} lacks {line}" for line in lacking]

    def reader(self, shards: Sequence[Shard], passes: Sequence[int]) -> CacheTargets | None:
        """What reads it; None where nothing of it counts."""
        config = self.config
        if not (config.reads_records or config.soft_weight):
            return None
        return CacheTargets(
            self.targets.cache,
            shards,
            self.layers,
            rows=config.rows,
            hidden=config.hidden_weight > 0,
            pooled=config.pooled_weight > 0,
            padded_queries=config.queries == "all",
            allow_drift=self.targets.allow_pixel_drift,
            passes=passes,
            logits=self.name is None or config.soft_weight > 0,
        )


def asked_parts(targets: Targets, config: TrainConfig) -> list[Part]:
    """What is asked of each cache of some targets."""
    if isinstance(targets, CachedTargets):
        return [Part(None, targets, config, answers=True)]
    if not isinstance(targets, SeveralTargets):
        return []
    own = [config for _, config in parts_of(targets, config)]
    return [
        Part(teacher.name, teacher.targets, part, teacher in answering(targets))
        for teacher, part in zip(targets.teachers, own, strict=True)
    ]


def joined(shards: Sequence[Shard], caches: Sequence[CachedTargets]) -> PairTable:
    """The pairs of which every cache has targets.

    Raises:
        CacheError: caches and shards do not hold the same samples; what is missing of any is listed.
    """
    if len(caches) == 1:
        return join(shards, caches[0].cache, caches[0].on_missing).table
    tables, wrong = [], []
    for one in caches:
        try:
            tables.append(join(shards, one.cache, one.on_missing).table)
        except CacheError as error:
            wrong.append(str(error))
    if wrong:
        raise CacheError("\n".join(wrong))
    table = tables[0]
    for other in tables[1:]:
        table = table.shared(other)
    if not len(table):
        raise CacheError("expected samples of which every teacher has targets, found none; see --on-missing")
    return table


def numbers_of(cache: Cache, passes: Sequence[PassName]) -> list[int]:
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
        only = spec.directions[0]
        lacking.append(f"both directions of attention: it has {only} alone; train with --directions {only}")
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
    for kind, width in (("hidden", spec.hidden_width), ("pooled", spec.pooled_width)):
        if getattr(config, f"{kind}_weight") and width is None:
            lacking.append(f"{kind} states: extract with --targets cross,{kind}")
    return lacking
