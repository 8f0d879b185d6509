"""The contract: the reader that stands in docs/format.md, ours, and caches that are read for ever agree."""

import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from pipeline import make_cache, make_samples, make_shards
from transformers import ViltModel

from dde_cache import schemas
from dde_cache.audit import audit
from dde_cache.codec import dense_rows
from dde_cache.errors import CacheError
from dde_cache.partners import read_partners
from dde_cache.passes import pass_name
from dde_cache.spec import TargetSpec, difference
from dde_cache.store import Cache
from dde_cache.subset import Selection, subset
from dde_cache.unit import Unit

PAGE = Path(__file__).parent.parent / "docs" / "format.md"
GOLDEN = Path(__file__).parent / "golden" / "v1"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
READER = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
ROUNDING = 1e-6
UNIT = "000000.zarr.zip"


@pytest.fixture(scope="module")
def read_cache():
    """The reader of the page, as a program of its own."""
    namespace = {}
    exec(compile(READER, str(PAGE), "exec"), namespace)
    return namespace["read_cache"]


def test_the_reader_of_the_page_is_short_and_knows_only_zarr_and_numpy():
    assert len(READER.splitlines()) <= 60
    imported = re.findall(r"^(?:import|from) (.*)$", READER, re.MULTILINE)
    assert imported == ["hashlib, json", "numpy as np", "zarr"]


def ours(cache):
    """What our own reader gives, in the form of the page's."""
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        if unit.has_logits:
            columns = [unit.array(f"predictions/{name}").tolist() for name in ("sample", "text", "view", "pass")]
            for row, (sample, *rest) in enumerate(zip(*columns, strict=True)):
                yield "predictions", unit.keys[sample], *rest, {"logits": unit.array("predictions/logits")[row]}
        if not unit.has_maps:
            continue
        maps = unit.maps
        held = {direction: unit.attention(direction) for direction in cache.spec.directions}
        keys = {"t2i": maps.image_tokens, "i2t": maps.text_tokens}
        for row, sample in enumerate(maps.sample):
            one = {name: encoded.records(torch.tensor([row])) for name, encoded in held.items()}
            yield (
                "maps", unit.keys[sample], int(maps.text[row]), int(maps.view[row]), int(maps.passes[row]),
                {
                    "image": maps.image[row], "layer": maps.layer[row], "text_tokens": maps.text_tokens[row],
                    "token_ids": maps.token_ids[row], "grid": maps.grid[row],
                    **{name: dense_rows(each, int(keys[name][row]))[0].numpy() for name, each in one.items()},
                },
            )  # fmt: skip
        unit.close()


def assert_agree(cache, read_cache):
    count = 0
    for expected, got in zip(ours(cache), read_cache(cache.folder), strict=True):
        assert expected[:-1] == got[:-1]
        assert expected[-1].keys() == got[-1].keys()
        for name, value in expected[-1].items():
            np.testing.assert_allclose(got[-1][name], value, rtol=0, atol=ROUNDING, err_msg=name)
        count += 1
    assert count
    return count


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(6), size=4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 9, "layers": (0, 2), "queries": "all", "heads": "mean"},
        {"k": 2, "layers": (0, 2), "queries": "all"},
        {"k": None, "weights": "float32"},
        {"weights": "float16", "heads": "mean", "queries": "all"},
        {"mass": 0.6, "k": 5, "layers": (1,)},
    ],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_both_readers_agree_on_what_an_extraction_writes(shards, teacher_folder, tmp_path, read_cache, options):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **options)
    pairs = sum(entry.pairs for entry in cache.manifest.units)
    assert assert_agree(cache, read_cache) == pairs * (1 + len(cache.spec.layers))


def test_both_readers_agree_on_parts(shards, teacher_folder, save_teacher, tmp_path, read_cache):
    whole = make_cache(shards, teacher_folder, tmp_path / "cache", layers=(0, 2))
    selection = Selection(keys=frozenset({"key-002", "key-005"}), layers=(2,))
    subset(whole, tmp_path / "some", selection)
    subset(whole, tmp_path / "logits", Selection(fields=("predictions",)))
    bare = make_cache(shards[:1], save_teacher(ViltModel), tmp_path / "bare")
    for cache in (Cache(tmp_path / "some"), Cache(tmp_path / "logits"), bare):
        assert_agree(cache, read_cache)


# --- caches of version 1, for ever


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_cache(name, read_cache):
    """Both readers, against numbers that neither computed."""
    cache = Cache(GOLDEN / name)
    assert_agree(cache, read_cache)
    expected = np.load(GOLDEN / f"expected-{name}.npz", allow_pickle=False)
    rows = iter(ours(cache))
    for number, entry in enumerate(cache.manifest.units):
        held = {part.partition(".")[2]: expected[part] for part in expected.files if part.startswith(f"{number}.")}
        unit = cache.unit(entry)
        assert unit.keys == held["keys"].tolist()
        np.testing.assert_array_equal(unit.content, held["content"])
        unit.check_readable()
        for place, logits in zip(held.get("predictions", ()), held.get("logits", ()), strict=True):
            _, key, *rest, values = next(rows)
            assert [unit.keys.index(key), *rest] == place.tolist()
            np.testing.assert_array_equal(values["logits"], logits)
        for row, (sample, text, view, passes, image, layer) in enumerate(held.get("maps", ())):
            table, key, *rest, values = next(rows)
            assert (table, unit.keys.index(key), *rest) == ("maps", sample, text, view, passes)
            assert (values["image"], values["layer"]) == (image, layer)
            for column in ("text_tokens", "token_ids", "grid"):
                np.testing.assert_array_equal(values[column], held[column][row])
            for direction in cache.spec.directions:
                dense, got = held[direction][row], values[direction]
                np.testing.assert_allclose(got, dense[..., : got.shape[-1]], rtol=0, atol=ROUNDING)
                assert not dense[..., got.shape[-1] :].any()
        unit.close()
    assert next(rows, None) is None


def test_a_golden_cache_of_passes():
    """The recipes' names, and partners by place: one in the unit, one that is not in the cache."""
    cache = Cache(GOLDEN / "passes")
    assert [pass_name(recipe) for recipe in cache.spec.passes] == ["matched", "masked", "negative"]
    expected = np.load(GOLDEN / "expected-passes.npz", allow_pickle=False)
    unit = cache.unit(cache.manifest.units[0])
    assert list(audit(unit)) == []
    offsets, text = expected["0.partners_key_offsets"], expected["0.partners_key_bytes"].tobytes()
    names = [text[start:stop].decode() for start, stop in itertools.pairwise(offsets)]
    columns = (expected[f"0.partners_{name}"].tolist() for name in ("sample", "text", "view", "pass"))
    found = [(*place, one.key, one.content) for place, one in read_partners(unit).items()]
    hashes = [row.tobytes() for row in expected["0.partners_content"]]
    assert found == list(zip(*columns, names, hashes, strict=True))
    assert {"a", "long", "elsewhere/\u00df"} == set(names)
    assert set(unit.array("predictions/pass").tolist()) == {0}
    unit.close()


def test_a_golden_cache_of_what_lies_beside_the_maps():
    """Whole rows and hidden states, by our reader; by anybody's they are plain arrays."""
    cache = Cache(GOLDEN / "beside")
    assert (cache.spec.has_whole, cache.spec.hidden_width) == (True, 5)
    expected = np.load(GOLDEN / "expected-beside.npz", allow_pickle=False)
    for number, entry in enumerate(cache.manifest.units):
        unit = cache.unit(entry)
        assert list(audit(unit)) == []
        for name in ("t2w", "i2w"):
            dense = expected[f"{number}.{name}"]
            found = dense_rows(unit.attention(name), dense.shape[-1]).numpy()
            np.testing.assert_allclose(found, dense, rtol=0, atol=ROUNDING)
        for name in ("text", "image"):
            np.testing.assert_array_equal(unit.hidden(name), expected[f"{number}.hidden_{name}"])
        unit.close()


def test_the_golden_caches_hold_what_they_should():
    """Two images, views, passes and layers; every stored type; a group that no reader knows; a tail of either sign."""
    cache = Cache(GOLDEN / "two-images")
    spec = cache.spec
    assert (spec.images, spec.views, len(spec.passes), len(spec.layers), spec.classes) == (2, 2, 2, 2, 3)
    one, two = (cache.unit(entry) for entry in cache.manifest.units)
    assert len(one.maps.sample) == 3 * 2**4
    assert len(one.array("predictions/sample")) == 3 * 2**2
    assert one.array("maps/t2i/index").dtype == np.uint8
    assert two.array("maps/t2i/index").dtype == np.uint16
    assert two.array("maps/t2i/index").max() > 255
    assert two.attributes.groups["hologram"].required is False
    assert one.array("maps/t2i/tail").min() < 0 < one.array("maps/t2i/tail").max()
    whole = Cache(GOLDEN / "whole-rows")
    assert (whole.spec.heads, whole.spec.queries, whole.spec.weights) == ("mean", "all", "float16")
    every = Cache(GOLDEN / "every-key")
    assert (every.spec.weights, every.spec.steps, every.spec.queries) == ("sqrt8", 40, "all")
    code = every.unit(every.manifest.units[0]).array("maps/t2i/weight")
    assert (code.dtype, code.min(), code[code > 0].min()) == (np.uint8, 0, 1)
    assert Cache(GOLDEN / "logits").spec.layers == ()
    one_way = Cache(GOLDEN / "one-way")
    assert one_way.spec.directions == ("t2i",)
    assert not [name for name in one_way.unit(one_way.manifest.units[0]).blocks.names if "i2t" in name]
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 250_000


@pytest.mark.parametrize("name", NAMES)
def test_golden_caches_fit_the_schemas(name):
    def validate(schema, value):
        jsonschema.validate(value, json.loads((schemas.folder() / f"{schema}.json").read_text()))

    validate("manifest", json.loads((GOLDEN / name / "manifest.json").read_text()))
    cache = Cache(GOLDEN / name)
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        validate("unit-attributes", json.loads(unit.attributes.model_dump_json()))
        unit.close()


def test_the_golden_script_makes_what_the_golden_caches_hold(tmp_path, monkeypatch):
    """Compared by content: other versions of zstd give other bytes."""
    found = importlib.util.spec_from_file_location("make_golden", GOLDEN.parent / "make.py")
    make = importlib.util.module_from_spec(found)
    found.loader.exec_module(make)
    monkeypatch.setattr(make, "FOLDER", tmp_path / "v1")
    make.main(NAMES)
    for name in NAMES:
        before, after = (Cache(folder / name) for folder in (GOLDEN, tmp_path / "v1"))
        assert after.manifest.fingerprint == before.manifest.fingerprint, difference(before.spec, after.spec)
        for one, two in zip(ours(before), ours(after), strict=True):
            assert one[:-1] == two[:-1]
            for part, value in one[-1].items():
                np.testing.assert_array_equal(two[-1][part], value)


# --- what comes next


def reattributed(path, target, change):
    """A copy of a unit with other attributes."""
    from test_unit import rezip

    shutil.copy(path, target)

    def edit(members):
        root = json.loads(members["zarr.json"])
        change(root["attributes"])
        return members | {"zarr.json": json.dumps(root).encode()}

    rezip(target, edit)
    return target


def test_an_unknown_group_is_ignored_or_refused(tmp_path):
    """Both readers: the same unit, its group once optional and once required."""
    namespace = {}
    exec(READER, namespace)
    import zarr

    source = GOLDEN / "two-images" / "units" / "000001.zarr.zip"
    fingerprint = Cache(GOLDEN / "two-images").manifest.fingerprint

    def needed(attributes):
        attributes["groups"]["hologram"]["required"] = True

    same = reattributed(source, tmp_path / "a.zarr.zip", lambda attributes: None)
    other = reattributed(source, tmp_path / "b.zarr.zip", needed)
    unit = Unit(same)
    unit.check_readable()
    unit.close()
    with zarr.storage.ZipStore(same, mode="r") as store:
        assert len(list(namespace["read_unit"](zarr.open_group(store, mode="r"), fingerprint))) == 20
    with pytest.raises(CacheError, match="requires hologram, unknown to this version; update dde-cache"):
        Unit(other)
    with (
        zarr.storage.ZipStore(other, mode="r") as store,
        pytest.raises(ValueError, match="needs a newer reader"),
    ):
        list(namespace["read_unit"](zarr.open_group(store, mode="r"), fingerprint))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"view": "randaugment 2"}, 'view: expected "example 1", got "randaugment 2"'),
        ({"views": 3}, "views: expected 2, got 3"),
        ({"passes": ("matched",)}, 'passes: expected ["matched", "masked example 1"], got ["matched"]'),
        ({"images": 1}, "images: expected 2, got 1"),
        ({"groups": {}}, "groups.hologram: expected {\"depth\": 2}, got null"),
        ({"groups": {"hologram": {"depth": 2}, "whole": {}}}, "groups.whole: expected null, got {}"),
        ({"groups": {"hologram": {"depth": 3}}}, "groups.hologram.depth: expected 2, got 3"),
        ({"classes": None}, "classes: expected 3, got null"),
        ({"mass": 0.5}, "mass: expected null, got 0.5"),
    ],
)  # fmt: skip
def test_every_part_of_the_specification_is_in_the_identity(change, line):
    """Another value, another fingerprint, and a line that says which."""
    spec = Cache(GOLDEN / "two-images").spec
    other = spec.model_copy(update=change)
    assert other.fingerprint != spec.fingerprint
    assert difference(spec, other) == [line]
    assert TargetSpec.model_validate_json(other.model_dump_json()).fingerprint == other.fingerprint


def test_fields_that_are_not_in_version_1_are_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "logits", tmp_path / "cache")
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["spec"]["smell"] = "roses"
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match="cannot be read"):
        Cache(folder)


def test_the_page_names_every_field_and_array():
    """The tables of the page and the models are in step."""
    page = PAGE.read_text()
    table = page.split("### spec\n")[1].split("\n## ")[0]
    named = {name.strip() for row in re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE) for name in row.split(",")}
    assert named - {"field"} == set(TargetSpec.model_fields)
    caches = ("two-images", "beside", "passes")
    names = [name for cache in caches for name, _ in _arrays(GOLDEN / cache / "units" / UNIT)]
    for name in names:
        group, _, last = name.rpartition("/")
        if group not in ("maps/i2t", "whole/i2w"):
            assert f"{name} |" in page or re.search(rf"\| {group}/.*\b{last}\b.* \|", page), name


def _arrays(path):
    import zarr

    with zarr.storage.ZipStore(path, mode="r") as store:
        members = zarr.open_group(store, mode="r").members(max_depth=None)
        return [(name, member.dtype) for name, member in members if isinstance(member, zarr.Array)]


def test_the_golden_caches_can_be_trained_on_in_part():
    """Our training reads view 0 of pass 0 of image 0 where there are more."""
    from dde_cache.stream import Pair
    from dde_cache.targets import CacheTargets

    class Named:
        name = "000000.tar"

    cache = Cache(GOLDEN / "two-images")
    batch = CacheTargets(cache, [Named()], layer=3).targets([Pair(0, "b/ü", 1), Pair(0, "a", 0)])
    expected = np.load(GOLDEN / "expected-two-images.npz", allow_pickle=False)
    rows = [place.tolist() for place in expected["0.predictions"]]
    np.testing.assert_array_equal(batch["logits"][0], expected["0.logits"][rows.index([1, 1, 0, 0])])
    np.testing.assert_array_equal(batch["logits"][1], expected["0.logits"][rows.index([0, 0, 0, 0])])
    assert torch.equal(batch["grid"], torch.tensor([[2, 2], [2, 2]]))


def test_attention_of_one_direction_is_not_trained_on_as_if_there_were_both(tmp_path):
    from dde_cache.distill import TrainConfig
    from dde_cache.samples import Shard
    from dde_cache.sources import CachedTargets
    from dde_cache.train import train

    whole = Cache(GOLDEN / "one-way")
    with pytest.raises(CacheError, match="both directions of attention: it has t2i alone"):
        train(list[Shard](), CachedTargets(whole), tmp_path / "run", TrainConfig(steps=1))
