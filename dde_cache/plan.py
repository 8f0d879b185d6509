"""How large a cache will be and how long its extraction takes, from a small random sample of its batches.

Size: sampled batches are encoded as units of about the real size. What a unit costs by itself (metadata, the zip's
book-keeping) is counted a unit, samples' keys and hashes a sample, everything else a pair.
Time: after a warm-up batch, reading, the teacher and writing are timed apart and taken a pair.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dde_cache.arrays import unit_members
from dde_cache.buckets import UnitWork
from dde_cache.encoder import Records, TargetEncoder
from dde_cache.errors import InputError
from dde_cache.identity import ExtractConfig
from dde_cache.partners import Partner, PartnersOfShards, Place
from dde_cache.passes import pass_name
from dde_cache.records import assemble, extraction_dataset, unit_attributes
from dde_cache.samples import Sample, Shard
from dde_cache.spec import Model, Provenance, Rows, TargetSpec
from dde_cache.stream import CHUNK_PAIRS, PairTable
from dde_cache.teacher import FusionTeacher

SAMPLE = 512
"""Pairs that a prediction encodes."""

_FEWEST_BATCHES = 4
_METADATA = "zarr.json"
_UNIT_BYTES = 2**16
_PAIR_BYTES = 512
_LARGER_PICTURES = 2
_MARGIN = 1.1


class ExtractPlan(Model):
    """What an extraction would do."""

    units: int = Field(description="still to extract")
    pairs: int = Field(description="still to extract")
    views: int = Field(description="of each pair")
    passes: int = Field(default=1, description="of each view: forward passes of the teacher")
    finished_pairs: int = Field(description="in units that are there")
    sampled_pairs: int = Field(description="encoded for this prediction")
    bytes: int = Field(description="of the units to come; within 10 %")
    bytes_a_pair: float
    seconds: float = Field(description="from the start of the command to its end; within 20 % on a machine left alone")
    pairs_a_second: float
    free_bytes: int = Field(description="where the cache goes")
    fits: bool = Field(description="whether the disk holds the units to come, with a margin of 10 %")


@dataclass(frozen=True)
class Prediction:
    """Bytes and seconds of everything to come, and on how many pairs (each once a view and pass) that rests."""

    bytes: int
    seconds: float
    pairs: int

    def fits(self, free: int) -> bool:
        """Whether so many free bytes are enough, with a margin."""
        return self.bytes * _MARGIN <= free


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where a folder is, or will be."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def generous_bytes(spec: TargetSpec, image_tokens: int, pairs: int, units: int) -> int:
    """More than a cache will have: nothing compressed, every text as long as allowed, pictures twice as large.

    Args:
        spec: what is kept.
        image_tokens: of the first picture.
        pairs: how many.
        units: how many.
    """
    images, texts = _LARGER_PICTURES * image_tokens, spec.text_length
    rows = sum(_row_bytes(spec, name, images, texts) for name in spec.rows)
    record = spec.stored_heads * rows + 4 * texts + (2 * (spec.hidden_width or 0) + 4) * (texts + images)
    record += 2 * (2 * (spec.pooled_width or 0) + 4)
    pair = record * spec.images * len(spec.layers) + 4 * (spec.classes or 0) + _PAIR_BYTES
    return pair * pairs + _UNIT_BYTES * units


def _row_bytes(spec: TargetSpec, name: Rows, images: int, texts: int) -> int:
    """Of one head of one map in one direction."""
    rows = texts if name in ("t2i", "t2w") else images
    keys = {"t2i": images, "i2t": texts}.get(name, images + texts)
    if spec.weights == "sqrt8":
        return rows * keys
    weight, tail = {"log8": 1, "float16": 2}.get(spec.weights, 4), 4 if spec.weights == "float32" else 2
    index = 1 if images + texts <= 256 else 2 if images <= 2**15 else 4
    return rows * (min(spec.k or keys, keys) * (index + weight) + tail)


def check_room(prediction: Prediction, folder: Path, free: int) -> None:
    """Refuse an extraction that the disk cannot hold.

    Raises:
        InputError: there is not enough room.
    """
    if not prediction.fits(free):
        raise InputError(
            f"expected room for about {prediction.bytes / 1e6:,.1f} MB of targets and 10 % more in {folder}, got "
            f"{free / 1e6:,.1f} MB free; make room, choose another --out, keep less (--k, --mass, --heads mean), or "
            "pass --no-disk-check to begin all the same"
        )


@dataclass
class _Measured:
    """Sums over the sample."""

    pairs: int = 0
    samples: int = 0
    unit_bytes: float = 0.0
    units: int = 0
    sample_bytes: int = 0
    pair_bytes: int = 0
    read: float = 0.0
    compute: float = 0.0
    timed_pairs: int = 0
    write: float = 0.0

    def count(self, members: Mapping[str, bytes]) -> None:
        """Add the members of one unit."""
        self.units += 1
        self.unit_bytes += 22  # the zip's end
        for name, content in members.items():
            book_keeping = 30 + 46 + 2 * len(name)
            own = name.endswith(_METADATA) or name.rpartition("/c/")[2].startswith("0")
            self.unit_bytes += book_keeping if own else 0
            if name.endswith(_METADATA):
                self.unit_bytes += len(content)
            elif name.startswith("samples/"):
                self.sample_bytes += len(content)
            else:
                self.pair_bytes += len(content) + (0 if own else book_keeping)

    def predict(self, *, pairs: int, samples: int, units: int, workers: int, setup: float) -> Prediction:
        size = (
            self.unit_bytes / self.units * units
            + self.sample_bytes / self.samples * samples
            + self.pair_bytes / self.pairs * pairs
        )
        # Workers read while the teacher runs; the slower of the two decides.
        read, compute = self.read / self.timed_pairs, self.compute / self.timed_pairs
        rate = max(compute, read / workers) if workers else read + compute
        return Prediction(round(size), setup + pairs * (rate + self.write / self.pairs), self.pairs)


def predict(
    shards: Sequence[Shard],
    table: PairTable,
    teacher: FusionTeacher,
    spec: TargetSpec,
    config: ExtractConfig,
    *,
    sample: int = SAMPLE,
    setup: float = 0.0,
    seed: int = 0,
) -> Prediction:
    """Encode some batches and say what all of them will cost. Nothing is kept.

    Args:
        shards: what is to be extracted.
        table: their pairs.
        teacher: on its device.
        spec: what is kept.
        config: how.
        sample: pairs to encode, about; at least four batches.
        setup: seconds that went by before the first batch.
        seed: chooses the batches.

    Raises:
        InputError: a sample cannot be read.
    """
    random = np.random.default_rng(seed)
    wanted = max(_FEWEST_BATCHES, -(-sample // config.batch_size))
    batches = []
    for number in np.sort(random.permutation(len(shards))[:wanted]).tolist():
        work = UnitWork.of(shards[number], teacher.preprocessor, spec, config.batch_size)
        first = table.numbers(number).start
        batches += [[first + row for row in batch] for batch in work.batches]
    wanted = min(len(batches), wanted)
    chosen = np.sort(random.permutation(len(batches))[:wanted])
    together = max(1, round(min(len(table) / len(shards), max(sample, CHUNK_PAIRS)) / config.batch_size))
    dataset = extraction_dataset(shards, table, teacher.preprocessor, spec)
    encoder = TargetEncoder(teacher, spec, config.device)
    encoder(dataset.__getitems__(batches[chosen[0]]))  # warm-up
    dataset = extraction_dataset(shards, table, teacher.preprocessor, spec)
    measured = _Measured()
    for first in range(0, wanted, together):
        numbers = [batches[number] for number in chosen[first : first + together]]
        records = []
        for batch in numbers:
            begin = time.perf_counter()
            read = dataset.__getitems__(batch)
            middle = time.perf_counter()
            records.append(encoder(read))
            measured.read += middle - begin
            measured.compute += time.perf_counter() - middle
            measured.timed_pairs += len(batch)
        begin = time.perf_counter()
        _write(records, shards, table, [pair for batch in numbers for pair in batch], spec, measured)
        measured.write += time.perf_counter() - begin
    return measured.predict(
        pairs=len(table),
        samples=sum(len(shard) for shard in shards),
        units=len(shards),
        workers=config.workers,
        setup=setup,
    )


def _write(
    records: Sequence[Records],
    shards: Sequence[Shard],
    table: PairTable,
    numbers: Sequence[int],
    spec: TargetSpec,
    measured: _Measured,
) -> None:
    """Make a unit of some batches, count its bytes, and write it to a place that is forgotten."""
    samples: dict[tuple[int, str], Sample] = {}
    rank: dict[tuple[int, str], int] = {}
    place: list[Place] = []
    partners: dict[Place, Partner] = {}
    chosen = PartnersOfShards(shards)
    for number in numbers:
        pair = table[number]
        key = pair.shard, pair.key
        if key not in samples:
            rank[key] = len(samples)
            samples[key] = shards[pair.shard].read(pair.key)
        place.append((rank[key], pair.text, pair.view, pair.pass_number))
        if pass_name(spec.passes[pair.pass_number]) == "negative":
            partners[place[-1]] = chosen.partner(pair, samples[key].texts[pair.text])
    arrays = assemble(records, list(samples.values()), place, spec, partners)
    members = unit_members(arrays, unit_attributes(arrays, spec, shards[0].name, Provenance(), {}))
    measured.count(members)
    measured.pairs += len(numbers)
    measured.samples += len(samples)
    with tempfile.TemporaryFile() as file:
        digest = hashlib.sha256()
        for content in members.values():
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
