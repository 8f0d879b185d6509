"""What of the teacher a student is compared with: rows, layers, heads. Pure functions of the settings."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from dde_cache.errors import InputError
from dde_cache.losses import Tail
from dde_cache.runs import AugmentedConfig
from dde_cache.spec import Heads, Rows

SAME = "same"
"""The layer map that gives each layer of the teacher the student's block of the same number."""

_MAP = re.compile(r"\d+:\d+(,\d+:\d+)*|" + SAME)


class LayerPair(NamedTuple):
    """A layer of the teacher, and the block of the student that learns from it; None: the last."""

    teacher: int
    student: int | None

    @property
    def name(self) -> str:
        """As in a layer map."""
        return f"{self.teacher}:{'last' if self.student is None else self.student}"


class DistillConfig(AugmentedConfig):
    """Which of the teacher's signals count, and how. A weight of 0 leaves a loss out, and its targets are not read."""

    attention_weight: float = Field(default=1.0, ge=0)
    soft_weight: float = Field(default=1.0, ge=0)
    hard_weight: float = Field(default=0.0, ge=0)
    hidden_weight: float = Field(default=0.0, ge=0, description="of the hidden states' squared error")
    pooled_weight: float = Field(default=0.0, ge=0, description="of the pooled states' squared error")
    ranking_weight: float = Field(default=0.0, ge=0, description="of the ranking of mined candidates")
    ranking_temperature: float = Field(default=1.0, gt=0, description="of the teacher's matching scores")
    ranking_top: int | None = Field(default=None, ge=1, description="the first candidates alone; null: all")
    directions: Literal["both", "t2i", "i2t"] = Field(
        default="both", description="queries of the attention loss: texts', pictures', or both"
    )
    attention: Literal["cross", "whole"] = Field(
        default="cross", description="keys of the attention loss: those of the other modality, or of the whole sequence"
    )
    heads: Heads | None = Field(
        default=None, description="all: head by head; mean: averaged on both sides; null: as the targets have them"
    )
    layer: int | None = Field(
        default=None, ge=0, description="the teacher's layer that the last block learns from; null: the last stored"
    )
    layer_map: str | None = Field(
        default=None, description="teacher:student blocks, as 3:2,7:5; same: each stored layer and its namesake"
    )
    tail: Tail = Field(
        default="bucket", description="how the mass of the keys that were not kept counts; nothing where all were"
    )
    queries: Literal["valid", "all"] = Field(
        default="valid",
        description="query rows in the mean of the attention loss: valid ones, or padding too (published)",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="of the soft labels: both logits divided by it, the loss times its square"
    )
    image_tower: str | None = Field(
        default=None, description="image encoder of Hugging Face (folder or hub id); null: a twin of ViLT's shape"
    )
    text_tower: str | None = Field(
        default=None, description="text encoder of Hugging Face (folder or hub id); null: a twin of ViLT's shape"
    )
    grids: Literal["resample", "refuse"] = Field(
        default="resample", description="where the image tower cuts pictures into other patches than the teacher"
    )
    missing_tokens: Literal["refuse", "drop"] = Field(
        default="refuse", description="tokens of the teacher that a tower lacks: drop leaves them out of rows and keys"
    )
    remap_flips: bool = Field(
        default=False, description="mirror every other picture, and its stored maps with it: an approximation"
    )

    @field_validator("layer_map")
    @classmethod
    def _check_map(cls, layer_map: str | None) -> str | None:
        if layer_map is None:
            return None
        if not _MAP.fullmatch(layer_map):
            raise ValueError(f"expected layers as teacher:student with commas (3:2,7:5), or `{SAME}`")
        given = [pair.split(":")[0] for pair in layer_map.split(",")]
        if len(set(given)) != len(given):
            raise ValueError(f"expected each layer of the teacher once, got {layer_map}")
        return layer_map

    @model_validator(mode="after")
    def _check_weights(self) -> "DistillConfig":
        names = ("attention", "soft", "hard", "hidden", "pooled", "ranking")
        if not any(getattr(self, f"{name}_weight") for name in names):
            listed = ", ".join(f"{name}_weight" for name in names[:-1])
            raise ValueError(f"expected at least one of {listed} and {names[-1]}_weight above 0")
        return self

    @model_validator(mode="after")
    def _check_choices(self) -> "DistillConfig":
        if self.layer is not None and self.layer_map is not None:
            raise ValueError("expected layer or layer_map, got both: layer stands for a map to the last block")
        if self.remap_flips and (self.attention == "whole" or self.hidden_weight or self.pooled_weight):
            raise ValueError("expected remap_flips with cross attention alone: nothing else is mirrored")
        return self

    @property
    def rows(self) -> tuple[Rows, ...]:
        """The kinds of attention rows that are compared; none where attention has no weight."""
        kinds: dict[str, tuple[Rows, Rows]] = {"cross": ("t2i", "i2t"), "whole": ("t2w", "i2w")}
        asked = {"both": (0, 1), "t2i": (0,), "i2t": (1,)}[self.directions]
        return tuple(kinds[self.attention][number] for number in asked) if self.attention_weight else ()

    @property
    def states(self) -> tuple[str, ...]:
        """The kinds of states that are compared, each with projections of its own."""
        return tuple(kind for kind in ("hidden", "pooled") if getattr(self, f"{kind}_weight"))

    @property
    def reads_records(self) -> bool:
        """Whether a loss needs more of the teacher than its logits."""
        return bool(self.attention_weight or self.hidden_weight or self.pooled_weight)

    def pairs(self, layers: Sequence[int]) -> tuple[LayerPair, ...]:
        """The layers that are compared.

        Args:
            layers: of the teacher, as they are stored or can be had; the last of them is the default.
        """
        if self.layer_map == SAME:
            return tuple(LayerPair(layer, layer) for layer in layers)
        if self.layer_map is not None:
            numbers: list[Any] = [pair.split(":") for pair in self.layer_map.split(",")]
            return tuple(LayerPair(int(teacher), int(student)) for teacher, student in numbers)
        return (LayerPair(self.layer if self.layer is not None else layers[-1] if layers else 0, None),)


def check_blocks(pairs: Sequence[LayerPair], depth: int) -> None:
    """Refuse a layer map to blocks that the student does not have.

    Raises:
        InputError: there are some.
    """
    wrong = [pair.name for pair in pairs if pair.student is not None and pair.student >= depth]
    if wrong:
        raise InputError(f"expected a layer map to the student's blocks 0 to {depth - 1}, got {', '.join(wrong)}")
