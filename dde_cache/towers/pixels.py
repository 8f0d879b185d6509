"""Pictures as the run's processor made them -> the pixels that another image encoder reads.

The run's processor is the teacher's, so that views replay exactly; what comes out of it is turned here, by exact linear
steps, into what the encoder was trained on: 8-bit levels again, resized as Pillow does (but neither rounded to whole
levels nor cropped: the whole picture is squeezed to the encoder's square), rescaled and normalised.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Filter = Literal["bilinear", "bicubic"]

FILTERS: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}
"""By Pillow's number of a resampling filter."""


class Scale(BaseModel):
    """How a processor makes numbers of 8-bit levels: (level x factor - mean) / std, by channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(gt=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, channels: int = 3) -> "Scale":
        """That of an image processor of Hugging Face.

        Raises:
            AttributeError, TypeError, ValueError: it has none.
        """
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        mean, std = ((one,) * channels if isinstance(one, (int, float)) else tuple(one) for one in (mean, std))
        return cls(factor=processor.rescale_factor if processor.do_rescale else 1.0, mean=mean, std=std)

    def levels(self, pixels: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Undo it."""
        mean, std = self._channels(pixels)
        return (pixels * std + mean) / self.factor

    def __call__(self, levels: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Apply it."""
        mean, std = self._channels(levels)
        return (levels * self.factor - mean) / std

    def _channels(self, like: Tensor) -> list[Tensor]:
        return [like.new_tensor(one)[:, None, None] for one in (self.mean, self.std)]


def resize_weights(count: Any, size: int, kind: Filter, like: Tensor) -> Float[Tensor, "s n"]:
    """Weights of `count` pixels for each of `size` new ones, as Pillow and torch's `antialias=True` have them.

    A filter of the larger of both pixels' widths, centred on the new pixel; rows sum to 1. As tensors, so that the
    number of pixels may stay free in an exported graph.
    """
    pixels = torch.arange(count, device=like.device).to(like.dtype) + 0.5
    wide = pixels[-1:] + 0.5
    step = wide / size
    centre = (torch.arange(size, device=like.device).to(like.dtype) + 0.5) * step
    away = ((pixels[None] - centre[:, None]) / step.clamp(min=1)).abs()
    if kind == "bilinear":
        weights = (1 - away).clamp(min=0)
    else:
        near, far = (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
        weights = torch.where(away < 1, near, torch.where(away < 2, far, torch.zeros_like(far)))
    return weights / weights.sum(-1, keepdim=True)


def resize(levels: Float[Tensor, "b c y x"], size: int, kind: Filter) -> Float[Tensor, "b c s s"]:
    """Squeeze pictures of one size to a square, first across, then down, as Pillow does; what the bicubic filter throws
    beyond 0 to 255 is cut off after each."""
    rows, columns = (resize_weights(levels.shape[axis], size, kind, levels) for axis in (2, 3))
    return (rows @ (levels @ columns.T).clamp(0, 255)).clamp(0, 255)
