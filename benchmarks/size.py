"""Bytes of a cache against dense float16 maps of the valid tokens, with the attention mass that is kept.

Measured: every file of units of a cache (maps, logits, keys, hashes, metadata) over the bytes of both maps, every head
that is stored and the valid tokens alone, in float16 without compression: what a dense cache needs at least.

With `--cache` a cache of your own; without it, caches of the sample teacher on generated pictures: by default, for
several k, and with hidden and pooled states in both codecs.

Limit: at 1, nothing is saved. Ten image tokens (3 x 3 patches and CLS) leave little to drop; a row of ViLT-B/32 has
145 (see reading.py).

    python benchmarks/size.py --cache CACHE
"""

import tempfile
from pathlib import Path

from common import TINY, arguments, print_machine, print_ratio, save_teacher

from dde_cache.extract import ExtractConfig, extract
from dde_cache.importers.shapes import shapes
from dde_cache.samples import open_shards
from dde_cache.spec import StateCodec
from dde_cache.store import Cache
from dde_cache.summary import summarise
from dde_cache.teacher import SAMPLE_TEACHER, resolve
from dde_cache.write_shards import write_shards

KEPT: tuple[int | None, ...] = (2, 4, 8, None)
CODECS: tuple[StateCodec, ...] = ("float16", "int8")


def show(folder: Path) -> None:
    """Print the ratio of one cache."""
    found = summarise(Cache(folder))
    spec = found.spec
    beside = "".join(f", {one.group} states {one.codec}" for one in spec.states)
    kept = ", ".join(f"{direction} {mass.mean:.3f}" for direction, mass in found.kept_mass.items()) or "all"
    print_ratio(
        f"cache bytes / dense float16, {spec.kept}, {spec.weights}{beside}",
        [found.bytes_a_pair],
        [found.dense_bytes_a_pair],
        limit=f"1: dense float16, {found.dense_bytes_a_pair:,.0f} bytes a pair of {found.text_tokens[0]} to "
        f"{found.text_tokens[1]} text and {found.image_tokens[1]} image tokens, {spec.stored_heads} heads",
    )
    print(f"  kept mass: {kept}; {found.bytes_a_pair:,.0f} bytes a pair, {found.pairs:,} pairs in {found.units} units")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="a cache; without it, one is made")
    given = parser.parse_args()
    if given.cache is not None:
        show(given.cache)
        print_machine()
        return
    full = given.size == "full"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = SAMPLE_TEACHER
        # Generated pictures have 36 px, which a random teacher's processor would enlarge; it only stands in.
        if not (Path(resolve(SAMPLE_TEACHER)) / "model.safetensors").is_file():
            teacher = str(folder / "teacher")
            save_teacher(folder / "teacher", TINY)
            print("  the sample teacher is not there; a random one stands in for it")
        count, kept = (500, KEPT) if full else (4, (4,))
        write_shards(
            shapes("test", count), folder / "shards", source="shapes", split="test", shard_size=1000, arguments={}
        )
        shards = open_shards(folder / "shards")
        states = [
            ExtractConfig(targets=("cross", kind), states=codec) for kind in ("hidden", "pooled") for codec in CODECS
        ]
        for number, config in enumerate((ExtractConfig(), *(ExtractConfig(k=k) for k in kept), *states)):
            out = folder / f"cache-{number}"
            extract(shards, teacher, out, config)
            show(out)
    print_machine()


if __name__ == "__main__":
    main()
