"""ViLT (arXiv 2102.03334): one self-attention over [text; image CLS; patches].

The stock picture embedding puts patches in random order; `vilt.embed_patches` takes its place. Pictures may have any
whole number of patches.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import (
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

from dde_cache.preprocess import PixelBatch, TokenBatch
from dde_cache.teachers.contract import (
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
from dde_cache.teachers.quick import self_attention
from dde_cache.vilt import embed_patches


def embed_picture(vilt: Any, picture: PixelBatch, padding: int = 0) -> tuple[Tensor, Bool[Tensor, "b v"]]:
    """Pictures as a `ViltModel` takes them, in row-major order, and the mask of their tokens."""
    embeddings = vilt.embeddings
    return embed_patches(
        embeddings.patch_embeddings.projection,
        embeddings.cls_token,
        embeddings.position_embeddings,
        picture.pixels,
        picture.grid,
        padding,
    )


def joint_pass(
    vilt: Any, tokens: TokenBatch, embeds: Float[Tensor, "b v w"], mask: Bool[Tensor, "b v"], slot: int = 0
) -> Float[Tensor, "b w"] | None:
    """Run a `ViltModel` on texts and embedded pictures; return the pooled output (None without a pooler).

    Args:
        vilt: the model.
        tokens: texts.
        embeds, mask: of `embed_picture`.
        slot: 0 for the first picture of a sample, 1 for the second (NLVR2's token type 2).
    """
    return vilt(
        input_ids=tokens.ids,
        attention_mask=tokens.mask,
        image_embeds=vilt.embeddings.dropout(embeds),
        pixel_mask=mask.long(),
        image_token_type_idx=slot + 1,
    ).pooler_output


def task_logits(model: Any, tokens: TokenBatch, pictures: Sequence[PixelBatch]) -> Float[Tensor, "b c"]:
    """Logits of a ViLT with a classification head, one joint pass a picture."""
    pooled = [
        joint_pass(model.vilt, tokens, *embed_picture(model.vilt, picture), slot)
        for slot, picture in enumerate(pictures)
    ]
    return classify(model, pooled)


def classify(model: Any, pooled: Sequence[Float[Tensor, "b w"] | None]) -> Float[Tensor, "b c"]:
    """The head of a ViLT on the pooled outputs of its pictures; a model with a head has a pooler."""
    return model.classifier(torch.cat([vector for vector in pooled if vector is not None], dim=-1))


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


class Vilt(Family):
    """ViLT, with or without a task head."""

    name = "vilt"
    whole = True
    padded_queries = True
    processor = "ViltProcessor"
    architectures: ClassVar[Architectures] = {
        ViltForQuestionAnswering: _labels,
        ViltForImagesAndTextClassification: _labels,
        ViltModel: None,
        ViltForMaskedLM: None,
        ViltForImageAndTextRetrieval: None,
    }
    attention: ClassVar[Forwards] = {ViltSelfAttention: self_attention}

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> Shape:
        """The configuration's own numbers."""
        return Shape(
            layers=whole_number(config["num_hidden_layers"]),
            heads=whole_number(config["num_attention_heads"]),
            width=whole_number(config["hidden_size"]),
            words=whole_number(config["vocab_size"]),
            text_length=whole_number(config["max_position_embeddings"]),
            patch_size=whole_number(config["patch_size"]),
            side=None,
        )

    @classmethod
    def tower(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The teacher's own shape, as in the paper."""
        return config

    @property
    def images(self) -> int:
        """Two for NLVR2's head."""
        several = isinstance(self.model, ViltForImagesAndTextClassification)
        return int(self.model.config.num_images) if several else 1

    def read(self, tokens: TokenBatch, picture: PixelBatch, wanted: Wanted, slot: int = 0) -> Reading:
        """One joint pass over texts and the pictures of a slot."""
        vilt = self.model.vilt if hasattr(self.model, "vilt") else self.model
        blocks = vilt.encoder.layer
        points: dict[Tap, Any] = {}
        for layer in wanted.layers:
            attention = blocks[layer].attention.attention
            points |= {("query", layer): attention.query, ("key", layer): attention.key}
            points |= {("states", layer): blocks[layer]} if wanted.hidden else {}
        embeds, mask = embed_picture(vilt, picture, wanted.padding)
        pooled = None
        with taps(points, enough=None if wanted.summary else len(points)) as taken:
            pooled = joint_pass(vilt, tokens, embeds, mask, slot)
        projections, states = {}, {}
        heads, length = vilt.config.num_attention_heads, tokens.mask.shape[1]
        for layer in wanted.layers:
            query, key = (split_heads(taken[name, layer][0], heads) for name in ("query", "key"))
            projections[layer] = Projections(
                query[:, :, :length], key[:, :, length:], query[:, :, length:], key[:, :, :length]
            )
            if wanted.hidden:
                joint = taken["states", layer][0]
                states[layer] = HiddenStates(joint[:, :length], joint[:, length:])
        return Reading(projections, mask, states, pooled)

    def answer(self, summaries: Sequence[Any]) -> Float[Tensor, "b c"]:
        """The task head on the pooled outputs."""
        return classify(self.model, summaries)
