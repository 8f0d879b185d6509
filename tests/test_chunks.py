"""Memory is used again, and never while somebody may still read what lies in it."""

from threading import Barrier

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dde_cache import chunks
from dde_cache.chunks import Buffers, Chunks, in_threads
from dde_cache.errors import CacheError

ROWS = 4


def reader(sizes):
    """Chunks of the place's own number, in as many bytes as `sizes` says; and the places that were read."""
    read = []

    def make(place, allocate):
        read.append(place)
        content = allocate(sizes[place])
        content[:] = place
        return content

    return make, read


@given(st.integers(0, 2**32), st.integers(1, 3000))
def test_batches_hold_the_right_rows_whatever_memory_was_used_again(seed, budget):
    random = np.random.default_rng(seed)
    sizes = random.integers(100, 900, 12)
    make, read = reader(sizes)
    held = Chunks(make, lambda place: ROWS, budget)
    for _ in range(3):
        rows = random.permutation(np.repeat(np.arange(len(sizes)), ROWS))
        for batch in np.array_split(rows, 6):
            places, counts = np.unique(batch, return_counts=True)
            loaded = held.load(places.tolist())
            # All of a batch's chunks at once: memory given to one of them must not be another's.
            for place, content in loaded.items():
                assert len(content) == sizes[place]
                assert (content == place).all()
            held.taken(dict(zip(places.tolist(), counts.tolist(), strict=True)))
    assert set(read) == set(range(len(sizes)))


def test_memory_of_a_chunk_goes_to_the_next_when_all_its_rows_were_taken():
    make, read = reader({0: 100, 1: 100, 2: 100})
    held = Chunks(make, lambda place: ROWS)
    first = held.load([0])[0]
    held.taken({0: ROWS - 1})
    assert not np.shares_memory(held.load([1])[1], first)
    assert held.load([0])[0] is first
    held.taken({0: 1})
    assert np.shares_memory(held.load([2])[2], first)
    assert read == [0, 1, 2]
    held.load([0])
    assert read == [0, 1, 2, 0], "what was let go is read again"


def test_the_chunk_used_longest_ago_goes_where_the_budget_is_spent():
    make, read = reader(dict.fromkeys(range(4), 100))
    held = Chunks(make, lambda place: ROWS, 250)
    for places in ([0, 1], [0], [2], [0], [1]):
        held.load(places)
        held.taken(dict.fromkeys(places, 0))
    assert read == [0, 1, 2, 1]


def test_a_batch_may_need_more_than_the_budget():
    make, _ = reader(dict.fromkeys(range(4), 100))
    loaded = Chunks(make, lambda place: ROWS, 150).load([0, 1, 2, 3])
    assert [int(content[0]) for content in loaded.values()] == [0, 1, 2, 3]


def test_chunks_are_read_in_threads(monkeypatch):
    monkeypatch.setattr(chunks, "THREADS", 2)
    together = Barrier(2, timeout=30)
    assert in_threads(lambda number: together.wait() >= 0 and number, [1, 2]) == [1, 2]


def test_an_error_in_a_thread_reaches_the_caller_and_leaves_nothing_behind():
    def make(place, allocate):
        if place == 1 and broken:
            raise CacheError("chunk 1 is damaged")
        return place

    broken = True
    held = Chunks(make, lambda place: ROWS)
    with pytest.raises(CacheError, match="chunk 1 is damaged"):
        held.load([0, 1, 2])
    broken = False
    assert held.load([0, 1, 2]) == {0: 0, 1: 1, 2: 2}


def test_buffers_are_neither_too_small_nor_much_too_large():
    buffers = Buffers()
    buffers.give([np.empty(size, np.uint8) for size in (100, 150, 400)], 10**6)
    assert buffers.take(120).nbytes == 150
    assert buffers.take(120).nbytes == 120, "400 bytes are left for those who need them"
    assert buffers.take(300).nbytes == 400
    buffers.give([np.empty(100, np.uint8), np.empty(200, np.uint8)], 200)
    assert buffers.take(90).nbytes == 90, "the oldest went"
    assert buffers.take(150).nbytes == 200
