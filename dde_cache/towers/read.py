"""Folders and hub ids -> towers with their weights, and what is refused of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from dde_cache.checkpoint import resolve
from dde_cache.errors import TeacherError, bullet_list, first_line
from dde_cache.towers.hugging_face import (
    ImageShape,
    Pooling,
    TextShape,
    family_of,
    find_blocks,
    new_model,
    plain_config,
    positions,
)
from dde_cache.towers.pixels import FILTERS, Scale

MOST_FIRST = 32
"""Tokens before the patches: CLS, distillation, registers."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class TextSource:
    """A text encoder as it was found: its shape, weights and tokenizer."""

    shape: TextShape
    weights: dict[str, Tensor]
    tokenizer: Any


@dataclass(frozen=True)
class ImageSource:
    """An image encoder as it was found: its shape and weights."""

    shape: ImageShape
    weights: dict[str, Tensor]


def read_text_tower(name: str, dropout: float = 0.0) -> TextSource:
    """Read a text encoder, or the text half of an image-text model, with its tokenizer.

    Args:
        name: folder or hub id.
        dropout: in the tower.

    Raises:
        TeacherError: nothing is there, weights are missing, it has no attention that can be read, or no fast tokenizer.
    """
    path = resolve(name)
    model, pooling = _read_model(path, "text", dropout)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except _UNREADABLE as error:
        raise TeacherError(f"{name}: expected a tokenizer beside the text encoder: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise TeacherError(
            f"{name}: expected a fast tokenizer (tokenizer.json) with a padding token, which knows where in a text its "
            f"tokens stand, got {type(tokenizer).__name__}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Of a folder without any the library makes one that knows no word.
        raise TeacherError(f"{name}: expected a tokenizer beside the text encoder (tokenizer.json), found none")
    words = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > words:
        raise TeacherError(f"{name}: the tokenizer has {len(tokenizer)} entries, the model {words}; they do not match")
    length = min(positions(model), int(tokenizer.model_max_length))
    shape = TextShape(
        model=plain_config(model.config, dropout), length=length, pooling=pooling, pad=int(tokenizer.pad_token_id)
    )
    _check_end(name, model, tokenizer)
    if pooling == "first":
        _check_looks_ahead(name, model, tokenizer)
    return TextSource(shape, model.state_dict(), tokenizer)


def read_image_tower(name: str, reads: Any, dropout: float = 0.0) -> ImageSource:
    """Read an image encoder, or the image half of an image-text model, with the constants of its processor.

    Args:
        name: folder or hub id.
        reads: the run's image processor, whose pixels the tower is given.
        dropout: in the tower.

    Raises:
        TeacherError: nothing is there, weights are missing, it has no attention that can be read, no square of one
            size, no processor, or tokens in another order than a few and then the patches, row by row.
    """
    path = resolve(name)
    model, pooling = _read_model(path, "vision", dropout)
    size = getattr(model.config, "image_size", None)
    if not isinstance(size, int) or isinstance(size, bool):
        raise TeacherError(f"{name}: expected an image encoder of one square size (image_size), got {size!r:.60}")
    try:
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        wants, run = Scale.of(processor), Scale.of(reads)
        kind = getattr(processor, "resample", None)
        resample = FILTERS.get(2 if kind is None else int(kind))
    except _UNREADABLE as error:
        raise TeacherError(
            f"{name}: expected an image processor beside the encoder (preprocessor_config.json) with mean and std: "
            f"{first_line(error)}"
        ) from error
    if resample is None:
        raise TeacherError(f"{name}: expected a processor that resizes bilinearly or bicubically")
    first, side = _check_order(name, model, size)
    # Without a token before the patches the first one is the picture's corner.
    pooling = "mean" if (pooling, first) == ("first", 0) else pooling
    shape = ImageShape(
        model=plain_config(model.config, dropout),
        pooling=pooling,
        size=size,
        first=first,
        grid=(side, side),
        resample=resample,
        reads=run,
        wants=wants,
    )
    return ImageSource(shape, model.state_dict())


def _read_model(path: str, half: str, dropout: float) -> tuple[PreTrainedModel, Pooling]:
    """A model with its weights in float32, and how it pools."""
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        whole, report = family_of(config).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        both = hasattr(config, f"{half}_config")
        found = getattr(whole, f"{half}_model") if both else whole
    except _UNREADABLE as error:
        raise TeacherError(
            f"{path}: expected a folder or hub id of a Hugging Face {half} encoder (config.json, model.safetensors), "
            f"but it cannot be read: {first_line(error)}"
        ) from error
    tensors = [tensor.data_ptr() for tensor in found.state_dict().values() if tensor.numel()]
    if getattr(found.config, "is_encoder_decoder", False) or len(set(tensors)) < len(tensors):
        raise TeacherError(
            f"{path}: expected an encoder with weights of its own, got {type(found).__name__}, which has a decoder or "
            "ties some of them together: what is saved of it would not be what was trained"
        )
    prefix = f"{half}_model." if both else ""
    lost = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    lost = [name.removeprefix(prefix) for name in lost if name.startswith(prefix)]
    pooler = [name for name in lost if name.startswith("pooler.")]
    if len(lost) > len(pooler):
        some = bullet_list([name for name in lost if name not in pooler])
        raise TeacherError(
            f"{path}: expected the weights of {type(found).__name__}, but {len(lost) - len(pooler)} tensors are "
            f"missing or of another shape; it would run with random numbers in their place:{some}"
        )
    find_blocks(found)
    # Anew from its configuration, as a saved student will be: what cannot be rebuilt is refused now, not later.
    model = new_model(plain_config(found.config, dropout))
    model.load_state_dict(found.state_dict())
    return model.eval(), "mean" if _means(path) else _pooling(model, untrained=bool(pooler))


def _means(path: str) -> bool:
    """Whether a folder of sentence-transformers says that its sentences are means of tokens."""
    about = Path(path) / "1_Pooling" / "config.json"
    try:
        return json.loads(about.read_bytes()).get("pooling_mode_mean_tokens") is True
    except (OSError, ValueError, AttributeError):
        return False


def _pooling(model: PreTrainedModel, *, untrained: bool) -> Pooling:
    """`pooler` where the model has a pooled output that was trained; else its first token."""
    names = ("pooler", "head", "eos_token_id", "post_layernorm")
    pools = any(getattr(model, name, None) is not None for name in names)
    # DINOv2 gives its CLS token behind the final norm as the pooled output: its first token, by either name.
    return "first" if untrained or not pools else "pooler"


def _check_end(name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a model that pools the token that ends a text, where its tokenizer writes none."""
    end = getattr(model, "eos_token_id", None)
    if end is None:
        return
    ids = tokenizer("a")["input_ids"]
    # CLIP's older configurations say 2 and mean the largest id.
    if ids[-1] != (max(ids) if end == 2 and model.config.model_type == "clip_text_model" else end):
        raise TeacherError(
            f"{name}: it pools the token that ends a text (eos_token_id {end}), but its tokenizer ends texts with "
            f"{ids[-1]}; they do not belong together"
        )


@torch.inference_mode()
def _check_looks_ahead(name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a model whose first token, which is pooled, sees itself alone: every text would have one vector."""
    words = int(model.get_input_embeddings().weight.shape[0])
    begin = tokenizer("a")["input_ids"][:2]
    ids = torch.tensor([[*begin, words - 1], [*begin, words - 2]])
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    if torch.equal(states[0, 0], states[1, 0]):
        raise TeacherError(
            f"{name}: expected a text encoder that looks both ways, got one that looks back only and would be pooled "
            "by its first token, which is the same for all texts; choose an encoder (BERT, MiniLM, CLIP's text half)"
        )


class _Reached(Exception):
    """What went into the first block."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


@torch.inference_mode()
def _check_order(name: str, model: PreTrainedModel, size: int) -> tuple[int, int]:
    """Tokens before the patches, and patches a side; seen by changing single patches of a picture.

    Raises:
        TeacherError: the tokens that change are not those of a square grid, row by row, behind a few others.
    """
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(patch, int) or patch < 1 or size % patch:
        raise TeacherError(f"{name}: expected an image_size that its patch_size divides, got {size} and {patch!r:.40}")
    side = size // patch
    pictures = torch.zeros(1 + 3, 3, size, size)
    places = [(0, 0), (0, side - 1), (side - 1, 0)]
    for number, (row, column) in enumerate(places, 1):
        pictures[number, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 1.0

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        raise _Reached(inputs[0] if inputs else options["hidden_states"])

    handle = find_blocks(model)[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(pixel_values=pictures)
    except _Reached as reached:
        tokens = reached.tokens
    except _UNREADABLE as error:
        raise TeacherError(f"{name}: expected an image encoder that reads pixel_values: {first_line(error)}") from error
    finally:
        handle.remove()
    first = tokens.shape[1] - side * side
    changed = [(tokens[number] != tokens[0]).any(-1).nonzero()[:, 0].tolist() for number in range(1, 4)]
    wanted = [[first + row * side + column] for row, column in places]
    if not 0 <= first <= MOST_FIRST or changed != wanted:
        raise TeacherError(
            f"{name}: expected up to {MOST_FIRST} tokens and then {side} x {side} patches, row by row, each seen by "
            f"one token; got {tokens.shape[1]} tokens, of which three single patches change {changed}"
        )
    return first, side
