"""Units: the same bytes for the same content, plain Zarr, and no damage without an error."""

import itertools
import json
import zipfile

import numpy as np
import pytest
import torch
import zarr
from pipeline import make_cache, make_samples, make_shards
from zarr.storage import ZipStore

from dde_cache.codec import from_numpy
from dde_cache.errors import CacheError
from dde_cache.store import describe_unit
from dde_cache.unit import Unit, UnitArrays, write_unit


@pytest.fixture(scope="module")
def cache(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unit")
    shards = make_shards(folder / "train", make_samples(6), size=6)
    return make_cache(shards, teacher_folder, folder / "cache", layers=(0, 2), queries="all")


@pytest.fixture
def unit(cache, tmp_path):
    path = tmp_path / "000000.zarr.zip"
    path.write_bytes((cache.folder / "units" / path.name).read_bytes())
    return path


def arrays_of(unit):
    opened = Unit(unit)
    maps = opened.maps
    read = UnitArrays(
        keys=opened.keys,
        content=opened.content,
        maps=maps,
        t2i=opened.attention("t2i"),
        i2t=opened.attention("i2t"),
        prediction_sample=opened.array("predictions/sample"),
        prediction_text=opened.array("predictions/text"),
        logits=opened.array("predictions/logits"),
    )
    opened.close()
    return read, opened.attributes


def rewrite(path, change):
    """Write a unit again with `change(name, values)` applied to every attention array."""
    read, attributes = arrays_of(path)
    changed = {
        direction: from_numpy(
            {
                part: change(f"maps/{direction}/{part}", values.numpy())
                for part, values in getattr(read, direction).parts.items()
            },
            attributes.spec.steps,
        )
        for direction in ("t2i", "i2t")
    }
    fields = {name: getattr(read, name) for name in read.__dataclass_fields__} | changed
    write_unit(path, UnitArrays(**fields), attributes)


def test_the_same_content_gives_the_same_bytes(unit, tmp_path):
    read, attributes = arrays_of(unit)
    size, digest = write_unit(tmp_path / "again.zarr.zip", read, attributes)
    assert (tmp_path / "again.zarr.zip").read_bytes() == unit.read_bytes()
    entry = describe_unit(unit, attributes.fingerprint)
    assert (entry.size, entry.sha256) == (size, digest)


def test_plain_zarr_reads_it(unit):
    with ZipStore(unit, mode="r") as store:
        root = zarr.open_group(store, mode="r")
        assert root.metadata.zarr_format == 3
        names = {name for name, member in root.members(max_depth=None) if isinstance(member, zarr.Array)}
        assert {"samples/key_bytes", "maps/t2i/weight", "maps/i2t/weight", "predictions/logits"} <= names
        keys = root["samples/key_bytes"][:].tobytes().decode()
        offsets = root["samples/key_offsets"][:]
    names = [keys[start:stop] for start, stop in itertools.pairwise(offsets)]
    assert names == [f"key-{number:03d}" for number in range(6)]
    with zipfile.ZipFile(unit) as archive:
        members = archive.infolist()
    assert [member.filename for member in members] == sorted({member.filename for member in members})
    assert {(member.compress_type, member.date_time) for member in members} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
    }


def test_records_are_sorted_and_complete(unit):
    opened = Unit(unit)
    maps = opened.maps
    rows = list(zip(maps.sample, maps.text, maps.view, maps.passes, maps.image, maps.layer, strict=True))
    assert rows == sorted(rows)
    expected = [
        (number, slot, 0, 0, 0, layer) for number in range(6) for slot in range(number % 3 + 1) for layer in (0, 2)
    ]
    assert rows == expected
    assert opened.attributes.pairs == len(expected) // 2
    opened.close()


@pytest.mark.parametrize("place", np.linspace(0.02, 0.98, 25))
def test_a_flipped_byte_never_passes_for_good_content(unit, cache, place):
    """Reading a unit without its manifest: an error, or the very same arrays (a byte of the zip's own book-keeping)."""
    before, _ = arrays_of(unit)
    content = bytearray(unit.read_bytes())
    content[int(place * len(content))] ^= 0x10
    unit.write_bytes(content)
    try:
        describe_unit(unit, cache.manifest.fingerprint)
        after, _ = arrays_of(unit)
    except CacheError as error:
        if unit.name in str(error):
            return
        raise
    assert before.keys == after.keys
    assert torch.equal(before.t2i.weight, after.t2i.weight)
    assert torch.equal(before.i2t.weight, after.i2t.weight)
    np.testing.assert_array_equal(before.logits, after.logits)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file(unit, cache, share):
    content = unit.read_bytes()
    unit.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CacheError, match=r"000000\.zarr\.zip: the unit cannot be opened"):
        describe_unit(unit, cache.manifest.fingerprint)


def rezip(path, change):
    """Rewrite the members of a unit: `change` maps names to bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in change(members).items():
            archive.writestr(name, value)


def test_a_missing_chunk_is_no_row_of_zeros(unit, cache):
    rezip(unit, lambda members: {name: value for name, value in members.items() if "t2i/weight/c/" not in name})
    with pytest.raises(CacheError, match=r"maps/t2i/weight"):
        describe_unit(unit, cache.manifest.fingerprint)


def test_a_missing_array(unit, cache):
    rezip(unit, lambda members: {name: value for name, value in members.items() if "maps/grid" not in name})
    with pytest.raises(CacheError, match=r"maps/grid: missing"):
        Unit(unit)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format_version":1', b'"format_version":2', "expected a unit of format version 1, got format_version"),
        (b'"maps":{"required":true}', b'"hologram":{"required":true}', "requires hologram, unknown to this version"),
        (b'"pairs":', b'"pears":', "expected a unit of format version 1"),
    ],
)
def test_units_of_other_versions(unit, old, new, message):
    def change(members):
        root = json.loads(members["zarr.json"])
        text = json.dumps(root, separators=(",", ":")).encode()
        assert old in text
        return members | {"zarr.json": text.replace(old, new)}

    rezip(unit, change)
    with pytest.raises(CacheError, match=message):
        Unit(unit)


def test_an_unknown_group_that_is_not_required_is_ignored(unit):
    def change(members):
        root = json.loads(members["zarr.json"])
        root["attributes"]["groups"]["hologram"] = {"required": False}
        return members | {"zarr.json": json.dumps(root).encode()}

    rezip(unit, change)
    opened = Unit(unit)
    assert len(opened.keys) == 6
    opened.close()


def test_a_file_that_is_no_zip(tmp_path):
    path = tmp_path / "x.zarr.zip"
    path.write_text("nothing")
    with pytest.raises(CacheError, match=r"x\.zarr\.zip: the unit cannot be opened"):
        Unit(path)


def test_nothing_is_left_of_a_unit_that_cannot_be_written(unit, tmp_path, monkeypatch):
    read, attributes = arrays_of(unit)

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    target = tmp_path / "new" / "000009.zarr.zip"
    target.parent.mkdir()
    with pytest.raises(OSError, match="No space left"):
        write_unit(target, read, attributes)
    assert list(target.parent.iterdir()) == []
