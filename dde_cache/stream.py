"""Which pair comes when: pairs of shards in a shuffled order that depends on (seed, epoch) alone.

Shards are permuted; the chunks of a few neighbouring shards are permuted together; the pairs within a window of chunks
are permuted. So a reader touches a bounded part of the data at a time, and the order does not know how many workers or
ranks there are, nor whether a cache is read beside the shards.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int

from dde_cache.samples import Shard

CHUNK_PAIRS = 256
"""Pairs that lie together in a unit and travel together through the shuffle."""


@dataclass(frozen=True)
class Pair:
    """One text of one sample, in one view: shard number, sample key, text slot, number of the view, whether its
    picture is mirrored (`train --remap-flips`), and the number of the pass: 0 is text and picture as the shard has
    them."""

    shard: int
    key: str
    text: int
    view: int = 0
    mirrored: bool = False
    pass_number: int = 0


@dataclass(frozen=True)
class Shuffle:
    """How far pairs are mixed: chunks over `shards` neighbouring shards, pairs over `chunks` chunks."""

    seed: int
    shards: int = 8
    chunks: int = 32


@dataclass(frozen=True)
class ShardPairs:
    """The pairs of one shard in tar order. (As tuples they take ten times the memory, in every process.)"""

    keys: list[str]
    texts: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]]) -> "ShardPairs":
        """Pack (key, text slot) pairs."""
        return cls([key for key, _ in pairs], np.array([text for _, text in pairs], np.uint16))


class PairTable:
    """Every pair of some shards, in the order (shard, sample, text): the epoch before any shuffling.

    Args:
        pairs: for each shard, its (key, text slot) pairs in tar order.
        views: how often each pair is there, its views one after the other.
        sides: 2 where each view is there as it is and mirrored, otherwise 1.
        passes: how often each side of a view is there, its passes one after the other.
    """

    def __init__(
        self,
        pairs: Sequence[ShardPairs | Sequence[tuple[str, int]]],
        views: int = 1,
        sides: int = 1,
        passes: int = 1,
    ) -> None:
        self._shards = [shard if isinstance(shard, ShardPairs) else ShardPairs.of(shard) for shard in pairs]
        self._views, self._sides, self._passes = views, sides, passes
        lengths = np.cumsum([0, *(len(one.keys) for one in self._shards)], dtype=np.int64)
        self._starts = self.states * lengths

    @property
    def states(self) -> int:
        """How many numbers each pair has."""
        return self._views * self._sides * self._passes

    @classmethod
    def of(cls, shards: Sequence[Shard], views: int = 1, passes: int = 1) -> "PairTable":
        """List the pairs of opened shards."""
        return cls(
            [
                ShardPairs.of([(sample.key, slot) for sample in shard for slot in range(len(sample.texts))])
                for shard in shards
            ],
            views,
            passes=passes,
        )

    def in_views(self, views: int, sides: int = 1, passes: int = 1) -> "PairTable":
        """The same pairs in views: pass p of side s of view v of pair n has the number
        ((n * views + v) * sides + s) * passes + p."""
        return PairTable(self._shards, views, sides, passes)

    def shared(self, other: "PairTable") -> "PairTable":
        """The pairs, each once, that another table of the same shards has too."""
        shards = []
        for one, two in zip(self._shards, other._shards, strict=True):
            held = set(zip(two.keys, two.texts.tolist(), strict=True))
            own = zip(one.keys, one.texts.tolist(), strict=True)
            shards.append(ShardPairs.of([pair for pair in own if pair in held]))
        return PairTable(shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Pair:
        shard = bisect_right(self._starts, number) - 1
        place, state = divmod(number - int(self._starts[shard]), self.states)
        state, pass_number = divmod(state, self._passes)
        view, side = divmod(state, self._sides)
        pairs = self._shards[shard]
        return Pair(shard, pairs.keys[place], int(pairs.texts[place]), view, bool(side), pass_number)

    def numbers(self, shard: int) -> range:
        """The pairs of one shard."""
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def shuffled(self, shuffle: Shuffle, epoch: int) -> Iterator[Int[np.ndarray, " n"]]:
        """Yield the pair numbers of an epoch, one window at a time."""
        random = np.random.default_rng([shuffle.seed, epoch])
        order = random.permutation(len(self._shards))
        for first in range(0, len(order), shuffle.shards):
            chunks = [
                np.arange(start, min(start + CHUNK_PAIRS, self._starts[shard + 1]))
                for shard in order[first : first + shuffle.shards]
                for start in range(self._starts[shard], self._starts[shard + 1], CHUNK_PAIRS)
            ]
            mixed = [chunks[number] for number in random.permutation(len(chunks))]
            for begin in range(0, len(mixed), shuffle.chunks):
                window = np.concatenate(mixed[begin : begin + shuffle.chunks])
                yield random.permutation(window)


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one rank reads, in `accumulate` micro-batches.

    A batch is cut into `ranks` x `accumulate` runs of neighbours, whose lengths differ by at most one. Which pairs are
    in a batch, and in which order, does not depend on it.
    """

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> range:
        """Numbers of the rank's micro-batches among all those of a step."""
        return range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)

    def cut(self, batch: Sequence[int]) -> list[list[int]]:
        """The rank's micro-batches of a global batch."""
        count = self.ranks * self.accumulate
        return [list(batch[part * len(batch) // count : (part + 1) * len(batch) // count]) for part in self.parts]


WHOLE = Share()


class BatchOrder:
    """The batches of a training run as lists of pair numbers, from any step on; of each, one rank's micro-batches.

    An epoch's last batch is dropped where it is not full, so that every step sees the same number of pairs.

    Args:
        table: the pairs.
        shuffle: how they are mixed.
        batch_size: pairs a batch.
        first_step: where to begin.
        last_step: where to end.
        share: which part of each batch.
        choose: from the pair numbers of a batch and the epoch to what is read of them (their views).
    """

    def __init__(
        self,
        table: PairTable,
        shuffle: Shuffle,
        batch_size: int,
        first_step: int,
        last_step: int,
        share: Share = WHOLE,
        choose: Callable[[list[int], int], list[int]] = lambda numbers, _epoch: numbers,
    ) -> None:
        self._choose = choose
        self._table = table
        self._shuffle = shuffle
        self._batch_size = batch_size
        self._first_step = first_step
        self._last_step = last_step
        self._share = share

    @property
    def batches_an_epoch(self) -> int:
        """Full batches in one pass over the pairs."""
        return len(self._table) // self._batch_size

    def __len__(self) -> int:
        return (self._last_step - self._first_step) * self._share.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = divmod(self._first_step, self.batches_an_epoch)
        step = self._first_step
        while step < self._last_step:
            for batch in self._epoch(epoch, skip * self._batch_size):
                yield from self._share.cut(batch)
                step += 1
                if step == self._last_step:
                    return
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[list[int]]:
        held = np.empty(0, dtype=np.int64)
        for window in self._table.shuffled(self._shuffle, epoch):
            fresh = window[skip:]
            skip -= min(skip, len(window))
            held = np.concatenate([held, fresh])
            while len(held) >= self._batch_size:
                yield self._choose(held[: self._batch_size].tolist(), epoch)
                held = held[self._batch_size :]


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The most recently used values within a budget of bytes; what was let go is made again when asked for.

    Threads may ask at the same time; one value is made after the other.
    """

    def __init__(self, make: Callable[[Key], Value], size: Callable[[Value], int], budget: int) -> None:
        self._make = make
        self._size = size
        self._budget = budget
        self._held: OrderedDict[Key, Value] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __call__(self, key: Key) -> Value:
        """Return the value of `key`, made now or held since."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            value = self._make(key)
            self._held[key] = value
            self._bytes += self._size(value)
            while self._bytes > self._budget and len(self._held) > 1:
                _, gone = self._held.popitem(last=False)
                self._bytes -= self._size(gone)
            return value
