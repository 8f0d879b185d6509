"""The training loop that teachers and students share: accelerate for device and precision, our own order and resume.

Everything random in a step is a pure function of (seed, step): the batches come from `stream.BatchOrder` and the
generator is seeded before each step. So a run needs no random state on disk, and resumes from a checkpoint's weights,
optimizer moments and step number alone.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dde_cache.batches import Batch, to_device
from dde_cache.errors import RunError, bullet_list
from dde_cache.stream import Shuffle

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"

Losses = Mapping[str, Tensor]


class FitConfig(BaseModel):
    """How a model is fitted. Learning rate: linear warm-up over `warmup` of the steps, then linear decay to 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch_size: int = Field(default=128, ge=1, description="pairs a step")
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

    def shuffle(self) -> Shuffle:
        """How the pairs are mixed."""
        return Shuffle(self.seed, self.shuffle_shards, self.shuffle_chunks)


@dataclass
class Progress:
    """What callers may want to show of a running fit. Every hook has a silent default."""

    step: Callable[[int, Mapping[str, float]], None] = lambda step, record: None
    valid: Callable[[int, float], None] = lambda step, accuracy: None


@dataclass(frozen=True)
class FitResult:
    """How a fit ended: best validation accuracy and its step (None without validation), and where the time went."""

    steps: int
    best_accuracy: float | None
    best_step: int | None
    seconds: float
    wait_seconds: float


@dataclass
class _State:
    """What a checkpoint remembers beside tensors."""

    step: int = 0
    best_accuracy: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    wait_seconds: float = 0.0


def open_run(folder: Path, config: FitConfig, *, resume: bool) -> None:
    """Begin a run's folder with its resolved configuration, or check that a resumed run has the same.

    Raises:
        RunError: the folder is taken, or `resume` with another configuration or where no run was begun.
    """
    path = folder / CONFIG
    values = config.model_dump(mode="json")
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            what = "holds a run" if path.exists() else "is not empty and no run of ours"
            raise RunError(f"{folder}: {what}; choose another --out" + (", or pass --resume" if path.exists() else ""))
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return
    if not path.is_file():
        raise RunError(f"{folder}: expected a run to resume, found none; start without --resume")
    begun = yaml.safe_load(path.read_text())
    differences = [
        f"{name}: begun with {begun.get(name)}, now {value}"
        for name, value in values.items()
        if begun.get(name) != value and name not in ("workers", "log_every", "save_every")
    ]
    if differences:
        raise RunError(f"{folder}: --resume needs the settings that the run was begun with:{bullet_list(differences)}")


def rate_at(step: int, config: FitConfig) -> float:
    """Factor of the learning rate at a step: linear warm-up, then linear decay to 0."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return (step + 1) / max(warmup, 1)
    return (config.steps - step) / (config.steps - warmup)


class Fit:
    """A model being trained.

    Args:
        model: what is trained, in place.
        losses: the terms of one batch by name; `loss` is the one that is minimised.
        config: optimization settings.
        run: folder for metrics and checkpoints.
        validate: accuracy on held-out data, every `valid_every` steps and at the end.
        save_best: called when the validation accuracy is the best so far (a tie counts), or at the end where nothing
            is validated.
        progress: hooks to show what happens.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[nn.Module, Batch], Losses],
        config: FitConfig,
        run: Path,
        *,
        validate: Callable[[nn.Module], float] | None = None,
        save_best: Callable[[nn.Module], None],
        progress: Progress | None = None,
    ) -> None:
        self._losses, self._config, self._run = losses, config, run
        self._validate, self._save_best, self._progress = validate, save_best, progress or Progress()
        self._accelerator = Accelerator(mixed_precision=config.precision)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._plain: nn.Module = self._accelerator.unwrap_model(self._model)
        self._state = _State()

    def resume(self) -> None:
        """Go on from the newest checkpoint.

        Raises:
            RunError: there is none.
        """
        found = sorted((self._run / CHECKPOINTS).glob("[0-9]*"))
        if not found:
            raise RunError(f"{self._run}: expected a checkpoint to resume from, found none; start without --resume")
        folder = found[-1]
        self._state = _State(**json.loads((folder / "state.json").read_text()))
        self._plain.load_state_dict(load_file(folder / "model.safetensors"))
        moments = load_file(folder / "optimizer.safetensors")
        inner = self._optimizer.state_dict()
        inner["state"] = {}
        for name, tensor in moments.items():
            number, _, moment = name.partition(".")
            inner["state"].setdefault(int(number), {})[moment] = tensor
        self._optimizer.load_state_dict(inner)

    def __call__(self, loader: Callable[[int], Iterable[Batch]]) -> FitResult:
        """Train to the last step; `loader` gives the batches from a step on.

        Raises:
            RunError: a loss is not finite.
            KeyboardInterrupt: after Ctrl-C, once the running step is finished and a checkpoint is written.
        """
        state, config = self._state, self._config
        with _Metrics(self._run / METRICS, state.step) as metrics, _FinishStep() as interrupt:
            batches = iter(loader(state.step))
            while state.step < config.steps:
                self._step(batches, metrics)
                last = state.step == config.steps
                if self._validate and (last or state.step % config.valid_every == 0):
                    self._measure(self._validate, metrics)
                if last or interrupt.asked or state.step % config.save_every == 0:
                    self._save()
                if interrupt.asked and not last:
                    raise KeyboardInterrupt
        if not self._validate:
            self._save_best(self._plain)
        return FitResult(state.step, state.best_accuracy, state.best_step, state.seconds, state.wait_seconds)

    def _step(self, batches: Iterator[Batch], metrics: "_Metrics") -> None:
        state, config, accelerator = self._state, self._config, self._accelerator
        start = time.perf_counter()
        torch.manual_seed(config.seed * 1_000_003 + state.step)
        rate = rate_at(state.step, config)
        for group, full_rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = full_rate * rate
        batch = to_device(next(batches), accelerator.device)
        waited = time.perf_counter()
        self._model.train()
        with accelerator.autocast():
            terms = self._losses(self._model, batch)
        accelerator.backward(terms["loss"])
        if config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(self._model.parameters(), config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        state.step += 1
        due = state.step % config.log_every == 0 or state.step == config.steps
        values = {name: float(value.detach()) for name, value in terms.items()} if due else {}
        state.wait_seconds += waited - start
        state.seconds += time.perf_counter() - start
        if due:
            if not all(math.isfinite(value) for value in values.values()):
                raise RunError(
                    f"step {state.step}: expected finite losses, got {values}; lower the learning rate, or use "
                    "precision bf16 instead of fp16"
                )
            times = {"seconds": round(state.seconds, 4), "wait_seconds": round(state.wait_seconds, 4)}
            record = values | {"learning_rate": config.learning_rate * rate} | times
            metrics.write(state.step, record)
            self._progress.step(state.step, record)

    def _measure(self, validate: Callable[[nn.Module], float], metrics: "_Metrics") -> None:
        state = self._state
        accuracy = validate(self._plain)
        metrics.write(state.step, {"valid_accuracy": accuracy})
        self._progress.valid(state.step, accuracy)
        if state.best_accuracy is None or accuracy >= state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self._save_best(self._plain)

    def _save(self) -> None:
        """Write a checkpoint under a temporary name, rename it, then drop the older ones."""
        folder = self._run / CHECKPOINTS
        final = folder / f"{self._state.step:08d}"
        partial = folder / f"{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in self._plain.state_dict().items()}
        save_file(weights, partial / "model.safetensors")
        moments = {
            f"{number}.{name}": value.contiguous()
            for number, entry in self._optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(self._state)))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in folder.iterdir():
            if old != final:
                shutil.rmtree(old)


class _FinishStep:
    """Lets the running step finish on Ctrl-C; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_FinishStep":
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)


class _Metrics:
    """`metrics.jsonl`, cut back to a step when a run resumes there."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
        self._file = path.open("a")

    def __enter__(self) -> "_Metrics":
        return self

    def write(self, step: int, record: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()

    def __exit__(self, *_error: object) -> None:
        self._file.close()


def _parameter_groups(model: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Split parameters by weight decay (none for biases, norms and single vectors) and by the head's learning rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = name.startswith(("classifier", "head"))
            groups.setdefault((head, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * (config.head_learning_rate_factor if head else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (head, decays), parameters in groups.items()
    ]
