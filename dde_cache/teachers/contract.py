"""What a family of fusion encoders must tell: the queries and keys that its two modalities show each other.

A family is one file: where its model keeps the projections of a block, what its image axis is, what it cannot give, and
which numbers of its configuration say how large a teacher is. Softmax, masks, codecs and everything after them are the
same for all, and stand elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.preprocess import TokenBatch
from dde_cache.spec import Direction

ROW_MAJOR: Final = "block-softmax, cls first, row-major patches"
"""Rule of a teacher whose image axis is [CLS; patches in row-major order]."""

REGIONS: Final = "block-softmax, regions"
"""Rule of a teacher whose image axis is the regions that a detector found, in the order in which they are given."""

MATCHING = ("unmatched", "matched")
"""Answers of a matching head, in the order of its logits."""

BOTH: tuple[Direction, ...] = ("t2i", "i2t")


@dataclass(frozen=True)
class Shape:
    """How large a teacher is.

    Attributes:
        layers: blocks with cross-modal attention.
        heads: of each of them.
        width: of their hidden states.
        words: entries of the vocabulary.
        text_length: most tokens of a text.
        patch_size: in pixels; 1 where there are no patches.
        side: the one height and width of pictures that it reads, in pixels; None: any whole number of patches.
    """

    layers: int
    heads: int
    width: int
    words: int
    text_length: int
    patch_size: int
    side: int | None


@dataclass(frozen=True)
class Wanted:
    """What one forward pass is for.

    Attributes:
        layers: 0-based blocks whose projections are kept.
        hidden: keep their hidden states too.
        summary: what the head reads is needed, so the pass runs to its end.
        padding: padded image tokens beyond the largest picture of the batch.
    """

    layers: Sequence[int]
    hidden: bool = False
    summary: bool = True
    padding: int = 0


@dataclass(frozen=True)
class Projections:
    """Query and key projections of one block: t2i compares the first two, i2t the others (None in a one-way family)."""

    text_query: Float[Tensor, "b h t d"]
    image_key: Float[Tensor, "b h v d"]
    image_query: Float[Tensor, "b h v d"] | None
    text_key: Float[Tensor, "b h t d"] | None


@dataclass(frozen=True)
class HiddenStates:
    """What a block puts out, by modality; what lies behind the valid tokens means nothing."""

    text: Float[Tensor, "b t w"]
    image: Float[Tensor, "b v w"]


@dataclass(frozen=True)
class Reading:
    """What one forward pass over texts and one picture each gave; mappings are by layer."""

    projections: Mapping[int, Projections]
    image_mask: Bool[Tensor, "b v"]
    states: Mapping[int, HiddenStates] = field(default_factory=dict)
    summary: Any = None


Architectures = Mapping[type[nn.Module], tuple[str, ...] | Callable[[Any], tuple[str, ...]] | None]
"""Model classes of a family, and the answers of each one's head: None where it has none, `MATCHING` of a matching head,
a function of the configuration for a task head."""

Forwards = Mapping[type[nn.Module], Callable[..., Any]]
"""By class of an attention module, what runs in place of its `forward`."""


class Family(ABC):
    """One family of fusion encoders, around one loaded model.

    Attributes:
        name: as `spec.teacher.family` has it: the model_type of its configurations.
        rule: what the image axis is.
        directions: which maps it has.
        whole: whether its queries see both modalities in one softmax, so that rows over every token exist.
        hidden: whether its blocks put out states of both modalities.
        padded_queries: whether it can be shown a padded image token, as `queries: all` wants.
        processor: class of its processor in the model library.
        architectures: its model classes, and the answers of their heads.
        attention: what runs in place of the library's attention modules while nobody asks for their weights; see
            `quick`.

    Args:
        model: of one of the architectures.
    """

    name: ClassVar[str]
    rule: ClassVar[str] = ROW_MAJOR
    directions: ClassVar[tuple[Direction, ...]] = BOTH
    whole: ClassVar[bool] = False
    hidden: ClassVar[bool] = True
    padded_queries: ClassVar[bool] = False
    processor: ClassVar[str]
    architectures: ClassVar[Architectures]
    attention: ClassVar[Forwards] = {}

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def shape(cls, config: Mapping[str, Any]) -> Shape:
        """The size of a teacher, from its configuration as JSON has it (of a stranger, in a cache).

        Raises:
            KeyError, TypeError: the configuration lacks it.
        """

    @classmethod
    @abstractmethod
    def tower(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fields of a `ViltConfig`: the towers of a new student that learns from this teacher.

        Raises:
            KeyError, TypeError: the configuration lacks it.
        """

    @classmethod
    def towers(cls, config: Mapping[str, Any]) -> ViltConfig:
        """The shape of a new student's towers.

        Raises:
            KeyError, TypeError, ValueError: the configuration cannot be used.
        """
        return ViltConfig.from_dict(dict(cls.tower(config)))

    @classmethod
    def answers(cls, model: type[nn.Module], config: Any) -> tuple[str, ...] | None:
        """Answers of a model class with a configuration in logit order, or None without a head."""
        found = cls.architectures[model]
        return found(config) if callable(found) else found

    @property
    def images(self) -> int:
        """Pictures that it reads for one logit vector."""
        return 1

    @abstractmethod
    def read(self, tokens: TokenBatch, picture: Any, wanted: Wanted, slot: int = 0) -> Reading:
        """Run the model on pairs.

        Args:
            tokens: texts.
            picture: a `PixelBatch` of as many pictures, or a `RegionBatch` where the rule is `REGIONS`.
            wanted: what for.
            slot: 0 for the first picture of a sample, 1 for the second.
        """

    def answer(self, summaries: Sequence[Any]) -> Float[Tensor, "b c"]:
        """Logits from what the forward passes of a sample's pictures left for the head."""
        raise NotImplementedError(f"{self.name} has no head")


class _Enough(Exception):
    """Everything that was wanted of a forward pass is there."""


Tap = tuple[Hashable, ...]


@contextmanager
def taps(modules: Mapping[Tap, nn.Module], *, enough: int | None = None) -> Iterator[dict[Tap, list[Tensor]]]:
    """Keep what modules put out while the context is open, by name and in the order of the calls.

    Args:
        modules: by name.
        enough: leave the context as soon as so many outputs were kept: nothing behind them is computed. None: never.
    """
    taken: dict[Tap, list[Tensor]] = {name: [] for name in modules}

    def keep(name: Tap, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        taken[name].append(output[0] if isinstance(output, tuple) else output)
        if enough is not None and sum(map(len, taken.values())) >= enough:
            raise _Enough

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        yield taken
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def split_heads(projected: Float[Tensor, "b n w"], heads: int) -> Float[Tensor, "b h n d"]:
    """A projection by heads."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


_OF_TEXT = ("num_hidden_layers", "intermediate_size", "hidden_act", "layer_norm_eps", "vocab_size", "pad_token_id")
_WHERE_THERE = ("type_vocab_size", "initializer_range")


def twin_tower(shape: Shape, text: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Fields of a `ViltConfig` for the towers of a student of a teacher with towers of its own.

    Width and heads are those of the cross-modal blocks, whose maps the student's last block is compared with; depth and
    all else are those of the teacher's text encoder.

    Args:
        shape: of the teacher; it reads pictures of one size.
        text: configuration of its text encoder.
        channels: of its pictures.

    Raises:
        KeyError: the configuration lacks something.
    """
    fields = {name: text[name] for name in _OF_TEXT} | {name: text[name] for name in _WHERE_THERE if name in text}
    return fields | {
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.text_length,
        "image_size": shape.side,
        "patch_size": shape.patch_size,
        "num_channels": channels,
    }


def whole_number(number: Any) -> int:
    """A number of a configuration.

    Raises:
        TypeError: it is none (a pair of sides, say).
    """
    if type(number) is not int:
        raise TypeError(f"expected a whole number, got {number!r:.50}")
    return number
