"""From the batches of a teacher's forward passes to the arrays of a unit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dde_cache.codec import EncodedAttention, pad_to
from dde_cache.samples import Sample
from dde_cache.spec import TargetSpec
from dde_cache.unit import MapColumns, UnitArrays


@dataclass(frozen=True)
class Records:
    """One batch on its way to the disk; the lists run over (image slot, layer)."""

    token_ids: Tensor
    text_tokens: Tensor
    grids: list[Tensor]
    t2i: list[EncodedAttention]
    i2t: list[EncodedAttention]
    logits: Tensor | None


def assemble(records: Sequence[Records], samples: Sequence[Sample], spec: TargetSpec) -> UnitArrays:
    """Put the batches of a unit together, padded to its longest record, sorted by (sample, text, image, layer)."""
    place = [(number, slot) for number, sample in enumerate(samples) for slot in range(len(sample.texts))]
    sample, text = (torch.tensor(column) for column in zip(*place, strict=True))
    images, layers = len(records[0].grids), len(spec.layers)
    each = images * layers
    grid = torch.cat([torch.stack(record.grids, dim=1) for record in records])
    longest = max(int(record.text_tokens.max()) for record in records)
    token_ids = torch.cat([_to_width(record.token_ids, longest) for record in records])
    pairs = len(place)
    columns = MapColumns(
        sample=sample.repeat_interleave(each).numpy(),
        text=text.repeat_interleave(each).numpy(),
        image=torch.arange(images).repeat_interleave(layers).repeat(pairs).numpy(),
        view=np.zeros(pairs * each, np.int64),
        passes=np.zeros(pairs * each, np.int64),
        layer=torch.tensor(spec.layers).repeat(images * pairs).numpy(),
        text_tokens=torch.cat([record.text_tokens for record in records]).repeat_interleave(each).numpy(),
        token_ids=token_ids.repeat_interleave(each, dim=0).numpy(),
        grid=grid.repeat_interleave(layers, dim=1).flatten(0, 1).numpy(),
    )
    logits = [record.logits for record in records if record.logits is not None]
    return UnitArrays(
        keys=[one.key for one in samples],
        content=np.stack([np.frombuffer(one.content_hash(), np.uint8) for one in samples]),
        maps=columns,
        t2i=_stack([record.t2i for record in records]),
        i2t=_stack([record.i2t for record in records]),
        prediction_sample=sample.numpy(),
        prediction_text=text.numpy(),
        logits=torch.cat(logits).numpy() if logits else None,
    )


def _to_width(ids: Tensor, width: int) -> Tensor:
    """Cut or pad token ids; what is cut is padding."""
    return nn.functional.pad(ids[:, :width], (0, max(width - ids.shape[1], 0)))


def _stack(batches: Sequence[Sequence[EncodedAttention]]) -> EncodedAttention:
    """Batches of (image slot, layer) maps -> one array of records, those of a pair together."""
    queries = max(one.index.shape[2] for batch in batches for one in batch)
    slots = max(one.index.shape[3] for batch in batches for one in batch)
    widest = max((one.index.dtype for batch in batches for one in batch), key=lambda dtype: dtype.itemsize)
    padded = [[pad_to(one, queries, slots) for one in batch] for batch in batches]
    parts = []
    for name in ("index", "weight", "tail"):
        stacked = [torch.stack([getattr(one, name) for one in batch], dim=1).flatten(0, 1) for batch in padded]
        parts.append(torch.cat(stacked).cpu())
    return EncodedAttention(parts[0].to(widest), parts[1], parts[2])
