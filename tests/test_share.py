"""Pushed and pulled caches are whole or not there at all; nobody's units are lost, and no wrong byte is used."""

import contextlib
import importlib
import json
import shutil
import signal
import sys
from pathlib import Path

import fsspec
import pytest
from pipeline import Child, cli, make_cache, make_samples, make_shards, tree, wait_for
from servers import CuttingProxy, FileServer, copy_of, s3_server

from dde_cache import network, remote
from dde_cache.errors import CacheError, InputError
from dde_cache.objects import RECEIPTS
from dde_cache.share import Watch, pull, push
from dde_cache.spec import hash_json
from dde_cache.store import Cache

BUCKET = "caches"


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


@pytest.fixture(scope="module")
def other(shards, teacher_folder, tmp_path_factory):
    """The same shards with other options: another fingerprint."""
    return make_cache(shards[:2], teacher_folder, tmp_path_factory.mktemp("other") / "cache", k=2).folder


@pytest.fixture(scope="module")
def more(teacher_folder, tmp_path_factory):
    """Two units of other shards, with other names, of the same targets."""
    folder = tmp_path_factory.mktemp("more")
    shards = make_shards(folder / "train", make_samples(4, seed=7), size=2)
    for shard in shards:
        shard.path.rename(shard.path.with_name(f"more-{shard.name}"))
    (folder / "train" / "shards.json").unlink(missing_ok=True)
    from dde_cache.samples import open_shards

    return make_cache(open_shards(folder / "train"), teacher_folder, folder / "cache").folder


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir(BUCKET)
        yield address
        type(fs).clear_instance_cache()


@pytest.fixture
def url(s3, request):
    """A place of its own in the bucket."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


@contextlib.contextmanager
def through(proxy, monkeypatch):
    """Everything of S3 goes through the proxy."""
    kind = fsspec.get_filesystem_class("s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    kind.clear_instance_cache()
    yield
    kind.clear_instance_cache()


def objects(url):
    """What lies at a URL: file names and their bytes."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}


def receipts(url):
    """Units that a running push has sent."""
    try:
        return len(json.loads(fsspec.filesystem("s3").cat_file(f"{url}/{RECEIPTS}"))["units"])
    except FileNotFoundError:
        return 0


def units_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "units").iterdir() if not path.name.startswith(".")}


def contents(files):
    """Everything but the card, which says where a cache is from, its seal, and what a push notes for itself."""
    files = {name: held for name, held in files.items() if name not in ("README.md", RECEIPTS)}
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"])
        files["manifest.json"] = {name: held for name, held in manifest.items() if name not in ("card", "sha256")}
    return files


def same_cache(one, two):
    return contents(tree(one)) == contents(tree(two)) and verified(one)


def verified(folder):
    """Whether the judge finds nothing, its card included."""
    done = cli("verify", folder)
    return done.code == 0


def reseal(folder, **changes):
    manifest = Cache(folder).manifest.model_copy(update=changes).sealed()
    (folder / "manifest.json").write_text(manifest.model_dump_json())


# --- S3


def test_a_pushed_cache_can_be_pulled(cache, url, tmp_path):
    first = cli("push", cache, url, "--json")
    assert first.code == 0, first.err
    report = json.loads(first.out)
    assert (report["transferred"], report["kept"], report["units"]) == (6, 0, 6)
    assert report["to_fill_in"][:2] == ["license", "made by"]
    assert "fill in" in first.message
    there = objects(url)
    assert contents(there) == contents(tree(cache))
    assert f"--targets {url}" in there["README.md"].decode()
    again = push(cache, url)
    assert (again.transferred, again.kept) == (0, 6)
    assert objects(url) == there
    done = cli("pull", url, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert all(len(line) <= 80 for line in (done.out + done.err).splitlines())
    assert same_cache(tmp_path / "out", cache)
    assert pull(url, tmp_path / "out").transferred == 0


def test_units_of_two_labs_come_together(cache, more, url, tmp_path):
    push(cache, url)
    push(more, url)
    pull(url, tmp_path / "out")
    assert units_of(tmp_path / "out") == units_of(cache) | units_of(more)
    assert len(Cache(tmp_path / "out").manifest.units) == 8
    assert "8 units" in (tmp_path / "out" / "README.md").read_text()
    # And into a folder that has units of its own.
    mine = copy_of(more, tmp_path / "mine")
    assert pull(url, mine).transferred == 6
    assert units_of(mine) == units_of(cache) | units_of(more)


def test_two_pushes_at_once_lose_nothing(cache, more, url, tmp_path):
    children = [Child("push", folder, url, folder=tmp_path) for folder in (cache, more)]
    for child in children:
        assert child.wait() == 0, child.printed
    pull(url, tmp_path / "out")
    assert units_of(tmp_path / "out") == units_of(cache) | units_of(more)


def test_another_cache_is_never_replaced(cache, other, url, tmp_path):
    push(cache, url)
    before = objects(url)
    done = cli("push", other, url)
    assert done.code == 1
    assert "holds a cache of other targets: - k: expected 2, got null" in done.message
    assert objects(url) == before
    copy = copy_of(other, tmp_path / "out")
    with pytest.raises(CacheError, match="k: expected null, got 2"):
        pull(url, copy)
    assert tree(copy) == tree(other)


def test_units_of_the_same_name_are_never_replaced(cache, url, tmp_path):
    push(cache, url)
    before = objects(url)
    changed = copy_of(cache, tmp_path / "changed")
    names = ["000001.zarr.zip", "000003.zarr.zip"]
    units = {unit.name: unit for unit in Cache(cache).manifest.units}
    for name in names:
        units[name] = units[name].model_copy(update={"sha256": "0" * 64})
    reseal(changed, units=tuple(units.values()))
    with pytest.raises(CacheError, match="never replaced") as error:
        push(changed, url)
    assert all(name in str(error.value) for name in names)
    assert objects(url) == before


def test_damaged_units_are_not_sent(cache, url, tmp_path):
    damaged = copy_of(cache, tmp_path / "damaged")
    (damaged / "units" / "000002.zarr.zip").write_bytes(b"half")
    (damaged / "units" / "000005.zarr.zip").unlink()
    with pytest.raises(CacheError, match="nothing was sent") as error:
        push(damaged, url)
    assert "000002.zarr.zip: its bytes" in str(error.value)
    assert "000005.zarr.zip: missing" in str(error.value)
    assert objects(url) == {}


def test_a_changed_object_is_sent_again(cache, url):
    """Not its size says whether a unit is there, but that the object is the one that was sent."""
    push(cache, url)
    fs = fsspec.filesystem("s3")
    place = f"{url}/units/000004.zarr.zip"
    good = fs.cat_file(place)
    fs.pipe_file(place, bytes(len(good)))
    report = push(cache, url)
    assert (report.transferred, report.kept) == (1, 5)
    assert fs.cat_file(place) == good


def test_a_killed_push_goes_on(cache, url, tmp_path):
    child = Child("push", cache, url, folder=tmp_path)
    wait_for(lambda: receipts(url) >= 2)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    there = objects(url)
    assert "manifest.json" not in there
    sent = len(json.loads(there[RECEIPTS])["units"])
    assert 2 <= sent < 6
    with pytest.raises(CacheError, match="unfinished push"):
        pull(url, tmp_path / "early")
    report = push(cache, url)
    assert (report.transferred, report.kept) == (6 - sent, sent)
    pull(url, tmp_path / "out")
    assert same_cache(tmp_path / "out", cache)


def test_a_manifest_that_changed_meanwhile_is_not_replaced(url):
    """Two pushes read the same manifest: the one that writes second must read again."""
    place = remote.Remote(url)
    assert place.replace("manifest.json", b"one", place.tag("manifest.json"))
    assert not place.replace("manifest.json", b"two", None)
    seen = place.tag("manifest.json")
    assert place.replace("manifest.json", b"two", seen)
    assert not place.replace("manifest.json", b"three", seen)
    assert place.read("manifest.json", 100) == b"two"


def test_units_that_came_during_a_push_are_kept(cache, more, url, tmp_path):
    todo = [more]
    push(cache, url, Watch(unit=lambda _entry: todo and push(todo.pop(), url)))
    pull(url, tmp_path / "out")
    assert units_of(tmp_path / "out") == units_of(cache) | units_of(more)


def test_an_unfinished_push_of_another_cache(cache, other, url, tmp_path):
    push(cache, url)
    fs = fsspec.filesystem("s3")
    fs.rm(f"{url}/manifest.json")
    with pytest.raises(CacheError, match="unfinished push of other targets"):
        push(other, url)


def test_s3_connections_that_are_cut(cache, s3, url, tmp_path, monkeypatch):
    with CuttingProxy(s3) as proxy, through(proxy, monkeypatch):
        proxy.cuts = [3000, 500, 7000]
        push(cache, url)
        proxy.cuts = [20_000, 9000, 100]
        pull(url, tmp_path / "out")
        assert proxy.cut >= 5
    assert same_cache(tmp_path / "out", cache)


def test_a_place_with_other_files(cache, url, tmp_path):
    fsspec.filesystem("s3").pipe_file(f"{url}/thesis.tex", b"important")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        push(cache, url)


def test_no_bucket(cache, s3):
    done = cli("push", cache, "s3://no-such-bucket/cache")
    assert done.code == 1
    assert "no-such-bucket" in done.message
    assert "Traceback" not in done.err


# --- a web server


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def server(cache, request):
    with FileServer(cache, ranges=request.param) as running:
        yield running


def test_pull_over_cut_connections(cache, server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    server.cuts = [3000, 5000, 1, 0, 100_000, 2000]
    pull(server.url, tmp_path / "out")
    assert same_cache(tmp_path / "out", cache)
    assert not server.cuts


def test_a_connection_that_is_always_cut(cache, server, tmp_path):
    server.every_cut = 1000
    done = cli("pull", server.url, "--out", tmp_path / "out")
    assert done.code == 1
    assert "cannot be reached" in done.message
    assert "run the same command again" in done.message
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert units_of(tmp_path / "out") == {}
    with pytest.raises(CacheError, match="run the `dde-cache pull` that began it to the end"):
        Cache(tmp_path / "out")
    server.every_cut = None
    pull(server.url, tmp_path / "out")
    assert same_cache(tmp_path / "out", cache)


def test_a_half_fetched_unit_goes_on_where_it_was(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setattr(network, "TRIES", 1)
    with FileServer(cache) as server:
        server.cuts = [10**9, 10**9, 0]
        with pytest.raises(CacheError, match="cannot be reached"):
            pull(server.url, tmp_path / "out")
        part = next((tmp_path / "out" / "units").glob(".*.part"))
        assert part.stat().st_size == 8192
        server.requests.clear()
        pull(server.url, tmp_path / "out")
        assert server.fetched(part.name.split(".zarr.zip")[0].lstrip("."))[0][2].startswith("bytes=8192-")
    assert same_cache(tmp_path / "out", cache)


def test_a_stale_part_is_fetched_anew(cache, server, tmp_path):
    entry = Cache(cache).manifest.units[0]
    (tmp_path / "out" / "units").mkdir(parents=True)
    (tmp_path / "out" / ".pulling.json").write_bytes((cache / "manifest.json").read_bytes())
    (tmp_path / "out" / "units" / f".{entry.name}.{entry.sha256[:16]}.part").write_bytes(b"x" * 1000)
    pull(server.url, tmp_path / "out")
    assert same_cache(tmp_path / "out", cache)


def test_wrong_bytes_are_never_used(cache, server, tmp_path):
    server.flips = {"/units/000003.zarr.zip": 4321}
    done = cli("pull", server.url, "--out", tmp_path / "out")
    assert done.code == 1
    assert "unit 000003.zarr.zip" in done.message
    assert not list((tmp_path / "out" / "units").glob("*000003*"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    for name in ("manifest.json", "assets/tokenizer.json", "assets/labels.json"):
        server.flips = {f"/{name}": 5}
        with pytest.raises(CacheError, match=name):
            pull(server.url, tmp_path / "flipped")
        assert not (tmp_path / "flipped" / "manifest.json").exists()


def test_units_that_do_not_belong_to_the_manifest(cache, tmp_path):
    broken = copy_of(cache, tmp_path / "broken")
    units = sorted((broken / "units").iterdir())
    with FileServer(broken) as server:
        units[2].unlink()
        with pytest.raises(CacheError, match=r"000002.zarr.zip: expected a file, found none"):
            pull(server.url, tmp_path / "missing")
        shutil.copy(units[1], units[2])
        with pytest.raises(CacheError, match=r"000002.zarr.zip.*do not belong together"):
            pull(server.url, tmp_path / "swapped")
        units[2].write_bytes(units[1].read_bytes()[:5000])
        with pytest.raises(CacheError, match=r"000002.zarr.zip.*do not belong together"):
            pull(server.url, tmp_path / "short")
        units[2].write_bytes(b"")
        with pytest.raises(CacheError, match=r"000002.zarr.zip.*do not belong together"):
            pull(server.url, tmp_path / "empty")
    assert not list(tmp_path.glob("[mse]*/manifest.json"))


def test_a_killed_pull_goes_on(cache, tmp_path):
    out = tmp_path / "out"
    with FileServer(cache) as server:
        server.slow = 0.002
        for count in (1, 2, 4):
            child = Child("pull", server.url, "--out", out, folder=tmp_path)
            wait_for(lambda count=count: len(list(out.glob("units/[0-9]*"))) >= count)
            child.send(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.printed
            assert not (out / "manifest.json").exists()
        whole = units_of(out)
        assert all(held == units_of(cache)[name] for name, held in whole.items())
        server.requests.clear()
        report = pull(server.url, out)
        assert (report.transferred, report.kept) == (6 - len(whole), len(whole))
        assert not any(server.fetched(name) for name in whole)
    assert same_cache(out, cache)


def test_an_interrupted_pull(cache, tmp_path):
    out = tmp_path / "out"
    with FileServer(cache) as server:
        server.slow = 0.005
        child = Child("pull", server.url, "--out", out, folder=tmp_path)
        wait_for(lambda: len(list(out.glob("units/[0-9]*"))) >= 2)
        child.send(signal.SIGINT)
        assert child.wait() == 130, child.printed
        assert "run the same command again to go on" in child.message
        assert "Traceback" not in child.printed
        server.slow = 0
        pull(server.url, out)
    assert same_cache(out, cache)


def test_no_room_for_a_unit(cache, tmp_path):
    out = tmp_path / "out"
    with FileServer(cache) as server:
        child = Child("pull", server.url, "--out", out, folder=tmp_path, largest_file=12_000)
        assert child.wait() == 1, child.printed
        assert "make room" in child.message
        assert "Traceback" not in child.printed
        assert units_of(out) == {}
        assert not (out / "manifest.json").exists()
        pull(server.url, out)
    assert same_cache(out, cache)


def test_a_unit_larger_than_the_disk(cache, tmp_path):
    """A stranger's manifest may say anything; nothing is fetched then."""
    huge = copy_of(cache, tmp_path / "huge")
    units = Cache(huge).manifest.units
    reseal(huge, units=(units[0].model_copy(update={"size": 2**60}), *units[1:]))
    with FileServer(huge) as server:
        with pytest.raises(CacheError, match="expected room for"):
            pull(server.url, tmp_path / "out")
        assert not server.fetched("units")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..", "x\\..\\evil", ""])
def test_names_that_leave_the_folder(cache, tmp_path, name):
    evil = copy_of(cache, tmp_path / "evil")
    reseal(evil, assets=Cache(evil).manifest.assets | {name: "0" * 64})
    content = json.loads((evil / "manifest.json").read_text())
    with FileServer(evil) as server:
        with pytest.raises(CacheError):
            pull(server.url, tmp_path / "out")
        content["assets"].pop(name)
        content["units"][0]["name"] = f"{name}.zarr.zip"
        content["sha256"] = hash_json({key: value for key, value in content.items() if key != "sha256"})
        (evil / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CacheError, match="cannot be read"):
            pull(server.url, tmp_path / "out")
        assert not server.fetched("evil")
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(cache, other, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("important")
    with FileServer(cache) as server, FileServer(other) as second:
        with pytest.raises(InputError, match="new or empty"):
            pull(server.url, tmp_path / "thesis")
        server.every_cut = 0
        with pytest.raises(CacheError, match="cannot be reached"):
            pull(server.url, tmp_path / "out")
        with pytest.raises(CacheError, match="k: expected 2, got null"):
            pull(second.url, tmp_path / "out")


def test_two_pulls_into_one_folder(cache, tmp_path):
    out = tmp_path / "out"
    with FileServer(cache) as server:
        server.slow = 0.01
        first = Child("pull", server.url, "--out", out, folder=tmp_path)
        wait_for(lambda: list(out.glob("units/.0*.part")))
        with pytest.raises(CacheError, match="another pull is writing here"):
            pull(server.url, out)
        server.slow = 0
        assert first.wait() == 0, first.printed
    assert same_cache(out, cache)


# --- paths, and what cannot be


def test_push_to_a_path(cache, other, tmp_path):
    out = tmp_path / "out"
    assert push(cache, str(out)).transferred == 6
    assert same_cache(out, cache)
    assert push(cache, f"file://{out}").kept == 6
    with pytest.raises(CacheError, match="k: expected 2, got null"):
        push(other, str(out))
    assert same_cache(out, cache)


def test_a_web_address_cannot_be_pushed_to(cache):
    with pytest.raises(InputError, match="can be written"):
        push(cache, "https://example.org/cache")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/cache?token=1", "without"),
        ("nonsense://somewhere", "expected a local path, s3"),
        ("hf://OWNER", "hf://datasets/OWNER/NAME"),
    ],
)
def test_urls_that_cannot_be(cache, url, message):
    with pytest.raises(InputError, match=message):
        push(cache, url)


@pytest.mark.parametrize(
    ("module", "url", "line"),
    [
        ("s3fs", "s3://bucket/cache", "pip install 'dde-cache[s3]'"),
        ("aiohttp", "https://example.org/cache", "pip install 'dde-cache[http]'"),
        ("huggingface_hub", "hf://datasets/a/b", "pip install 'dde-cache[hf]'"),
    ],
)
def test_a_missing_extra(module, url, line, tmp_path):
    """In a process that cannot import it."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            del sys.modules[name]
        sys.modules[module] = None
        importlib.import_module("fsspec.registry")._registry.clear()

    child = Child("pull", url, "--out", tmp_path / "out", folder=tmp_path, before=forget)
    assert child.wait() == 1, child.printed
    scheme = url.split(":")[0]
    assert f"error: {url}: {scheme}:// needs a package that is not installed; {line}" in child.message
    assert "Traceback" not in child.printed


def test_nobody_answers(tmp_path):
    done = cli("pull", "http://127.0.0.1:9/cache", "--out", tmp_path / "out")
    assert done.code == 1
    assert "cannot be reached" in done.message
    assert not (tmp_path / "out").exists()


# --- the card


def test_what_was_filled_in_stays(cache, url, tmp_path):
    signed = copy_of(cache, tmp_path / "signed")
    card = signed / "README.md"
    text = card.read_text().replace("| made by | fill in |", "| made by | a lab |")
    card.write_text(text.replace("license: # fill in", "license: cc-by-4.0 #") + "\nCite us.\n")
    push(cache, url)
    report = push(signed, url)
    assert "made by" not in report.to_fill_in
    there = objects(url)["README.md"].decode()
    assert "| made by | a lab |" in there
    assert there.rstrip().endswith("Cite us.")
    # Somebody without a signed card does not undo it.
    push(cache, url)
    assert objects(url)["README.md"].decode() == there
    pull(url, tmp_path / "out")
    assert (Path(tmp_path) / "out" / "README.md").read_text() == there
