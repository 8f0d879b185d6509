"""What every tower gives, whatever model is inside."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from dde_cache.attention import QueryKey


@dataclass
class BlockOutput:
    """What a block of a tower gave: its query and key projections, and its hidden states."""

    query_key: QueryKey
    states: Float[Tensor, "b n w"]


@dataclass
class TowerOutput:
    """One side of a batch: pooled vector, token mask, what the last block and those that are kept gave, and the states
    of the tokens behind the final norm."""

    pooled: Float[Tensor, "b w"]
    mask: Bool[Tensor, "b n"]
    blocks: Mapping[int, BlockOutput]
    states: Any = None

    @property
    def query_key(self) -> QueryKey:
        """The last block's query and key projections."""
        return self.block(None).query_key

    def block(self, number: int | None) -> BlockOutput:
        """A block that was kept; None: the last."""
        return self.blocks[max(self.blocks) if number is None else number]


@dataclass(frozen=True)
class PatchLayout:
    """Tokens of an image tower that sees every picture at one size: `first` tokens (CLS before all others, then
    distillation and register tokens; 0: none), then the patches in row-major order."""

    first: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.first + self.rows * self.columns


class Tower(nn.Module):
    """One side of a student.

    `forward` gives a `TowerOutput`; every one has the last block, and those of `kept_blocks`. `projection` maps what
    the model pools to the width of the shallow interaction, where the two differ.

    Attributes:
        width: of the states, and of the pooled vector before `projection`.
        heads, head_size: of the attention.
        depth: number of blocks.
        layout: of an image tower that sees every picture at one size; None: the tokens are the teacher's own.
    """

    layout: PatchLayout | None = None

    def __init__(self, width: int, heads: int, head_size: int, depth: int) -> None:
        super().__init__()
        self.width, self.heads, self.head_size, self.depth = width, heads, head_size, depth
        self.kept_blocks: tuple[int, ...] = ()
        self.projection: nn.Module = nn.Identity()

    def project(self, width: int) -> None:
        """Give pooled vectors of a width: through a learned linear map, where they have another one."""
        self.projection = nn.Identity() if width == self.width else nn.Linear(self.width, width)

    def kept(self) -> list[int]:
        """Numbers of the blocks that every output has."""
        return sorted({*self.kept_blocks, self.depth - 1})
