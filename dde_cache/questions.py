"""Texts to encode or to answer: lines of JSON in the form of the `jsonl` import, or the texts of shards.

    {"image": "cats/1.jpg", "text": "is there a cat"}
    {"key": "pair-7", "images": ["a.png", "b.png"], "texts": [{"text": "both show a dog"}]}

`image` is the key of a picture in a store: a path below the folder that was encoded, or the key of a sample. Without
it, `key` names the picture. Labels, kinds and metadata may be there, and are not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from dde_cache.errors import InputError, bullet_list
from dde_cache.samples import Text, open_shards
from dde_cache.spec import Model


@dataclass(frozen=True)
class Question:
    """A text, where it stands, and the keys of its pictures: one for every image slot, or one that stands for all."""

    key: str
    slot: int
    text: str
    images: tuple[str, ...]


class QuestionLine(Model):
    """One line of a file of questions."""

    key: str | None = Field(default=None, min_length=1)
    image: str | None = Field(default=None, min_length=1)
    images: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=2)
    text: str | None = None
    texts: tuple[Text, ...] | None = Field(default=None, min_length=1)
    label: Any = None
    kind: Any = None
    meta: Any = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "QuestionLine":
        if self.image is not None and self.images is not None:
            raise ValueError("expected image or images, got both")
        if (self.text is None) == (self.texts is None):
            raise ValueError("expected either text or texts")
        if any(not text.strip() for text in self.asked):
            raise ValueError("a text holds nothing, or only white space")
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """The texts, by slot."""
        return (self.text,) if self.text is not None else tuple(text.text for text in self.texts or ())

    @property
    def pictures(self) -> tuple[str, ...]:
        """Keys of the pictures."""
        if self.images is not None:
            return self.images
        only = self.image or self.key
        return () if only is None else (only,)


def read_questions(place: str | Path) -> list[Question]:
    """Read every text of a file of lines (UTF-8), or of shards (a folder, a tar or a brace pattern).

    Raises:
        InputError: the file or the shards cannot be read, lines are malformed (all of them are listed), or there are no
            texts.
    """
    path = Path(place)
    lines = path.is_file() and path.suffix != ".tar"
    found = list(_of_lines(path)) if lines else _of_shards(place)
    if not found:
        raise InputError(f"{place}: expected texts, found none")
    return found


def _of_shards(place: str | Path) -> list[Question]:
    if not Path(place).exists() and Path(place).suffix in (".jsonl", ".json"):
        raise InputError(f"{place}: expected a file of JSON lines, or shards; no such file")
    return [
        Question(sample.key, slot, text.text, (sample.key,))
        for shard in open_shards(place)
        for sample in shard
        for slot, text in enumerate(sample.texts)
    ]


def _of_lines(path: Path) -> Iterator[Question]:
    problems: list[str] = []
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: expected a file of JSON lines: {error.strerror or error}") from error
    for number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        try:
            parsed = QuestionLine.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            problems.append(
                f"line {number}: {f'{field}: ' if field else ''}{first['msg'].removeprefix('Value error, ')}"
            )
            continue
        key = parsed.key or f"line-{number:07d}"
        yield from (Question(key, slot, text, parsed.pictures) for slot, text in enumerate(parsed.asked))
    if problems:
        raise InputError(
            f"{path}: expected one JSON object a line with text, and image where there is one; {len(problems)} lines "
            f"are not:{bullet_list(problems, 20)}"
        )
