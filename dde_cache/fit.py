"""The training loop that teachers and students share: accelerate for device and precision, our own order and resume.

Everything random in a step is a pure function of (seed, step): the batches come from `stream.BatchOrder` and the
generator is seeded before each step. So a run needs no random state on disk, and resumes from a checkpoint's weights,
optimizer moments and step number alone.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dde_cache.batches import Batch, to_device
from dde_cache.errors import RunError
from dde_cache.interrupt import FinishStep
from dde_cache.runs import CHECKPOINTS, METRICS, FitConfig, Metrics

Losses = Mapping[str, Tensor]


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
        self._accelerator = _accelerator(config.precision)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._plain: nn.Module = self._accelerator.unwrap_model(self._model)
        self._state = _State()

    def resume(self) -> None:
        """Go on from the newest checkpoint, or begin where a run was stopped before its first one.

        Raises:
            RunError: the checkpoint is damaged.
        """
        found = sorted(self._checkpoints())
        if found:
            try:
                self._load(found[-1])
            except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
                raise RunError(
                    f"{found[-1]}: the checkpoint is damaged ({str(error).splitlines()[0]}); start again with another "
                    "--out"
                ) from error

    def _checkpoints(self) -> Iterable[Path]:
        return (path for path in (self._run / CHECKPOINTS).glob("*") if path.name.isdigit())

    def _load(self, folder: Path) -> None:
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
        with Metrics(self._run / METRICS, state.step) as metrics, FinishStep() as interrupt:
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
            self._keep()
        return FitResult(state.step, state.best_accuracy, state.best_step, state.seconds, state.wait_seconds)

    def _step(self, batches: Iterator[Batch], metrics: "Metrics") -> None:
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

    def _measure(self, validate: Callable[[nn.Module], float], metrics: "Metrics") -> None:
        state = self._state
        accuracy = validate(self._plain)
        metrics.write(state.step, {"valid_accuracy": accuracy})
        self._progress.valid(state.step, accuracy)
        if state.best_accuracy is None or accuracy >= state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self._keep()

    def _keep(self) -> None:
        with clear_disk_errors(self._run):
            self._save_best(self._plain)

    def _save(self) -> None:
        """Write a checkpoint under a temporary name, rename it, then drop the older ones."""
        folder = self._run / CHECKPOINTS
        final = folder / f"{self._state.step:08d}"
        partial = folder / f"{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in self._plain.state_dict().items()}
        moments = {
            f"{number}.{name}": value.contiguous()
            for number, entry in self._optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        with clear_disk_errors(folder):
            save_file(weights, partial / "model.safetensors")
            save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(self._state)))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in folder.iterdir():
            if old != final:
                shutil.rmtree(old)


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Safetensors hides what the disk said in an error of its own; give it the form of all others.

    Raises:
        RunError: a file could not be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise RunError(f"{folder}: expected to write a checkpoint, got {error}; make room and --resume") from error


def _accelerator(precision: str) -> Accelerator:
    try:
        return Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise RunError(f"expected a precision that this device can do, got {precision!r}: {error}") from error


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
