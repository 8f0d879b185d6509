"""From the batches of a unit, encoded, to its arrays."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dde_cache.batches import PairDataset
from dde_cache.codec import EncodedAttention, concatenate, from_parts, steps_of
from dde_cache.encoder import Records
from dde_cache.partners import Partner, PartnerPool, PartnerSource, partner_arrays
from dde_cache.partners import Place as Place
from dde_cache.passes import pass_name
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Sample, Shard
from dde_cache.spec import (
    FORMAT_VERSION,
    HIDDEN,
    POOLED,
    WHOLE,
    Group,
    Provenance,
    TargetSpec,
    UnitAttributes,
    hash_keys,
)
from dde_cache.stream import PairTable
from dde_cache.unit import MapColumns, UnitArrays
from dde_cache.views import group_arrays, parse_recipe


def extraction_dataset(
    shards: Sequence[Shard],
    table: PairTable,
    preprocessor: Preprocessor,
    spec: TargetSpec,
    partners: PartnerSource | None = None,
) -> PairDataset:
    """What the teacher sees of some pairs, in their views and passes.

    Args:
        shards, table, preprocessor: as for `PairDataset`.
        spec: what is kept.
        partners: whose pictures the negative pass shows; None: chosen from the shards.

    Raises:
        InputError: a recipe of views or passes that this version cannot replay.
    """
    return PairDataset(
        shards,
        table,
        preprocessor,
        (),
        full_text=spec.queries == "all",
        recipe=parse_recipe(spec.view),
        hashes=True,
        passes=[pass_name(recipe) for recipe in spec.passes],
        partners=partners,
    )


def places(samples: Sequence[Sample], spec: TargetSpec) -> list[Place]:
    """Everything that a teacher sees of some samples, in a unit's order."""
    return [
        (number, slot, view, pass_number)
        for number, sample in enumerate(samples)
        for slot in range(len(sample.texts))
        for view in range(spec.views)
        for pass_number in range(len(spec.passes))
    ]


def partners_of(
    place: Sequence[Place], samples: Sequence[Sample], shard: str, spec: TargetSpec
) -> dict[Place, Partner]:
    """The partners of those places whose pass exchanges pictures.

    Args:
        place: in a unit.
        samples: all of the unit, by number.
        shard: its file name.
        spec: what is kept.

    Raises:
        InputError: no sample of the shard suits.
    """
    exchanging = {number for number, recipe in enumerate(spec.passes) if pass_name(recipe) == "negative"}
    if not exchanging:
        return {}
    pool = PartnerPool(shard, samples)
    return {
        (number, slot, view, pass_number): pool.pick(
            samples[number].key, slot, samples[number].texts[slot].text, view, spec.passes[pass_number]
        )
        for number, slot, view, pass_number in place
        if pass_number in exchanging
    }


def assemble(
    records: Sequence[Records],
    samples: Sequence[Sample],
    place: Sequence[Place],
    spec: TargetSpec,
    partners: Mapping[Place, Partner],
) -> UnitArrays:
    """Put the batches of a unit together, padded to its longest record, sorted as a unit is.

    Predictions are those of the matched pass: nothing is learned from answers to a text with gaps or beside a strange
    picture.

    Args:
        records: the batches, their rows in the order of `place`.
        samples: of the unit.
        place: what each row of the batches is of; in any order.
        spec: what is kept.
        partners: by place, of those rows that show another sample's picture.
    """
    order = torch.tensor(sorted(range(len(place)), key=place.__getitem__))
    sample, text, view, passes = torch.tensor(place)[order].T
    matched = passes == 0
    images, layers = len(records[0].grids), len(spec.layers)
    each = images * layers
    grid = torch.cat([torch.stack(record.grids, dim=1) for record in records])[order]
    longest = max(int(record.text_tokens.max()) for record in records)
    token_ids = torch.cat([_to_width(record.token_ids, longest) for record in records])[order]
    pairs = len(place)
    columns = MapColumns(
        sample=sample.repeat_interleave(each).numpy(),
        text=text.repeat_interleave(each).numpy(),
        image=torch.arange(images).repeat_interleave(layers).repeat(pairs).numpy(),
        view=view.repeat_interleave(each).numpy(),
        passes=passes.repeat_interleave(each).numpy(),
        layer=torch.tensor(spec.layers).repeat(images * pairs).numpy(),
        text_tokens=torch.cat([record.text_tokens for record in records])[order].repeat_interleave(each).numpy(),
        token_ids=token_ids.repeat_interleave(each, dim=0).numpy(),
        grid=grid.repeat_interleave(layers, dim=1).flatten(0, 1).numpy(),
    )
    longest_of = {"t2i": int(columns.image_tokens.max()), "i2t": longest}
    together = int((columns.text_tokens + columns.image_tokens).max())
    stacked = {
        name: _stack([record.rows[name] for record in records], order, keys=longest_of.get(name, together))
        for name in spec.rows
    }
    logits = [record.logits for record in records if record.logits is not None]
    hashes = [record.pixel_hashes for record in records if record.pixel_hashes is not None]
    further = partner_arrays(partners) if "partners" in spec.groups else {}
    if hashes:
        pixels = torch.cat(hashes)[order]
        further |= group_arrays(sample[matched].numpy(), view[matched].numpy(), pixels[matched].numpy())
    if records[0].states:
        further |= _state_arrays(records, order, {"text": longest, "image": longest_of["t2i"]})
    return UnitArrays(
        keys=[one.key for one in samples],
        content=np.stack([np.frombuffer(one.content_hash(), np.uint8) for one in samples]),
        maps=columns,
        t2i=stacked.get("t2i"),
        i2t=stacked.get("i2t"),
        prediction_sample=sample[matched].numpy(),
        prediction_text=text[matched].numpy(),
        logits=torch.cat(logits)[order][matched].numpy() if logits else None,
        prediction_view=view[matched].numpy(),
        further=further,
        whole={name: maps for name, maps in stacked.items() if name in ("t2w", "i2w")},
    )


def _to_length(states: Tensor, length: int) -> Tensor:
    """Cut or pad the tokens of hidden states or their scales; what is cut is padding."""
    missing = max(length - states.shape[1], 0)
    return nn.functional.pad(states[:, :length], (0, 0) * (states.dim() - 2) + (0, missing))


def _state_arrays(records: Sequence[Records], order: Tensor, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Batches of (image slot, layer) vectors -> the arrays of their groups, those of a pair together."""
    arrays = {}
    for name in records[0].states[0]:
        group, _, side = name.removesuffix("_scale").partition("/")
        held = [[one[name] for one in batch.states] for batch in records]
        if group == HIDDEN:
            held = [[_to_length(one, lengths[side]) for one in batch] for batch in held]
        arrays[name] = torch.cat([torch.stack(batch, dim=1) for batch in held])[order].flatten(0, 1).numpy()
    return arrays


def _to_width(ids: Tensor, width: int) -> Tensor:
    """Cut or pad token ids; what is cut is padding."""
    return nn.functional.pad(ids[:, :width], (0, max(width - ids.shape[1], 0)))


def _stack(batches: Sequence[Sequence[EncodedAttention]], order: Tensor, keys: int) -> EncodedAttention:
    """Batches of (image slot, layer) maps -> one array of records, those of a pair together; at most `keys` keys.

    Args:
        batches: of maps.
        order: which row of the batches comes first, second, ...
        keys: of the longest key axis.
    """
    maps = concatenate([one for batch in batches for one in batch])
    places, start = [], 0
    for batch in batches:
        pairs = len(batch[0].weight)
        places.append(start + torch.arange(len(batch) * pairs).reshape(len(batch), pairs).T)
        start += len(batch) * pairs
    rows = torch.cat(places)[order].flatten()
    stacked = maps.records(rows.to(maps.weight.device)).cut(maps.weight.shape[2], keys)
    return from_parts({name: part.cpu() for name, part in stacked.parts.items()}, steps_of(stacked))


def unit_attributes(
    arrays: UnitArrays, spec: TargetSpec, source: str, provenance: Provenance, assets: Mapping[str, str]
) -> UnitAttributes:
    """The attributes of a unit with these arrays.

    Args:
        arrays: as they are written.
        spec: what they mean.
        source: file name of the shard.
        provenance: how they came to be.
        assets: SHA-256 of each asset of the cache.
    """
    held = {"samples": True, "maps": arrays.maps is not None, "predictions": arrays.logits is not None}
    groups = {name: Group(required=True) for name, there in held.items() if there}
    for name, array in (("views", "pixels"), ("partners", "content"), (HIDDEN, "text"), (POOLED, "text")):
        if f"{name}/{array}" in arrays.further:
            groups[name] = Group(required=False)
    if arrays.whole:
        groups[WHOLE] = Group(required=False)
    return UnitAttributes(
        format_version=FORMAT_VERSION,
        spec=spec,
        fingerprint=spec.fingerprint,
        assets=dict(assets),
        source=source,
        samples=len(arrays.keys),
        pairs=len(set(zip(arrays.prediction_sample.tolist(), arrays.prediction_text.tolist(), strict=True))),
        keys=hash_keys(arrays.keys),
        groups=groups,
        provenance=provenance,
    )
