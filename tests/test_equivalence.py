"""Intervals of paired differences: against brute force and Student's t, and their coverage where the truth is known."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dde_cache.equivalence import Difference, Requirements, paired_difference
from dde_cache.errors import InputError


def simulated(random, seeds, pictures, asked, *, mean=0.0, seed_sd=0.0, picture_sd=0.0, noise_sd=0.0):
    """Differences [seeds, pictures x asked]: a truth, and what seeds, pictures and single answers add."""
    picture = np.repeat(np.arange(pictures), asked)
    table = (
        mean
        + random.normal(0, seed_sd, (seeds, 1))
        + random.normal(0, picture_sd, pictures)[picture][None]
        + random.normal(0, noise_sd, (seeds, pictures * asked))
    )
    return table, picture


@pytest.mark.parametrize(
    ("seeds", "spread"),
    [
        (5, {"seed_sd": 0.02}),
        (5, {"picture_sd": 0.3}),
        (5, {"noise_sd": 0.5}),
        (5, {"seed_sd": 0.02, "picture_sd": 0.2, "noise_sd": 0.5}),
        (3, {"seed_sd": 0.02, "noise_sd": 0.3}),
        (1, {"picture_sd": 0.3, "noise_sd": 0.3}),
    ],
    ids=str,
)
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, spread):
    """400 studies with a known truth, whose own standard error is 1.1 %; far more than 95 % would be an interval
    that is wider than it says."""
    random, truth, studies = np.random.default_rng(0), 0.013, 400
    covered = {"95": 0, "90": 0}
    for number in range(studies):
        table, picture = simulated(random, seeds, 60 if seeds > 1 else 200, 2, mean=truth, **spread)
        found = paired_difference(table, picture, seed=number, draws=800)
        covered["95"] += found.low <= truth <= found.high
        covered["90"] += found.equal_low <= truth <= found.equal_high
    assert 0.91 <= covered["95"] / studies <= 0.98
    assert 0.86 <= covered["90"] / studies <= 0.945


def test_with_one_seed_it_is_the_bootstrap_of_pictures_written_out():
    random = np.random.default_rng(1)
    sizes = random.integers(1, 6, 40)
    picture = np.repeat(np.arange(40), sizes)
    row = random.integers(-1, 2, len(picture)) + 0.2 * (picture % 3) + 5.0
    found = paired_difference([row], picture, draws=20_000)
    drawn = []
    for _ in range(4000):
        chosen = random.integers(40, size=40)
        rows = np.concatenate([row[picture == one] for one in chosen])
        drawn.append(rows.mean())
    assert found.mean == pytest.approx(row.mean())
    # Pictures differ in their number of questions, which the program linearises; hence the tolerance.
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert [found.equal_low, found.equal_high] == pytest.approx(np.quantile(drawn, [0.05, 0.95]), abs=0.03)


def test_pictures_are_drawn_as_clusters():
    """Six questions that always go together are one observation: the interval is sqrt(6) times as wide."""
    row = np.repeat(np.random.default_rng(2).choice([-1.0, 1.0], 100), 6)
    together = paired_difference([row], np.repeat(np.arange(100), 6))
    apart = paired_difference([row], np.arange(600))
    assert together.visible == pytest.approx(apart.visible * math.sqrt(6), rel=0.05)


@pytest.mark.parametrize(("seeds", "quantile"), [(5, 2.776), (10, 2.262), (20, 2.093)])
def test_seeds_alone_give_about_the_interval_of_student(seeds, quantile):
    """Student's t for `seeds` - 1 degrees of freedom, from a table; the bootstrap of five has no normal tails."""
    widths, expected = [], []
    for number in range(40):
        effects = np.random.default_rng(number).normal(0, 1, seeds)
        found = paired_difference(np.repeat(effects[:, None], 8, 1), np.arange(8), draws=4000)
        widths.append(found.visible)
        expected.append(quantile * statistics.stdev(effects) / math.sqrt(seeds))
    assert np.mean(widths) == pytest.approx(np.mean(expected), rel=0.06)


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    table, picture = simulated(np.random.default_rng(3), 4, 30, 3, seed_sd=0.1, noise_sd=1.0)
    assert paired_difference(table, picture, seed=5) == paired_difference(table, picture, seed=5)
    assert paired_difference(table, picture, seed=5) != paired_difference(table, picture, seed=6)


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 2**31))
def test_the_mean_is_over_questions_and_the_sign_is_a_sign(seeds, sizes, seed):
    picture = np.repeat(np.arange(len(sizes)), sizes)
    table = np.random.default_rng(seed).integers(-1, 2, (seeds, len(picture))).astype(float)
    found, turned = (paired_difference(one, picture, draws=200) for one in (table, -table))
    assert found.mean == pytest.approx(table.mean())
    assert turned.mean == pytest.approx(-found.mean)
    assert found.low <= found.equal_low <= found.equal_high <= found.high
    if seeds > 1:
        assert found.deviation == pytest.approx(statistics.stdev(table.mean(1)))
    else:
        assert found.deviation is None


def difference(low, high, seeds=5, questions=5000, shrunk=0.8):
    middle, half = (low + high) / 2, (high - low) / 2 * shrunk
    return Difference(
        mean=middle, deviation=0.0, low=low, high=high, equal_low=middle - half, equal_high=middle + half,
        seeds=seeds, questions=questions,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (difference(-0.012, 0.012), "equal"),
        (difference(0.001, 0.009), "equal"),
        (difference(-0.013, 0.013), "undecided"),
        (difference(0.001, 0.03), "different"),
        (difference(-0.03, -0.001), "different"),
        (difference(-0.002, 0.002, seeds=4), "not enough data"),
        (difference(-0.002, 0.002, questions=4999), "not enough data"),
    ],
)
def test_verdicts(given, verdict):
    assert given.verdict(Requirements()) == verdict


def test_the_smallest_difference_that_could_be_seen():
    assert difference(-0.01, 0.03).visible == pytest.approx(0.02)


@pytest.mark.parametrize("table", [np.zeros((0, 3)), np.zeros((2, 4)), np.zeros(3)])
def test_tables_that_are_none_are_refused(table):
    with pytest.raises(InputError, match="expected differences"):
        paired_difference(table, np.arange(3))
