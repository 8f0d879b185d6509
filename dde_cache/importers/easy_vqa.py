"""The `easy-vqa` source: 4,000 + 1,000 pictures with questions that ship in the PyPI package easy-vqa 1.0.

The package has the splits train and test. `valid` is one tenth of its training pictures, chosen by a hash of the
picture's number, and `train` is the rest, so no picture is in two splits.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from dde_cache.errors import InputError
from dde_cache.importers.common import Found, Source, read_image, with_image
from dde_cache.samples import Text

SPLITS = ("train", "valid", "test")
_KINDS = (
    (re.compile(r"what (is the color|color)\b"), "color"),
    (re.compile(r"what\b"), "shape"),
    (re.compile(r"(is|does)\b.*\b(no|not)\b"), "absence"),
    (re.compile(r"(is|does)\b"), "presence"),
)


def easy_vqa_source(split: str) -> Source:
    """Make the `easy-vqa` source of an import.

    Raises:
        InputError: the package is not installed, or there is no such split.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise InputError(
            "the source easy-vqa needs the package easy-vqa, which is not installed; run: pip install easy-vqa==1.0"
        ) from error
    if split not in SPLITS:
        raise InputError(f"expected --split train, valid or test for easy-vqa, got {split!r}")
    if split == "test":
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
        paths = {number: path for number, path in paths.items() if _held_out(number) == (split == "valid")}
    texts: dict[int, list[Text]] = {number: [] for number in sorted(paths)}
    for text, label, number in zip(*questions, strict=True):
        if number in texts:
            texts[number].append(Text(text=text, label=label, kind=_kind(text)))
    asked = {number: tuple(of_picture) for number, of_picture in texts.items() if of_picture}
    return Source("easy-vqa", split, {"package": "easy-vqa 1.0"}, len(asked), _find(split, asked, paths))


def _held_out(number: int) -> bool:
    return hashlib.sha256(f"easy-vqa {number}".encode()).digest()[0] < 26


def _kind(text: str) -> str | None:
    return next((kind for pattern, kind in _KINDS if pattern.match(text)), None)


def _find(split: str, asked: dict[int, tuple[Text, ...]], paths: dict[int, str]) -> Iterator[Found]:
    for number, texts in asked.items():
        path = Path(paths[number])
        found = Found(f"picture {number}", f"easy-vqa-{split}-{number}", (), texts, {"picture": number})
        yield with_image(found, read_image(path.read_bytes, found.where, str(path)))
