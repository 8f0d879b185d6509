"""What stands between a student and a teacher of another shape: settled, or refused, before anything is trained."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.align import ALIKE, Axes
from dde_cache.attention import QueryKey
from dde_cache.choices import DistillConfig
from dde_cache.errors import InputError, TeacherError, bullet_list
from dde_cache.join import units_by_source
from dde_cache.samples import Shard
from dde_cache.spec import UnitEntry
from dde_cache.store import Cache
from dde_cache.student import DualEncoder
from dde_cache.tokens import TokenAligner
from dde_cache.towers.contract import Tower

_TEXTS = 512
"""Texts that are looked at together."""


@dataclass(frozen=True)
class Matched:
    """How a student stands to its teacher.

    Attributes:
        axes: its tokens.
        notes: what is not raw, in words for people.
    """

    axes: Axes = ALIKE
    notes: tuple[str, ...] = ()


class AttentionMaps(nn.Module):
    """Four linear maps, from queries and keys of both towers to some heads of one size; training alone has them.

    Args:
        text, image: the towers.
        heads, size: the teacher's.
    """

    def __init__(self, text: Tower, image: Tower, heads: int, size: int) -> None:
        super().__init__()
        self._heads = heads
        for side, tower in (("text", text), ("image", image)):
            for part in ("query", "key"):
                self.add_module(f"{side}_{part}", nn.Linear(tower.heads * tower.head_size, heads * size))

    def forward(self, side: str, raw: QueryKey) -> QueryKey:
        """Map the queries and keys of one side (`text` or `image`)."""
        return QueryKey(self._map(f"{side}_query", raw.query), self._map(f"{side}_key", raw.key))

    def _map(self, name: str, raw: Tensor) -> Tensor:
        mapped: Tensor = self.get_submodule(name)(raw.transpose(1, 2).flatten(2))
        return mapped.unflatten(-1, (self._heads, -1)).transpose(1, 2)


class Raw(nn.Module):
    """In the place of `AttentionMaps` where queries and keys are compared as they are."""

    def forward(self, _side: str, raw: QueryKey) -> QueryKey:
        """The same."""
        return raw


def heads_fit(student: DualEncoder, heads: int, *, mean_heads: bool) -> bool:
    """Whether queries and keys can be compared as they are: both towers with the teacher's heads (with `mean_heads`:
    with one number of them), and one head size."""
    text, image = student.towers
    number = image.heads if mean_heads else heads
    return text.head_size == image.head_size and text.heads == image.heads == number


def attention_maps(
    student: DualEncoder, teacher: ViltConfig, heads: int, pairs: int, *, mean_heads: bool
) -> list[nn.Module]:
    """The maps between a student and one teacher, one set for each pair of layers; `Raw` ones where its heads fit.

    Raises:
        TeacherError: twins of ViLT's shape have other heads than the teacher.
    """
    if heads_fit(student, heads, mean_heads=mean_heads):
        return [Raw() for _ in range(pairs)]
    if student.config.text is None and student.config.image is None:
        raise TeacherError(
            f"expected a student with the teacher's {heads} attention heads, got {student.towers[0].heads}; train with "
            "--heads mean to compare their averages"
        )
    size = teacher.hidden_size // teacher.num_attention_heads
    return [AttentionMaps(*student.towers, heads, size) for _ in range(pairs)]


def describe_maps(student: DualEncoder, heads: int, size: int) -> str:
    """What the maps are for."""
    text, image = student.towers
    return (
        f"attention heads: text {text.heads} x {text.head_size}, image {image.heads} x {image.head_size}, teacher "
        f"{heads} x {size}; compared through four learned linear maps, which the saved student does not have"
    )


def axes_of(student: DualEncoder, tokens: TokenAligner | None, config: DistillConfig) -> Axes:
    """How a student's tokens stand to the teacher's.

    Raises:
        InputError: they differ, and losses are asked for that have no meaning then; or the image tower has no CLS
            token, and nothing says to leave out the teacher's.
    """
    axes = Axes(
        image=student.image_tower.layout,
        text=tokens is not None,
        drop=config.missing_tokens == "drop",
        same_grids=config.grids == "refuse",
    )
    if config.states and len({tower.width for tower in student.towers}) > 1:
        kinds = " and ".join(f"{kind}_weight" for kind in config.states)
        raise InputError(f"expected {kinds} 0 for towers of two widths: one map serves both; leave it out")
    if axes.alike:
        return axes
    asked = {
        "attention whole": config.attention == "whole" and bool(config.attention_weight),
        "hidden_weight above 0": bool(config.hidden_weight),
        "remap_flips": config.remap_flips,
        "queries all": config.queries == "all",
    }
    wrong = [name for name, there in asked.items() if there]
    if wrong:
        which = " and ".join(name for name, there in (("pictures", axes.image), ("texts", axes.text)) if there)
        raise InputError(
            f"expected settings that suit a student with tokens of its own for {which}, got some that compare token by "
            f"token:{bullet_list(wrong)}"
        )
    if axes.lacks_cls and config.attention_weight and not axes.drop:
        raise InputError(
            "the teacher's pictures have a CLS token, but the image tower has none to compare it with; pass "
            "--missing-tokens drop to leave it out of rows and keys (what is left of a row then sums to 1)"
        )
    return axes


def describe_axes(student: DualEncoder, axes: Axes, grid: tuple[int, int]) -> list[str]:
    """What is mapped, and what is left out.

    Args:
        student: whose tokens they are.
        axes: of the student.
        grid: the teacher's patch rows and columns of the first picture.

    Raises:
        InputError: grids differ, and none may.
    """
    notes, layout = [], axes.image
    if layout is not None:
        axes.image_map(torch.tensor([grid]), torch.device("cpu"))
        if (layout.rows, layout.columns) != grid:
            notes.append(
                f"patch grids: the teacher's {grid[0]} x {grid[1]} (first picture), the image tower's {layout.rows} x "
                f"{layout.columns}; its attention is resampled by the areas that patches share"
            )
        if layout.first > 1:
            notes.append(f"{layout.first - 1} tokens of the image tower beside CLS and patches: outside the softmax")
        if not layout.first:
            notes.append("the teacher's CLS of pictures is left out: the image tower has none")
    if axes.text:
        notes.append("texts: the text tower has a tokenizer of its own; its attention is aligned by characters")
    return notes


def check_grids(shards: Sequence[Shard], caches: Sequence[Cache], axes: Axes) -> None:
    """Refuse other patch grids before the first step, where none may differ: units say the grid of every picture.

    Units of a cache behind a URL are not fetched for it; there a picture is refused when it comes, as with a teacher
    that is run beside the student.

    Raises:
        InputError: some pictures have another grid than the image tower.
    """
    if axes.image is None or not axes.same_grids:
        return
    own = (axes.image.rows, axes.image.columns)
    other: dict[str, tuple[int, ...]] = {}
    for cache in (one for one in caches if not one.streams):
        units = units_by_source(cache)
        for shard in shards:
            keys = set(shard.keys)
            for entry in units.get(shard.name, ()):
                other |= _other_grids(cache, entry, own, keys)
    if other:
        lines = [f"sample {key!r}: {rows} x {columns}" for key, (rows, columns) in other.items()]
        raise InputError(
            f"expected pictures with the image tower's grid of {own[0]} x {own[1]} patches (grids: refuse), but "
            f"{len(lines):,} samples have others:{bullet_list(lines)}\ntrain with --grids resample, or resize the "
            "pictures"
        )


def _other_grids(cache: Cache, entry: UnitEntry, own: tuple[int, int], keys: Set[str]) -> dict[str, tuple[int, ...]]:
    """Samples of a unit with another grid, and a grid of theirs."""
    unit = cache.unit(entry)
    try:
        names, maps = unit.keys, unit.maps
    finally:
        unit.close()
    rows = np.flatnonzero((maps.grid != np.array(own)).any(-1))
    found = {names[maps.sample[row]]: tuple(maps.grid[row].tolist()) for row in rows.tolist()}
    return {key: grid for key, grid in found.items() if key in keys}


def check_texts(shards: Sequence[Shard], tokens: TokenAligner, *, drop: bool) -> list[str]:
    """Look at every text, and say what the student does not read of it.

    Raises:
        InputError: the teacher's tokens of some have no counterpart, and they are not to be dropped.
    """
    lacking: list[str] = []
    number = cut = 0
    for texts in _texts(shards):
        found = tokens.lacking(texts)
        number += len(found)
        lacking += found[: 20 - len(lacking)]
        cut += tokens.cut(texts)
    if lacking and not drop:
        raise InputError(
            f"{number:,} tokens of the teacher have no counterpart in the text tower; pass --missing-tokens drop to "
            f"leave them out of rows and keys (what is left of a row then sums to 1):{bullet_list(lacking)}"
        )
    notes = [f"{number:,} tokens of texts are left out: the text tower has nothing of them"] if lacking else []
    length = tokens.student.text_length
    return notes + ([f"{cut:,} texts are longer than the {length} tokens that the text tower reads"] if cut else [])


def _texts(shards: Sequence[Shard]) -> Iterable[list[str]]:
    some: list[str] = []
    for shard in shards:
        for sample in shard:
            some += [text.text for text in sample.texts]
            if len(some) >= _TEXTS:
                yield some
                some = []
    if some:
        yield some
