"""Stored maps of a picture as those of its mirror image, without another pass of the teacher.

Mirroring a picture mirrors each patch row. A teacher that treats both alike (an equivariant one) would give the same
attention with the image axis permuted so. No teacher with learned positions is one: this is an approximation, off by
default, and `benchmarks/remap.py` measures its error.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def mirrored_order(grid: Sequence[int]) -> Int[Tensor, " v"]:
    """Where each image token of a mirrored picture lies in the picture itself, CLS first; its own inverse.

    Args:
        grid: patch rows and columns.
    """
    rows, columns = grid
    patches = torch.arange(rows * columns).reshape(rows, columns).flip(1).flatten()
    return torch.cat([torch.zeros(1, dtype=torch.int64), patches + 1])


def mirror_maps(maps: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Permute the image axis of some records.

    Args:
        maps: targets of a batch, still encoded: `grid` [b, 2] and the parts of both directions (`t2i.weight`, ...),
            of every layer (`t2i@1.weight`, ...).
        rows: which records.
    """
    mirrored = dict(maps)
    if not len(rows):
        return mirrored
    parts = {name: name.partition(".")[0].partition("@")[0] for name in maps if name.startswith(("t2i", "i2t"))}
    sparse = any(name.endswith(".index") for name in parts)
    mirrored |= {name: maps[name].clone() for name in parts}
    for row in rows:
        order = mirrored_order(maps["grid"][row].tolist())
        for name, direction in parts.items():
            part, found = mirrored[name][row], maps[name][row]
            if direction == "i2t":
                part[:, : len(order)] = found[:, order]
            elif name.endswith(".index"):
                # Empty slots point to CLS, which stays.
                part[:] = order[found.long()].to(part.dtype)
            elif not sparse:
                part[..., : len(order)] = found[..., order]
    return mirrored
