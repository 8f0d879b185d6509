"""Mirrored maps are the stored ones with each patch row turned round; exactly right for a teacher without positions."""

import json

import numpy as np
import pytest
import torch
from conftest import vilt_config
from PIL import Image
from pipeline import all_pairs, cli, make_cache, make_shards

from dde_cache.batches import PairDataset
from dde_cache.codec import dense_rows, from_parts, part_names
from dde_cache.distill import TrainConfig
from dde_cache.errors import InputError
from dde_cache.mirror import mirror_maps, mirrored_order
from dde_cache.replay import order_in_views
from dde_cache.sources import CachedTargets, LabelsOnly
from dde_cache.stream import Pair, PairTable
from dde_cache.targets import CacheTargets
from dde_cache.train import train
from dde_cache.views import is_mirrored, parse_recipe

LAYER = 2
QUICK = {"steps": 2, "batch_size": 4, "workers": 0}
CODECS = [
    {"weights": "float32", "k": None},
    {"weights": "log8", "k": 3},
    {"weights": "sqrt8"},
    {"weights": "sqrt8", "queries": "all"},
    {"weights": "float16", "k": 4, "queries": "all"},
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


def dense(batch, direction, keys, steps):
    parts = {part: batch[f"{direction}.{part}"] for part in part_names(steps)}
    return dense_rows(from_parts(parts, steps), keys).numpy()


@pytest.mark.parametrize("config", CODECS, ids=str)
def test_the_image_axis_is_turned_round_and_nothing_else(shards, teacher_folder, tmp_path, config):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **config)
    reader = CacheTargets(cache, shards, LAYER, padded_queries=config.get("queries") == "all")
    pairs = all_pairs(shards)
    before = reader.targets(pairs)
    after = reader.targets([Pair(pair.shard, pair.key, pair.text, 0, row % 3 != 0) for row, pair in enumerate(pairs)])
    assert set(before) == set(after)
    assert torch.equal(before["logits"], after["logits"])
    keys = int(before["grid"].prod(-1).max()) + 1
    steps, words = cache.spec.steps, before["token_ids"].shape[1]
    stored, found = (
        {way: dense(one, way, keys if way == "t2i" else words, steps) for way in ("t2i", "i2t")}
        for one in (before, after)
    )
    changed = 0
    for row in range(len(pairs)):
        rows, columns = before["grid"][row].tolist()
        # The oracle: the patches as a picture, mirrored.
        order = np.arange(keys + 1)
        order[1 : rows * columns + 1] = np.arange(1, rows * columns + 1).reshape(rows, columns)[:, ::-1].ravel()
        if row % 3 == 0:
            order = np.arange(keys + 1)
        # Rows of whole keys are scaled by their sum, whose last bit depends on order and place.
        np.testing.assert_allclose(found["t2i"][row], stored["t2i"][row][..., order[:keys]], rtol=1e-6)
        length = stored["i2t"].shape[2]
        np.testing.assert_allclose(found["i2t"][row], stored["i2t"][row][:, order[:length]], rtol=1e-6)
        changed += (found["t2i"][row] != stored["t2i"][row]).any()
    assert changed > len(pairs) / 3
    twice = mirror_maps(mirror_maps(before, range(len(pairs))), range(len(pairs)))
    assert all(torch.equal(twice[name], before[name]) for name in before)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 1), (3, 3), (2, 5)])
def test_the_order_is_its_own_inverse_and_leaves_cls(grid):
    order = mirrored_order(grid)
    assert order[0] == 0
    assert order[order].tolist() == list(range(grid[0] * grid[1] + 1))


def flat_patches(columns, rows, seed):
    """A picture of flat patches: mirroring it permutes patches and changes none."""
    colours = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(12, axis=0).repeat(12, axis=1))


def test_an_equivariant_teacher_gives_the_mirrored_maps(teacher):
    """Without positions of patches left and right are alike to a teacher."""
    model = teacher.model.vilt
    position = model.embeddings.position_embeddings
    before = position.detach().clone()
    try:
        with torch.no_grad():
            position[:, 1:] = 0
        tokens = teacher.preprocessor.tokens(["is there a red square ?"])
        for seed, (columns, rows) in enumerate(((3, 3), (4, 2), (2, 1))):
            picture = teacher.preprocessor.stack([teacher.preprocessor.pixels(flat_patches(columns, rows, seed))])
            mirrored = type(picture)(picture.pixels.flip(-1), picture.grid)
            one, two = (teacher(tokens, [each], [LAYER]).attention[0, LAYER] for each in (picture, mirrored))
            order = mirrored_order((rows, columns))
            torch.testing.assert_close(two.t2i, one.t2i[..., order], atol=1e-5, rtol=0)
            torch.testing.assert_close(two.i2t, one.i2t[:, :, order], atol=1e-5, rtol=0)
            assert (two.t2i - one.t2i).abs().max() > 1e-3, "the picture is not its own mirror image"
    finally:
        with torch.no_grad():
            position.copy_(before)


@pytest.mark.parametrize("views", [1, 2])
def test_training_mirrors_every_other_picture_with_its_maps(teacher, shards, teacher_folder, tmp_path, views):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", views=views)
    config, table = TrainConfig(**QUICK | {"seed": 4, "batch_size": 5}), PairTable.of(shards)
    expanded = table.in_views(views, 2)
    reader = CacheTargets(cache, shards, LAYER)
    options = {"recipe": parse_recipe(cache.spec.view)}
    dataset = PairDataset(shards, expanded, cache.preprocessor(), cache.labels, reader, **options)
    sides = []
    for step, numbers in enumerate(order_in_views(table, views, config, 0, 6, sides=2)):
        batch = dataset.__getitems__(numbers)
        pairs = [expanded[number] for number in numbers]
        plain = PairDataset(shards, table.in_views(views), cache.preprocessor(), cache.labels, **options).__getitems__(
            [number // 2 for number in numbers]
        )
        for row, pair in enumerate(pairs):
            assert pair.mirrored == is_mirrored(4, step // 3, pair.key)
            height, width = (12 * batch["grid0"][row]).tolist()
            expected = plain["pixels0"][row, :, :height, :width]
            found = batch["pixels0"][row, :, :height, :width]
            assert torch.equal(found, expected.flip(-1) if pair.mirrored else expected)
            sides.append(pair.mirrored)
        unmirrored = reader.targets([Pair(pair.shard, pair.key, pair.text, pair.view) for pair in pairs])
        expected = mirror_maps(unmirrored, [row for row, pair in enumerate(pairs) if pair.mirrored])
        assert all(torch.equal(batch[f"target.{name}"], value) for name, value in expected.items())
    assert len(sides) * 0.2 < sum(sides) < len(sides) * 0.8


def test_the_option_is_off_by_default_and_needs_a_cache(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    assert TrainConfig().remap_flips is False
    with pytest.raises(InputError, match="expected remap_flips with targets of a cache"):
        train(
            shards, LabelsOnly(cache.preprocessor(), vilt_config(), cache.labels), tmp_path / "no",
            TrainConfig(**QUICK, remap_flips=True),
        )  # fmt: skip
    losses = {}
    for name, options in {"off": (), "on": ("--remap-flips",)}.items():
        out = tmp_path / name
        asked = ("train", shards[0].path.parent, "--targets", cache.folder, "--out", out, "--steps", 2)
        done = cli(*asked, "--batch-size", 4, "--set", "log_every=1", "--workers", 0, *options)
        assert done.code == 0, done.err
        losses[name] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses["on"] != losses["off"]
    assert train(shards, CachedTargets(cache), tmp_path / "runs", TrainConfig(**QUICK, remap_flips=True)).steps == 2
