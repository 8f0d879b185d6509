"""Extraction in buckets of length against extraction in the order of the file: the teacher's time on the same pairs.

Measured: the teacher with its cross-modal blocks and their encoding, batches already read. Pictures have the sizes of
photographs (4:3, 3:2, 1:1, portrait and landscape), texts 6 to 40 tokens.

Limit: the tokens of the pairs themselves over those that the file's order is padded to. (Attention costs more than its
share of tokens, so time may fall further.)

    python benchmarks/bucketing.py
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import (
    CLOCKS,
    TINY,
    VILT_B32,
    TeacherShape,
    arguments,
    by_turns,
    picture,
    print_machine,
    print_ratio,
    save_teacher,
    timed,
)

from dde_cache.batches import Batch
from dde_cache.buckets import UnitWork
from dde_cache.encoder import TargetEncoder
from dde_cache.identity import ExtractConfig, target_spec
from dde_cache.records import extraction_dataset
from dde_cache.samples import EncodedImage, Sample, Text, open_shards
from dde_cache.stream import PairTable
from dde_cache.teacher import FusionTeacher
from dde_cache.vilt import image_tokens
from dde_cache.write_shards import write_shards

SIDES = ((3, 4), (4, 3), (2, 3), (3, 2), (1, 1))


def samples_of(shape: TeacherShape, random: np.random.Generator) -> Iterator[Sample]:
    """Pictures whose shorter side is the teacher's, with a caption each."""
    for number in itertools.count():
        width, height = SIDES[random.integers(len(SIDES))]
        unit = shape.side / min(width, height)
        image = picture(round(width * unit), round(height * unit), random)
        words = random.integers(0, shape.vocabulary - 5, random.integers(4, 39))
        text = Text(text=" ".join(f"w{word}" for word in words), label="answer0")
        yield Sample(f"{number:06d}", (EncodedImage(image, "jpg"),), (text,))


def padded_tokens(batches: list[Batch]) -> int:
    """Tokens that the teacher sees, padding included."""
    return sum(
        len(batch["pair"]) * (batch["input_ids"].shape[1] + int(image_tokens(batch["grid0"]).max()))
        for batch in batches
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()
    full = given.size == "full"
    shape, pairs = (VILT_B32 if full else TINY), given.pairs or (128 if full else 24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", shape)
        samples = itertools.islice(samples_of(shape, np.random.default_rng(0)), pairs)
        write_shards(samples, folder / "shards", source="benchmark", split="train", shard_size=pairs, arguments={})
        shards = open_shards(folder / "shards")
        teacher = FusionTeacher.load(str(folder / "teacher"))
        spec = target_spec(teacher, ExtractConfig())
        dataset = extraction_dataset(shards, PairTable.of(shards), teacher.preprocessor, spec)
        size = given.batch_size
        orders = {
            "file": [list(range(first, min(first + size, pairs))) for first in range(0, pairs, size)],
            "buckets": UnitWork.of(shards[0], teacher.preprocessor, spec, size).batches,
        }
        read = {order: [dataset.__getitems__(batch) for batch in batches] for order, batches in orders.items()}
    encode = TargetEncoder(teacher, spec, "cpu")
    ways = {
        order: lambda batches=batches: timed(lambda: [encode(one) for one in batches], CLOCKS[given.clock])
        for order, batches in read.items()
    }
    seconds = by_turns(ways, given.repeats or (4 if full else 1), warm_up=int(full))
    tokens = {order: padded_tokens(batches) for order, batches in read.items()}
    own = sum(int(one["attention_mask"].sum() + image_tokens(one["grid0"]).sum()) for one in read["file"])
    print_ratio(
        "extraction in buckets / in the order of the file",
        seconds["buckets"],
        seconds["file"],
        limit=f"{own / tokens['file']:.3f}: the tokens that are no padding",
    )
    print(f"  tokens in buckets / in the order of the file: {tokens['buckets'] / tokens['file']:.3f}")
    print(f"  {len(read['buckets'])} batches in buckets, {len(read['file'])} in the order of the file, {pairs} pairs")
    print_machine()


if __name__ == "__main__":
    main()
