"""What `dde-cache extract --plan` predicts over what the extraction then takes, in bytes and in seconds.

Measured: the prediction from its random sample, made before each extraction, over the size of the units and the seconds
of the whole extraction, both with teacher loading. Random teachers on generated pictures; the full size is ViLT-B/32's
shape on small pictures.

Limit: at 1, the prediction is right. The project asks for 10 % in size and 20 % in time; time holds for a machine that
is left alone, since whatever else runs changes between the two.

    python benchmarks/plan.py
"""

import tempfile
import time
from pathlib import Path

from common import TINY, TeacherShape, arguments, pictures_with_questions, print_machine, print_ratio, save_teacher

from dde_cache.extract import ExtractConfig, extract, plan_extraction
from dde_cache.plan import SAMPLE

MIDDLE = TeacherShape(hidden_size=192, layers=6, heads=6, side=192, patch=16, vocabulary=2000, classes=100)
"""145 image tokens, as ViLT-B/32 has, in a model that is quick on a CPU."""


def main() -> None:
    given = arguments(__doc__).parse_args()
    full = given.size == "full"
    shape, pairs, units, sample = (MIDDLE, 1500, 3, SAMPLE) if full else (TINY, 24, 3, 8)
    predicted: dict[str, list[float]] = {"bytes": [], "seconds": []}
    taken: dict[str, list[float]] = {"bytes": [], "seconds": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", shape)
        shards = pictures_with_questions(folder / "shards", shape, pairs, units)
        config = ExtractConfig(batch_size=64 if full else 4)
        for number in range(given.repeats or (3 if full else 1)):
            out = folder / f"cache-{number}"
            begin = time.perf_counter()
            plan = plan_extraction(shards, str(folder / "teacher"), out, config, sample)
            planning = time.perf_counter() - begin
            summary = extract(shards, str(folder / "teacher"), out, config)
            predicted["bytes"].append(plan.bytes)
            predicted["seconds"].append(plan.seconds)
            taken["bytes"].append(summary.bytes)
            taken["seconds"].append(summary.seconds)
            print(
                f"  {plan.sampled_pairs} of {plan.pairs} pairs in {planning:.1f} s: {plan.bytes:,} bytes in "
                f"{plan.seconds:.1f} s predicted; {summary.bytes:,} bytes in {summary.seconds:.1f} s taken",
                flush=True,
            )
    print_ratio(
        "predicted bytes / bytes", predicted["bytes"], taken["bytes"], reach="0.9 to 1.1", limit="1: the cache itself"
    )
    print_ratio(
        "predicted seconds / seconds",
        predicted["seconds"],
        taken["seconds"],
        reach="0.8 to 1.2",
        limit="1: the extraction itself",
    )
    print_machine()


if __name__ == "__main__":
    main()
