"""What the teacher's attention looks like for some pairs, and the student's beside it, in the form that a page shows.

Weights are kept as the nearest of 254 levels of their square root, one byte each: an error of at most 0.004 at a
weight of 1, and less below.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from dde_cache.align import Axes, without_keys
from dde_cache.attention import Attention, SparseAttention, densify
from dde_cache.batches import Batch, PairDataset, to_device
from dde_cache.distill import student_output, student_rows
from dde_cache.errors import RunError
from dde_cache.losses import attention_kl
from dde_cache.match import Raw
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import TargetSpec
from dde_cache.student import DualEncoder, DualEncoderOutput
from dde_cache.targets import decoded
from dde_cache.vilt import image_tokens, token_mask

LEVELS = 254
"""Of the square root of a weight."""

LOSSLESS_SIDE = 128
"""Pictures up to so many pixels a side are kept as PNG, larger ones as JPEG."""


@dataclass(frozen=True)
class Rows:
    """One direction of the attention of one pair and image slot.

    Attributes:
        teacher: levels of the weights; keys that were not kept have 0.
        student: the same of the student, or None.
        kl: KL(teacher || student) of each row in nats; the tail counts as one outcome.
        kept: kept mass of each row; None where every key is kept.
    """

    teacher: UInt8[np.ndarray, "h q k"]
    student: UInt8[np.ndarray, "h q k"] | None
    kl: Float[np.ndarray, "h q"] | None
    kept: Float[np.ndarray, "h q"] | None


@dataclass(frozen=True)
class SeenImage:
    """One picture of a pair: patch rows and columns, the pixels that the teacher saw, and the directions that the cache
    has."""

    grid: tuple[int, int]
    picture: bytes
    media_type: str
    rows: dict[str, Rows]


@dataclass(frozen=True)
class SeenPair:
    """One pair: its number in the table, its pictures, and the logits of both models, where they are."""

    number: int
    images: list[SeenImage]
    teacher_logits: Float[np.ndarray, " c"] | None = None
    student_logits: Float[np.ndarray, " c"] | None = None


@dataclass(frozen=True)
class _Compared:
    """The cache's directions of a batch, by image slot: the teacher's rows, and the student's log-probabilities with
    the keys that they are over and the rows that it has."""

    batch: Batch
    teacher: list[dict[str, Attention]]
    student: list[dict[str, tuple[Tensor, Tensor, Tensor]]]
    output: DualEncoderOutput | None = field(default=None)


@dataclass(frozen=True)
class SeenStudent:
    """Whose attention stands beside the teacher's.

    Attributes:
        model: in eval mode.
        block: of the model; None: its last.
        maps: from its heads to the teacher's, as in training; `Raw` where they are compared as they are.
        tokens: whether it has a tokenizer of its own, and the dataset says how its tokens overlap.
    """

    model: DualEncoder
    block: int | None = None
    maps: nn.Module = field(default_factory=Raw)
    tokens: bool = False


class Seer:
    """Reads the attention of pairs.

    Args:
        dataset: the pairs, with targets of the cache.
        spec: of the cache.
        preprocessor: of the dataset.
        student: whose attention stands beside the teacher's; None: the teacher alone.

    Raises:
        RunError: the student has another number of heads, and the cache has not every key, so that they have no means
            to compare.
    """

    def __init__(
        self, dataset: PairDataset, spec: TargetSpec, preprocessor: Preprocessor, student: SeenStudent | None = None
    ) -> None:
        self._dataset, self._spec, self._preprocessor, self._student = dataset, spec, preprocessor, student
        self._directions: tuple[str, ...] = spec.directions
        self._axes, own = Axes(), spec.teacher_heads
        if student is not None:
            student.model.keep_blocks([] if student.block is None else [student.block])
            self._axes = Axes(student.model.image_tower.layout, student.tokens, drop=True)
            own = student.model.towers[0].heads if isinstance(student.maps, Raw) else own
        self._averages = student is not None and spec.stored_heads not in (1, own)
        if self._averages and spec.steps is None:
            raise RunError(
                f"expected a student with the cache's {spec.stored_heads} heads, got another number, and the means of "
                f"{spec.weights} weights are not known; look at a cache of sqrt8 weights, or leave --run out"
            )

    @property
    def heads(self) -> int:
        """Heads of every map: 1 for their mean."""
        return 1 if self._averages else self._spec.stored_heads

    @torch.inference_mode()
    def scores(self, numbers: Sequence[int]) -> list[float]:
        """One number a pair, larger where it is more worth a look.

        With a student: its attention loss (the mean KL over heads and valid rows, summed over the cache's directions
        and all images). Without: 1 - the mean kept mass of all rows; 0 where every key is kept.
        """
        found = self._compare(numbers)
        total = torch.zeros(len(numbers))
        for slot in range(len(found.teacher)):
            for direction in self._directions:
                rows = self._kl(found, slot, direction) if found.student else _tail(found.teacher[slot][direction])
                counted = _valid(found.batch, slot, direction)
                counted = counted & found.student[slot][direction][2] if found.student else counted
                valid = counted[:, None].expand(rows.shape).float()
                total += (rows * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
        return (total if found.student else total / (len(self._directions) * len(found.teacher))).tolist()

    @torch.inference_mode()
    def pairs(self, numbers: Sequence[int]) -> Iterator[SeenPair]:
        """Everything of some pairs, which are read as one batch."""
        found = self._compare(numbers)
        batch = found.batch
        kl = [{name: self._kl(found, slot, name) for name in held} for slot, held in enumerate(found.student)]
        for row, number in enumerate(numbers):
            tokens = int(batch["attention_mask"][row].sum())
            images = []
            for slot, teacher in enumerate(found.teacher):
                grid = batch[f"grid{slot}"][row]
                counts = {"t2i": (tokens, int(grid.prod()) + 1), "i2t": (int(grid.prod()) + 1, tokens)}
                rows = {}
                for name in self._directions:
                    queries, keys = counts[name]
                    there = bool(found.student)
                    rows[name] = Rows(
                        teacher=_levels(_dense(teacher[name], batch, slot, name)[row, :, :queries, :keys]),
                        student=_levels(found.student[slot][name][0][row, :, :queries, :keys].exp()) if there else None,
                        kl=kl[slot][name][row, :, :queries].numpy() if there else None,
                        kept=None if self._spec.steps else (1 - _tail(teacher[name])[row, :, :queries]).numpy(),
                    )
                picture, media_type = self._picture(batch, slot, row)
                images.append(SeenImage((int(grid[0]), int(grid[1])), picture, media_type, rows))
            logits = batch["target.logits"][row].cpu().numpy() if "target.logits" in batch else None
            answers = found.output.logits if found.output is not None else None
            yield SeenPair(number, images, logits, None if answers is None else answers[row].float().cpu().numpy())

    def _compare(self, numbers: Sequence[int]) -> _Compared:
        batch = self._dataset.__getitems__(numbers)
        slots = range(self._spec.images)
        teacher: list[dict[str, Attention]] = [
            {name: self._heads(decoded(batch, name, self._spec.steps, slot)) for name in self._directions}
            for slot in slots
        ]
        if self._student is None:
            return _Compared(batch, teacher, [])
        own = self._student
        moved = to_device(batch, next(own.model.parameters()).device)
        output = student_output(own.model, moved)
        mean = self.heads == 1
        student = []
        for slot in slots:
            sides = (("text", output.text), ("image", output.second if slot else output.image))
            text, image = ((own.maps(name, side.block(own.block).query_key), side.mask) for name, side in sides)
            rows = {
                name: student_rows(name == "t2i", text, image, (moved, slot), self._axes, mean_heads=mean)
                for name in self._directions
            }
            student.append({name: (log.cpu(), keys.cpu(), held.cpu()) for name, (log, keys, held) in rows.items()})
        return _Compared(batch, teacher, student, output)

    def _heads(self, attention: Attention) -> Attention:
        """Average the teacher's heads where the student has another number of them."""
        return attention.mean(1, keepdim=True) if self._averages and isinstance(attention, Tensor) else attention

    def _kl(self, found: _Compared, slot: int, direction: str) -> Float[Tensor, "b h q"]:
        teacher, (log, keys, held) = found.teacher[slot][direction], found.student[slot][direction]
        teacher = teacher if self._axes.alike else without_keys(teacher, keys)
        return attention_kl(teacher, log, keys).clamp_min(0) * held[:, None]

    def _picture(self, batch: Batch, slot: int, row: int) -> tuple[bytes, str]:
        """The pixels that both models read, encoded anew: nothing of a stranger's file goes into a page."""
        height, width = (batch[f"grid{slot}"][row] * self._spec.patch_size).tolist()
        levels = self._preprocessor.levels(batch[f"pixels{slot}"][row, :, :height, :width].numpy())
        image, stream = Image.fromarray(levels.transpose(1, 2, 0)), io.BytesIO()
        if max(height, width) <= LOSSLESS_SIDE:
            image.save(stream, "png", optimize=True)
            return stream.getvalue(), "image/png"
        image.save(stream, "jpeg", quality=85)
        return stream.getvalue(), "image/jpeg"


def _valid(batch: Batch, slot: int, direction: str) -> Tensor:
    """Valid query positions [b, q] of a direction."""
    if direction == "t2i":
        return batch["attention_mask"].bool()
    tokens = image_tokens(batch[f"grid{slot}"])
    return token_mask(tokens, int(tokens.max()))


def _dense(attention: Attention, batch: Batch, slot: int, direction: str) -> Float[Tensor, "b h q k"]:
    if not isinstance(attention, SparseAttention):
        return attention
    return densify(attention, _valid(batch, slot, "i2t" if direction == "t2i" else "t2i").shape[1])


def _tail(attention: Attention) -> Float[Tensor, "b h q"]:
    return attention.tail if isinstance(attention, SparseAttention) else torch.zeros(attention.shape[:3])


def _levels(weights: Tensor) -> UInt8[np.ndarray, "h q k"]:
    return (weights.clamp(0, 1).sqrt() * LEVELS).round().to(torch.uint8).numpy()
