"""BLIP (arXiv 2201.12086), its image-grounded text encoder: text queries look at image keys, never the reverse.

Pictures have one size; a smaller one would silently be given the first of the learned positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import BlipForImageTextRetrieval, BlipForQuestionAnswering
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from dde_cache.preprocess import PixelBatch, TokenBatch
from dde_cache.spec import Direction
from dde_cache.teachers.contract import (
    MATCHING,
    Architectures,
    Family,
    Forwards,
    Projections,
    Reading,
    Shape,
    Tap,
    Wanted,
    split_heads,
    taps,
    twin_tower,
    whole_number,
)
from dde_cache.teachers.quick import attend


def _text_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    # The stock module looks at the image without a mask; no image token is padding.
    if encoder_hidden_states is not None:
        return attend(module, hidden_states, encoder_hidden_states, None), None
    return attend(module, hidden_states, hidden_states, attention_mask), None


def _vision_attention(module: Any, hidden_states: Tensor, **_others: Any) -> tuple[Tensor, None]:
    query, key, value = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    context = scaled_dot_product_attention(query, key, value, scale=module.scale)
    return module.projection(context.transpose(1, 2).flatten(2)), None


class Blip(Family):
    """BLIP; layer n is the n-th block of its text encoder."""

    name = "blip"
    directions: ClassVar[tuple[Direction, ...]] = ("t2i",)
    hidden = False
    processor = "BlipProcessor"
    architectures: ClassVar[Architectures] = {BlipForImageTextRetrieval: MATCHING, BlipForQuestionAnswering: None}
    attention: ClassVar[Forwards] = {BlipTextSelfAttention: _text_attention, BlipAttention: _vision_attention}

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> Shape:
        """Numbers of the text encoder."""
        text, vision = config["text_config"], config["vision_config"]
        return Shape(
            layers=whole_number(text["num_hidden_layers"]),
            heads=whole_number(text["num_attention_heads"]),
            width=whole_number(text["hidden_size"]),
            words=whole_number(text["vocab_size"]),
            text_length=whole_number(text["max_position_embeddings"]),
            patch_size=whole_number(vision["patch_size"]),
            side=whole_number(vision["image_size"]),
        )

    @classmethod
    def tower(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """As deep as its text encoder."""
        return twin_tower(cls.shape(config), config["text_config"], channels=3)

    def read(self, tokens: TokenBatch, picture: PixelBatch, wanted: Wanted, slot: int = 0) -> Reading:
        """The picture alone, then the text beside it."""
        blocks = self.model.text_encoder.encoder.layer
        points: dict[Tap, Any] = {}
        for layer in wanted.layers:
            attention = blocks[layer].crossattention.self
            points |= {("query", layer): attention.query, ("key", layer): attention.key}
        image = self.model.vision_model(pixel_values=picture.pixels).last_hidden_state
        mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        first = None
        with taps(points, enough=None if wanted.summary else len(points)) as taken:
            first = self.model.text_encoder(
                input_ids=tokens.ids,
                attention_mask=tokens.mask,
                encoder_hidden_states=image,
                encoder_attention_mask=mask.long(),
            ).last_hidden_state[:, 0]
        heads = self.model.config.text_config.num_attention_heads
        projections = {}
        for layer in wanted.layers:
            query, key = (split_heads(taken[name, layer][0], heads) for name in ("query", "key"))
            projections[layer] = Projections(query, key, None, None)
        return Reading(projections, mask, summary=first)

    def answer(self, summaries: Sequence[Any]) -> Float[Tensor, "b c"]:
        """Its matching head, on the text's first token."""
        return self.model.itm_head(summaries[0])
