"""Several teachers at once: a file that names their caches, what must agree, how they are read, and their losses.

The target is an average of the teachers', kind by kind: sum_i w_i KL(P_i || Q) = KL(sum_i w_i P_i || Q) + a number that
does not depend on the student Q, and so for binary cross-entropies. So each teacher keeps its own terms, codec and
layers, and roles are averages with shares of 0. docs/several-teachers.md describes it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn

from dde_cache.align import ALIKE, Axes
from dde_cache.batches import Batch
from dde_cache.configs import read_yaml
from dde_cache.distill import ATTENTION_MAPS, PROJECTIONS, Compared, StudentLosses, TrainConfig, student_output
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.join import OnMissing
from dde_cache.partners import Partner
from dde_cache.remote import is_url
from dde_cache.samples import Sample, Text
from dde_cache.sources import (
    Alone,
    CachedTargets,
    CachedTeacher,
    SeveralTargets,
    Targets,
    averages_heads,
    layers_of,
    parts_of,
)
from dde_cache.spec import TargetSpec
from dde_cache.store import Cache
from dde_cache.stream import Pair
from dde_cache.targets import CacheTargets
from dde_cache.terms import Objective, Term

SUFFIXES = (".yaml", ".yml")
"""Of a file of teachers, which stands where a cache would."""

SHARED = (
    "teacher.tokenizer", "teacher.processor", "text_length", "patch_size", "images", "view", "views", "passes",
)  # fmt: skip
"""Fields of the specification that decide what the student reads: one batch goes through it once."""

_READ_ALIKE = ("token_ids", "grid", "grid1")


class TeacherEntry(BaseModel):
    """One teacher of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: str = Field(min_length=1, description="folder, from the file's own on, or URL")
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,40}$", description="null: that of the cache")
    attention: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="share in the attention losses")
    soft: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="share in the soft labels")
    hidden: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="share in the hidden and pooled states")
    layer: int | None = Field(default=None, ge=0, description="instead of the setting of this name")
    layer_map: str | None = Field(default=None, description="instead of the setting of this name")

    @model_validator(mode="after")
    def _check_settings(self) -> "TeacherEntry":
        TrainConfig(layer=self.layer, layer_map=self.layer_map)
        if not (self.attention or self.soft or self.hidden):
            raise ValueError("expected a share above 0 of attention, soft or hidden")
        return self

    @property
    def called(self) -> str:
        """Its name in metrics: letters, digits, - and _."""
        last = self.cache.rstrip("/").rpartition("/")[2]
        return self.name or "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in last)[:40]


class TeachersFile(BaseModel):
    """A file of teachers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teachers: tuple[TeacherEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> "TeachersFile":
        if not self.teachers:
            raise ValueError("expected at least one teacher, got none")
        names = [entry.called for entry in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(
                f"expected a name for each teacher, each once, got {', '.join(names)}; give them with name"
            )
        return self


def is_teachers_file(place: str) -> bool:
    """Whether what stands where a cache would is a file of teachers."""
    return place.endswith(SUFFIXES) and not is_url(place)


def read_teachers(file: Path, open_: Callable[[str], Cache], on_missing: OnMissing = "error") -> SeveralTargets:
    """Open the caches of a file of teachers.

    Args:
        file: YAML.
        open_: opens a cache by its folder or URL.
        on_missing: as for `join`.

    Raises:
        InputError: it is no such file; all mistakes are listed.
        CacheError: caches cannot be opened; all of them are listed.
    """
    values = read_yaml(file)
    try:
        parsed = TypeAdapter(TeachersFile).validate_python(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'together'}: {one['msg']}" for one in error.errors()]
        raise InputError(f"{file}: the file of teachers has mistakes:{bullet_list(problems, 20)}") from error
    teachers: list[CachedTeacher] = []
    wrong: list[str] = []
    for entry in parsed.teachers:
        place = entry.cache if is_url(entry.cache) else str(file.parent / entry.cache)
        try:
            targets = CachedTargets(open_(place), on_missing)
        except CacheError as error:
            wrong.append(str(error))
            continue
        shares = entry.attention, entry.soft, entry.hidden
        teachers.append(CachedTeacher(entry.called, targets, *shares, entry.layer, entry.layer_map))
    if wrong:
        raise CacheError(f"{file}: caches cannot be opened:{bullet_list(wrong, 20)}")
    return SeveralTargets(tuple(teachers))


def answering(targets: SeveralTargets) -> tuple[CachedTeacher, ...]:
    """The teachers whose answers the student has: those with a share in the soft labels, or all where none has one."""
    return tuple(teacher for teacher in targets.teachers if teacher.soft) or targets.teachers


def disagreements(targets: SeveralTargets, config: TrainConfig, *, classes: bool) -> list[str]:
    """Say where teachers do not fit each other, or where nobody gives what has weight.

    Args:
        targets: the teachers.
        config: the weights.
        classes: whether the student learns answers.
    """
    first = targets.teachers[0]
    found = [
        f"{other.name}: {field} {_short(_field(other.targets.cache.spec, field))}, but {first.name} has "
        f"{_short(_field(first.targets.cache.spec, field))}"
        for other in targets.teachers[1:]
        for field in SHARED
        if _field(other.targets.cache.spec, field) != _field(first.targets.cache.spec, field)
    ]
    if classes:
        one, *others = answering(targets)
        found += [
            f"{other.name}: answers {_short(other.targets.cache.labels)}, but {one.name} has "
            f"{_short(one.targets.cache.labels)}; give one of them soft: 0"
            for other in others
            if other.targets.cache.labels != one.targets.cache.labels
        ]
    found += [
        f"{teacher.name}: what it has a share in has no weight; leave it out, or give that a weight"
        for teacher, (_, own) in zip(targets.teachers, parts_of(targets, config), strict=True)
        if not (own.reads_records or own.soft_weight)
    ]
    return found + [
        f"no teacher has a share of {kind}, whose weight is not 0; train with --set {kind}_weight=0"
        for kind in ("attention", "soft", "hidden")
        if (getattr(config, f"{kind}_weight") or (kind == "hidden" and config.pooled_weight))
        and not any(getattr(teacher, kind) for teacher in targets.teachers)
    ]


def _field(spec: TargetSpec, name: str) -> Any:
    value: Any = spec
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) < 64 else f"{text[:12]}..."


def source_of(targets: SeveralTargets) -> str:
    """Caches, shares and layers in one line: what a resumed run must share with its beginning."""
    return "caches " + "; ".join(
        f"{one.name} {one.targets.cache.manifest.fingerprint} attention {one.attention:g} soft {one.soft:g} hidden "
        f"{one.hidden:g} layers {one.layer_map or one.layer}"
        for one in targets.teachers
    )


class SeveralReaders:
    """A batch's targets from several caches: those of teacher n under `n:` (`0:logits`), what all read alike once.

    Args:
        names: of the teachers.
        readers: of their caches; None: nothing of it is read.
    """

    def __init__(self, names: Sequence[str], readers: Sequence[CacheTargets | None]) -> None:
        self._names = tuple(names)
        self._readers = {number: reader for number, reader in enumerate(readers) if reader is not None}

    @property
    def _first(self) -> CacheTargets:
        return next(iter(self._readers.values()))

    def check(self, shard: int, sample: Sample) -> None:
        """Compare a sample's content with what each teacher saw.

        Raises:
            CacheError: pictures or texts are others.
        """
        for number, reader in self._readers.items():
            try:
                reader.check(shard, sample)
            except CacheError as error:
                raise CacheError(f"teacher {self._names[number]}: {error}") from error

    def check_pixels(self, shard: int, key: str, view: int, levels: Callable[[], Sequence[np.ndarray]]) -> None:
        """Compare the pixels of a view with what each teacher saw.

        Raises:
            PixelDrift: they are others, and that is not allowed.
        """
        for reader in self._readers.values():
            reader.check_pixels(shard, key, view, levels)

    def partner(self, pair: Pair, text: Text) -> Partner:
        """The sample whose picture the teachers saw beside a pair's text.

        Raises:
            CacheError: a unit does not say, or the teachers saw others.
        """
        partners = [reader.partner(pair, text) for reader in self._readers.values()]
        if any(one != partners[0] for one in partners):
            raise CacheError(
                f"sample {pair.key!r}, text {pair.text}: the teachers saw it beside the pictures of "
                f"{', '.join(one.key for one in partners)}; extract the negative pass of all from the same shards"
            )
        return partners[0]

    def targets(self, pairs: Sequence[Pair]) -> Mapping[str, Tensor]:
        """Read the targets of a batch.

        Raises:
            CacheError: a unit is damaged or lacks a pair, or the teachers read other tokens or grids.
        """
        batch: dict[str, Tensor] = {}
        for number, reader in self._readers.items():
            for name, value in reader.targets(pairs).items():
                if name not in _READ_ALIKE:
                    batch[f"{number}:{name}"] = value
                elif name not in batch:
                    batch[name] = value
                elif batch[name].shape != value.shape or bool((batch[name] != value).any()):
                    raise CacheError(
                        f"teacher {self._names[number]}: its {name} of {pairs[0].key!r} and other pairs are not those "
                        "of the teachers before; extract all from the same shards with the same tokenizer and processor"
                    )
        return batch


def of_teacher(batch: Batch, number: int) -> Batch:
    """A batch with the targets of one of several teachers."""
    front = f"target.{number}:"
    own = {f"target.{name.removeprefix(front)}": value for name, value in batch.items() if name.startswith(front)}
    return {name: value for name, value in batch.items() if not name.startswith("target.")} | own


class SeveralLosses(Objective[tuple[Compared, ...]]):
    """The terms of several teachers: those of `StudentLosses` for each, `NAME.` before; labels once, as `hard`."""

    def __init__(self, config: TrainConfig, targets: SeveralTargets, axes: Axes = ALIKE) -> None:
        parts = parts_of(targets, config)
        self._each = [StudentLosses(own, part, averages_heads(part, own), axes) for part, own in parts]
        # Of the layer pairs whose states, or heads, are mapped, those of one teacher behind the other's.
        counts = {
            PROJECTIONS: [len(layers_of(part, own)) * len(own.states) for part, own in parts],
            ATTENTION_MAPS: [len(layers_of(part, own)) * bool(own.attention_weight) for part, own in parts],
        }
        self._starts = {name: np.cumsum([0, *some]).tolist() for name, some in counts.items()}
        table: dict[str, Term[tuple[Compared, ...]]] = {}
        for number, teacher in enumerate(targets.teachers):
            for part, term in self._each[number].terms.items():
                name = part if part == "hard" else f"{teacher.name}.{part}"
                table[name] = Term(term.weight, term.rows, _total(number, term))
        super().__init__(self._compare, table, lambda batch: self._each[0].sizes([batch]))

    def _compare(self, model: nn.Module, batch: Batch, sizes: Mapping[str, int]) -> tuple[Compared, ...]:
        output = student_output(model, batch, sizes)
        found = []
        for number, losses in enumerate(self._each):
            own = (self._own(model, name, number) for name in (PROJECTIONS, ATTENTION_MAPS))
            found.append(losses.compared(output, of_teacher(batch, number), *own))
        return tuple(found)

    def _own(self, model: nn.Module, name: str, number: int) -> Any:
        """Those of the maps that a student has in training that are of one teacher."""
        maps: Any = getattr(model, name, None)
        starts = self._starts[name]
        return None if maps is None else maps[starts[number] : starts[number + 1]]


def _total(number: int, term: Term[Compared]) -> Callable[[tuple[Compared, ...], Batch, Mapping[str, int]], Tensor]:
    return lambda compared, batch, sizes: term.total(compared[number], batch, sizes)


Losses = StudentLosses | SeveralLosses


def losses_of(config: TrainConfig, targets: Targets, mean_heads: bool, axes: Axes = ALIKE) -> Losses:
    """The losses of one teacher or of several; `axes` say how the student's tokens stand to theirs."""
    if isinstance(targets, SeveralTargets):
        return SeveralLosses(config, targets, axes)
    alone: Alone = targets
    return StudentLosses(config, alone, mean_heads, axes)
