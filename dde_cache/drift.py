"""Pixels that are not those that the teacher saw: another version of an image library draws a view otherwise."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from dde_cache.errors import CacheError, PixelDrift
from dde_cache.layout import VIEW_COLUMNS
from dde_cache.unit import Unit
from dde_cache.views import pixel_hash

LIBRARIES = ("pillow", "transformers", "numpy")
"""What turns a picture's bytes into what a model reads."""


def versions() -> dict[str, str]:
    """Versions of what makes targets, here."""
    return {name: version(name) for name in ("dde-cache", "torch", "transformers", "zarr", "numpy", "pillow")}


class PixelHashes:
    """The hashes of the pixels that the teacher saw, of one unit.

    Args:
        unit: opened, with a `views` group.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    @cached_property
    def _rows(self) -> Mapping[int, int]:
        columns = (self._unit.array(f"views/{name}").astype(np.int64) for name in VIEW_COLUMNS)
        numbers = _number(*columns)
        return dict(zip(numbers.tolist(), range(len(numbers)), strict=True))

    @cached_property
    def _pixels(self) -> np.ndarray:
        return self._unit.array("views/pixels")

    def check(self, sample: int, key: str, view: int, levels: Sequence[np.ndarray]) -> None:
        """Compare a view with what the teacher saw.

        Args:
            sample: its number in the unit.
            key: its key.
            view: number of the view.
            levels: its processed pictures in 8 bits, by image slot.

        Raises:
            PixelDrift: other pixels.
            CacheError: the unit does not have the hash.
        """
        self.compare(sample, key, view, [pixel_hash(picture) for picture in levels])

    def compare(self, sample: int, key: str, view: int, hashes: Sequence[bytes]) -> None:
        """The same, of hashes by image slot.

        Raises:
            PixelDrift, CacheError: as `check` does.
        """
        for slot, here in enumerate(hashes):
            row = self._rows.get(_number(sample, slot, view))
            if row is None:
                raise CacheError(
                    f"{self._unit.path}: expected a pixel hash of image {slot} of sample {key!r} in view {view}, found "
                    "none; run `dde-cache verify`"
                )
            stored = self._pixels[row].tobytes()
            if stored != here:
                raise PixelDrift(
                    f"sample {key!r}, view {view}, image {slot}: expected the pixels that the teacher saw "
                    f"({stored.hex()}), got others ({here.hex()}); {_sides(self._unit.attributes.provenance.versions)}"
                )


def _number(sample: Any, image: Any, view: Any) -> Any:
    """One number for sample, image slot and view (16 bits), of integers or arrays."""
    return sample << 24 | image << 16 | view


def _sides(made_with: Mapping[str, str]) -> str:
    """The libraries of both sides, and what to do."""
    here = versions()
    there = ", ".join(f"{name} {made_with.get(name, 'unknown')}" for name in LIBRARIES)
    ours = ", ".join(f"{name} {here[name]}" for name in LIBRARIES)
    same = all(made_with.get(name) == here[name] for name in LIBRARIES)
    advice = "their builds may decode otherwise" if same else "install what the cache was made with"
    return (
        f"the cache was made with {there}, here are {ours}: {advice}, extract again, or pass --allow-pixel-drift to "
        "train on pixels that differ from the teacher's"
    )
