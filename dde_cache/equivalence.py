"""Differences between students that were trained with the same seeds and tested on the same questions.

Two things are drawn by chance: the **seeds** (initialisation and order of the data, shared by the students that are
compared) and the **pictures** of the test set (whose questions belong together, so they are drawn as clusters). The
interval is a bootstrap over both at once, crossed, because every seed was tested on the same pictures.

Two corrections make it hold for few seeds. The bootstrap of n seeds has (n - 1) / n of their variance, and five seeds
say little about their own variance: their part is widened by sqrt(n / (n - 1)), and in each draw by
sqrt((n - 1) / chi2(n - 1)), which makes it Student's t where the seeds' differences are normal. And what differs from
picture to picture in the mean over the seeds is in part the seeds' own noise, which the seeds' part already has: the
pictures' part is shrunk by that share (the variance components of a table of seeds x pictures).

"Equal" is an equivalence test (two one-sided tests, Schuirmann 1987): the interval of confidence 1 - 2 alpha lies
within a margin that was fixed beforehand. "Different" is the usual one: the interval of 1 - alpha excludes zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, computed_field

from dde_cache.errors import InputError
from dde_cache.spec import Model

ALPHA = 0.05
DRAWS = 10_000
_BLOCK = 500

Verdict = Literal["equal", "different", "undecided", "not enough data"]


class Requirements(Model):
    """What a verdict needs, fixed before anything is measured."""

    margin: float = Field(default=0.01, gt=0, lt=1, allow_inf_nan=False)
    seeds: int = Field(default=5, ge=2, description="one seed says nothing of others")
    questions: int = Field(default=5000, ge=1)


class Difference(Model):
    """A mean difference of accuracies (or of what else each question gives), over the same seeds and questions.

    `deviation`: of the seeds' differences; None with one seed. `low`, `high`: the interval of 95 %. `equal_low`,
    `equal_high`: that of 90 %, which an equivalence at the level of 5 % reads. With one seed both are of the pictures
    alone.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    equal_low: float
    equal_high: float
    seeds: int
    questions: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def visible(self) -> float:
        """The smallest difference that could have been seen: half of the 95 % interval. A larger one excludes zero."""
        return (self.high - self.low) / 2

    def enough(self, needs: Requirements) -> bool:
        """Whether there are as many seeds and questions as a verdict needs."""
        return self.seeds >= needs.seeds and self.questions >= needs.questions

    def verdict(self, needs: Requirements) -> Verdict:
        """Equal (within the margin), different (zero is excluded), neither, or not enough data to say.

        A difference that is certain but surely smaller than the margin is equal: the margin was fixed for that.
        """
        if not self.enough(needs):
            return "not enough data"
        if -needs.margin < self.equal_low and self.equal_high < needs.margin:
            return "equal"
        return "different" if self.low > 0 or self.high < 0 else "undecided"


@dataclass(frozen=True)
class _Parts:
    """A table of differences taken apart: seeds, pictures, and the share of the pictures' part that is not noise."""

    mean: float
    seeds: Float[np.ndarray, " s"]
    pictures: Float[np.ndarray, " p"]
    shrink: float


def paired_difference(
    differences: Sequence[Float[np.ndarray, " n"]] | Float[np.ndarray, "s n"],
    picture: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Difference:
    """Mean difference with its intervals.

    Args:
        differences: for each seed, one minus the other on every question (-1, 0 or 1 for answers).
        picture: of each question.
        seed: of the bootstrap.
        draws: of the bootstrap.

    Raises:
        InputError: there are no seeds or questions, or lengths differ.
    """
    table = np.asarray(differences, np.float64)
    if table.ndim != 2 or not table.size or table.shape[1] != len(picture):
        raise InputError(f"expected differences [seeds, {len(picture)} questions], got {list(table.shape)}")
    parts = _take_apart(table, picture)
    found = parts.mean + _draw(parts, np.random.default_rng(seed), draws)
    low, high = np.quantile(found, [ALPHA / 2, 1 - ALPHA / 2])
    equal_low, equal_high = np.quantile(found, [ALPHA, 1 - ALPHA])
    return Difference(
        mean=parts.mean,
        deviation=float(table.mean(1).std(ddof=1)) if len(table) > 1 else None,
        low=float(low),
        high=float(high),
        equal_low=float(equal_low),
        equal_high=float(equal_high),
        seeds=len(table),
        questions=table.shape[1],
    )


def _take_apart(table: Float[np.ndarray, "s n"], picture: Int[np.ndarray, " n"]) -> _Parts:
    """Effects of seeds and pictures; a picture counts as much as it has questions."""
    _, place = np.unique(picture, return_inverse=True)
    count = np.bincount(place)
    seeds, pictures = len(table), len(count)
    sums = np.stack([np.bincount(place, row) for row in table])
    mean = float(table.mean())
    # What each picture adds to the mean over questions, times the number of pictures.
    shares = (sums - mean * count) * (pictures / table.shape[1])
    of_seed, of_picture = shares.mean(1), shares.mean(0)
    rest = shares - of_seed[:, None] - of_picture[None]
    shrink = 1.0
    spread = float(of_picture.var(ddof=1)) if pictures > 1 else 0.0
    if seeds > 1 and spread > 0:
        noise = float((rest**2).sum()) / ((seeds - 1) * (pictures - 1) * seeds)
        shrink = math.sqrt(max(0.0, 1 - noise / spread))
    return _Parts(mean, of_seed, of_picture, shrink)


def _draw(parts: _Parts, random: np.random.Generator, draws: int) -> Float[np.ndarray, " d"]:
    """Deviations from the mean in each draw of seeds and pictures with replacement."""
    seeds, pictures = len(parts.seeds), len(parts.pictures)
    found = np.zeros(draws)
    if seeds > 1:
        chosen = random.integers(seeds, size=(draws, seeds))
        wide = np.sqrt(seeds / random.chisquare(seeds - 1, draws))
        found += parts.seeds[chosen].mean(1) * wide
    wider = math.sqrt(pictures / max(pictures - 1, 1))
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        chosen = random.integers(pictures, size=(size, pictures))
        found[start : start + size] += parts.pictures[chosen].mean(1) * parts.shrink * wider
    return found
