"""A cache refuses by name what is damaged, swapped or from elsewhere, and takes over no folder that is not ours."""

import json
import os
import shutil

import pytest
from pipeline import make_cache, make_shards, tree

from dde_cache import store
from dde_cache.errors import CacheError, InputError
from dde_cache.identity import ExtractConfig, target_spec
from dde_cache.spec import Manifest
from dde_cache.store import Cache, CacheWriter, describe_unit, read_manifest
from dde_cache.teacher import FusionTeacher

UNITS = ("000000.zarr.zip", "000001.zarr.zip", "000002.zarr.zip")


@pytest.fixture(scope="module")
def made(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return make_cache(make_shards(folder / "train"), teacher_folder, folder / "cache")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "cache")


def read_everything(folder):
    cache = Cache(folder)
    for entry in cache.manifest.units:
        cache.unit(entry).check_readable()


def test_a_whole_cache(folder):
    read_everything(folder)
    cache = Cache(folder)
    assert [entry.name for entry in cache.manifest.units] == list(UNITS)
    assert [entry.source for entry in cache.manifest.units] == ["000000.tar", "000001.tar", "000002.tar"]
    assert cache.labels == ("no", "yes", "red")
    assert cache.preprocessor().patch_size == 12


@pytest.mark.parametrize("place", [0, 40, 0.5, -30, -1])
def test_a_flipped_byte_in_a_unit(folder, place):
    path = folder / "units" / UNITS[1]
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"(?s)unit 000001\.zarr\.zip \(shard 000001\.tar\).*SHA-256.*damaged"):
        read_everything(folder)


def test_a_cut_unit(folder):
    path = folder / "units" / UNITS[2]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CacheError, match=r"unit 000002\.zarr\.zip"):
        read_everything(folder)


def test_swapped_units(folder):
    one, two = (folder / "units" / name for name in UNITS[:2])
    aside = folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    with pytest.raises(CacheError, match=r"unit 000000\.zarr\.zip .*SHA-256"):
        read_everything(folder)


def resealed(folder, change):
    """Change the manifest and give it a right hash of its own, as someone with a text editor and patience could."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(change(manifest).sealed().model_dump_json())


@pytest.fixture(scope="module")
def foreign(made, save_teacher, tmp_path_factory):
    """The same shards, seen by another teacher."""
    folder = tmp_path_factory.mktemp("foreign")
    return make_cache(make_shards(folder / "train"), save_teacher(seed=1), folder / "cache")


def test_a_unit_from_another_teacher(folder, made, foreign):
    shutil.copy(foreign.folder / "units" / UNITS[0], folder / "units" / UNITS[0])
    with pytest.raises(CacheError, match=r"unit 000000\.zarr\.zip"):
        read_everything(folder)
    resealed(
        folder,
        lambda manifest: manifest.model_copy(update={"units": (foreign.manifest.units[0], *manifest.units[1:])}),
    )
    with pytest.raises(CacheError, match=r"(?s)unit 000000\.zarr\.zip: expected fingerprint .* another teacher"):
        read_everything(folder)
    with pytest.raises(CacheError, match="made by another teacher or with other options"):
        describe_unit(foreign.folder / "units" / UNITS[0], made.manifest.fingerprint)


def test_fingerprints_say_what_the_numbers_mean(made, foreign):
    assert made.manifest.fingerprint != foreign.manifest.fingerprint
    assert made.spec.teacher.tokenizer == foreign.spec.teacher.tokenizer
    assert made.spec.teacher.weights != foreign.spec.teacher.weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"pairs": 6', '"pairs": 7', 1), "does not match its own SHA-256"),
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "expected format version 1, got 2"),
        (lambda text: "[]", "expected format version 1, got None"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: text.replace('"units"', '"unitz"'), "cannot be read"),
        (lambda text: "\xff\xfe", "cannot be read|expected format"),
    ],
)
def test_a_damaged_manifest(folder, change, message):
    path = folder / "manifest.json"
    before = path.read_text()
    after = change(before)
    assert before != after
    path.write_bytes(after.encode("latin-1"))
    with pytest.raises(CacheError, match=message) as caught:
        Cache(folder)
    assert "manifest.json" in str(caught.value)


def test_a_teacher_that_was_used_is_the_same_teacher(teacher_folder):
    """A tokenizer remembers how its last call padded and cut; that is no part of what it is."""
    fresh, used = (FusionTeacher.load(str(teacher_folder)) for _ in range(2))
    used.preprocessor.tokens(["red", "is there a red circle"], full=True)
    assert target_spec(used, ExtractConfig()) == target_spec(fresh, ExtractConfig())


def test_a_manifest_with_a_false_fingerprint(folder):
    resealed(folder, lambda manifest: manifest.model_copy(update={"fingerprint": "0" * 64}))
    with pytest.raises(CacheError, match="fingerprint does not match its target specification"):
        Cache(folder)


def test_unit_names_cannot_leave_the_folder(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["units"][0]["name"] = "../../x.zarr.zip"
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match="cannot be read"):
        Cache(folder)


@pytest.mark.parametrize("name", ["labels.json", "config.json", "tokenizer.json"])
def test_damaged_assets(folder, name):
    path = folder / "assets" / name
    path.write_bytes(path.read_bytes().replace(b"e", b"a", 1))
    with pytest.raises(CacheError, match=f"{name}: changed since the cache was made"):
        Cache(folder)
    path.unlink()
    with pytest.raises(CacheError, match=f"{name}: missing"):
        Cache(folder)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_no_cache(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(CacheError, match="x"):
        Cache(tmp_path / "x")


# --- writing


def test_the_manifest_can_be_made_again_from_the_units(folder, made):
    before = tree(folder)
    resealed(folder, lambda manifest: manifest.model_copy(update={"units": ()}))
    assert Cache(folder).manifest.units == ()
    CacheWriter(folder, made.spec, folder / "assets").close()
    assert tree(folder) == before


def test_making_the_manifest_again_blesses_no_bad_unit(folder, made):
    path = folder / "units" / UNITS[0]
    content = bytearray(path.read_bytes())
    content[content.index(b"\x28\xb5\x2f\xfd", len(content) // 3) + 10] ^= 1  # in a zstd frame, not in the zip's own
    path.write_bytes(content)
    resealed(folder, lambda manifest: manifest.model_copy(update={"units": ()}))
    with pytest.raises(CacheError, match=r"000000\.zarr\.zip"):
        CacheWriter(folder, made.spec, folder / "assets").close()


def test_another_specification_is_refused_with_the_differences(folder, made):
    other = made.spec.model_copy(update={"k": 8, "weights": "float16", "steps": None, "layers": (0, 2)})
    before = tree(folder)
    with pytest.raises(CacheError) as caught:
        CacheWriter(folder, other, folder / "assets")
    message = str(caught.value)
    for expected in ("k: expected 8, got null", 'weights: expected "float16", got "sqrt8"', "layers: expected [0, 2]"):
        assert expected in message
    assert "heads" not in message
    assert tree(folder) == before


@pytest.mark.parametrize("inside", ["thesis.docx", "units.txt", ".git"])
def test_a_folder_that_is_not_ours(made, tmp_path, inside):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / inside).write_text("precious")
    with pytest.raises(InputError, match="expected a new or empty folder, or a cache to continue"):
        CacheWriter(tmp_path / "out", made.spec, made.folder / "assets")
    assert tree(tmp_path / "out") == {inside: b"precious"}


def test_a_file_where_the_cache_should_go(made, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        CacheWriter(tmp_path / "out", made.spec, made.folder / "assets")


def test_a_unit_that_comes_while_the_manifest_is_written_is_not_lost(folder, made, monkeypatch):
    """Between the look and the writing of one writer, the other finishes its unit and closes."""
    last = UNITS[2]
    content = (folder / "units" / last).read_bytes()
    (folder / "units" / last).unlink()
    resealed(folder, lambda manifest: manifest.model_copy(update={"units": manifest.units[:2]}))
    one, two = (CacheWriter(folder, made.spec, folder / "assets") for _ in range(2))
    original = store.write_manifest
    calls = []

    def late(path, manifest, **options):
        calls.append(manifest)
        if len(calls) == 1:
            (folder / "units" / last).write_bytes(content)
            two.close()
        return original(path, manifest, **options)

    monkeypatch.setattr(store, "write_manifest", late)
    assert one.close() == made.manifest == read_manifest(folder)
    assert len(calls[0].units) == 2


def test_a_writer_keeps_what_others_have_listed(folder, made):
    resealed(folder, lambda manifest: manifest.model_copy(update={"units": ()}))
    one, two = (CacheWriter(folder, made.spec, folder / "assets") for _ in range(2))
    one.add(made.manifest.units[0])
    two.add(made.manifest.units[1])
    assert read_manifest(folder).units == made.manifest.units[:2]


def test_assets_of_an_extraction_that_was_cut_short_are_not_mixed(made, tmp_path):
    (tmp_path / "out" / "assets").mkdir(parents=True)
    (tmp_path / "out" / "assets" / "labels.json").write_text("[]")
    with pytest.raises(CacheError, match=r"(?s)holds assets of other targets.*labels\.json\ndelete"):
        CacheWriter(tmp_path / "out", made.spec, made.folder / "assets")


def test_two_writers_share_a_folder(folder, made):
    """Each knows only its own units; whoever closes last writes the manifest over all of them."""
    whole = read_manifest(folder)
    resealed(folder, lambda manifest: manifest.model_copy(update={"units": ()}))
    one, two = (CacheWriter(folder, made.spec, folder / "assets") for _ in range(2))
    one.add(whole.units[0])
    two.add(whole.units[1])
    one.close()
    assert two.close() == whole
