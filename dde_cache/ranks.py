"""The processes that train one model together, as `torchrun` starts them: one, where it did not.

Every rank takes the same steps; what they tell each other are numbers of a step and the sum of their gradients. Only
the first one writes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor, distributed, nn

from dde_cache.errors import RunError, first_line

PATIENCE = timedelta(hours=6)
"""How long ranks wait for each other: the first one validates alone. A rank that has died is noticed at once."""

BUCKET = 2**24
"""Gradients that are added up by one message."""


class Ranks:
    """All ranks, seen from one of them. Methods that speak to the others must be called by all, in the same order."""

    def __init__(self) -> None:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # accelerate takes processes without a GPU for strangers to each other, unless it is told.
        state = PartialState(cpu=several and not torch.cuda.is_available(), timeout=PATIENCE)
        self.number: int = state.process_index
        self.count: int = state.num_processes
        self._device: torch.device = state.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.number == 0

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum of each value over the ranks."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, values: Mapping[str, float]) -> dict[str, float]:
        """Largest of each value over the ranks."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def any(self, true: bool) -> bool:
        """Whether it is true on some rank."""
        return self.largest({"it": float(true)})["it"] > 0

    def on_first(self, act: Callable[[], None]) -> None:
        """Do something on the first rank, while the others wait.

        Raises:
            RunError: on the other ranks, where the first one's act raised.
        """
        failed = True
        try:
            if self.first:
                act()
            failed = False
        finally:
            failed_somewhere = self.any(failed)
        if failed_somewhere:
            raise RunError("the first rank could not go on; its own message says why")

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the first one's weights."""
        if self.count > 1:
            with _clear_errors(), torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    distributed.broadcast(tensor.data, src=0)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the ranks; a parameter that has none on any rank keeps none."""
        if self.count == 1:
            return
        bucket: list[nn.Parameter] = []
        for parameter in parameters:
            if parameter.requires_grad:
                bucket.append(parameter)
            if sum(one.numel() for one in bucket) >= BUCKET:
                self._add(bucket)
                bucket = []
        if bucket:
            self._add(bucket)

    def gather(self, rows: Float[Tensor, "m w"], most: int) -> Float[Tensor, "n w"]:
        """The rows of all ranks, one rank after the other, each filled up to `most` rows with zeros.

        Gradients flow back to the rank that a row is of, summed over the ranks that used it; `add_gradients` then gives
        the gradient of the sum of all ranks' losses.
        """
        if self.count == 1:
            return rows
        padded = nn.functional.pad(rows, (0, 0, 0, most - len(rows)))
        return _Gather.apply(padded, self.number, self.count)

    def _add(self, bucket: list[nn.Parameter]) -> None:
        have = torch.tensor([float(one.grad is not None) for one in bucket], device=bucket[0].device)
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        flat = torch.cat([have, *(gradient.flatten() for gradient in gradients)])
        with _clear_errors():
            distributed.all_reduce(flat)
        given, rest = flat[: len(bucket)].tolist(), flat[len(bucket) :]
        for one, count, part in zip(bucket, given, rest.split([one.numel() for one in bucket]), strict=True):
            one.grad = part.view_as(one) if count else None

    def _reduced(self, values: Mapping[str, float], how: distributed.ReduceOp.RedOpType) -> dict[str, float]:
        if self.count == 1 or not values:
            return dict(values)
        numbers: Tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        with _clear_errors():
            distributed.all_reduce(numbers, op=how)
        return dict(zip(values, numbers.tolist(), strict=True))


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backwards, the sum over ranks of the gradients of one's own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, number: int, count: int) -> Tensor:
        ctx.own = slice(number * len(rows), (number + 1) * len(rows))
        parts = [torch.empty_like(rows) for _ in range(count)]
        with _clear_errors():
            distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        with _clear_errors():
            distributed.all_reduce(gradient)
        return gradient[ctx.own], None, None


@contextmanager
def _clear_errors() -> Iterator[None]:
    """A rank that is gone shows on the others as an error of the network.

    Raises:
        RunError: the ranks cannot speak to each other.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        first = first_line(error)
        raise RunError(
            f"expected an answer of every rank, but one has stopped ({first}); its own message says why; go on with "
            "--resume"
        ) from error


def accelerator(precision: str) -> Accelerator:
    """What runs the model in a precision.

    Raises:
        RunError: the device cannot do it.
    """
    # What accelerate knows is shared by the process, and holds the precision of a run that has ended.
    AcceleratorState._reset_state()
    try:
        made = Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise RunError(f"expected a precision that this device can do, got {precision!r}: {error}") from error
    # On a CPU accelerate takes fp16 without a word, and runs in float32.
    if precision == "fp16" and made.scaler is None:
        raise RunError(
            f"expected a precision that this device can do, got 'fp16' on {made.device}; use --precision bf16 or no"
        )
    return made
