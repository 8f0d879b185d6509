"""Any image or text encoder of Hugging Face as a tower: the stock model runs, two of its linear maps are listened to.

Query and key are what the two linear maps of a block's self-attention give: before any rotation or normalisation, and
whatever mask the model itself uses among its own tokens (CLIP's text model looks back only).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dde_cache.attention import QueryKey
from dde_cache.canonical import PLACE
from dde_cache.errors import TeacherError, bullet_list
from dde_cache.towers.contract import BlockOutput, PatchLayout, Tower, TowerOutput
from dde_cache.towers.pixels import Filter, Scale, resize

Pooling = Literal["pooler", "first", "mean"]
"""`pooler`: what the model gives as its pooled output; `first`: its first token behind the final norm; `mean`: the mean
of all valid tokens there."""

LISTENED = (("query", "key"), ("q_proj", "k_proj"), ("q_lin", "k_lin"))
"""Names of the two linear maps in the attention modules of the library."""

_HEADS = ("num_attention_heads", "num_heads", "n_heads")

_UNLISTED = {"siglip_text_model": "SiglipTextModel", "aimv2_text_model": "Aimv2TextModel"}
"""Halves of image-text models that the library's own table leaves out."""

_EAGER = ("aimv2_text_model",)
"""Models whose fused attention forgets their mask: AIMv2's text model looks back only, but both ways in a batch without
padding (transformers 5.23), so that a text's vector would depend on the texts beside it."""

WHOLE_LENGTH = ("siglip_text_model",)
"""Text models that were trained on texts padded to their full length, without a mask: they pool the last position."""

_UNSTABLE = (*PLACE, "_attn_implementation_autoset")

_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "drop_path_rate",
)  # fmt: skip


class TextShape(BaseModel):
    """A text tower: its model's configuration, the tokens that it reads at most, and how it pools."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, Any]
    length: int = Field(ge=1)
    pooling: Pooling
    pad: int = Field(ge=0)


class ImageShape(BaseModel):
    """An image tower: its model's configuration, how it pools, the side of its square in pixels, the filter that makes
    it, and the numbers that the run's processor gives and that the model wants."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, Any]
    pooling: Pooling
    size: int = Field(ge=1)
    first: int = Field(ge=0)
    grid: tuple[int, int]
    resample: Filter
    reads: Scale
    wants: Scale


def plain_config(config: Any, dropout: float) -> dict[str, Any]:
    """A model's configuration without what depends on where it lay, with another dropout."""
    return with_dropout({name: value for name, value in config.to_dict().items() if name not in _UNSTABLE}, dropout)


def with_dropout(values: Mapping[str, Any], dropout: float) -> dict[str, Any]:
    """A model's configuration with another dropout, wherever it has one."""
    return {**values, **{name: dropout for name in _DROPOUTS if isinstance(values.get(name), (int, float))}}


def positions(model: PreTrainedModel) -> int:
    """Tokens that a text model reads at most."""
    known = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(known, int):
        return 2**31 - 1
    # RoBERTa counts its positions from behind the padding's.
    embedding = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    before = embedding.padding_idx if isinstance(embedding, nn.Embedding) else None
    return known if before is None else known - before - 1


def family_of(config: Any) -> Any:
    """The library's class of encoders with a configuration.

    Raises:
        ValueError: it has none.
    """
    kind = config.model_type
    if kind in _UNLISTED:
        return getattr(transformers, _UNLISTED[kind])
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"the library has no encoder of model_type {kind!r:.60}")
    return MODEL_MAPPING[type(config)]


def new_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the library with random weights.

    Raises:
        TeacherError: the library has no such model.
    """
    values = dict(config)
    kind = str(values.pop("model_type", None))
    try:
        made = AutoConfig.for_model(kind, **values)
        options = {"attn_implementation": "eager"} if kind in _EAGER else {}
        return family_of(made)._from_config(made, **options)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TeacherError(
            f"expected an encoder that the transformers library has, got {kind!r:.60}: {error}"
        ) from error


@dataclass(frozen=True)
class Block:
    """One block of a model: itself, the two linear maps of its self-attention, and its heads."""

    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    heads: int


def find_blocks(model: nn.Module) -> list[Block]:
    """The model's longest stack of blocks that each have one self-attention with query and key maps of one width.

    Raises:
        TeacherError: it has none; its stacks are listed, each with the linear maps of its first block.
    """
    stacks = [
        [_block(module) for module in stack] for stack in model.modules() if isinstance(stack, nn.ModuleList) and stack
    ]
    whole = [[block for block in stack if block is not None] for stack in stacks if None not in stack]
    if not whole:
        listed = ", ".join(f"{query}/{key}" for query, key in LISTENED)
        raise TeacherError(
            f"expected a stack of blocks with one self-attention each, whose linear maps are named {listed} and give "
            f"one width and whole heads; {type(model).__name__} has none. Its stacks:{_stacks(model)}"
        )
    return max(whole, key=len)


def _stacks(model: nn.Module) -> str:
    """What a model has instead of blocks that are known, in no more than a screen."""
    lines = []
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and stack:
            maps = [path for path, part in stack[0].named_modules() if isinstance(part, nn.Linear)]
            shown = ", ".join(maps[:6]) + (", ..." if len(maps) > 6 else "")
            lines.append(f"{name}: {len(stack)} x {type(stack[0]).__name__}, linear maps: {shown or 'none'}"[:200])
    if not lines:
        return "\n  none; it is made of " + ", ".join(name for name, _ in model.named_children())[:200]
    return bullet_list(lines, 8)


def _block(module: nn.Module) -> Block | None:
    found = [
        (part, getattr(part, query), getattr(part, key))
        for part in module.modules()
        for query, key in LISTENED
        if isinstance(getattr(part, query, None), nn.Linear) and isinstance(getattr(part, key, None), nn.Linear)
    ]
    if len(found) != 1:
        return None
    part, query, key = found[0]
    heads = next((int(getattr(part, name)) for name in _HEADS if isinstance(getattr(part, name, None), int)), 0)
    fits = heads and query.out_features == key.out_features and query.out_features % heads == 0
    return Block(module, query, key, heads) if fits else None


@contextmanager
def listen(blocks: Sequence[Block], numbers: Sequence[int]) -> Iterator[dict[int, BlockOutput]]:
    """Fill in what some blocks gave, once the model has run while the context is open."""
    heard: dict[tuple[int, str], Tensor] = {}
    outputs: dict[int, BlockOutput] = {}

    def keep(number: int, name: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        heard[number, name] = output[0] if isinstance(output, tuple) else output

    handles = [
        module.register_forward_hook(partial(keep, number, name))
        for number in numbers
        for name, module in (
            ("query", blocks[number].query),
            ("key", blocks[number].key),
            ("states", blocks[number].module),
        )
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    for number in numbers:
        query, key = (
            heard[number, name].unflatten(-1, (blocks[number].heads, -1)).transpose(1, 2) for name in ("query", "key")
        )
        outputs[number] = BlockOutput(QueryKey(query, key), heard[number, "states"])


class _Wrapped(Tower):
    """A stock model with its blocks."""

    def __init__(self, config: Mapping[str, Any], pooling: Pooling) -> None:
        model = new_model(config)
        blocks = find_blocks(model)
        size = blocks[-1].query.out_features // blocks[-1].heads
        super().__init__(int(model.config.hidden_size), blocks[-1].heads, size, len(blocks))
        self.model = model
        self.pooling = pooling
        self._blocks = blocks

    def run(self, mask: Bool[Tensor, "b n"], shown: int, **inputs: Any) -> TowerOutput:
        """Run the model; `shown` tokens of it are given."""
        with listen(self._blocks, self.kept()) as blocks:
            output = self.model(**inputs)
        states = output.last_hidden_state
        if self.pooling == "pooler":
            pooled = output.pooler_output
        elif self.pooling == "first":
            pooled = states[:, 0]
        else:
            weight = mask.to(states.dtype)[..., None]
            pooled = (states * weight).sum(1) / weight.sum(1)
        cut = {
            number: BlockOutput(
                QueryKey(block.query_key.query[:, :, :shown], block.query_key.key[:, :, :shown]),
                block.states[:, :shown],
            )
            for number, block in blocks.items()
        }
        return TowerOutput(self.projection(pooled), mask[:, :shown], cut, states[:, :shown])


class HuggingFaceTextTower(_Wrapped):
    """A text encoder."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__(shape.model, shape.pooling)
        self.length, self.pad = shape.length, shape.pad
        whole = self.model.config.model_type in WHOLE_LENGTH
        self._whole: int | None = self.model.config.max_position_embeddings if whole else None

    def forward(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]) -> TowerOutput:
        """Encode texts."""
        mask, shown = attention_mask.bool(), input_ids.shape[1]
        if self._whole is None:
            return self.run(mask, shown, input_ids=input_ids, attention_mask=attention_mask)
        # Every position asks and answers, padding too; its id must be that of training, whatever the batch holds there.
        ids = torch.where(mask, input_ids, self.pad)
        behind = (0, self._whole - shown)
        return self.run(
            nn.functional.pad(mask, behind), shown, input_ids=nn.functional.pad(ids, behind, value=self.pad)
        )


class HuggingFaceImageTower(_Wrapped):
    """An image encoder that sees every picture whole, squeezed to its own square."""

    def __init__(self, shape: ImageShape, patch: int) -> None:
        super().__init__(shape.model, shape.pooling)
        self.shape, self.patch = shape, patch
        self.layout = PatchLayout(shape.first, *shape.grid)

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], grid: Int[Tensor, "b 2"], image_slot: int = 0, padding: int = 0
    ) -> TowerOutput:
        """Encode pictures, padded at the bottom and right; `grid` holds the run's patch rows and columns of each.

        Which of two pictures it is, and padded tokens, mean nothing here.
        """
        sizes, member = torch.unique(grid, dim=0, return_inverse=True)
        rows, order = [], []
        for number, (height, width) in enumerate((sizes * self.patch).tolist()):
            chosen = (member == number).nonzero()[:, 0]
            order.append(chosen)
            rows.append(self.squeeze(pixel_values[chosen.to(pixel_values.device), :, :height, :width]))
        place = torch.cat(order).argsort().to(pixel_values.device)
        return self.encode(torch.cat(rows)[place])

    def squeeze(self, pixels: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c s s"]:
        """From the run's pixels of pictures of one size to the model's."""
        # In fp32 inside autocast too: levels up to 255 have no room in 8 bits of mantissa.
        with torch.autocast(pixels.device.type, enabled=False):
            levels = self.shape.reads.levels(pixels.float())
            return self.shape.wants(resize(levels, self.shape.size, self.shape.resample))

    def encode(self, pixels: Float[Tensor, "b c s s"]) -> TowerOutput:
        """Encode the model's own pixels."""
        tokens = self.shape.first + self.shape.grid[0] * self.shape.grid[1]
        mask = torch.ones(pixels.shape[0], tokens, dtype=torch.bool, device=pixels.device)
        weight = next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())
        return self.run(mask, tokens, pixel_values=pixels.to(weight.dtype))
