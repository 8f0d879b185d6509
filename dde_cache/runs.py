"""The folder of a training run: its settings, what it reads, and its metrics.

RUN/config.yaml     resolved settings; `--config` takes it as it is
RUN/inputs.json     what else a resumed run must share: data, targets, initial weights
RUN/metrics.jsonl   losses, learning rate and times by step; validation accuracy
RUN/tensorboard/    the same for TensorBoard, with `tensorboard: true`
RUN/checkpoints/    the newest checkpoint
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dde_cache.errors import InputError, RunError, bullet_list
from dde_cache.store import write_text
from dde_cache.stream import Shuffle
from dde_cache.views import AS_PROCESSED, DEFAULT_RECIPE, ViewRecipe, parse_recipe, recipe_in_full

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
INPUTS = "inputs.json"
TENSORBOARD = "tensorboard"

MAY_CHANGE = ("workers", "log_every", "save_every", "accumulate", "tensorboard")
"""Settings that do not change what is trained. (`accumulate` changes last bits, and what dropout drops.)"""


class FitConfig(BaseModel):
    """How a model is fitted. Learning rate: linear warm-up over `warmup` of the steps, then linear decay to 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    epochs: int | None = Field(
        default=None, ge=1, description="passes over the pairs, full batches alone; null: as many as `steps` say"
    )
    batch_size: int = Field(default=128, ge=1, description="pairs a step, of all ranks and micro-batches together")
    accumulate: int = Field(
        default=1, ge=1, description="micro-batches that each rank cuts its share of a batch into, to save memory"
    )
    learning_rate: float = Field(default=5e-4, gt=0)
    head_learning_rate_factor: float = Field(
        default=1.0, gt=0, description="times the learning rate, for the task head"
    )
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: str = Field(default="no", pattern="^(no|bf16|fp16)$")
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=1, ge=0, description="processes that read batches ahead; 0: none")
    shuffle_shards: int = Field(default=8, ge=1, description="shards whose chunks are mixed")
    shuffle_chunks: int = Field(default=32, ge=1, description="chunks of 256 pairs that are mixed pair by pair")
    log_every: int = Field(default=20, ge=1, description="steps")
    valid_every: int = Field(default=500, ge=1, description="steps")
    save_every: int = Field(default=500, ge=1, description="steps")
    tensorboard: bool = Field(default=False, description="write the metrics for TensorBoard too")

    @field_validator("precision", mode="before")
    @classmethod
    def _read_no(cls, value: Any) -> Any:
        """YAML takes a bare `no` for false."""
        return "no" if value is False else value

    def shuffle(self) -> Shuffle:
        """How the pairs are mixed."""
        return Shuffle(self.seed, self.shuffle_shards, self.shuffle_chunks)


class AugmentedConfig(FitConfig):
    """How a model is fitted that may see its pictures augmented."""

    views: int | None = Field(
        default=None,
        ge=1,
        lt=2**16,
        description="augmentations of each sample, one an epoch (a cache has those of its teacher: leave them out)",
    )
    view: str | None = Field(
        default=None, description="their recipe, as `extract --view-recipe`; null: randaugment-2-9 where there are some"
    )

    @model_validator(mode="before")
    @classmethod
    def _choose_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        view = values.get("view") or (DEFAULT_RECIPE if values.get("views") not in (None, 1) else None)
        return values | {"view": recipe_in_full(view)}

    @model_validator(mode="after")
    def _check_views(self) -> "AugmentedConfig":
        if self.view == AS_PROCESSED and self.views not in (None, 1):
            raise ValueError(f"expected one view where pictures stay as processed, got {self.views} that are all alike")
        return self

    @property
    def drawn(self) -> tuple[ViewRecipe | None, int]:
        """How views are drawn (None: pictures as processed), and how many of each sample."""
        return parse_recipe(self.view or AS_PROCESSED), self.views or 1


Config = TypeVar("Config", bound=FitConfig)


def with_steps(config: Config, pairs: int) -> Config:
    """Settle how many steps `epochs` are.

    Args:
        config: settings of a fit.
        pairs: in one pass over the training data; at least one batch.
    """
    if config.epochs is None:
        return config
    return config.model_copy(update={"steps": config.epochs * (pairs // config.batch_size)})


def open_run(
    folder: Path, config: FitConfig, *, resume: bool, inputs: Mapping[str, str | int | None] | None = None
) -> None:
    """Begin a run's folder with its resolved configuration, or check that a resumed run has the same.

    Args:
        folder: of the run.
        config: resolved settings.
        resume: go on with a run that was begun.
        inputs: what else must be the same when the run goes on.

    Raises:
        RunError: the folder is taken, or `resume` with other settings or inputs, or where no run was begun.
    """
    if config.tensorboard:
        _summary_writer()
    path = folder / CONFIG
    values = config.model_dump(mode="json")
    if not resume:
        if folder.exists() and (not folder.is_dir() or not all(_is_left(one, inputs) for one in folder.iterdir())):
            what = "holds a run" if path.exists() else "is not empty and no run of ours"
            advice = "choose another --out" + (", or pass --resume" if path.exists() else "")
            raise RunError(f"{folder}: expected a new or empty folder, but it {what}; {advice}")
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()
        # A run has begun when its configuration is there: what was killed before that begins anew.
        write_text(folder / INPUTS, json.dumps(inputs or {}, indent=1) + "\n")
        write_text(path, yaml.safe_dump(values, sort_keys=False))
        return
    if not path.is_file():
        raise RunError(f"{folder}: expected a run to resume, found none; start without --resume")
    try:
        begun = {**yaml.safe_load(path.read_text()), **json.loads((folder / INPUTS).read_text())}
        # Settings that came after the run began had no other value then.
        begun = json.loads(json.dumps(_defaults(config))) | begun
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{folder}: its {CONFIG} or {INPUTS} cannot be read: {error}; choose another --out") from error
    differences = [
        f"{name}: begun with {begun.get(name)}, now {value}"
        for name, value in {**values, **(inputs or {})}.items()
        if begun.get(name) != value and name not in MAY_CHANGE
    ]
    if differences:
        raise RunError(f"{folder}: --resume needs what the run was begun with:{bullet_list(differences, 20)}")


def _is_left(path: Path, inputs: Mapping[str, str | int | None] | None) -> bool:
    """Whether a file is what a run with such inputs leaves that is killed before it has begun."""
    if path.name != INPUTS or not path.is_file():
        return path.is_file() and path.name.startswith((f".{INPUTS}.", f".{CONFIG}."))
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() == (inputs or {}).keys()


def _defaults(config: FitConfig) -> dict[str, Any]:
    """The values of settings that have one where nothing is said."""
    return {name: field.default for name, field in type(config).model_fields.items() if not field.is_required()}


def _summary_writer() -> Any:
    """TensorBoard's writer, imported where it is asked for.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard: true needs a package that is not installed; pip install 'dde-cache[tensorboard]'"
        ) from error
    return SummaryWriter


class Metrics:
    """`metrics.jsonl`, cut back to a step when a run resumes there; with `tensorboard`, its event files too.

    Without a path (on ranks that do not write) nothing is kept.
    """

    def __init__(self, path: Path | None, step: int, *, tensorboard: bool = False) -> None:
        self._file: IO[str] | None = None
        self._events: Any = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        # Whole or not at all: a run that is killed here must not lose the metrics of the steps before.
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = path.open("a")
        # TensorBoard hides what was written of steps from `purge_step` on before.
        if tensorboard:
            self._events = _summary_writer()(str(path.parent / TENSORBOARD), purge_step=step + 1)

    def __enter__(self) -> "Metrics":
        return self

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Add one line."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in record.items():
                self._events.add_scalar(name, value, step)

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
