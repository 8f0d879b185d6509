"""Recipe: run the teacher once over shards and write its targets, one unit a shard."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dde_cache.attention import SparseAttention, sparsify
from dde_cache.batches import Batch, PairDataset, batch_loader, pictures_of, to_device, tokens_of
from dde_cache.codec import EncodedAttention, encode, pad_to
from dde_cache.errors import InputError, bullet_list
from dde_cache.samples import Sample, Shard
from dde_cache.spec import (
    Dtype,
    Group,
    Heads,
    Model,
    Provenance,
    Queries,
    TargetSpec,
    TeacherIdentity,
    UnitAttributes,
    UnitEntry,
    Weights,
    hash_json,
)
from dde_cache.store import LABELS, CacheWriter
from dde_cache.stream import PairTable
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import SUFFIX, MapColumns, UnitArrays, write_unit
from dde_cache.vilt import image_tokens, token_mask

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ExtractConfig(Model):
    """What is extracted, and how."""

    k: int | None = Field(default=8, ge=1, description="kept keys a row; null: all")
    weights: Weights = "log8"
    layers: tuple[int, ...] | None = Field(default=None, description="0-based blocks; null: the last")
    heads: Heads = "all"
    queries: Queries = "valid"
    dtype: Dtype = "float32"
    batch_size: int = Field(default=64, ge=1, description="pairs a forward pass")
    workers: int = Field(default=0, ge=0, description="processes that read ahead; 0: none")
    device: str = "cpu"


@dataclass
class ExtractProgress:
    """What callers may want to show while an extraction runs."""

    start: Callable[[int, int, str], None] = lambda pairs, finished, grid: None
    batch: Callable[[int, float], None] = lambda pairs, kept_mass: None
    unit: Callable[[UnitEntry], None] = lambda entry: None


class ExtractSummary(Model):
    """What an extraction did."""

    pairs: int = Field(description="extracted now")
    skipped_pairs: int = Field(description="in units that were finished before")
    units: int
    seconds: float
    kept_mass: float | None = Field(description="mean over rows of both directions, of the pairs extracted now")
    bytes: int = Field(description="of all units")
    bytes_a_pair: float
    dense_ratio: float | None = Field(description="dense float16 maps of the valid tokens / bytes of these units")
    cut_texts: int = Field(description="texts longer than the text length, which teacher and student see cut")


def target_spec(teacher: FusionTeacher, config: ExtractConfig) -> TargetSpec:
    """Say what the numbers of an extraction will mean.

    Raises:
        InputError: a layer that the teacher does not have, or one asked for twice.
    """
    layers = config.layers if config.layers is not None else (teacher.layers - 1,)
    if any(not 0 <= layer < teacher.layers for layer in layers) or len(set(layers)) != len(layers):
        raise InputError(f"expected different layers from 0 to {teacher.layers - 1}, got {list(layers)}")
    processor = teacher.preprocessor.processor
    shape = teacher.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        shape.pop(name, None)
    return TargetSpec(
        teacher=TeacherIdentity(
            family="vilt",
            weights=teacher.weights_hash(),
            config=hash_json(json.loads(json.dumps(shape, default=str))),
            tokenizer=hash_json(json.loads(processor.tokenizer.backend_tokenizer.to_str())),
            processor=hash_json(json.loads(processor.image_processor.to_json_string())),
        ),
        layers=tuple(sorted(layers)),
        teacher_layers=teacher.layers,
        teacher_heads=teacher.heads,
        heads=config.heads,
        queries=config.queries,
        text_length=teacher.preprocessor.text_length,
        patch_size=teacher.preprocessor.patch_size,
        k=config.k,
        weights=config.weights,
        dtype=config.dtype,
        classes=None if teacher.labels is None else len(teacher.labels),
    )


def extract(
    shards: Sequence[Shard],
    teacher_name: str,
    out: Path,
    config: ExtractConfig,
    progress: ExtractProgress | None = None,
) -> ExtractSummary:
    """Extract the targets of every shard that has no finished unit yet.

    Args:
        shards: samples.
        teacher_name: folder, hub id, or `sample`.
        out: the cache; new, empty, or begun with the same arguments.
        config: what to keep.
        progress: hooks to show what happens.

    Raises:
        InputError: shards that cannot be used, or options that do not fit the teacher.
        TeacherError: the teacher cannot be used.
        CacheError: `out` holds other targets.
    """
    progress = progress or ExtractProgress()
    begin = time.perf_counter()
    teacher = FusionTeacher.load(teacher_name, DTYPES[config.dtype], config.device)
    spec = target_spec(teacher, config)
    names = [shard.path.stem + SUFFIX for shard in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected shards with different file names, got twice:{bullet_list(twice)}")
    grid = _check_first(shards[0], teacher, config)
    with tempfile.TemporaryDirectory() as folder:
        _save_assets(teacher, Path(folder))
        writer = CacheWriter(out, spec, Path(folder))
    todo, done = [], []
    for shard, name in zip(shards, names, strict=True):
        entry = writer.finished(name)
        if entry is None:
            todo.append((shard, name))
        else:
            done.append(entry)
    run = _Run(teacher, spec, config, writer, progress)
    skipped = sum(entry.pairs for entry in done)
    if todo:
        done += run.units(todo, skipped, grid, _provenance(teacher_name, shards, config))
    writer.close()
    size, pairs = sum(entry.size for entry in done), sum(entry.pairs for entry in done)
    return ExtractSummary(
        pairs=run.kept.pairs,
        skipped_pairs=skipped,
        units=len(done),
        seconds=time.perf_counter() - begin,
        kept_mass=run.kept.mean,
        bytes=size,
        bytes_a_pair=size / max(pairs, 1),
        dense_ratio=run.kept.dense_bytes / run.kept.bytes if run.kept.bytes else None,
        cut_texts=run.cut_texts,
    )


@dataclass
class _Kept:
    """Running sums over what was extracted."""

    pairs: int = 0
    mass: float = 0.0
    rows: int = 0
    dense_bytes: int = 0
    bytes: int = 0

    @property
    def mean(self) -> float | None:
        return self.mass / self.rows if self.rows else None


class _Run:
    """The loop over units; batches never cross a unit, so that they are a pure function of it."""

    def __init__(
        self,
        teacher: FusionTeacher,
        spec: TargetSpec,
        config: ExtractConfig,
        writer: CacheWriter,
        progress: ExtractProgress,
    ) -> None:
        self._teacher, self._spec, self._config = teacher, spec, config
        self._writer, self._progress = writer, progress
        self.kept = _Kept()
        self.cut_texts = 0

    def units(
        self, todo: Sequence[tuple[Shard, str]], skipped: int, grid: str, provenance: Provenance
    ) -> list[UnitEntry]:
        """Extract and write the units of some shards."""
        shards = [shard for shard, _ in todo]
        table = PairTable.of(shards)
        self._progress.start(len(table), skipped, grid)
        preprocessor = self._teacher.preprocessor
        dataset = PairDataset(shards, table, preprocessor, (), full_text=self._config.queries == "all")
        orders = [table.batches(number, self._config.batch_size) for number in range(len(shards))]
        batches = iter(batch_loader(dataset, [batch for order in orders for batch in order], self._config.workers))
        entries = []
        for number, (shard, name) in enumerate(todo):
            records = [self._records(next(batches)) for _ in orders[number]]
            samples = list(shard)
            self.cut_texts += preprocessor.longer_than_allowed([text.text for one in samples for text in one.texts])
            arrays = _assemble(records, samples, self._spec)
            attributes = UnitAttributes(
                fingerprint=self._spec.fingerprint,
                source=shard.name,
                samples=len(samples),
                pairs=len(arrays.prediction_text),
                groups={"samples": Group(required=True), "maps": Group(required=True)}
                | ({"predictions": Group(required=True)} if arrays.logits is not None else {}),
                provenance=provenance,
            )
            path = self._writer.unit_path(name)
            size, digest = write_unit(path, arrays, attributes)
            entry = UnitEntry(
                name=name, source=shard.name, samples=len(samples), pairs=attributes.pairs, size=size, sha256=digest
            )
            self._writer.add(entry)
            self.kept.bytes += size
            self._progress.unit(entry)
            entries.append(entry)
        return entries

    def _records(self, batch: Batch) -> "_Records":
        """Run the teacher on one batch and encode its maps."""
        spec = self._spec
        device = torch.device(self._config.device)
        moved = to_device(batch, device)
        pictures = pictures_of(moved)
        output = self._teacher(tokens_of(moved), pictures, spec.layers, padded_queries=spec.queries == "all")
        text_tokens = batch["attention_mask"].sum(-1)
        encoded: dict[str, list[EncodedAttention]] = {"t2i": [], "i2t": []}
        for slot, picture in enumerate(pictures):
            counts = {"t2i": text_tokens, "i2t": image_tokens(picture.grid)}
            for layer in spec.layers:
                attention = output.attention[slot, layer]
                for direction, maps in (("t2i", attention.t2i), ("i2t", attention.i2t)):
                    sparse = self._sparsify(maps, counts[direction].to(device), direction)
                    encoded[direction].append(encode(sparse, spec.weights, maps.shape[-1]))
                shape = counts["t2i"] * counts["i2t"]
                self.kept.dense_bytes += 2 * 2 * spec.stored_heads * int(shape.sum())
        self.kept.pairs += len(text_tokens)
        self._progress.batch(len(text_tokens), self.kept.mean or 0.0)
        return _Records(
            token_ids=batch["input_ids"] * batch["attention_mask"],
            text_tokens=text_tokens,
            grids=[picture.grid for picture in pictures],
            t2i=encoded["t2i"],
            i2t=encoded["i2t"],
            logits=None if output.logits is None else output.logits.cpu(),
        )

    def _sparsify(self, maps: Tensor, valid_rows: Tensor, direction: str) -> SparseAttention:
        """Take the top k of each row and blank the rows that are not stored."""
        if self._spec.heads == "mean":
            maps = maps.mean(1, keepdim=True)
        sparse = sparsify(maps, None if self._spec.k is None else min(self._spec.k, maps.shape[-1]))
        valid = token_mask(valid_rows, maps.shape[2])
        self.kept.mass += float(((1 - sparse.tail) * valid[:, None]).sum())
        self.kept.rows += int(valid.sum()) * maps.shape[1]
        if self._spec.queries == "all":
            # Text is padded to the text length, every row counts; of the padded image rows one is kept.
            stored = torch.ones_like(valid) if direction == "t2i" else token_mask(valid_rows + 1, maps.shape[2])
        else:
            stored = valid
        stored = stored[:, None, :]
        return SparseAttention(
            torch.where(stored[..., None], sparse.index, 0),
            torch.where(stored[..., None], sparse.weight, 0.0),
            torch.where(stored, sparse.tail, 0.0),
        )


@dataclass(frozen=True)
class _Records:
    """One batch on its way to the disk; the lists run over (image slot, layer)."""

    token_ids: Tensor
    text_tokens: Tensor
    grids: list[Tensor]
    t2i: list[EncodedAttention]
    i2t: list[EncodedAttention]
    logits: Tensor | None


def _assemble(records: Sequence[_Records], samples: Sequence[Sample], spec: TargetSpec) -> UnitArrays:
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


def _check_first(shard: Shard, teacher: FusionTeacher, config: ExtractConfig) -> str:
    """Look at the first sample before hours are spent; return its size and grid in words.

    Raises:
        InputError: its picture or its number of images does not suit the teacher, or k is larger than both key axes.
    """
    sample = shard.read(shard.keys[0])
    image = sample.images[0].decode()
    try:
        pixels = teacher.preprocessor.pixels(image)
    except InputError as error:
        raise InputError(f"{shard.path}, sample {sample.key!r}: {error}") from error
    wanted = teacher.images or 1
    if len(sample.images) != wanted:
        raise InputError(
            f"{shard.path}, sample {sample.key!r}: expected {wanted} image(s) a sample for this teacher, got "
            f"{len(sample.images)}"
        )
    height, width = pixels.shape[1:]
    patch = teacher.preprocessor.patch_size
    tokens = (height // patch) * (width // patch) + 1
    longest = max(tokens, teacher.preprocessor.text_length)
    if config.k is not None and config.k > longest:
        raise InputError(
            f"expected k up to {longest} (image tokens {tokens}, text tokens {teacher.preprocessor.text_length}), got "
            f"{config.k}; use --k all to keep everything"
        )
    resized = "" if (image.height, image.width) == (height, width) else f", resized to {width} x {height}"
    return f"{image.width} x {image.height} px{resized}: {height // patch} x {width // patch} patches"


def _save_assets(teacher: FusionTeacher, folder: Path) -> None:
    """Write what training needs of the teacher."""
    teacher.preprocessor.processor.save_pretrained(folder)
    teacher.config.save_pretrained(folder)
    labels = None if teacher.labels is None else list(teacher.labels)
    (folder / LABELS).write_text(json.dumps(labels, indent=1) + "\n")


def _provenance(teacher_name: str, shards: Sequence[Shard], config: ExtractConfig) -> Provenance:
    return Provenance(
        versions={name: version(name) for name in ("dde-cache", "torch", "transformers", "zarr", "numpy", "pillow")},
        device=config.device,
        batch_size=config.batch_size,
        teacher=Path(teacher_name).name,
        shards=shards[0].path.parent.name,
    )
