"""The shapes source, checked against an oracle that reads nothing but the words and the scene in meta."""

import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest

from dde_cache.errors import InputError
from dde_cache.importers.shapes import COLOURS, KINDS, SHAPES, shapes, split_of

PHRASE = r"a ((?:red |green |blue )?(?:circle|square|triangle|shape))"
EXISTS = re.compile(rf"is there {PHRASE}")
ROW = re.compile(rf"is there {PHRASE} in (?:the (top|middle|bottom) row|row (\d+))")
NEIGHBOUR = re.compile(rf"is there {PHRASE} (above|below|left of|right of) {PHRASE}")
STEPS = {"above": (1, 0), "below": (-1, 0), "left of": (0, 1), "right of": (0, -1)}


def matches(phrase, thing):
    return thing is not None and all(word in thing.split() for word in phrase.split() if word != "shape")


def places(scene, phrase):
    return {(r, c) for r, row in enumerate(scene) for c, thing in enumerate(row) if matches(phrase, thing)}


def related(scene, first, relation, second):
    down, across = STEPS[relation]
    others = places(scene, second)
    return any((r + down, c + across) in others for r, c in places(scene, first))


def oracle(scene, question):
    """Return kind, answer and, for a no, why it is a near miss (None where it is not one)."""
    if match := NEIGHBOUR.fullmatch(question):
        first, relation, second = match.groups()
        if related(scene, first, relation, second):
            return "neighbour", "yes", None
        distinct = any(a != b for a, b in product(places(scene, first), places(scene, second)))
        touching = any(related(scene, first, other, second) for other in STEPS)
        return "neighbour", "no", "touching" if touching else "apart" if distinct else None
    if match := ROW.fullmatch(question):
        row = {"top": 0, "middle": 1, "bottom": 2}[match[2]] if match[2] else int(match[3]) - 1
        rows = {r for r, _ in places(scene, match[1])}
        return ("row", "yes", None) if row in rows else ("row", "no", "other row" if rows else None)
    phrase = EXISTS.fullmatch(question)[1]
    if places(scene, phrase):
        return "exists", "yes", None
    if phrase in SHAPES or phrase.endswith("shape"):
        return "exists", "no", "none"
    colour, shape = phrase.split()
    split_up = places(scene, f"{colour} shape") and places(scene, shape)
    return "exists", "no", "colour and shape apart" if split_up else None


@pytest.fixture(scope="module")
def pictures():
    return list(shapes("train", 1500, seed=3))


def test_every_answer_agrees_with_the_oracle_and_every_no_is_as_near_as_it_can_be(pictures):
    reasons = Counter()
    for picture in pictures:
        for text in picture.texts:
            kind, answer, reason = oracle(picture.meta["scene"], text.text)
            assert (text.kind, text.label) == (kind, answer), (picture.meta, text)
            assert answer == "yes" or reason is not None, (picture.meta, text)
            reasons[kind, answer, reason] += 1
    assert reasons["neighbour", "no", "touching"] > 0.5 * reasons["neighbour", "yes", None]
    assert reasons["neighbour", "no", "apart"] > 0.2 * reasons["neighbour", "yes", None]


@pytest.mark.parametrize(("grid", "texts"), [(2, 3), (4, 7), (6, 12)])
def test_other_grids_agree_with_the_oracle(grid, texts):
    for picture in shapes("valid", 30, grid=grid, cell=8, texts=texts):
        assert len(picture.texts) == len({text.text for text in picture.texts}) == texts
        assert picture.images[0].decode().size == (grid * 8, grid * 8)
        for text in picture.texts:
            kind, answer, reason = oracle(picture.meta["scene"], text.text)
            assert (text.kind, text.label) == (kind, answer)
            assert answer == "yes" or reason is not None


def test_answers_are_balanced_for_every_kind_and_every_question(pictures):
    ahead = Counter()
    asked = Counter()
    for text in (text for picture in pictures for text in picture.texts):
        for name in (text.kind, text.text):
            ahead[name] += 1 if text.label == "yes" else -1
        asked[text.text] += 1
    assert [ahead[kind] for kind in KINDS] == [0, 0, 0]
    assert max(abs(count) for count in ahead.values()) <= 1
    assert sum(1 for count in ahead.values() if count) <= 0.05 * len(ahead)
    assert set(Counter(text.kind for picture in pictures for text in picture.texts).values()) == {3000}
    assert len(asked) == 15 + 45 + 900  # every question there is
    assert max(asked.values()) < 400


@pytest.mark.parametrize("of", ["question", "picture"])
def test_a_model_that_sees_one_side_only_gets_one_half(pictures, of):
    """Learnt on train, used on valid; for pictures, which differ, learnt on the objects' number and kinds."""
    learnt = defaultdict(Counter)

    def seen(picture, text):
        things = Counter(thing for row in picture.meta["scene"] for thing in row if thing)
        return text.text if of == "question" else (text.kind, things.total(), len(things))

    for picture in pictures:
        for text in picture.texts:
            learnt[seen(picture, text)][text.label] += 1
    right = total = 0
    for picture in shapes("valid", 500, seed=3):
        for text in picture.texts:
            counts = learnt[seen(picture, text)]
            right += max(("yes", "no"), key=lambda label, counts=counts: counts[label]) == text.label
            total += 1
    assert right / total <= 0.52


def test_position_matters(pictures):
    """Counts of the matching objects, without their places, answer existence but hardly rows and neighbours."""
    learnt = defaultdict(Counter)
    for picture in pictures:
        for text in picture.texts:
            phrases = re.findall(PHRASE, text.text)
            counts = tuple(len(places(picture.meta["scene"], phrase)) for phrase in phrases)
            learnt[text.kind, counts][text.label] += 1
    for kind, least, most in (("exists", 1, 1), ("row", 0.5, 0.7), ("neighbour", 0.5, 0.7)):
        counters = [counter for (of, _), counter in learnt.items() if of == kind]
        assert least <= sum(max(c.values()) for c in counters) / sum(c.total() for c in counters) <= most


def test_same_arguments_same_samples_and_another_seed_others():
    first, again, other = (list(shapes("test", 20, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert [sample.content_hash() for sample in first] != [sample.content_hash() for sample in other]


def test_bytes_are_the_same_on_every_machine():
    """Golden: a change here makes every cache of generated pictures stale."""
    (sample,) = shapes("train", 1)
    assert sample.key == "shapes-train-0000000"
    assert sample.content_hash().hex() == GOLDEN


GOLDEN = "8c56c44eb6ff617fba9199aeb4a219f75ec555a459c6f8a000c3b1104037c3b4"


def test_a_scene_is_in_one_split_whatever_the_seeds():
    scenes = defaultdict(set)
    keys = set()
    for split, seed in product(("train", "valid", "test"), (0, 1)):
        for picture in shapes(split, 120, seed=seed, grid=2, texts=3):
            scenes[split].add(str(picture.meta["scene"]))
            keys.add((split, picture.key))
    assert not scenes["train"] & scenes["valid"]
    assert not scenes["train"] & scenes["test"]
    assert not scenes["valid"] & scenes["test"]
    assert len({key for _, key in keys}) == 3 * 120


def test_no_scene_comes_twice(pictures):
    assert len({str(picture.meta["scene"]) for picture in pictures}) == len(pictures)


def test_splits_have_the_sizes_that_the_docs_say():
    splits = Counter(split_of(scene) for scene in product(range(4), repeat=6))  # 4,096 scenes
    assert 0.77 < splits["train"] / 4096 < 0.83
    assert min(splits["valid"], splits["test"]) > 0.08 * 4096


def test_drawn_cells_show_their_colour_and_shape():
    """The share of a cell that is painted tells the shapes apart; the strongest channel is the colour."""
    painted = defaultdict(list)
    for picture in shapes("train", 20, cell=24):
        pixels = np.asarray(picture.images[0].decode(), dtype=float)
        for (r, row), c in product(enumerate(picture.meta["scene"]), range(3)):
            block = pixels[r * 24 : r * 24 + 24, c * 24 : c * 24 + 24]
            if row[c] is None:
                assert block.max() == 0
                continue
            colour, shape = row[c].split()
            assert block.sum(axis=(0, 1)).argmax() == COLOURS.index(colour)
            painted[shape].append((block.max(axis=2) > 100).mean())
    share = {shape: np.mean(shares) for shape, shares in painted.items()}
    assert set(share) == set(SHAPES)
    assert all(np.ptp(shares) == 0 for shares in painted.values())
    assert share["triangle"] < share["circle"] < share["square"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, "train, valid or test"),
        ({"count": 0}, "--count"),
        ({"grid": 1}, "--grid"),
        ({"cell": 2}, "--cell"),
        ({"texts": 0}, "--texts"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, words):
    with pytest.raises(InputError, match=words):
        shapes(**{"split": "train", "count": 1, **options})


def test_a_grid_that_runs_out_of_scenes_says_so(monkeypatch):
    monkeypatch.setattr("dde_cache.importers.shapes._ATTEMPTS", 300)
    with pytest.raises(InputError, match="raise --grid"):
        list(shapes("valid", 3000, grid=2))
