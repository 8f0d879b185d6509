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
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Sample, Shard
from dde_cache.spec import (
    FORMAT_VERSION,
    HIDDEN,
    WHOLE,
    Group,
    Provenance,
    Rows,
    TargetSpec,
    UnitAttributes,
    hash_keys,
)
from dde_cache.stream import PairTable
from dde_cache.teacher import FusionTeacher, HiddenStates
from dde_cache.unit import MapColumns, UnitArrays
from dde_cache.views import group_arrays, parse_recipe
from dde_cache.vilt import image_tokens, token_mask


@dataclass(frozen=True)
class Records:
    """One batch on its way to the disk; the lists run over (image slot, layer)."""

    token_ids: Tensor
    text_tokens: Tensor
    grids: list[Tensor]
    rows: Mapping[Rows, list[EncodedAttention]]
    logits: Tensor | None
    pixel_hashes: Tensor | None = None
    hidden: Sequence[HiddenStates] = ()


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
        output = self._teacher(
            tokens_of(moved),
            pictures,
            spec.layers,
            padded_queries=spec.queries == "all",
            whole=spec.has_whole,
            hidden=spec.hidden_width is not None,
        )
        if output.logits is not None:
            self._check_finite(output.logits)
        text_tokens = batch["attention_mask"].sum(-1)
        encoded: dict[Rows, list[EncodedAttention]] = {name: [] for name in spec.rows}
        hidden: list[HiddenStates] = []
        for slot, picture in enumerate(pictures):
            words, patches = text_tokens.to(self._device), image_tokens(picture.grid).to(self._device)
            keys = {"t2i": patches, "i2t": words}
            for layer in spec.layers:
                for name in spec.rows:
                    of_text = name in ("t2i", "t2w")
                    filled = words if of_text else patches
                    every = keys.get(name, words + patches)
                    encoded[name].append(
                        self._encode_maps(output.rows(name, slot, layer), filled, every, of_text=of_text)
                    )
                    self.kept.dense_bytes += 2 * spec.stored_heads * int((filled * every).sum())
                if output.hidden:
                    hidden.append(self._narrow(output.hidden[slot, layer], words, patches))
                    self.kept.dense_bytes += 2 * (spec.hidden_width or 0) * int((words + patches).sum())
        self.kept.pairs += len(text_tokens)
        return Records(
            token_ids=batch["input_ids"] * batch["attention_mask"],
            text_tokens=text_tokens,
            grids=[picture.grid for picture in pictures],
            rows=encoded,
            logits=None if output.logits is None else output.logits.cpu(),
            pixel_hashes=batch.get("pixel_hashes"),
            hidden=hidden,
        )

    def _narrow(self, states: HiddenStates, words: Tensor, patches: Tensor) -> HiddenStates:
        """Hidden states of the valid tokens in float16, with 0 behind them."""
        narrow = []
        for part, count in ((states.text, words), (states.image, patches)):
            part = torch.where(token_mask(count, part.shape[1])[..., None], part, 0).to(torch.float16)
            if not bool(part.isfinite().all()):
                raise TeacherError(
                    "expected hidden states from the teacher that fit float16, got larger or not finite ones; look at "
                    "its weights, or leave hidden out of --targets"
                )
            narrow.append(part.cpu())
        return HiddenStates(*narrow)

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

    def _encode_maps(self, maps: Tensor, rows: Tensor, keys: Tensor, *, of_text: bool) -> EncodedAttention:
        """Encode the maps of one layer; rows that are not stored become empty."""
        spec = self._spec
        if spec.heads == "mean":
            maps = maps.mean(1, keepdim=True)
        valid = token_mask(rows, maps.shape[2])
        if spec.queries == "all":
            # Text is padded to the text length, every row counts; of the padded image rows one is kept.
            stored = torch.ones_like(valid) if of_text else token_mask(rows + 1, maps.shape[2])
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
    shards: Sequence[Shard], table: PairTable, preprocessor: Preprocessor, spec: TargetSpec
) -> PairDataset:
    """What the teacher sees of some pairs, in their views.

    Raises:
        InputError: a recipe of views that this version cannot replay.
    """
    recipe = parse_recipe(spec.view)
    return PairDataset(shards, table, preprocessor, (), full_text=spec.queries == "all", recipe=recipe, hashes=True)


def places(samples: Sequence[Sample], views: int) -> list[tuple[int, int, int]]:
    """(number of the sample, text slot, view) of everything that a teacher sees of some samples, in a unit's order."""
    return [
        (number, slot, view)
        for number, sample in enumerate(samples)
        for slot in range(len(sample.texts))
        for view in range(views)
    ]


def assemble(
    records: Sequence[Records], samples: Sequence[Sample], place: Sequence[tuple[int, int, int]], spec: TargetSpec
) -> UnitArrays:
    """Put the batches of a unit together, padded to its longest record, sorted by (sample, text, view, image, layer).

    Args:
        records: the batches, in the order of `place`.
        samples: of the unit.
        place: what each row of the batches is of: number of the sample, text slot, view.
        spec: what is kept.
    """
    sample, text, view = (torch.tensor(column) for column in zip(*place, strict=True))
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
        view=view.repeat_interleave(each).numpy(),
        passes=np.zeros(pairs * each, np.int64),
        layer=torch.tensor(spec.layers).repeat(images * pairs).numpy(),
        text_tokens=torch.cat([record.text_tokens for record in records]).repeat_interleave(each).numpy(),
        token_ids=token_ids.repeat_interleave(each, dim=0).numpy(),
        grid=grid.repeat_interleave(layers, dim=1).flatten(0, 1).numpy(),
    )
    longest_of = {"t2i": int(columns.image_tokens.max()), "i2t": longest}
    together = int((columns.text_tokens + columns.image_tokens).max())
    stacked = {
        name: _stack([record.rows[name] for record in records], keys=longest_of.get(name, together))
        for name in spec.rows
    }
    logits = [record.logits for record in records if record.logits is not None]
    hashes = [record.pixel_hashes for record in records if record.pixel_hashes is not None]
    return UnitArrays(
        keys=[one.key for one in samples],
        content=np.stack([np.frombuffer(one.content_hash(), np.uint8) for one in samples]),
        maps=columns,
        t2i=stacked.get("t2i"),
        i2t=stacked.get("i2t"),
        prediction_sample=sample.numpy(),
        prediction_text=text.numpy(),
        logits=torch.cat(logits).numpy() if logits else None,
        prediction_view=view.numpy(),
        further={
            **(group_arrays(sample.numpy(), view.numpy(), torch.cat(hashes).numpy()) if hashes else {}),
            **(_hidden_arrays(records, {"text": longest, "image": longest_of["t2i"]}) if records[0].hidden else {}),
        },
        whole={name: maps for name, maps in stacked.items() if name in ("t2w", "i2w")},
    )


def _hidden_arrays(records: Sequence[Records], lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Batches of (image slot, layer) hidden states -> the arrays of the group, those of a pair together."""
    arrays = {}
    for name, length in lengths.items():
        batches = [torch.stack([getattr(one, name) for one in batch.hidden], dim=1).flatten(0, 1) for batch in records]
        cut = [nn.functional.pad(one[:, :length], (0, 0, 0, max(length - one.shape[1], 0))) for one in batches]
        arrays[f"{HIDDEN}/{name}"] = torch.cat(cut).numpy()
    return arrays


def _to_width(ids: Tensor, width: int) -> Tensor:
    """Cut or pad token ids; what is cut is padding."""
    return nn.functional.pad(ids[:, :width], (0, max(width - ids.shape[1], 0)))


def _stack(batches: Sequence[Sequence[EncodedAttention]], keys: int) -> EncodedAttention:
    """Batches of (image slot, layer) maps -> one array of records, those of a pair together; at most `keys` keys."""
    maps = concatenate([one for batch in batches for one in batch])
    order, start = [], 0
    for batch in batches:
        pairs = len(batch[0].weight)
        order.append(start + torch.arange(len(batch) * pairs).reshape(len(batch), pairs).T.flatten())
        start += len(batch) * pairs
    stacked = maps.records(torch.cat(order).to(maps.weight.device)).cut(maps.weight.shape[2], keys)
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
    if "views/pixels" in arrays.further:
        groups["views"] = Group(required=False)
    if arrays.whole:
        groups[WHOLE] = Group(required=False)
    if f"{HIDDEN}/text" in arrays.further:
        groups[HIDDEN] = Group(required=False)
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
