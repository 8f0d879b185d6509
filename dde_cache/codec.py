"""Sparse attention <-> the integer arrays on disk.

`log8` stores round(-16 log2 w) in one byte: steps of 1/16 octave, so a kept weight is off by at most 2.2 % (weights
below 2^-15.875 are raised to it), before the row is scaled so that kept + tail = 1 exactly as `SparseAttention`
promises. Weights fall along the slots, so the codes rise, and their differences, which compress better, are what is
stored. Code 255 is an empty slot.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dde_cache.attention import SparseAttention
from dde_cache.spec import Weights

EMPTY = 255
"""`log8` code of a slot without a weight."""

STEPS_AN_OCTAVE = 16

# A table, because exp2 rounds by position in the tensor: one code, two weights.
_WEIGHT_OF_CODE = torch.exp2(torch.arange(EMPTY + 1, dtype=torch.float64) / -STEPS_AN_OCTAVE).float()
_WEIGHT_OF_CODE[EMPTY] = 0

RELATIVE_ERROR: dict[Weights, float] = {
    "log8": 2 ** (0.5 / STEPS_AN_OCTAVE) - 1,
    "float16": 2**-11,
    "float32": 0.0,
}
"""Largest relative error of one weight (above the smallest that the codec holds) before a row is rescaled."""


@dataclass(frozen=True)
class EncodedAttention:
    """Sparse attention as it lies on disk; slots hold differences where the weights are `log8`."""

    index: Int[Tensor, "b h q s"]
    weight: Tensor
    tail: Float[Tensor, "b h q"]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index, weight and tail."""
        return self.index, self.weight, self.tail

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(part.nbytes for part in self.parts)


def index_dtype(keys: int) -> torch.dtype:
    """The narrowest type that holds every key position."""
    return torch.uint8 if keys <= 256 else torch.int16 if keys <= 2**15 else torch.int32


def encode(sparse: SparseAttention, weights: Weights, keys: int) -> EncodedAttention:
    """Quantise weights and narrow indices for a key axis of `keys` positions.

    float16 and log8 store the tail in float16, float32 in float32.
    """
    index = sparse.index.to(index_dtype(keys))
    if weights == "float32":
        return EncodedAttention(index, sparse.weight.float(), sparse.tail.float())
    tail = sparse.tail.to(torch.float16)
    if weights == "float16":
        return EncodedAttention(index, sparse.weight.to(torch.float16), tail)
    octaves = torch.where(sparse.weight > 0, -torch.log2(sparse.weight.float()), 16.0)
    code = (octaves * STEPS_AN_OCTAVE).round().clamp(0, EMPTY - 1)
    code = torch.where(sparse.weight > 0, code, EMPTY).to(torch.int16)
    return EncodedAttention(index, _steps(code), tail)


def _steps(code: Int[Tensor, "b h q s"]) -> Int[Tensor, "b h q s"]:
    """Differences along the slots, the first one against 0; codes rise, so they fit one byte."""
    return torch.diff(code, dim=-1, prepend=code.new_zeros((*code.shape[:-1], 1))).to(torch.uint8)


def decode(encoded: EncodedAttention) -> SparseAttention:
    """Undo `encode` in float32 and scale each row so that kept + tail = 1.

    A row without any kept weight (padding of the arrays) decodes to zeros.
    """
    if encoded.weight.dtype == torch.uint8:
        code = encoded.weight.cumsum(-1, dtype=torch.int64).clamp_max(EMPTY)
        weight = _WEIGHT_OF_CODE.to(code.device).take(code)
    else:
        weight = encoded.weight.float()
    tail = encoded.tail.float()
    kept = weight.sum(-1, keepdim=True)
    weight = torch.where(kept > 0, weight * ((1 - tail[..., None]) / kept.clamp_min(torch.finfo(kept.dtype).tiny)), 0.0)
    return SparseAttention(encoded.index.long(), weight, tail)


def from_numpy(index: np.ndarray, weight: np.ndarray, tail: np.ndarray) -> EncodedAttention:
    """Wrap arrays that were read from a unit, without a copy."""
    return EncodedAttention(torch.from_numpy(index), torch.from_numpy(weight), torch.from_numpy(tail))


def blank(like: Collection[EncodedAttention], pairs: int, queries: int) -> EncodedAttention:
    """Records of padding, as wide as the widest of `like`; slots lie first in memory, as they do on disk."""
    first = next(iter(like))
    heads, slots = first.index.shape[1], max(one.index.shape[3] for one in like)
    widest = max((one.index.dtype for one in like), key=lambda dtype: dtype.itemsize)
    index = torch.zeros(slots, pairs, heads, queries, dtype=widest)
    weight = torch.zeros(slots, pairs, heads, queries, dtype=first.weight.dtype)
    if weight.dtype == torch.uint8:
        weight[0] = EMPTY
    tail = torch.zeros(pairs, heads, queries, dtype=first.tail.dtype)
    return EncodedAttention(index.permute(1, 2, 3, 0), weight.permute(1, 2, 3, 0), tail)


def pad_to(encoded: EncodedAttention, queries: int, slots: int) -> EncodedAttention:
    """Extend the query and slot axes with empty slots."""
    if (queries, slots) == tuple(encoded.index.shape[2:]):
        return encoded
    add_queries, add_slots = queries - encoded.index.shape[2], slots - encoded.index.shape[3]
    index = nn.functional.pad(encoded.index, (0, add_slots, 0, add_queries))
    tail = nn.functional.pad(encoded.tail, (0, add_queries))
    if encoded.weight.dtype != torch.uint8:
        return EncodedAttention(index, nn.functional.pad(encoded.weight, (0, add_slots, 0, add_queries)), tail)
    code = nn.functional.pad(encoded.weight.to(torch.int16).cumsum(-1), (0, add_slots, 0, add_queries), value=EMPTY)
    return EncodedAttention(index, _steps(code), tail)
