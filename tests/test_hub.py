"""The Hub's own client, as far as it goes without the Hub: against a small part of the Hub on loopback."""

import json

import fsspec
import huggingface_hub
import pytest
from hub_server import HubServer
from pipeline import cli, make_cache, make_samples, make_shards, tree
from servers import copy_of

from dde_cache import network
from dde_cache.errors import CacheError
from dde_cache.share import Watch, pull, push
from dde_cache.store import Cache
from dde_cache.streamed import open_cache

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

URL = "hf://datasets/lab/maps"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(network, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(12), size=4)


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    """Three units."""
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache").folder


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        # What HF_HUB_OFFLINE=0, HF_HUB_DISABLE_XET=1 and HF_ENDPOINT say when the client is imported.
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        huggingface_hub.close_session()
        kind = fsspec.get_filesystem_class("hf")
        kind.clear_instance_cache()
        yield server
        kind.clear_instance_cache()
        huggingface_hub.close_session()


def without_card(files):
    """Everything but the card, which says where a cache is from, and its seal."""
    files = {name: held for name, held in files.items() if name != "README.md"}
    manifest = json.loads(files["manifest.json"])
    return files | {"manifest.json": {name: held for name, held in manifest.items() if name not in ("card", "sha256")}}


def contents(folder):
    return without_card(tree(folder))


def test_push_and_pull(cache, hub, tmp_path):
    report = push(cache, URL)
    assert (report.transferred, report.units) == (3, 3)
    (_empty, files) = hub.commits["lab/maps"]
    assert without_card(files) == contents(cache)
    assert f"--targets {URL}" in files["README.md"].decode()
    assert hub.private["lab/maps"] is True
    again = push(cache, URL)
    assert (again.transferred, again.kept) == (0, 3)
    assert len(hub.commits["lab/maps"]) == 2
    done = cli("pull", URL, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert contents(tmp_path / "out") == contents(cache)


def test_streaming(cache, hub, tmp_path):
    push(cache, f"{URL}/v1/")
    assert all(name.startswith("v1/") for name in hub.commits["lab/maps"][-1])
    opened = open_cache(f"{URL}/v1", tmp_path)
    for entry in opened.manifest.units:
        opened.unit(entry).check_readable()


def test_an_interrupted_push_goes_on(cache, hub, tmp_path):
    """Units that were sent but not committed are not sent again."""
    hub.refuse = 2

    def stop(_entry):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(cache, URL, Watch(unit=stop))
    assert hub.commits["lab/maps"] == [{}]
    with pytest.raises(CacheError, match=r"has no manifest\.json"):
        pull(URL, tmp_path / "early")
    push(cache, URL)
    assert len(hub.uploads) == len(set(hub.uploads)) == 3
    pull(URL, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(cache)


def test_a_commit_that_came_first_is_kept(cache, hub, tmp_path):
    """Between our reading of the manifest and our commit, another push adds a unit."""
    one, two, three = (part_of(cache, tmp_path / str(number), slice(number, number + 1)) for number in range(3))
    push(one, URL)
    hub.before_commit = lambda: push(two, URL)
    push(three, URL)
    pull(URL, tmp_path / "out")
    assert Cache(tmp_path / "out").manifest.units == Cache(cache).manifest.units


def part_of(cache, folder, chosen):
    """A cache with some of the units."""
    copy_of(cache, folder)
    manifest = Cache(cache).manifest
    units = manifest.units[chosen]
    for entry in manifest.units:
        if entry not in units:
            (folder / "units" / entry.name).unlink()
    (folder / "manifest.json").write_text(manifest.model_copy(update={"units": units}).sealed().model_dump_json())
    return folder


def test_another_cache_is_never_replaced(cache, shards, hub, teacher_folder, tmp_path):
    push(cache, URL)
    other = make_cache(shards, teacher_folder, tmp_path / "other", k=2).folder
    with pytest.raises(CacheError, match="k: expected 2, got null"):
        push(other, URL)
    assert len(hub.commits["lab/maps"]) == 2


def test_no_such_repository(hub, tmp_path):
    done = cli("pull", "hf://datasets/lab/nothing", "--out", tmp_path / "out")
    assert done.code == 1
    assert "has no manifest.json" in done.message or "not there" in done.message
    assert "Traceback" not in done.err


def test_offline(cache, tmp_path):
    """As every test starts: the client may not reach anything."""
    for arguments in (("pull", URL, "--out", tmp_path / "out"), ("push", cache, URL), ("inspect", URL)):
        done = cli(*arguments)
        assert done.code == 1, done.out
        assert "cannot be reached (OfflineModeIsEnabled" in done.message
        assert "Traceback" not in done.err
