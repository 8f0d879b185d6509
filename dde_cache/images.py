"""Encoded images: the bytes of a picture as they lie in a tar, and the one way to turn them into pixels."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dde_cache.errors import InputError

IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp")
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
_ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as it lies in the tar: its bytes and its format (the file extension, lower case)."""

    content: bytes
    format: str

    def size(self) -> tuple[int, int]:
        """Width and height in pixels after decoding, from the header alone.

        Raises:
            InputError: the bytes are no image that Pillow reads.
        """
        try:
            with Image.open(io.BytesIO(self.content)) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_ITS_SIDE
                width, height = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(self.content, error) from error
        return (height, width) if turned else (width, height)

    def decode(self) -> Image.Image:
        """Decode to RGB: turned as its EXIF says, transparent parts on white, 16-bit values scaled to 8.

        Raises:
            InputError: the bytes are no image that Pillow reads.
        """
        try:
            with Image.open(io.BytesIO(self.content)) as image:
                return to_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(self.content, error) from error

    @classmethod
    def parse(cls, content: bytes) -> "EncodedImage":
        """Recognise the format by the bytes, not by a file's name, and decode once to see that it is whole.

        Raises:
            InputError: the bytes are no whole PNG, JPEG or WebP image.
        """
        try:
            with Image.open(io.BytesIO(content)) as image:
                found = str(image.format)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(content, error) from error
        if found not in _EXTENSIONS:
            raise InputError(f"expected a PNG, JPEG or WebP image, got {found}; convert it first")
        parsed = cls(content, _EXTENSIONS[found])
        parsed.decode()
        return parsed


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as every model here reads it; see `EncodedImage.decode`."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _unreadable(content: bytes, error: Exception) -> InputError:
    detail = str(error)
    if isinstance(error, UnidentifiedImageError):
        detail = "no known image format"
    return InputError(f"expected an image, got {len(content)} bytes that cannot be read: {detail}")
