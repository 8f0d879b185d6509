"""Hostile caches by the thousand: mutated manifests and units, their checksums made right again.

Hypothesis draws the mutations: bytes, cuts and repeats; names, sizes, methods and modes of zip members; shapes, types,
codecs and anything else in JSON; numbers of arrays; zstd frames that claim more than they hold. Whatever lies deeper
than a mutation is sealed again: crc32c of the chunk, CRC-32 of the member, fingerprint, the unit's row and the
manifest's own hash, as an attacker would. Then the cache is verified, inspected, and read as training reads.

Printed: how many were refused, by what; a run ends with an error where anything but the project's own errors came out,
a number outside its bounds reached a batch, more memory was asked for than the limit, or one took too long.

    python benchmarks/fuzz.py
"""

import collections
import copy
import io
import json
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from common import arguments, pictures_with_questions, print_machine, save_teacher
from faults import CONFIGS, SHAPE, read_targets
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from numcodecs.zstd import compress, decompress

from dde_cache.errors import CacheError, DdeCacheError
from dde_cache.extract import extract
from dde_cache.files import hash_file
from dde_cache.samples import Shard
from dde_cache.spec import hash_json, indented_json
from dde_cache.store import Cache
from dde_cache.summary import pair_links, summarise
from dde_cache.verify import verify

SECONDS = 20
"""For one mutated cache; an honest one of this size takes a tenth of a second."""

MEMORY = 3 * 2**30
"""Bytes of address space beyond what the process has before the campaign."""

EPOCH = (1980, 1, 1, 0, 0, 0)

Members = dict[str, bytes]
Draw = Callable[..., Any]

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64, 10**30]),
    st.integers(-10, 300),
)
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        [
            *(
                "",
                "x",
                "float16",
                "float32",
                "float64",
                "uint8",
                "uint32",
                "string",
                "r65536",
                "object",
                "\x1b[31m",
                "\0",
            ),
            *("zstd", "blosc", "gzip", "numcodecs.pickle", "sharding_indexed", "vlen-utf8", "../../x", "/etc/passwd"),
        ]
    ),
    st.text(max_size=5),
    st.lists(NUMBERS, max_size=5),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    # Copies: what was drawn may be mutated further.
    st.sampled_from([[{"name": "blosc"}], [{"name": "gzip", "configuration": {"level": 9}}], [], {}, [[[[[[]]]]]]]).map(
        copy.deepcopy
    ),
)
NAMES = (
    *("../../../etc/x", "/etc/x", "maps\\x", "C:/x", "maps/../zarr.json", "a\0b", "", ".", "maps//x", "zarr.json/"),
    *("maps/t2i/index/c/0/0/0/9", "hologram/zarr.json", "é", "x" * 600, "maps/zarr.json", "samples/key_bytes/c/0"),
)


def zipped(
    members: Members, change: Callable[[zipfile.ZipInfo, bytes], bytes | None] = lambda info, value: None
) -> bytes:
    """The zip of a unit; `change` may alter how a member is written, and write other content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in sorted(members.items()):
            info = zipfile.ZipInfo(name, EPOCH)
            other = change(info, value)
            archive.writestr(info, value if other is None else other)
    return file.getvalue()


def mutate_bytes(draw: Draw, content: bytes) -> bytes:
    """Flip, cut, repeat, insert."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not changed:
            break
        place, length = draw(st.integers(0, len(changed) - 1)), draw(st.sampled_from([1, 2, 4, 8, 64, 4096]))
        way = draw(st.sampled_from(["flip", "flip", "cut", "drop", "repeat", "fill"]))
        if way == "flip":
            changed[place] ^= draw(st.integers(1, 255))
        elif way == "cut":
            del changed[place:]
        elif way == "drop":
            del changed[place : place + length]
        elif way == "repeat":
            changed[place:place] = changed[place : place + length]
        else:
            changed[place : place + length] = bytes([draw(st.sampled_from([0, 255, 0x28]))]) * len(
                changed[place : place + length]
            )
    return bytes(changed)


def mutate_json(draw: Draw, content: Any) -> str:
    """Change some places of a JSON value; return it as text, which may be no JSON any more."""
    value = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        holders = list(_holders(value))
        if not holders:
            break
        holder, name = holders[draw(st.integers(0, len(holders) - 1))]
        way = draw(st.sampled_from(["value", "value", "value", "remove", "add", "near"]))
        if way == "remove":
            del holder[name]
        elif way == "near" and type(holder[name]) is int:
            holder[name] += draw(st.sampled_from([-1, 1, 255, 256, 2**20, 2**32]))
        elif way == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "required", "hologram", "storage_transformers", "__proto__"]))] = draw(
                VALUES
            )
        elif way == "add":
            holder.append(draw(VALUES))
        else:
            holder[name] = draw(VALUES)
    text = json.dumps(value)
    way = draw(st.integers(0, 60))
    if way == 0:
        return text[:-1] + "," * 3
    if way == 1:
        return "[" * 50_000
    if way == 2:
        return text[:-1] + ', "deep": ' + "[" * 20_000 + "]" * 20_000 + "}"
    if way == 3:
        return text[:-1] + ', "format_version": 1, "attributes": {}}'
    if way == 4:
        return text[:-1] + ', "number": ' + "9" * 6000 + "}"
    return text


def _holders(value: Any) -> Any:
    if isinstance(value, dict):
        for name in value:
            yield value, name
            yield from _holders(value[name])
    elif isinstance(value, list):
        for number in range(len(value)):
            yield value, number
            yield from _holders(value[number])


def mutate_metadata(draw: Draw, members: Members) -> bytes:
    """Change a `zarr.json`; where it is the root's, the fingerprint is made right again half of the time."""
    name = draw(st.sampled_from(sorted(name for name in members if name.endswith("zarr.json"))))
    if draw(st.booleans()):
        name = (
            "zarr.json"
            if draw(st.integers(0, 3)) == 0
            else draw(
                st.sampled_from(
                    ["maps/t2i/weight/zarr.json", "maps/i2t/weight/zarr.json", "predictions/logits/zarr.json"]
                )
            )
        )
    text = mutate_json(draw, json.loads(members[name]))
    if name == "zarr.json" and draw(st.booleans()):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            value = json.loads(text)
            value["attributes"]["fingerprint"] = hash_json(value["attributes"]["spec"])
            text = json.dumps(value)
    return zipped(members | {name: text.encode()})


def framed(content: bytes) -> bytes:
    """A chunk as it lies in a unit."""
    frame = bytes(compress(content, 1))
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def mutate_numbers(draw: Draw, members: Members) -> bytes:
    """Change numbers of a chunk, or what its frame claims; its checksum is right again."""
    names = sorted(name for name in members if "/c/" in name)
    name = names[draw(st.integers(0, len(names) - 1))]
    frame = members[name][:-4]
    content = bytearray(decompress(frame))
    way = draw(st.sampled_from(["numbers", "numbers", "numbers", "bytes", "frame", "claim", "longer", "bomb", "two"]))
    if way == "numbers":
        for _ in range(draw(st.integers(1, 6))):
            if content:
                place = draw(st.integers(0, len(content) - 1)) & ~3
                # 7e00 and 7fc00000 are NaN, 7c00 infinity, bc00 minus one: in float16, in float32, or as integers.
                some = draw(st.sampled_from(["007e", "0000c07f", "007c", "00bc", "ffffffff", "00000000", "0100", "ff"]))
                changed = bytes.fromhex(some)[: len(content) - place]
                content[place : place + len(changed)] = changed
        return zipped(members | {name: framed(bytes(content))})
    if way == "bytes":
        return zipped(members | {name: framed(mutate_bytes(draw, bytes(content)))})
    if way == "longer":
        return zipped(members | {name: framed(bytes(content) * draw(st.integers(0, 5)))})
    if way == "bomb":
        return zipped(members | {name: framed(bytes(2 ** draw(st.integers(10, 26))))})
    if way == "two":
        frame = frame + frame
    elif way == "claim":
        claim = draw(st.sampled_from([2**32 - 1, 2**40, 2**63, 2**64 - 1, len(content) + 1]))
        frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", claim) + frame[6:]
    else:
        frame = mutate_bytes(draw, frame)
    return zipped(members | {name: frame + google_crc32c.value(frame).to_bytes(4, "little")})


def mutate_members(draw: Draw, members: Members) -> bytes:
    """Change the zip itself: names, methods, modes, members twice, sizes in its table of contents."""
    names = sorted(members)
    chosen = names[draw(st.integers(0, len(names) - 1))]
    other = names[draw(st.integers(0, len(names) - 1))]
    way = draw(st.sampled_from(["name", "rename", "remove", "swap", "deflate", "link", "twice", "table", "many"]))
    if way == "name":
        return zipped(members | {draw(st.sampled_from(NAMES)): members[chosen]})
    if way == "rename":
        kept = {name: value for name, value in members.items() if name != chosen}
        return zipped(kept | {draw(st.sampled_from(NAMES)): members[chosen]})
    if way == "remove":
        return zipped({name: value for name, value in members.items() if name != chosen})
    if way == "swap":
        return zipped(members | {chosen: members[other], other: members[chosen]})
    if way == "many":
        return zipped(members | {f"maps/t2i/weight/c/{number}/0/0/0": b"" for number in range(300)})

    def change(info: zipfile.ZipInfo, value: bytes) -> bytes | None:
        if info.filename == chosen and way == "deflate":
            info.compress_type = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
            return bytes(2**20) if draw(st.booleans()) else None
        if info.filename == chosen and way == "link":
            info.external_attr = draw(st.sampled_from([0o120777, 0o010644, 0o020644, 0o040755])) << 16
            return b"/etc/passwd" if draw(st.booleans()) else None
        return None

    content = bytearray(zipped(members, change))
    if way == "twice":
        file = io.BytesIO(bytes(content))
        with zipfile.ZipFile(file, "a") as archive:
            archive.fp.seek(0, 2)  # type: ignore[union-attr]
            info = zipfile.ZipInfo(other, EPOCH)
            archive.NameToInfo.pop(other, None)
            archive.writestr(info, members[chosen])
        return file.getvalue()
    if way == "table":
        entry = content.find(b"PK\1\2", content.find(b"PK\1\2") + draw(st.integers(0, 3000)))
        field, width = draw(st.sampled_from([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)]))
        if entry > 0:
            number = draw(st.sampled_from([0, 1, 8, 255, 2**16 - 1, 2**31, 2**32 - 1]))
            content[entry + field : entry + field + width] = (number % 256**width).to_bytes(width, "little")
        if draw(st.integers(0, 3)) == 0:
            place = len(content) - 22 + draw(st.integers(0, 21))
            content[place] ^= draw(st.integers(1, 255))
    return bytes(content)


class Campaign:
    """A small honest cache, and what happens to its mutants.

    Args:
        cache: where the honest one lies.
        shards: its samples.
        place: where mutants are put together.
    """

    def __init__(self, cache: Path, shards: list[Shard], place: Path) -> None:
        self._copy = Path(shutil.copytree(cache, place))
        self._shards = shards
        self._manifest = json.loads((cache / "manifest.json").read_text())
        self._name = self._manifest["units"][0]["name"]
        with zipfile.ZipFile(cache / "units" / self._name) as archive:
            self._members = {name: archive.read(name) for name in archive.namelist()}
        self._unit = (cache / "units" / self._name).read_bytes()
        self._right = read_targets(Cache(cache), shards)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0

    def mutant(self, draw: Draw) -> str:
        """Put a mutant where the cache is; return its kind."""
        manifest: Any = json.loads(json.dumps(self._manifest))
        text, unit = None, self._unit
        kind = draw(st.sampled_from(["bytes", "zip", "metadata", "metadata", "numbers", "numbers", "manifest"]))
        if kind == "bytes":
            unit = mutate_bytes(draw, self._unit)
        elif kind == "zip":
            unit = mutate_members(draw, self._members)
        elif kind == "metadata":
            unit = mutate_metadata(draw, self._members)
        elif kind == "numbers":
            unit = mutate_numbers(draw, self._members)
        elif draw(st.integers(0, 4)) == 0:
            text = mutate_bytes(draw, indented_json(manifest))
        else:
            text = self._resealed(mutate_json(draw, manifest))
        path = self._copy / "units" / self._name
        path.write_bytes(unit)
        if text is None:
            manifest["units"][0] |= {"size": len(unit), "sha256": hash_file(path)}
            with suppress(zipfile.BadZipFile, KeyError, ValueError, TypeError, RecursionError, NotImplementedError):
                self._follow(manifest, unit)
            text = self._resealed(json.dumps(manifest))
        (self._copy / "manifest.json").write_bytes(text)
        return kind

    def _follow(self, manifest: Any, unit: bytes) -> None:
        """Let the manifest say of the unit what the unit says of itself, so that the deeper checks are reached."""
        with zipfile.ZipFile(io.BytesIO(unit)) as archive:
            root = json.loads(archive.read("zarr.json"))["attributes"]
        manifest["units"][0] |= {name: root[name] for name in ("source", "samples", "pairs", "keys")}
        manifest["spec"] = root["spec"]

    def _resealed(self, text: str) -> bytes:
        try:
            manifest = json.loads(text)
            manifest["fingerprint"] = hash_json(manifest["spec"])
            manifest.pop("sha256", None)
            manifest["sha256"] = hash_json(manifest)
            return indented_json(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return text.encode(errors="surrogatepass")

    def judge(self, kind: str) -> None:
        """Verify, inspect and read the mutant; only our own errors may come out, and no number out of bounds."""
        begin = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            sound = verify(self._copy).sound
            refused = False
            try:
                cache = Cache(self._copy)
                _ = summarise(cache), cache.labels, cache.teacher_config
                pair_links(cache, self._shards[0].keys[0])
            except DdeCacheError:
                refused = True
            try:
                read = read_targets(Cache(self._copy), self._shards)
            except CacheError:
                refused = True
            else:
                _check_numbers(read)
        finally:
            signal.alarm(0)
        self.slowest = max(self.slowest, time.perf_counter() - begin)
        verdict = "sound" if sound else "not sound"
        self.outcomes[f"{kind}: {verdict}, {'refused' if refused else 'read'}"] += 1


def _check_numbers(read: list[np.ndarray]) -> None:
    """What training gets is finite, and weights are from 0 to 1."""
    for values in read[2:]:
        if not np.isfinite(values).all():
            raise AssertionError("a number that is not finite reached a batch")
    for values in read[3:]:
        # Hidden states are float16, and any finite number.
        if values.dtype == np.float32 and values.size and (values.min() < 0 or values.max() > 1.001):
            raise AssertionError("a weight outside its bounds reached a batch")


def _too_slow(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"a mutant took more than {SECONDS} s")


def limit_memory() -> int:
    """Let the process have no more than `MEMORY` bytes beyond what it has; return its peak so far in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _attack(campaign: Campaign, count: int, number: int) -> None:
    """Judge so many mutants."""

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        campaign.judge(campaign.mutant(data.draw))

    attack()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given_arguments = parser.parse_args()
    count = given_arguments.examples or (10_000 if given_arguments.size == "full" else 100)
    torch.set_num_threads(1)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", SHAPE)
        shards = pictures_with_questions(folder / "shards", SHAPE, pairs=6, shards=2)
        campaigns = {}
        for weights, config in CONFIGS.items():
            extract(shards, str(folder / "teacher"), folder / weights, config)
            campaigns[weights] = Campaign(folder / weights, shards, folder / f"copy-{weights}")
            campaigns[weights].judge("nothing")
        before = limit_memory()
        signal.signal(signal.SIGALRM, _too_slow)
        for weights, campaign in campaigns.items():
            campaign.slowest, campaign.outcomes = 0.0, collections.Counter()
            _attack(campaign, -(-count // len(campaigns)), given_arguments.seed)
            outcomes.update({f"{weights}, {outcome}": number for outcome, number in campaign.outcomes.items()})
            slowest = max(slowest, campaign.slowest)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = sum(outcomes.values())
    if total < count:
        sys.exit(f"FAILED\nexpected {count} mutants, got {total}")
    for outcome, number in sorted(outcomes.items()):
        print(f"  {outcome}: {number:,}")
    print(
        f"COUNT mutated manifests and units met with our own errors or right numbers: {total:,} of {total:,}; slowest "
        f"{slowest:.1f} s, peak memory {(after - before) / 2**20:,.0f} MiB above the start"
    )
    print_machine()


if __name__ == "__main__":
    main()
