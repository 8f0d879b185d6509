"""How small the maps of a trained teacher become, and what that costs the loss.

Measured, for each rule: bytes a pair of both maps in zstd blocks of 256 records (those of logits and keys in columns of
their own, the same for all); kept mass; the largest relative error of the attention loss, and the smallest cosine of
its gradient with respect to the last block's queries and keys, over three students of one run (initial, middle, final);
rates of encoding and decoding in one thread. The truth is the dense loss on the teacher's float32 maps.

Teacher: the sample teacher, fine-tuned on pictures of 10 x 10 cells (101 image tokens) with `dde-cache teacher train`,
unless `--teacher` names one. A rule with k of half the mean valid keys or more says nothing about sparseness and is
marked "not evidence".

Limit: the entropy of the codes of every valid entry, each head by itself, after steps even in log w, and after steps
even in sqrt(w), that are as fine as the loss error of 1 % wants. No code of single entries with such steps is smaller;
other steps, or codes that look at neighbours, can be.

    python benchmarks/compression.py --plot docs/compression.svg
"""

import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TINY, arguments, print_machine, save_teacher
from numcodecs import Blosc, Zstd
from torch import Tensor

from dde_cache.attention import SparseAttention, densify, sparsify
from dde_cache.batches import PairDataset
from dde_cache.codec import EncodedDense, EncodedSparse, decode, encode, encode_dense
from dde_cache.distill import StudentLosses, TrainConfig, student_output
from dde_cache.extract import ExtractConfig, extract
from dde_cache.importers.shapes import shapes
from dde_cache.join import join
from dde_cache.losses import dense_kl, log_attention, sparse_kl, weighted_sum
from dde_cache.prepare import labels_only
from dde_cache.samples import Shard, open_shards
from dde_cache.sources import CachedTargets
from dde_cache.spec import Weights
from dde_cache.store import Cache
from dde_cache.stream import CHUNK_PAIRS, BatchOrder, Shuffle
from dde_cache.student import DualEncoder, new_student
from dde_cache.targets import CacheTargets, decoded
from dde_cache.write_shards import write_shards

CELLS = 10
LEVEL = 9
"""Of zstd, for our own rules."""

Maps = Mapping[str, Tensor]
Rows = SparseAttention | Tensor


@dataclass(frozen=True)
class Truth:
    """The teacher's maps of some pairs, padded, with their masks; and a student's queries and keys at three moments."""

    maps: Maps
    text: Tensor
    image: Tensor
    students: Sequence[Sequence[Tensor]]
    logit_bytes: float
    key_bytes: float

    def queries(self, direction: str) -> Tensor:
        """Valid query rows [b, q]."""
        return self.text if direction == "t2i" else self.image

    def keys(self, direction: str) -> Tensor:
        """Valid keys [b, k]."""
        return self.image if direction == "t2i" else self.text

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.text)

    @property
    def entries(self) -> int:
        """Weights of the valid tokens, both maps, all heads."""
        return 2 * self.maps["t2i"].shape[1] * int((self.text.sum(-1) * self.image.sum(-1)).sum())


@dataclass(frozen=True)
class Rule:
    """A way to store maps: `encode` gives the arrays of one direction, `decode` the rows that training sees."""

    name: str
    encode: Callable[[Tensor, Tensor], Sequence[Tensor]]
    decode: Callable[[Sequence[Tensor], int], Rows]
    compress: Callable[[np.ndarray], bytes]
    k: float | None = None


@dataclass(frozen=True)
class Row:
    """What one rule came to."""

    name: str
    bytes_a_pair: float
    kept: float
    loss_error: float
    cosine: float
    encode_rate: float
    decode_rate: float
    evidence: bool


def zstd(level: int) -> Callable[[np.ndarray], bytes]:
    """A compressor of arrays."""
    codec = Zstd(level)
    return lambda values: codec.encode(np.ascontiguousarray(values))


def sparse_rule(name: str, weights: Weights, k: int | None, mass: float | None = None) -> Rule:
    """Our sparse codecs."""

    def stored(maps: Tensor, _mask: Tensor) -> Sequence[Tensor]:
        slots = None if k is None else min(k, maps.shape[-1])
        return list(encode(sparsify(maps, slots, mass), weights, maps.shape[-1]).parts.values())

    def rows(parts: Sequence[Tensor], _keys: int) -> Rows:
        return decode(EncodedSparse(parts[0], parts[1], parts[2]))

    def slots_before_heads(values: np.ndarray) -> bytes:
        return zstd(LEVEL)(values.transpose(0, 3, 1, 2) if values.ndim == 4 else values)

    return Rule(name, stored, rows, slots_before_heads, k if mass is None else None)


def dense_rule(steps: int, level: int = LEVEL) -> Rule:
    """Our dense codec."""
    return Rule(
        f"sqrt8, {steps} steps, zstd {level}",
        lambda maps, mask: [encode_dense(maps, torch.ones(maps.shape[:3:2]).bool(), mask, steps).weight],
        lambda parts, _keys: decode(EncodedDense(parts[0], steps)),
        zstd(level),
    )


def log_rule(steps: float) -> Rule:
    """Every key, steps even in log w: for the bound."""
    return Rule(
        f"log, {steps:g} steps an octave, all keys",
        lambda maps, mask: [
            torch.where(mask[:, None, None], 1 + (-maps.clamp_min(2**-16).log2() * steps).round(), torch.zeros(())).to(
                torch.uint8
            )
        ],
        lambda parts, _keys: _normalised(torch.where(parts[0] > 0, torch.exp2((1 - parts[0].float()) / steps), 0.0)),
        zstd(LEVEL),
    )


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def half_rule() -> Rule:
    """Dense float16 behind blosc with bitshuffle."""
    blosc = Blosc(cname="zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)
    return Rule(
        "dense float16, blosc zstd bitshuffle",
        lambda maps, _mask: [maps.half()],
        lambda parts, _keys: _normalised(parts[0].float()),
        lambda values: blosc.encode(np.ascontiguousarray(values)),
    )


def plain_top_rule(k: int, packed: bool) -> Rule:
    """Top-k as others store it: float16 with 16-bit positions, or positions in as few bits as they need with 8-bit
    linear weights; no tail, the rows scaled to 1."""

    def stored(maps: Tensor, _mask: Tensor) -> Sequence[Tensor]:
        sparse = sparsify(maps, min(k, maps.shape[-1]))
        if not packed:
            return [sparse.index.short(), sparse.weight.half()]
        bits = max(1, (maps.shape[-1] - 1).bit_length())
        spread = (sparse.index[..., None] >> torch.arange(bits)) & 1
        rows = np.packbits(spread.flatten(-2).to(torch.uint8).numpy(), axis=-1)
        return [torch.from_numpy(rows), (sparse.weight * 255).round().to(torch.uint8)]

    def rows(parts: Sequence[Tensor], keys: int) -> Rows:
        index, weight = parts
        if packed:
            bits, slots = max(1, (keys - 1).bit_length()), weight.shape[-1]
            spread = np.unpackbits(index.numpy(), axis=-1, count=bits * slots).reshape(*weight.shape, bits)
            index = (torch.from_numpy(spread).long() << torch.arange(bits)).sum(-1)
            weight = weight.float() / 255
        scaled = _normalised(weight.float())
        return SparseAttention(index.long(), scaled, torch.zeros(scaled.shape[:-1]))

    form = "packed positions, 8-bit weights" if packed else "16-bit positions, float16"
    return Rule(f"top {k}, {form}", stored, rows, zstd(LEVEL), k)


RULES: Sequence[Rule] = (
    half_rule(),
    plain_top_rule(8, packed=False),
    plain_top_rule(8, packed=True),
    sparse_rule("log8, top 4", "log8", 4),
    sparse_rule("log8, top 8", "log8", 8),
    sparse_rule("log8, top 16", "log8", 16),
    sparse_rule("log8, 0.9 of the mass, at most 32", "log8", 32, 0.9),
    sparse_rule("log8, 0.98 of the mass, at most 32", "log8", 32, 0.98),
    sparse_rule("log8, all keys", "log8", None),
    *(dense_rule(steps) for steps in (16, 24, 32, 40, 48, 56, 64, 96)),
    dense_rule(40, 3),
    dense_rule(40, 19),
    dense_rule(56, 19),
)


def losses(truth: Truth, rows: Mapping[str, Rows], student: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The attention loss of one student, and its gradient with respect to queries and keys."""
    text_query, text_key, image_query, image_key = (part.clone().requires_grad_() for part in student)
    logs = {
        "t2i": log_attention(text_query, image_key, truth.image),
        "i2t": log_attention(image_query, text_key, truth.text),
    }
    total = torch.zeros(())
    for direction, log in logs.items():
        taught = rows[direction]
        by_row = dense_kl(taught, log) if isinstance(taught, Tensor) else sparse_kl(taught, log, truth.keys(direction))
        weight = truth.queries(direction).float()
        total = total + weighted_sum(by_row, weight) / weight.sum()
    gradients = torch.autograd.grad(total, [text_query, text_key, image_query, image_key])
    return float(total.detach()), torch.cat([gradient.flatten().double() for gradient in gradients])


def measure(truth: Truth, rule: Rule, exact: Sequence[tuple[float, Tensor]]) -> Row:
    """Encode, compress, decode, and compare the loss."""
    size, kept, encoding, decoding = 0, [], 0.0, 0.0
    rows: dict[str, Rows] = {}
    for direction, maps in truth.maps.items():
        valid = truth.queries(direction)
        begin = time.process_time()
        parts = rule.encode(maps, truth.keys(direction))
        for part in parts:
            stored = (part * valid.reshape(len(valid), 1, -1, *([1] * (part.dim() - 3)))).numpy()
            blocks = (stored[first : first + CHUNK_PAIRS] for first in range(0, truth.pairs, CHUNK_PAIRS))
            size += sum(len(rule.compress(block)) for block in blocks)
        encoding += time.process_time() - begin
        begin = time.process_time()
        rows[direction] = rule.decode(parts, maps.shape[-1])
        decoding += time.process_time() - begin
        held = rows[direction]
        mass = torch.ones(valid.shape)[:, None] if isinstance(held, Tensor) else 1 - held.tail
        kept.append(float((mass * valid[:, None]).sum() / (valid.sum() * mass.shape[1])))
    found = [losses(truth, rows, student) for student in truth.students]
    keys = float(truth.text.sum(-1).float().mean() + truth.image.sum(-1).float().mean()) / 2
    return Row(
        name=rule.name,
        bytes_a_pair=size / truth.pairs,
        kept=sum(kept) / 2,
        loss_error=max(abs(got[0] / want[0] - 1) for got, want in zip(found, exact, strict=True)),
        cosine=min(
            float(torch.cosine_similarity(got[1], want[1], dim=0)) for got, want in zip(found, exact, strict=True)
        ),
        encode_rate=truth.pairs / encoding,
        decode_rate=truth.pairs / max(decoding, 1e-9),
        evidence=rule.k is None or rule.k < keys / 2,
    )


def entropy_bound(truth: Truth, exact: Sequence[tuple[float, Tensor]], rules: Sequence[Rule]) -> tuple[float, float]:
    """Bytes a pair, by entropy, and loss error of the first of some rules with a loss error of at most 1 %."""
    for rule in rules:
        row = measure(truth, rule, exact)
        if row.loss_error <= 0.01:
            break
    bits = 0.0
    for direction, maps in truth.maps.items():
        (code,) = rule.encode(maps, truth.keys(direction))
        valid = (truth.queries(direction)[:, :, None] & truth.keys(direction)[:, None]).numpy()
        for head in range(code.shape[1]):
            counts = np.bincount(code[:, head].numpy()[valid])
            share = counts[counts > 0] / counts.sum()
            bits -= float((share * np.log2(share)).sum()) * counts.sum()
    return bits / 8 / truth.pairs, row.loss_error


def make_teacher(folder: Path, full: bool) -> Path:
    """Fine-tune the sample teacher on larger grids by the very command; a random one for a smoke test."""
    if not full:
        save_teacher(folder / "teacher", TINY)
        return folder / "teacher"
    command = Path(sys.executable).with_name("dde-cache")
    picture = ["--grid", str(CELLS), "--kinds", "exists,neighbour"]
    subprocess.run(
        [command, "data", "import", "shapes", "--count", "4000", "--out", folder / "train", *picture], check=True
    )
    recipe = {"steps": 1000, "batch_size": 64, "learning_rate": 4e-4, "warmup": 0.05, "precision": "bf16"}
    options = [word for name, value in recipe.items() for word in ("--set", f"{name}={value}")]
    subprocess.run(
        [command, "teacher", "train", folder / "train", "--init", "sample", "--out", folder / "teacher", *options],
        check=True,
    )
    return folder / "teacher"


def observe(teacher: str, shards: Sequence[Shard], folder: Path, pairs: int, steps: int) -> Truth:
    """Dense maps of some pairs, and a student's queries and keys before, in the middle of, and after a short run."""
    extract(shards, teacher, folder / "cache", ExtractConfig(k=None, weights="float32"))
    cache = Cache(folder / "cache")
    targets, config = CachedTargets(cache), TrainConfig(steps=steps, batch_size=32, learning_rate=8e-4, workers=0)
    like = labels_only(str(folder / "cache"))
    table = join(shards, cache, "error").table
    dataset = PairDataset(
        shards, table, like.preprocessor, like.labels, CacheTargets(cache, shards, cache.spec.layers[-1])
    )
    batch = dataset.__getitems__(list(range(min(pairs, len(table)))))
    maps = {name: decoded(batch, name, None) for name in ("t2i", "i2t")}
    text, image = batch["attention_mask"].bool(), None
    torch.manual_seed(0)
    student = new_student(like.tower, like.labels)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate)
    criterion = StudentLosses(config, targets, mean_heads=False)
    moments = []
    order = list(BatchOrder(table, Shuffle(0), min(config.batch_size, len(table)), 0, steps))
    for number in range(steps + 1):
        if number in (0, steps // 4, steps):
            moments.append(_queries_keys(student, batch))
        if number == steps:
            break
        optimizer.zero_grad()
        criterion(student, dataset.__getitems__(order[number]))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (number + 1) / 30)
        optimizer.step()
    with torch.no_grad():
        image = student_output(student, batch).image.mask
    dense = {"t2i": densify(maps["t2i"], image.shape[1]), "i2t": densify(maps["i2t"], text.shape[1])}
    stored = {name: member_bytes(cache, name) for name in ("predictions/", "samples/key")}
    return Truth(dense, text, image, moments, stored["predictions/"], stored["samples/key"])


def member_bytes(cache: Cache, name: str) -> float:
    """Bytes a pair of the chunks of some arrays, as they are stored."""
    pairs = sum(entry.pairs for entry in cache.manifest.units)
    total = 0
    for entry in cache.manifest.units:
        with zipfile.ZipFile(cache.unit_path(entry)) as archive:
            members = archive.infolist()
        total += sum(one.file_size for one in members if one.filename.startswith(name) and "/c/" in one.filename)
    return total / pairs


@torch.no_grad()
def _queries_keys(student: DualEncoder, batch: Mapping[str, Tensor]) -> list[Tensor]:
    output = student_output(student, dict(batch))
    sides = (output.text.query_key, output.image.query_key)
    return [part for side in sides for part in (side.query, side.key)]


def show(truth: Truth, rows: Sequence[Row], bounds: Mapping[str, tuple[float, float]]) -> None:
    """Print the table."""
    dense = 2 * truth.entries / truth.pairs
    columns = (
        "rule", "maps, bytes a pair", "logits", "keys", "dense float16 / maps", "kept", "loss error", "cosine",
        "encode, pairs/s", "decode",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        cells = (
            f"{row.name}{'' if row.evidence else ' (not evidence)'}",
            f"{row.bytes_a_pair:,.0f}",
            f"{truth.logit_bytes:.1f}",
            f"{truth.key_bytes:.1f}",
            f"{dense / row.bytes_a_pair:.2f}",
            f"{row.kept:.3f}",
            f"{row.loss_error:.2%}",
            f"{row.cosine:.5f}",
            f"{row.encode_rate:,.0f}",
            f"{row.decode_rate:,.0f}",
        )
        print(f"| {' | '.join(cells)} |")
    for steps, (bound, error) in bounds.items():
        print(
            f"limit: {dense / bound:.2f} ({8 * bound * truth.pairs / truth.entries:.2f} bits an entry) is the entropy "
            f"of steps even in {steps} at a loss error of {error:.2%}"
        )
    print(
        f"  dense float16: {dense:,.0f} bytes a pair of {truth.text.sum(-1).float().mean():.1f} text and "
        f"{truth.image.sum(-1).float().mean():.0f} image tokens; {truth.pairs:,} pairs"
    )


def _annotate(axes: Any, named: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write each point's name where it covers no other point or name, as near as may be, with a line to its point."""
    size, wide = 7, 0.6
    low, high = axes.bbox.x0 * 72 / axes.figure.dpi, axes.bbox.x1 * 72 / axes.figure.dpi
    points = np.array([axes.transData.transform(point) for point, _ in named]) * 72 / axes.figure.dpi
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for (point, name), (x, y) in zip(named, points, strict=True):
        width = wide * size * len(name)
        places = [
            (side * far if side else -width / 2, rise)
            for rise in sorted(range(-45, 50, 3), key=abs)
            for side, far in ((1, 7), (-1, width + 7), (0, 0), (1, 30), (-1, width + 30))
        ]
        boxes = [(x + right - 1, y + up - size / 2, x + right + width + 1, y + up + size / 2) for right, up in places]
        free = [
            (abs(up) + 0.3 * min(abs(right), abs(right + width)), -right, up, box)
            for (right, up), box in zip(places, boxes, strict=True)
            if low < box[0]
            and box[2] < high
            and not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            )
        ]
        _, left, up, box = min(free, default=(0, -7, 0, boxes[0]))
        taken.append(box)
        axes.annotate(
            name,
            point,
            xytext=(-left, up),
            textcoords="offset points",
            fontsize=size,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey", "shrinkA": 0, "shrinkB": 2},
        )


def plot(truth: Truth, rows: Sequence[Row], path: Path) -> None:
    """Draw size against loss error."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    dense = 2 * truth.entries / truth.pairs
    figure, axes = pyplot.subplots(figsize=(8, 5))
    families = {
        "sqrt8": ("sqrt8 (every key)", "o"),
        "log8": ("log8 (sparse, tail mass)", "s"),
        "": ("general recipes", "^"),
    }
    named = []
    for family, (label, marker) in families.items():
        mine = [
            row
            for row in rows
            if (row.name.startswith(family) if family else not row.name.startswith(("sqrt8", "log8")))
        ]
        points = [(dense / row.bytes_a_pair, 100 * row.loss_error) for row in mine]
        axes.plot(*zip(*points, strict=True), marker, label=label)
        named += [
            (point, row.name.removeprefix(f"{family}, ").removesuffix(f", zstd {LEVEL}"))
            for point, row in zip(points, mine, strict=True)
        ]
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="dense float16 / stored", ylabel="error of the attention loss, %", yscale="log")
    axes.margins(x=0.1, y=0.1)
    axes.legend(loc="lower right")
    _annotate(axes, named)
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--teacher", help="a trained ViLT; without it, the sample teacher is fine-tuned")
    parser.add_argument("--shards", help="its pictures and texts; without it, generated ones")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--plot", type=Path, help="write a picture of the table (needs matplotlib)")
    given = parser.parse_args()
    full = given.size == "full"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = given.teacher or str(make_teacher(folder, full))
        if given.shards is None:
            samples = shapes("test", 200 if full else 4, grid=CELLS if full else 8, kinds=("exists", "neighbour"))
            write_shards(samples, folder / "test", source="shapes", split="test", shard_size=1000, arguments={})
        truth = observe(
            teacher, open_shards(given.shards or folder / "test"), folder, given.pairs if full else 16,
            240 if full else 4,
        )  # fmt: skip
    exact = [losses(truth, truth.maps, student) for student in truth.students]
    rows = [measure(truth, rule, exact) for rule in RULES]
    bounds = {
        "log w": entropy_bound(truth, exact, [log_rule(steps) for steps in (1, 1.5, 2, 2.25, 2.5, 3, 4, 6, 8)]),
        "sqrt(w)": entropy_bound(truth, exact, [dense_rule(steps) for steps in (32, 40, 48, 56, 64, 80, 96)]),
    }
    show(truth, rows, bounds)
    if given.plot is not None:
        plot(truth, rows, given.plot)
    print_machine()


if __name__ == "__main__":
    main()
