"""A cache of each family, as a user makes, checks and uses it."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
from families import save_family
from pipeline import cli, make_samples, make_shards

from dde_cache.assets import read_config
from dde_cache.errors import CacheError
from dde_cache.initial import load_student
from dde_cache.samples import open_shards
from dde_cache.store import Cache

FAMILIES = ("bridgetower", "blip", "flava")
QUICK = ("--steps", 2, "--batch-size", 4, "--set", "workers=0", "--set", "log_every=1")
WORDS = {"no": "unmatched", "yes": "matched", "red": None}


def works(*arguments):
    done = cli(*arguments)
    assert done.code == 0, done.err
    return done


def fails(*arguments, expected):
    done = cli(*arguments)
    assert done.code == 1, (done.out, done.err)
    assert "Traceback" not in done.err
    assert expected in done.message, done.err


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of four sizes, with labels of a matching head."""
    samples = [
        replace(one, texts=tuple(text.model_copy(update={"label": WORDS[text.label]}) for text in one.texts))
        for one in make_samples(6, sizes=((36, 36), (24, 36), (48, 30), (60, 60)))
    ]
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder / "train", samples)
    return folder / "train"


@pytest.fixture(scope="module")
def make(shards, tmp_path_factory):
    """By name of a family, a folder with its teacher and a cache."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        save_family(name, folder / "teacher")
        works("extract", shards, "--teacher", folder / "teacher", "--out", folder / "cache", "--batch-size", 4)
        return folder

    return make


@pytest.fixture(params=FAMILIES)
def made(request, make):
    """Name, and the folder of its teacher and cache."""
    return request.param, make(request.param)


def test_a_cache_says_whose_it_is_and_holds_what_its_teacher_gives(made, shards):
    name, folder = made
    spec = Cache(folder / "cache").spec
    assert (spec.teacher.family, spec.classes, spec.patch_size) == (name, 2, 12)
    assert spec.directions == (("t2i",) if name == "blip" else ("t2i", "i2t"))
    assert Cache(folder / "cache").labels == ("unmatched", "matched")
    report = works(
        "verify", folder / "cache", "--against", shards, "--teacher", folder / "teacher", "--sample", 8, "--json"
    )
    checked = json.loads(report.out)
    assert checked["recomputed"]["pairs"] == 8
    assert checked["recomputed"]["largest_logit_error"] < 1e-4
    # Every picture was made 36 x 36: 3 x 3 patches and CLS.
    unit = Cache(folder / "cache").unit(Cache(folder / "cache").manifest.units[0])
    assert (unit.maps.grid == 3).all()
    unit.close()


def test_a_direction_that_the_family_lacks_is_refused(made):
    name, folder = made
    cache = Cache(folder / "cache")
    both = cache.spec.model_copy(update={"directions": ("t2i", "i2t")})
    if name != "blip":
        assert read_config(folder / "cache" / "assets", both)
        return
    with pytest.raises(CacheError, match="directions: a blip gives t2i alone, got t2i, i2t"):
        read_config(folder / "cache" / "assets", both)


def test_another_teacher_of_the_family_is_found_out(made, shards, tmp_path):
    name, folder = made
    other = save_family(name, tmp_path / "other", seed=1)
    done = cli("verify", folder / "cache", "--against", shards, "--teacher", other)
    assert done.code == 1
    assert "teacher.weights" in done.out + done.err


def test_a_student_learns_from_it(made, shards, tmp_path):
    name, folder = made
    targets = ("--targets", folder / "cache")
    if name == "blip":
        fails(
            "train", shards, *targets, "--out", tmp_path / "no", *QUICK,
            expected="both directions of attention: it has t2i alone; train with --directions t2i",
        )  # fmt: skip
        fails(
            "train", shards, *targets, "--out", tmp_path / "no", *QUICK, "--directions", "i2t",
            expected="attention rows i2t: it has t2i; train with other --directions",
        )  # fmt: skip
    way = ("--directions", "t2i") if name == "blip" else ()
    works("train", shards, *targets, "--out", tmp_path / "run", *QUICK, *way)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    student, preprocessor = load_student(tmp_path / "run")
    shape = student.config.vilt()
    spec = Cache(folder / "cache").spec
    assert (shape.num_attention_heads, shape.patch_size, shape.image_size) == (spec.teacher_heads, 12, 36)
    assert shape.max_position_embeddings == spec.text_length
    # The student's processor is the teacher's.
    image = open_shards(shards)[0].read("key-002").images[0].decode()
    assert image.size != (36, 36)
    assert preprocessor.pixels(image).shape == (3, 36, 36)
    assert np.array_equal(preprocessor.pixels(image), Cache(folder / "cache").preprocessor().pixels(image))


def test_cached_targets_are_those_of_the_teacher_at_each_step(made, shards, tmp_path):
    """The same student, the same batches: what the cache adds is the codec's error."""
    name, folder = made
    way = ("--directions", "t2i") if name == "blip" else ()
    losses = {}
    for kind, targets in (
        ("cached", ("--targets", folder / "cache")),
        ("online", ("--teacher", folder / "teacher")),
    ):
        works("train", shards, *targets, "--out", tmp_path / kind, *QUICK, *way, "--set", "queries=valid")
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    np.testing.assert_allclose(losses["cached"], losses["online"], rtol=2e-2)


def test_a_one_way_teacher_at_each_step_is_refused_both_ways(shards, tmp_path):
    teacher = save_family("blip", tmp_path / "teacher")
    fails(
        "train", shards, "--teacher", teacher, "--out", tmp_path / "run", *QUICK,
        expected="it has t2i attention alone: train with --directions t2i",
    )  # fmt: skip


def test_labels_alone_with_the_shape_of_a_teacher(made, shards, tmp_path):
    _name, folder = made
    works("train", shards, "--targets", "none", "--like", folder / "teacher", "--out", tmp_path / "run", *QUICK)
    assert load_student(tmp_path / "run")[0].config.vilt().patch_size == 12


def test_views_replay_behind_a_processor_that_crops(shards, tmp_path):
    """Each view is drawn before the processor, so training sees the pixels that the teacher saw."""
    save_family("flava", tmp_path / "teacher")
    cache = tmp_path / "cache"
    works("extract", shards, "--teacher", tmp_path / "teacher", "--out", cache, "--batch-size", 4, "--views", 2)
    works("train", shards, "--targets", cache, "--out", tmp_path / "run", *QUICK)


@pytest.mark.parametrize("name", ["bridgetower", "blip"])
def test_pictures_that_lose_a_margin_are_counted(shards, tmp_path, name):
    teacher = save_family(name, tmp_path / "teacher")
    sizes = [image.size() for shard in open_shards(shards) for one in shard for image in one.images]
    expected = sum(width != height for width, height in sizes) if name == "bridgetower" else 0
    command = ["extract", shards, "--teacher", teacher, "--out", tmp_path / "cache"]
    found = json.loads(works(*command, "--json").out)
    assert (found["units"], found["cropped_pictures"]) == (2, expected)
    for unit in (tmp_path / "cache" / "units").iterdir():
        unit.unlink()
    assert ("pictures that lost a margin" in works(*command).out) == bool(expected)


def test_a_cache_without_predictions(shards, tmp_path):
    save_family("bridgetower", tmp_path / "teacher")
    cache = tmp_path / "cache"
    works("extract", shards, "--teacher", tmp_path / "teacher", "--out", cache, "--batch-size", 4, "--no-predictions")
    assert Cache(cache).spec.classes is None
    assert Cache(cache).labels == ("unmatched", "matched")
    works("verify", cache, "--against", shards, "--teacher", tmp_path / "teacher")
    fails("train", shards, "--targets", cache, "--out", tmp_path / "run", *QUICK, expected="--set soft_weight=0")
    works("train", shards, "--targets", cache, "--out", tmp_path / "run", *QUICK, "--set", "soft_weight=0")


def test_regions_are_refused_by_extract(shards, tmp_path):
    teacher = save_family("lxmert", tmp_path / "teacher")
    for more in ((), ("--plan",)):
        fails(
            "extract", shards, "--teacher", teacher, "--out", tmp_path / "cache", *more,
            expected="expected a teacher that reads pictures, which shards hold; lxmert reads features of regions",
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()


def test_states_are_refused_where_a_block_has_none_of_the_image(shards, tmp_path):
    teacher = save_family("blip", tmp_path / "teacher")
    expected = "its blocks have no states of the image: leave hidden and pooled out of --targets"
    for name in ("hidden", "pooled"):
        fails(
            "extract", shards, "--teacher", teacher, "--out", tmp_path / "cache", "--targets", f"cross,{name}",
            expected=expected,
        )  # fmt: skip
    for name in ("hidden_weight", "pooled_weight"):
        fails(
            "train", shards, "--teacher", teacher, "--out", tmp_path / "run", *QUICK, "--directions", "t2i", "--set",
            f"{name}=1", expected=expected,
        )  # fmt: skip


def test_whole_rows_and_states_of_flava(shards, tmp_path):
    save_family("flava", tmp_path / "teacher")
    cache = tmp_path / "cache"
    asked = ("--targets", "cross,whole,hidden,pooled", "--layers", "0,1")
    works("extract", shards, "--teacher", tmp_path / "teacher", "--out", cache, "--batch-size", 4, *asked)
    works("verify", cache, "--against", shards, "--teacher", tmp_path / "teacher")
    works(
        "train", shards, "--targets", cache, "--out", tmp_path / "run", *QUICK, "--set", "attention=whole", "--set",
        "hidden_weight=1", "--set", "pooled_weight=1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("text_config", "vocab_size"), 10**12, "text_config.vocab_size: expected a number up to"),
        (("text_config", "num_attention_heads"), 5, "heads: expected 3, got 5"),
        (("vision_config", "patch_size"), [12, 12], "no configuration of a blip"),
        (("text_config",), None, "no configuration of a blip"),
    ],
)
def test_a_strangers_configuration_is_not_believed(make, tmp_path, place, value, message):
    """`assets/config.json` of a family whose numbers stand inside one another."""
    folder = make("blip")
    config = json.loads((folder / "cache" / "assets" / "config.json").read_text())
    inside = config
    for part in place[:-1]:
        inside = inside[part]
    inside[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CacheError, match=message):
        read_config(tmp_path, Cache(folder / "cache").spec)
