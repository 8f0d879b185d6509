"""FLAVA (arXiv 2112.04482): two encoders, and a multimodal one over [multimodal CLS; image CLS; patches; text].

The multimodal CLS belongs to neither side: it is no query and no key of the maps. Pictures have one size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import FlavaForPreTraining, FlavaModel
from transformers.models.flava.modeling_flava import FlavaSelfAttention

from dde_cache.preprocess import PixelBatch, TokenBatch
from dde_cache.teachers.contract import (
    MATCHING,
    Architectures,
    Family,
    Forwards,
    HiddenStates,
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
from dde_cache.teachers.quick import self_attention


class Flava(Family):
    """FLAVA; layer n is the n-th block of its multimodal encoder."""

    name = "flava"
    whole = True
    processor = "FlavaProcessor"
    architectures: ClassVar[Architectures] = {FlavaForPreTraining: MATCHING, FlavaModel: None}
    attention: ClassVar[Forwards] = {FlavaSelfAttention: self_attention}

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> Shape:
        """Numbers of the multimodal encoder."""
        text, vision, both = config["text_config"], config["image_config"], config["multimodal_config"]
        return Shape(
            layers=whole_number(both["num_hidden_layers"]),
            heads=whole_number(both["num_attention_heads"]),
            width=whole_number(both["hidden_size"]),
            words=whole_number(text["vocab_size"]),
            text_length=whole_number(text["max_position_embeddings"]),
            patch_size=whole_number(vision["patch_size"]),
            side=whole_number(vision["image_size"]),
        )

    @classmethod
    def tower(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """As deep as its text encoder."""
        return twin_tower(cls.shape(config), config["text_config"], config["image_config"]["num_channels"])

    def read(self, tokens: TokenBatch, picture: PixelBatch, wanted: Wanted, slot: int = 0) -> Reading:
        """Each side alone, then both through the multimodal encoder, as `FlavaModel` does."""
        flava = self.model.flava if hasattr(self.model, "flava") else self.model
        blocks = flava.multimodal_model.encoder.layer
        points: dict[Tap, Any] = {}
        for layer in wanted.layers:
            attention = blocks[layer].attention.attention
            points |= {("query", layer): attention.query, ("key", layer): attention.key}
            points |= {("states", layer): blocks[layer]} if wanted.hidden else {}
        alone = {"output_hidden_states": True, "return_dict": True}
        # States before the final norm of either encoder.
        image = flava.image_model(pixel_values=picture.pixels.to(flava.dtype), **alone).hidden_states[-1]
        text = flava.text_model(input_ids=tokens.ids, attention_mask=tokens.mask, **alone).hidden_states[-1]
        joint = torch.cat([flava.image_to_mm_projection(image), flava.text_to_mm_projection(text)], dim=1)
        own, count = int(flava.multimodal_model.use_cls_token), image.shape[1]
        seen = tokens.mask.new_ones(len(joint), own + count)
        last = None
        with taps(points, enough=None if wanted.summary else len(points)) as taken:
            last = flava.multimodal_model(joint, attention_mask=torch.cat([seen, tokens.mask], dim=1)).last_hidden_state
        projections, states = {}, {}
        heads, end = flava.config.multimodal_config.num_attention_heads, own + count
        for layer in wanted.layers:
            query, key = (split_heads(taken[name, layer][0], heads) for name in ("query", "key"))
            projections[layer] = Projections(
                query[:, :, end:], key[:, :, own:end], query[:, :, own:end], key[:, :, end:]
            )
            if wanted.hidden:
                held = taken["states", layer][0]
                states[layer] = HiddenStates(held[:, end:], held[:, own:end])
        return Reading(projections, seen[:, own:].bool(), states, last)

    def answer(self, summaries: Sequence[Any]) -> Float[Tensor, "b c"]:
        """Its matching head."""
        return self.model.itm_head(summaries[0])
