"""The insides of Hugging Face's ViLT that teacher and student share.

Hugging Face's `visual_embed` draws the patches of a sample in random order and fills up with random padding patches.
Here the image axis is always [CLS; patches in row-major order; padding], a pure function of the picture: the embedding
is computed here and handed to the stock model as `image_embeds`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dde_cache.attention import QueryKey


def image_tokens(grid: Int[Tensor, "b 2"]) -> Int[Tensor, " b"]:
    """Number of image tokens of each picture, CLS included."""
    return grid.prod(-1) + 1


def token_mask(count: Int[Tensor, " b"], length: int) -> Bool[Tensor, "b n"]:
    """True for the first `count` positions of each row."""
    return torch.arange(length, device=count.device)[None] < count[:, None]


def embed_patches(
    projection: nn.Conv2d,
    cls_token: Float[Tensor, "1 1 d"],
    position: Float[Tensor, "1 p d"],
    pixels: Float[Tensor, "b c y x"],
    grid: Int[Tensor, "b 2"],
    padding: int = 0,
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """Embed pictures as [CLS; row-major patches; padding], before dropout and token type.

    Args:
        projection: the patch embedding.
        cls_token: the learned CLS token.
        position: learned positions, CLS first, then a square grid in row-major order.
        pixels: pictures, padded with 0 at the bottom and right.
        grid: patch rows and columns of each picture, on the CPU.
        padding: padded tokens beyond the largest picture of the batch.

    Returns:
        Embeddings and the mask of valid tokens. A padded token is what the stock model makes of an empty patch: the
        projection's bias without a position.
    """
    patches = projection(pixels.to(projection.weight.dtype))
    side = int((position.shape[1] - 1) ** 0.5)
    spatial = position[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    count = image_tokens(grid)
    length = int(count.max()) + padding
    blank = projection.bias if projection.bias is not None else patches.new_zeros(patches.shape[1])
    sizes, member = torch.unique(grid, dim=0, return_inverse=True)
    rows: list[Tensor] = []
    order: list[Tensor] = []
    for number, (height, width) in enumerate(sizes.tolist()):
        chosen = (member == number).nonzero()[:, 0]
        place = nn.functional.interpolate(spatial, size=(height, width), mode="bilinear", align_corners=True)
        block = patches[chosen.to(patches.device), :, :height, :width] + place.to(patches.dtype)
        block = block.flatten(2).transpose(1, 2)
        first = (cls_token + position[:, :1]).to(block.dtype).expand(len(chosen), -1, -1)
        rest = blank.to(block.dtype).expand(len(chosen), length - 1 - height * width, -1)
        rows.append(torch.cat([first, block, rest], dim=1))
        order.append(chosen)
    tokens = rows[0] if len(rows) == 1 else torch.cat(rows)[torch.cat(order).argsort().to(patches.device)]
    return tokens, token_mask(count, length).to(patches.device)


def position_deviation(projection: nn.Conv2d, deviation: float) -> float:
    """How large learned image positions should start: as large as the patch embedding of unit-variance pixels.

    Hugging Face's ViLT starts them at 0, which suits fine-tuning. From random weights a small model then stays for
    thousands of steps where it knows what is in a picture but not where.
    """
    return deviation * projection.weight[0].numel() ** 0.5


class QueryKeyCapture:
    """The query and key projections of the last forward pass, per layer.

    Attention itself is not touched and nothing is computed twice: the outputs of the two linear maps are kept.
    """

    def __init__(self) -> None:
        self._query: dict[int, Tensor] = {}
        self._key: dict[int, Tensor] = {}
        self._heads = 1

    def __getitem__(self, layer: int) -> QueryKey:
        return QueryKey(self._split(self._query[layer]), self._split(self._key[layer]))

    def _split(self, projected: Float[Tensor, "b n w"]) -> Float[Tensor, "b h n d"]:
        return projected.unflatten(-1, (self._heads, -1)).transpose(1, 2)


def _keep(store: dict[int, Tensor], layer: int, _module: nn.Module, _inputs: object, output: Tensor) -> None:
    store[layer] = output


@contextmanager
def capture_states(blocks: Any, layers: Sequence[int]) -> Iterator[dict[int, Float[Tensor, "b n w"]]]:
    """Keep what some of a stack of ViLT blocks put out while the context is open, by their number."""
    states: dict[int, Tensor] = {}

    def keep(layer: int, _module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        states[layer] = output[0]

    handles = [blocks[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_query_key(blocks: Any, layers: Sequence[int]) -> Iterator[QueryKeyCapture]:
    """Keep the query and key projections of `layers` of a stack of ViLT blocks while the context is open.

    Args:
        blocks: a `ModuleList` of `ViltLayer`.
        layers: which of them, 0-based.
    """
    capture = QueryKeyCapture()
    handles = []
    for layer in layers:
        attention = blocks[layer].attention.attention
        capture._heads = attention.num_attention_heads
        for linear, store in ((attention.query, capture._query), (attention.key, capture._key)):
            handles.append(linear.register_forward_hook(partial(_keep, store, layer)))
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()
