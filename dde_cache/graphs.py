"""The parts of a student as functions of tensors alone, which can be traced."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dde_cache.student import DualEncoder
from dde_cache.towers.contract import Tower
from dde_cache.towers.hugging_face import HuggingFaceImageTower
from dde_cache.towers.twins import ImageTower


class TextSide(nn.Module):
    """The text tower as a function of tensors."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]) -> Float[Tensor, "b w"]:
        """Encode texts."""
        return self.tower(input_ids, attention_mask).pooled


class WholeImageSide(nn.Module):
    """An image tower that sees every picture at one size, on pictures of one size of the run."""

    def __init__(self, tower: HuggingFaceImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Float[Tensor, "b c y x"]) -> Float[Tensor, "b w"]:
        """Encode pictures that fill the whole canvas."""
        return self.tower.encode(self.tower.squeeze(pixel_values)).pooled


class ImageSide(nn.Module):
    """The twin of ViLT on pictures of one size.

    Learned positions are stretched to the patch grid by two small products: bilinear weights with the corners aligned
    are what `embed_patches` takes, and rows and columns stay free in the graph.
    """

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], image_slot: Int[Tensor, " 1"] | None = None
    ) -> Float[Tensor, "b w"]:
        """Encode pictures that fill the whole canvas."""
        tower = self.tower
        patches = tower.patch_embeddings.projection(pixel_values)
        position = tower.position_embeddings
        side = int((position.shape[1] - 1) ** 0.5)
        learned = position[0, 1:].unflatten(0, (side, side))
        rows, columns = (_stretched(torch.arange(patches.shape[axis]), side) for axis in (2, 3))
        place = torch.einsum("yr,xc,rcw->wyx", rows, columns, learned)
        tokens = (patches + place).flatten(2).transpose(1, 2)
        first = (tower.cls_token + position[:, :1]).expand(patches.shape[0], -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        kind = tower.token_type[0] if image_slot is None else tower.token_type.index_select(0, image_slot)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return tower.encode(tokens + kind, mask).pooled


def _stretched(steps: Int[Tensor, " n"], side: int) -> Float[Tensor, "n s"]:
    """Weights of `side` learned positions for n places; both ends meet, and a single place is the first position."""
    place = steps * ((side - 1) / steps[-1:].clamp(min=1))
    return (1 - (place[:, None] - torch.arange(side)[None]).abs()).clamp(min=0)


class AnswerHead(nn.Module):
    """Shallow interaction and classifier."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, text: Float[Tensor, "b w"], image: Float[Tensor, "b w"], second: Float[Tensor, "b w"] | None = None
    ) -> Float[Tensor, "b c"]:
        """Logits of pairs."""
        return self.model.answer(text, image) if second is None else self.model.answer(text, image, second)


class CosineHead(nn.Module):
    """Cosines of every text with every picture."""

    def forward(self, text: Float[Tensor, "n w"], image: Float[Tensor, "m w"]) -> Float[Tensor, "n m"]:
        """Cosines."""
        return nn.functional.normalize(text, dim=-1) @ nn.functional.normalize(image, dim=-1).T
