"""Vectors of a teacher's blocks on their way to the disk and back: hidden states of tokens, and their means.

`float16` is the vectors themselves. `int8` is a code a number and a scale a vector: scale = largest magnitude / 127,
code = round(number / scale). So a number is off by at most half a step, largest magnitude / 254: 0.4 % of the vector's
largest number, whatever its size.
"""

import torch
from jaxtyping import Bool, Float, Float32, Int8
from torch import Tensor

LEVELS = 127

MOST = float.fromhex("0x1.020406p+121")
"""Bound of a scale: the largest float32 whose product with LEVELS is one too."""

LEAST = 2.0**-100
"""A vector without a number of at least this magnitude is taken for 0: its scale would have few bits, or none."""


def encode_int8(vectors: Float[Tensor, "*n w"]) -> tuple[Int8[Tensor, "*n w"], Float32[Tensor, "*n"]]:
    """Codes and scales of finite vectors."""
    wide = vectors.float()
    largest = wide.abs().amax(-1)
    scale = torch.where(largest >= LEAST, largest / LEVELS, 0.0).clamp(max=MOST)
    # The largest number is LEVELS but for the last bit of a division; rounding takes that back.
    code = (wide / torch.where(scale > 0, scale, 1.0)[..., None]).round().clamp(-LEVELS, LEVELS)
    return torch.where(scale[..., None] > 0, code, 0.0).to(torch.int8), scale


def decode_int8(code: Int8[Tensor, "*n w"], scale: Float32[Tensor, "*n"]) -> Float32[Tensor, "*n w"]:
    """The vectors, each number within half a step."""
    return code.float() * scale[..., None]


def mean_of_valid(states: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b w"]:
    """Mean over the valid tokens, in fp32: a picture or text as one vector, with a first token or without."""
    counted = torch.where(mask[..., None], states.float(), 0.0)
    return counted.sum(1) / mask.sum(-1, keepdim=True).clamp_min(1)
