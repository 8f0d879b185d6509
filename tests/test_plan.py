"""The prediction of size against the cache that comes, and the disk that cannot hold it."""

import json
import shutil

import pytest
from pipeline import cli, make_cache, make_samples, make_shards

from dde_cache import extract as extraction
from dde_cache.errors import CacheError, InputError
from dde_cache.extract import ExtractConfig, extract, plan_extraction
from dde_cache.plan import Prediction, free_bytes, generous_bytes
from dde_cache.store import Cache


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight shards of about 16 pairs, on pictures of four sizes."""
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(64), size=8)


def size_of(cache):
    return sum(entry.size for entry in cache.manifest.units)


@pytest.mark.parametrize(
    ("options", "sample"),
    [
        ({"batch_size": 8, "layers": (0, 1, 2), "weights": "float16"}, 48),
        ({"batch_size": 32}, 48),
        ({"batch_size": 5, "mass": 0.7, "heads": "mean", "queries": "all"}, 40),
    ],
)
def test_the_size_is_predicted_within_ten_percent(shards, teacher_folder, tmp_path, options, sample):
    config = ExtractConfig(**options)
    plan = plan_extraction(shards, str(teacher_folder), tmp_path / "cache", config, sample)
    assert not (tmp_path / "cache").exists()
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **options)
    assert plan.pairs == sum(entry.pairs for entry in cache.manifest.units)
    assert plan.units == 8
    assert plan.sampled_pairs < plan.pairs / 2
    assert plan.bytes == pytest.approx(size_of(cache), rel=0.1)
    assert plan.seconds > 0
    tokens = 3 * 3 + 1
    assert generous_bytes(cache.spec, tokens, plan.pairs, plan.units) > size_of(cache)


def test_large_units_of_several_chunks(teacher_folder, tmp_path):
    shards = make_shards(tmp_path / "train", make_samples(400), size=200)
    plan = plan_extraction(shards, str(teacher_folder), tmp_path / "cache", ExtractConfig(batch_size=32), 256)
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", batch_size=32)
    assert plan.sampled_pairs < plan.pairs / 2
    assert plan.bytes == pytest.approx(size_of(cache), rel=0.1)


def test_what_is_finished_is_not_planned_again(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", batch_size=8)
    config = ExtractConfig(batch_size=8)
    for name in ("000002", "000005"):
        (cache.folder / "units" / f"{name}.zarr.zip").unlink()
    plan = plan_extraction(shards, str(teacher_folder), cache.folder, config, 32)
    assert (plan.units, plan.pairs + plan.finished_pairs) == (2, sum(entry.pairs for entry in cache.manifest.units))
    make_cache(shards, teacher_folder, cache.folder, batch_size=8)
    plan = plan_extraction(shards, str(teacher_folder), cache.folder, config)
    assert (plan.units, plan.pairs, plan.bytes, plan.fits) == (0, 0, 0, True)
    with pytest.raises(CacheError, match="holds a cache of other targets"):
        plan_extraction(shards, str(teacher_folder), cache.folder, ExtractConfig(k=3))


def test_a_plan_needs_a_free_place(shards, teacher_folder, tmp_path):
    (tmp_path / "thesis.docx").write_text("precious")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        plan_extraction(shards, str(teacher_folder), tmp_path, ExtractConfig())


# --- a disk that is too small


@pytest.fixture
def small_disk(monkeypatch):
    """Another number of free bytes: a disk of this size cannot be had everywhere."""

    def set_free(free):
        monkeypatch.setattr(extraction, "free_bytes", lambda _folder: free)

    return set_free


def test_the_disk_decides(shards, teacher_folder, tmp_path, small_disk):
    config = ExtractConfig(batch_size=8)
    plan = plan_extraction(shards, str(teacher_folder), tmp_path / "a", config, 64)
    small_disk(int(plan.bytes * 0.8))
    assert not plan_extraction(shards, str(teacher_folder), tmp_path / "a", config, 64).fits
    with pytest.raises(InputError, match=r"expected room for about .* MB of targets .* --no-disk-check"):
        extract(shards, str(teacher_folder), tmp_path / "a", config)
    assert Cache(tmp_path / "a").manifest.units == ()
    assert extract(shards[:1], str(teacher_folder), tmp_path / "b", config, check_disk=False).units == 1
    small_disk(plan.bytes * 2)
    assert extract(shards, str(teacher_folder), tmp_path / "a", config).units == 8


def test_no_sample_is_needed_where_there_is_room(shards, teacher_folder, tmp_path, monkeypatch):
    def unexpected(*_arguments, **_options):
        raise AssertionError("the teacher ran for a plan")

    monkeypatch.setattr(extraction, "predict", unexpected)
    assert extract(shards[:1], str(teacher_folder), tmp_path / "a", ExtractConfig()).units == 1


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    free = free_bytes(tmp_path / "not" / "yet")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_a_margin():
    assert Prediction(100, 1, 1).fits(111)
    assert not Prediction(100, 1, 1).fits(109)


def test_the_command(shards, teacher_folder, tmp_path, small_disk):
    arguments = ("extract", shards[0].path.parent, "--teacher", teacher_folder, "--out", tmp_path / "cache")
    shown = cli(*arguments, "--batch-size", 8, "--plan", "--sample", 16)
    assert shown.code == 0, shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "enough" in shown.out
    assert not (tmp_path / "cache").exists()
    report = json.loads(cli(*arguments, "--batch-size", 8, "--plan", "--sample", 16, "--json").out)
    assert 16 <= report["sampled_pairs"] <= 32
    small_disk(1000)
    assert "NOT ENOUGH" in cli(*arguments, "--batch-size", 8, "--plan", "--sample", 16).out
    assert "expected --sample together with --plan" in cli(*arguments, "--sample", 16).message
    refused = cli(*arguments, "--batch-size", 8)
    assert refused.code == 1
    assert "--no-disk-check" in refused.message
    assert cli(*arguments, "--batch-size", 8, "--no-disk-check").code == 0
