"""Extraction: deterministic, resumable after anything, and refused before hours are spent."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import picture
from pipeline import Child, cli, killed_in, make_cache, make_samples, make_shards, png, tree, wait_for
from transformers import ViltModel

from dde_cache.errors import CacheError, InputError, TeacherError
from dde_cache.extract import ExtractConfig, ExtractProgress, extract
from dde_cache.samples import Sample, open_shards
from dde_cache.store import Cache


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(12), size=2)


@pytest.fixture(scope="module")
def finished(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("finished") / "cache")


def command(shards, teacher_folder, out, *more):
    return ("extract", shards[0].path.parent, "--teacher", teacher_folder, "--out", out, "--batch-size", 4, *more)


def test_twice_gives_the_same_bytes(shards, finished, teacher_folder, tmp_path):
    make_cache(shards, teacher_folder, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(finished.folder)
    make_cache(shards, teacher_folder, tmp_path / "workers", workers=1)
    assert tree(tmp_path / "workers") == tree(finished.folder)


def test_a_second_run_skips_what_is_finished(shards, finished, teacher_folder, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (folder / "units").iterdir()}
    seen = []
    summary = extract(
        shards, str(teacher_folder), folder, ExtractConfig(batch_size=4), ExtractProgress(unit=seen.append)
    )
    assert (summary.pairs, summary.units, summary.skipped_pairs) == (0, 6, 24)
    assert seen == []
    assert {path: path.stat().st_mtime_ns for path in (folder / "units").iterdir()} == before
    (folder / "units" / "000003.zarr.zip").unlink()
    summary = extract(
        shards, str(teacher_folder), folder, ExtractConfig(batch_size=4), ExtractProgress(unit=seen.append)
    )
    assert [entry.name for entry in seen] == ["000003.zarr.zip"]
    assert summary.pairs == 3
    assert tree(folder) == tree(finished.folder)


def test_a_finished_unit_of_other_samples_is_not_skipped(finished, teacher_folder, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "cache")
    other = make_shards(tmp_path / "other", make_samples(12, seed=9), size=2)
    with pytest.raises(CacheError, match=r"(?s)000000\.zarr\.zip: the finished unit was made from other samples"):
        make_cache(other, teacher_folder, folder)
    assert tree(folder) == tree(finished.folder)


def test_a_unit_is_a_function_of_its_shard_alone(shards, finished, teacher_folder, tmp_path):
    """Whatever else is extracted in the same run, in whatever order, with whatever workers."""
    whole = tree(finished.folder / "units")
    for number, (some, workers) in enumerate((((4,), 0), ((5, 0), 0), ((3, 4, 1), 1))):
        cache = make_cache([shards[one] for one in some], teacher_folder, tmp_path / f"{number}", workers=workers)
        alone = tree(cache.folder / "units")
        assert set(alone) == {f"{one:06d}.zarr.zip" for one in some}
        assert alone.items() <= whole.items()


def test_provenance_names_the_folder_of_each_shard(shards, teacher_folder, tmp_path):
    """Shards of two folders: a unit does not depend on which one comes first."""
    copies = []
    for number, name in enumerate(("east", "west")):
        (tmp_path / name).mkdir()
        shutil.copy(shards[number].path, tmp_path / name)
        copies += open_shards(tmp_path / name)
    one = make_cache(copies, teacher_folder, tmp_path / "one")
    two = make_cache(copies[::-1], teacher_folder, tmp_path / "two")
    assert tree(one.folder / "units") == tree(two.folder / "units")
    found = [one.unit(entry).attributes.provenance.shards for entry in one.manifest.units]
    assert found == ["east", "west"]


# --- two extractions into one folder


def assert_whole(folder, shards, *caches):
    """Every unit is there once, as one of the caches has it, and the manifest says so."""
    assert not list(folder.rglob("*.partial"))
    cache = Cache(folder)
    assert [entry.source for entry in cache.manifest.units] == [shard.name for shard in shards]
    choices = [tree(other.folder / "units") for other in caches]
    for entry in cache.manifest.units:
        cache.unit(entry).check_readable()
        assert (folder / "units" / entry.name).read_bytes() in [choice[entry.name] for choice in choices]


def test_two_extractions_of_the_same_shards(shards, finished, teacher_folder, tmp_path):
    """In batches of two sizes, so that their units differ in bytes: one of the two wins, and is the listed one."""
    other = make_cache(shards, teacher_folder, tmp_path / "other", batch_size=3)
    assert tree(other.folder / "units") != tree(finished.folder / "units")
    out = tmp_path / "cache"
    arguments = command(shards, teacher_folder, out)[:-1]
    children = [Child(*arguments, size, folder=tmp_path) for size in (4, 3)]
    for child in children:
        assert child.wait() == 0, child.printed
    assert_whole(out, shards, finished, other)


def test_a_unit_that_another_extraction_finished_first_stays(shards, finished, teacher_folder, tmp_path):
    """It comes between our look and our writing, and is never written over."""
    other = make_cache(shards, teacher_folder, tmp_path / "other", batch_size=3)
    name, out = "000001.zarr.zip", tmp_path / "cache"

    def batch(_pairs, _kept):
        if not (out / "units" / name).exists():
            shutil.copy(other.folder / "units" / name, out / "units" / name)

    extract(shards, str(teacher_folder), out, ExtractConfig(batch_size=4), ExtractProgress(batch=batch))
    assert (out / "units" / name).read_bytes() == (other.folder / "units" / name).read_bytes()
    assert_whole(out, shards, finished, other)


def test_two_extractions_of_different_shards(shards, finished, teacher_folder, tmp_path):
    """Two machines share the work: whoever ends last lists the other's units too."""
    out = tmp_path / "cache"
    paths = [tmp_path / name for name in ("even", "odd")]
    for path, some in zip(paths, (shards[::2], shards[1::2]), strict=True):
        path.mkdir()
        for shard in some:
            shutil.copy(shard.path, path)
    children = [
        Child("extract", path, "--teacher", teacher_folder, "--out", out, "--batch-size", 4, folder=tmp_path)
        for path in paths
    ]
    for child in children:
        assert child.wait() == 0, child.printed
    alone = [make_cache(open_shards(path), teacher_folder, tmp_path / f"alone-{path.name}") for path in paths]
    units = tree(alone[0].folder / "units") | tree(alone[1].folder / "units")
    assert tree(out / "units") == units
    cache = Cache(out)
    assert [entry.source for entry in cache.manifest.units] == [shard.name for shard in shards]
    for entry in cache.manifest.units:
        cache.unit(entry).check_readable()


# --- memory


def test_out_of_memory_says_so_and_changes_nothing(teacher_folder, tmp_path):
    """The address space ends a little above what is used: whole rows over 2,501 image tokens do not fit."""
    import resource

    shards = make_shards(tmp_path / "train", make_samples(4, sizes=((600, 600),)), size=4)

    def limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    options = "--targets", "cross,whole"
    child = Child(*command(shards, teacher_folder, tmp_path / "cache", *options), folder=tmp_path, before=limit)
    assert child.wait() == 1, child.printed
    assert "Traceback" not in child.printed
    assert "not enough memory on cpu for a batch of 4 pairs; pass a smaller --batch-size" in child.message
    assert Cache(tmp_path / "cache").manifest.units == ()


# --- kill -9


@pytest.mark.parametrize(
    ("target", "count", "name"),
    [
        ("fsync", 2, ""),  # in the middle of the assets
        ("link", 1, "manifest.json"),  # before the first manifest has its name
        ("link", 1, "000000.zarr.zip"),  # a unit is written, but not under its name
        ("replace", 1, "manifest.json"),  # a unit is there, its manifest is not
        ("fsync", 10, ""),  # in the middle of a unit
        ("replace", 4, "manifest.json"),
    ],
)
def test_killed_at_the_worst_moment(shards, finished, teacher_folder, tmp_path, target, count, name):
    out = tmp_path / "cache"
    child = Child(*command(shards, teacher_folder, out), folder=tmp_path, before=killed_in(target, count, name))
    assert child.wait() == -signal.SIGKILL
    if (out / "manifest.json").exists():
        cache = Cache(out)
        assert len(cache.manifest.units) < 6
        for entry in cache.manifest.units:
            cache.unit(entry).check_readable()
    make_cache(shards, teacher_folder, out)
    left = tree(out)
    assert {name: value for name, value in left.items() if not name.endswith(".partial")} == tree(finished.folder)


def test_what_a_killed_extraction_left_is_removed_by_a_later_one(shards, finished, teacher_folder, tmp_path):
    """Killed with a unit, an asset and the manifest half written; the next calls come soon, and an hour later."""
    out = tmp_path / "cache"
    for moment in (("fsync", 2, ""), ("replace", 1, "manifest.json"), ("link", 1, "000003.zarr.zip")):
        child = Child(*command(shards, teacher_folder, out), folder=tmp_path, before=killed_in(*moment))
        assert child.wait() == -signal.SIGKILL
    left = list(out.rglob(".*.partial"))
    assert {path.parent.name for path in left} == {"cache", "assets", "units"}
    make_cache(shards, teacher_folder, out)
    assert {*out.rglob(".*.partial")} == {*left}
    for path in left:
        os.utime(path, (0, 0))
    make_cache(shards, teacher_folder, out)
    assert tree(out) == tree(finished.folder)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_a_random_moment(shards, finished, teacher_folder, tmp_path, seed):
    out = tmp_path / "cache"
    child = Child(*command(shards, teacher_folder, out), folder=tmp_path)
    units = random.Random(seed).randrange(5)
    wait_for(lambda: len(list(out.glob("units/[0-9]*"))) >= units)
    time.sleep(random.Random(seed).random() / 50)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    make_cache(shards, teacher_folder, out)
    left = tree(out)
    assert {name: value for name, value in left.items() if not name.endswith(".partial")} == tree(finished.folder)


# --- options


def test_other_options_on_the_same_folder(finished, shards, teacher_folder, save_teacher):
    with pytest.raises(CacheError) as caught:
        make_cache(shards, teacher_folder, finished.folder, k=4, heads="mean", queries="all")
    for line in (
        "k: expected 4, got null",
        "steps: expected null, got 56",
        'heads: expected "mean", got "all"',
        'queries: expected "all", got "valid"',
    ):
        assert line in str(caught.value)
    with pytest.raises(CacheError, match=r"teacher\.weights: expected "):
        make_cache(shards, save_teacher(seed=8), finished.folder)


def test_all_keys_or_some(shards, teacher_folder, tmp_path):
    whole = extract(shards[:1], str(teacher_folder), tmp_path / "a", ExtractConfig(k=None, weights="float32"))
    some = extract(shards[:1], str(teacher_folder), tmp_path / "b", ExtractConfig(k=1, weights="float32"))
    assert whole.kept_mass == pytest.approx(1)
    assert 0.1 < some.kept_mass < 0.95
    assert some.bytes < whole.bytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k": 13}, r"expected k up to 12 \(image tokens \d+, text tokens 12\), got 13; use --k all"),
        ({"layers": (3,)}, r"expected different layers from 0 to 2, got \[3\]"),
        ({"layers": (1, 1)}, r"expected different layers from 0 to 2, got \[1, 1\]"),
        ({"layers": (-1,)}, r"expected different layers from 0 to 2"),
        ({"device": "cuda:77"}, "expected --device cpu or a GPU"),
        ({"device": "toaster"}, "expected --device cpu or a GPU"),
    ],
)
def test_options_that_do_not_fit(shards, teacher_folder, tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        extract(shards, str(teacher_folder), tmp_path / "cache", ExtractConfig(**config))
    assert not (tmp_path / "cache").exists()


def test_a_row_with_fewer_valid_keys_keeps_them_all(shards, teacher_folder, tmp_path):
    cache = make_cache(shards[:1], teacher_folder, tmp_path / "cache", k=12)
    unit = cache.unit(cache.manifest.units[0])
    assert float(abs(unit.array("maps/t2i/tail").astype(float)).max()) == 0


# --- shards that cannot be used


def test_a_picture_that_the_patch_does_not_divide(teacher_folder, tmp_path):
    samples = make_samples(2, sizes=((30, 24),))
    with pytest.raises(InputError, match=r"(?s)key-000.*multiples of the patch of 12 px, got 30 x\s+24 px"):
        make_cache(make_shards(tmp_path / "train", samples), teacher_folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_bad_picture_later_on_keeps_what_is_finished(shards, finished, teacher_folder, tmp_path):
    samples = make_samples(4)
    samples[3] = Sample(samples[3].key, (png(picture(13, 13)),), samples[3].texts)
    with pytest.raises(InputError, match="key-003"):
        make_cache(make_shards(tmp_path / "train", samples, size=2), teacher_folder, tmp_path / "cache")
    assert [entry.name for entry in Cache(tmp_path / "cache").manifest.units] == ["000000.zarr.zip"]


def test_two_images_for_a_teacher_of_one(teacher_folder, tmp_path):
    samples = [Sample(one.key, one.images * 2, one.texts) for one in make_samples(2)]
    with pytest.raises(InputError, match=r"expected 1 image\(s\) a sample for this teacher, got 2"):
        make_cache(make_shards(tmp_path / "train", samples), teacher_folder, tmp_path / "cache")


def test_shards_of_the_same_file_name(shards, teacher_folder, tmp_path):
    other = make_shards(tmp_path / "other", [Sample(f"x{one.key}", one.images, one.texts) for one in make_samples(2)])
    with pytest.raises(InputError, match=r"(?s)different file names, got twice.*000000\.zarr\.zip"):
        make_cache([*shards, *other], teacher_folder, tmp_path / "cache")


def test_a_teacher_without_a_task_head_gives_maps_alone(shards, save_teacher, tmp_path):
    cache = make_cache(shards[:1], save_teacher(ViltModel), tmp_path / "cache")
    assert cache.labels is None
    assert cache.spec.classes is None
    assert not cache.unit(cache.manifest.units[0]).has_logits


def test_no_teacher(shards, tmp_path):
    with pytest.raises(TeacherError, match="expected a checkpoint folder"):
        extract(shards, str(tmp_path / "nowhere"), tmp_path / "cache", ExtractConfig())
    assert not (tmp_path / "cache").exists()


def test_the_command_says_what_it_did(shards, teacher_folder, tmp_path):
    done = cli(*command(shards, teacher_folder, tmp_path / "cache", "--k", "all", "--json"))
    assert done.code == 0, done.err
    import json

    summary = json.loads(done.out)
    assert summary["pairs"] == 24
    assert summary["kept_mass"] == pytest.approx(1, abs=1e-3)
    assert "patches" in done.err
    again = cli(*command(shards, teacher_folder, tmp_path / "cache", "--k", "all"))
    assert again.code == 0
    assert "pairs in finished units" in again.out


def test_assets_do_not_say_which_library_wrote_them(finished):
    """Two labs with one teacher and other versions have caches that merge: equal fingerprints and equal assets."""
    import transformers

    for path in (finished.folder / "assets").iterdir():
        assert transformers.__version__ not in path.read_text(), path.name
    assert "transformers_version" not in finished.teacher_config
