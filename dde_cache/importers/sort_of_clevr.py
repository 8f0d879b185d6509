"""The `sort-of-clevr` source: six objects, twenty questions a picture, after Santoro et al. (2017, arXiv 1706.01427).

A picture of 75 px has one object in each of six colours on white, a circle or a square, somewhere, without overlap. Ten
questions are about one object (`shape`, `left`, `top`), ten relate it to the others (`closest`, `furthest`, `count`);
the object is named by its colour. In the paper questions are binary codes; here they are sentences.

A scene belongs to one split by a hash of its content, whatever the seed. Everything is in integers, without a tie:
no scene has two objects that are equally far from a third. Cost: about 1 ms a picture.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from dde_cache.errors import InputError
from dde_cache.importers.common import Source, found_samples
from dde_cache.importers.shapes import SPLITS, palette_png, split_of
from dde_cache.samples import EncodedImage, Sample, Text

COLOURS = ("red", "green", "blue", "orange", "gray", "yellow")
SHAPES = ("circle", "square")
SIZE = 75
"""Pixels a side; the middle pixel, as it is odd, counts as left and as top."""

REACH = 5
"""Pixels from an object's centre to its edge."""

ASKED = 10
"""Questions of each sort a picture."""

_RGB = ((255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 140, 0), (128, 128, 128), (240, 220, 0))
_PALETTE = bytes((255, 255, 255)) + bytes(channel for rgb in _RGB for channel in rgb)


class Thing(NamedTuple):
    """An object: its shape, and its centre in pixels from the left and from the top. A scene's order is by colour."""

    shape: int
    x: int
    y: int


Scene = tuple[Thing, ...]

Answer = Callable[[Scene, int], str]


def _apart(scene: Scene, number: int) -> list[tuple[int, int]]:
    """Squared distances of the other objects, with their numbers, the nearest first."""
    own = scene[number]
    others = [other for other in range(len(scene)) if other != number]
    return sorted(((scene[other].x - own.x) ** 2 + (scene[other].y - own.y) ** 2, other) for other in others)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


_ALONE: dict[str, tuple[str, Answer]] = {
    "shape": ("what is the shape of the {} object", lambda scene, one: SHAPES[scene[one].shape]),
    "left": ("is the {} object on the left", lambda scene, one: _yes(2 * scene[one].x < SIZE)),
    "top": ("is the {} object at the top", lambda scene, one: _yes(2 * scene[one].y < SIZE)),
}
_RELATED: dict[str, tuple[str, Answer]] = {
    "closest": (
        "what is the shape of the object closest to the {} object",
        lambda scene, one: SHAPES[scene[_apart(scene, one)[0][1]].shape],
    ),
    "furthest": (
        "what is the shape of the object furthest from the {} object",
        lambda scene, one: SHAPES[scene[_apart(scene, one)[-1][1]].shape],
    ),
    "count": (
        "how many objects have the shape of the {} object",
        lambda scene, one: str(sum(thing.shape == scene[one].shape for thing in scene)),
    ),
}


def sort_of_clevr(split: str, count: int, *, seed: int = 0) -> Iterator[Sample]:
    """Generate `count` pictures with twenty questions each, ten of either sort, each question once a picture.

    Raises:
        InputError: an option is out of range.
    """
    if split not in SPLITS:
        raise InputError(f"expected --split train, valid or test for sort-of-clevr, got {split!r}")
    if not 1 <= count <= 9_999_999:
        raise InputError(f"expected --count from 1 to 9999999, got {count}")
    return _generate(split, count, seed)


def _generate(split: str, count: int, seed: int) -> Iterator[Sample]:
    rng = random.Random(f"sort-of-clevr {split} {seed}")
    for number in range(count):
        scene = _make_scene(rng)
        while split_of(bytes(value for thing in scene for value in thing)) != split:
            scene = _make_scene(rng)
        texts = tuple(text for sort in (_ALONE, _RELATED) for text in _ask(scene, sort, rng))
        shown = [
            {"colour": colour, "shape": SHAPES[thing.shape], "x": thing.x, "y": thing.y}
            for colour, thing in zip(COLOURS, scene, strict=True)
        ]
        yield Sample(
            f"sort-of-clevr-{split}-{number:07d}", (EncodedImage(draw(scene), "png"),), texts, {"scene": shown}
        )


def _make_scene(rng: random.Random) -> Scene:
    """Place the objects one by one; begin again where a distance is there twice."""
    while True:
        scene: list[Thing] = []
        while len(scene) < len(COLOURS):
            x, y = (rng.randrange(REACH, SIZE - REACH) for _ in range(2))
            if all(max(abs(x - thing.x), abs(y - thing.y)) > 2 * REACH for thing in scene):
                scene.append(Thing(rng.randrange(len(SHAPES)), x, y))
        found = tuple(scene)
        far = [[distance for distance, _ in _apart(found, number)] for number in range(len(found))]
        if all(len(set(distances)) == len(distances) for distances in far):
            return found


def _ask(scene: Scene, sort: dict[str, tuple[str, Answer]], rng: random.Random) -> Iterator[Text]:
    every = [(kind, colour) for kind in sort for colour in range(len(COLOURS))]
    for kind, colour in rng.sample(every, ASKED):
        words, answer = sort[kind]
        yield Text(text=words.format(COLOURS[colour]), label=answer(scene, colour), kind=kind)


def draw(scene: Scene) -> bytes:
    """Draw a scene as a palette PNG."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    for number, thing in enumerate(scene):
        rows, columns = (slice(middle - REACH, middle + REACH + 1) for middle in (thing.y, thing.x))
        pixels[rows, columns][_stamp(thing.shape)] = number + 1
    return palette_png(pixels, _PALETTE)


@cache
def _stamp(shape: int) -> np.ndarray:
    """The pixels of an object [2 * REACH + 1, 2 * REACH + 1]; those within the reach of its centre, for a circle."""
    step = np.arange(-REACH, REACH + 1)
    square = np.ones((len(step), len(step)), bool)
    return square if shape else step[:, None] ** 2 + step[None] ** 2 <= REACH**2


def sort_of_clevr_source(split: str, count: int, *, seed: int = 0) -> Source:
    """Make the `sort-of-clevr` source of an import; the options are those of `sort_of_clevr`.

    Raises:
        InputError: see `sort_of_clevr`.
    """
    samples = sort_of_clevr(split, count, seed=seed)
    return Source("sort-of-clevr", split, {"count": count, "seed": seed}, count, found_samples(samples))
