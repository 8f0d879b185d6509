"""What a student is pre-trained for: the settings, and the losses as a table of terms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dde_cache.align import ALIKE, Axes
from dde_cache.batches import Batch
from dde_cache.contrast import Everyone, contrastive_sum, everyone
from dde_cache.distill import ATTENTION_MAPS, PROJECTIONS, TrainConfig, student_output
from dde_cache.errors import InputError
from dde_cache.passes import RECIPES, UNMASKED, PassName, of_pass, ordered
from dde_cache.pretext import (
    MATCHING_ROWS,
    Pretrainer,
    class_sum,
    matching_logits,
    right_sum,
    word_logits,
)
from dde_cache.ranks import Ranks
from dde_cache.several import losses_of
from dde_cache.sources import LabelsOnly, Targets, caches_of
from dde_cache.student import DualEncoderOutput
from dde_cache.terms import Objective, Sizes, Term, pairs

PAIRS = "pairs"
"""Pairs of the largest part of a global batch."""

EVALUATED = "retrieval"
"""The task that a pre-trained student is scored by: its pooled vectors are compared."""


class PretrainConfig(TrainConfig):
    """How a student is pre-trained. A weight of 0 leaves a loss out. There are no labels, and no soft ones."""

    task: str = Field(default=EVALUATED, pattern=f"^{EVALUATED}$", description="by which the student is evaluated")
    soft_weight: float = Field(default=0.0, ge=0, le=0)
    hard_weight: float = Field(default=0.0, ge=0, le=0)
    ranking_weight: float = Field(default=0.0, ge=0, le=0)
    temperature: float = Field(default=1.0, ge=1, le=1, description="of soft labels, of which there are none")
    head_learning_rate_factor: float = Field(
        default=1.0, ge=1, le=1, description="of a task head, of which there is none"
    )
    contrastive_weight: float = Field(default=1.0, ge=0)
    matching_weight: float = Field(default=1.0, ge=0)
    language_weight: float = Field(default=1.0, ge=0, description="of masked words")
    passes: tuple[PassName, ...] | None = Field(
        default=None, description="passes whose attention is distilled; null: those that the cache has"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "PretrainConfig":
        if not (self.reads_records or self.contrastive_weight or self.matching_weight or self.language_weight):
            raise ValueError("expected at least one of attention, contrastive, matching and language weight above 0")
        if self.accumulate > 1 and (self.contrastive_weight or self.matching_weight):
            raise ValueError(
                "expected accumulate 1: pairs are contrasted with the whole batch, which must be there at once; use "
                "more ranks, or a smaller batch"
            )
        if self.passes is not None:
            ordered(self.passes)
            if not self.reads_records:
                raise ValueError("expected passes with attention or hidden weight above 0: whose else would they be?")
        return self


@dataclass
class Shown:
    """What the terms of a step are computed from; heads run when they are asked for."""

    model: Pretrainer
    output: DualEncoderOutput
    everyone: Everyone
    masked: Any
    guess: Any
    attention: Mapping[str, Mapping[str, Tensor]]

    @cached_property
    def matching(self) -> tuple[Tensor, Tensor]:
        """Logits and labels of image-text matching."""
        return matching_logits(self.model, self.everyone, self.output.scale)

    @cached_property
    def language(self) -> tuple[Tensor, Tensor]:
        """Logits of the hidden words, and the words."""
        return word_logits(self.model, self.masked.states, self.output.image.pooled, self.guess)


class _Given(nn.Module):
    """A student that has run already."""

    def __init__(self, output: DualEncoderOutput, student: nn.Module) -> None:
        super().__init__()
        self._output = output
        for name in (PROJECTIONS, ATTENTION_MAPS):
            self.add_module(name, getattr(student, name, None))

    def forward(self, *_inputs: Any, **_options: Any) -> DualEncoderOutput:
        """What it gave."""
        return self._output


class PretrainLosses(Objective[Shown]):
    """The terms of pre-training.

    `contrastive`, `matching`, `language`; the attention of each pass as in fine-tuning (`t2i`, `i2t`, `masked.t2i`,
    ...); and, of weight 0, `matching_accuracy`, `language_accuracy` and `temperature`.

    Args:
        config: weights.
        targets: where the attention comes from.
        mean_heads: whether the heads are averaged on both sides.
        passes: whose attention is distilled.
        ranks: whose pairs are contrasted with each other.
        axes: how the student's tokens stand to the teacher's.
    """

    def __init__(
        self,
        config: PretrainConfig,
        targets: Targets,
        mean_heads: bool,
        passes: Sequence[PassName],
        ranks: Ranks,
        axes: Axes = ALIKE,
    ) -> None:
        self._ranks, self._passes = ranks, tuple(passes)
        self._guesses = bool(config.language_weight)
        self._attention = None if isinstance(targets, LabelsOnly) else losses_of(config, targets, mean_heads, axes)
        attention = self._attention.terms if self._attention is not None and config.reads_records else {}
        self._attends = bool(attention)
        table: dict[str, Term[Shown]] = {}
        if config.contrastive_weight:
            table["contrastive"] = Term(config.contrastive_weight, pairs, _contrastive)
            table["temperature"] = Term(0.0, pairs, _temperature)
        if config.matching_weight:
            table["matching"] = Term(config.matching_weight, _matching_rows, lambda one, *_: class_sum(*one.matching))
            table["matching_accuracy"] = Term(0.0, _matching_rows, lambda one, *_: right_sum(*one.matching))
        if config.language_weight:
            table["language"] = Term(config.language_weight, _hidden, lambda one, *_: class_sum(*one.language))
            table["language_accuracy"] = Term(0.0, _hidden, lambda one, *_: right_sum(*one.language))
        for name in self._passes:
            for part, term in attention.items():
                table[_of(name, part)] = Term(term.weight, self._rows_of(name, part), _attended(name, part))
        super().__init__(self._show, table, self._sizes_of)

    def _sizes_of(self, batch: Batch) -> Sizes:
        sizes = {PAIRS: len(batch["pair"])}
        if self._attention is not None and self._attends:
            for name in self._passes:
                own = self._attention.sizes([of_pass(batch, name)])
                sizes |= {_of(name, part): size for part, size in own.items()}
        return sizes

    def _rows_of(self, name: PassName, part: str) -> Callable[[Batch, Sizes], float]:
        attention = self._attention

        def rows(batch: Batch, sizes: Sizes) -> float:
            return 0 if attention is None else attention.rows([of_pass(batch, name)], _sizes_in(name, sizes))[part]

        return rows

    def _show(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Shown:
        student = model.student
        output = student_output(student, batch, _sizes_in("matched", sizes))  # type: ignore[arg-type]
        sides = {"matched": output}
        masked = None
        if self._guesses or "masked" in self._passes:
            masked = student.text_tower(batch["masked.input_ids"], batch["attention_mask"])  # type: ignore[union-attr, operator]
            sides["masked"] = DualEncoderOutput(text=masked, image=output.image)
        if self._attends and "negative" in self._passes:
            strange = of_pass(batch, "negative")
            sides["negative"] = student_output(student, strange, _sizes_in("negative", sizes))  # type: ignore[arg-type]
        attention = {}
        if self._attention is not None and self._attends:
            for name in self._passes:
                given = _Given(sides[name], student)  # type: ignore[arg-type]
                attention[name] = self._attention.sums(given, of_pass(batch, name), _sizes_in(name, sizes))
        together = everyone(self._ranks, output.text.pooled, output.image.pooled, batch, sizes[PAIRS])
        return Shown(model, output, together, masked, batch.get("masked.guess"), attention)  # type: ignore[arg-type]


def _contrastive(one: Shown, _batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
    return contrastive_sum(one.everyone, one.output.scale)


def _temperature(one: Shown, batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
    return len(batch["pair"]) / one.output.scale.detach()


def _matching_rows(batch: Batch, _sizes: Sizes) -> int:
    return MATCHING_ROWS * len(batch["pair"])


def _hidden(batch: Batch, _sizes: Sizes) -> int:
    return int((batch["masked.guess"] != UNMASKED).sum())


def _of(name: PassName, part: str) -> str:
    """The name of a term or size of a pass."""
    return part if name == "matched" else f"{name}.{part}"


def _sizes_in(name: PassName, sizes: Sizes) -> Sizes:
    """The sizes of a pass, by the names that attention knows."""
    if name == "matched":
        return {part: size for part, size in sizes.items() if "." not in part}
    return {part.removeprefix(f"{name}."): size for part, size in sizes.items() if part.startswith(f"{name}.")}


def _attended(name: PassName, part: str) -> Callable[[Shown, Batch, Sizes], Tensor]:
    return lambda one, _batch, _sizes: one.attention[name][part]


def passes_of(targets: Targets, config: PretrainConfig) -> tuple[PassName, ...]:
    """The passes whose attention is distilled: those that are asked for, or all that there are.

    A teacher that is run at every step is shown the matched pass, unless others are asked for.

    Raises:
        InputError: some are asked for, and there is no teacher.
    """
    if isinstance(targets, LabelsOnly) and config.passes is not None:
        raise InputError("expected passes with a cache or a teacher, whose attention they are of; leave them out")
    if isinstance(targets, LabelsOnly) or not config.reads_records:
        return ()
    if config.passes is not None:
        return ordered(config.passes)
    caches = caches_of(targets)
    held = caches[0].cache.spec.passes if caches else (RECIPES["matched"],)
    return tuple(name for name, recipe in RECIPES.items() if recipe in held)
