"""BridgeTower (arXiv 2206.08657): two encoders, and above them blocks in which each modality looks at the other.

What `output_attentions` returns is the SELF-attention of those blocks; the cross-modal maps are in their
cross-attention modules, one for each direction. Pictures have one size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from transformers import (
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerCrossAttention, BridgeTowerSelfAttention

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
from dde_cache.teachers.quick import attend
from dde_cache.vilt import image_tokens, token_mask


def _self_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_others: Any
) -> tuple[Tensor, None]:
    return attend(module, hidden_states, hidden_states, attention_mask), None


def _cross_attention(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    return attend(module, hidden_states, encoder_hidden_states, attention_mask), None


class BridgeTower(Family):
    """BridgeTower; layer n is the n-th of its cross-modal blocks."""

    name = "bridgetower"
    processor = "BridgeTowerProcessor"
    architectures: ClassVar[Architectures] = {
        BridgeTowerForImageAndTextRetrieval: MATCHING,
        BridgeTowerModel: None,
        BridgeTowerForMaskedLM: None,
        BridgeTowerForContrastiveLearning: None,
    }
    attention: ClassVar[Forwards] = {
        BridgeTowerSelfAttention: _self_attention,
        BridgeTowerCrossAttention: _cross_attention,
    }

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> Shape:
        """Numbers of the cross-modal blocks, whose heads are those of the text encoder's configuration."""
        text, vision = config["text_config"], config["vision_config"]
        return Shape(
            layers=whole_number(config["num_hidden_layers"]),
            heads=whole_number(text["num_attention_heads"]),
            width=whole_number(config["hidden_size"]),
            words=whole_number(text["vocab_size"]),
            # As RoBERTa's, positions begin behind the number of the padding token.
            text_length=whole_number(text["max_position_embeddings"]) - whole_number(text["pad_token_id"]) - 1,
            patch_size=whole_number(vision["patch_size"]),
            side=whole_number(vision["image_size"]),
        )

    @classmethod
    def tower(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """As deep as its text encoder."""
        return twin_tower(cls.shape(config), config["text_config"], config["vision_config"]["num_channels"])

    def read(self, tokens: TokenBatch, picture: PixelBatch, wanted: Wanted, slot: int = 0) -> Reading:
        """One pass; t2i from the cross-attention of the text's blocks, i2t from that of the image's."""
        model = self.model.bridgetower if hasattr(self.model, "bridgetower") else self.model
        sides = {"text": model.cross_modal_text_layers, "image": model.cross_modal_image_layers}
        points: dict[Tap, Any] = {}
        for layer in wanted.layers:
            for side, blocks in sides.items():
                attention = blocks[layer].crossattention.self
                points |= {(side, "query", layer): attention.query, (side, "key", layer): attention.key}
                points |= {(side, "states", layer): blocks[layer]} if wanted.hidden else {}
        pooled = None
        with taps(points, enough=None if wanted.summary else len(points)) as taken:
            pooled = model(
                input_ids=tokens.ids, attention_mask=tokens.mask, pixel_values=picture.pixels.to(model.dtype)
            ).pooler_output
        projections, states = {}, {}
        heads = model.config.text_config.num_attention_heads
        for layer in wanted.layers:
            # The keys of a side's cross-attention are made of the other side's states.
            text_query, image_key, image_query, text_key = (
                split_heads(taken[side, name, layer][0], heads) for side in sides for name in ("query", "key")
            )
            projections[layer] = Projections(text_query, image_key, image_query, text_key)
            if wanted.hidden:
                states[layer] = HiddenStates(*(taken[side, "states", layer][0] for side in sides))
        count = image_tokens(picture.grid)
        return Reading(projections, token_mask(count, int(count.max())).to(tokens.mask.device), states, pooled)

    def answer(self, summaries: Sequence[Any]) -> Float[Tensor, "b c"]:
        """Its matching head."""
        return self.model.itm_score(summaries[0])
