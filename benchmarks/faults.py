"""Faults, injected for real: flipped bytes, kill -9, units that are cut, missing, empty, swapped or another teacher's.

Printed: how often the promised thing happened. A flipped byte anywhere in a cache (manifest, assets and card included)
is found by `dde-cache verify`, and reading targets as training does gives an error or exactly the right numbers. An
extraction that was killed at a random moment and run again ends with the very units of one that was never stopped. A
bad unit is named, by the judge and by the reader.

    python benchmarks/faults.py
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import TINY, TeacherShape, arguments, pictures_with_questions, print_machine, save_teacher

from dde_cache.codec import dense_rows, from_parts, part_names
from dde_cache.errors import CacheError
from dde_cache.extract import ExtractConfig, extract
from dde_cache.join import join
from dde_cache.samples import Shard
from dde_cache.spec import Manifest
from dde_cache.store import Cache, write_manifest
from dde_cache.targets import CacheTargets
from dde_cache.verify import verify

SHAPE: TeacherShape = replace(TINY, side=64)
CONFIGS = {
    "sqrt8": ExtractConfig(batch_size=4),
    "log8": ExtractConfig(k=3, batch_size=4),
    "beside": ExtractConfig(targets=("cross", "whole", "hidden"), batch_size=4),
}
"""Every key, as is the default; the strongest three; and with everything that may lie beside the maps."""


def read_targets(cache: Cache, shards: Sequence[Shard]) -> list[np.ndarray]:
    """Every target of every pair, decoded, as training sees them."""
    table = join(shards, cache, "error").table
    spec = cache.spec
    reader = CacheTargets(cache, shards, spec.layers[-1], rows=spec.rows, hidden=spec.hidden_width is not None)
    for number, shard in enumerate(shards):
        for sample in shard:
            reader.check(number, sample)
    batch = reader.targets([table[number] for number in range(len(table))])
    read = [batch["token_ids"].numpy(), batch["grid"].numpy(), batch["logits"].numpy()]
    keys = batch["t2i.weight"].shape[2] + batch["i2t.weight"].shape[2]
    for kind in spec.rows:
        encoded = from_parts({name: batch[f"{kind}.{name}"] for name in part_names(spec.steps)}, spec.steps)
        read.append(dense_rows(encoded, keys).numpy())
    read += [batch[name].numpy() for name in ("hidden/text", "hidden/image") if name in batch]
    _ = cache.labels, cache.teacher_config
    return read


def places(folder: Path, count: int, random: np.random.Generator) -> Iterator[tuple[Path, int]]:
    """Random bytes of a cache: half of them spread over its bytes, half over its files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    for number in range(count):
        chosen = int(random.choice(len(files), p=sizes / sizes.sum() if number % 2 else None))
        yield files[chosen], int(random.integers(sizes[chosen]))


def flips(cache: Path, shards: Sequence[Shard], count: int, weights: str) -> None:
    """Flip one byte at a time; ask the judge, and read."""
    right = read_targets(Cache(cache), shards)
    random = np.random.default_rng(0)
    found = refused = same = 0
    failures: list[str] = []
    kinds: dict[str, int] = {}
    for path, place in places(cache, count, random):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[place] ^= int(random.integers(1, 256))
        path.write_bytes(changed)
        name = str(path.relative_to(cache)).split("/")[0]
        kinds[name] = kinds.get(name, 0) + 1
        if verify(cache).sound:
            failures.append(f"verify calls the cache sound after byte {place} of {path.name} changed")
        else:
            found += 1
        try:
            read = read_targets(Cache(cache), shards)
        except CacheError:
            refused += 1
        else:
            if all(np.array_equal(one, other) for one, other in zip(read, right, strict=True)):
                same += 1
            else:
                failures.append(f"other targets after byte {place} of {path.name} changed")
        path.write_bytes(content)
    spread = ", ".join(f"{name} {number}" for name, number in sorted(kinds.items()))
    print(f"COUNT {weights}: flipped bytes found by verify: {found:,} of {count:,} ({spread})")
    print(f"COUNT {weights}: flipped bytes, reading: {refused:,} refused, {same:,} exactly right, of {count:,}")
    stop_on(failures)


def stop_on(failures: Sequence[str]) -> None:
    """End with what went wrong."""
    if failures:
        sys.exit("\n".join(["FAILED", *failures[:20]]))


def in_child(run: Callable[[], object], seconds: float | None = None) -> bool:
    """Run something in a forked process, killed after some seconds; return whether it came to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 1:
        sys.exit("FAILED\nan extraction ended with an error")
    return code == 0


def kills(shards: Sequence[Shard], teacher: Path, folder: Path, count: int) -> None:
    """Kill extractions at random moments, run them again, and compare units with those of one that ran through."""
    begin = time.perf_counter()
    config = CONFIGS["sqrt8"]
    in_child(lambda: extract(shards, str(teacher), folder / "whole", config))
    length = longest = time.perf_counter() - begin
    right = units_of(folder / "whole")
    random = np.random.default_rng(1)
    identical = killed = 0
    failures: list[str] = []
    while killed < count:
        out = folder / f"killed-{killed}"

        def run(out: Path = out) -> object:
            return extract(shards, str(teacher), out, config)

        if in_child(run, float(random.uniform(0, length))):
            # It came to its end before; on a machine that others share the next one may be as fast.
            length *= 0.95
            shutil.rmtree(out)
            continue
        killed += 1
        in_child(run)
        if units_of(out) == right and verify(out).sound:
            identical += 1
        else:
            failures.append(f"kill {killed}: other units, or not sound")
        shutil.rmtree(out)
    print(
        f"COUNT kill -9 at a random moment of an extraction of at most {longest:.1f} s, then resumed, units identical: "
        f"{identical} of {count}"
    )
    stop_on(failures)


def units_of(folder: Path) -> dict[str, bytes]:
    """The finished units of a cache."""
    return {path.name: path.read_bytes() for path in sorted((folder / "units").glob("[!.]*"))}


def reseal(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Change a manifest and give it right hashes, as someone with patience could."""
    write_manifest(folder, change(Manifest.model_validate_json((folder / "manifest.json").read_text())))


def bad_units(cache: Path, foreign: Path, shards: Sequence[Shard], folder: Path) -> None:
    """Cut, remove, empty, swap and replace each unit; the judge and the reader must name it."""
    names = sorted(path.name for path in (cache / "units").iterdir())
    rows = {entry.name: entry for entry in Cache(foreign).manifest.units}
    random = np.random.default_rng(2)

    def cut(units: Path, name: str) -> None:
        os.truncate(units / name, int(random.integers(1, (units / name).stat().st_size)))

    def swap(units: Path, name: str) -> None:
        other = names[(names.index(name) + 1) % len(names)]
        (units / name).rename(units / "aside")
        (units / other).rename(units / name)
        (units / "aside").rename(units / other)

    def another(units: Path, name: str) -> None:
        shutil.copyfile(foreign / "units" / name, units / name)

    def another_with_its_row(units: Path, name: str) -> None:
        another(units, name)
        reseal(
            units.parent,
            lambda found: found.model_copy(
                update={"units": tuple(rows[name] if entry.name == name else entry for entry in found.units)}
            ),
        )

    faults: dict[str, Callable[[Path, str], None]] = {
        "cut short": cut,
        "missing": lambda units, name: (units / name).unlink(),
        "empty": lambda units, name: os.truncate(units / name, 0),
        "swapped": swap,
        "from another teacher": another,
        "from another teacher, in the manifest": another_with_its_row,
    }
    named = total = 0
    failures = []
    for fault, make in faults.items():
        for name in names:
            copy = Path(shutil.copytree(cache, folder / "copy"))
            make(copy / "units", name)
            total += 1
            report = verify(copy)
            told = " ".join(line for finding in report.findings for line in finding.examples)
            try:
                read_targets(Cache(copy), shards)
                error = ""
            except CacheError as refusal:
                error = str(refusal)
            if not report.sound and name in told and ".zarr.zip" in error:
                named += 1
            else:
                failures.append(f"{fault}: {name} is not named")
            shutil.rmtree(copy)
    print(f"COUNT bad units ({', '.join(faults)}), named by verify and by the reader: {named} of {total}")
    stop_on(failures)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--flips", type=int)
    parser.add_argument("--kills", type=int)
    given = parser.parse_args()
    full = given.size == "full"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in (0, 1):
            save_teacher(folder / f"teacher-{seed}", SHAPE, seed)
        shards = pictures_with_questions(folder / "shards", SHAPE, pairs=24, shards=4)
        count = given.flips or (1000 if full else 26)
        for weights, config in CONFIGS.items():
            extract(shards, str(folder / "teacher-0"), folder / weights, config)
            flips(folder / weights, shards, count // len(CONFIGS), weights)
        extract(shards, str(folder / "teacher-1"), folder / "foreign", CONFIGS["sqrt8"])
        bad_units(folder / "sqrt8", folder / "foreign", shards, folder)
        kills(shards, folder / "teacher-0", folder, given.kills or (100 if full else 2))
    print_machine()


if __name__ == "__main__":
    main()
