"""The judge: every fault is found, all of them at once, and a sound cache is called sound; repair undoes no more."""

import copy
import json
import os
import shutil
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from pipeline import cli, make_cache, make_samples, make_shards, tree

from dde_cache import schemas
from dde_cache.codec import EncodedSparse
from dde_cache.errors import CacheError, InputError, TeacherError
from dde_cache.extract import ExtractConfig
from dde_cache.identity import config_of, target_spec
from dde_cache.repair import repair
from dde_cache.samples import Text
from dde_cache.spec import Manifest, difference, hash_keys
from dde_cache.store import Cache, write_manifest
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import write_unit
from dde_cache.verify import verify

UNITS = ("000000.zarr.zip", "000001.zarr.zip", "000002.zarr.zip")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def made(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("verify") / "cache", layers=(0, 2), k=8)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "cache")


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def kinds(report):
    return {finding.kind: finding for finding in report.findings}


# --- sound caches


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"k": None, "weights": "float32", "queries": "all"},
        {"k": 2, "weights": "float16", "heads": "mean", "layers": (0, 1)},
        {"k": 6, "mass": 0.7, "queries": "all"},
        {"k": None, "weights": "log8"},
        {"steps": 7, "heads": "mean", "queries": "all"},
        {"steps": 254, "layers": (0, 1)},
    ],
)
def test_what_extract_writes_is_sound(shards, teacher_folder, tmp_path, config):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **config)
    report = verify(cache.folder, against=shards, teacher=str(teacher_folder), sample=6)
    assert report.findings == ()
    assert report.sound
    assert (report.units, report.sound_units, report.samples, report.pairs) == (3, 3, 8, 15)
    assert (report.against, report.recomputed.pairs) == (8, 6)
    assert report.recomputed.largest_logit_error < 1e-3
    assert verify(cache.folder, fast=True).sound


def test_the_command_prints_a_verdict(folder, shards, teacher_folder):
    done = cli("verify", folder)
    assert (done.code, done.out.splitlines()[-1].endswith("sound")) == (0, True)
    assert "not sound" not in done.out
    done = cli(
        "verify", folder, "--against", shards[0].path.parent, "--teacher", teacher_folder, "--sample", 3, "--json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    jsonschema.validate(report, json.loads(schemas.render("verify-report")))
    assert report["recomputed"]["pairs"] == 3


def test_a_teacher_needs_shards(folder, teacher_folder):
    with pytest.raises(InputError, match="--against"):
        verify(folder, teacher=str(teacher_folder))
    assert cli("verify", folder / "nowhere").code == 1


def test_options_of_the_teacher_are_refused_without_one(folder):
    done = cli("verify", folder, "--sample", 3, "--device", "cpu")
    assert "expected --sample and --device together with --teacher" in done.message


@pytest.mark.parametrize("part", ["classifier.3.weight", "encoder.layer.2.attention.attention.query.weight"])
def test_the_writer_refuses_what_the_judge_would(teacher, shards, tmp_path, part):
    """A teacher whose numbers overflow is an error at its first batch, not a cache of NaN."""
    broken = copy.deepcopy(teacher.model)
    dict(broken.named_parameters())[part if part in dict(broken.named_parameters()) else f"vilt.{part}"].data[0] = (
        np.inf
    )
    broken.save_pretrained(tmp_path / "teacher")
    teacher.preprocessor.save(tmp_path / "teacher")
    with pytest.raises(TeacherError, match="expected finite logits and attention"):
        make_cache(shards, tmp_path / "teacher", tmp_path / "cache")
    assert Cache(tmp_path / "cache").manifest.units == ()


# --- everything at once


def test_all_findings_at_once(folder, shards):
    flip(folder / "units" / UNITS[0])
    (folder / "units" / UNITS[1]).unlink()
    os.truncate(folder / "units" / UNITS[2], 900)
    flip(folder / "assets" / "labels.json")
    flip(folder / "README.md")
    (folder / "units" / "000009.zarr.zip").write_text("x")
    (folder / "assets" / "tokenizer.model").write_text("x")
    report = verify(folder)
    assert not report.sound
    assert report.sound_units == 0
    found = kinds(report)
    assert {"assets", "card", "missing", "unlisted", "bytes", "unreadable"} <= set(found)
    assert found["assets"].count == 2
    assert [line.split(":")[0] for line in found["bytes"].examples] == [UNITS[0], UNITS[2]]
    done = cli("verify", folder)
    assert done.code == 1
    assert done.out.split()[-2:] == ["not", "sound"]
    assert all(len(line) <= 80 for line in done.out.splitlines())
    for name in (*UNITS, "000009.zarr.zip", "tokenizer.model", "README.md", "labels.json"):
        assert name in done.out
    assert "Traceback" not in done.out + done.err


def test_output_is_bounded(folder, shards):
    """A thousand files that do not belong there are one finding with a few examples."""
    for number in range(1000):
        (folder / "units" / f"x{number}").touch()
    [finding] = verify(folder, fast=True).findings
    assert (finding.kind, finding.count, len(finding.examples)) == ("unlisted", 1000, 5)
    assert len(cli("verify", "--fast", folder).out.splitlines()) < 40


@pytest.mark.parametrize("name", ["manifest.json", "README.md", "assets/config.json", "assets/tokenizer.json"])
def test_a_flipped_byte_outside_units(folder, name):
    random = np.random.default_rng(0)
    content = (folder / name).read_bytes()
    for _ in range(12):
        changed = bytearray(content)
        changed[random.integers(len(content))] ^= random.integers(1, 256)
        (folder / name).write_bytes(changed)
        assert not verify(folder, fast=True).sound


def test_white_space_of_the_manifest_counts(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("\n", " ", 1))
    Cache(folder)
    assert "laid out" in kinds(verify(folder))["manifest"].examples[0]


def test_without_a_manifest_units_are_judged_all_the_same(folder):
    (folder / "manifest.json").write_text("{")
    flip(folder / "units" / UNITS[1])
    found = kinds(verify(folder))
    assert "manifest" in found
    assert any(
        UNITS[1] in line for kind in ("checksum", "unreadable") if kind in found for line in found[kind].examples
    )


# --- units that contradict their row, or themselves, though every checksum holds


def reseal(folder, change):
    write_manifest(folder, change(Manifest.model_validate_json((folder / "manifest.json").read_text())))


def rewrite(folder, name, change, attributes=lambda found: found):
    """Write a unit again after `change` on its arrays by name, and give it a right row in the manifest."""
    from test_unit import arrays_of

    path = folder / "units" / name
    arrays, found = arrays_of(path)
    changed = attributes(found)
    new = {"keys": changed.keys} | dict(zip(("size", "sha256"), write_unit(path, change(arrays), changed), strict=True))

    def row(entry):
        return entry.model_copy(update=new) if entry.name == name else entry

    reseal(folder, lambda found: found.model_copy(update={"units": tuple(map(row, found.units))}))


def in_maps(**columns):
    """Change columns of the maps table."""

    def change(arrays):
        new = {name: value(getattr(arrays.maps, name).copy()) for name, value in columns.items()}
        return replace(arrays, maps=replace(arrays.maps, **new))

    return change


def in_attention(direction, part, value):
    def change(arrays):
        held = getattr(arrays, direction)
        tensor = getattr(held, part).clone()
        value(tensor)
        return replace(arrays, **{direction: replace(held, **{part: tensor})})

    return change


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("kind", "told", "change"),
    [
        ("keys", "the hash that the attributes say", lambda arrays: replace(arrays, keys=["x", *arrays.keys[1:]])),
        ("keys", "is there twice", lambda arrays: replace(arrays, keys=[arrays.keys[1], *arrays.keys[1:]])),
        ("records", "out of order or twice", in_maps(sample=put(0, 2))),
        ("records", "records of no sample", in_maps(sample=put(-1, 77))),
        ("records", "expected layers", in_maps(layer=put(0, 1))),
        ("records", "all layers of a map together", in_maps(image=put(3, 1))),
        ("counts", "expected logits of", lambda arrays: replace(arrays, prediction_text=arrays.prediction_text * 0)),
        ("tokens", "behind the valid tokens", in_maps(token_ids=put((0, -1), 5), text_tokens=put(0, 3))),
        ("tokens", "at least one text token", in_maps(grid=put(0, 0))),
        ("checksum", "expected at most", in_maps(text_tokens=put(0, 60))),
        ("index", "positions inside", in_attention("t2i", "index", put((0, 0, 0, 0), 200))),
        ("index", "from -1/2 to 1/2", in_attention("i2t", "tail", put((0, 0, 0), float("nan")))),
        ("index", "from -1/2 to 1/2", in_attention("i2t", "tail", put((0, 0, 0), 0.75))),
        ("rows", "add up to 1 - tail", in_attention("t2i", "tail", put((0, 0, 0), 0.3))),
        ("rows", "valid tokens that are empty", in_attention("t2i", "weight", put((0, 0, 0, 0), 255))),
        ("rows", "rise beyond 255", in_attention("t2i", "weight", put((0, 0, 0, slice(None)), 200))),
        ("rows", "position twice", in_attention("t2i", "index", put((0, 0, 0, 1), 0))),
        ("rows", "add up", in_attention("t2i", "weight", put((0, 0, 0), 0))),
        ("logits", "not finite", lambda arrays: replace(arrays, logits=put((1, 1), np.inf)(arrays.logits.copy()))),
    ],
)  # fmt: skip
def test_bounds(folder, kind, told, change):
    rewrite(folder, UNITS[1], change)
    report = verify(folder)
    assert kind in kinds(report), report.findings
    assert any(line.startswith(UNITS[1]) and told in line for line in kinds(report)[kind].examples)
    assert report.sound_units == 2
    assert "bytes" not in kinds(report)


def shortest(arrays):
    """The record with the fewest text tokens, and how many."""
    record = int(np.argmin(arrays.maps.text_tokens))
    return record, int(arrays.maps.text_tokens[record])


@pytest.mark.parametrize(
    ("kind", "place", "code", "told"),
    [
        ("index", (0, 0, 0, 0), 58, "expected codes up to 57"),
        ("index", "key of padding", 1, "no weight on keys or rows of padding"),
        ("index", "row of padding", 1, "no weight on keys or rows of padding"),
        ("rows", (0, 0, 0, 0), 0, "rows without a weight for every key"),
        ("rows", (0, 0, 0), 57, "weights that cannot add up to 1"),
        ("rows", (0, 0, 0), 2, "weights that cannot add up to 1"),
    ],
)
def test_bounds_of_whole_rows(shards, teacher_folder, tmp_path, kind, place, code, told):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")

    def change(arrays):
        record, words = shortest(arrays)
        keys = int(arrays.maps.image_tokens[0])
        where = {
            "key of padding": ("i2t", (record, 0, 0, words)),
            "row of padding": ("t2i", (record, 0, words, 0)),
        }
        where = where.get(place, ("t2i", (*place, slice(0, keys)) if len(place) == 3 else place))
        return in_attention(where[0], "weight", put(where[1], code))(arrays)

    rewrite(cache.folder, UNITS[1], change)
    finding = kinds(verify(cache.folder))[kind]
    assert told in finding.examples[0]
    again = Cache(cache.folder)
    unit = again.unit(again.manifest.units[1])
    if kind == "index":
        with pytest.raises(CacheError, match=told):
            [unit.attention(direction) for direction in ("t2i", "i2t")]


def test_whole_rows_of_other_heads_are_not_the_teachers(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    rewrite(
        cache.folder,
        UNITS[0],
        lambda arrays: replace(arrays, t2i=replace(arrays.t2i, weight=arrays.t2i.weight.flip(1))),
    )
    report = verify(cache.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert "outside its code" in " ".join(kinds(report)["targets"].examples)


@pytest.mark.parametrize("value", [np.nan, -0.25, 1.5, np.inf])
def test_float_weights_outside_their_bounds(shards, teacher_folder, tmp_path, value):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", weights="float16")
    rewrite(cache.folder, UNITS[0], in_attention("t2i", "weight", put((0, 0, 0, 0), value)))
    assert "index" in kinds(verify(cache.folder))
    unit = Cache(cache.folder).unit(Cache(cache.folder).manifest.units[0])
    with pytest.raises(CacheError, match="weights from 0 to 1"):
        unit.attention("t2i")


def test_padding_that_is_not_empty(folder):
    """Row 5 of a text of three tokens holds a weight."""
    from test_unit import arrays_of

    maps = arrays_of(folder / "units" / UNITS[0])[0].maps
    record = int(np.argmin(maps.text_tokens))
    rewrite(folder, UNITS[0], in_attention("t2i", "weight", put((record, 0, -1, 0), 3)))
    assert "padding" in kinds(verify(folder))["rows"].examples[0]


def test_counts_of_the_manifest_and_of_the_unit(folder):
    def more(entry):
        return entry.model_copy(update={"pairs": entry.pairs + 1}) if entry.name == UNITS[0] else entry

    reseal(folder, lambda found: found.model_copy(update={"units": tuple(map(more, found.units))}))
    [finding] = verify(folder, fast=True).findings
    assert (finding.kind, finding.examples[0]) == ("counts", f"{UNITS[0]}: pairs: expected 7, got 6")


def test_a_key_in_two_units(folder):
    keys = ["key-000", *Cache(folder).unit(Cache(folder).manifest.units[1]).keys[1:]]
    honest = {"keys": hash_keys(keys)}
    rewrite(folder, UNITS[1], lambda arrays: replace(arrays, keys=keys), lambda found: found.model_copy(update=honest))
    [finding] = verify(folder).findings
    assert (finding.kind, finding.count) == ("duplicates", 1)
    assert finding.examples == (f"'key-000' in {UNITS[0]}, {UNITS[1]}",)


# --- against shards and teacher


def test_other_shards(folder, tmp_path):
    samples = make_samples()
    samples[1] = replace(samples[1], texts=(*samples[1].texts[:-1], Text(text="blue ?")))
    changed = make_shards(tmp_path / "changed", [*samples[:6], replace(samples[6], key="key-x")])
    found = kinds(verify(folder, against=changed))
    assert set(found) == {"content", "shards"}
    assert "'key-001'" in found["content"].examples[0]
    assert [finding.count for finding in found.values()] == [3, 1] or found["shards"].count == 3
    told = " ".join(found["shards"].examples)
    assert all(key in told for key in ("key-006", "key-007", "key-x"))
    assert cli("verify", folder, "--against", tmp_path / "changed").code == 1


def test_another_teacher_is_shown_as_a_difference(folder, shards, save_teacher):
    other = save_teacher(seed=5, num_hidden_layers=2)
    report = verify(folder, against=shards, teacher=str(other))
    [finding] = report.findings
    told = "\n".join(finding.examples)
    assert finding.kind == "teacher"
    assert "teacher.weights: expected" in told
    assert "teacher_layers: expected 3, got 2" in told
    assert report.recomputed is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda arrays: replace(arrays, t2i=EncodedSparse(*(part.flip(1) for part in arrays.t2i.parts.values()))),
            "t2i: ",
        ),
        (lambda arrays: replace(arrays, logits=arrays.logits + np.float32(0.1)), "a logit is off by"),
        (
            in_attention("t2i", "index", lambda index: index[..., :2].copy_(index[..., :2].flip(-1))),
            "a weight is off by",
        ),
    ],
)
def test_targets_that_the_teacher_does_not_give(folder, shards, teacher_folder, change, told):
    """Every bound holds, but the numbers are other heads', other positions', or not the teacher's."""
    rewrite(folder, UNITS[0], change)
    report = verify(folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert told in " ".join(kinds(report)["targets"].examples)
    assert report.recomputed.pairs == 15


def test_settings_can_be_had_from_the_specification(made, teacher_folder):
    again = target_spec(FusionTeacher.load(teacher_folder), config_of(made.spec))
    assert difference(made.spec, again) == []
    assert config_of(made.spec) == ExtractConfig(k=8, layers=(0, 2))


# --- repair


def test_nothing_to_repair(folder):
    before = tree(folder)
    report = repair(folder)
    assert (report.manifest, report.card, report.kept, report.bad) == ("kept", "kept", 3, ())
    assert tree(folder) == before
    assert cli("repair", folder).code == 0


def test_bad_units_need_a_way(folder):
    flip(folder / "units" / UNITS[0])
    (folder / "units" / UNITS[2]).unlink()
    before = tree(folder)
    with pytest.raises(CacheError, match=r"(?s)2 units are bad or missing.*000000.*000002.*--drop.*--shards"):
        repair(folder)
    assert tree(folder) == before
    assert cli("repair", folder, "--drop", "--shards", "x", "--teacher", "y").code == 1


def test_drop(folder, made):
    flip(folder / "units" / UNITS[0])
    (folder / "units" / UNITS[2]).unlink()
    done = cli("repair", folder, "--drop", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    jsonschema.validate(report, json.loads(schemas.render("repair-report")))
    assert [bad["name"] for bad in report["bad"]] == [UNITS[0], UNITS[2]]
    assert report["set_aside"] == [f"units/.bad/{UNITS[0]}"]
    assert [entry.name for entry in Cache(folder).manifest.units] == [UNITS[1]]
    assert Cache(folder).manifest.units[0] == made.manifest.units[1]
    assert verify(folder).sound
    assert "6 pairs" in (folder / "README.md").read_text()


def test_extract_again(folder, made, shards, teacher_folder):
    """What was bad comes back byte for byte; what was good is not touched."""
    flip(folder / "units" / UNITS[0])
    (folder / "units" / UNITS[2]).unlink()
    flip(folder / "assets" / "tokenizer.json")
    before = (folder / "units" / UNITS[1]).stat().st_mtime_ns
    with pytest.raises(CacheError, match=r"(?s)tokenizer\.json: changed.*--teacher"):
        repair(folder, drop=True)
    done = cli("repair", folder, "--shards", shards[0].path.parent, "--teacher", teacher_folder)
    assert done.code == 0, done.err
    assert "extracted again: 000002.zarr.zip" in done.out
    assert (folder / "units" / UNITS[1]).stat().st_mtime_ns == before
    left = {name: value for name, value in tree(folder).items() if ".bad" not in name}
    assert left == tree(made.folder)


def test_extract_again_by_another_teacher(folder, shards, save_teacher):
    flip(folder / "units" / UNITS[0])
    done = cli("repair", folder, "--shards", shards[0].path.parent, "--teacher", save_teacher(seed=3))
    assert done.code == 1
    assert "teacher.weights: expected" in done.message
    assert "missing" in kinds(verify(folder)), "the manifest still says what is to be extracted again"
    with pytest.raises(InputError, match=r"(?s)shards of all bad units.*000000"):
        repair(folder, shards=shards[1:], teacher="sample")


@pytest.mark.parametrize("damage", ["gone", "garbage", "a changed row"])
def test_a_lost_manifest_is_made_again(folder, made, damage):
    path = folder / "manifest.json"
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("{}" if damage == "garbage" else path.read_text().replace('"pairs": 6', '"pairs": 7'))
    report = repair(folder)
    assert (report.manifest, report.card) == ("made again", "written again")
    assert tree(folder) == tree(made.folder)


def test_a_bad_unit_is_never_blessed(folder, made):
    (folder / "manifest.json").unlink()
    flip(folder / "units" / UNITS[0], 0.4)
    with pytest.raises(CacheError, match=r"1 units are bad"):
        repair(folder)
    assert not (folder / "manifest.json").exists()
    report = repair(folder, drop=True)
    assert [bad.name for bad in report.bad] == [UNITS[0]]
    assert Cache(folder).manifest.units == made.manifest.units[1:]


def test_units_of_two_teachers_make_no_manifest(folder, shards, save_teacher, tmp_path):
    other = make_cache(shards, save_teacher(seed=1), tmp_path / "other")
    shutil.copy(other.folder / "units" / UNITS[0], folder / "units" / UNITS[0])
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"(?s)2 different targets.*teacher\.weights.*elsewhere"):
        repair(folder, drop=True)


def test_unlisted_units_are_checked_and_taken_in(folder, made):
    reseal(folder, lambda found: found.model_copy(update={"units": found.units[:1]}))
    assert "unlisted" in kinds(verify(folder))
    repair(folder)
    assert Cache(folder).manifest == made.manifest


def test_a_card_that_people_sign(folder, shards, teacher_folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("| made by | fill in |", "| made by | a lab |"))
    assert set(kinds(verify(folder))) == {"card"}
    assert repair(folder).card == "not accepted"
    assert cli("repair", folder, "--accept-card").code == 0
    assert verify(folder).sound
    make_cache(shards, teacher_folder, folder, layers=(0, 2), k=8)
    assert "a lab" in path.read_text()
    assert verify(folder).sound
