"""LXMERT (arXiv 1908.07490): regions of a picture and a text look at each other through ONE module, called twice.

Only the first call, text to image, is what `output_attentions` returns; here both are kept. The image axis is the
regions that a detector found, in the order in which they are given: there is no CLS, no grid, nothing row-major.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from transformers import LxmertForPreTraining, LxmertForQuestionAnswering, LxmertModel
from transformers.models.lxmert.modeling_lxmert import LxmertAttention

from dde_cache.errors import TeacherError
from dde_cache.preprocess import TOKENIZER, RegionBatch, TokenBatch
from dde_cache.teachers.contract import (
    MATCHING,
    REGIONS,
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
    whole_number,
)
from dde_cache.teachers.quick import attend
from dde_cache.vilt import token_mask


def _attention(
    module: Any,
    hidden_states: Tensor,
    context: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    return (attend(module, hidden_states, context, attention_mask),)


def _labels(config: Any) -> tuple[str, ...]:
    numbers = range(config.num_qa_labels)
    # The library gives every configuration two names; those of the answers are there where somebody wrote them.
    return tuple(str(config.id2label[number] if len(config.id2label) == len(numbers) else number) for number in numbers)


class Lxmert(Family):
    """LXMERT; layer n is the n-th of its cross-modality blocks."""

    name = "lxmert"
    rule = REGIONS
    processor = TOKENIZER
    architectures: ClassVar[Architectures] = {
        LxmertForQuestionAnswering: _labels,
        LxmertForPreTraining: MATCHING,
        LxmertModel: None,
    }
    attention: ClassVar[Forwards] = {LxmertAttention: _attention}

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> Shape:
        """Numbers of the cross-modality blocks."""
        return Shape(
            layers=whole_number(config["x_layers"]),
            heads=whole_number(config["num_attention_heads"]),
            width=whole_number(config["hidden_size"]),
            words=whole_number(config["vocab_size"]),
            text_length=whole_number(config["max_position_embeddings"]),
            patch_size=1,
            side=None,
        )

    @classmethod
    def tower(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """No student reads regions.

        Raises:
            TeacherError: always.
        """
        raise TeacherError("expected a teacher that reads pictures, got LXMERT: no student has an axis of regions")

    def read(self, tokens: TokenBatch, picture: RegionBatch, wanted: Wanted, slot: int = 0) -> Reading:
        """One pass; of the shared cross-attention the first call has the text's queries, the second the regions'."""
        lxmert = self.model.lxmert if hasattr(self.model, "lxmert") else self.model
        blocks = lxmert.encoder.x_layers
        points: dict[Tap, Any] = {}
        for layer in wanted.layers:
            attention = blocks[layer].visual_attention.att
            points |= {("query", layer): attention.query, ("key", layer): attention.key}
            if wanted.hidden:
                points |= {("text", layer): blocks[layer].lang_output, ("image", layer): blocks[layer].visn_output}
        mask = token_mask(picture.count, picture.features.shape[1]).to(tokens.mask.device)
        outputs = len(wanted.layers) * (6 if wanted.hidden else 4)
        pooled = None
        with taps(points, enough=None if wanted.summary else outputs) as taken:
            pooled = lxmert(
                input_ids=tokens.ids,
                attention_mask=tokens.mask,
                visual_feats=picture.features.to(lxmert.dtype),
                visual_pos=picture.boxes.to(lxmert.dtype),
                visual_attention_mask=mask.long(),
            ).pooled_output
        projections, states = {}, {}
        for layer in wanted.layers:
            (text_query, image_query), (image_key, text_key) = (
                [split_heads(one, lxmert.config.num_attention_heads) for one in taken[name, layer]]
                for name in ("query", "key")
            )
            projections[layer] = Projections(text_query, image_key, image_query, text_key)
            if wanted.hidden:
                states[layer] = HiddenStates(taken["text", layer][0], taken["image", layer][0])
        return Reading(projections, mask, states, pooled)

    def answer(self, summaries: Sequence[Any]) -> Float[Tensor, "b c"]:
        """Its answers, or its matching head."""
        matching = isinstance(self.model, LxmertForPreTraining)
        return (self.model.cls.seq_relationship if matching else self.model.answer_head)(summaries[0])
