"""What a study compares: cells, each one change away from the default cell, and the order in which they run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dde_cache.errors import InputError

DEFAULT = "default"
"""Soft labels and attention of both directions, from a cache of every key in one byte."""

FAMILIES = {
    "ablation": "what is learned from: labels, soft labels, one direction, the whole sequence, hidden states",
    "online": "targets from the cache, or from the teacher at every step",
    "keys": "how many keys of a row are kept, and how what was dropped counts",
    "labels": "labels on few pictures, targets on all",
    "views": "few pictures, with views of each",
}
"""Families of cells by name."""


@dataclass(frozen=True)
class Cell:
    """One way of training a student.

    Attributes:
        name: also of its files.
        family: one of `FAMILIES`; the default cell belongs to every one.
        importance: 1 for what a claim needs, 2 for what stands beside it.
        train: changes to the default cell's training settings.
        extract: changes to its extraction.
        targets: where the teacher's signals come from.
        labelled: share of the pictures that have labels; None: all.
        pictures: share of the pictures that are there; None: all.
        base: the cell that it is compared with.
    """

    name: str
    family: str
    importance: int = 1
    train: Mapping[str, Any] = field(default_factory=dict)
    extract: Mapping[str, Any] = field(default_factory=dict)
    targets: Literal["cache", "online", "none"] = "cache"
    labelled: float | None = None
    pictures: float | None = None
    base: str = DEFAULT


LABELS_ALONE = {"hard_weight": 1.0, "soft_weight": 0.0, "attention_weight": 0.0}
HIDDEN_ALONE = {"attention_weight": 0.0, "hidden_weight": 1.0}
FEW = 0.1
"""Share of the pictures in the family `views`: a view is drawn once an epoch, so few pictures want many."""


def _labels(share: float) -> tuple[Cell, Cell]:
    percent = f"{share * 100:g}%"
    return (
        Cell(f"{percent} labels", "labels", 2, LABELS_ALONE, targets="none", labelled=share),
        Cell(f"{percent} labels + cache", "labels", 2, {"hard_weight": 1.0}, labelled=share, base=f"{percent} labels"),
    )


def _kept(name: str, importance: int = 2, tail: str = "bucket", **extract: Any) -> Cell:
    return Cell(name, "keys", importance, {"tail": tail}, extract, base=LOSSLESS)


LABELS = "labels alone"
LOSSLESS = "lossless"
TOP_8 = "top-8"
TOP_8_EVEN = "top-8, even tail"

CELLS = (
    Cell(DEFAULT, "ablation"),
    Cell(LABELS, "ablation", 1, LABELS_ALONE, targets="none"),
    Cell("soft labels", "ablation", 1, {"attention_weight": 0.0}),
    Cell("t2i alone", "ablation", 1, {"directions": "t2i"}),
    Cell("i2t alone", "ablation", 1, {"directions": "i2t"}),
    Cell("online teacher", "online", 1, targets="online"),
    Cell(LOSSLESS, "keys", 1, extract={"weights": "float32", "k": None}),
    _kept(TOP_8, 1, k=8),
    _kept(TOP_8_EVEN, 1, tail="uniform", k=8),
    Cell("whole attention", "ablation", 2, {"attention": "whole"}, {"targets": ("cross", "whole")}),
    Cell("hidden states", "ablation", 2, HIDDEN_ALONE, {"targets": ("cross", "hidden")}),
    *(_kept(f"top-{k}", k=k) for k in (1, 2, 4, 16)),
    _kept("all, log8", k=None, weights="log8"),
    _kept("mass 0.9", mass=0.9, k=32),
    _kept("mass 0.98", mass=0.98, k=32),
    _kept("top-4, even tail", tail="uniform", k=4),
    _kept("top-4, no tail", tail="renormalise", k=4),
    Cell("all labels + cache", "labels", 2, {"hard_weight": 1.0}, base=LABELS),
    *_labels(0.1),
    *_labels(0.01),
    Cell("few pictures", "views", 2, pictures=FEW),
    *(
        Cell(f"few, {views} view{'s'[: views > 1]}", "views", 2, {}, {"views": views, "view": "randaugment-2-9"},
             pictures=FEW, base="few pictures")
        for views in (1, 4, 16)
    ),
)  # fmt: skip
"""Every cell, the important ones first; a cell comes after the one that it is compared with."""


@dataclass(frozen=True)
class Run:
    """One cell with one seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """As the name of a file."""
        words = self.cell.name.replace("%", "-percent").replace("+", "and").replace(",", "").replace(".", "-")
        return f"{'-'.join(words.split())}.{self.seed}"


def chosen(families: Sequence[str] | None = None, names: Sequence[str] = ()) -> tuple[Cell, ...]:
    """The cells of some families and some by name, with the default cell and those that they are compared with.

    Args:
        families: of `FAMILIES`; None: all, or none where there are names.
        names: of cells.

    Raises:
        InputError: there is no such family, or no such cell.
    """
    unknown = sorted(set(families or ()) - set(FAMILIES))
    if unknown or (families is not None and not families):
        raise InputError(f"expected families of {', '.join(FAMILIES)}, got {', '.join(unknown) or 'none'}")
    strange = sorted(set(names) - {cell.name for cell in CELLS})
    if strange:
        known = "; ".join(cell.name for cell in CELLS)
        raise InputError(f"expected a cell of {known}; got {'; '.join(strange)}")
    whole = () if families is None and names else families or tuple(FAMILIES)
    asked = {cell.name for cell in CELLS if cell.family in whole} | {DEFAULT, *names}
    for cell in reversed(CELLS):
        if cell.name in asked:
            asked.add(cell.base)
    return tuple(cell for cell in CELLS if cell.name in asked)


def ordered(cells: Sequence[Cell], seeds: int) -> tuple[Run, ...]:
    """Runs in their order: what claims need first; within one importance all cells with one seed, then with the next.

    So whatever a budget cuts off, the cells that are compared have the same seeds, give or take one.
    """
    levels = sorted({cell.importance for cell in cells})
    return tuple(
        Run(cell, seed) for level in levels for seed in range(seeds) for cell in cells if cell.importance == level
    )
