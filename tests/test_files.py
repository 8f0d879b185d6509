"""Folders that take another's place whole."""

import os

import pytest
from pipeline import tree

from dde_cache.files import ABANDONED_SECONDS, partial_file, partial_path, remove_abandoned, replaced_folder


def fill(folder, *names):
    with replaced_folder(folder) as new:
        for name in names:
            if name is None:
                raise OSError("no room")
            (new / name).write_text(name)


def test_a_folder_takes_the_place_of_another(tmp_path):
    folder = tmp_path / "deep" / "model"
    fill(folder, "one", "two")
    fill(folder, "three")
    assert tree(folder.parent) == {"model/three": b"three"}


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path):
    fill(tmp_path / "model", "one")
    with pytest.raises(OSError, match="no room"):
        fill(tmp_path / "model", "two", None)
    assert tree(tmp_path) == {"model/one": b"one"}


def test_what_was_moved_aside_is_put_back(tmp_path, monkeypatch):
    """Stopped between the two renames, and again before the next folder was filled."""
    fill(tmp_path / "model", "one")
    rename, calls = os.replace, []

    def second_fails(*places):
        calls.append(places)
        if len(calls) == 2:
            raise OSError("stopped")
        rename(*places)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="stopped"):
        fill(tmp_path / "model", "two")
    assert tree(tmp_path) == {".model.old/one": b"one"}
    monkeypatch.undo()
    with pytest.raises(OSError, match="no room"):
        fill(tmp_path / "model", None)
    assert tree(tmp_path) == {"model/one": b"one"}
    fill(tmp_path / "model", "two")
    assert tree(tmp_path) == {"model/two": b"two"}


def aged(path):
    old = path.stat().st_mtime - 2 * ABANDONED_SECONDS
    os.utime(path, (old, old), follow_symlinks=False)
    return path


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    """The lock of a living writer counts, however long it has not written; so does the time, where nobody holds it."""
    name = tmp_path / "000000.zarr.zip"
    left = aged(_touched(partial_path(name)))
    strange = [
        aged(_touched(tmp_path / one)) for one in ("a.partial", ".a.partial", ".a.12-xyz.partial", "a.12-01234567")
    ]
    link, young, folder = (partial_path(name) for _ in range(3))
    link.symlink_to(strange[0])
    aged(link)
    _touched(young)
    folder.mkdir()
    aged(folder)
    with partial_file(name) as (_file, held):
        aged(held)
        remove_abandoned(tmp_path)
        assert held.exists()
        assert not left.exists()
        assert young.exists()
        remove_abandoned(tmp_path, after=0)
        assert held.exists()
        assert not young.exists()
    assert not held.exists()
    assert {*tmp_path.iterdir()} == {*strange, link, folder}


def _touched(path):
    path.touch()
    return path
