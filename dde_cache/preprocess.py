"""Pictures and texts -> the tensors that a ViLT-like model reads, by the teacher's own processor.

Extraction and training go through this one module, so both see the same pixels and the same tokens.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from transformers import ViltProcessor

from dde_cache.errors import InputError, TeacherError


@dataclass(frozen=True)
class PixelBatch:
    """Pictures padded with 0 at the bottom and right, and the patch rows and columns of each (on the CPU)."""

    pixels: Float[Tensor, "b c y x"]
    grid: Int[Tensor, "b 2"]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids and their mask (1 = valid), padded at the end."""

    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]


class Preprocessor:
    """A Hugging Face ViLT processor, held to what can be replayed.

    Args:
        processor: tokenizer and image processor.
        patch_size: patch side in pixels; every processed picture must be a multiple of it.
        text_length: texts are cut to this many tokens, [CLS] and [SEP] included.

    Raises:
        TeacherError: the processor would resize pictures to sides that the patch does not divide.
    """

    def __init__(self, processor: Any, patch_size: int, text_length: int) -> None:
        self.processor = processor
        self.patch_size = patch_size
        self.text_length = text_length
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        images = processor.image_processor
        if images.do_resize and (not images.size_divisor or images.size_divisor % patch_size):
            raise TeacherError(
                f"the image processor resizes pictures to multiples of {images.size_divisor} px, which the patch of "
                f"{patch_size} px does not divide; set size_divisor to {patch_size}, or do_resize to false, in the "
                "teacher's processor_config.json"
            )

    @classmethod
    def load(cls, folder: str | Path, patch_size: int, text_length: int) -> "Preprocessor":
        """Load processor and tokenizer from a folder or hub id.

        Raises:
            TeacherError: they are missing or unreadable.
        """
        try:
            # Said here, because the default asks on the terminal whether to run what a stranger's file names.
            processor = ViltProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TeacherError(
                f"{folder}: expected a ViLT processor and tokenizer beside the model (processor_config.json, "
                f"tokenizer.json), but they cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        return cls(processor, patch_size, text_length)

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
        pixels = self.processor.image_processor(image, do_pad=False, return_tensors="np")["pixel_values"][0]
        height, width = pixels.shape[1:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise InputError(
                f"expected a picture whose sides are multiples of the patch of {self.patch_size} px, got "
                f"{image.width} x {image.height} px ({width} x {height} after the processor); resize the pictures, or "
                f"set do_resize and size_divisor={self.patch_size} in the teacher's processor_config.json"
            )
        return np.asarray(pixels, dtype=np.float32)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Patch rows and columns of pictures of a size in pixels.

        Raises:
            InputError: as `pixels`.
        """
        if (width, height) not in self._grids:
            rows, columns = self.pixels(Image.new("RGB", (width, height))).shape[1:]
            self._grids[width, height] = rows // self.patch_size, columns // self.patch_size
        return self._grids[width, height]

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
