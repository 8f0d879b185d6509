"""What a student is taught: where its targets come from, and the losses that compare it with them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.attention import Attention, query_rows, sparsify
from dde_cache.batches import Batch, pictures_of, tokens_of
from dde_cache.join import OnMissing
from dde_cache.losses import Tail, attention_kl, log_attention, weighted_sum
from dde_cache.preprocess import Preprocessor
from dde_cache.runs import FitConfig
from dde_cache.store import Cache
from dde_cache.student import DualEncoderOutput, TowerOutput
from dde_cache.targets import decoded
from dde_cache.tasks import load_task
from dde_cache.teacher import FusionTeacher
from dde_cache.terms import Objective, Sizes, Term
from dde_cache.vilt import image_tokens


class TrainConfig(FitConfig):
    """How a student is trained. A weight of 0 leaves a loss out, and its targets are then not read."""

    task: str = Field(default="classification", description="a name of dde_cache.tasks, or module:Class")
    attention_weight: float = Field(default=1.0, ge=0)
    soft_weight: float = Field(default=1.0, ge=0)
    hard_weight: float = Field(default=0.0, ge=0)
    tail: Tail = Field(
        default="bucket", description="how the mass of the keys that were not kept counts; nothing where all were"
    )
    queries: Literal["valid", "all"] = Field(
        default="valid",
        description="query rows in the mean of the attention loss: valid ones, or padding too (published)",
    )
    layer: int | None = Field(default=None, ge=0, description="the cache's layer to learn from; null: its last")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    remap_flips: bool = Field(
        default=False, description="mirror every other picture, and its stored maps with it: an approximation"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "TrainConfig":
        if not (self.attention_weight or self.soft_weight or self.hard_weight):
            raise ValueError("expected at least one of attention_weight, soft_weight and hard_weight above 0")
        return self


@dataclass(frozen=True)
class LabelsOnly:
    """No teacher: processor, labels and tower shape come from a cache's assets or from a checkpoint."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]


@dataclass(frozen=True)
class CachedTargets:
    """Stream the targets from a cache; where it has views, on their pixels, or with `allow_pixel_drift` on others."""

    cache: Cache
    on_missing: OnMissing = "error"
    allow_pixel_drift: bool = False


@dataclass(frozen=True)
class OnlineTargets:
    """Run a teacher at every step, for comparison; `layer` counts from 0."""

    teacher: FusionTeacher
    layer: int


Targets = LabelsOnly | CachedTargets | OnlineTargets


def student_output(model: nn.Module, batch: Batch, sizes: Sizes | None = None) -> DualEncoderOutput:
    """Run a student on a batch, its pictures padded to the image tokens of `sizes` where it has them."""
    slots = [name.removeprefix("grid") for name in ("grid0", "grid1") if name in batch]
    pictures = [batch[f"{name}{slot}"] for slot in slots for name in ("pixels", "grid")]
    longest = {slot: int(image_tokens(batch[f"grid{slot}"]).max()) for slot in slots}
    padding = [(sizes or {}).get(f"{IMAGE_TOKENS}{slot}", tokens) - tokens for slot, tokens in longest.items()]
    return model(batch["input_ids"], batch["attention_mask"], *pictures, image_padding=padding)


IMAGE_TOKENS = "image_tokens"
"""With an image slot behind it: tokens of the largest picture of a global batch, which is how many query rows the
published mean counts for each."""


class Taught(NamedTuple):
    """What the teacher gave for a batch: both maps of each image slot, and logits [b, c]; empty where nobody asks."""

    t2i: Sequence[Attention] = ()
    i2t: Sequence[Attention] = ()
    logits: Any = None


class Compared(NamedTuple):
    """What the terms of a batch compare."""

    student: DualEncoderOutput
    taught: Taught


class StudentLosses(Objective[Compared]):
    """The terms of a batch: attention in both directions (`t2i`, `i2t`), `soft`, `hard`, and their weighted sum `loss`.

    Attention is a mean over heads and query rows of the global batch (DiDE, L_attn). With two images a sample, the
    terms of each have its slot in their names and are summed (DiDE, NLVR2). With queries `all`, every padded row
    counts, as published: padded text rows one by one; padded image rows of a sample are all alike, so the one that the
    teacher stored, behind its last valid row, stands for each of them.
    """

    def __init__(self, config: TrainConfig, targets: Targets, mean_heads: bool) -> None:
        self._config, self._targets, self._mean_heads = config, targets, mean_heads
        self._every = config.queries == "all"
        self._images = images_of(targets) or 1
        task = load_task(config.task)
        table: dict[str, Term[Compared]] = {}
        weight = config.attention_weight
        for image in range(self._images):
            name = str(image) if self._images > 1 else ""
            table[f"t2i{name}"] = Term(weight, self._text_rows, partial(self._t2i, image))
            table[f"i2t{name}"] = Term(weight, partial(self._image_rows, image), partial(self._i2t, image))
        table["soft"] = Term(
            config.soft_weight,
            lambda batch, _sizes: len(batch["pair"]),
            lambda compared, _batch, _sizes: task.soft_sum(compared.student.logits, compared.taught.logits),
        )
        hard = Term[Compared](
            config.hard_weight,
            lambda batch, _sizes: task.hard_rows(batch),
            lambda compared, batch, _sizes: task.hard_sum(compared.student, batch),
        )
        table["hard"] = hard
        if isinstance(targets, LabelsOnly):
            table = {"hard": replace(hard, weight=1.0)}
        super().__init__(self._compare, {name: term for name, term in table.items() if term.weight}, self._padded)

    def _compare(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Compared:
        config, targets = self._config, self._targets
        output = student_output(model, batch, sizes)
        if isinstance(targets, LabelsOnly):
            return Compared(output, Taught())
        if isinstance(targets, OnlineTargets):
            return Compared(output, online_targets(targets, batch, config))
        maps: dict[str, list[Attention]] = {"t2i": [], "i2t": []}
        if config.attention_weight:
            steps = targets.cache.spec.steps
            maps = {name: [decoded(batch, name, steps, image) for image in range(self._images)] for name in maps}
        return Compared(output, Taught(**maps, logits=batch.get("target.logits")))

    def _padded(self, batch: Batch) -> Sizes:
        if not self._every:
            return {}
        return {
            f"{IMAGE_TOKENS}{image}": int(image_tokens(batch[f"grid{image}"]).max()) for image in range(self._images)
        }

    def _text_rows(self, batch: Batch, _sizes: Sizes) -> int:
        mask = batch["attention_mask"]
        return mask.numel() if self._every else int(mask.sum())

    def _image_rows(self, image: int, batch: Batch, sizes: Sizes) -> int:
        grid = batch[f"grid{image}"]
        return len(grid) * sizes[f"{IMAGE_TOKENS}{image}"] if self._every else int(image_tokens(grid).sum())

    def _t2i(self, image: int, compared: Compared, batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
        text, tower, teacher = compared.student.text, _tower(compared.student, image), compared.taught.t2i[image]
        # The teacher's keys end with the largest picture of this batch, the student's with that of the global one.
        keys = int(image_tokens(batch[f"grid{image}"]).max())
        mask = tower.mask[:, :keys]
        log = log_attention(text.query_key.query, tower.query_key.key[:, :, :keys], mask, mean_heads=self._mean_heads)
        rows = torch.ones_like(text.mask) if self._every else text.mask
        return weighted_sum(attention_kl(teacher, log, mask, self._config.tail), rows.float())

    def _i2t(self, image: int, compared: Compared, _batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
        text, tower, teacher = compared.student.text, _tower(compared.student, image), compared.taught.i2t[image]
        log = log_attention(tower.query_key.query, text.query_key.key, text.mask, mean_heads=self._mean_heads)
        rows = torch.ones_like(tower.mask) if self._every else tower.mask
        if self._every:
            position = torch.arange(tower.mask.shape[1], device=tower.mask.device)[None]
            teacher = query_rows(teacher, torch.minimum(position, tower.mask.sum(-1, keepdim=True)))
        return weighted_sum(attention_kl(teacher, log, text.mask, self._config.tail), rows.float())


def _tower(student: DualEncoderOutput, image: int) -> TowerOutput:
    return student.second if image else student.image


def images_of(targets: Targets) -> int | None:
    """Images that the teacher reads for one logit vector; None without a teacher."""
    if isinstance(targets, LabelsOnly):
        return None
    return targets.cache.spec.images if isinstance(targets, CachedTargets) else targets.teacher.images


def online_targets(targets: OnlineTargets, batch: Batch, config: TrainConfig) -> Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one."""
    output = targets.teacher(
        tokens_of(batch), pictures_of(batch), [targets.layer], padded_queries=config.queries == "all"
    )
    if not config.attention_weight:
        return Taught(logits=output.logits)
    held = [output.attention[image, targets.layer] for image in range(targets.teacher.images)]
    # The padded image token that a teacher needs for its query row is no key of the student's.
    t2i, i2t = ([sparsify(getattr(maps, name), None) for maps in held] for name in ("t2i", "i2t"))
    return Taught(t2i, i2t, output.logits)
