"""Recipe: run the teacher once over shards and write its targets, one unit a shard."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from dde_cache.attention import SparseAttention, sparsify
from dde_cache.batches import Batch, PairDataset, batch_loader, pictures_of, to_device, tokens_of, torch_device
from dde_cache.card import write_card
from dde_cache.codec import EncodedAttention, encode
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.identity import DTYPES, ExtractConfig, provenance_of, save_assets, target_spec
from dde_cache.interrupt import FinishStep
from dde_cache.records import Records, assemble
from dde_cache.samples import Shard
from dde_cache.spec import (
    Group,
    Model,
    Provenance,
    TargetSpec,
    UnitAttributes,
    UnitEntry,
)
from dde_cache.store import CacheWriter
from dde_cache.stream import PairTable
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import SUFFIX, Unit, write_unit
from dde_cache.vilt import image_tokens, token_mask


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
    torch_device(config.device)
    teacher = FusionTeacher.load(teacher_name, DTYPES[config.dtype], config.device)
    spec = target_spec(teacher, config)
    names = [shard.path.stem + SUFFIX for shard in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected shards with different file names, got twice:{bullet_list(twice)}")
    grid = _check_first(shards[0], teacher, config)
    with tempfile.TemporaryDirectory() as folder:
        save_assets(teacher, Path(folder))
        writer = CacheWriter(out, spec, Path(folder))
    todo, done = [], []
    for shard, name in zip(shards, names, strict=True):
        entry = writer.finished(name)
        if entry is None:
            todo.append((shard, name))
        else:
            _check_finished(writer.unit_path(name), shard)
            done.append(entry)
    run = _Run(teacher, spec, config, writer, progress)
    skipped = sum(entry.pairs for entry in done)
    provenance = provenance_of(teacher_name, shards, config)
    if todo:
        done += run.units(todo, skipped, grid, provenance)
    write_card(out, writer.close(), provenance)
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
            records = self._read(batches, len(orders[number]))
            samples = list(shard)
            self.cut_texts += preprocessor.longer_than_allowed([text.text for one in samples for text in one.texts])
            arrays = assemble(records, samples, self._spec)
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

    def _read(self, batches: Iterator[Batch], count: int) -> list[Records]:
        """Run the teacher on the batches of one unit.

        Raises:
            KeyboardInterrupt: after Ctrl-C, between two batches.
        """
        records = []
        with FinishStep() as interrupt:
            for _ in range(count):
                records.append(self._records(next(batches)))
                interrupt.check()
        return records

    def _records(self, batch: Batch) -> Records:
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
        return Records(
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
    if len(sample.images) != teacher.images:
        raise InputError(
            f"{shard.path}, sample {sample.key!r}: expected {teacher.images} image(s) a sample for this teacher, got "
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


def _check_finished(path: Path, shard: Shard) -> None:
    """Refuse to skip a finished unit that was made from other samples: other keys, or another first sample.

    Training compares the content of every sample; comparing all of them here would mean to read all data again.

    Raises:
        CacheError: the shard has changed since.
    """
    unit = Unit(path)
    try:
        same = unit.keys == list(shard.keys)
        if same and unit.keys:
            same = unit.content[0].tobytes() == shard.read(unit.keys[0]).content_hash()
    finally:
        unit.close()
    if not same:
        raise CacheError(
            f"{path}: the finished unit was made from other samples than {shard.path} holds now; delete it, or choose "
            "another --out, and run extract again"
        )
