"""The `shapes` source: generated pictures with yes/no questions, after SHAPES (Andreas et al., 2016).

A picture is a grid of red, green and blue circles, squares and triangles on black, some cells empty. Three kinds of
question are asked: `exists`, `row` and `neighbour`. Every "no" is a near miss: the colour and the shape both exist but
on different objects, the object exists in another row, the two objects exist but stand differently. (Only whether a
colour alone or a shape alone exists has no near miss.) An answer is accepted only while it is not ahead of the other
one, for the kind and for the exact text, so a model that reads only the question, or sees only the picture, gets one
half.

A scene belongs to one split by a hash of its content, whatever the seed. Pictures are drawn in integers and stored
without compression, so the same arguments give the same bytes on every machine. Cost: about 0.8 ms a picture.
"""

import hashlib
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dde_cache.errors import InputError
from dde_cache.importers.common import Source, found_samples
from dde_cache.samples import EncodedImage, Sample, Text

COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square", "triangle")
KINDS = ("exists", "row", "neighbour")
RELATIONS = ("above", "below", "left of", "right of")
SPLITS = ("train", "valid", "test")

_RGB = ((230, 45, 45), (40, 190, 70), (60, 95, 245))
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
_FINE = 4  # sub-pixels a side, so 16 levels of coverage
_LEVELS = _FINE * _FINE
_ATTEMPTS = 20_000
_ADJACENT_SHARE = 1 / 2  # of the neighbour negatives: the two objects touch, but in another direction

# An object is 1 + 3 * colour + shape, an empty cell 0. A phrase is 0..8 for colour and shape, 9..11 for a colour
# alone ("red shape"), 12..14 for a shape alone ("circle").
Scene = tuple[int, ...]
Question = tuple[str | int, ...]
_OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
_PHRASES = (*_OBJECTS, *(f"{colour} shape" for colour in COLOURS), *SHAPES)
_PHRASES_OF = ((), *((thing, 9 + thing // 3, 12 + thing % 3) for thing in range(9)))


def shapes(
    split: str,
    count: int,
    *,
    seed: int = 0,
    grid: int = 3,
    cell: int = 12,
    texts: int = 6,
    kinds: Sequence[str] = KINDS,
) -> Iterator[Sample]:
    """Generate `count` pictures of `grid` x `grid` cells of `cell` pixels with `texts` questions each.

    The questions of a picture take their kinds from `kinds` in turn; a kind that stands there twice is asked twice as
    often.

    Raises:
        InputError: an option is out of range, or (while iterating) the grid is too small for so many scenes.
    """
    if split not in SPLITS:
        raise InputError(f"expected --split train, valid or test for shapes, got {split!r}")
    limits = {"count": (count, 1, 9_999_999), "grid": (grid, 2, 64), "cell": (cell, 4, 256), "texts": (texts, 1, 60)}
    for name, (number, least, most) in limits.items():
        if not least <= number <= most:
            raise InputError(f"expected --{name} from {least} to {most}, got {number}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"expected --kinds of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
    return _generate(split, count, seed, grid, cell, texts, tuple(kinds))


def _generate(
    split: str, count: int, seed: int, grid: int, cell: int, texts: int, kinds: tuple[str, ...]
) -> Iterator[Sample]:
    rng = random.Random(" ".join(map(str, ("shapes", split, seed, grid, texts, *(kinds if kinds != KINDS else ())))))
    balance = _Balance(rng)
    seen: set[Scene] = set()
    for number in range(count):
        for _ in range(_ATTEMPTS):
            scene = _make_scene(rng, grid)
            if scene in seen or split_of(scene) != split:
                continue
            asked = _ask(scene, grid, [kinds[number % len(kinds)] for number in range(texts)], balance, rng)
            if asked is not None:
                break
        else:
            raise InputError(
                f"after {number} pictures no new scene of {grid} x {grid} cells with {texts} balanced questions was "
                f"found for split {split!r}; lower --count or --texts, or raise --grid"
            )
        seen.add(scene)
        rows = [[_OBJECTS[thing - 1] if thing else None for thing in row] for row in _rows(scene, grid)]
        image = EncodedImage(draw(scene, grid, cell), "png")
        yield Sample(f"shapes-{split}-{number:07d}", (image,), asked, {"scene": rows})


def split_of(scene: Sequence[int]) -> str:
    """Return the one split that a scene belongs to: 80 % train, 10 % valid, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(bytes(scene)).digest()[:8]) % 10
    return "valid" if bucket == 8 else "test" if bucket == 9 else "train"


def _rows(scene: Scene, grid: int) -> list[Scene]:
    return [scene[start : start + grid] for start in range(0, grid * grid, grid)]


def _make_scene(rng: random.Random, grid: int) -> Scene:
    """Place grid + 1 to 3 * grid - 1 objects, most beside another, of 3 to 7 of the nine combinations.

    Few combinations leave near misses for `exists`; neighbours would be rare on large grids without the clusters.
    """
    cells = [0] * (grid * grid)
    things = rng.sample(range(1, 10), rng.randint(3, 7))
    empty = set(range(grid * grid))
    filled: list[int] = []
    for _ in range(rng.randint(grid + 1, min(3 * grid, grid * grid) - 1)):
        place = None
        if filled and rng.random() < 0.6:
            beside = [near for near in _beside(rng.choice(filled), grid) if near in empty]
            place = rng.choice(beside) if beside else None
        while place is None or place not in empty:
            place = rng.randrange(grid * grid)
        empty.remove(place)
        filled.append(place)
        cells[place] = rng.choice(things)
    return tuple(cells)


@cache
def _beside(place: int, grid: int) -> tuple[int, ...]:
    row, column = divmod(place, grid)
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return tuple(r * grid + c for r, c in steps if 0 <= r < grid and 0 <= c < grid)


class _Balance:
    """Counts of answers per kind and per question; the only state of the generator besides its random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.ahead: Counter[str | Question] = Counter()  # "yes" minus "no"
        self._asked: Counter[Question] = Counter()

    def next_answer(self, kind: str) -> str:
        """Return the answer that is behind for this kind, or toss a coin."""
        ahead = self.ahead[kind] or self._rng.choice((-1, 1))
        return "no" if ahead > 0 else "yes"

    def choose(self, candidates: list[Question], answer: str) -> Question | None:
        """Choose a question whose `answer` is not ahead: first one that is owed it, then the least asked."""
        sign = 1 if answer == "yes" else -1
        best: list[Question] = []
        least = (2, 0)
        for question in candidates:
            ahead = sign * self.ahead[question]
            rank = (ahead, self._asked[question])
            if ahead <= 0 and rank <= least:
                if rank < least:
                    best, least = [], rank
                best.append(question)
        return self._rng.choice(best) if best else None

    def record(self, questions: list[tuple[Question, str]], sign: int = 1) -> None:
        """Count questions in, or out again with `sign` -1."""
        for question, answer in questions:
            step = sign if answer == "yes" else -sign
            self.ahead[question] += step
            self.ahead[str(question[0])] += step
            self._asked[question] += sign


def _ask(
    scene: Scene, grid: int, kinds: Sequence[str], balance: _Balance, rng: random.Random
) -> tuple[Text, ...] | None:
    """Choose balanced questions for a scene, or None where it offers too few."""
    facts = _Facts.of(scene, grid)
    finders: dict[str, Callable[[str], list[Question]]] = {
        "exists": facts.exists,
        "row": facts.row,
        "neighbour": lambda answer: facts.neighbour(answer, touching=rng.random() < _ADJACENT_SHARE),
    }
    chosen: list[tuple[Question, str]] = []
    taken: set[Question] = set()
    for kind in kinds:
        answer = balance.next_answer(kind)
        candidates = [question for question in finders[kind](answer) if question not in taken]
        question = balance.choose(candidates, answer)
        if question is None:
            balance.record(chosen, sign=-1)
            return None
        balance.record([(question, answer)])
        chosen.append((question, answer))
        taken.add(question)
    return tuple(Text(text=_words(question, grid), label=answer, kind=str(question[0])) for question, answer in chosen)


@dataclass(frozen=True)
class _Facts:
    """What is true of a scene: where each phrase matches, and which phrases stand in which relation."""

    grid: int
    places: dict[int, set[int]]
    related: dict[str, set[tuple[int, int]]]

    @classmethod
    def of(cls, scene: Scene, grid: int) -> "_Facts":
        places: dict[int, set[int]] = {}
        related: dict[str, set[tuple[int, int]]] = {relation: set() for relation in RELATIONS}
        for place, thing in enumerate(scene):
            for phrase in _PHRASES_OF[thing]:
                places.setdefault(phrase, set()).add(place)
            if not thing:
                continue
            right = scene[place + 1] if (place + 1) % grid else 0
            below = scene[place + grid] if place + grid < len(scene) else 0
            for relation, other in (("left of", right), ("above", below)):
                for second in _PHRASES_OF[other]:
                    for first in _PHRASES_OF[thing]:
                        related[relation].add((first, second))
                        related[_OPPOSITE[relation]].add((second, first))
        return cls(grid, places, related)

    def exists(self, answer: str) -> list[Question]:
        """A "no" to colour and shape together is a near miss: both exist, on different objects.

        Colour or shape alone has no near miss; it is asked all the same, since it is what a model learns first.
        """
        if answer == "yes":
            return [("exists", phrase) for phrase in range(len(_PHRASES)) if phrase in self.places]
        return [
            ("exists", phrase)
            for phrase in range(len(_PHRASES))
            if phrase not in self.places
            and (phrase >= 9 or (9 + phrase // 3 in self.places and 12 + phrase % 3 in self.places))
        ]

    def row(self, answer: str) -> list[Question]:
        found: list[Question] = []
        for phrase in sorted(self.places):
            rows = {place // self.grid for place in self.places[phrase]}
            found += [("row", phrase, row) for row in range(self.grid) if (row in rows) == (answer == "yes")]
        return found

    def neighbour(self, answer: str, touching: bool) -> list[Question]:
        """For a "no", pairs that touch in another direction, or (not `touching`) that do not touch at all."""
        found: list[Question] = []
        pairs: set[tuple[int, int]] = set()
        if answer == "no":
            pairs = set().union(*self.related.values())
            if not touching:
                pairs = self._present_pairs() - pairs
        for relation in RELATIONS:
            holds = self.related[relation]
            for first, second in sorted(pairs - holds if answer == "no" else holds):
                found.append(("neighbour", first, relation, second))
        return found

    def _present_pairs(self) -> set[tuple[int, int]]:
        return {
            (first, second)
            for first, places in self.places.items()
            for second, others in self.places.items()
            if len(places) > 1 or len(others) > 1 or places != others
        }


@cache
def _words(question: Question, grid: int) -> str:
    start = f"is there a {_PHRASES[int(question[1])]}"
    if question[0] == "row":
        row = int(question[2])
        where = f"the {('top', 'middle', 'bottom')[row]} row" if grid == 3 else f"row {row + 1}"
        return f"{start} in {where}"
    if question[0] == "neighbour":
        return f"{start} {question[2]} a {_PHRASES[int(question[3])]}"
    return start


def draw(scene: Scene, grid: int, cell: int) -> bytes:
    """Draw a scene as a palette PNG of (grid * cell) x (grid * cell) pixels, with smooth edges."""
    stamps = _stamps(cell)
    pixels = np.block([[stamps[thing] for thing in row] for row in _rows(scene, grid)])
    return palette_png(pixels, _PALETTE)


@cache
def _stamps(cell: int) -> tuple[np.ndarray, ...]:
    """Draw every object once as palette indices [cell, cell], in integers: eighths of a pixel."""
    middle = _FINE * cell
    reach = middle - 2 * _FINE * max(1, cell // 12)
    points = 2 * np.arange(_FINE * cell) + 1 - middle
    across, down = points[None, :], points[:, None]
    inside = (
        across**2 + down**2 <= reach**2,
        (abs(across) <= reach) & (abs(down) <= reach),
        (abs(down) <= reach) & (2 * abs(across) <= down + reach),
    )
    covered = [mask.reshape(cell, _FINE, cell, _FINE).sum(axis=(1, 3)) for mask in inside]
    drawn = [
        np.where(level > 0, colour * _LEVELS + level, 0).astype(np.uint8) for colour in range(3) for level in covered
    ]
    return (np.zeros((cell, cell), np.uint8), *drawn)


def palette_png(pixels: np.ndarray, palette: bytes) -> bytes:
    """Encode palette indices [height, width] as PNG, uncompressed: zlib's output differs between its versions."""
    height, width = pixels.shape
    raw = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    blocks = [raw[start : start + 65535] for start in range(0, len(raw), 65535)]
    stream = b"\x78\x01"
    for block in blocks:
        stream += struct.pack("<BHH", block is blocks[-1], len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(raw))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"IDAT", stream),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


_PALETTE = bytes(3) + bytes(
    (channel * level + _LEVELS // 2) // _LEVELS for rgb in _RGB for level in range(1, _LEVELS + 1) for channel in rgb
)


def shapes_source(
    split: str,
    count: int,
    *,
    seed: int = 0,
    grid: int = 3,
    cell: int = 12,
    texts: int = 6,
    kinds: Sequence[str] = KINDS,
) -> Source:
    """Make the `shapes` source of an import; the options are those of `shapes`.

    Raises:
        InputError: see `shapes`.
    """
    samples = shapes(split, count, seed=seed, grid=grid, cell=cell, texts=texts, kinds=kinds)
    arguments = {"count": count, "seed": seed, "grid": grid, "cell": cell, "texts": texts, "kinds": list(kinds)}
    return Source("shapes", split, arguments, count, found_samples(samples))
