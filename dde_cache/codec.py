"""Attention maps <-> the integer arrays on disk: whole rows (`EncodedDense`) or the strongest keys (`EncodedSparse`).

`sqrt8` keeps every key: round(steps * sqrt(w)) in one byte, in the order of the keys. The steps are even in sqrt(w)
because KL divergence is, to second order, the squared distance of square roots: so each code costs the loss about as
much as any other. (Steps even in log w spend most bits on weights that hardly count; top-k drops what the loss sums
up; docs/benchmarks.md has the measurements.) The other codecs store sparse rows.

`log8` stores round(-16 log2 w) in one byte: steps of 1/16 octave, so a kept weight is off by at most 2.2 % (weights
below 2^-15.875 are raised to it), before the row is scaled so that kept + tail = 1 exactly as `SparseAttention`
promises. Weights fall along the slots, so the codes rise, and their differences, which compress better, are what is
stored. Code 255 is an empty slot.

Of tail and kept mass the smaller one is stored, the kept mass as a negative number: a float16 near 1 would leave a
small rest with a few bits.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dde_cache.attention import Attention, SparseAttention, densify
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
class EncodedSparse:
    """Sparse attention as it lies on disk; slots hold differences where the weights are `log8`."""

    index: Int[Tensor, "b h q s"]
    weight: Tensor
    tail: Float[Tensor, "b h q"]  # the tail mass, or minus the kept mass

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """The tensors by the name of their array."""
        return {"index": self.index, "weight": self.weight, "tail": self.tail}

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(part.nbytes for part in self.parts.values())

    def records(self, rows: Tensor) -> "EncodedSparse":
        """Some records, by number."""
        return EncodedSparse(self.index[rows], self.weight[rows], self.tail[rows])

    def cut(self, queries: int, keys: int) -> "EncodedSparse":
        """The first query rows, and the slots and the index type that so many valid keys can need."""
        index, weight = (part[:, :, :queries, :keys] for part in (self.index, self.weight))
        return EncodedSparse(index.to(index_dtype(keys)), weight, self.tail[:, :, :queries])

    def pad_to(self, queries: int, slots: int) -> "EncodedSparse":
        """Extend the query and slot axes with empty slots."""
        if (queries, slots) == tuple(self.index.shape[2:]):
            return self
        add_queries, add_slots = queries - self.index.shape[2], slots - self.index.shape[3]
        index = nn.functional.pad(self.index, (0, add_slots, 0, add_queries))
        tail = nn.functional.pad(self.tail, (0, add_queries))
        if self.weight.dtype != torch.uint8:
            return EncodedSparse(index, nn.functional.pad(self.weight, (0, add_slots, 0, add_queries)), tail)
        code = nn.functional.pad(self.weight.to(torch.int16).cumsum(-1), (0, add_slots, 0, add_queries), value=EMPTY)
        return EncodedSparse(index, _steps(code), tail)


@dataclass(frozen=True)
class EncodedDense:
    """Whole attention rows as `sqrt8` codes, in the order of the keys; 0 where there is no key."""

    weight: Int[Tensor, "b h q k"]
    steps: int

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """The tensor by the name of its array."""
        return {"weight": self.weight}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.weight.nbytes

    def records(self, rows: Tensor) -> "EncodedDense":
        """Some records, by number."""
        return EncodedDense(self.weight[rows], self.steps)

    def cut(self, queries: int, keys: int) -> "EncodedDense":
        """The first query rows and keys."""
        return EncodedDense(self.weight[:, :, :queries, :keys], self.steps)

    def pad_to(self, queries: int, keys: int) -> "EncodedDense":
        """Extend the query and key axes with padding."""
        add_queries, add_keys = queries - self.weight.shape[2], keys - self.weight.shape[3]
        return EncodedDense(nn.functional.pad(self.weight, (0, add_keys, 0, add_queries)), self.steps)


EncodedAttention = EncodedSparse | EncodedDense
"""Attention of some records as it lies on disk."""


def index_dtype(keys: int) -> torch.dtype:
    """The narrowest type that holds every key position."""
    return torch.uint8 if keys <= 256 else torch.int16 if keys <= 2**15 else torch.int32


def encode(sparse: SparseAttention, weights: Weights, keys: int) -> EncodedSparse:
    """Quantise weights and narrow indices for a key axis of `keys` positions.

    float16 and log8 store the tail in float16, float32 in float32.
    """
    index = sparse.index.to(index_dtype(keys))
    kept = sparse.weight.sum(-1)
    tail = torch.where(kept < sparse.tail, -kept, sparse.tail).clamp(-0.5, 0.5)
    if weights == "float32":
        return EncodedSparse(index, sparse.weight.float(), tail.float())
    tail = tail.to(torch.float16)
    if weights == "float16":
        return EncodedSparse(index, sparse.weight.to(torch.float16), tail)
    octaves = torch.where(sparse.weight > 0, -torch.log2(sparse.weight.float()), 16.0)
    code = (octaves * STEPS_AN_OCTAVE).round().clamp(0, EMPTY - 1)
    code = torch.where(sparse.weight > 0, code, EMPTY).to(torch.int16)
    return EncodedSparse(index, _steps(code), tail)


def _steps(code: Int[Tensor, "b h q s"]) -> Int[Tensor, "b h q s"]:
    """Differences along the slots, the first one against 0; codes rise, so they fit one byte."""
    return torch.diff(code, dim=-1, prepend=code.new_zeros((*code.shape[:-1], 1))).to(torch.uint8)


def encode_dense(
    attention: Float[Tensor, "b h q k"], query_mask: Bool[Tensor, "b q"], key_mask: Bool[Tensor, "b k"], steps: int
) -> EncodedDense:
    """`sqrt8` codes of whole rows: 1 + round(steps * sqrt(w)), at most 254 steps; 0 for padded queries and keys."""
    code = (attention.sqrt() * steps).round().clamp_max(steps).to(torch.uint8) + 1
    return EncodedDense(torch.where(query_mask[:, None, :, None] & key_mask[:, None, None, :], code, 0), steps)


def decode(encoded: EncodedAttention) -> Attention:
    """Undo `encode` or `encode_dense` in float32. A row without any weight (padding of the arrays) becomes zeros."""
    return decode_dense(encoded) if isinstance(encoded, EncodedDense) else decode_sparse(encoded)


def decode_sparse(encoded: EncodedSparse) -> SparseAttention:
    """Undo `encode` in float32 and scale each row so that kept + tail = 1."""
    if encoded.weight.dtype == torch.uint8:
        code = encoded.weight.cumsum(-1, dtype=torch.int64).clamp_max(EMPTY)
        weight = _WEIGHT_OF_CODE.to(code.device).take(code)
    else:
        weight = encoded.weight.float()
    stored = encoded.tail.float()
    mass = torch.where(stored < 0, -stored, 1 - stored)[..., None]
    total = weight.sum(-1, keepdim=True)
    weight = torch.where(total > 0, weight * (mass / total.clamp_min(torch.finfo(total.dtype).tiny)), 0.0)
    return SparseAttention(encoded.index.long(), weight, torch.where(stored < 0, 1 + stored, stored))


def decode_dense(encoded: EncodedDense) -> Float[Tensor, "b h q k"]:
    """Undo `encode_dense` in float32 and scale each row to sum to 1."""
    rows = torch.from_numpy(weights_of_codes(encoded.steps)).to(encoded.weight.device)[encoded.weight.int()]
    return rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def weights_of_codes(steps: int) -> Float[np.ndarray, "256"]:
    """The weight of each `sqrt8` code in float32, before its row is scaled.

    A code stands for the mean weight of its step: (c^2 + 1/12) / steps^2. In the lowest step, where small weights
    crowd at 0, a quarter of that: 1 / (48 steps^2). Code 0 is no key.
    """
    level = np.arange(256) - 1.0
    weight = np.where(level > 0, level**2 + 1 / 12, 1 / 48) / steps**2
    weight[0] = 0
    return weight.astype(np.float32)


def ends_of_codes(steps: int) -> tuple[Float[np.ndarray, "256"], Float[np.ndarray, "256"]]:
    """The smallest and the largest weight that each `sqrt8` code can stand for: ((c -+ 1/2) / steps)^2."""
    level = np.arange(256) - 1.0
    least, most = (np.maximum(level - 0.5, 0) / steps) ** 2, ((level + 0.5) / steps) ** 2
    most[0] = 0
    return least.astype(np.float32), most.astype(np.float32)


def dense_rows(encoded: EncodedAttention, keys: int) -> Float[Tensor, "b h q k"]:
    """Decode to rows on an axis of `keys` positions; what was not kept is 0."""
    if isinstance(encoded, EncodedDense):
        return decode_dense(encoded.cut(encoded.weight.shape[2], keys).pad_to(encoded.weight.shape[2], keys))
    return densify(decode_sparse(encoded), keys)


def part_names(steps: int | None) -> tuple[str, ...]:
    """The arrays of one direction: those of whole rows (`steps` of `sqrt8`), or of sparse ones."""
    return ("index", "weight", "tail") if steps is None else ("weight",)


def steps_of(encoded: EncodedAttention) -> int | None:
    """Steps of whole rows; None of sparse ones."""
    return encoded.steps if isinstance(encoded, EncodedDense) else None


def from_parts(parts: Mapping[str, Tensor], steps: int | None) -> EncodedAttention:
    """Wrap the tensors of one direction, by the name of their array."""
    if steps is not None:
        return EncodedDense(parts["weight"], steps)
    return EncodedSparse(parts["index"], parts["weight"], parts["tail"])


def from_numpy(parts: Mapping[str, np.ndarray], steps: int | None) -> EncodedAttention:
    """Wrap arrays that were read from a unit, without a copy."""
    return from_parts({name: torch.from_numpy(part) for name, part in parts.items()}, steps)


def concatenate(maps: Sequence[EncodedAttention]) -> EncodedAttention:
    """Records of several maps, one behind the other, padded to the widest."""
    shapes = [one.weight.shape for one in maps]
    queries, width = (max(shape[axis] for shape in shapes) for axis in (2, 3))
    padded = [one.pad_to(queries, width).parts for one in maps]
    # Positions may be of several types: torch.cat takes the widest.
    parts = {name: torch.cat([one[name] for one in padded]) for name in padded[0]}
    return from_parts(parts, steps_of(maps[0]))


def blank(like: Collection[EncodedAttention], pairs: int, queries: int, keys: int) -> EncodedAttention:
    """Records of padding: of whole rows with `keys` keys, of sparse ones as wide as the widest of `like`."""
    first = next(iter(like))
    if isinstance(first, EncodedDense):
        shape = (pairs, first.weight.shape[1], queries, keys)
        return EncodedDense(torch.zeros(shape, dtype=torch.uint8), first.steps)
    sparse = [one for one in like if isinstance(one, EncodedSparse)]
    heads, slots = first.index.shape[1], max(one.index.shape[3] for one in sparse)
    widest = max((one.index.dtype for one in sparse), key=lambda dtype: dtype.itemsize)
    # Slots lie before heads in memory, as they do on disk.
    index = torch.zeros(pairs, slots, heads, queries, dtype=widest)
    weight = torch.zeros(pairs, slots, heads, queries, dtype=first.weight.dtype)
    if weight.dtype == torch.uint8:
        weight[:, 0] = EMPTY
    tail = torch.zeros(pairs, heads, queries, dtype=first.tail.dtype)
    return EncodedSparse(index.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1), tail)


def fill(into: EncodedAttention, numbers: Sequence[int], held: EncodedAttention, rows: Sequence[int]) -> None:
    """Copy records into places of blank ones, one copy a record; rows and keys that do not fit are left out."""
    if isinstance(held, EncodedSparse):
        held = held.pad_to(held.weight.shape[2], into.weight.shape[3])
    for name, part in held.parts.items():
        source, target = part.numpy(), into.parts[name].numpy()
        inside = tuple(slice(min(sizes)) for sizes in zip(source.shape[1:], target.shape[1:], strict=True))
        source, target = source[(slice(None), *inside)], target[(slice(None), *inside)]
        for number, row in zip(numbers, rows, strict=True):
            target[number] = source[row]
