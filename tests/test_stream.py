"""The order of pairs is a pure function of (seed, epoch), complete, local, and resumable from any step."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dde_cache.stream import CHUNK_PAIRS, BatchOrder, Pair, PairTable, Recent, Shuffle


def table_of(sizes):
    return PairTable([[(f"{shard}-{number}", 0) for number in range(size)] for shard, size in enumerate(sizes)])


def run(table, shuffle, batch_size, first, last):
    return list(BatchOrder(table, shuffle, batch_size, first, last))


sizes = st.lists(st.integers(1, 600), min_size=1, max_size=6)
shuffles = st.builds(Shuffle, st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))


def test_pairs_are_in_file_order():
    table = PairTable([[("a", 0), ("a", 1), ("b", 0)], [], [("c", 0)]])
    assert [table[number] for number in range(len(table))] == [
        Pair(0, "a", 0),
        Pair(0, "a", 1),
        Pair(0, "b", 0),
        Pair(2, "c", 0),
    ]
    assert [list(table.numbers(shard)) for shard in range(3)] == [[0, 1, 2], [], [3]]


@given(sizes, shuffles, st.integers(0, 3))
def test_an_epoch_has_every_pair_once(sizes, shuffle, epoch):
    table = table_of(sizes)
    numbers = np.concatenate(list(table.shuffled(shuffle, epoch)))
    assert sorted(numbers.tolist()) == list(range(len(table)))


@given(sizes, shuffles, st.integers(1, 64), st.data())
def test_resuming_gives_the_same_rest(sizes, shuffle, batch_size, data):
    table = table_of(sizes)
    batch_size = min(batch_size, len(table))
    an_epoch = len(table) // batch_size
    last = data.draw(st.integers(1, min(3 * an_epoch + 2, 60)))
    whole = run(table, shuffle, batch_size, 0, last)
    assert len(whole) == last
    assert all(len(batch) == batch_size for batch in whole)
    for epoch in range(last // an_epoch):
        seen = Counter(itertools.chain(*whole[epoch * an_epoch : (epoch + 1) * an_epoch]))
        assert set(seen.values()) == {1}
        assert len(seen) == len(table) - len(table) % batch_size, "only the tail that fills no batch is dropped"
    first = data.draw(st.integers(0, last))
    assert run(table, shuffle, batch_size, first, last) == whole[first:]
    assert len(BatchOrder(table, shuffle, batch_size, first, last)) == last - first


def test_seed_and_epoch_make_the_order():
    table = table_of([500, 500])
    orders = {
        (seed, epoch): np.concatenate(list(table.shuffled(Shuffle(seed), epoch))).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[0, 1] == np.concatenate(list(table.shuffled(Shuffle(0), 1))).tolist()


@pytest.mark.parametrize(("shards", "chunks"), [(1, 1), (2, 4), (3, 2)])
def test_a_window_touches_a_bounded_part(shards, chunks):
    """A reader needs the chunks of one window at a time, from a few neighbouring shards of the permuted order."""
    table = table_of([1100] * 7)
    windows = list(table.shuffled(Shuffle(3, shards, chunks), 0))
    owner = [{(number // 1100, number % 1100 // CHUNK_PAIRS) for number in window.tolist()} for window in windows]
    assert max(len(window) for window in windows) <= chunks * CHUNK_PAIRS
    assert max(len(places) for places in owner) <= chunks
    assert all(len({shard for shard, _ in places}) <= shards for places in owner)
    spans = {}
    for number, places in enumerate(owner):
        for shard, _ in places:
            spans.setdefault(shard, []).append(number)
    a_group = -(-5 * shards // chunks)  # windows in which a group of shards is used up
    assert max(max(span) - min(span) for span in spans.values()) < a_group
    assert {number for places in owner for number in places} == {(s, c) for s in range(7) for c in range(5)}


def test_pairs_are_mixed_within_a_window():
    (window,) = table_of([CHUNK_PAIRS]).shuffled(Shuffle(0), 0)
    moved = np.abs(np.argsort(window) - np.arange(CHUNK_PAIRS)).mean()
    assert moved > CHUNK_PAIRS / 6  # a third is expected of a uniform permutation


def test_recent_keeps_within_its_budget():
    made = []

    def make(key):
        made.append(key)
        return key

    recent = Recent(make, lambda value: 10, 25)
    assert [recent(key) for key in "abacab"] == list("abacab")
    assert made == ["a", "b", "c", "b"]
    big = Recent(make, lambda value: 100, 25)
    assert big("x") == big("x")
