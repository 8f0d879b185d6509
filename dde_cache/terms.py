"""A loss as a small table of terms, each a sum over rows and their number: parts of a batch add up to the whole.

The loss of a step is the sum over terms of weight x (sum over the global batch) / (rows of the global batch), whether
the batch comes whole, in micro-batches or spread over ranks. So the rows are counted first, from the batches alone; a
mean of the parts' means would weigh a labelled pair or a query row by the company it is in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from dde_cache.batches import Batch

Sizes = Mapping[str, int]
"""Lengths that all parts of a global batch share: the largest of them."""

Losses = Mapping[str, Tensor]
"""Means of the terms by name, and `loss`, their weighted sum."""

Output = TypeVar("Output")


@dataclass(frozen=True)
class Term(Generic[Output]):
    """One term of a loss.

    Attributes:
        weight: of the term's mean in the loss.
        rows: how many rows (or how much of their weight) a batch adds to the mean; a function of the batch alone.
        total: sum of the term over these rows, from what the model gave.
    """

    weight: float
    rows: Callable[[Batch, Sizes], float]
    total: Callable[[Output, Batch, Sizes], Float[Tensor, ""]]


class Objective(Generic[Output]):
    """What is minimised.

    Args:
        run: gives what the terms compare: model, batch, sizes -> output.
        terms: by name; `loss` is taken for their weighted sum.
        sizes: lengths of one batch that have to be those of the global batch.
    """

    def __init__(
        self,
        run: Callable[[nn.Module, Batch, Sizes], Output],
        terms: Mapping[str, Term[Output]],
        sizes: Callable[[Batch], Sizes] = lambda batch: {},
    ) -> None:
        self._run, self._terms, self._sizes = run, terms, sizes

    @property
    def terms(self) -> Mapping[str, Term[Output]]:
        """The terms by name."""
        return self._terms

    def sizes(self, batches: Sequence[Batch]) -> Sizes:
        """The sizes that some batches share."""
        each = [self._sizes(batch) for batch in batches]
        return {name: max(one[name] for one in each) for name in each[0]}

    def rows(self, batches: Sequence[Batch], sizes: Sizes) -> Mapping[str, float]:
        """Rows of each term in all of some batches."""
        return {name: sum(term.rows(batch, sizes) for batch in batches) for name, term in self._terms.items()}

    def run(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Output:
        """What the terms compare."""
        return self._run(model, batch, sizes)

    def sums(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Mapping[str, Tensor]:
        """Run the model on one batch; the sum of each term."""
        output = self._run(model, batch, sizes)
        return {name: term.total(output, batch, sizes) for name, term in self._terms.items()}

    def means(self, sums: Mapping[str, Tensor], rows: Mapping[str, float]) -> Losses:
        """Each term's mean over `rows` (0 where there are none), and their weighted sum `loss`."""
        means = {name: sums[name] / (rows[name] or 1) for name in self._terms}
        weighted = [term.weight * means[name] for name, term in self._terms.items()]
        return {"loss": sum(weighted[1:], weighted[0]), **means}

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """The losses of one batch that is whole."""
        sizes = self.sizes([batch])
        return self.means(self.sums(model, batch, sizes), self.rows([batch], sizes))


def pairs(batch: Batch, _sizes: Sizes) -> int:
    """Rows of a term over all pairs."""
    return len(batch["pair"])
