"""The `emoji` source: pictures of Noto Emoji with their names, a small retrieval set.

    captions.jsonl   {"image": "images72/1f385_1f3fb.png", "name": ..., "aliases": [...], "group": ...,
                      "skin_tone_variant": true, "codepoints": "1f385_1f3fb"}
    images72.tar     or a folder images72

Captions: the name, and each alias that is no other emoji's alias or name. An emoji comes in skin tones, and as a
person, a man and a woman, to the left and to the right: all of them are one family, and so are pictures of the same
bytes and names that differ in skin tones alone. A family lies in one split, by a hash of its name: 80 % train, 10 %
valid, 10 % test.
"""

import contextlib
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dde_cache.errors import InputError
from dde_cache.importers.common import Found, Problem, Source, read_image, with_image
from dde_cache.importers.official import Pictures, digests, open_pictures, read_lines
from dde_cache.samples import Text
from dde_cache.spec import Model

SPLITS = ("train", "valid", "test")
_TONE = re.compile(r"( (light|medium-light|medium|medium-dark|dark) skin tone)+$")
_LOOKS = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "fe0f", "2640", "2642", "27a1", "200d"))
"""Code points of skin tones, sex and direction, of colour as against text, and the joiner."""

_MAN, _WOMAN, _PERSON = "1f468", "1f469", "1f9d1"


class Emoji(Model):
    """A line of captions.jsonl."""

    image: str = Field(min_length=1)
    name: str = Field(min_length=1)
    aliases: tuple[str, ...] = ()
    group: str = ""
    skin_tone_variant: bool = False
    codepoints: str = Field(min_length=1)


def emoji_source(split: str, where: Path) -> Source:
    """Make the `emoji` source of an import from the folder of captions.jsonl.

    Raises:
        InputError: there is no such split, or nothing to read.
    """
    if split not in SPLITS:
        raise InputError(f"expected --split train, valid or test for emoji, got {split!r}")
    path = where / "captions.jsonl"
    problems: list[Found] = []
    emoji: list[Emoji] = []
    for place, fields in read_lines(path, "--from"):
        parsed = fields if isinstance(fields, Problem) else _parse(place, fields)
        if isinstance(parsed, Problem):
            problems.append(Found(place, f"emoji-{len(emoji)}-{len(problems)}", problems=(parsed,)))
        else:
            emoji.append(parsed)
    packed = where / "images72.tar"
    pictures = open_pictures(packed if packed.is_file() else where / "images72", "--from")
    family = families(emoji, pictures)
    chosen = [one for one in emoji if split_of(family[one.codepoints]) == split]
    found = _find(
        split, chosen, family, Counter(caption for one in emoji for caption in {one.name, *one.aliases}), pictures
    )
    return Source("emoji", split, digests(captions=path), len(chosen), itertools.chain(problems, found))


def _parse(where: str, fields: Mapping[str, Any]) -> Emoji | Problem:
    try:
        return Emoji.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        return Problem("malformed line", where, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def base_of(codepoints: str) -> str:
    """Code points without skin tones, sex and direction; man and woman read as person."""
    bare = [code for code in codepoints.split("_") if code not in _LOOKS] or [codepoints]
    return "_".join(_PERSON if code in (_MAN, _WOMAN) else code for code in bare)


def families(emoji: Sequence[Emoji], pictures: Pictures) -> dict[str, str]:
    """Name the family of each emoji, by its code points: the smallest code points in it.

    Two are of one family where their code points, their names without skin tones, or their pictures are the same.
    """
    first: dict[str, str] = {}
    parent = {one.codepoints: one.codepoints for one in emoji}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for one in emoji:
        marks = [f"code {base_of(one.codepoints)}", f"name {_TONE.sub('', one.name)}"]
        with contextlib.suppress(OSError, InputError):  # reported where its sample is made
            marks.append(f"picture {hashlib.sha256(pictures.read(one.image)).hexdigest()}")
        for mark in marks:
            other = root(first.setdefault(mark, one.codepoints))
            own = root(one.codepoints)
            parent[max(own, other)] = min(own, other)
    return {name: root(name) for name in parent}


def split_of(family: str) -> str:
    """The split of a family: 80 % train, 10 % valid, 10 % test."""
    place = hashlib.sha256(f"emoji {family}".encode()).digest()[0] / 256
    return "train" if place < 0.8 else "valid" if place < 0.9 else "test"


def _find(
    split: str, emoji: Sequence[Emoji], family: Mapping[str, str], used: Mapping[str, int], pictures: Pictures
) -> Iterator[Found]:
    for one in emoji:
        own = [
            alias for alias in dict.fromkeys(one.aliases) if used[alias] == 1 and alias.strip() and alias != one.name
        ]
        texts = (Text(text=one.name, kind="name"), *(Text(text=alias, kind="alias") for alias in own))
        meta = {"codepoints": one.codepoints, "family": family[one.codepoints], "group": one.group}
        found = Found(one.image, f"emoji-{split}-{one.codepoints}", (), texts, meta)
        yield with_image(found, read_image(lambda one=one: pictures.read(one.image), one.image, one.image))  # type: ignore[misc]
