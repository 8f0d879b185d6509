"""Fusion encoders that give cross-modal attention: the only file that knows how a teacher is loaded and run.

The teacher is a stock Hugging Face ViLT. Its picture embedding is replaced by `vilt.embed_patches` (the stock one puts
patches in random order), and of its attention only the query and key projections of the layers asked for are kept: the
two cross-modal blocks are computed from them, the whole attention never is.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

from dde_cache.attention import QueryKey, block_softmax, valid_first
from dde_cache.errors import InputError, TeacherError
from dde_cache.preprocess import PixelBatch, Preprocessor, TokenBatch
from dde_cache.spec import Rows
from dde_cache.vilt import capture_query_key, capture_states, embed_patches

SAMPLE_TEACHER = "sample"
"""Name of the teacher that ships with the package."""

_FAMILY = {
    model.__name__: model
    for model in (
        ViltForQuestionAnswering,
        ViltForImagesAndTextClassification,
        ViltModel,
        ViltForMaskedLM,
        ViltForImageAndTextRetrieval,
    )
}


@dataclass(frozen=True)
class CrossAttention:
    """Attention of each modality over the other's valid keys; rows sum to 1, image axis [CLS; row-major patches]."""

    t2i: Float[Tensor, "b h t v"]
    i2t: Float[Tensor, "b h v t"]


@dataclass(frozen=True)
class WholeAttention:
    """Attention of each modality's queries over every valid token; rows sum to 1, keys [valid text; valid image]."""

    t2w: Float[Tensor, "b h t n"]
    i2w: Float[Tensor, "b h v n"]


@dataclass(frozen=True)
class HiddenStates:
    """What a block puts out, by modality; what lies behind the valid tokens means nothing."""

    text: Float[Tensor, "b t w"]
    image: Float[Tensor, "b v w"]


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
        """One kind of attention rows."""
        return getattr((self.attention if name in ("t2i", "i2t") else self.whole)[image, layer], name)


def joint_pass(
    vilt: Any, tokens: TokenBatch, pictures: PixelBatch, image_slot: int = 0, padding: int = 0
) -> tuple[Float[Tensor, "b w"] | None, Int[Tensor, "b v"]]:
    """Run ViLT on pairs with the image axis in row-major order.

    Args:
        vilt: a `ViltModel`.
        tokens: texts.
        pictures: pictures, one a text.
        image_slot: 0 for the first picture of a sample, 1 for the second (NLVR2's token type 2).
        padding: padded image tokens beyond the largest picture.

    Returns:
        The pooled output (None without a pooler) and the mask of image tokens.
    """
    embeddings = vilt.embeddings
    embeds, mask = embed_patches(
        embeddings.patch_embeddings.projection,
        embeddings.cls_token,
        embeddings.position_embeddings,
        pictures.pixels,
        pictures.grid,
        padding,
    )
    output = vilt(
        input_ids=tokens.ids,
        attention_mask=tokens.mask,
        image_embeds=embeddings.dropout(embeds),
        pixel_mask=mask.long(),
        image_token_type_idx=image_slot + 1,
    )
    return output.pooler_output, mask


def task_logits(model: Any, tokens: TokenBatch, pictures: Sequence[PixelBatch]) -> Float[Tensor, "b c"]:
    """Logits of a ViLT with a classification head, one joint pass a picture."""
    return _classify(model, [joint_pass(model.vilt, tokens, picture, slot)[0] for slot, picture in enumerate(pictures)])


def _classify(model: Any, pooled: Sequence[Float[Tensor, "b w"] | None]) -> Float[Tensor, "b c"]:
    # A model with a classification head has a pooler.
    return model.classifier(torch.cat([vector for vector in pooled if vector is not None], dim=-1))


class FusionTeacher:
    """A frozen fusion encoder with its processor.

    Args:
        model: a Hugging Face ViLT, with or without a task head.
        preprocessor: its processor.
    """

    def __init__(self, model: Any, preprocessor: Preprocessor) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocessor = preprocessor
        self.config: ViltConfig = model.config

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "FusionTeacher":
        """Load a checkpoint folder, a hub id, or the sample teacher (`sample`).

        Raises:
            TeacherError: nothing is there, it is no ViLT, or model and processor do not fit each other.
        """
        path = resolve(name)
        config = read_config(path)
        architecture = (config.architectures or ["ViltModel"])[0]
        family = _FAMILY.get(architecture)
        if family is None:
            raise TeacherError(
                f"{name}: expected a fusion encoder that we can read attention from ({', '.join(_FAMILY)}), got "
                f"{architecture}"
            )
        model = load_weights(family, path, config)
        preprocessor = Preprocessor.load(path, config.patch_size, config.max_position_embeddings)
        words = len(preprocessor.processor.tokenizer)
        if words > config.vocab_size:
            raise TeacherError(
                f"{name}: the tokenizer has {words} entries, the model {config.vocab_size}; they do not belong together"
            )
        return cls(model.to(device=device, dtype=dtype), preprocessor)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self.config.num_attention_heads)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The answers in logit order, or None where the teacher has no task head."""
        if not hasattr(self.model, "classifier"):
            return None
        return tuple(str(self.config.id2label[number]) for number in range(self.config.num_labels))

    @property
    def images(self) -> int:
        """How many images a sample must have."""
        return int(self.config.num_images) if isinstance(self.model, ViltForImagesAndTextClassification) else 1

    def weights_hash(self) -> str:
        """SHA-256 of every tensor's name, type, shape and bytes, whatever files they came in."""
        return hash_weights(self.model)

    @torch.inference_mode()
    def __call__(
        self,
        tokens: TokenBatch,
        pictures: Sequence[PixelBatch],
        layers: Sequence[int],
        *,
        padded_queries: bool = False,
        whole: bool = False,
        hidden: bool = False,
    ) -> TeacherOutput:
        """Run the teacher and compute the cross-modal blocks of `layers`.

        Args:
            tokens: texts; padded to the full text length where `padded_queries`.
            pictures: for each image slot, the pictures of the batch.
            layers: which blocks, 0-based.
            padded_queries: keep one padded image row, at the position after the picture's last token.
            whole: give the rows over the whole sequence too.
            hidden: give the hidden states too.

        Raises:
            InputError: the teacher wants another number of pictures.
        """
        if self.images != len(pictures):
            raise InputError(f"expected {self.images} images a sample for this teacher, got {len(pictures)}")
        vilt = self.model.vilt if hasattr(self.model, "vilt") else self.model
        attention, whole_rows, states = {}, {}, {}
        pooled = []
        blocks, length = vilt.encoder.layer, tokens.mask.shape[1]
        for slot, picture in enumerate(pictures):
            with capture_query_key(blocks, layers) as capture, capture_states(blocks, layers if hidden else ()) as held:
                pool, image_mask = joint_pass(vilt, tokens, picture, slot, padding=int(padded_queries))
            pooled.append(pool)
            for layer in layers:
                attention[slot, layer] = cross_attention(capture[layer], tokens.mask.bool(), image_mask)
                if whole:
                    whole_rows[slot, layer] = whole_attention(capture[layer], tokens.mask.bool(), image_mask)
                if hidden:
                    states[slot, layer] = HiddenStates(held[layer][:, :length], held[layer][:, length:])
        logits = None if self.labels is None else _classify(self.model, pooled).float()
        return TeacherOutput(attention, logits, whole_rows, states)


def cross_attention(joint: QueryKey, text_mask: Int[Tensor, "b t"], image_mask: Int[Tensor, "b v"]) -> CrossAttention:
    """The two cross-modal blocks of a joint self-attention over [text; image]."""
    length = text_mask.shape[1]
    scale = joint.query.shape[-1] ** -0.5
    text_query, image_query = joint.query[:, :, :length], joint.query[:, :, length:]
    text_key, image_key = joint.key[:, :, :length], joint.key[:, :, length:]
    return CrossAttention(
        t2i=block_softmax(text_query, image_key, image_mask, scale),
        i2t=block_softmax(image_query, text_key, text_mask, scale),
    )


def whole_attention(joint: QueryKey, text_mask: Bool[Tensor, "b t"], image_mask: Bool[Tensor, "b v"]) -> WholeAttention:
    """A joint self-attention over [text; image], the valid keys of each sample first."""
    mask = torch.cat([text_mask, image_mask], dim=1)
    rows = block_softmax(joint.query, joint.key, mask, joint.query.shape[-1] ** -0.5)
    # Where nothing is padded, the keys are in their order already.
    if not bool(mask.all()):
        rows = rows.gather(-1, valid_first(mask)[:, None, None, :].expand(rows.shape))
    length = text_mask.shape[1]
    return WholeAttention(t2w=rows[:, :, :length], i2w=rows[:, :, length:])


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str | Path) -> str:
    """Turn `sample` into the folder of the teacher that ships with the package; leave folders and hub ids as they are.

    Raises:
        TeacherError: no such folder, and not the form of a hub id.
    """
    text = str(name)
    if text == SAMPLE_TEACHER:
        return str(Path(__file__).parent / "sample_teacher")
    path = Path(text)
    if not path.is_dir() and (path.exists() or path.parent.is_dir() or not _HUB_ID.fullmatch(text)):
        raise TeacherError(
            f"{text}: expected a checkpoint folder, a hub id (owner/name) or `{SAMPLE_TEACHER}`; no such folder"
        )
    return text


def read_config(name: str) -> ViltConfig:
    """Read a checkpoint's configuration.

    Raises:
        TeacherError: it is missing, unreadable, or not a ViLT's.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"{name}: expected a folder or hub id with a ViLT checkpoint (config.json, model.safetensors, processor), "
            f"but it cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(config, ViltConfig):
        raise TeacherError(f"{name}: expected a fusion encoder (model_type vilt), got model_type {config.model_type}")
    return config


def load_weights(family: Any, path: str, config: ViltConfig, optional: Sequence[str] = ()) -> Any:
    """Load a checkpoint into a model class, and see that nothing is left at random numbers.

    Args:
        family: a ViLT of Hugging Face.
        path: folder or hub id.
        config: its configuration.
        optional: modules that the checkpoint may lack or hold in another shape; they start from random numbers then.

    Raises:
        TeacherError: the files cannot be read, or tensors are missing or of another shape.
    """
    try:
        model, report = family.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"{path}: the weights cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted({*report["missing_keys"], *(name for name, *_shapes in report["mismatched_keys"])})
    missing = [name for name in missing if not name.startswith(tuple(f"{part}." for part in optional))]
    if missing:
        raise TeacherError(
            f"{path}: expected the weights of {family.__name__}, but {len(missing)} tensors are missing or of another "
            f"shape, for example {missing[0]}; it would run with random numbers in their place"
        )
    return model
