"""A cache behind a URL trains as one on disk, within the room it is given, and uses no wrong byte."""

import json
import os
import pickle
import signal
import threading

import pytest
import torch
from pipeline import Child, all_pairs, cli, make_cache, make_samples, make_shards, wait_for
from servers import FileServer, copy_of

from dde_cache import network, remote
from dde_cache.errors import CacheError, InputError
from dde_cache.join import join
from dde_cache.store import Cache
from dde_cache.streamed import default_cache_dir, open_cache, parse_size
from dde_cache.summary import summarise
from dde_cache.targets import CacheTargets

FIT = ("--steps", 6, "--batch-size", 8, "--set", "shuffle_shards=2", "--set", "log_every=1")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(network, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(24), size=4)


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    """Six units."""
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache").folder


@pytest.fixture
def server(cache):
    with FileServer(cache) as running:
        yield running


@pytest.fixture(scope="module")
def from_disk(shards, cache, tmp_path_factory):
    """The model of a run from the folder: what every run from a URL must give."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = cli("train", shards[0].path.parent, "--targets", cache, "--out", out, *FIT)
    assert done.code == 0, done.err
    return weights(out)


def training(shards, url, out, room, *more):
    return ("train", shards[0].path.parent, "--targets", url, "--out", out, "--cache-dir", room, *FIT, *more)


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def kept(room):
    return sorted(path for path in (room / "units").glob("*") if not path.name.startswith("."))


def size_of(room):
    total = 0
    for path in (room / "units").glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def largest(cache):
    return max(entry.size for entry in Cache(cache).manifest.units)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_url(shards, server, from_disk, tmp_path, workers):
    out, room = tmp_path / "run", tmp_path / "room"
    done = cli(*training(shards, server.url, out, room, "--workers", workers))
    assert done.code == 0, done.err
    assert weights(out) == from_disk
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert json.loads((out / "run.json").read_text())["targets"] == server.url
    # Each unit came once, whatever the number of workers; a second run fetches none.
    asked = [request[1] for request in server.fetched("units")]
    assert len(asked) == len(set(asked)) == 6
    server.requests.clear()
    done = cli(*training(shards, server.url, tmp_path / "second", room, "--workers", workers))
    assert done.code == 0, done.err
    assert not server.fetched("units")


def test_nothing_is_fetched_before_it_is_needed(shards, server, tmp_path):
    opened = open_cache(server.url, tmp_path)
    assert len(join(shards, opened, "error").table) == len(all_pairs(shards))
    assert not server.fetched("units")
    CacheTargets(opened, shards, 2).targets(all_pairs(shards)[:2])
    assert {request[1] for request in server.fetched("units")} == {"/units/000000.zarr.zip"}


def test_less_room_than_the_cache(shards, cache, server, from_disk, tmp_path):
    out, room = tmp_path / "run", tmp_path / "room"
    limit = int(2.5 * largest(cache))
    sizes = []
    stop = threading.Event()

    def watch():
        while not stop.wait(0.002):
            sizes.append(size_of(room))

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = cli(*training(shards, server.url, out, room, "--cache-limit", str(limit), "--workers", 0))
    stop.set()
    watcher.join()
    assert done.code == 0, done.err
    assert weights(out) == from_disk
    assert 0 < max(sizes) <= limit
    assert 1 <= len(kept(room)) <= 3


def test_room_for_less_than_a_unit(shards, server, from_disk, tmp_path):
    out = tmp_path / "run"
    done = cli(*training(shards, server.url, out, tmp_path / "room", "--cache-limit", "1", "--workers", 0))
    assert done.code == 0, done.err
    assert weights(out) == from_disk
    assert len(kept(tmp_path / "room")) == 1


@pytest.mark.parametrize("units", [100, 1.5])
def test_two_runs_share_one_room(shards, cache, server, from_disk, tmp_path, units):
    room = tmp_path / "room"
    limit = ("--cache-limit", str(int(units * largest(cache))))
    outs = [tmp_path / "one", tmp_path / "two"]
    runs = [Child(*training(shards, server.url, out, room, *limit), folder=tmp_path) for out in outs]
    for run, out in zip(runs, outs, strict=True):
        assert run.wait(120) == 0, run.printed
        assert weights(out) == from_disk
    if units == 100:
        asked = [request[1] for request in server.fetched("units")]
        assert len(asked) == len(set(asked)) == 6
    assert size_of(room) <= units * largest(cache)


def test_the_least_recently_used_unit_goes_first(cache, server, tmp_path):
    entries = Cache(cache).manifest.units
    opened = open_cache(server.url, tmp_path, sum(entry.size for entry in entries[:3]) + 10)
    for number in (0, 1, 2, 0, 3):
        opened.unit(entries[number]).close()
    names = {path.name.split("-")[0] for path in kept(tmp_path)}
    assert "000001" not in names
    assert {"000000", "000003"} <= names


def test_an_open_unit_may_be_removed(cache, server, tmp_path):
    entries = Cache(cache).manifest.units
    opened = open_cache(server.url, tmp_path, 1)
    first = opened.unit(entries[0])
    opened.unit(entries[1]).close()
    assert [path.name[:6] for path in kept(tmp_path)] == ["000001"]
    assert first.array("maps/t2i/weight").size
    first.check_readable()


def test_sent_to_another_process(shards, cache, server, tmp_path):
    """As a spawned worker gets it: pickled."""
    opened = open_cache(server.url, tmp_path)
    pairs = all_pairs(shards)[:5]
    reader = CacheTargets(opened, shards, 2)
    reader.targets(pairs)
    copy = pickle.loads(pickle.dumps(reader))
    expected = CacheTargets(Cache(cache), shards, 2).targets(pairs)
    assert all(torch.equal(value, expected[name]) for name, value in copy.targets(pairs).items())


# --- faults


def test_cut_connections(shards, server, from_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    server.cuts = [2000, 4000, 1, 10**9, 3000, 100, 0]
    done = cli(*training(shards, server.url, tmp_path / "run", tmp_path / "room", "--workers", 2))
    assert done.code == 0, done.err
    assert weights(tmp_path / "run") == from_disk
    assert not server.cuts


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_bytes_never_reach_a_step(shards, cache, server, tmp_path, workers):
    for entry in Cache(cache).manifest.units:
        server.flips[f"/units/{entry.name}"] = entry.size // 2
    out, room = tmp_path / "run", tmp_path / "room"
    done = cli(*training(shards, server.url, out, room, "--workers", workers))
    assert done.code == 1
    assert "it was not used" in done.message
    assert ".zarr.zip of http" in done.message
    assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()
    assert kept(room) == []


def test_bytes_that_changed_on_this_machine(shards, cache, server, tmp_path):
    entry = Cache(cache).manifest.units[0]
    opened = open_cache(server.url, tmp_path)
    opened.unit(entry).close()
    path = kept(tmp_path)[0]
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    open_cache(server.url, tmp_path).unit(entry).close()
    assert path.read_bytes() == (cache / "units" / entry.name).read_bytes()
    # The same for what lies beside the units.
    label = next((tmp_path / "manifests").glob("*/assets/labels.json"))
    label.write_text("[]")
    assert open_cache(server.url, tmp_path).labels == ("no", "yes", "red")


def test_the_server_goes_away(shards, cache, tmp_path):
    with FileServer(cache) as server:
        opened = open_cache(server.url, tmp_path)
        opened.unit(opened.manifest.units[0]).close()
    opened.unit(opened.manifest.units[0]).close()
    with pytest.raises(CacheError, match=r"units/000001\.zarr\.zip: cannot be reached"):
        opened.unit(opened.manifest.units[1])


def test_a_missing_unit(shards, cache, tmp_path):
    broken = copy_of(cache, tmp_path / "broken")
    (broken / "units" / "000000.zarr.zip").unlink()
    with FileServer(broken) as server:
        done = cli(*training(shards, server.url, tmp_path / "run", tmp_path / "room", "--workers", 1))
    assert done.code == 1
    assert "units/000000.zarr.zip: expected a file, found none" in done.message


def test_a_killed_run_leaves_a_part_that_the_next_one_uses(shards, server, from_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    room = tmp_path / "room"
    server.slow = 0.1
    child = Child(*training(shards, server.url, tmp_path / "killed", room), folder=tmp_path)
    wait_for(lambda: any(part.stat().st_size >= 4096 for part in room.glob("units/.*.part")))
    child.send(signal.SIGKILL)
    child.wait()
    part = next(room.glob("units/.*.part"))
    name, have = part.name[1:7], part.stat().st_size
    server.slow = 0
    server.requests.clear()
    done = cli(*training(shards, server.url, tmp_path / "run", room))
    assert done.code == 0, done.err
    assert server.fetched(f"units/{name}")[0][2].startswith(f"bytes={have}-")
    assert weights(tmp_path / "run") == from_disk


def test_no_room_on_the_disk(shards, server, from_disk, tmp_path):
    out, room = tmp_path / "run", tmp_path / "room"
    for workers in (0, 1):
        arguments = training(shards, server.url, tmp_path / f"run-{workers}", room, "--workers", workers)
        child = Child(*arguments, folder=tmp_path, largest_file=12_000)
        assert child.wait() == 1, child.printed
        assert "make room" in child.message
        assert kept(room) == []
    done = cli(*training(shards, server.url, out, room))
    assert done.code == 0, done.err
    assert weights(out) == from_disk


def test_other_shards_of_the_same_names(server, tmp_path):
    """As many samples and pairs in each shard, but other keys."""
    samples = make_samples(24)
    renamed = [sample.__class__(f"x-{sample.key}", sample.images, sample.texts) for sample in samples]
    others = make_shards(tmp_path / "train", renamed, size=4)
    done = cli(*training(others, server.url, tmp_path / "run", tmp_path / "room"))
    assert done.code == 1
    assert "no key is on both sides: the cache was made from another data set" in done.message
    assert not (tmp_path / "run").exists()


# --- the other commands, and the options


def test_inspect_and_eval_of_a_url(shards, cache, server, tmp_path):
    room = ("--cache-dir", tmp_path / "room")
    done = cli("inspect", server.url, *room)
    assert done.code == 0, done.err
    assert "of 1 of 6 units" in done.out
    assert len(server.fetched("units")) == 1
    whole = cli("inspect", server.url, "--units", 6, "--json", *room)
    assert json.loads(whole.out) == summarise(Cache(cache)).model_dump(mode="json")
    links = cli("inspect", server.url, "--key", "key-005", "--json", *room)
    assert json.loads(links.out)["key"] == "key-005"
    out = tmp_path / "run"
    assert cli(*training(shards, server.url, out, tmp_path / "room")).code == 0
    scored = [
        cli("eval", out, shards[0].path.parent, "--targets", place, "--json", *room) for place in (cache, server.url)
    ]
    assert scored[1].code == 0, scored[1].err
    assert scored[0].out == scored[1].out


def test_labels_only_like_a_url(shards, server, tmp_path):
    done = cli(
        "train", shards[0].path.parent, "--targets", "none", "--like", server.url, "--out", tmp_path / "run",
        "--cache-dir", tmp_path / "room", *FIT,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert not server.fetched("units")


def test_where_units_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "dde-cache"
    monkeypatch.setenv("DDE_CACHE_DIR", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("1.5 mb", 1_500_000), ("7", 7), ("2K", 2000), ("3t", 3 * 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "20 XB", "1e9", "0"])
def test_sizes_that_are_none(server, tmp_path, text):
    with pytest.raises(InputError, match=r"size such as|at least 1 byte"):
        open_cache(server.url, tmp_path, parse_size(text))


def test_a_path_is_opened_as_it_is(cache):
    assert type(open_cache(str(cache))) is Cache
    assert type(open_cache(f"file://{cache}")) is Cache
    assert os.fspath(open_cache(f"file://{cache}").folder) == os.fspath(cache)
