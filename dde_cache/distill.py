"""What a student is taught: the losses that compare it with its targets."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from dde_cache.align import ALIKE, Axes, AxisMap, aligned_log, without_keys
from dde_cache.attention import QueryKey, mean_over_heads, query_rows, valid_first
from dde_cache.batches import Batch
from dde_cache.choices import DistillConfig, LayerPair
from dde_cache.losses import attention_kl, log_attention, weighted_sum
from dde_cache.sources import (
    Alone,
    LabelsOnly,
    OnlineTargets,
    Taught,
    cached_targets,
    images_of,
    layers_of,
    online_targets,
)
from dde_cache.spec import Rows
from dde_cache.states import mean_of_valid
from dde_cache.student import DualEncoderOutput
from dde_cache.tasks import load_task
from dde_cache.terms import Objective, Sizes, Term, pairs
from dde_cache.towers.contract import TowerOutput
from dde_cache.vilt import image_tokens


class TrainConfig(DistillConfig):
    """How a student is trained."""

    task: str = Field(default="classification", description="a name of dde_cache.tasks, or module:Class")
    dropout: float = Field(default=0.0, ge=0, lt=1)


def student_output(model: nn.Module, batch: Batch, sizes: Sizes | None = None) -> DualEncoderOutput:
    """Run a student on a batch, its pictures padded to the image tokens of `sizes` where it has them."""
    slots = [name.removeprefix("grid") for name in ("grid0", "grid1") if name in batch]
    pictures = [batch[f"{name}{slot}"] for slot in slots for name in ("pixels", "grid")]
    longest = {slot: int(image_tokens(batch[f"grid{slot}"]).max()) for slot in slots}
    padding = [(sizes or {}).get(f"{IMAGE_TOKENS}{slot}", tokens) - tokens for slot, tokens in longest.items()]
    texts = [batch.get(f"student_{name}", batch[other]) for name, other in _TEXTS]
    return model(*texts, *pictures, image_padding=padding)


_TEXTS = (("ids", "input_ids"), ("mask", "attention_mask"))
"""What the student reads of texts, where its tokens are others, and what the teacher reads."""


IMAGE_TOKENS = "image_tokens"
"""With an image slot behind it: tokens of the largest picture of a global batch, which is how many query rows the
published mean counts for each."""


PROJECTIONS = "hidden_projections"
"""Where a student in training holds the maps from its hidden states to the teacher's, one a pair of layers. They are
part of a checkpoint, but not of the student that is saved."""

ATTENTION_MAPS = "attention_maps"
"""Where a student in training holds the maps from the queries and keys of its towers to the teacher's heads, one set a
pair of layers, where its own heads are others. Not part of the student that is saved either."""


class Compared(NamedTuple):
    """What the terms of a batch compare; `projections` by the number of the layer pair, for hidden states; `maps`
    likewise, for heads."""

    student: DualEncoderOutput
    taught: Taught
    projections: Any = None
    maps: Any = None


class _Place(NamedTuple):
    """What an attention term compares: the kind of rows, the image slot, and the pair of layers with its number."""

    rows: Rows
    image: int
    number: int
    layers: LayerPair

    @property
    def of_text(self) -> bool:
        return self.rows in ("t2i", "t2w")


class StudentLosses(Objective[Compared]):
    """The terms of a batch: attention (`t2i`, `i2t`, or `t2w`, `i2w`), `hidden`, `soft` and `hard`.

    Attention is a mean over heads and query rows of the global batch (DiDE, L_attn). With two images a sample, the
    terms of each have its slot in their names and are summed (DiDE, NLVR2); with several pairs of layers, those of each
    have its name behind (`t2i@3:2`), and weigh one part in so many: a mean. With queries `all`, every padded row
    counts, as published: padded text rows one by one; padded image rows of a sample are all alike, so the one that the
    teacher stored, behind its last valid row, stands for each of them.

    Hidden states: mean over the valid tokens of text and picture, and over the width, of the squared distance between
    the teacher's and the student's, the latter mapped by a learned linear projection. Pooled states: the same of the
    means over the valid tokens, one of the text and one of the picture. Soft labels at temperature T:
    T^2 x the task's loss of both logits over T (Hinton, arXiv 1503.02531).

    With `axes` that differ, the student's rows are compared on the teacher's (`align`); rows and keys that the student
    has nothing of do not count.
    """

    def __init__(self, config: TrainConfig, targets: Alone, mean_heads: bool, axes: Axes = ALIKE) -> None:
        self._config, self._targets, self._mean_heads, self._axes = config, targets, mean_heads, axes
        self._every = config.queries == "all"
        self._images = images_of(targets) or 1
        self._pairs = layers_of(targets, config)
        task, heat = load_task(config.task), config.temperature
        hard = Term[Compared](
            config.hard_weight,
            pairs,
            lambda compared, batch, _sizes: task.hard_sum(compared.student, batch),
        )
        if isinstance(targets, LabelsOnly):
            table = {"hard": replace(hard, weight=1.0)}
        else:
            table = self._records()
            table["soft"] = Term(
                config.soft_weight * heat**2,
                pairs,
                lambda compared, _batch, _sizes: task.soft_sum(
                    compared.student.logits / heat, compared.taught.logits / heat
                ),
            )
            table["hard"] = hard
        super().__init__(self._compare, {name: term for name, term in table.items() if term.weight}, self._padded)

    def _records(self) -> dict[str, Term[Compared]]:
        """Terms of attention and hidden states."""
        config, table = self._config, dict[str, Term[Compared]]()
        share = 1 / len(self._pairs)
        for number, layers in enumerate(self._pairs):
            behind = f"@{layers.name}" if len(self._pairs) > 1 else ""
            for image in range(self._images):
                slot = str(image) if self._images > 1 else ""
                for rows in config.rows:
                    place = _Place(rows, image, number, layers)
                    table[f"{rows}{slot}{behind}"] = Term(
                        config.attention_weight * share, partial(self._rows, place), partial(self._attention, place)
                    )
                table[f"pooled{slot}{behind}"] = Term(
                    config.pooled_weight * share,
                    lambda batch, _sizes: 2 * len(batch["pair"]),
                    partial(self._pooled, image, number, layers),
                )
                table[f"hidden{slot}{behind}"] = Term(
                    config.hidden_weight * share,
                    partial(self._tokens, image),
                    partial(self._hidden, image, number, layers),
                )
        return table

    def _compare(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Compared:
        own = (getattr(model, name, None) for name in (PROJECTIONS, ATTENTION_MAPS))
        return self.compared(student_output(model, batch, sizes), batch, *own)

    def compared(self, output: DualEncoderOutput, batch: Batch, projections: Any, maps: Any = None) -> Compared:
        """What the terms compare, where a student has run already; `projections` and `maps` as in `Compared`."""
        config, targets = self._config, self._targets
        if isinstance(targets, LabelsOnly):
            return Compared(output, Taught({}, {}))
        give = online_targets if isinstance(targets, OnlineTargets) else cached_targets
        taught = give(targets, batch, config, self._pairs)  # type: ignore[arg-type]
        return Compared(output, taught, projections, maps)

    def _padded(self, batch: Batch) -> Sizes:
        if not self._every:
            return {}
        return {
            f"{IMAGE_TOKENS}{image}": int(image_tokens(batch[f"grid{image}"]).max()) for image in range(self._images)
        }

    def _rows(self, place: _Place, batch: Batch, sizes: Sizes) -> int:
        """Query rows that count."""
        if place.of_text and self._axes.text:
            return int((batch["token_overlap"].sum(-1) > 0).sum())
        if place.of_text:
            mask = batch["attention_mask"]
            return mask.numel() if self._every else int(mask.sum())
        grid = batch[f"grid{place.image}"]
        if self._every:
            return len(grid) * sizes[f"{IMAGE_TOKENS}{place.image}"]
        return int(image_tokens(grid).sum()) - len(grid) * self._axes.lacks_cls

    def _tokens(self, image: int, batch: Batch, _sizes: Sizes) -> int:
        """Valid tokens of texts and pictures."""
        return int(batch["attention_mask"].sum() + image_tokens(batch[f"grid{image}"]).sum())

    def _attention(self, place: _Place, compared: Compared, batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
        text, image = compared.student.text, _tower(compared.student, place.image)
        teacher = compared.taught.rows[place.rows, place.image, place.number]
        if self._axes.alike:
            asking = text if place.of_text else image
            query = _query_key(compared, place, asking, "text" if place.of_text else "image").query
            key, mask = self._keys(place, compared, batch)
            log = log_attention(query, key, mask, mean_heads=self._mean_heads)
            rows = torch.ones_like(asking.mask) if self._every else asking.mask
        else:
            log, mask, rows = student_rows(
                place.of_text,
                (_query_key(compared, place, text, "text"), text.mask),
                (_query_key(compared, place, image, "image"), image.mask),
                (batch, place.image),
                self._axes,
                mean_heads=self._mean_heads,
            )
        if self._mean_heads:
            teacher = mean_over_heads(teacher, mask.shape[1])
        if self._axes.drop:
            teacher = without_keys(teacher, mask)
        if self._every and not place.of_text:
            position = torch.arange(image.mask.shape[1], device=image.mask.device)[None]
            teacher = query_rows(teacher, torch.minimum(position, image.mask.sum(-1, keepdim=True)))
        return weighted_sum(attention_kl(teacher, log, mask, self._config.tail), rows.float())

    def _keys(
        self, place: _Place, compared: Compared, batch: Batch
    ) -> tuple[Float[Tensor, "b h k d"], Bool[Tensor, "b k"]]:
        """The student's keys, in the order of the teacher's, and which are valid."""
        text, image = compared.student.text, _tower(compared.student, place.image)
        sides = ((text, "text"), (image, "image"))
        text_key, image_key = (_query_key(compared, place, side, name).key for side, name in sides)
        # The teacher's keys end with the largest picture of this batch, the student's with that of the global one.
        tokens = image_tokens(batch[f"grid{place.image}"])
        most = int(tokens.max())
        if place.rows == "t2i":
            return image_key[:, :, :most], image.mask[:, :most]
        if place.rows == "i2t":
            return text_key, text.mask
        key, mask = torch.cat([text_key, image_key], dim=2), torch.cat([text.mask, image.mask], dim=1)
        order = valid_first(mask)[:, : _longest(batch, place.image)]
        heads, width = key.shape[1], key.shape[3]
        return key.gather(2, order[:, None, :, None].expand(-1, heads, -1, width)), mask.gather(1, order)

    def _hidden(
        self, image: int, number: int, layers: LayerPair, compared: Compared, _batch: Batch, _sizes: Sizes
    ) -> Float[Tensor, ""]:
        taught = compared.taught.hidden[image, number]
        sides = ((compared.student.text, taught.text), (_tower(compared.student, image), taught.image))
        total = compared.student.text.pooled.new_zeros((), dtype=torch.float32)
        for tower, teacher in sides:
            found = compared.projections[number](tower.block(layers.student).states).float()
            # Padding is longer on either side: what both have holds every valid token.
            shared = min(found.shape[1], teacher.shape[1])
            error = (found[:, :shared] - teacher[:, :shared].float()).square().mean(-1)
            total = total + torch.where(tower.mask[:, :shared], error, 0.0).sum()
        return total

    def _pooled(
        self, image: int, number: int, layers: LayerPair, compared: Compared, _batch: Batch, _sizes: Sizes
    ) -> Float[Tensor, ""]:
        project = compared.projections[number + (len(self._pairs) if self._config.hidden_weight else 0)]
        towers = (compared.student.text, _tower(compared.student, image))
        total = compared.student.text.pooled.new_zeros((), dtype=torch.float32)
        for tower, teacher in zip(towers, compared.taught.pooled[image, number], strict=True):
            own = project(mean_of_valid(tower.block(layers.student).states, tower.mask)).float()
            total = total + (own - teacher.float()).square().mean(-1).sum()
        return total


def student_rows(
    of_text: bool,
    text: tuple[QueryKey, Bool[Tensor, "b n"]],
    image: tuple[QueryKey, Bool[Tensor, "b m"]],
    where: tuple[Batch, int],
    axes: Axes,
    *,
    mean_heads: bool = False,
) -> tuple[Float[Tensor, "b h q k"], Bool[Tensor, "b k"], Bool[Tensor, "b q"]]:
    """The student's cross attention on the teacher's axes.

    Args:
        of_text: rows of the text's queries; otherwise of the picture's.
        text, image: queries and keys of both towers, and their valid tokens.
        where: the batch, and the image slot.
        axes: how the tokens stand to the teacher's.
        mean_heads: average the heads.

    Returns:
        Log-probabilities, the teacher's keys that they are over, and its query rows that the student has.
    """
    batch, slot = where
    words = AxisMap(batch["token_overlap"]) if axes.text else None
    patches = axes.image_map(batch[f"grid{slot}"], image[1].device)
    (asking, own, mine), (asked, others, theirs) = (*text, words), (*image, patches)
    if not of_text:
        (asking, own, mine), (asked, others, theirs) = (asked, others, theirs), (asking, own, mine)
    log, keys = aligned_log(asking.query, asked.key, others, mine, theirs, mean_heads=mean_heads)
    return log, keys, own if mine is None else mine.held


def _query_key(compared: Compared, place: _Place, side: TowerOutput, name: str) -> QueryKey:
    """Queries and keys of a tower, with the teacher's heads where they are mapped to these."""
    raw = side.block(place.layers.student).query_key
    return raw if compared.maps is None else compared.maps[place.number](name, raw)


def _longest(batch: Batch, image: int) -> int:
    """Valid tokens of the longest pair, text and picture together."""
    return int((batch["attention_mask"].sum(-1).cpu() + image_tokens(batch[f"grid{image}"])).max())


def _tower(student: DualEncoderOutput, image: int) -> TowerOutput:
    return student.second if image else student.image
