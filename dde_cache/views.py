"""Views: augmentations of a sample's pictures that can be drawn again, pixel for pixel.

A view is a pure function of (recipe, key, view, image slot): its random numbers are SHA-256 of those, so that they do
not depend on a library's version. Pillow's filters may; the hash of a view's pixels shows it. A view has the size of
its picture, so that all views of a picture have one patch grid. docs/views.md says what is in a recipe, and why.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dde_cache.errors import InputError
from dde_cache.spec import HASH_BYTES

AS_PROCESSED = "as-processed"
"""No views: the processor alone."""

PIXEL_HASH = "sha256-8 of 8-bit levels v1"
"""How `pixel_hash` makes its bytes: what `spec.groups["views"]["hash"]` says."""

_OPERATIONS_A_VIEW = 2
_STRENGTH = 9 / 30
"""RandAugment's magnitude 9, of 30 (arXiv 1909.13719): the share of each operation's range that is used."""

_SHEAR, _SHIFT, _ANGLE, _BLEND, _POSTERIZE = (_STRENGTH * most for most in (0.3, 1 / 3, 30.0, 0.9, 4.0))
_LEAST_AREA = 0.5
_GREY = (128, 128, 128)
"""What comes in from outside of the picture: no colour, and near 0 for the model."""


@dataclass(frozen=True)
class Operation:
    """One row of RandAugment's table: a picture and a sign (1 or -1) -> a picture of the same size."""

    name: str
    apply: Callable[[Image.Image, int], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.NEAREST, fillcolor=_GREY
    )


def _rotate(image: Image.Image, sign: int) -> Image.Image:
    return image.rotate(sign * _ANGLE, resample=Image.Resampling.NEAREST, fillcolor=_GREY)


def _sharpen(image: Image.Image, sign: int) -> Image.Image:
    return Image.blend(image.filter(ImageFilter.SMOOTH), image, 1 + sign * _BLEND)


_GEOMETRY = (
    Operation("shear x", lambda image, sign: _affine(image, (1, sign * _SHEAR, 0, 0, 1, 0))),
    Operation("shear y", lambda image, sign: _affine(image, (1, 0, 0, sign * _SHEAR, 1, 0))),
    Operation("shift x", lambda image, sign: _affine(image, (1, 0, sign * _SHIFT * image.width, 0, 1, 0))),
    Operation("shift y", lambda image, sign: _affine(image, (1, 0, 0, 0, 1, sign * _SHIFT * image.height))),
    Operation("rotate", _rotate),
    Operation("sharpness", _sharpen),
)

# Blends towards grey or black alone, which keep every hue: away from it channels are cut at 255, orange turns yellow.
COLOURS_KEPT = (
    *_GEOMETRY,
    Operation("saturation", lambda image, _sign: ImageEnhance.Color(image).enhance(1 - _BLEND)),
    Operation("contrast", lambda image, _sign: ImageEnhance.Contrast(image).enhance(1 - _BLEND)),
    Operation("brightness", lambda image, _sign: ImageEnhance.Brightness(image).enhance(1 - _BLEND)),
)

COLOURS_FREE = (
    *_GEOMETRY,
    Operation("saturation", lambda image, sign: ImageEnhance.Color(image).enhance(1 + sign * _BLEND)),
    Operation("contrast", lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + sign * _BLEND)),
    Operation("brightness", lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + sign * _BLEND)),
    Operation("autocontrast", lambda image, _sign: ImageOps.autocontrast(image)),
    Operation("equalize", lambda image, _sign: ImageOps.equalize(image)),
    Operation("solarize", lambda image, _sign: ImageOps.solarize(image, round(256 * (1 - _STRENGTH)))),
    Operation("posterize", lambda image, _sign: ImageOps.posterize(image, 8 - round(_POSTERIZE))),
)
"""The operations of ViLT's training: no inverted colours, no cut-outs."""


@dataclass(frozen=True)
class ViewRecipe:
    """How a view is drawn, in this order: crop, flip, two operations of RandAugment. `str` of it stands in `spec.view`.

    Attributes:
        randaugment: whether the two operations are there.
        colours: whether colours must stay what a text may call them.
        sides: whether left must stay left.
        crop: whether a part of half the area or more is cut out and brought to the picture's size.
    """

    randaugment: bool = True
    colours: bool = True
    sides: bool = True
    crop: bool = False

    def __str__(self) -> str:
        kept = {True: "kept", False: "free"}
        name = "randaugment-2-9" if self.randaugment else "plain"
        return f"{name} v1, colours {kept[self.colours]}, sides {kept[self.sides]}{', cropped' if self.crop else ''}"

    def __call__(self, image: Image.Image, key: str, view: int, slot: int = 0) -> Image.Image:
        """Draw a view of an RGB picture; it has the picture's size.

        Args:
            image: as `EncodedImage.decode` gives it.
            key: of the sample.
            view: number of the view.
            slot: which picture of the sample.
        """
        draw = draws(f"{self}\n{key}\n{view}\n{slot}")
        if self.crop:
            image = _crop(image, next(draw), next(draw), next(draw))
        if not self.sides and next(draw) < 0.5:
            image = ImageOps.mirror(image)
        if self.randaugment:
            table = COLOURS_KEPT if self.colours else COLOURS_FREE
            for _ in range(_OPERATIONS_A_VIEW):
                operation = table[int(next(draw) * len(table))]
                image = operation.apply(image, 1 if next(draw) < 0.5 else -1)
        return image


PUBLISHED = ViewRecipe(colours=False)
"""What the authors trained with, in our magnitudes."""

RECIPES: Mapping[str, ViewRecipe | None] = {
    AS_PROCESSED: None,
    "randaugment-2-9": ViewRecipe(),
    "randaugment-2-9-published": PUBLISHED,
    "randaugment-2-9-crop-flip": ViewRecipe(sides=False, crop=True),
    "crop": ViewRecipe(randaugment=False, crop=True),
    "flip": ViewRecipe(randaugment=False, sides=False),
}
"""Recipes by the short names that options take."""

DEFAULT_RECIPE = "randaugment-2-9"
"""Where more than one view is asked for and no recipe is named: texts of every task may name colours and sides."""

_FORM = re.compile(r"(randaugment-2-9|plain) v1, colours (kept|free), sides (kept|free)(, cropped)?")


def parse_recipe(text: str) -> ViewRecipe | None:
    """Read a recipe from its short name, or from what `spec.view` says; None: as processed.

    Raises:
        InputError: no recipe of this version; replaying another one would give other pixels than the teacher saw.
    """
    if text in RECIPES:
        return RECIPES[text]
    form = _FORM.fullmatch(text)
    if form is None:
        raise InputError(
            f"expected a recipe of views that this version can replay ({', '.join(RECIPES)}), got {text[:100]!r}; "
            "update dde-cache, or extract again"
        )
    name, colours, sides, crop = form.groups()
    return ViewRecipe(name != "plain", colours == "kept", sides == "kept", crop is not None)


def recipe_name(recipe: ViewRecipe | None) -> str:
    """What `spec.view` says of a recipe."""
    return AS_PROCESSED if recipe is None else str(recipe)


def recipe_in_full(view: Any) -> Any:
    """What `spec.view` says of a recipe; what is no text stays as it is, for whoever checks types.

    Raises:
        ValueError: there is no such recipe (pydantic turns it into one of its own problems).
    """
    if not isinstance(view, str):
        return view
    try:
        return recipe_name(parse_recipe(view))
    except InputError as error:
        raise ValueError(str(error)) from error


def draws(seed: str) -> Iterator[float]:
    """Random numbers from 0 to below 1, of 53 bits each: SHA-256 of the seed and a counter."""
    number = 0
    while True:
        digest = hashlib.sha256(f"{seed}\n{number}".encode()).digest()
        yield (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
        number += 1


def _crop(image: Image.Image, area: float, across: float, down: float) -> Image.Image:
    """Cut out a part of the picture's own proportions and bring it to the picture's size."""
    side = (_LEAST_AREA + (1 - _LEAST_AREA) * area) ** 0.5
    width, height = (max(1, round(side * length)) for length in image.size)
    left, top = int(across * (image.width - width + 1)), int(down * (image.height - height + 1))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def pixel_hash(levels: UInt8[np.ndarray, "c y x"]) -> bytes:
    """Eight bytes that change with any pixel: SHA-256 over height and width (4 bytes each, little endian) and levels.

    Args:
        levels: a processed picture in 8 bits (`Preprocessor.levels`).
    """
    digest = hashlib.sha256()
    for side in levels.shape[1:]:
        digest.update(side.to_bytes(4, "little"))
    digest.update(np.ascontiguousarray(levels).tobytes())
    return digest.digest()[:HASH_BYTES]


def view_of(seed: int, epoch: int, key: str, views: int) -> int:
    """Which view of a sample an epoch takes: each comes once in every `views` epochs, from a place of its own.

    Args:
        seed: of the training run.
        epoch: from 0.
        key: of the sample.
        views: how many there are.
    """
    return (_number(f"view\n{seed}\n{key}") + epoch) % views


def is_mirrored(seed: int, epoch: int, key: str) -> bool:
    """Whether an epoch takes the mirror image of a sample, where that is asked for: every other one."""
    return _number(f"mirror\n{seed}\n{epoch}\n{key}") % 2 == 1


def is_spot_checked(key: str) -> bool:
    """Whether the pixels of a sample are checked whenever they are drawn: one sample in a hundred, by its key."""
    return _number(f"spot check\n{key}") % 100 == 0


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def group_arrays(
    sample: Sequence[int] | np.ndarray, view: Sequence[int] | np.ndarray, hashes: UInt8[np.ndarray, "r s 8"]
) -> dict[str, np.ndarray]:
    """The arrays of a unit's `views` group, one row for each (sample, image, view) that is there.

    Args:
        sample: number of the sample of each row that was read; rows of one sample and view have equal hashes.
        view: its view.
        hashes: of its pictures, by image slot.
    """
    places = np.stack([np.asarray(sample, np.int64), np.asarray(view, np.int64)], axis=1)
    found, first = np.unique(places, axis=0, return_index=True)
    slots = hashes.shape[1]
    rows = np.concatenate(
        [np.column_stack([found[:, 0], np.full(len(found), slot), found[:, 1]]) for slot in range(slots)]
    )
    pixels = np.concatenate([hashes[first, slot] for slot in range(slots)])
    order = np.lexsort(rows.T[::-1])
    return {
        "views/sample": rows[order, 0].astype(np.uint32),
        "views/image": rows[order, 1].astype(np.uint8),
        "views/view": rows[order, 2].astype(np.uint16),
        "views/pixels": np.ascontiguousarray(pixels[order]),
    }
