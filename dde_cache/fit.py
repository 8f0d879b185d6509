"""The training loop that teachers and students share: accelerate for device and precision, our own order and resume.

Everything random in a step is a pure function of (seed, step): the batches come from `stream.BatchOrder` and the
generator is seeded before each micro-batch. So a run needs no random state on disk, and resumes from a checkpoint's
weights, optimizer moments and step number alone (with fp16 also the scale of the loss).

A step has one loss, whatever it is cut into: rows are counted over all micro-batches and ranks before the first forward
pass, each part's sums are divided by these counts, and gradients add up.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dde_cache.batches import Batch, to_device
from dde_cache.clock import Clock
from dde_cache.errors import RunError, first_line
from dde_cache.interrupt import FinishStep
from dde_cache.optimizer import parameter_groups, rate_at
from dde_cache.ranks import Ranks, accelerator
from dde_cache.runs import CHECKPOINTS, METRICS, FitConfig, Metrics
from dde_cache.stream import Share
from dde_cache.terms import Losses, Objective

Loader = Callable[[int, Share], Iterable[Batch]]
"""Gives the micro-batches of one rank from a step on."""

Validate = Callable[[nn.Module], float | Mapping[str, float]]
"""Figures of a model on held-out data."""


@dataclass
class Progress:
    """What callers may want to show of a running fit, on the first rank. Every hook has a silent default."""

    step: Callable[[int, Mapping[str, float]], None] = lambda step, record: None
    valid: Callable[[int, float], None] = lambda step, accuracy: None
    begin: Callable[[int], None] = lambda steps: None
    note: Callable[[str], None] = lambda line: None


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
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    scaler: dict[str, float] | None = None


def seed_of(seed: int, step: int, part: int) -> int:
    """The seed of a micro-batch, by its number among those of all ranks.

    Ranks and micro-batches drop different units, and the same ones whether four parts are four ranks or one rank's.
    (torch's generator on the CPU takes the lowest 32 bits.)
    """
    return (seed * 1_000_003 + step + part * 2_654_435_761) % 2**63


class Fit:
    """A model being trained, on all ranks.

    Args:
        model: what is trained, in place.
        objective: what is minimised.
        config: optimization settings.
        run: folder for metrics and checkpoints.
        validate: accuracy on held-out data, every `valid_every` steps and at the end; or several figures by name,
            `accuracy` among them.
        save_best: called when the validation accuracy is the best so far (a tie counts), or at the end where nothing
            is validated.
        progress: hooks to show what happens.

    Raises:
        RunError: no such precision here, or a batch has fewer pairs than micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[Any],
        config: FitConfig,
        run: Path,
        *,
        validate: Validate | None = None,
        save_best: Callable[[nn.Module], None],
        progress: Progress | None = None,
    ) -> None:
        self._objective, self._config, self._run = objective, config, run
        self._validate, self._save_best, self._progress = validate, save_best, progress or Progress()
        self._ranks = Ranks()
        self._share = Share(self._ranks.number, self._ranks.count, config.accumulate)
        if config.batch_size < self._ranks.count * config.accumulate:
            raise RunError(
                f"expected a batch of at least one pair for each of {self._ranks.count} ranks x accumulate "
                f"{config.accumulate}, got batch_size {config.batch_size}; raise it, or lower accumulate"
            )
        self._accelerator = accelerator(config.precision)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._rates = [group["lr"] for group in optimizer.param_groups]
        # evaluation_mode: no DistributedDataParallel around it; `Ranks.add_gradients` does its work.
        self._model: nn.Module = self._accelerator.prepare_model(model, evaluation_mode=True)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)
        self._plain: nn.Module = self._accelerator.unwrap_model(self._model)
        self._state = _State()
        self._clock = Clock(self._accelerator.device)
        self._saved: int | None = None

    def resume(self) -> None:
        """Go on from the newest checkpoint, or begin where a run was stopped before its first one.

        Raises:
            RunError: the checkpoint is damaged, or ranks see different ones.
        """
        found = sorted(self._checkpoints())
        if found:
            try:
                self._load(found[-1])
            except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
                raise RunError(
                    f"{found[-1]}: the checkpoint is damaged ({first_line(error)}); start again with another --out"
                ) from error
        step = self._state.step
        if self._ranks.any(self._ranks.largest({"step": step})["step"] != step):
            raise RunError(f"{self._run}: ranks see different checkpoints; --out has to be a folder that all share")

    def _checkpoints(self) -> Iterable[Path]:
        return (path for path in (self._run / CHECKPOINTS).glob("*") if path.name.isdigit())

    def _load(self, folder: Path) -> None:
        self._state = _State(**json.loads((folder / "state.json").read_text()))
        self._saved = self._state.step
        self._plain.load_state_dict(load_file(folder / "model.safetensors"))
        moments = load_file(folder / "optimizer.safetensors")
        inner = self._optimizer.state_dict()
        inner["state"] = {}
        for name, tensor in moments.items():
            number, _, moment = name.partition(".")
            inner["state"].setdefault(int(number), {})[moment] = tensor
        self._optimizer.load_state_dict(inner)
        if self._accelerator.scaler is not None and self._state.scaler is not None:
            self._accelerator.scaler.load_state_dict(self._state.scaler)

    def __call__(self, loader: Loader) -> FitResult:
        """Train to the last step.

        Raises:
            RunError: a loss is not finite, or another rank has stopped.
            KeyboardInterrupt: after Ctrl-C or SIGTERM on any rank, once the running step is finished and a checkpoint
                is written.
        """
        state, config, ranks = self._state, self._config, self._ranks
        ranks.share_weights(self._plain)
        if ranks.first:
            self._progress.begin(config.steps)
        path = self._run / METRICS if ranks.first else None
        with (
            Metrics(path, state.step, tensorboard=config.tensorboard) as metrics,
            FinishStep() as interrupt,
            closing(_each(loader(state.step, self._share))) as batches,
        ):
            while state.step < config.steps:
                if ranks.any(interrupt.asked):
                    self._save()
                    raise KeyboardInterrupt
                self._step(batches, metrics)
                last = state.step == config.steps
                if self._validate and (last or state.step % config.valid_every == 0):
                    self._measure(self._validate, metrics)
                if last or state.step % config.save_every == 0:
                    self._save()
        if not self._validate:
            self._keep()
        return FitResult(state.step, state.best_accuracy, state.best_step, state.seconds, state.wait_seconds)

    def _step(self, batches: Iterator[Batch], metrics: Metrics) -> None:
        state, config, accelerator = self._state, self._config, self._accelerator
        start = time.perf_counter()
        rate = rate_at(state.step, config)
        for group, full_rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = full_rate * rate
        parts = [next(batches) for _ in self._share.parts]
        waited = time.perf_counter()
        losses = self._backward(parts)
        self._ranks.add_gradients(self._plain.parameters())
        if config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(self._model.parameters(), config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        state.step += 1
        due = state.step % config.log_every == 0 or state.step == config.steps
        values = self._ranks.total({name: float(value) for name, value in losses.items()}) if due else {}
        state.wait_seconds += waited - start
        state.seconds += time.perf_counter() - start
        if due:
            if not all(math.isfinite(value) for value in values.values()):
                raise RunError(
                    f"step {state.step}: expected finite losses, got {values}; lower the learning rate, or use "
                    "precision bf16 instead of fp16"
                )
            self._settle_times()
            names = ("seconds", "wait_seconds", "forward_seconds", "backward_seconds")
            times = {name: round(getattr(state, name), 4) for name in names}
            record = values | {"learning_rate": config.learning_rate * rate} | times
            metrics.write(state.step, record)
            if self._ranks.first:
                self._progress.step(state.step, record)

    def _backward(self, parts: list[Batch]) -> Losses:
        """Add up the gradients of this rank's micro-batches; return its part of the global batch's losses."""
        objective = self._objective
        sizes = {name: int(value) for name, value in self._ranks.largest(objective.sizes(parts)).items()}
        rows = self._ranks.total(objective.rows(parts, sizes))
        self._model.train()
        sums: dict[str, Tensor] = {}
        for part, batch in zip(self._share.parts, parts, strict=True):
            torch.manual_seed(seed_of(self._config.seed, self._state.step, part))
            with self._clock.part("forward"), self._accelerator.autocast():
                found = objective.sums(self._model, to_device(batch, self._accelerator.device), sizes)
            with self._clock.part("backward"):
                self._accelerator.backward(objective.means(found, rows)["loss"])
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in found.items()}
        return objective.means(sums, rows)

    def _settle_times(self) -> None:
        taken = self._clock.take()
        self._state.forward_seconds += taken.get("forward", 0.0)
        self._state.backward_seconds += taken.get("backward", 0.0)

    def _measure(self, validate: Validate, metrics: Metrics) -> None:
        state, ranks = self._state, self._ranks
        found = {"accuracy": 0.0}

        def measure() -> None:
            figures = validate(self._plain)
            found.update({"accuracy": figures} if isinstance(figures, float) else figures)

        ranks.on_first(measure)
        accuracy = ranks.total({"accuracy": found["accuracy"]})["accuracy"]
        metrics.write(state.step, {f"valid_{name}": value for name, value in found.items()})
        if ranks.first:
            self._progress.valid(state.step, accuracy)
        if state.best_accuracy is None or accuracy >= state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self._keep()

    def _keep(self) -> None:
        def keep() -> None:
            with clear_disk_errors(self._run):
                self._save_best(self._plain)

        self._ranks.on_first(keep)

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is none to go on from yet or it is there."""
        if self._state.step not in (0, self._saved):
            self._ranks.on_first(self._write)
        self._saved = self._state.step

    def _write(self) -> None:
        """Write a checkpoint under a temporary name, rename it, then drop the older ones."""
        self._settle_times()
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
        scaler = self._accelerator.scaler
        self._state.scaler = None if scaler is None else scaler.state_dict()
        (partial / "state.json").write_text(json.dumps(asdict(self._state)))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in folder.iterdir():
            if old != final:
                shutil.rmtree(old)


def _each(batches: Iterable[Batch]) -> Generator[Batch, None, None]:
    """The batches one by one; closing it lets the loader end its workers, also while an exception is on its way up."""
    yield from batches


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
