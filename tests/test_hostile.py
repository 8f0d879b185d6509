"""A shared cache is untrusted input: what it must not do is refused, with the reason, before memory is taken.

The campaign of thousands of mutants is benchmarks/fuzz.py; here each trick has a name.
"""

import contextlib
import json
import os
import re
import shutil
import tracemalloc
import zipfile

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import compress
from pipeline import all_pairs, cli, make_cache, make_shards

from dde_cache.errors import CacheError, InputError
from dde_cache.files import hash_file
from dde_cache.spec import TargetSpec, hash_json, indented_json, parse_json
from dde_cache.store import Cache, CacheWriter
from dde_cache.summary import summarise
from dde_cache.targets import CacheTargets
from dde_cache.unit import Unit
from dde_cache.verify import verify

UNIT = "000000.zarr.zip"
EPOCH = (1980, 1, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def made(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("hostile") / "cache", k=8)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "cache")


def members_of(folder):
    with zipfile.ZipFile(folder / "units" / UNIT) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def seal(folder, change=lambda manifest: manifest):
    """Give the manifest right hashes after `change`, and the first unit a right row: an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "units" / UNIT
    manifest["units"][0] |= {"size": path.stat().st_size, "sha256": hash_file(path)}
    manifest = change(manifest) or manifest
    manifest["fingerprint"] = hash_json(manifest["spec"])
    manifest.pop("sha256")
    manifest["sha256"] = hash_json(manifest)
    (folder / "manifest.json").write_bytes(indented_json(manifest))


def rezip(folder, members, change=lambda info: None):
    with zipfile.ZipFile(folder / "units" / UNIT, "w") as archive:
        for name, value in members.items():
            info = zipfile.ZipInfo(name, EPOCH)
            change(info)
            archive.writestr(info, value)
    seal(folder)


def edit(folder, name, change):
    """Change a `zarr.json` of the unit; of the root, its fingerprint follows."""
    members = members_of(folder)
    value = json.loads(members[f"{name}zarr.json"])
    value = change(value) or value
    if not name:
        value["attributes"]["fingerprint"] = hash_json(value["attributes"]["spec"])
    rezip(folder, members | {f"{name}zarr.json": json.dumps(value).encode()})


def framed(content):
    frame = bytes(compress(content, 1))
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def refused(folder, shards, match):
    """Verify finds it, and the readers of inspect and train refuse it, all with the reason and little memory."""
    tracemalloc.start()
    try:
        report = verify(folder)
        told = " ".join(line for finding in report.findings for line in finding.examples)
        with pytest.raises(CacheError, match=match):
            summarise(Cache(folder))
        with pytest.raises(CacheError, match=match):
            CacheTargets(Cache(folder), shards, 2).targets(all_pairs(shards))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not report.sound
    assert re.search(match, told), told
    assert peak < 40 * 2**20
    return report


# --- the zip


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../../outside", "plain relative name"),
        ("/etc/passwd", "plain relative name"),
        ("maps/../../x", "plain relative name"),
        ("maps\\..\\x", "plain relative name"),
        ("C:/x", "plain relative name"),
        ("x" * 600, "plain relative name"),
        ("maps/é", "plain relative name"),
    ],
)
def test_names_in_the_zip_that_lead_elsewhere(folder, shards, name, match):
    rezip(folder, members_of(folder) | {name: b"x"})
    refused(folder, shards, match)


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o020644])
def test_links_pipes_and_devices_in_the_zip(folder, shards, mode):
    def change(info):
        if info.filename.endswith("t2i/tail/c/0/0/0"):
            info.external_attr = mode << 16

    rezip(folder, members_of(folder), change)
    refused(folder, shards, "got a link or something else")


def test_a_zip_bomb_of_deflated_zeros(folder, shards):
    def change(info):
        if info.filename.endswith("index/c/0/0/0/0"):
            info.compress_type = zipfile.ZIP_DEFLATED

    members = {
        name: bytes(50 * 2**20) if name == "maps/t2i/index/c/0/0/0/0" else value
        for name, value in members_of(folder).items()
    }
    rezip(folder, members, change)
    assert (folder / "units" / UNIT).stat().st_size < 2**20
    refused(folder, shards, "expected a stored member, got a compressed one")


def test_members_over_each_other(folder, shards):
    """Many entries of the table of contents share the bytes of one large member."""
    large = {f"maps/t2i/index/c/{number}/0/0/0": b"" for number in range(1, 40)}
    members = members_of(folder) | {"maps/t2i/index/c/0/0/0/0": bytes(10_000)} | large
    rezip(folder, members)
    path = folder / "units" / UNIT
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("maps/t2i/index/c/0/0/0/0").header_offset
    for name in large:
        entry = content.rfind(name.encode()) - 46
        content[entry + 20 : entry + 28] = (10_000).to_bytes(4, "little") * 2
        content[entry + 42 : entry + 46] = offset.to_bytes(4, "little")
    path.write_bytes(content)
    seal(folder)
    refused(folder, shards, "lie over each other")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(folder, shards):
    with zipfile.ZipFile(folder / "units" / UNIT, "a") as archive:
        archive.writestr(zipfile.ZipInfo("maps/t2i/zarr.json", EPOCH), b"{}")
    seal(folder)
    refused(folder, shards, "is there twice")


def test_a_giant_table_of_contents(folder, shards):
    path = folder / "units" / UNIT
    content = bytearray(path.read_bytes())
    content[-10:-6] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    seal(folder)
    refused(folder, shards, "table of contents of at most")


# --- arrays: refused by what they claim


def put(*place, value):
    def change(metadata):
        at = metadata
        for name in place[:-1]:
            at = at[name]
        at[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("maps/t2i/index/", put("shape", 0, value=2**40), "chunks, but the zip has fewer members"),
        ("maps/t2i/index/", put("shape", 0, value=7), "missing|expected shape"),
        ("maps/t2i/index/", put("shape", value=[6, 3, 12, 2**40]), "chunk_grid"),
        ("maps/t2i/index/", put("shape", value=[6, 3, -1, 8]), "shape"),
        ("maps/t2i/index/", put("shape", value=[6, 3, 1e300, 8]), "shape"),
        ("maps/t2i/index/", put("shape", value=[True, 3, 12, 8]), "shape"),
        ("maps/t2i/tail/", put("chunk_grid", "configuration", "chunk_shape", 0, value=2**39), "chunks of at most"),
        ("maps/t2i/tail/", put("chunk_grid", "configuration", "chunk_shape", 0, value=512), "256 records a chunk"),
        ("maps/t2i/tail/", put("chunk_grid", "configuration", "chunk_shape", 0, value=0), "chunk_grid"),
        ("maps/t2i/weight/", put("data_type", value="float64"), "data_type"),
        ("maps/t2i/weight/", put("data_type", value="object"), "data_type"),
        ("maps/t2i/weight/", put("data_type", value="uint16"), "expected uint8, got uint16"),
        ("maps/t2i/index/", put("data_type", value="int32"), "got int32"),
        ("maps/t2i/index/", put("codecs", value=[{"name": "numcodecs.pickle"}]), "codecs"),
        ("maps/t2i/index/", put("codecs", 1, value={"name": "vlen-utf8"}), "codecs"),
        ("maps/t2i/index/", put("codecs", value=[{"name": "sharding_indexed", "configuration": {}}]), "codecs"),
        ("maps/t2i/index/", put("codecs", 0, "configuration", "order", value=[3, 3, 0, 1]), "codecs"),
        ("maps/t2i/index/", put("storage_transformers", value=[{"name": "x"}]), "storage_transformers"),
        ("predictions/logits/", put("shape", value=[6, 2**30]), "logits"),
        ("samples/key_offsets/", put("shape", value=[10**9]), "key_offsets: .* 250,000,000 chunks"),
        ("maps/token_ids/", put("zarr_format", value=2), "Zarr version 3"),
    ],
)
def test_arrays_that_claim_too_much_or_are_of_another_make(folder, shards, name, change, match):
    edit(folder, name, change)
    refused(folder, shards, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("data_type", value="uint16"), "expected uint8, got uint16"),
        (put("shape", 3, value=2**40), "chunk_grid"),
        (put("shape", 3, value=9), "chunk_grid"),
        (put("chunk_grid", "configuration", "chunk_shape", 0, value=512), "256 records a chunk"),
    ],
)
def test_whole_rows_that_claim_too_much(shards, teacher_folder, tmp_path, change, match):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    edit(cache.folder, "maps/i2t/weight/", change)
    refused(cache.folder, shards, match)


def test_a_key_axis_shorter_than_the_tokens(shards, teacher_folder, tmp_path):
    from test_unit import rewrite

    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    rewrite(cache.folder / "units" / UNIT, lambda name, values: values[..., :3])
    seal(cache.folder)
    refused(cache.folder, shards, "expected at most 3 tokens")


@pytest.mark.parametrize("name", TargetSpec.model_fields)
def test_a_specification_that_leaves_a_field_out(shards, teacher_folder, tmp_path, name):
    """What is not said must not be guessed: a default of a later version would change what the numbers mean."""
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    seal(cache.folder, lambda manifest: manifest["spec"].pop(name) and None)
    with pytest.raises(CacheError, match=rf"manifest\.json: cannot be read, (.|\n)*spec\.{name}: Field required"):
        Cache(cache.folder)


@pytest.mark.parametrize(
    "change", [{"steps": None}, {"steps": 255}, {"steps": 0}, {"k": 3}, {"mass": 0.5}, {"weights": "float16"}]
)
def test_a_specification_of_two_codecs(shards, teacher_folder, tmp_path, change):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    seal(cache.folder, lambda manifest: manifest["spec"].update(change))
    with pytest.raises(CacheError, match="manifest"):
        Cache(cache.folder)


def test_every_limit_of_a_specification_is_a_limit(folder, shards):
    """The specification is a stranger's too: no field of it lifts the bounds of the arrays."""

    def change(root):
        root["attributes"]["spec"] |= {"k": None, "text_length": 65_535, "teacher_heads": 4096}

    edit(folder, "", change)
    seal(folder, lambda manifest: manifest["spec"].update(k=None, text_length=65_535, teacher_heads=4096))
    refused(folder, shards, r"expected shape \[6, 4096")


def test_more_rows_than_there_are_chunks(folder, shards):
    """2^24 records in the metadata, one chunk in the file: no memory for the others."""
    members = members_of(folder)
    for name, value in list(members.items()):
        if name.startswith("maps/") and name.endswith("zarr.json") and b'"array"' in value:
            metadata = json.loads(value)
            metadata["shape"][0] = 2**24
            members[name] = json.dumps(metadata).encode()
    rezip(folder, members)
    refused(folder, shards, "chunks, but the zip has fewer members")


@pytest.mark.parametrize("claim", [2**20, 2**32 - 1, 2**40, 2**64 - 1])
def test_a_frame_that_claims_more_than_its_chunk(folder, shards, claim):
    name = "maps/t2i/index/c/0/0/0/0"
    frame = b"\x28\xb5\x2f\xfd\xe0" + claim.to_bytes(8, "little") + b"\x01\x00\x00"
    chunk = frame + google_crc32c.value(frame).to_bytes(4, "little")
    rezip(folder, members_of(folder) | {name: chunk})
    refused(folder, shards, "chunk 0: expected .* bytes, got")


def test_a_chunk_of_compressed_zeros(folder, shards):
    rezip(folder, members_of(folder) | {"maps/t2i/index/c/0/0/0/0": framed(bytes(2**28))})
    refused(folder, shards, "chunk 0: expected .* bytes, got 268435456")


# --- numbers


def test_grids_that_would_make_giant_batches(folder, shards):
    grid = np.full((6, 2), 65_535, np.uint16)
    rezip(folder, members_of(folder) | {"maps/grid/c/0/0": framed(grid.tobytes())})
    refused(folder, shards, r"maps/grid is damaged|maps/grid: .*tokens|expected at most \d+ tokens")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe" + b"a" * 19, b"key-000key-001key-00\xc3"], ids=["not UTF-8", "cut in a letter"]
)
def test_keys_that_are_no_text(folder, shards, content):
    rezip(folder, members_of(folder) | {"samples/key_bytes/c/0": framed(content)})
    report = verify(folder)
    assert "can't decode byte" in " ".join(line for finding in report.findings for line in finding.examples)
    with pytest.raises(CacheError, match="samples/key_bytes is damaged"):
        CacheTargets(Cache(folder), shards, 2).targets(all_pairs(shards))
    assert cli("inspect", folder, "--key", "x").code == 1


@pytest.mark.parametrize("offsets", [[0, 7, 3, 21], [0, 7, 14, 2**63], [5, 7, 14, 21], [0, 0, 14, 21]])
def test_offsets_that_do_not_rise(folder, shards, offsets):
    rezip(folder, members_of(folder) | {"samples/key_offsets/c/0": framed(np.array(offsets, np.uint64).tobytes())})
    assert not verify(folder).sound
    with pytest.raises(CacheError, match="expected offsets that rise"):
        CacheTargets(Cache(folder), shards, 2).targets(all_pairs(shards))


def test_logits_that_are_not_finite(folder, shards):
    logits = np.full((6, 3), np.nan, np.float32)
    rezip(folder, members_of(folder) | {"predictions/logits/c/0/0": framed(logits.tobytes())})
    assert "logits" in {finding.kind for finding in verify(folder).findings}
    with pytest.raises(CacheError, match="expected finite numbers"):
        CacheTargets(Cache(folder), shards, 2, attention=False).targets(all_pairs(shards))


# --- JSON


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 10**6, "nested too deep"),
        ('{"a": ' * 10**5 + "1" + "}" * 10**5, "nested too deep"),
        ('{"zarr_format": NaN}', "NaN is no JSON"),
        ('{"zarr_format": 1e999}', "too large a number"),
        ('{"zarr_format": 3, "zarr_format": 3}', "twice"),
        ('{"zarr_format": ' + "9" * 10_000 + "}", "limit|digits"),
        ("\udcff", "utf-8"),
        ("{" + " " * 2**21 + "}", "at most|nested"),
    ],
)
def test_json_that_is_none(folder, shards, text, match):
    content = text.encode(errors="surrogateescape")
    rezip(folder, members_of(folder) | {"zarr.json": content})
    refused(folder, shards, match)
    if len(text) < 2**21:
        (folder / "manifest.json").write_bytes(content)
        assert not verify(folder).sound
        with pytest.raises(CacheError, match=rf"(?s)manifest\.json: .*({match}|version)"):
            Cache(folder)


def test_a_giant_manifest(folder):
    with open(folder / "manifest.json", "ab") as file:
        file.truncate(2**27)
    with pytest.raises(CacheError, match="plain file of at most"):
        Cache(folder)
    assert not verify(folder).sound


def test_parsing_is_strict():
    assert parse_json(b'{"a": [1, 2.5, "x", null]}') == {"a": [1, 2.5, "x", None]}
    with pytest.raises(ValueError, match="at most 3 bytes"):
        parse_json(b"1234", 3)


# --- names in the manifest, links, strange files


@pytest.mark.parametrize(
    "name",
    [
        "../x.zarr.zip",
        "/etc/x.zarr.zip",
        "a/b.zarr.zip",
        ".hidden.zarr.zip",
        "a\\b.zarr.zip",
        "x.zip",
        "é.zarr.zip",
        "",
    ],
)
def test_unit_names_that_lead_elsewhere(folder, name):
    seal(folder, lambda manifest: manifest["units"][0].update(name=name))
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be read"):
        Cache(folder)


@pytest.mark.parametrize(
    "name", ["../README.md", "/etc/passwd", "sub/x.json", "code.py", "model.pkl", "x.model", ".x.json"]
)
def test_asset_names_that_lead_elsewhere_or_are_no_text(folder, name):
    seal(folder, lambda manifest: manifest["assets"].update({name: "0" * 64}))
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be read"):
        Cache(folder)


def test_a_unit_twice_in_the_manifest(folder):
    seal(folder, lambda manifest: manifest["units"].append(manifest["units"][0]))
    with pytest.raises(CacheError, match="cannot be read"):
        Cache(folder)


def test_control_characters_do_not_reach_the_terminal(folder):
    seal(folder, lambda manifest: manifest["units"][0].update(source="\x1b[2Jgone.tar"))
    with pytest.raises(CacheError, match="cannot be read"):
        Cache(folder)
    assert "\x1b" not in cli("verify", folder).out


def test_keys_and_labels_do_not_reach_it_either(folder, shards):
    rezip(folder, members_of(folder) | {"samples/key_bytes/c/0": framed(b"key-\x1b[2" * 3)})
    assert not verify(folder).sound
    with pytest.raises(CacheError, match="control characters"):
        CacheTargets(Cache(folder), shards, 2).targets(all_pairs(shards))
    path = folder / "assets" / "labels.json"
    path.write_text(json.dumps(["no", "yes", "\x1b[2J"]))
    seal(folder, lambda manifest: manifest["assets"].update({path.name: hash_file(path)}))
    with pytest.raises(CacheError, match="control characters"):
        _ = Cache(folder).labels


@pytest.mark.parametrize("name", ["units", "assets"])
def test_folders_that_are_links(folder, made, teacher_folder, shards, name):
    """Nothing is read, moved or written through them."""
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    for run in (
        lambda: Cache(folder),
        lambda: CacheWriter(folder, made.spec, made.folder / "assets"),
        lambda: make_cache(shards, teacher_folder, folder, k=8),
    ):
        with pytest.raises(CacheError, match="got a symbolic link"):
            run()
    assert cli("repair", folder, "--drop").code == 1
    assert cli("verify", folder).code == 1
    assert sorted(elsewhere.iterdir()) == before


def test_a_pipe_does_not_hang_the_reader(folder):
    path = folder / "units" / UNIT
    path.unlink()
    os.mkfifo(path)
    assert {finding.kind for finding in verify(folder).findings} == {"missing"}
    with pytest.raises(CacheError, match="missing"):
        Cache(folder).unit(Cache(folder).manifest.units[0])
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CacheError, match="plain file"):
        Cache(folder)


def test_assets_that_would_run_code(folder, shards, tmp_path):
    """`auto_map` names a module; it is neither run nor asked about, and the module itself has no place in assets."""
    marker = tmp_path / "ran"
    (folder / "assets" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(CacheError, match=r"'evil\.py': not in the manifest"):
        Cache(folder)
    path = folder / "assets" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(config))
    seal(folder, lambda manifest: manifest["assets"].update({path.name: hash_file(path)}))
    (folder / "assets" / "evil.py").unlink()
    with contextlib.suppress(CacheError):
        Cache(folder).preprocessor()
    assert not marker.exists()


def _resizing(**changes):
    images = {"do_resize": True, "size_divisor": 12, "size": {"shortest_edge": 36}} | changes
    return {"image_processor": {"image_processor_type": "ViltImageProcessor"} | images}


@pytest.mark.parametrize(
    ("name", "content", "use"),
    [
        ("labels.json", ["no", "yes"], lambda cache: cache.labels),
        ("labels.json", {"no": 1}, lambda cache: cache.labels),
        ("labels.json", [1, 2, 3], lambda cache: cache.labels),
        ("labels.json", None, lambda cache: cache.labels),
        ("config.json", [], lambda cache: cache.teacher_config),
        ("config.json", {"hidden_size": 10**12}, lambda cache: cache.teacher_config),
        ("config.json", {"num_hidden_layers": 10**6}, lambda cache: cache.teacher_config),
        ("config.json", {"vocab_size": "many"}, lambda cache: cache.teacher_config),
        ("tokenizer.json", {"model": {"type": "Evil"}}, lambda cache: cache.preprocessor()),
        ("tokenizer.json", [], lambda cache: cache.preprocessor()),
        ("processor_config.json", _resizing(size_divisor=0), lambda cache: cache.preprocessor()),
        ("processor_config.json", _resizing(size={"shortest_edge": 10**6}), lambda cache: cache.preprocessor()),
    ],
)
def test_assets_that_do_not_fit(folder, name, content, use):
    path = folder / "assets" / name
    path.write_text(json.dumps(content))
    seal(folder, lambda manifest: manifest["assets"].update({name: hash_file(path)}))
    with pytest.raises(CacheError, match="assets"):
        use(Cache(folder))


def test_a_spec_that_the_fingerprint_does_not_cover(folder, shards):
    members = members_of(folder)
    root = json.loads(members["zarr.json"])
    root["attributes"]["spec"]["dtype"] = "bfloat16"
    rezip(folder, members | {"zarr.json": json.dumps(root).encode()})
    refused(folder, shards, "its fingerprint is not that of its specification")


def test_other_bytes_than_a_zip(tmp_path):
    for content in (
        b"",
        b"PK\5\6" + bytes(18),
        b"PK\5\6" + b"\xff" * 16 + bytes(2),
        os.urandom(5000),
    ):
        (tmp_path / "x.zarr.zip").write_bytes(content)
        with pytest.raises(CacheError, match=r"x\.zarr\.zip: "):
            Unit(tmp_path / "x.zarr.zip")


def test_verify_of_no_folder(tmp_path):
    with pytest.raises(InputError, match="expected the folder of a cache"):
        verify(tmp_path / "x")
