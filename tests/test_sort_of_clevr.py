"""The sort-of-clevr source, against an oracle that reads the words and the pixels, not the generator's scene."""

import io
import math
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pipeline import cli, tree

from dde_cache.errors import InputError
from dde_cache.importers.sort_of_clevr import sort_of_clevr
from dde_cache.samples import open_shards

RGB = {
    "red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "orange": (255, 140, 0), "gray": (128, 128, 128),
    "yellow": (240, 220, 0),
}  # fmt: skip
ALONE, RELATED = {"shape", "left", "top"}, {"closest", "furthest", "count"}


@pytest.fixture(scope="module")
def pictures():
    return list(sort_of_clevr("train", 150, seed=2))


def seen(sample):
    """Colour -> (shape, centre) as a picture shows them: a square fills its box, a circle 81 of 121 pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(sample.images[0].content)).convert("RGB"))
    assert pixels.shape == (75, 75, 3)
    found = {}
    for colour, rgb in RGB.items():
        rows, columns = np.nonzero((pixels == rgb).all(-1))
        assert (np.ptp(rows), np.ptp(columns)) == (10, 10), "whole and apart"
        middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        found[colour] = ({121: "square", 81: "circle"}[len(rows)], middle)
    assert (pixels == 255).all(-1).sum() == 75 * 75 - sum({"square": 121, "circle": 81}[s] for s, _ in found.values())
    return found


def oracle(objects, question):
    colour = re.search(r"the (\w+) object(?: on the left| at the top)?$", question)[1]
    shape, own = objects[colour]
    others = sorted((math.dist(own, place), other) for name, (other, place) in objects.items() if name != colour)
    if question.startswith("is the"):
        side = own[0] if question.endswith("on the left") else own[1]
        return ("left" if question.endswith("left") else "top"), "yes" if side < 37 else "no" if side > 37 else None
    if "closest to" in question:
        return "closest", others[0][1]
    if "furthest from" in question:
        return "furthest", others[-1][1]
    if question.startswith("how many"):
        return "count", str([one for one, _ in objects.values()].count(shape))
    return "shape", shape


def test_every_answer_is_what_the_picture_shows(pictures):
    for sample in pictures:
        objects = seen(sample)
        for text in sample.texts:
            kind, answer = oracle(objects, text.text)
            if answer is None:  # the middle pixel of an odd side belongs to the left and to the top
                answer = "yes"
            assert (text.kind, text.label) == (kind, answer), (sample.key, text.text)


def test_ten_questions_of_each_sort_each_once(pictures):
    for sample in pictures:
        kinds = Counter("alone" if text.kind in ALONE else "related" for text in sample.texts)
        assert kinds == {"alone": 10, "related": 10}
        assert len({text.text for text in sample.texts}) == 20


def test_every_kind_and_answer_comes(pictures):
    kinds = Counter((text.kind, text.label) for sample in pictures for text in sample.texts)
    assert {kind for kind, _ in kinds} == ALONE | RELATED
    assert {label for kind, label in kinds if kind == "count"} >= {"2", "3", "4"}
    for kind, labels in (("shape", ("circle", "square")), ("left", ("yes", "no")), ("closest", ("circle", "square"))):
        share = kinds[kind, labels[0]] / sum(kinds[kind, label] for label in labels)
        assert 0.4 < share < 0.6


def test_the_same_seed_gives_the_same_samples_and_splits_share_none(pictures):
    again = list(sort_of_clevr("train", 150, seed=2))
    assert again == pictures
    assert [one.images for one in sort_of_clevr("train", 5, seed=3)] != [one.images for one in pictures[:5]]
    test = {one.images[0].content for one in sort_of_clevr("test", 20, seed=2)}
    assert not test & {one.images[0].content for one in pictures}


@pytest.mark.parametrize(("split", "count", "words"), [("dev", 1, "train, valid or test"), ("train", 0, "--count")])
def test_options_out_of_range_are_refused_at_once(split, count, words):
    with pytest.raises(InputError, match=words):
        sort_of_clevr(split, count)


def test_it_is_imported_by_the_command(tmp_path):
    command = ("data", "import", "sort-of-clevr", "--split", "test", "--count", 3, "--seed", 1, "--out")
    for name in ("a", "b"):
        done = cli(*command, tmp_path / name)
        assert done.code == 0, done.err
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert [len(sample.texts) for shard in open_shards(tmp_path / "a") for sample in shard] == [20] * 3
    assert "which it does not have" in cli(*command, tmp_path / "c", "--grid", 3).message
