"""From batches of pairs through the teacher to the arrays of a unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dde_cache.attention import SparseAttention, sparsify
from dde_cache.batches import Batch, PairDataset, pictures_of, to_device, tokens_of
from dde_cache.codec import EncodedAttention, concatenate, encode, encode_dense, from_parts, steps_of
from dde_cache.errors import InputError, TeacherError
from dde_cache.partners import Partner, PartnerPool, PartnerSource, partner_arrays
from dde_cache.partners import Place as Place
from dde_cache.passes import pass_name
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Sample, Shard
from dde_cache.spec import FORMAT_VERSION, Group, Provenance, TargetSpec, UnitAttributes, hash_keys
from dde_cache.stream import PairTable
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import MapColumns, UnitArrays
from dde_cache.views import group_arrays, parse_recipe
from dde_cache.vilt import image_tokens, token_mask


@dataclass(frozen=True)
class Records:
    """One batch on its way to the disk; the lists run over (image slot, layer)."""

    token_ids: Tensor
    text_tokens: Tensor
    grids: list[Tensor]
    t2i: list[EncodedAttention]
    i2t: list[EncodedAttention]
    logits: Tensor | None
    pixel_hashes: Tensor | None = None


@dataclass
class Kept:
    """Running sums over what was encoded."""

    pairs: int = 0
    mass: float = 0.0
    rows: int = 0
    dense_bytes: int = 0
    bytes: int = 0

    @property
    def mean(self) -> float | None:
        """Mean kept mass of a row."""
        return self.mass / self.rows if self.rows else None


class TargetEncoder:
    """From batches of pairs to encoded targets, through the teacher.

    Args:
        teacher: already on `device`.
        spec: what to keep.
        device: where the teacher is.
    """

    def __init__(self, teacher: FusionTeacher, spec: TargetSpec, device: str) -> None:
        self._teacher, self._spec, self._device = teacher, spec, torch.device(device)
        self.kept = Kept()

    def __call__(self, batch: Batch) -> Records:
        """Run the teacher on one batch and encode its maps.

        Raises:
            InputError: there is not enough memory for a batch of this size.
            TeacherError: the teacher gave NaN or infinity.
        """
        try:
            return self._encode(batch)
        except (RuntimeError, MemoryError) as error:
            # CUDA has a class for it, the CPU's allocator has not.
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(
                error
            ):
                raise
            raise InputError(
                f"not enough memory on {self._device} for a batch of {len(batch['pair'])} pairs; pass a smaller "
                "--batch-size (it is never changed by itself: the targets of a pair depend on it, in their last bits)"
            ) from error

    def _encode(self, batch: Batch) -> Records:
        spec = self._spec
        moved = to_device(batch, self._device)
        pictures = pictures_of(moved)
        output = self._teacher(tokens_of(moved), pictures, spec.layers, padded_queries=spec.queries == "all")
        if output.logits is not None:
            self._check_finite(output.logits)
        text_tokens = batch["attention_mask"].sum(-1)
        encoded: dict[str, list[EncodedAttention]] = {"t2i": [], "i2t": []}
        for slot, picture in enumerate(pictures):
            counts = {"t2i": text_tokens, "i2t": image_tokens(picture.grid)}
            for layer in spec.layers:
                attention = output.attention[slot, layer]
                for direction, other, maps in (("t2i", "i2t", attention.t2i), ("i2t", "t2i", attention.i2t)):
                    rows, keys = (counts[name].to(self._device) for name in (direction, other))
                    encoded[direction].append(self._encode_maps(maps, rows, keys, direction))
                shape = counts["t2i"] * counts["i2t"]
                self.kept.dense_bytes += 2 * 2 * spec.stored_heads * int(shape.sum())
        self.kept.pairs += len(text_tokens)
        return Records(
            token_ids=batch["input_ids"] * batch["attention_mask"],
            text_tokens=text_tokens,
            grids=[picture.grid for picture in pictures],
            t2i=encoded["t2i"],
            i2t=encoded["i2t"],
            logits=None if output.logits is None else output.logits.cpu(),
            pixel_hashes=batch.get("pixel_hashes"),
        )

    def _check_finite(self, numbers: Tensor) -> None:
        """Refuse what no reader would take.

        Raises:
            TeacherError: the teacher gave NaN or infinity.
        """
        if not bool(numbers.isfinite().all()):
            raise TeacherError(
                f"expected finite logits and attention from the teacher, got others in {self._spec.dtype}; try --dtype "
                "float32 or bfloat16, or look at its weights"
            )

    def _encode_maps(self, maps: Tensor, rows: Tensor, keys: Tensor, direction: str) -> EncodedAttention:
        """Encode the maps of one layer; rows that are not stored become empty."""
        spec = self._spec
        if spec.heads == "mean":
            maps = maps.mean(1, keepdim=True)
        valid = token_mask(rows, maps.shape[2])
        if spec.queries == "all":
            # Text is padded to the text length, every row counts; of the padded image rows one is kept.
            stored = torch.ones_like(valid) if direction == "t2i" else token_mask(rows + 1, maps.shape[2])
        else:
            stored = valid
        self.kept.rows += int(valid.sum()) * maps.shape[1]
        if spec.steps is not None:
            self._check_finite(maps.sum(-1))
            self.kept.mass += int(valid.sum()) * maps.shape[1]
            return encode_dense(maps, stored, token_mask(keys, maps.shape[3]), spec.steps)
        sparse = sparsify(maps, None if spec.k is None else min(spec.k, maps.shape[-1]), spec.mass)
        self._check_finite(sparse.tail)
        self.kept.mass += float(((1 - sparse.tail) * valid[:, None]).sum())
        stored = stored[:, None, :]
        blanked = SparseAttention(
            torch.where(stored[..., None], sparse.index, 0),
            torch.where(stored[..., None], sparse.weight, 0.0),
            torch.where(stored, sparse.tail, 0.0),
        )
        return encode(blanked, spec.weights, maps.shape[-1])


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
    logits = [record.logits for record in records if record.logits is not None]
    hashes = [record.pixel_hashes for record in records if record.pixel_hashes is not None]
    further = partner_arrays(partners) if "partners" in spec.groups else {}
    if hashes:
        further |= group_arrays(
            sample[matched].numpy(), view[matched].numpy(), torch.cat(hashes)[order][matched].numpy()
        )
    return UnitArrays(
        keys=[one.key for one in samples],
        content=np.stack([np.frombuffer(one.content_hash(), np.uint8) for one in samples]),
        maps=columns,
        t2i=_stack([record.t2i for record in records], order, keys=int(columns.image_tokens.max())),
        i2t=_stack([record.i2t for record in records], order, keys=longest),
        prediction_sample=sample[matched].numpy(),
        prediction_text=text[matched].numpy(),
        logits=torch.cat(logits)[order][matched].numpy() if logits else None,
        prediction_view=view[matched].numpy(),
        further=further,
    )


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
    for name, array in (("views", "pixels"), ("partners", "content")):
        if f"{name}/{array}" in arrays.further:
            groups[name] = Group(required=False)
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
