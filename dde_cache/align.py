"""A student's attention on the teacher's axes, where the two cut pictures or texts into other tokens.

Both axes go through one linear map each, made from how much the tokens overlap. Keys: the mass on a student's token is
shared out over the teacher's tokens that it lies in (columns of the map sum to 1, so mass is kept). Queries: a row of
the teacher's is compared with the mean of the student's rows that it overlaps (rows of the map sum to 1). So what is
compared are again rows that sum to 1, of which only those steps of detail count that the teacher has.

Axes: t tokens of the teacher, s of the student.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dde_cache.attention import Attention, SparseAttention, attention_logits, mask_keys
from dde_cache.errors import InputError
from dde_cache.losses import log_attention
from dde_cache.towers.contract import PatchLayout
from dde_cache.vilt import image_tokens


@dataclass(frozen=True)
class AxisMap:
    """How much of each token of the student lies in each one of the teacher's; along an axis only proportions count."""

    overlap: Float[Tensor, "b t s"]

    @property
    def held(self) -> Bool[Tensor, "b t"]:
        """Tokens of the teacher that the student has something of."""
        return self.overlap.sum(-1) > 0

    @property
    def counted(self) -> Bool[Tensor, "b s"]:
        """Tokens of the student that the teacher has something of; the others stand outside the softmax."""
        return self.overlap.sum(-2) > 0

    def to_keys(self, rows: Float[Tensor, "b h q s"]) -> Float[Tensor, "b h q t"]:
        """Share out the mass of each row; none may lie on tokens that are not counted."""
        shares = self.overlap / self.overlap.sum(-2, keepdim=True).clamp_min(1)
        return rows @ shares.to(rows.dtype).transpose(-1, -2)[:, None]

    def to_queries(self, rows: Float[Tensor, "b h s k"]) -> Float[Tensor, "b h t k"]:
        """Average rows; 0 where a token of the teacher has none."""
        shares = self.overlap / self.overlap.sum(-1, keepdim=True).clamp_min(1)
        return shares.to(rows.dtype)[:, None] @ rows


@dataclass(frozen=True)
class Axes:
    """How the student's tokens stand to the teacher's.

    Attributes:
        image: where a tower that sees every picture at one size has its tokens; None: the teacher's own.
        text: whether batches say how other tokens of texts overlap (`token_overlap`).
        drop: whether tokens of the teacher that the student lacks are left out; otherwise there are none.
        same_grids: refuse pictures with another grid than the tower's, rather than resample.
    """

    image: PatchLayout | None = None
    text: bool = False
    drop: bool = False
    same_grids: bool = False

    @property
    def alike(self) -> bool:
        """Whether both have the same tokens."""
        return self.image is None and not self.text

    @property
    def lacks_cls(self) -> bool:
        """Whether the image tower has no CLS token."""
        return self.image is not None and not self.image.first

    def image_map(self, grid: Int[Tensor, "b 2"], device: torch.device) -> AxisMap | None:
        """That of a batch's pictures, with the teacher's patch rows and columns; None: the same tokens.

        Raises:
            InputError: grids differ, and none may.
        """
        if self.image is None:
            return None
        own = (self.image.rows, self.image.columns)
        if self.same_grids and (grid != torch.tensor(own)).any():
            other = next(tuple(one) for one in grid.tolist() if tuple(one) != own)
            raise InputError(
                f"expected pictures with the image tower's grid of {own[0]} x {own[1]} patches (grids: refuse), got "
                f"{other[0]} x {other[1]}; train with --grids resample, or resize the pictures"
            )
        return patch_map(grid, self.image, device)


ALIKE = Axes()
"""The teacher's own tokens on both sides."""


@lru_cache(maxsize=256)
def overlap_lengths(teacher: int, student: int) -> Int[Tensor, "t s"]:
    """How much of one side of a picture, cut into `student` equal parts, lies in each of `teacher` equal parts.

    Whole numbers, in units of one part in teacher x student: cells that only touch overlap by exactly 0.
    """
    own, other = torch.arange(teacher)[:, None] * student, torch.arange(student)[None] * teacher
    return (torch.minimum(own + student, other + teacher) - torch.maximum(own, other)).clamp(min=0)


@lru_cache(maxsize=256)
def _picture(rows: int, columns: int, layout: PatchLayout) -> Float[Tensor, "t s"]:
    """Overlaps of one picture's tokens: areas of cells, and CLS with CLS."""
    cells = torch.kron(overlap_lengths(rows, layout.rows), overlap_lengths(columns, layout.columns))
    overlap = torch.zeros(rows * columns + 1, layout.tokens)
    overlap[1:, layout.first :] = cells
    if layout.first:
        overlap[0, 0] = 1
    return overlap


def patch_map(grid: Int[Tensor, "b 2"], layout: PatchLayout, device: torch.device) -> AxisMap:
    """The map of pictures with [CLS; patches] of several grids to an image tower of one size.

    Both see the whole picture, so two cells overlap by the area that they share.

    Args:
        grid: the teacher's patch rows and columns, on the CPU.
        layout: of the tower; its first token, where it has any before the patches, is the CLS.
        device: where the map is wanted.
    """
    overlap = torch.zeros(len(grid), int(image_tokens(grid).max()), layout.tokens)
    for row, (height, width) in enumerate(grid.tolist()):
        overlap[row, : height * width + 1] = _picture(height, width, layout)
    return AxisMap(overlap.to(device))


def aligned_log(
    query: Float[Tensor, "b h m d"],
    key: Float[Tensor, "b h n d"],
    key_mask: Bool[Tensor, "b n"],
    queries: AxisMap | None,
    keys: AxisMap | None,
    *,
    mean_heads: bool = False,
) -> tuple[Float[Tensor, "b h q k"], Bool[Tensor, "b k"]]:
    """Log-probabilities of the student's attention on the teacher's axes, in fp32, and its keys that count.

    The softmax is over the student's own valid keys that the teacher has something of; then mass and rows are mapped.

    Args:
        query, key: of the student.
        key_mask: its valid keys.
        queries, keys: maps of both axes; None: the teacher's own tokens.
        mean_heads: average the probabilities over the heads; the head axis then has length 1.
    """
    if queries is None and keys is None:
        return log_attention(query, key, key_mask, mean_heads=mean_heads), key_mask
    valid = key_mask if keys is None else key_mask & keys.counted
    with torch.autocast(query.device.type, enabled=False):
        rows = mask_keys(attention_logits(query, key, query.shape[-1] ** -0.5), valid).softmax(-1)
        rows = rows.mean(1, keepdim=True) if mean_heads else rows
        rows = rows if keys is None else keys.to_keys(rows)
        rows = rows if queries is None else queries.to_queries(rows)
        held = key_mask if keys is None else keys.held
        return mask_keys(rows.clamp_min(torch.finfo(rows.dtype).tiny).log(), held), held


def without_keys(teacher: Attention, held: Bool[Tensor, "b k"]) -> Attention:
    """The teacher's rows over the keys that are `held` alone, with sum 1 again.

    What sparse rows hold of a dropped key in their tail is not known. So the tail is what it was, but at most the
    smallest kept weight for each held key that was not kept: nothing, where all of them were. A row that has nothing
    else is 0 everywhere, and adds nothing to a loss.
    """
    if not isinstance(teacher, SparseAttention):
        rows = torch.where(held[:, None, None, :], teacher, 0.0)
        return rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    there = held[:, None, None, :].expand(*teacher.index.shape[:3], -1).gather(-1, teacher.index.long())
    weight = torch.where(there, teacher.weight, 0.0)
    kept = teacher.weight > 0
    left = held.sum(-1)[:, None, None] - (there & kept).sum(-1)
    smallest = torch.where(kept, teacher.weight, torch.inf).amin(-1)
    tail = torch.where(left > 0, torch.minimum(teacher.tail, left * smallest), 0.0)
    total = (weight.sum(-1) + tail).clamp_min(torch.finfo(weight.dtype).tiny)
    return SparseAttention(teacher.index, weight / total[..., None], tail / total)
