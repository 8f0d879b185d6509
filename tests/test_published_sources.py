"""The sources that others published: easy-vqa and NLVR."""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from dde_cache.errors import InputError
from dde_cache.importers.common import import_samples
from dde_cache.importers.easy_vqa import easy_vqa_source
from dde_cache.importers.nlvr import nlvr_source
from dde_cache.samples import open_shards, read_index

NLVR = Path(__file__).parents[2] / "shared" / "data" / "nlvr"
needs_shared = pytest.mark.skipif(not NLVR.is_dir(), reason=f"needs {NLVR}")


def test_easy_vqa_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"pip install easy-vqa==1\.0"):
        easy_vqa_source("train")


def test_easy_vqa_splits_by_picture(tmp_path):
    easy_vqa = pytest.importorskip("easy_vqa")
    sources = {split: easy_vqa_source(split) for split in ("train", "valid", "test")}
    assert sources["train"].total + sources["valid"].total == len(easy_vqa.get_train_image_paths())
    assert 0.08 < sources["valid"].total / 4000 < 0.12
    import_samples(sources["valid"], tmp_path / "out", labels=easy_vqa.get_answers())
    index = read_index(tmp_path / "out")
    assert index.kinds == ("absence", "color", "presence", "shape")
    held_out = {one.meta["picture"] for shard in open_shards(tmp_path / "out") for one in shard}
    assert held_out.isdisjoint(found.meta["picture"] for found in list_without_pictures(sources["train"]))
    kinds = defaultdict(set)
    for text in (text for shard in open_shards(tmp_path / "out") for one in shard for text in one.texts):
        kinds[text.kind].add(text.label)
        assert ("no" in text.text.split() or "not" in text.text.split()) == (text.kind == "absence")
    assert kinds["absence"] == kinds["presence"] == {"yes", "no"}
    assert kinds["shape"] == {"circle", "rectangle", "triangle"}


def list_without_pictures(source):
    """Only the first hundred: reading the rest takes seconds."""
    return [found for found, _ in zip(source.found, range(100), strict=False)]


def small_nlvr(folder, examples=2, split="dev", lacking=True):
    """A tiny folder in the official layout; unless nothing is lacking, the second example lacks its last picture."""
    box = [{"type": "square", "x_loc": 40, "y_loc": 80, "size": 20, "color": "Yellow"}]
    (folder / split / "images" / "3").mkdir(parents=True)
    lines = []
    for number in range(examples):
        boxes = [box, box, box] if number else [box, [{**box[0], "type": "circle"}], box]
        label = "false" if number else "true"
        lines.append({"sentence": f"s{number}", "label": label, "identifier": f"{number}-9", "structured_rep": boxes})
        for permutation in range(6 - number * lacking):
            name = f"{split}-{number}-9-{permutation}.png"
            Image.new("RGB", (40, 10), (permutation, number, 0)).save(folder / split / "images" / "3" / name)
    (folder / split / f"{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_nlvr_keeps_the_example_of_each_picture(tmp_path):
    folder = small_nlvr(tmp_path / "nlvr", examples=1)
    tar = shutil.make_archive(str(tmp_path / "packed"), "tar", folder)
    for name, where in (("one", folder), ("two", folder / "dev"), ("three", Path(tar))):
        import_samples(nlvr_source("dev", where), tmp_path / name)
        (shard,) = open_shards(tmp_path / name)
        assert shard.keys == [f"nlvr-dev-0-9-{permutation}" for permutation in range(6)]
        sample = shard.read("nlvr-dev-0-9-4")
        assert sample.meta == {"example": "0-9", "permutation": 4}
        assert sample.images[0].decode().getpixel((0, 0)) == (4, 0, 0)
        assert [(text.text, text.label, text.kind) for text in sample.texts] == [("s0", "true", "scatter")]


def test_nlvr_problems(tmp_path):
    folder = small_nlvr(tmp_path / "nlvr")
    with open(folder / "dev" / "dev.json", "a") as file:
        file.write('{"sentence": "x"}\n[]\n{\n{"identifier": [1], "structured_rep": []}\n')
    with pytest.raises(InputError) as error:
        import_samples(nlvr_source("dev", folder), tmp_path / "out")
    message = str(error.value)
    assert "malformed line: 4\n" in message
    assert "missing image: 1\n  - dev.json line 2: 'dev/images/.../dev-1-9-5.png' does not exist" in message
    with pytest.raises(InputError, match=r"expected test/test\.json, found dev"):
        nlvr_source("test", folder)
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match="uncompressed tar"):
        nlvr_source("dev", tmp_path / "x.tar")


@needs_shared
def test_nlvr_as_it_is_published():
    source = nlvr_source("dev", NLVR / "dev.tar")
    assert source.total == 989 * 6
    found = [one for one, _ in zip(source.found, range(60), strict=False)]
    assert not any(one.problems for one in found)
    assert {one.images[0].decode().size for one in found} == {(400, 100)}
    assert {text.kind for one in found for text in one.texts} == {"tower", "scatter"}
