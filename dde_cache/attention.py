"""Cross-modal attention as tensors: block softmax, top-k with its tail mass, and back to dense.

Axis names: b pairs, h heads, q query positions, k key positions, s kept slots, d head width. Everything here is a pure
function; nothing knows models or disks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dde_cache.errors import InputError


@dataclass(frozen=True)
class QueryKey:
    """Query and key projections of one attention block, for one modality."""

    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b h n d"]


@dataclass(frozen=True)
class SparseAttention:
    """The strongest keys of each attention row, and the mass of all the others.

    `weight` is sorted in descending order along the slots. A slot with weight 0 is empty (its index is then 0 and means
    nothing): a row with fewer valid keys than slots keeps them all. `weight.sum(-1) + tail == 1` on every query row
    that is kept, up to rounding.
    """

    index: Int[Tensor, "b h q s"]
    weight: Float[Tensor, "b h q s"]
    tail: Float[Tensor, "b h q"]

    def rows(self, position: Int[Tensor, "b n"]) -> "SparseAttention":
        """Return the query rows at `position`, in that order (rows may repeat)."""
        heads, slots = self.index.shape[1], self.index.shape[3]
        rows = position[:, None, :].expand(-1, heads, -1)
        slotted = rows[..., None].expand(-1, -1, -1, slots)
        return SparseAttention(self.index.gather(2, slotted), self.weight.gather(2, slotted), self.tail.gather(2, rows))


Attention = SparseAttention | Tensor
"""What is known of some rows: the strongest keys, or every key, as rows [b, h, q, k] that sum to 1."""


def query_rows(attention: Attention, position: Int[Tensor, "b n"]) -> Attention:
    """Return the query rows at `position`, in that order (rows may repeat)."""
    if isinstance(attention, SparseAttention):
        return attention.rows(position)
    heads, keys = attention.shape[1], attention.shape[3]
    return attention.gather(2, position[:, None, :, None].expand(-1, heads, -1, keys))


def mean_over_heads(attention: Attention, keys: int) -> Attention:
    """The mean of the heads' rows on an axis of `keys` positions; of sparse rows every key must have been kept.

    Rows that are a mean already come back as they are, with the tail mass of sparse ones.
    """
    if (attention.weight if isinstance(attention, SparseAttention) else attention).shape[1] == 1:
        return attention
    rows = densify(attention, keys) if isinstance(attention, SparseAttention) else attention
    return rows.mean(1, keepdim=True)


def attention_logits(
    query: Float[Tensor, "b h q d"], key: Float[Tensor, "b h k d"], scale: float
) -> Float[Tensor, "b h q k"]:
    """Scaled dot products in fp32, whatever the inputs are in and inside autocast too."""
    with torch.autocast(query.device.type, enabled=False):
        return query.float() @ key.float().transpose(-1, -2) * scale


def mask_keys(logits: Float[Tensor, "b h q k"], key_mask: Bool[Tensor, "b k"]) -> Float[Tensor, "b h q k"]:
    """Put the lowest finite value where a key is padding: the softmax there is exactly 0 and no gradient is NaN."""
    return logits.masked_fill(~key_mask[:, None, None, :], torch.finfo(logits.dtype).min)


def block_softmax(
    query: Float[Tensor, "b h q d"], key: Float[Tensor, "b h k d"], key_mask: Bool[Tensor, "b k"], scale: float
) -> Float[Tensor, "b h q k"]:
    """Attention of one modality's queries over the other modality's valid keys alone, in fp32.

    Equals the block of the whole-sequence attention divided by its row sum (DiDE, arXiv 2112.08723, P_t2i and P_i2t).
    """
    return mask_keys(attention_logits(query, key, scale), key_mask).softmax(-1)


def valid_first(mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Positions of each row with the valid ones first, otherwise in their order."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)


def sparsify(attention: Float[Tensor, "b h q k"], k: int | None, mass: float | None = None) -> SparseAttention:
    """Keep the strongest weights of each row and sum up the rest as tail mass.

    Args:
        attention: rows that sum to 1; padded keys hold exactly 0.
        k: number of slots; at most the key axis. None: as many as there are keys.
        mass: keep only as many of the `k` as a row needs for this much mass, at least one. None: all of them.

    Raises:
        InputError: `k` is below 1 or above the key axis, or `mass` is not in (0, 1].
    """
    keys = attention.shape[-1]
    slots = keys if k is None else k
    if not 1 <= slots <= keys:
        raise InputError(f"k must be between 1 and the key axis of {keys}, got {k}")
    if mass is not None and not 0 < mass <= 1:
        raise InputError(f"mass must be above 0 and at most 1, got {mass}")
    weight, index = attention.topk(slots, dim=-1, sorted=True)
    # Summing what is left, rather than 1 - kept, makes the tail exactly 0 where every key is kept.
    tail = attention.scatter(-1, index, 0.0).sum(-1)
    if mass is not None:
        enough = weight.cumsum(-1) - weight >= mass
        tail = tail + torch.where(enough, weight, 0.0).sum(-1)
        weight = torch.where(enough, 0.0, weight)
    return SparseAttention(torch.where(weight > 0, index, 0), weight, tail)


def densify(sparse: SparseAttention, keys: int) -> Float[Tensor, "b h q k"]:
    """Put the kept weights back on an axis of `keys` positions; what was not kept is 0."""
    shape = (*sparse.index.shape[:-1], keys)
    dense = torch.zeros(shape, dtype=sparse.weight.dtype, device=sparse.weight.device)
    return dense.scatter_add(-1, sparse.index.long(), sparse.weight)
