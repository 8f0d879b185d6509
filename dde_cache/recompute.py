"""Ask the teacher again: targets of a few pairs, recomputed and compared with what a cache holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dde_cache.attention import SparseAttention
from dde_cache.audit import Problem
from dde_cache.batches import Batch, pictures_of, to_device, tokens_of, torch_device
from dde_cache.codec import RELATIVE_ERROR, EncodedDense, EncodedSparse, decode_dense, decode_sparse, ends_of_codes
from dde_cache.drift import PixelHashes
from dde_cache.errors import CacheError, InputError, PixelDrift
from dde_cache.identity import DTYPES, config_of, target_spec
from dde_cache.partners import Partner, Place, read_partners
from dde_cache.passes import pass_name
from dde_cache.records import extraction_dataset
from dde_cache.samples import Shard, Text
from dde_cache.spec import TOLERANCE, Model, Rows, States, TargetSpec, difference
from dde_cache.states import LEVELS
from dde_cache.store import Cache
from dde_cache.stream import Pair, PairTable
from dde_cache.teacher import FusionTeacher, TeacherOutput
from dde_cache.unit import Unit
from dde_cache.vilt import image_tokens

BATCH = 16
"""Pairs a forward pass."""

_LEAST = 2**-14
"""Absolute error of a decoded weight near 0, its row scaled by at most 2, and of the tail."""


class Recomputed(Model):
    """How far a cache's targets lie from those that the teacher gives now."""

    pairs: int = Field(description="recomputed and compared")
    tolerance: float = Field(description="for a weight, beside the codec's error, of the extraction's dtype")
    largest_weight_error: float = Field(description="of a stored weight, absolute")
    largest_logit_error: float | None = Field(description="absolute; null without logits")


@dataclass(frozen=True)
class _Chosen:
    """A pair of a unit in one of its views, and where its targets are."""

    key: str
    text: int
    view: int
    pass_number: int
    records: Mapping[tuple[int, int], int]  # (image, layer) -> record
    prediction: int | None
    spec: TargetSpec

    @property
    def where(self) -> str:
        """Which pair, in words."""
        view = f", view {self.view}" if self.spec.views > 1 else ""
        which = f", pass {self.pass_number}" if len(self.spec.passes) > 1 else ""
        return f"sample {self.key!r}, text {self.text}{view}{which}"


def recompute(
    cache: Cache, shards: Sequence[Shard], teacher_name: str, count: int, device: str = "cpu"
) -> tuple[Recomputed | None, list[Problem]]:
    """Run the teacher on `count` pairs spread over the cache and compare.

    Args:
        cache: whose units have been verified, or stand the reading.
        shards: where the samples are; pairs that they lack are not chosen.
        teacher_name: folder, hub id, or `sample`.
        count: how many pairs; fewer where the cache has fewer.
        device: where the teacher runs.

    Raises:
        TeacherError: the teacher cannot be loaded.
        InputError: no such device, or a sample cannot be read.
    """
    torch_device(device)
    spec = cache.spec
    teacher = FusionTeacher.load(teacher_name, DTYPES[spec.dtype], device)
    # Layers are the cache's to choose: of another teacher they may not exist.
    try:
        given = target_spec(teacher, config_of(spec).model_copy(update={"layers": None}))
    except InputError as error:
        return None, [Problem("teacher", f"views and passes: {error}")]
    differences = difference(spec, given.model_copy(update={"layers": spec.layers}))
    if differences:
        return None, [Problem("teacher", line) for line in differences]
    trial = _Trial(cache.spec, teacher, shards, device)
    problems: list[Problem] = []
    numbers = np.sort(np.random.default_rng(0).permutation(sum(entry.pairs for entry in cache.manifest.units))[:count])
    start = 0
    for entry in cache.manifest.units:
        inside = numbers[(numbers >= start) & (numbers < start + entry.pairs)] - start
        start += entry.pairs
        if not len(inside):
            continue
        try:
            unit = cache.unit(entry)
        except CacheError:
            continue  # a finding of its own
        try:
            problems += trial.unit(unit, inside)
        except CacheError as error:
            problems.append(Problem("targets", str(error)[:300]))
        finally:
            unit.close()
    return trial.result(), problems


class _Trial:
    """Compares unit by unit and remembers the largest errors."""

    def __init__(self, spec: TargetSpec, teacher: FusionTeacher, shards: Sequence[Shard], device: str) -> None:
        self._spec, self._teacher, self._shards = spec, teacher, shards
        self._owner = {key: number for number, shard in enumerate(shards) for key in shard.keys}
        self._device = torch.device(device)
        self._tolerance = TOLERANCE[spec.dtype]
        self._pairs, self._weight, self._logit = 0, 0.0, 0.0

    def result(self) -> Recomputed:
        """The largest errors of all units."""
        return Recomputed(
            pairs=self._pairs,
            tolerance=self._tolerance,
            largest_weight_error=self._weight,
            largest_logit_error=None if self._spec.classes is None else self._logit,
        )

    def unit(self, unit: Unit, numbers: np.ndarray) -> Iterator[Problem]:
        """Compare some pairs of a unit, by their number in it."""
        chosen = [pair for pair in _choose(unit, numbers) if pair.key in self._owner]
        chosen.sort(key=lambda pair: self._owner[pair.key])
        for start in range(0, len(chosen), BATCH):
            yield from self._batch(unit, chosen[start : start + BATCH])

    def _batch(self, unit: Unit, chosen: Sequence[_Chosen]) -> Iterator[Problem]:
        table: list[list[tuple[str, int]]] = [[] for _ in self._shards]
        for pair in chosen:
            table[self._owner[pair.key]].append((pair.key, pair.text))
        every, views, passes = self._spec.queries == "all", self._spec.views, len(self._spec.passes)
        pairs = PairTable(table).in_views(views, passes=passes)
        partners = _Named(read_partners(unit) if unit.has_partners else {}, unit.keys)
        dataset = extraction_dataset(self._shards, pairs, self._teacher.preprocessor, self._spec, partners)
        batch = dataset.__getitems__(
            [(number * views + pair.view) * passes + pair.pass_number for number, pair in enumerate(chosen)]
        )
        yield from self._pixels(unit, chosen, batch)
        moved = to_device(batch, self._device)
        pictures = pictures_of(moved)
        output = self._teacher(
            tokens_of(moved),
            pictures,
            self._spec.layers,
            padded_queries=every,
            whole=self._spec.has_whole,
            hidden=bool(self._spec.states),
            logits=self._spec.classes is not None,
        )
        text = batch["attention_mask"].sum(-1)
        for row, pair in enumerate(chosen):
            for (image, layer), record in pair.records.items():
                patches = int(image_tokens(pictures[image].grid)[row])
                words = int(text[row])
                of_text, of_image = self._spec.text_length if every else words, patches + int(every)
                wrong: dict[str, str | None] = {}
                for rows in self._spec.rows:
                    exact = output.rows(rows, image, layer)[row].float().cpu()
                    filled = of_text if rows in ("t2i", "t2w") else of_image
                    wrong[rows] = self._compare(unit, rows, record, exact, filled)
                for kind in self._spec.states:
                    held = output.hidden[image, layer]
                    wrong[kind.group] = self._states(unit, kind, record, (held.text, words), (held.image, patches), row)
                for name, message in wrong.items():
                    if message is not None:
                        where = f"{unit.path.name}: {pair.where}, layer {layer}, {name}"
                        yield Problem("targets", f"{where}: {message}")
            yield from self._logits(unit, pair, output, row)
            self._pairs += 1

    def _pixels(self, unit: Unit, chosen: Sequence[_Chosen], batch: Batch) -> Iterator[Problem]:
        """Compare the pixels of views with those that the teacher saw."""
        if not unit.has_pixel_hashes or "pixel_hashes" not in batch:
            return
        hashes, numbers = PixelHashes(unit), {key: number for number, key in enumerate(unit.keys)}
        for pair, here in zip(chosen, batch["pixel_hashes"].numpy(), strict=True):
            if pass_name(self._spec.passes[pair.pass_number]) == "negative":
                continue
            try:
                hashes.compare(numbers[pair.key], pair.key, pair.view, [row.tobytes() for row in here])
            except PixelDrift as drift:
                yield Problem("targets", f"{unit.path.name}: {drift}")

    def _states(
        self, unit: Unit, kind: States, record: int, text: tuple[Tensor, int], image: tuple[Tensor, int], row: int
    ) -> str | None:
        """Compare the hidden or pooled states of one record; each side has states and its number of tokens."""
        for name, (states, count) in (("text", text), ("image", image)):
            exact = states[row, :count].float().cpu().numpy()
            exact = exact if kind.per_token else exact.mean(0)
            stored = unit.vectors(kind.group, name, slice(record, record + 1))[0]
            stored = stored[:count] if kind.per_token else stored
            if stored.shape != exact.shape:
                return f"expected states of {count} tokens, got {len(stored)}"
            largest = np.abs(exact).max(-1, keepdims=True)
            allowed = (self._tolerance + 2**-10) * max(1.0, float(largest.max()))
            error = np.abs(stored - exact) - (largest / (2 * LEVELS) if kind.codec == "int8" else 0.0)
            if not float(error.max()) <= allowed:
                return f"a state is off by {float(np.abs(stored - exact).max()):.4f}"
        return None

    def _compare(self, unit: Unit, direction: Rows, record: int, exact: Tensor, rows: int) -> str | None:
        """Compare one record with the whole attention [h, q, k]; say what is wrong."""
        if self._spec.heads == "mean":
            exact = exact.mean(0, keepdim=True)
        encoded = unit.attention(direction, slice(record, record + 1))
        if isinstance(encoded, EncodedDense):
            return self._compare_dense(encoded, exact, rows)
        return self._compare_sparse(encoded, exact, rows)

    def _compare_dense(self, encoded: EncodedDense, exact: Tensor, rows: int) -> str | None:
        """Every weight lies between the ends of its code."""
        keys = min(encoded.weight.shape[3], exact.shape[2])
        if encoded.weight.shape[2] < rows or exact.shape[1] < rows or encoded.weight[..., keys:].any():
            return f"expected {rows} query rows and {exact.shape[2]} keys, got others"
        encoded, exact = encoded.cut(rows, keys), exact[:, :rows]
        code = encoded.weight[0].int()
        least, most = (torch.from_numpy(ends)[code] for ends in ends_of_codes(encoded.steps))
        self._weight = max(self._weight, float((decode_dense(encoded)[0] - exact[..., :keys]).abs().max()))
        outside = torch.maximum(least - exact[..., :keys], exact[..., :keys] - most).max()
        # Behind the stored keys there is none; a batch may be wider than its pairs.
        beyond = exact[..., keys:].amax() if keys < exact.shape[2] else outside
        error = float(torch.maximum(outside, beyond))
        return f"a weight is {error:.4f} outside its code" if error > self._tolerance + 1e-6 else None

    def _compare_sparse(self, encoded: EncodedSparse, exact: Tensor, rows: int) -> str | None:
        """Kept weights, tails, and that none larger was left out."""
        stored = decode_sparse(encoded)
        if stored.index.shape[2] < rows or exact.shape[1] < rows or int(stored.index.max()) >= exact.shape[2]:
            return f"expected {rows} query rows and {exact.shape[2]} keys, got others"
        stored = SparseAttention(stored.index[0, :, :rows], stored.weight[0, :, :rows], stored.tail[0, :, :rows])
        exact = exact[:, :rows]
        kept = stored.weight > 0
        at = torch.where(kept, exact.gather(-1, stored.index), 0.0)
        error = (stored.weight - at).abs()
        self._weight = max(self._weight, float(error.max()))
        codec = 2.05 * RELATIVE_ERROR[self._spec.weights]
        if (error > codec * at + _LEAST + self._tolerance).any():
            return f"a weight is off by {float(error.max()):.4f}"
        tail = (stored.tail - (1 - at.sum(-1))).abs()
        if (tail > 2 * self._tolerance + 2**-10).any():
            return f"a tail mass is off by {float(tail.max()):.4f}"
        left = exact.scatter(-1, torch.where(kept, stored.index, stored.index[..., :1]), 0.0).amax(-1)
        least = torch.where(kept, at, 1.0).amin(-1)
        if (left > least + self._tolerance).any():
            return f"a weight {float((left - least).max()):.4f} larger than the smallest kept one was left out"
        return None

    def _logits(self, unit: Unit, pair: _Chosen, output: TeacherOutput, row: int) -> Iterator[Problem]:
        if pair.prediction is None or output.logits is None:
            return
        exact = output.logits[row].cpu().numpy()
        stored = unit.logits(slice(pair.prediction, pair.prediction + 1))[0]
        error = float(np.abs(stored - exact).max())
        self._logit = max(self._logit, error)
        if not error <= self._tolerance * max(1.0, float(np.abs(exact).max())):
            yield Problem("targets", f"{unit.path.name}: {pair.where}: a logit is off by {error:.4f}")


def _choose(unit: Unit, numbers: np.ndarray) -> list[_Chosen]:
    """The pairs of a unit by number, in the order of the tables, each in one view and pass, by turns."""
    spec = unit.attributes.spec
    records: dict[Place, dict[tuple[int, int], int]] = {}
    if "maps" in unit.attributes.groups:
        maps = unit.maps
        places = (maps.sample, maps.text, maps.view, maps.passes)
        which = zip(maps.image.tolist(), maps.layer.tolist(), strict=True)
        for row, (place, map_of) in enumerate(
            zip(zip(*map(np.ndarray.tolist, places), strict=True), which, strict=True)
        ):
            records.setdefault(place, {})[map_of] = row
    predictions: dict[Place, int] = {}
    if unit.has_logits:
        columns = [unit.array(f"predictions/{name}").tolist() for name in ("sample", "text", "view", "pass")]
        predictions = {place: row for row, place in enumerate(zip(*columns, strict=True))}
    pairs = sorted({place[:2] for place in records.keys() | predictions.keys()})
    chosen = []
    for number in numbers[numbers < len(pairs)].tolist():
        turn, view = divmod(number, spec.views)
        sample, text = pairs[number]
        place = (sample, text, view, turn % len(spec.passes) if records else 0)
        found = records.get(place, {}), predictions.get(place)
        chosen.append(_Chosen(unit.keys[sample], text, view, place[3], *found, spec))
    return chosen


@dataclass(frozen=True)
class _Named:
    """The partners that a unit names."""

    partners: Mapping[Place, Partner]
    keys: Sequence[str]

    def partner(self, pair: Pair, _text: Text) -> Partner:
        """The partner of a pair.

        Raises:
            CacheError: the unit does not say.
        """
        place = (self.keys.index(pair.key), pair.text, pair.view, pair.pass_number)
        if place not in self.partners:
            raise CacheError(f"expected the partner of text {pair.text} of sample {pair.key!r}, found none")
        return self.partners[place]
