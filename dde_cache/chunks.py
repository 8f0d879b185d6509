"""Decompressed chunks on their way into batches: read by several threads, their memory used again.

A shuffle window needs all its chunks at its first batch, and none of them after its last. So what is missing is read
at once, in threads (zstd, checksums and reads leave Python's lock alone), and a chunk is let go when as many of its
rows were taken as an epoch takes. Fresh memory is dear: its first touch can cost several times what decompressing into
it does, above all on virtual machines. So the memory of a chunk that was let go is what the next one is read into.
`benchmarks/reading.py` measures it.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np

from dde_cache.blocks import Allocate

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Place = TypeVar("Place", bound=Hashable)
Content = TypeVar("Content")

BUDGET = 2**30
"""Bytes of chunks that one worker keeps; a shuffle window of the default size fits for ViLT-B/32."""

THREADS = min(4, os.cpu_count() or 1)


def in_threads(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Sequence[Result]:
    """Call a function with each of some arguments, a few at a time."""
    if len(arguments) < 2:
        return [function(argument) for argument in arguments]
    # Threads of their own for each call: those of a pool that is kept do not survive the fork of a worker process.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, arguments))


class Buffers:
    """Memory that was given back, and is handed out again before any other is made."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = Lock()

    def take(self, count: int) -> np.ndarray:
        """Memory of at least `count` bytes: the smallest that fits and is not twice as large, or a new one."""
        with self._lock:
            fits = [number for number, buffer in enumerate(self._free) if count <= buffer.nbytes <= 2 * count]
            if fits:
                return self._free.pop(min(fits, key=lambda number: self._free[number].nbytes))
        return np.empty(count, np.uint8)

    def give(self, buffers: Collection[np.ndarray], limit: int) -> None:
        """Take memory back; of what is free, the oldest goes where it is more than `limit` bytes."""
        with self._lock:
            self._free += buffers
            free = sum(buffer.nbytes for buffer in self._free)
            while free > limit:
                free -= self._free.pop(0).nbytes


@dataclass
class _Held(Generic[Content]):
    """A chunk, the memory it lies in, and how many of its rows are still to be taken."""

    content: Content
    memory: list[np.ndarray]
    left: int


class Chunks(Generic[Place, Content]):
    """Chunks by place, each in memory until its rows were taken, all together within a budget.

    Args:
        read: makes a chunk, in the memory that it is given; called from several threads at once.
        rows: how many rows of a chunk an epoch takes.
        budget: bytes; beyond it the chunks that were used longest ago go, and are read again where they are needed.
    """

    def __init__(
        self, read: Callable[[Place, Allocate], Content], rows: Callable[[Place], int], budget: int = BUDGET
    ) -> None:
        self._read, self._rows, self._budget = read, rows, budget
        self._held: OrderedDict[Place, _Held[Content]] = OrderedDict()
        self._buffers = Buffers()

    def load(self, places: Collection[Place]) -> Mapping[Place, Content]:
        """The chunks of some places, whole until `taken` is called."""
        missing = [place for place in places if place not in self._held]
        self._held.update(zip(missing, in_threads(self._make, missing), strict=True))
        for place in places:
            self._held.move_to_end(place)
        return {place: self._held[place].content for place in places}

    def taken(self, rows: Mapping[Place, int]) -> None:
        """Count the rows that were copied out of chunks; what nobody needs any more is let go."""
        for place, count in rows.items():
            self._held[place].left -= count
            if self._held[place].left <= 0:
                self._let_go(self._held.pop(place))
        size = sum(buffer.nbytes for held in self._held.values() for buffer in held.memory)
        while size > self._budget and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            size -= sum(buffer.nbytes for buffer in oldest.memory)
            self._let_go(oldest)

    def _make(self, place: Place) -> _Held[Content]:
        memory: list[np.ndarray] = []

        def allocate(count: int) -> np.ndarray:
            memory.append(self._buffers.take(count))
            return memory[-1][:count]

        return _Held(self._read(place, allocate), memory, self._rows(place))

    def _let_go(self, held: _Held[Content]) -> None:
        self._buffers.give(held.memory, self._budget)
