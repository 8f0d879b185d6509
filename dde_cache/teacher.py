"""Fusion encoders that give cross-modal attention: how a teacher is loaded and run, whatever its family.

A family (`teachers/`) gives the query and key projections of the layers asked for; the two cross-modal blocks are
computed from them here, the whole attention never is. What nobody asks for is not computed: attention weights of the
other blocks, and everything behind the last layer where no logits are wanted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import ViltConfig

from dde_cache.attention import block_softmax, valid_first
from dde_cache.checkpoint import SAMPLE_TEACHER as SAMPLE_TEACHER
from dde_cache.checkpoint import hash_weights, load_preprocessor, load_weights, read_family, resolve
from dde_cache.checkpoint import read_config as read_config
from dde_cache.errors import InputError, TeacherError
from dde_cache.preprocess import PixelBatch, Preprocessor, RegionBatch, TokenBatch
from dde_cache.spec import Direction, Rows
from dde_cache.teachers import ARCHITECTURES, Family
from dde_cache.teachers.contract import HiddenStates as HiddenStates
from dde_cache.teachers.contract import Projections, Wanted
from dde_cache.teachers.quick import quick_attention
from dde_cache.teachers.vilt import task_logits as task_logits


@dataclass(frozen=True)
class CrossAttention:
    """Attention of each modality over the other's valid keys; rows sum to 1, the image axis is what the rule says.

    `i2t` is None in a family that has text queries alone.
    """

    t2i: Float[Tensor, "b h t v"]
    i2t: Float[Tensor, "b h v t"] | None


@dataclass(frozen=True)
class WholeAttention:
    """Attention of each modality's queries over every valid token; rows sum to 1, keys [valid text; valid image]."""

    t2w: Float[Tensor, "b h t n"]
    i2w: Float[Tensor, "b h v n"]


@dataclass(frozen=True)
class TeacherOutput:
    """What one forward pass gives: attention by (image slot, layer), and logits where the teacher has a task head.

    Whole rows and hidden states are there, by (image slot, layer), where they were asked for.
    """

    attention: Mapping[tuple[int, int], CrossAttention]
    logits: Float[Tensor, "b c"] | None
    whole: Mapping[tuple[int, int], WholeAttention] = field(default_factory=dict)
    hidden: Mapping[tuple[int, int], HiddenStates] = field(default_factory=dict)

    def rows(self, name: Rows, image: int, layer: int) -> Float[Tensor, "b h q k"]:
        """One kind of attention rows.

        Raises:
            TeacherError: its family has no such rows.
        """
        found = getattr((self.attention if name in ("t2i", "i2t") else self.whole)[image, layer], name)
        if found is None:
            raise TeacherError(
                f"expected {name} attention, but this teacher has t2i alone; train with --directions t2i"
            )
        return found


class FusionTeacher:
    """A frozen fusion encoder with its processor.

    Args:
        model: of one of the architectures of `teachers`, with or without a task head.
        preprocessor: its processor.
    """

    def __init__(self, model: Any, preprocessor: Preprocessor) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocessor = preprocessor
        self.config: Any = model.config
        self.family: Family = ARCHITECTURES[type(model).__name__][0](model)
        self.shape = self.family.shape(self.config.to_dict())

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "FusionTeacher":
        """Load a checkpoint folder, a hub id, or the sample teacher (`sample`).

        Raises:
            TeacherError: nothing is there, it is of no family that we know, or model and processor do not fit each
                other.
        """
        path = resolve(name)
        config, family, architecture = read_family(path)
        preprocessor = load_preprocessor(path, config, family)
        model = load_weights(architecture, path, config)
        words, entries = len(preprocessor.processor.tokenizer), family.shape(config.to_dict()).words
        if words > entries:
            raise TeacherError(
                f"{name}: the tokenizer has {words} entries, the model {entries}; they do not belong together"
            )
        return cls(model.to(device=device, dtype=dtype), preprocessor)

    @property
    def layers(self) -> int:
        """Number of blocks with cross-modal attention."""
        return self.shape.layers

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.shape.heads

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.shape.width

    @property
    def tower(self) -> ViltConfig:
        """The shape of a new student's towers."""
        return self.family.towers(self.config.to_dict())

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The answers in logit order, or None where the teacher has no head."""
        return self.family.answers(type(self.model), self.config)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Which maps it gives."""
        return self.family.directions

    @property
    def images(self) -> int:
        """How many images a sample must have."""
        return self.family.images

    def weights_hash(self) -> str:
        """SHA-256 of every tensor's name, type, shape and bytes, whatever files they came in."""
        return hash_weights(self.model)

    @torch.inference_mode()
    def __call__(
        self,
        tokens: TokenBatch,
        pictures: Sequence[PixelBatch | RegionBatch],
        layers: Sequence[int],
        *,
        padded_queries: bool = False,
        whole: bool = False,
        hidden: bool = False,
        logits: bool = True,
    ) -> TeacherOutput:
        """Run the teacher and compute the cross-modal blocks of `layers`.

        Args:
            tokens: texts; padded to the full text length where `padded_queries`.
            pictures: for each image slot, the pictures of the batch.
            layers: which blocks, 0-based.
            padded_queries: keep one padded image row, at the position after the picture's last token.
            whole: give the rows over the whole sequence too.
            hidden: give the hidden states too.
            logits: give them where there is a head; without them, nothing behind the last of `layers` is computed.

        Raises:
            InputError: the teacher wants another number of pictures.
            TeacherError: its family does not have what is asked for.
        """
        if self.images != len(pictures):
            raise InputError(f"expected {self.images} images a sample for this teacher, got {len(pictures)}")
        lacking = self.lacks(padded_queries=padded_queries, whole=whole, hidden=hidden)
        if lacking:
            raise TeacherError(f"expected what a teacher of family {self.family.name} has; {'; '.join(lacking)}")
        wanted = Wanted(tuple(layers), hidden, logits and self.labels is not None, int(padded_queries))
        if not wanted.layers and not wanted.summary:
            return TeacherOutput({}, None)
        attention, whole_rows, summaries = {}, {}, []
        states: dict[tuple[int, int], HiddenStates] = {}
        for slot, picture in enumerate(pictures):
            with quick_attention(self.model, self.family.attention):
                reading = self.family.read(tokens, picture, wanted, slot)
            summaries.append(reading.summary)
            masks = tokens.mask.bool(), reading.image_mask
            for layer, block in reading.projections.items():
                attention[slot, layer] = cross_attention(block, *masks)
                if whole:
                    whole_rows[slot, layer] = whole_attention(block, *masks)
            states |= {(slot, layer): held for layer, held in reading.states.items()}
        answer = self.family.answer(summaries).float() if wanted.summary else None
        return TeacherOutput(attention, answer, whole_rows, states)

    def lacks(self, *, padded_queries: bool = False, whole: bool = False, hidden: bool = False) -> list[str]:
        """What of some wishes its family does not have, and what to do about each."""
        family = self.family
        wishes = (
            (whole and not family.whole, "it has no attention over the whole sequence: leave whole out of --targets"),
            (
                hidden and not family.hidden,
                "its blocks have no states of the image: leave hidden and pooled out of --targets",
            ),
            (
                padded_queries and not family.padded_queries,
                "its pictures are never padded, so it has no padded image row: use --queries valid",
            ),
        )
        return [line for lacking, line in wishes if lacking]


def cross_attention(
    block: Projections, text_mask: Bool[Tensor, "b t"], image_mask: Bool[Tensor, "b v"]
) -> CrossAttention:
    """The cross-modal maps of a block."""
    scale = block.text_query.shape[-1] ** -0.5
    i2t = None
    if block.image_query is not None and block.text_key is not None:
        i2t = block_softmax(block.image_query, block.text_key, text_mask, scale)
    return CrossAttention(t2i=block_softmax(block.text_query, block.image_key, image_mask, scale), i2t=i2t)


def whole_attention(
    block: Projections, text_mask: Bool[Tensor, "b t"], image_mask: Bool[Tensor, "b v"]
) -> WholeAttention:
    """A joint self-attention over [text; image], the valid keys of each sample first.

    Raises:
        TeacherError: the block is of a one-way family.
    """
    if block.image_query is None or block.text_key is None:
        raise TeacherError("expected a block in which both modalities have queries and keys, got a one-way block")
    query = torch.cat([block.text_query, block.image_query], dim=2)
    key = torch.cat([block.text_key, block.image_key], dim=2)
    mask = torch.cat([text_mask, image_mask], dim=1)
    rows = block_softmax(query, key, mask, query.shape[-1] ** -0.5)
    # Where nothing is padded, the keys are in their order already.
    if not bool(mask.all()):
        rows = rows.gather(-1, valid_first(mask)[:, None, None, :].expand(rows.shape))
    length = text_mask.shape[1]
    return WholeAttention(t2w=rows[:, :, :length], i2w=rows[:, :, length:])
