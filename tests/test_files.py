"""Folders that take another's place whole."""

import os

import pytest
from pipeline import tree

from dde_cache.files import replaced_folder


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
