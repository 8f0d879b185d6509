import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dde_cache.errors import InputError
from dde_cache.importers import common
from dde_cache.importers.common import Found, Problem, Source, found_samples, import_samples
from dde_cache.importers.jsonl import jsonl_source
from dde_cache.importers.shapes import shapes, shapes_source
from dde_cache.samples import open_shards, read_index

data = pytest.importorskip("dde_cache.cli.data", reason="needs the package installed: pip install -e .")


def call(*words):
    return CliRunner().invoke(data.app, ["import", *map(str, words)], env={"COLUMNS": "80"})


def lines_file(folder, *lines):
    for name in ("a", "b"):
        Image.new("RGB", (6, 4), (9, ord(name), 9)).save(folder / f"{name}.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    (folder / "mine.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder / "mine.jsonl"


def refusal(source, folder, **options):
    with pytest.raises(InputError) as error:
        import_samples(source, folder, **options)
    return str(error.value)


GOOD = [
    {"image": "a.png", "text": "is it green", "label": "yes", "kind": "colour"},
    {"key": "pair/7", "images": ["a.png", "b.png"], "texts": [{"text": "both", "label": "no"}, {"text": "none"}]},
    {"key": "free", "image": "b.png", "text": "t", "meta": {"year": 2024, "tags": ["x"]}},
]
BAD = [
    ({"image": "none.png", "text": "t"}, "missing image", "'none.png' does not exist"),
    ({"image": "mine.jsonl", "text": "t"}, "unreadable image", "no known image format"),
    ({"image": ".", "text": "t"}, "unreadable image", "directory"),
    ({"image": "a.png", "text": ""}, "empty text", "text: nothing in it"),
    ({"image": "a.png", "texts": [{"text": "t"}, {"text": " \t"}]}, "empty text", "white space"),
    ({"key": "free", "image": "a.png", "text": "t"}, "duplicate key", "also the key of mine.jsonl line 3"),
    ({"key": "a.b", "image": "a.png", "text": "t"}, "bad key", "without dots"),
    ({"image": "a.png", "text": "t", "label": "maybe"}, "unknown label", "'maybe'"),
    ('{"image": "a.png"', "malformed line", "expected JSON"),
    ('{"image": "a.png", "text": "\udcff"}', "malformed line", "expected JSON in UTF-8"),
    ('{"image": "a.png", "text": "t", "meta": {"x": NaN}}', "malformed line", "expected JSON"),
    ('{"image": "a.png", "text": "t", "meta": {"x": 1e999}}', "malformed line", "expected JSON"),
    ("[1, 2]", "malformed line", "expected an object, got [1, 2]"),
    ({"image": "a.png", "text": "t", "answer": "yes"}, "malformed line", "unknown field 'answer'"),
    ({"image": "a.png", "images": ["b.png"], "text": "t"}, "malformed line", "either image or images"),
    ({"images": ["a.png"] * 3, "text": "t"}, "malformed line", "one or two paths"),
    ({"image": 3, "text": "t"}, "malformed line", "image: expected a path"),
    ({"image": "a.png"}, "malformed line", "either text or texts"),
    ({"image": "a.png", "texts": []}, "malformed line", "at least one object"),
    ({"image": "a.png", "texts": [{"text": "t"}], "label": "yes"}, "malformed line", "label: belongs inside texts"),
    ({"image": "a.png", "text": "t", "label": True}, "malformed line", "label: Input should be a valid string"),
    ({"image": "a.png", "texts": ["t"]}, "malformed line", "texts: Input should be"),
    ({"image": "a.png", "text": "t", "key": 7}, "malformed line", "key: expected a string"),
    ({"image": "a.png", "text": "t", "meta": "x"}, "malformed line", "meta: expected an object"),
]


def test_own_pictures_come_back_as_they_were(tmp_path):
    path = lines_file(tmp_path, *GOOD[:2], "", GOOD[2])
    imported = import_samples(jsonl_source("train", path), tmp_path / "out", labels=["yes", "no"])
    (shard,) = open_shards(tmp_path / "out")
    assert shard.keys == ["train-0000001", "pair/7", "free"]
    pair = shard.read("pair/7")
    assert [image.content for image in pair.images] == [(tmp_path / f"{n}.png").read_bytes() for n in "ab"]
    assert [(text.text, text.label) for text in pair.texts] == [("both", "no"), ("none", None)]
    assert shard.read("free").meta == {"year": 2024, "tags": ["x"]}
    assert imported.answers == {("colour", "yes"): 1, (None, "no"): 1, (None, None): 2}
    assert (imported.index.labels, imported.index.kinds, imported.index.left_out) == (("no", "yes"), ("colour",), 0)
    assert imported.index.arguments["labels"] == ["no", "yes"]


@pytest.mark.parametrize(("line", "kind", "words"), BAD)
def test_each_kind_of_bad_line_is_named_and_nothing_is_written(tmp_path, line, kind, words):
    path = lines_file(tmp_path, *GOOD, line)
    message = refusal(jsonl_source("train", path), tmp_path / "out", labels=["yes", "no"])
    assert "1 of 4 samples" in message
    assert f"\n{kind}: 1\n  - mine.jsonl line 4: " in message
    assert words in message
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "mine.jsonl"]


def test_all_problems_come_at_once_with_counts_and_examples(tmp_path):
    path = lines_file(tmp_path, *GOOD, *(line for line, _, _ in BAD))
    message = refusal(jsonl_source("train", path), tmp_path / "out", labels=["yes", "no"])
    assert f"{len(BAD)} of {len(BAD) + 3} samples cannot be used; nothing was written" in message
    counts = {kind: sum(1 for _, of, _ in BAD if of == kind) for _, kind, _ in BAD}
    for kind, count in counts.items():
        assert f"\n{kind}: {count}\n" in message
    assert f"(+{counts['malformed line'] - 3} more)" in message
    assert not (tmp_path / "out").exists()


def test_one_line_with_several_problems_lists_them_all(tmp_path):
    path = lines_file(tmp_path, {"image": "no.png", "texts": [{"text": ""}, {"text": "t", "label": "maybe"}], "x": 1})
    message = refusal(jsonl_source("train", path), tmp_path / "out", labels=["yes"])
    assert "1 of 1 samples" in message
    for kind in ("missing image", "empty text", "unknown label", "malformed line"):
        assert f"\n{kind}: 1\n" in message


def test_skip_bad_leaves_bad_samples_out_and_lists_them(tmp_path):
    path = lines_file(tmp_path, *(line for line, _, _ in BAD[:3]), *GOOD, *(line for line, _, _ in BAD[3:5]))
    imported = import_samples(jsonl_source("train", path), tmp_path / "out", skip_bad=True)
    assert [key for shard in open_shards(tmp_path / "out") for key in shard.keys] == [
        "train-0000004",
        "pair/7",
        "free",
    ]
    assert imported.index.left_out == read_index(tmp_path / "out").left_out == 5
    listed = [json.loads(line) for line in (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()]
    assert [problem["kind"] for problem in listed] == [kind for _, kind, _ in BAD[:5]]
    assert listed[0] == {"kind": "missing image", "where": "mine.jsonl line 1", "detail": "'none.png' does not exist"}


def test_no_sample_is_an_error(tmp_path):
    assert "expected samples, found none" in refusal(jsonl_source("t", lines_file(tmp_path)), tmp_path / "out")
    path = lines_file(tmp_path, BAD[0][0])
    message = refusal(jsonl_source("t", path), tmp_path / "out", skip_bad=True)
    assert "all 1 were left out" in message
    assert "none.png" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_never_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        assert "thesis.txt" in refusal(shapes_source("train", 2), out, overwrite=overwrite)
    (out / "thesis.txt").unlink()
    import_samples(shapes_source("train", 2), out)
    (out / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in refusal(shapes_source("train", 3), out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert "expected a folder, found a file" in refusal(shapes_source("train", 2), out / "thesis.txt")


def test_finished_shards_are_kept_or_replaced(tmp_path):
    out = tmp_path / "out"
    first = import_samples(shapes_source("train", 4), out, shard_size=2)
    before = (out / "shards.json").stat().st_mtime_ns
    again = import_samples(shapes_source("train", 4), out, shard_size=2)
    assert again.already
    assert again.index == first.index
    assert (out / "shards.json").stat().st_mtime_ns == before
    assert "another import (shapes, split train)" in refusal(shapes_source("train", 5), out)
    assert "pass --overwrite" in refusal(shapes_source("train", 4), out, shard_size=3)
    import_samples(shapes_source("train", 1), out, overwrite=True)
    assert sorted(os.listdir(out)) == ["000000.tar", "shards.json"]
    (out / "000000.tar").unlink()
    assert "tars are missing" in refusal(shapes_source("train", 1), out)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("trouble", "raised", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), InputError, "cannot be written: Permission denied"),
    ],
)
@pytest.mark.parametrize("replaces", [False, True])
def test_an_import_that_stops_half_way_leaves_what_was_there(tmp_path, trouble, raised, words, replaces):
    if replaces:
        import_samples(shapes_source("train", 1), tmp_path / "out")

    def cut_short():
        yield from found_samples(shapes("train", 3))
        assert any(name.startswith(".out.importing-") for name in os.listdir(tmp_path))
        raise trouble

    with pytest.raises(raised, match=words):
        import_samples(Source("s", "t", {}, None, cut_short()), tmp_path / "out", shard_size=2, overwrite=True)
    assert os.listdir(tmp_path) == (["out"] if replaces else [])
    if replaces:
        assert read_index(tmp_path / "out").source == "shapes"


def test_a_folder_that_cannot_take_its_place_is_not_lost(tmp_path, monkeypatch):
    import_samples(shapes_source("train", 1), tmp_path / "out")
    replace = os.replace

    def broken(origin, target):
        if Path(target) == tmp_path / "out" and "importing" in str(origin):
            raise OSError(errno.EIO, "Input/output error")
        replace(origin, target)

    monkeypatch.setattr(common.os, "replace", broken)
    assert "Input/output error" in refusal(shapes_source("train", 2), tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert read_index(tmp_path / "out").arguments["count"] == 1


def test_two_samples_under_one_key_are_found_whatever_the_source(tmp_path):
    found = [Found("one", "k"), Found("two", "k", problems=(Problem("odd", "two", "odd"),))]
    message = refusal(Source("s", "t", {}, 2, found), tmp_path / "out", skip_bad=True)
    assert "duplicate key: 1\n  - two: 'k' is also the key of one" in message
    assert "incomplete sample: 1\n  - one: expected one or two images and some texts, got 0 and 0" in message


def test_the_command_shows_what_it_wrote(tmp_path):
    result = call(
        "shapes", "--out", tmp_path / "out", "--count", 12, "--split", "valid", "--grid", 4, "--shard-size", 5
    )
    assert result.exit_code == 0, result.output
    assert "12 samples, 72 pairs, 3 shards" in " ".join(result.output.split())
    assert "50.0%" in result.output
    assert max(map(len, result.output.splitlines())) <= 80 + len(str(tmp_path))
    index = read_index(tmp_path / "out")
    assert (index.source, index.split, index.labels, index.kinds) == (
        "shapes",
        "valid",
        ("no", "yes"),
        ("exists", "neighbour", "row"),
    )
    result = call(
        "shapes", "--out", tmp_path / "out", "--count", 12, "--split", "valid", "--grid", 4, "--shard-size", 5
    )
    assert "already holds" in result.output
    (first, *_) = open_shards(tmp_path / "out")
    assert list(first) == list(shapes("valid", 12, grid=4))[:5]


def test_the_command_says_how_many_it_left_out(tmp_path):
    path = lines_file(tmp_path, *GOOD, BAD[0][0])
    result = call("jsonl", "--from", path, "--out", tmp_path / "out", "--skip-bad", "--labels", "yes,no")
    assert "1 samples left out, listed in" in " ".join(result.output.split())
    (tmp_path / "labels.txt").write_text("yes\n\nno\n")
    result = call("jsonl", "--from", path, "--out", tmp_path / "out", "--skip-bad", "--labels", tmp_path / "labels.txt")
    assert "already holds" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nlvr"], "nlvr needs --from"),
        (["jsonl"], "jsonl needs --from"),
        (["jsonl", "--from", "nowhere.jsonl"], "expected a file of JSON lines"),
        (["jsonl", "--from", "nowhere.jsonl", "--split", "a.b"], "expected --split"),
        (["nlvr", "--from", "nowhere"], "nlvr needs --split"),
        (["nlvr", "--from", "nowhere", "--split", "dev"], "found nothing"),
        (["nlvr", "--from", ".", "--split", "../x"], "expected --split"),
        (["easy-vqa", "--grid", "4", "--seed", "1"], "got --grid, --seed, which it does not have"),
        (["easy-vqa", "--split", "dev"], "train, valid or test"),
        (["shapes", "--labels", ","], "at least one label"),
        (["shapes", "--shard-size", "0"], "--shard-size"),
        (["shapes", "--count", "2", "--labels", "ja,nein"], "unknown label: 2"),
    ],
)
def test_the_command_refuses_options_that_cannot_be(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = call(*words, "--out", tmp_path / "out")
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert os.listdir(tmp_path) == []


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "name a folder inside it" in refusal(shapes_source("train", 1), Path())
