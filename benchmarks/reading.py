"""Reading targets from a cache against reading and decompressing the same bytes from plain files.

Measured: one process reads an epoch of records of ViLT-B/32 shape (12 heads, 6 to about 20 text tokens, 145 image
tokens; per-head top 8, or with `--weights sqrt8` every key) from finished unit files, in batches of 128, in the
shuffled order of training: SHA-256 of every unit, opening, the checksum of every chunk, the join by key, the shuffle
window, and the tensors of each batch. It hashes and decompresses in up to four threads, as training does; with
`--threads 1` in one.

Limit: the very zstd blocks of those units, laid one after the other in plain files, read and decompressed by one thread
in the order of the files, checking nothing and keeping nothing. Both read from the page cache.

    python benchmarks/reading.py
"""

import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import cast

import numpy as np
import torch
from common import CLOCKS, TEXT_LENGTH, VILT_B32, arguments, by_turns, print_machine, print_ratio, text_lengths
from numcodecs.zstd import decompress

from dde_cache import chunks
from dde_cache.attention import SparseAttention, sparsify
from dde_cache.codec import EncodedAttention, concatenate, encode, encode_dense
from dde_cache.identity import STEPS
from dde_cache.samples import Shard
from dde_cache.spec import (
    FORMAT_VERSION,
    Group,
    Provenance,
    TargetSpec,
    TeacherIdentity,
    UnitAttributes,
    Weights,
    hash_keys,
)
from dde_cache.store import Cache, CacheWriter
from dde_cache.stream import CHUNK_PAIRS, BatchOrder, PairTable, Shuffle
from dde_cache.targets import CacheTargets
from dde_cache.unit import MapColumns, UnitArrays, write_unit

HEADS = VILT_B32.heads
KEPT = 8
CHECKSUM_BYTES = 4
GRID = (12, 12)
IMAGE_TOKENS = VILT_B32.image_tokens


class Name:
    """As much of a shard as the reader of targets looks at."""

    def __init__(self, name: str) -> None:
        self.name = name


def encoded_rows(
    lengths: np.ndarray, random: torch.Generator, weights: Weights
) -> tuple[EncodedAttention, EncodedAttention]:
    """Attention of `lengths` text tokens and 145 image tokens, a few keys strong for all queries of a head."""
    count, longest = len(lengths), int(lengths.max())
    text = torch.arange(longest)[None] < torch.from_numpy(lengths)[:, None]
    scores = torch.randn(count, HEADS, longest, IMAGE_TOKENS, generator=random)
    scores += 1.5 * torch.randn(count, HEADS, 1, IMAGE_TOKENS, generator=random)
    scores += 1.5 * torch.randn(count, HEADS, longest, 1, generator=random)
    rows = text[:, None, :, None]
    keys = scores.masked_fill(~rows, torch.finfo(torch.float32).min).transpose(2, 3)
    if weights == "sqrt8":
        image = torch.ones(count, IMAGE_TOKENS, dtype=torch.bool)
        return (
            encode_dense(scores.softmax(-1), text, image, STEPS),
            encode_dense(keys.softmax(-1), image, text, STEPS),
        )
    t2i = sparsify(scores.softmax(-1), KEPT)
    t2i = SparseAttention(t2i.index * rows, t2i.weight * rows, t2i.tail * rows[..., 0])
    i2t = sparsify(keys.softmax(-1), min(KEPT, longest))
    return encode(t2i, weights, IMAGE_TOKENS), encode(i2t, weights, TEXT_LENGTH)


def write_cache(folder: Path, units: int, records: int, classes: int, weights: Weights = "log8") -> Cache:
    """Write units of `records` pairs with the project's own writer; units hold the same pairs in other orders."""
    assets = folder / "made-assets"
    assets.mkdir(parents=True)
    (assets / "labels.json").write_text(str([f"{number}" for number in range(classes)]).replace("'", '"'))
    spec = TargetSpec(
        teacher=TeacherIdentity(family="vilt", weights="0", config="0", tokenizer="0", processor="0"),
        layers=(11,),
        teacher_layers=12,
        teacher_heads=HEADS,
        heads="all",
        queries="valid",
        text_length=TEXT_LENGTH,
        patch_size=32,
        k=None if weights == "sqrt8" else KEPT,
        steps=STEPS if weights == "sqrt8" else None,
        weights=weights,
        dtype="float32",
        classes=classes,
        rule="block-softmax, cls first, row-major patches",
        directions=("t2i", "i2t"),
        view="as-processed",
        views=1,
        passes=("matched",),
        images=1,
        mass=None,
        groups={},
    )
    writer = CacheWriter(folder / "cache", spec, assets)
    random = np.random.default_rng(0)
    lengths = text_lengths(records, random)
    lengths[0] = lengths.max()
    encoded: dict[str, list[EncodedAttention]] = {"t2i": [], "i2t": []}
    generator = torch.Generator().manual_seed(0)
    for part in np.array_split(np.arange(records), max(records // 64, 1)):
        # The longest text of all in each part, so that parts have one shape.
        counted = np.append(lengths[part], lengths.max())
        for name, rows in zip(("t2i", "i2t"), encoded_rows(counted, generator, weights), strict=True):
            encoded[name].append(rows.records(torch.arange(len(part))))
    whole = {name: concatenate(parts) for name, parts in encoded.items()}
    for number in range(units):
        name = f"{number:06d}"
        order = random.permutation(records)
        zeros = np.zeros(records, np.int64)
        ids = random.integers(5, 30000, (records, int(lengths.max())))
        columns = MapColumns(
            sample=np.arange(records),
            text=zeros,
            image=zeros,
            view=zeros,
            passes=zeros,
            layer=zeros + 11,
            text_tokens=lengths[order],
            token_ids=ids * (np.arange(ids.shape[1])[None] < lengths[order][:, None]),
            grid=np.tile(GRID, (records, 1)),
        )
        chosen = torch.from_numpy(order)
        arrays = UnitArrays(
            keys=[f"{name}-{sample:06d}" for sample in range(records)],
            content=random.integers(0, 256, (records, 32), dtype=np.uint8),
            maps=columns,
            t2i=whole["t2i"].records(chosen),
            i2t=whole["i2t"].records(chosen),
            prediction_sample=np.arange(records),
            prediction_text=zeros,
            logits=random.normal(size=(records, classes)).astype(np.float32),
        )
        attributes = UnitAttributes(
            format_version=FORMAT_VERSION,
            spec=spec,
            fingerprint=spec.fingerprint,
            assets=dict(writer.assets),
            source=f"{name}.tar",
            samples=records,
            pairs=records,
            keys=hash_keys(arrays.keys),
            groups={group: Group(required=True) for group in ("samples", "maps", "predictions")},
            provenance=Provenance(),
        )
        file = f"{name}.zarr.zip"
        size, digest = write_unit(writer.unit_path(file), arrays, attributes)
        writer.add(attributes.entry(file, size, digest))
    writer.close()
    return Cache(folder / "cache")


def dense_bytes(cache: Cache) -> float:
    """Bytes a record of both maps in float16, valid tokens alone; all units hold the same records."""
    unit = cache.unit(cache.manifest.units[0])
    cells = float((unit.maps.text_tokens * unit.maps.image_tokens).mean())
    unit.close()
    return 2 * 2 * HEADS * cells


def plain_files(cache: Cache, folder: Path) -> list[tuple[Path, list[int]]]:
    """Lay the zstd blocks of maps and logits one after the other in plain files; return the files and block sizes."""
    folder.mkdir()
    files = []
    for entry in cache.manifest.units:
        blocks = []
        with zipfile.ZipFile(cache.folder / "units" / entry.name) as archive:
            for member in archive.namelist():
                if member.startswith(("maps/t2i/", "maps/i2t/", "predictions/logits/")) and "/c/" in member:
                    blocks.append(archive.read(member)[:-CHECKSUM_BYTES])
        path = folder / f"{entry.name}.blocks"
        path.write_bytes(b"".join(blocks))
        files.append((path, [len(block) for block in blocks]))
    return files


def read_plain(files: list[tuple[Path, list[int]]]) -> int:
    """Read and decompress every block; return the number of bytes."""
    total = 0
    for path, sizes in files:
        with open(path, "rb") as file:
            for size in sizes:
                total += len(decompress(file.read(size)))
    return total


def read_cache(folder: Path, batch_size: int, seed: int) -> int:
    """Read an epoch of batches from a cache that was not opened before; return the number of pairs."""
    cache = Cache(folder)
    table = PairTable(
        [[(f"{entry.name[:6]}-{sample:06d}", 0) for sample in range(entry.samples)] for entry in cache.manifest.units]
    )
    shards = [cast(Shard, Name(entry.source)) for entry in cache.manifest.units]
    reader = CacheTargets(cache, shards, layer=11)
    batches = len(table) // batch_size
    read = 0
    for numbers in BatchOrder(table, Shuffle(seed), batch_size, 0, batches):
        batch = reader.targets([table[number] for number in numbers])
        read += len(batch["t2i.weight"])
    return read


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--units", type=int)
    parser.add_argument("--records", type=int, help="a unit")
    parser.add_argument("--classes", type=int, default=3, help="width of the logits; 3: SNLI-VE, 3129: VQAv2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--weights", choices=("log8", "sqrt8"), default="log8")
    parser.add_argument("--threads", type=int, default=chunks.THREADS, help="that hash and decompress")
    given = parser.parse_args()
    clock = CLOCKS[given.clock]
    full = given.size == "full"
    chunks.THREADS = given.threads
    units, records = given.units or (64 if full else 2), given.records or (1024 if full else 128)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = write_cache(folder, units, records, given.classes, given.weights)
        files = plain_files(cache, folder / "plain")
        seeds = iter(range(1000))

        def cached() -> float:
            start = clock()
            read = read_cache(cache.folder, given.batch_size, next(seeds))
            return read / (clock() - start)

        def plain() -> float:
            start = clock()
            read_plain(files)
            return units * records / (clock() - start)

        rates = by_turns({"cache": cached, "plain": plain}, given.repeats or (7 if full else 2), warm_up=1)
        stored = sum(entry.size for entry in cache.manifest.units)
        dense = dense_bytes(cache)
        blocks, opened = sum(sum(sizes) for _, sizes in files), read_plain(files)
    total = units * records
    rate = {way: statistics.median(values) for way, values in rates.items()}
    print_ratio(
        "reading targets / plain files (records a second)",
        rates["cache"],
        rates["plain"],
        reach=">= 0.5",
        limit=f"{rate['plain']:,.0f} records/s: read and decompress the same {blocks / total:,.0f} bytes a record "
        f"({opened / total:,.0f} decompressed, {rate['plain'] * opened / total / 2**20:,.0f} MiB/s) in one thread",
    )
    print(
        f"  cache: {rate['cache']:,.0f} records/s; {units} units of {records:,} records, {min(CHUNK_PAIRS, records)} "
        f"records a chunk, {given.weights}, batches of {given.batch_size}, {given.threads} threads, "
        f"{given.clock} time, {stored / total:,.0f} bytes a record (dense float16 of the "
        f"valid tokens: {dense:,.0f})"
    )
    print_machine()


if __name__ == "__main__":
    main()
