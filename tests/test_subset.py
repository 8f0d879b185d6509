"""A part of a cache is what an extraction of that part gives, and what is kept whole is not touched."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import TEXT_LENGTH
from pipeline import all_pairs, cli, make_cache, make_samples, make_shards, tree
from transformers import ViltModel

from dde_cache.codec import dense_rows
from dde_cache.distill import TrainConfig
from dde_cache.errors import CacheError, InputError
from dde_cache.merge import merge
from dde_cache.sources import CachedTargets
from dde_cache.spec import Group
from dde_cache.store import Cache
from dde_cache.subset import Selection, subset
from dde_cache.summary import summarise
from dde_cache.targets import CacheTargets
from dde_cache.train import train
from dde_cache.unit import write_unit

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def samples():
    return make_samples(8)


@pytest.fixture(scope="module")
def shards(samples, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", samples, size=4)


@pytest.fixture(scope="module")
def make(teacher_folder, tmp_path_factory):
    """Extract one pair at a time, so that no number depends on the batch."""

    def extract(shards, **config):
        out = tmp_path_factory.mktemp("made") / "cache"
        return make_cache(shards, teacher_folder, out, **({"batch_size": 1, "layers": LAYERS} | config))

    return extract


@pytest.fixture(scope="module")
def cache(shards, make):
    return make(shards)


def units_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "units").iterdir()}


def test_whole_units_are_copied(cache, shards, make, tmp_path):
    report = subset(cache, tmp_path / "out", Selection(units=("000001",)))
    assert units_of(tmp_path / "out") == {"000001.zarr.zip": units_of(cache.folder)["000001.zarr.zip"]}
    assert (report.units, report.copied, report.left_out, report.changes) == (1, 1, 1, ())
    assert Cache(tmp_path / "out").manifest.fingerprint == cache.manifest.fingerprint
    assert tree(tmp_path / "out") == tree(make(shards[1:]).folder)
    for pattern in ("000001.tar", "0*1", "000001.zarr.zip"):
        subset(cache, tmp_path / pattern, Selection(units=(pattern,)), link=True)
        assert units_of(tmp_path / pattern) == units_of(tmp_path / "out")
        assert os.stat(tmp_path / pattern / "units" / "000001.zarr.zip").st_nlink > 1


@pytest.mark.parametrize("queries", ["valid", "all"])
@pytest.mark.parametrize("options", [{}, {"k": None, "weights": "float16"}, {"mass": 0.5}], ids=["k", "all", "mass"])
def test_keys_give_what_extracting_them_gives(samples, shards, make, tmp_path, queries, options):
    """Short texts and small pictures alone: the padding of the longer ones goes too."""
    kept = [samples[number] for number in (1, 3, 4, 5, 6, 7)]
    narrow = make_shards(tmp_path / "train", [samples[1], samples[3], *samples[4:]], size=2)
    assert len(narrow) == 3
    part = tmp_path / "part"
    selection = Selection(keys=frozenset(one.key for one in kept))
    cache = make(shards, queries=queries, **options)
    report = subset(cache, part, selection)
    assert (report.copied, report.units, report.samples, report.changes) == (1, 2, 6, ())
    alone = make(narrow[:1], queries=queries, **options)
    assert units_of(part)["000000.zarr.zip"] == units_of(alone.folder)["000000.zarr.zip"]
    assert units_of(part)["000001.zarr.zip"] == units_of(cache.folder)["000001.zarr.zip"]


def test_layers_give_what_extracting_them_gives(cache, shards, make, tmp_path):
    report = subset(cache, tmp_path / "out", Selection(layers=(2,)))
    assert tree(tmp_path / "out") == tree(make(shards, layers=(2,)).folder)
    assert report.changes == ("layers: expected [0, 2], got [2]",)
    assert report.fingerprint != cache.manifest.fingerprint
    assert report.bytes < report.bytes_before


def test_keys_and_layers_twice_give_the_same_bytes(cache, tmp_path):
    selection = Selection(keys=frozenset({"key-001", "key-006"}), layers=(0,), units=("0000*",))
    for name in ("a", "b"):
        subset(cache, tmp_path / name, selection)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_maps_alone(cache, shards, tmp_path):
    report = subset(cache, tmp_path / "out", Selection(fields=("maps",)))
    assert report.changes == ("classes: expected 3, got null",)
    part = Cache(tmp_path / "out")
    assert (report.pairs, part.spec.layers) == (sum(entry.pairs for entry in cache.manifest.units), LAYERS)
    before, after = (CacheTargets(one, shards, layer=2).targets(all_pairs(shards)) for one in (cache, part))
    assert before.keys() - after.keys() == {"logits"}
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    config = TrainConfig(steps=1, batch_size=4, soft_weight=0, workers=0)
    train(shards, CachedTargets(part), tmp_path / "run", config)
    with pytest.raises(CacheError, match="logits: its teacher has no task head, or they were cut away"):
        train(shards, CachedTargets(part), tmp_path / "other", TrainConfig(steps=1, batch_size=4))


def test_predictions_alone(cache, shards, tmp_path):
    report = subset(cache, tmp_path / "out", Selection(fields=("predictions",), keys=frozenset({"key-002", "key-005"})))
    part = Cache(tmp_path / "out")
    assert report.changes == ("layers: expected [0, 2], got []",)
    assert (report.samples, report.pairs) == (2, 6)
    expected = {
        (pair.key, pair.text): logits
        for pair, logits in zip(
            all_pairs(shards),
            CacheTargets(cache, shards, 0, attention=False).targets(all_pairs(shards))["logits"],
            strict=True,
        )
    }
    pairs = [pair for pair in all_pairs(shards) if pair.key in ("key-002", "key-005")]
    logits = CacheTargets(part, shards, 0, attention=False).targets(pairs)["logits"]
    assert torch.equal(logits, torch.stack([expected[pair.key, pair.text] for pair in pairs]))
    summary = summarise(part)
    assert (summary.kept_mass, summary.text_tokens) == ({}, None)
    shown = cli("inspect", part.folder)
    assert shown.code == 0, shown.err
    with pytest.raises(CacheError, match="attention maps: it keeps predictions alone"):
        train(shards, CachedTargets(part), tmp_path / "run", TrainConfig(steps=1, batch_size=4))
    whole = subset(cache, tmp_path / "logits", Selection(fields=("predictions",)))
    assert whole.bytes < whole.bytes_before
    config = TrainConfig(steps=1, batch_size=4, attention_weight=0, workers=0)
    train(shards, CachedTargets(Cache(tmp_path / "logits")), tmp_path / "run", config)


def test_parts_of_one_unit_merge_again(cache, shards, tmp_path):
    """The two halves of a unit keep its shard's name: training finds every key."""
    keys = [sample.key for shard in shards for sample in shard]
    for name, half in (("a", keys[::2]), ("b", keys[1::2])):
        subset(cache, tmp_path / name, Selection(keys=frozenset(half)))
    report = merge([Cache(tmp_path / "a"), Cache(tmp_path / "b")], tmp_path / "out", shards=shards)
    assert (report.samples, report.gaps, len(report.renamed)) == (8, (), 2)
    merged = Cache(tmp_path / "out")
    before, after = (CacheTargets(one, shards, layer=0).targets(all_pairs(shards)) for one in (cache, merged))
    for name in ("logits", "token_ids", "grid", "t2i.weight", "i2t.weight"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"k": 4, "queries": "all"}])
def test_no_value_changes(make, shards, tmp_path, options):
    """The rows that stay decode to the same floats."""
    cache = make(shards, **options)
    subset(cache, tmp_path / "out", Selection(keys=frozenset({"key-001"}), layers=(2,)))
    part = Cache(tmp_path / "out")
    units = [one.unit(one.manifest.units[0]) for one in (cache, part)]
    maps = units[0].maps
    rows = np.flatnonzero((maps.sample == 1) & (maps.layer == 2))
    for direction in ("t2i", "i2t"):
        before, after = (dense_rows(unit.attention(direction), TEXT_LENGTH) for unit in units)
        queries = after.shape[2]
        torch.testing.assert_close(after, before[rows][:, :, :queries], rtol=0, atol=1e-7)
        assert before[rows][:, :, queries:].sum() == 0


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"units": ("000007", "000001")}, r"names of its 2 units, got:\n  - 000007\nit has:\n  - 000000\.zarr\.zip"),
        ({"keys": frozenset({"key-001", "nobody", "key-1"})}, r"got 2 others:\n  - key-1\n  - nobody"),
        ({"keys": frozenset({"key-007"}), "units": ("000000",)}, r"got 1 others:\n  - key-007"),
        ({"layers": (1, 2, 5)}, r"layer 1: it has \[0, 2\]\n  - layer 5"),
    ],
)
def test_what_the_cache_does_not_hold(cache, tmp_path, selection, message):
    with pytest.raises(InputError, match=message):
        subset(cache, tmp_path / "out", Selection(**selection))
    assert list(tmp_path.iterdir()) == []


def test_tables_that_the_cache_does_not_hold(shards, save_teacher, tmp_path):
    bare = make_cache(shards[:1], save_teacher(ViltModel), tmp_path / "cache")
    with pytest.raises(InputError, match="predictions: it has maps"):
        subset(bare, tmp_path / "out", Selection(fields=("predictions",)))


def test_a_unit_with_a_group_of_the_future_is_copied_but_not_cut(cache, shards, tmp_path):
    from test_unit import arrays_of

    from dde_cache.store import CacheWriter

    writer = CacheWriter(tmp_path / "cache", cache.spec, cache.folder / "assets")
    arrays, attributes = arrays_of(cache.folder / "units" / "000000.zarr.zip")
    attributes = attributes.model_copy(update={"groups": attributes.groups | {"hologram": Group(required=False)}})
    fields = {name: getattr(arrays, name) for name in arrays.__dataclass_fields__}
    fields["further"] = {"hologram/depth": np.arange(6.0)}
    write_unit(writer.unit_path("000000.zarr.zip"), type(arrays)(**fields), attributes)
    writer.close()
    future = Cache(tmp_path / "cache")
    assert subset(future, tmp_path / "out", Selection(units=("000000",))).copied == 1
    assert units_of(tmp_path / "out") == units_of(future.folder)
    with pytest.raises(CacheError, match="has hologram, which this version cannot cut"):
        subset(future, tmp_path / "cut", Selection(layers=(0,)))


def test_the_command(cache, tmp_path):
    (tmp_path / "keys.txt").write_text("key-001\n\nkey-002\n")
    (tmp_path / "more.txt").write_text("key-006\n")
    arguments = ("subset", cache.folder, "--keys", tmp_path / "keys.txt", "--keys", tmp_path / "more.txt")
    shown = cli(*arguments, "--layers", "0", "--fields", "maps", "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "layers: expected [0, 2], got [0]" in shown.out
    report = json.loads(cli(*arguments, "--out", tmp_path / "again", "--json").out)
    assert (report["samples"], report["changes"]) == (3, [])
    (tmp_path / "empty.txt").write_text("\n")
    for wrong, message in (
        ((), "expected --units, --keys, --layers or --fields, got none"),
        (("--fields", "maps,colours"), "expected --fields of maps, predictions, whole, hidden"),
        (("--keys", tmp_path / "empty.txt"), "expected keys, one a line, found none"),
        (("--keys", tmp_path / "nowhere.txt"), "cannot be read"),
    ):
        failed = cli("subset", cache.folder, "--out", tmp_path / "x", *wrong)
        assert failed.code == 1
        assert message in failed.message
