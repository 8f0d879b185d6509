"""Peak memory of training from a cache, and from one ten times larger of the same shapes.

Measured, each in a process of its own: the peak resident memory (`VmHWM`) of a run of `dde_cache.train.train`, plus
that of its one worker. Both runs take the same number of steps, one epoch of the larger cache; its units are those of
the smaller one and nine times as many others. Shuffle windows are small, so that both caches are larger than one, and
the smaller one's pictures fill the worker's budget for decoded ones.

Limit: at 1, memory does not depend on the size of the cache. What does grow is the table of keys: the growth a pair is
printed beside the ratio.

    python benchmarks/memory.py
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import TINY, arguments, pictures_with_questions, print_machine, print_ratio, save_teacher

from dde_cache.distill import TrainConfig
from dde_cache.extract import ExtractConfig, extract
from dde_cache.samples import open_shards
from dde_cache.sources import CachedTargets
from dde_cache.store import Cache
from dde_cache.train import train

TIMES = 10


def peak_of_this_process() -> int:
    """Peak resident bytes; not `ru_maxrss`, which begins with that of the process which started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("expected VmHWM in /proc/self/status; this benchmark needs Linux")


def run(shards: str, cache: Path, out: Path, steps: int, batch_size: int) -> int:
    """Train, and return the peak of this process and of its worker."""
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        workers=1,
        shuffle_shards=2,
        shuffle_chunks=2,
        save_every=steps,
        log_every=steps,
    )
    train(open_shards(shards), CachedTargets(Cache(cache)), out, config)
    return peak_of_this_process() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def alone(*parts: object) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--alone", *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--alone", nargs=5, metavar="X", help="internal: shards, cache, out, steps, batch size")
    given = parser.parse_args()
    if given.alone:
        shards, cache, out, steps, batch_size = given.alone
        print(json.dumps(run(shards, Path(cache), Path(out), int(steps), int(batch_size))))
        return
    full = given.size == "full"
    units, unit_pairs, batch_size = (6, 512, 64) if full else (2, 8, 8)
    peaks: dict[str, list[int]] = {"small": [], "large": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", TINY)
        everything = pictures_with_questions(folder / "shards", TINY, TIMES * units * unit_pairs, TIMES * units)
        first, last = everything[0].path, everything[units - 1].path
        names = {
            "small": str(first.parent / f"{{{first.stem}..{last.stem}}}.tar"),
            "large": str(folder / "shards"),
        }
        for which, shards in names.items():
            extract(open_shards(shards), str(folder / "teacher"), folder / which, ExtractConfig(batch_size=64))
        pairs = {"small": units * unit_pairs, "large": TIMES * units * unit_pairs}
        steps = pairs["large"] // batch_size
        for number in range(given.repeats or 1):
            for which, shards in names.items():
                out = folder / f"run-{which}-{number}"
                peaks[which].append(alone(shards, folder / which, out, steps, batch_size))
    small, large = (min(peaks[which]) for which in ("small", "large"))
    print_ratio(
        f"peak memory, cache of {pairs['large']:,} pairs / of {pairs['small']:,}",
        peaks["large"],
        peaks["small"],
        reach="<= 1.05",
        limit=f"1: the smaller one's {small / 2**20:,.0f} MiB, main process and worker together",
    )
    growth = (large - small) / (pairs["large"] - pairs["small"])
    print(f"  {steps} steps of {batch_size} each; growth {growth:,.0f} bytes a pair")
    print_machine()


if __name__ == "__main__":
    main()
