"""What a study shows: a row for each cell, and a verdict on each claim, from the answers that were kept."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from dde_cache.cells import CELLS, DEFAULT, LABELS, LOSSLESS, TOP_8, TOP_8_EVEN, Cell
from dde_cache.equivalence import Difference, Requirements, Verdict, paired_difference
from dde_cache.outcomes import Outcomes
from dde_cache.spec import Model

ClaimVerdict = Literal["established", "refuted", "undecided", "not enough data"]
"""Undecided: there is as much as was asked for, and it does not decide."""

KEPT_SHARE = 0.99
"""Of the teacher's accuracy, which the distilled student keeps."""


KEPT = (
    ("", DEFAULT, LABELS),
    ("with 10% of labels, ", "10% labels + cache", "10% labels"),
    ("with 1% of labels, ", "1% labels + cache", "1% labels"),
)
"""Students with and without a teacher: without labels beside one with all; then both with the same few."""

NOTHING = "no runs of both sides"


class StudyRow(Model):
    """One cell over its seeds; `groups` and `kinds` are mean accuracies; `difference` is to the cell `base`."""

    cell: str
    family: str
    seeds: int
    accuracy: float
    deviation: float | None
    lowest: float
    highest: float
    groups: dict[str, float]
    kinds: dict[str, float]
    bytes_a_pair: float | None
    base: str
    difference: Difference | None
    verdict: Verdict | None


class Claim(Model):
    """A claim with its verdict, and the numbers that it rests on in words; `measured`: whether there are any."""

    claim: str
    verdict: ClaimVerdict
    because: str
    measured: bool = True


class SkippedRun(Model):
    """A run that was not made."""

    cell: str
    seed: int
    why: str


class StudyReport(Model):
    """What `dde-cache study` prints with `--json`, and keeps as `report.json`; `codes`: how many states of the code
    made its runs."""

    testbed: str
    questions: int
    pictures: int
    needs: Requirements
    teacher: float
    teacher_groups: dict[str, float]
    rows: tuple[StudyRow, ...]
    claims: tuple[Claim, ...]
    proves_nothing: bool | None
    codes: int = 1
    skipped: tuple[SkippedRun, ...] = ()


class _Comparison:
    """Differences between cells over the seeds that both have."""

    def __init__(self, outcomes: Outcomes, needs: Requirements) -> None:
        self._correct, self._teacher = outcomes.correct, outcomes.teacher
        self._picture, self.needs = outcomes.questions.picture, needs

    def between(self, cell: str, base: str) -> Difference | None:
        """Accuracy of a cell minus that of another; None without a seed that both have."""
        mine, other = self._correct.get(cell, {}), self._correct.get(base, {})
        seeds = sorted(mine.keys() & other.keys())
        if not seeds:
            return None
        return paired_difference([_minus(mine[seed], other[seed]) for seed in seeds], self._picture)

    def teacher(self, cell: str, share: float = 1.0) -> Difference | None:
        """Accuracy of a cell minus a share of the teacher's."""
        mine = self._correct.get(cell, {})
        if not mine:
            return None
        return paired_difference([_minus(mine[seed], self._teacher, share) for seed in sorted(mine)], self._picture)


def _minus(one: Bool[np.ndarray, " n"], other: Bool[np.ndarray, " n"], share: float = 1.0) -> np.ndarray:
    return one.astype(float) - share * other.astype(float)


def study_report(
    testbed: str,
    outcomes: Outcomes,
    needs: Requirements,
    groups: Mapping[str, Sequence[str]],
    skipped: Sequence[SkippedRun] = (),
) -> StudyReport:
    """Sum up what is finished.

    Args:
        testbed: its name.
        outcomes: what is finished.
        needs: what a verdict needs.
        groups: kinds of questions by the name under which they are shown.
        skipped: runs that were not made.
    """
    compare = _Comparison(outcomes, needs)
    kind = outcomes.questions.kind
    shown = {name: np.isin(kind, kinds) for name, kinds in groups.items() if np.isin(kind, kinds).any()}
    plain = compare.teacher(LABELS)
    return StudyReport(
        testbed=testbed,
        questions=len(outcomes.teacher),
        pictures=len(np.unique(outcomes.questions.picture)),
        needs=needs,
        teacher=float(outcomes.teacher.mean()),
        teacher_groups={name: float(outcomes.teacher[rows].mean()) for name, rows in shown.items()},
        rows=tuple(_row(cell, outcomes, compare, shown) for cell in CELLS if outcomes.results.get(cell.name)),
        claims=(*_directions(compare), _cached(compare), *_top_8(compare), *(_kept(compare, *pair) for pair in KEPT)),
        proves_nothing=plain.equal_low > -needs.margin if plain is not None and plain.enough(needs) else None,
        skipped=tuple(skipped),
        codes=len({one.code for seeds in outcomes.results.values() for one in seeds.values()}),
    )


def _row(
    cell: Cell, outcomes: Outcomes, compare: _Comparison, groups: Mapping[str, Bool[np.ndarray, " n"]]
) -> StudyRow:
    results, correct = outcomes.results[cell.name].values(), list(outcomes.correct[cell.name].values())
    accuracy = np.array([answers.mean() for answers in correct])
    difference = compare.between(cell.name, cell.base) if cell.base != cell.name else None
    kept = [one.bytes_a_pair for one in results if one.bytes_a_pair is not None]
    kinds = np.unique(outcomes.questions.kind)
    return StudyRow(
        cell=cell.name,
        family=cell.family,
        seeds=len(accuracy),
        accuracy=float(accuracy.mean()),
        deviation=float(accuracy.std(ddof=1)) if len(accuracy) > 1 else None,
        lowest=float(accuracy.min()),
        highest=float(accuracy.max()),
        groups={name: float(np.mean([answers[rows].mean() for answers in correct])) for name, rows in groups.items()},
        kinds={
            str(kind): float(np.mean([answers[outcomes.questions.kind == kind].mean() for answers in correct]))
            for kind in kinds
        },
        bytes_a_pair=float(np.mean(kept)) if kept and len(kept) == len(results) else None,
        base=cell.base,
        difference=difference,
        verdict=None if difference is None else difference.verdict(compare.needs),
    )


def points(difference: Difference, *, equal: bool = False) -> str:
    """A difference in points of a hundred, with its interval of 95 %, or with `equal` of 90 %."""
    low, high = (difference.equal_low, difference.equal_high) if equal else (difference.low, difference.high)
    return f"{100 * difference.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _short_of(differences: Sequence[Difference], needs: Requirements) -> str:
    """Which requirement is not met, in words; empty where all are."""
    seeds, questions = (min(getattr(one, name) for one in differences) for name in ("seeds", "questions"))
    if seeds < needs.seeds:
        return f"; {seeds} of {needs.seeds} seeds"
    return f"; {questions:,} of {needs.questions:,} questions" if questions < needs.questions else ""


def _better(compare: _Comparison, base: str) -> Claim:
    """Both directions beat another cell; refuted where they surely gain less than the margin."""
    claim, needs = f"both directions beat {base}", compare.needs
    difference = compare.between(DEFAULT, base)
    if difference is None:
        return Claim(claim=claim, verdict="not enough data", because=NOTHING, measured=False)
    verdict: ClaimVerdict = "not enough data"
    if difference.enough(needs):
        small = difference.equal_high < needs.margin
        verdict = "refuted" if small else "established" if difference.low > 0 else "undecided"
    return Claim(claim=claim, verdict=verdict, because=points(difference) + _short_of([difference], needs))


def _directions(compare: _Comparison) -> tuple[Claim, ...]:
    return tuple(_better(compare, base) for base in ("t2i alone", "i2t alone", "soft labels", LABELS))


def _same(compare: _Comparison, claim: str, cell: str, base: str) -> Claim:
    """Two cells are equal; refuted where they surely differ by more than the margin."""
    needs, difference = compare.needs, compare.between(cell, base)
    if difference is None:
        return Claim(claim=claim, verdict="not enough data", because=NOTHING, measured=False)
    verdict: ClaimVerdict = "not enough data"
    if difference.enough(needs):
        apart = difference.low > needs.margin or difference.high < -needs.margin
        verdict = "established" if difference.verdict(needs) == "equal" else "refuted" if apart else "undecided"
    numbers = f"{points(difference, equal=True)} at 90 %, margin {100 * needs.margin:g}"
    return Claim(claim=claim, verdict=verdict, because=numbers + _short_of([difference], needs))


def _cached(compare: _Comparison) -> Claim:
    return _same(compare, "cached equals online", DEFAULT, "online teacher")


def _top_8(compare: _Comparison) -> tuple[Claim, ...]:
    return (
        _same(compare, "top-8 equals dense, its tail as one outcome", TOP_8, LOSSLESS),
        _same(compare, "top-8 equals dense, its tail spread evenly", TOP_8_EVEN, LOSSLESS),
    )


def _kept(compare: _Comparison, labels: str, distilled: str, undistilled: str) -> Claim:
    """The distilled student keeps a share of the teacher's accuracy, and the one without a teacher does not."""
    claim, needs = f"{labels}distilled keeps {KEPT_SHARE:.0%} of the teacher, undistilled does not", compare.needs
    with_teacher, without = (compare.teacher(name, KEPT_SHARE) for name in (distilled, undistilled))
    if with_teacher is None or without is None:
        return Claim(claim=claim, verdict="not enough data", because=NOTHING, measured=False)
    verdict: ClaimVerdict = "not enough data"
    if with_teacher.enough(needs) and without.enough(needs):
        kept, lost = with_teacher.low > 0, without.high < 0
        failed = with_teacher.high < 0 or without.low > 0
        verdict = "established" if kept and lost else "refuted" if failed else "undecided"
    because = f"distilled {points(with_teacher)} from {KEPT_SHARE:.0%} of it, undistilled {points(without)}"
    return Claim(claim=claim, verdict=verdict, because=because + _short_of([with_teacher, without], needs))
