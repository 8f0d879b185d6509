"""Training on views: which one of a sample an epoch takes, and whether it is drawn as the teacher saw it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dde_cache.batches import PairDataset
from dde_cache.runs import FitConfig
from dde_cache.samples import Shard
from dde_cache.store import Cache
from dde_cache.stream import WHOLE, BatchOrder, PairTable, Share
from dde_cache.targets import CacheTargets
from dde_cache.views import AS_PROCESSED, PUBLISHED, is_mirrored, parse_recipe, recipe_name, view_of


def order_in_views(
    table: PairTable, views: int, config: FitConfig, first: int, last: int, share: Share = WHOLE, sides: int = 1
) -> BatchOrder:
    """The batches of a run, as numbers in `table.in_views(views, sides)`: a pure function of (seed, epoch, key).

    The views of a pair lie together in a unit, so that a shuffle window of as many chunks holds fewer pairs.

    Args:
        table: pairs, each once.
        views: of each.
        config: seed, shuffle and batch size.
        first: step to begin with.
        last: step to end at.
        share: which part of each batch.
        sides: 2 where every other picture is mirrored.
    """
    shuffle = config.shuffle()
    shuffle = replace(shuffle, chunks=max(1, shuffle.chunks // views))
    choose = _choice(table, views, sides, config.seed)
    return BatchOrder(table, shuffle, config.batch_size, first, last, share, choose)


def _choice(table: PairTable, views: int, sides: int, seed: int) -> Callable[[list[int], int], list[int]]:
    if views * sides == 1:
        return lambda numbers, _epoch: numbers

    def state(key: str, epoch: int) -> int:
        return view_of(seed, epoch, key, views) * sides + (sides == 2 and is_mirrored(seed, epoch, key))

    return lambda numbers, epoch: [number * views * sides + state(table[number].key, epoch) for number in numbers]


def check_first_views(
    cache: Cache, shards: Sequence[Shard], table: PairTable, config: FitConfig, *, allow_drift: bool
) -> None:
    """Draw the views of a run's first batch and compare all of their pixels with those that the teacher saw.

    Args:
        cache: where the hashes are; one without views, or without hashes, passes.
        shards: where the pictures are.
        table: pairs, each once.
        config: of the run.
        allow_drift: warn instead.

    Raises:
        PixelDrift: they are others.
    """
    recipe, views = parse_recipe(cache.spec.view), cache.spec.views
    if recipe is None:
        return
    reader = CacheTargets(cache, shards, 0, attention=False, pixels="every", allow_drift=allow_drift)
    dataset = PairDataset(shards, table.in_views(views), cache.preprocessor(), (), reader, recipe=recipe)
    for batch in order_in_views(table, views, config, 0, 1):
        dataset.__getitems__(batch)


def lacking_views(view: str) -> list[str]:
    """How views differ from those of the published training, in words.

    Args:
        view: of a cache's specification, or of a run without one.
    """
    if view == AS_PROCESSED:
        return ["random augmentation (RandAugment): there is one view of each sample, as processed"]
    lacking = ["a fresh view at every step: there is a fixed number of each sample"]
    if view != recipe_name(PUBLISHED):
        lacking.append(f"the published operations of RandAugment: the views are `{view}`")
    return lacking
