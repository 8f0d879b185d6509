"""Ctrl-C and a full disk, for real: a clear message, nothing half-written that looks whole, and the same end later."""

import json
import os
import shutil
import signal

import pytest
from pipeline import Child, cli, make_cache, make_samples, make_shards, tree, wait_for

from dde_cache.batches import PairDataset, batch_loader
from dde_cache.samples import open_shards
from dde_cache.store import Cache
from dde_cache.stream import PairTable

FIT = ("--set", "workers=1", "--set", "log_every=1", "--set", "save_every=1000", "--batch-size", 4)
SMALL_TEACHER = [
    part
    for setting in ("hidden_size=24", "layers=2", "heads=3", "patch_size=12", "image_size=36", "text_length=12")
    for part in ("--set", setting)
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(40), size=4)


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache")


def extraction(shards, teacher_folder, out, *more):
    return ("extract", shards[0].path.parent, "--teacher", teacher_folder, "--out", out, "--batch-size", 2, *more)


def training(shards, cache, out, *more):
    return ("train", shards[0].path.parent, "--targets", cache.folder, "--out", out, *FIT, *more)


def teaching(shards, out, *more):
    return ("teacher", "train", shards[0].path.parent, "--out", out, *FIT, *SMALL_TEACHER, *more)


def assert_stopped(child):
    assert child.wait() == 130, child.printed
    assert "stopped." in child.message
    assert "Traceback" not in child.printed


# --- Ctrl-C


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_extraction(shards, cache, teacher_folder, tmp_path, workers):
    out = tmp_path / "cache"
    child = Child(*extraction(shards, teacher_folder, out, "--workers", workers), folder=tmp_path)
    wait_for(lambda: len(list(out.glob("units/[0-9]*"))) >= 2)
    child.send(signal.SIGINT)
    assert_stopped(child)
    assert "run the same command again" in child.message
    assert 1 <= len(Cache(out).manifest.units) < 10
    assert not list(out.rglob("*.partial"))
    make_cache(shards, teacher_folder, out)
    assert {entry.source for entry in Cache(out).manifest.units} == {shard.name for shard in shards}


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def test_interrupted_training(shards, cache, tmp_path):
    """A stopped and resumed run ends as one that was never stopped."""
    steps = ("--steps", 30)
    whole = cli(*training(shards, cache, tmp_path / "whole", *steps))
    assert whole.code == 0, whole.err
    out = tmp_path / "run"
    child = Child(*training(shards, cache, out, *steps), folder=tmp_path)
    wait_for(lambda: len(lines_of(out / "metrics.jsonl")) >= 3)
    child.send(signal.SIGINT)
    assert_stopped(child)
    assert "--resume" in child.message
    done = json.loads(lines_of(out / "metrics.jsonl")[-1])["step"]
    assert 3 <= done < 30
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"{done:08d}"]
    assert cli(*training(shards, cache, out, *steps)).code == 1
    resumed = cli(*training(shards, cache, out, *steps, "--resume"))
    assert resumed.code == 0, resumed.err
    assert tree(out / "model") == tree(tmp_path / "whole" / "model")


def test_interrupted_teacher(shards, tmp_path):
    out = tmp_path / "teacher"
    child = Child(*teaching(shards, out, "--steps", 40), folder=tmp_path)
    wait_for(lambda: len(lines_of(out / "training" / "metrics.jsonl")) >= 3)
    child.send(signal.SIGINT)
    assert_stopped(child)
    done = json.loads(lines_of(out / "training" / "metrics.jsonl")[-1])["step"]
    assert not (out / "model.safetensors").exists(), "a teacher that was cut short does not look like one"
    resumed = cli(*teaching(shards, out, "--steps", 40, "--resume"))
    assert resumed.code == 0, resumed.err
    steps = [json.loads(line)["step"] for line in lines_of(out / "training" / "metrics.jsonl")]
    assert steps == list(range(1, 41))
    assert done < 40


def test_a_worker_outlives_the_interrupt(shards, cache):
    """Ctrl-C reaches the workers too; the batches that the running step still needs come all the same."""
    dataset = PairDataset(shards, PairTable.of(shards), cache.preprocessor(), cache.labels)
    order = [[number] for number in range(40)]
    batches = iter(batch_loader(dataset, order, workers=1))
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGINT)
    assert len(list(batches)) == 39


def test_interrupted_before_the_first_checkpoint(shards, cache, tmp_path):
    """Killed, so that there was no time to save: `--resume` begins at the first step."""
    out = tmp_path / "run"
    child = Child(*training(shards, cache, out, "--steps", 30), folder=tmp_path)
    wait_for(lambda: len(lines_of(out / "metrics.jsonl")) >= 2)
    child.send(signal.SIGKILL)
    child.wait()
    assert not list(out.glob("checkpoints/*"))
    resumed = cli(*training(shards, cache, out, "--steps", 30, "--resume"))
    assert resumed.code == 0, resumed.err
    assert [json.loads(line)["step"] for line in lines_of(out / "metrics.jsonl")] == list(range(1, 31))


def test_interrupted_import(tmp_path):
    out = tmp_path / "shards"
    child = Child("data", "import", "shapes", "--out", out, "--count", 200_000, folder=tmp_path)
    wait_for(lambda: list(tmp_path.glob(".shards.importing-*/*")))
    child.send(signal.SIGINT)
    assert child.wait() == 130, child.printed
    assert "stopped; nothing was written" in child.message
    assert "Traceback" not in child.printed
    assert not out.exists()
    assert not list(tmp_path.glob(".shards*"))
    assert cli("data", "import", "shapes", "--out", out, "--count", 5).code == 0
    assert len(open_shards(out)) == 1


# --- a full disk: no file may grow beyond a size


def test_no_room_for_a_unit(shards, teacher_folder, tmp_path):
    everything = ("--k", "all", "--weights", "float32")
    big = make_shards(tmp_path / "big", make_samples(60), size=60)
    out = tmp_path / "cache"
    child = Child(*extraction(big, teacher_folder, out, *everything), folder=tmp_path, largest_file=60_000)
    assert child.wait() == 1, child.printed
    assert "Traceback" not in child.printed
    assert "File too large; make room" in child.message
    assert list((out / "units").iterdir()) == []
    assert Cache(out).manifest.units == ()
    again = cli(*extraction(big, teacher_folder, out, *everything))
    assert again.code == 0, again.err
    assert (out / "units" / "000000.zarr.zip").stat().st_size > 60_000


def test_no_room_for_the_assets(shards, teacher_folder, tmp_path):
    out = tmp_path / "cache"
    child = Child(*extraction(shards, teacher_folder, out), folder=tmp_path, largest_file=1500)
    assert child.wait() == 1, child.printed
    assert "Traceback" not in child.printed
    assert not (out / "manifest.json").exists()
    again = cli(*extraction(shards, teacher_folder, out))
    assert again.code == 0, again.err


def test_no_room_for_a_checkpoint(shards, cache, tmp_path):
    out = tmp_path / "run"
    arguments = training(shards, cache, out, "--steps", 4, "--set", "save_every=2", "--workers", 0)
    child = Child(*arguments, folder=tmp_path, largest_file=50_000)
    assert child.wait() == 1, child.printed
    assert "Traceback" not in child.printed
    assert "make room" in child.message
    assert not (out / "model" / "model.safetensors").exists()
    resumed = cli(*arguments, "--resume")
    assert resumed.code == 0, resumed.err


def test_a_half_written_checkpoint_is_not_resumed_from(shards, cache, tmp_path):
    out = tmp_path / "run"
    first = training(shards, cache, out, "--steps", 4, "--set", "save_every=2")
    assert cli(*first).code == 0
    whole = tree(out / "model")
    (out / "checkpoints" / "00000006.partial").mkdir()
    (out / "checkpoints" / "00000006.partial" / "model.safetensors").write_bytes(b"half")
    shutil.rmtree(out / "model")
    resumed = cli(*first, "--resume")
    assert resumed.code == 0, resumed.err
    assert tree(out / "model") == whole


def test_a_damaged_checkpoint(shards, cache, tmp_path):
    out = tmp_path / "run"
    arguments = training(shards, cache, out, "--steps", 2)
    assert cli(*arguments).code == 0
    path = next((out / "checkpoints").glob("*/model.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    broken = cli(*arguments, "--resume")
    assert broken.code == 1
    assert "the checkpoint is damaged" in broken.message


def test_no_room_for_shards(tmp_path):
    out = tmp_path / "shards"
    child = Child("data", "import", "shapes", "--out", out, "--count", 200, folder=tmp_path, largest_file=100_000)
    assert child.wait() == 1, child.printed
    assert "Traceback" not in child.printed
    assert not out.exists()
