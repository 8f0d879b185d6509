"""Merging: units stay what they are, what does not fit is refused in full, and training fits the result."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from pipeline import Child, all_pairs, cli, killed_in, make_cache, make_samples, make_shards, tree

from dde_cache.errors import CacheError, InputError
from dde_cache.join import join
from dde_cache.merge import merge
from dde_cache.samples import open_shards
from dde_cache.store import Cache
from dde_cache.targets import CacheTargets

COMMON = ("000000.zarr.zip", "000001.zarr.zip", "000002.zarr.zip", "000003.zarr.zip")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(12), size=3)


@pytest.fixture(scope="module")
def whole(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture(scope="module")
def left(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards[:2], teacher_folder, tmp_path_factory.mktemp("left") / "a")


@pytest.fixture(scope="module")
def right(shards, teacher_folder, tmp_path_factory):
    """Shards 1 to 3: the same bytes as `left` in shard 1."""
    return make_cache(shards[1:], teacher_folder, tmp_path_factory.mktemp("right") / "b")


@pytest.fixture(scope="module")
def other_sizes(shards, teacher_folder, tmp_path_factory):
    """Shards 1 to 3 in batches of another size: the same samples, other bytes."""
    return make_cache(shards[1:], teacher_folder, tmp_path_factory.mktemp("sizes") / "c", batch_size=3)


def units_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "units").iterdir()}


@pytest.mark.parametrize("link", [False, True])
def test_the_parts_give_the_whole(left, right, whole, shards, tmp_path, link):
    report = merge([left, right], tmp_path / "out", shards=shards, link=link)
    assert tree(tmp_path / "out") == tree(whole.folder)
    assert (report.units, report.samples, report.pairs, report.taken_once) == (4, 12, 24, 1)
    assert (report.overlaps, report.gaps, report.renamed, report.left_out) == ((), (), {}, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    linked = {os.stat(tmp_path / "out" / "units" / name).st_nlink > 1 for name in COMMON}
    assert linked == {link}


def test_an_overlap_is_refused_with_its_places(left, other_sizes, tmp_path):
    with pytest.raises(CacheError) as caught:
        merge([left, other_sizes], tmp_path / "out")
    message = str(caught.value)
    assert "3 come twice (3 duplicates, 0 conflicts)" in message
    assert f"{left.folder}, unit 000001.zarr.zip and {other_sizes.folder}, unit 000001.zarr.zip: 3 keys with" in message
    assert "key-003, key-004, key-005" in message
    assert list(tmp_path.iterdir()) == []


def test_the_first_cache_wins(left, other_sizes, tmp_path):
    report = merge([left, other_sizes], tmp_path / "out", on_overlap="first")
    merged = units_of(tmp_path / "out")
    assert merged == units_of(other_sizes.folder) | units_of(left.folder)
    assert (report.units, report.left_out, report.rewritten) == (4, 1, 0)
    assert report.overlaps[0].duplicates == ("key-003", "key-004", "key-005")
    assert merge([other_sizes, left], tmp_path / "again", on_overlap="first").left_out == 1
    assert units_of(tmp_path / "again")["000001.zarr.zip"] == units_of(other_sizes.folder)["000001.zarr.zip"]


def test_a_unit_that_is_there_in_part_brings_the_rest(left, teacher_folder, tmp_path):
    """One key in common with other pictures, under a shard of another size: a conflict, and one sample dropped."""
    samples = [replace(one, key=f"new-{one.key}") for one in make_samples(3, seed=2)]
    samples[1] = replace(make_samples(3, seed=2)[1], key="key-004")
    shards = make_shards(tmp_path / "other", samples)
    other = make_cache(shards, teacher_folder, tmp_path / "b")
    with pytest.raises(CacheError, match=r"\(0 duplicates, 1 conflicts\)(?s:.*)1 keys with other pictures or texts"):
        merge([left, other], tmp_path / "out")
    report = merge([left, other], tmp_path / "out", on_overlap="first")
    assert report.overlaps[0].conflicts == ("key-004",)
    assert (report.rewritten, report.samples) == (1, 8)
    assert list(report.renamed.values()) == ["000000.zarr.zip"]
    merged = Cache(tmp_path / "out")
    kept = merged.unit(next(entry for entry in merged.manifest.units if entry.name in report.renamed))
    assert kept.keys == ["new-key-000", "new-key-002"]
    kept.check_readable()


def test_shards_of_one_name_from_two_labs(teacher_folder, tmp_path):
    """Each lab has a 000000.tar: both units stay, and training finds each shard's own by key."""
    labs = []
    for lab in ("a", "b"):
        samples = [replace(one, key=f"{lab}-{one.key}") for one in make_samples(5, seed=ord(lab))]
        made = make_shards(tmp_path / f"shards-{lab}", samples)
        labs.append((made, make_cache(made, teacher_folder, tmp_path / lab)))
    every = [shard for made, _ in labs for shard in made]
    report = merge([cache for _, cache in labs], tmp_path / "out", shards=every)
    assert report.gaps == ()
    assert sorted(report.renamed.values()) == ["000000.zarr.zip", "000001.zarr.zip"]
    merged = Cache(tmp_path / "out")
    found = join(every, merged, "error")
    assert len(found.table) == sum(len(all_pairs(made)) for made, _ in labs)
    reader = CacheTargets(merged, every, layer=2)
    pairs = [found.table[number] for number in range(len(found.table))]
    both = reader.targets(pairs)
    start = 0
    for made, cache in labs:
        own = CacheTargets(cache, made, layer=2).targets(all_pairs(made))
        count = len(own["logits"])
        torch.testing.assert_close(both["logits"][start : start + count], own["logits"], rtol=0, atol=0)
        code = own["i2t.weight"]
        inside = both["i2t.weight"][start : start + count, :, : code.shape[2], : code.shape[3]]
        torch.testing.assert_close(inside, code, rtol=0, atol=0)
        start += count
    for number, shard in enumerate(every):
        for sample in shard:
            reader.check(number, sample)
    # A cache of one lab's samples alone still knows what it lacks.
    with pytest.raises(CacheError, match=r"targets without samples(?s:.*)unit 00000"):
        join(labs[0][0], merged, "error")


def test_gaps(left, shards, teacher_folder, tmp_path):
    """Against shards, and against the same samples under other file names."""
    right = make_cache(shards[3:], teacher_folder, tmp_path / "b")
    report = merge([left, right], tmp_path / "out", shards=shards)
    assert [(gap.shard, gap.samples, gap.missing, gap.elsewhere) for gap in report.gaps] == [
        (str(shards[2].path), 3, ("key-006", "key-007", "key-008"), 0)
    ]
    moved = tmp_path / "train-0.tar"
    shutil.copy(shards[0].path, moved)
    report = merge([left, right], tmp_path / "again", shards=open_shards(moved))
    assert [(len(gap.missing), gap.elsewhere) for gap in report.gaps] == [(3, 3)]


def test_caches_of_other_targets(left, shards, teacher_folder, save_teacher, tmp_path):
    other = make_cache(shards[2:3], teacher_folder, tmp_path / "k", k=4, weights="float16")
    foreign = make_cache(shards[3:], save_teacher(seed=3), tmp_path / "teacher")
    with pytest.raises(CacheError) as caught:
        merge([left, other, foreign], tmp_path / "out")
    message = str(caught.value)
    assert f"{other.folder}: k: expected null, got 4" in message
    assert f'{other.folder}: weights: expected "sqrt8", got "float16"' in message
    assert f"{foreign.folder}: teacher.weights: expected" in message
    assert not (tmp_path / "out").exists()


def test_other_assets(left, right, tmp_path):
    folder = shutil.copytree(right.folder, tmp_path / "b")
    path = folder / "assets" / "labels.json"
    path.write_text(json.dumps(["yes", "no", "red"]))
    manifest = right.manifest
    from dde_cache.files import hash_file

    changed = manifest.model_copy(update={"assets": manifest.assets | {"labels.json": hash_file(path)}}).sealed()
    (folder / "manifest.json").write_text(changed.model_dump_json())
    with pytest.raises(CacheError, match=r"b: assets/labels\.json: another content"):
        merge([left, Cache(folder)], tmp_path / "out")


def test_a_damaged_unit_is_not_merged(left, right, tmp_path):
    folder = shutil.copytree(right.folder, tmp_path / "b")
    path = folder / "units" / "000003.zarr.zip"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"unit 000003\.zarr\.zip .*damaged"):
        merge([left, Cache(folder)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("target", "name"), [("replace", COMMON[2]), ("fsync", ""), ("replace", "manifest.json")])
def test_killed_and_called_again(left, right, whole, tmp_path, target, name):
    out = tmp_path / "out"
    command = ("merge", left.folder, right.folder, "--out", out)
    child = Child(*command, folder=tmp_path, before=killed_in(target, 1, name))
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    done = cli(*command)
    assert done.code == 0, done.err
    assert tree(out) == tree(whole.folder)
    assert not list(tmp_path.glob(".*"))


def test_what_another_attempt_left_is_not_used(left, right, other_sizes, whole, tmp_path):
    out = tmp_path / "out"
    child = Child(
        "merge", left.folder, other_sizes.folder, "--on-overlap", "first", "--out", out,
        folder=tmp_path, before=killed_in("replace", 1, COMMON[3]),
    )  # fmt: skip
    assert child.wait() == -signal.SIGKILL
    assert (tmp_path / ".out.partial" / "units" / COMMON[2]).exists()
    merge([left, right], out)
    assert tree(out) == tree(whole.folder)


def test_no_room(left, right, whole, tmp_path):
    largest = max(path.stat().st_size for path in (whole.folder / "units").iterdir())
    out = tmp_path / "out"
    command = ("merge", left.folder, right.folder, "--out", out)
    child = Child(*command, folder=tmp_path, largest_file=largest - 1)
    assert child.wait() == 1, child.printed
    assert "Traceback" not in child.printed
    assert "make room" in child.message
    assert not out.exists()
    assert cli(*command).code == 0
    assert tree(out) == tree(whole.folder)


def test_the_command(left, other_sizes, shards, tmp_path):
    refused = cli("merge", left.folder, other_sizes.folder, "--out", tmp_path / "x")
    assert refused.code == 1
    assert "3 come twice" in refused.message
    more = make_samples(13)
    extra = make_shards(tmp_path / "more", more, size=3)
    arguments = ("merge", left.folder, other_sizes.folder, "--on-overlap", "first", "--shards", extra[0].path.parent)
    shown = cli(*arguments, "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "key-003" in shown.out
    assert "key-012" in shown.out
    report = json.loads(cli(*arguments, "--out", tmp_path / "again", "--json").out)
    assert [gap["missing"] for gap in report["gaps"]] == [["key-012"]]
    for wrong, message in (
        (("merge", left.folder, "--out", tmp_path / "y"), "expected two or more caches, got 1"),
        (("merge", left.folder, other_sizes.folder, "--out", tmp_path / "out"), "expected a new or empty folder"),
        (("merge", left.folder, other_sizes.folder, "--out", tmp_path / "y", "--on-overlap", "last"), "error or first"),
    ):
        failed = cli(*wrong)
        assert failed.code == 1
        assert message in failed.message


def test_a_place_that_is_taken(left, right, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").write_text("precious")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        merge([left, right], tmp_path / "out")
    assert tree(tmp_path / "out") == {"thesis.docx": b"precious"}
