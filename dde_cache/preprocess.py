"""Pictures and texts -> the tensors that a teacher reads, by its own processor.

Extraction and training go through this one module, so both see the same pixels and the same tokens.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipProcessor, BridgeTowerProcessor, FlavaProcessor, ViltProcessor

from dde_cache.errors import InputError, TeacherError, first_line

TOKENIZER = "tokenizer"
"""Kind of the processor of a teacher that reads no pictures."""

PROCESSORS: Mapping[str, Any] = {
    processor.__name__: processor for processor in (ViltProcessor, BridgeTowerProcessor, BlipProcessor, FlavaProcessor)
}
"""Processors that are known, by name: a cache's assets come from strangers, and no class that they name is loaded
otherwise."""

_SETTINGS = "processor_config.json"

_ALWAYS: dict[str, Any] = {"do_pad": False}
"""Said at every call: pictures are padded here, not there."""

_FLAVA = {"return_image_mask": False, "return_codebook_pixels": False}
"""FLAVA's processor can draw masks at random, and pictures for its codebook: neither is read."""


@dataclass(frozen=True)
class PixelBatch:
    """Pictures padded with 0 at the bottom and right, and the patch rows and columns of each (on the CPU)."""

    pixels: Float[Tensor, "b c y x"]
    grid: Int[Tensor, "b 2"]


@dataclass(frozen=True)
class RegionBatch:
    """What a detector found in pictures: features and boxes of the regions of each, padded with 0 at the end, and their
    number. A box is x0, y0, x1, y1 as parts of width and height."""

    features: Float[Tensor, "b n f"]
    boxes: Float[Tensor, "b n 4"]
    count: Int[Tensor, " b"]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids and their mask (1 = valid), padded at the end."""

    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]


@dataclass(frozen=True)
class _TextAlone:
    """The processor of a teacher that reads no pictures: its tokenizer."""

    tokenizer: Any
    image_processor: None = None

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class Preprocessor:
    """A Hugging Face processor, held to what can be replayed.

    Args:
        processor: tokenizer and image processor.
        patch_size: patch side in pixels; every processed picture must be a multiple of it.
        text_length: texts are cut to this many tokens, [CLS] and [SEP] included.
        side: the one height and width in pixels that the teacher reads; None: any.

    Raises:
        TeacherError: the processor would resize pictures to sides that the patch does not divide, or to others than
            `side`.
    """

    def __init__(self, processor: Any, patch_size: int, text_length: int, side: int | None = None) -> None:
        self.processor = processor
        self.patch_size = patch_size
        self.text_length = text_length
        self.side = side
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._cropped: dict[tuple[int, int], bool] = {}
        images = processor.image_processor
        self._options = _ALWAYS | (_FLAVA if type(images).__name__.startswith("Flava") else {})
        divisor = getattr(images, "size_divisor", None)
        if isinstance(processor, ViltProcessor) and images.do_resize and (not divisor or divisor % patch_size):
            raise TeacherError(
                f"the image processor resizes pictures to multiples of {images.size_divisor} px, which the patch of "
                f"{patch_size} px does not divide; set size_divisor to {patch_size}, or do_resize to false, in the "
                "teacher's processor_config.json"
            )
        if side is not None and images is not None and images.do_resize:
            self._check_side(side)

    def _check_side(self, side: int) -> None:
        """Refuse a processor that resizes pictures to another size than the teacher reads.

        Raises:
            TeacherError: it does.
        """
        try:
            made = self._process(Image.new("RGB", (2 * side, 2 * side))).shape[1:]
        except (InputError, AttributeError, LookupError, TypeError) as error:
            raise TeacherError(
                f"expected an image processor that makes pictures of {side} x {side} px, but it makes none: {error}; "
                "look at size and crop_size in the teacher's processor_config.json (BridgeTower's wants shortest_edge)"
            ) from error
        if made != (side, side):
            raise TeacherError(
                f"the image processor makes pictures of {made[1]} x {made[0]} px, but the teacher reads {side} x "
                f"{side} px; set size and crop_size in the teacher's processor_config.json"
            )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        patch_size: int,
        text_length: int,
        *,
        kind: str | None = None,
        side: int | None = None,
    ) -> "Preprocessor":
        """Load processor and tokenizer from a folder or hub id.

        Args:
            folder: where they are.
            patch_size, text_length, side: as above.
            kind: name of the processor's class, or `TOKENIZER`; None: what the folder says of itself.

        Raises:
            TeacherError: they are missing, unreadable or of a class that is not known.
        """
        kind = kind or _kind_of(folder)
        name = kind.removesuffix("Processor").replace("Vilt", "ViLT")
        try:
            # Said here, because the default asks on the terminal whether to run what a stranger's file names.
            if kind == TOKENIZER:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                return cls(_TextAlone(tokenizer), patch_size, text_length)
            processor = PROCESSORS[kind].from_pretrained(folder, trust_remote_code=False)
            found = type(processor.image_processor).__name__
            if not found.startswith(kind.removesuffix("Processor")):
                raise ValueError(f"its image processor is a {found}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TeacherError(
                f"{folder}: expected a {name} processor and tokenizer beside the model (processor_config.json, "
                f"tokenizer.json), but they cannot be loaded: {first_line(error)}"
            ) from error
        return cls(processor, patch_size, text_length, side)

    def save(self, folder: Path) -> None:
        """Write processor and tokenizer into a folder.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self.processor.save_pretrained(folder)
        except Exception as error:
            # The tokenizers library says what the disk said in an exception without a class of its own.
            found = re.search(r"\(os error (\d+)\)", str(error))
            if type(error) is not Exception or found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error

    def pixels(self, image: Image.Image) -> Float[np.ndarray, "c y x"]:
        """Resize, rescale and normalise one picture; float32.

        Raises:
            InputError: the result is not a whole number of patches.
        """
        if self.processor.image_processor is None:
            raise InputError(
                "expected regions of pictures, got a picture: this teacher reads features of regions that a detector "
                "found; give it a RegionBatch in Python"
            )
        pixels = self._process(image)
        height, width = pixels.shape[1:]
        if self.side is not None and (height, width) != (self.side, self.side):
            raise InputError(
                f"expected a picture of {self.side} x {self.side} px, got {image.width} x {image.height} px ({width} x "
                f"{height} after the processor); resize the pictures, or set do_resize, size and crop_size in the "
                "teacher's processor_config.json"
            )
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise InputError(
                f"expected a picture whose sides are multiples of the patch of {self.patch_size} px, got "
                f"{image.width} x {image.height} px ({width} x {height} after the processor); resize the pictures, or "
                f"set do_resize and size_divisor={self.patch_size} in the teacher's processor_config.json"
            )
        return np.asarray(pixels, dtype=np.float32)

    def _process(self, image: Image.Image, **options: Any) -> Float[np.ndarray, "c y x"]:
        """What the library makes of one picture.

        Raises:
            InputError: it cannot resize it (to nothing, say, where it is a thin line).
        """
        options = self._options | options
        try:
            return self.processor.image_processor(image, return_tensors="np", **options)["pixel_values"][0]
        except ValueError as error:
            raise InputError(f"a picture of {image.width} x {image.height} px cannot be processed: {error}") from error

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Patch rows and columns of pictures of a size in pixels.

        Raises:
            InputError: as `pixels`.
        """
        if (width, height) not in self._grids:
            rows, columns = self.pixels(Image.new("RGB", (width, height))).shape[1:]
            self._grids[width, height] = rows // self.patch_size, columns // self.patch_size
        return self._grids[width, height]

    def loses_margin(self, width: int, height: int) -> bool:
        """Whether the processor cuts something off pictures of a size in pixels, as BridgeTower's does with those that
        are no square: neither teacher nor student sees what lies there.

        Raises:
            InputError: as `pixels`.
        """
        if not getattr(self.processor.image_processor, "do_center_crop", False):
            return False
        if (width, height) not in self._cropped:
            blank = Image.new("RGB", (width, height))
            whole, kept = (self._process(blank, do_center_crop=crop).shape[1:] for crop in (False, True))
            self._cropped[width, height] = whole[0] > kept[0] or whole[1] > kept[1]
        return self._cropped[width, height]

    def levels(self, pixels: Float[np.ndarray, "c y x"]) -> UInt8[np.ndarray, "c y x"]:
        """Undo what `pixels` does after resizing: the picture in 8 bits, free of the rounding errors of floats."""
        images = self.processor.image_processor
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else (0.0, 1.0)
        scale = images.rescale_factor if images.do_rescale else 1.0
        mean, std = (np.reshape(np.asarray(values, np.float64), (-1, 1, 1)) for values in (mean, std))
        return np.rint((pixels * std + mean) / scale).clip(0, 255).astype(np.uint8)

    def stack(self, pictures: Sequence[Float[np.ndarray, "c y x"]]) -> PixelBatch:
        """Pad processed pictures to the largest height and width and stack them."""
        sizes = np.array([picture.shape[1:] for picture in pictures])
        height, width = sizes.max(0)
        stacked = np.zeros((len(pictures), pictures[0].shape[0], height, width), dtype=np.float32)
        for row, picture in enumerate(pictures):
            stacked[row, :, : picture.shape[1], : picture.shape[2]] = picture
        return PixelBatch(torch.from_numpy(stacked), torch.from_numpy(sizes // self.patch_size))

    def tokens(self, texts: Sequence[str], *, full: bool = False) -> TokenBatch:
        """Tokenize, cut to `text_length`, and pad to the longest text, or to `text_length` where `full`."""
        encoded = self.processor.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.text_length,
            padding="max_length" if full else "longest",
            return_tensors="pt",
        )
        return TokenBatch(encoded["input_ids"], encoded["attention_mask"])

    def tokenizer_json(self) -> dict[str, Any]:
        """What the tokenizer is, without truncation and padding: those are what its last call asked for."""
        return json.loads(self.processor.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, before `tokens` cuts it."""
        return [len(ids) for ids in self.processor.tokenizer(list(texts), verbose=False)["input_ids"]]


def _kind_of(folder: str | Path) -> str:
    """The class of a folder's processor, by what its settings say; ViLT's where they do not."""
    try:
        named = json.loads((Path(folder) / _SETTINGS).read_bytes())["processor_class"]
    except (OSError, ValueError, TypeError, KeyError):
        return ViltProcessor.__name__
    return named if named in PROCESSORS else ViltProcessor.__name__
