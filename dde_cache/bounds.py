"""Bounds of what a unit's arrays hold, in vectorised NumPy on the arrays as they lie on disk.

`unsafe` is what every reader asks before numbers reach a gather or a loss: positions outside their axis, NaN, weights
and tails outside their range, mass on padding. `inconsistent` is the judge's: whether rows, slots and masses agree with
each other. Axis names: r records, h heads, q query rows, s slots, k keys.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from dde_cache.codec import EMPTY, RELATIVE_ERROR, STEPS_AN_OCTAVE, ends_of_codes
from dde_cache.spec import TargetSpec, Weights
from dde_cache.states import MOST

_LOG8 = (2.0 ** (-np.arange(EMPTY + 1) / STEPS_AN_OCTAVE)).astype(np.float32)
_LOG8[EMPTY] = 0

_LEAST: dict[Weights, float] = {"log8": float(_LOG8[EMPTY - 1]), "float16": 2**-25, "float32": 0.0}
"""Absolute error of a weight near 0."""

_SUM_ERROR, _TAIL_ERROR = 1e-5, {2: 2**-12, 4: 0.0}
"""Of a row's float32 softmax, and of the stored tail by its bytes."""

_CODE_SUM_ERROR = 1e-4
"""Of the ends of a row's `sqrt8` codes: float32 sums, and roots that fall beside the middle of two codes."""


def unsafe(
    parts: Mapping[str, np.ndarray], rows: Int[np.ndarray, " r"], keys: Int[np.ndarray, " r"], spec: TargetSpec
) -> list[str]:
    """Say what must not be computed with; empty where all is safe.

    Args:
        parts: the arrays of one direction, by name.
        rows: query rows of each record that are filled.
        keys: valid keys of the other modality for each record.
        spec: what the arrays are.
    """
    if spec.steps is not None:
        return _unsafe_dense(parts["weight"], rows, keys, spec.steps)
    return _unsafe_sparse(parts["index"], parts["weight"], parts["tail"], keys)


def inconsistent(
    parts: Mapping[str, np.ndarray], rows: Int[np.ndarray, " r"], keys: Int[np.ndarray, " r"], spec: TargetSpec
) -> dict[str, int]:
    """Count the rows that contradict themselves, by what is wrong. The arguments are those of `unsafe`."""
    if spec.steps is not None:
        return _inconsistent_dense(parts["weight"], rows, keys, spec.steps)
    valid = np.arange(parts["tail"].shape[2])[None] < rows[:, None]
    return _inconsistent_sparse(parts["index"], parts["weight"], parts["tail"], valid, spec.weights)


def not_finite(values: Float[np.ndarray, "r n w"]) -> Bool[np.ndarray, "r n w"]:
    """Where a float16 is infinite or NaN: its exponent is all ones. Several times faster than `isfinite` of float16."""
    return (values.view(np.uint16) & 0x7C00) == 0x7C00


def unsafe_states(values: np.ndarray) -> Bool[np.ndarray, "..."]:
    """Where stored states or scales are nothing to compute with: not finite, also decoded; below 0; the code -128."""
    if values.dtype == np.float16:
        return not_finite(values)
    if values.dtype == np.int8:
        return np.asarray(values == -128)
    return np.asarray(~((values >= 0) & (values <= MOST)))


def inconsistent_states(code: Int[np.ndarray, "*n w"], scale: Float[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
    """Which vectors contradict themselves: the largest code is 127 where there is a scale, otherwise 0."""
    largest = np.abs(code.astype(np.int16)).max(-1, initial=0)
    return np.asarray(largest != np.where(scale > 0, 127, 0))


def _unsafe_dense(code: Int[np.ndarray, "r h q k"], rows: np.ndarray, keys: np.ndarray, steps: int) -> list[str]:
    problems = []
    # Over the heads first: rows of bytes, which NumPy compares many at a time.
    largest = code.max(axis=1, initial=0)
    if (largest > steps + 1).any():
        problems.append(f"expected codes up to {steps + 1}, got larger ones")
    behind = _behind(keys, code.shape[3])[:, None, :] | _behind(rows, code.shape[2])[:, :, None]
    if (largest[behind] != 0).any():
        problems.append("expected no weight on keys or rows of padding, got some")
    return problems


def _behind(counts: np.ndarray, length: int) -> Bool[np.ndarray, "r n"]:
    """Which positions of an axis are padding."""
    return np.asarray(np.arange(length)[None] >= counts[:, None])


def _inconsistent_dense(
    code: Int[np.ndarray, "r h q k"], rows: np.ndarray, keys: np.ndarray, steps: int
) -> dict[str, int]:
    valid = ~_behind(rows, code.shape[2])[:, None]
    every = ((code != 0) == ~_behind(keys, code.shape[3])[:, None, None]).all(-1)
    # Each code bounds its weight from both sides, and the weights of a row sum to 1.
    least, most = (end[code].sum(-1) for end in ends_of_codes(steps))
    found = {
        "rows without a weight for every key, or with one for padding": valid & ~every,
        "rows of padding that are not empty": ~valid & (code != 0).any(-1),
        "weights that cannot add up to 1": valid & ((least > 1 + _CODE_SUM_ERROR) | (most < 1 - _CODE_SUM_ERROR)),
    }
    return {name: int(rows.sum()) for name, rows in found.items() if rows.any()}


def _unsafe_sparse(
    index: Int[np.ndarray, "r h q s"], weight: np.ndarray, tail: np.ndarray, keys: Int[np.ndarray, " r"]
) -> list[str]:
    """As `unsafe`; index: unsigned positions; weight: `log8` differences (always safe), or weights."""
    problems = []
    # Slots before heads, as they lie in memory: no copy.
    flat = index.transpose(0, 3, 1, 2).reshape(len(index), -1)
    if flat.size and (flat.max(axis=1) >= keys).any():
        problems.append("expected key positions inside each record's tokens, got others")
    if weight.dtype.kind == "f" and _largest(weight) > 1:
        problems.append("expected weights from 0 to 1, got others")
    if _largest(np.abs(tail)) > 0.5:
        problems.append("expected tail masses from -1/2 to 1/2, got others")
    return problems


def _largest(values: np.ndarray) -> float:
    """The largest of non-negative floats; infinity where one is NaN or negative.

    As unsigned integers such floats keep their order, and what is NaN or negative (also -0) is above; a first look at
    them is several times faster than comparisons of float16.
    """
    if not values.size:
        return 0.0
    kind = np.dtype(f"u{values.itemsize}")
    largest = values.view(kind).max()
    if largest > np.full(1, np.inf, values.dtype).view(kind)[0]:
        return np.inf
    return float(np.array([largest], kind).view(values.dtype)[0])


def decoded_weights(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights before a row is scaled [r, h, q, s] in float32, and where `log8` codes run over [r, h, q]."""
    if weight.dtype.kind == "f":
        return weight.astype(np.float32), np.zeros(weight.shape[:3], bool)
    # Differences of 255 slots fit 16 bits; beyond that a wrapped sum would look small.
    code = weight.cumsum(-1, dtype=np.uint16 if weight.shape[3] <= 256 else np.uint32)
    over = np.asarray((code > EMPTY).any(-1))
    return _LOG8[np.minimum(code, EMPTY)], over


def _inconsistent_sparse(
    index: Int[np.ndarray, "r h q s"],
    weight: np.ndarray,
    tail: np.ndarray,
    valid: Bool[np.ndarray, "r q"],
    weights: Weights,
) -> dict[str, int]:
    """As `inconsistent`; valid: which query rows must be filled; the others must be empty."""
    if not weight.size:
        return {"rows without slots": int(valid.sum()) * weight.shape[1]} if valid.any() else {}
    held, over = decoded_weights(weight)
    kept = held > 0
    # In float32, as everything here: a chunk of a large teacher has 10^8 weights.
    total = held.sum(-1)
    filled = np.broadcast_to(valid[:, None], tail.shape)
    stored = tail.astype(np.float32)
    mass = np.where(stored < 0, -stored, 1 - stored)
    allowed = 1.01 * (RELATIVE_ERROR[weights] * mass + _LEAST[weights] * kept.sum(-1) + _TAIL_ERROR[tail.itemsize])
    allowed += _SUM_ERROR
    found = {
        "codes that rise beyond 255": over,
        "rows of valid tokens that are empty": filled & ~kept.any(-1),
        "rows of padding that are not empty": ~filled & (kept.any(-1) | (stored != 0)),
        "weights that rise along the slots": (np.diff(held, axis=-1) > 0).any(-1),
        "empty slots with a position": ((index != 0) & ~kept).any(-1),
        "rows with a position twice": _twice(index, kept),
        "kept weights that do not add up to 1 - tail": filled & ~(np.abs(total - mass) <= allowed),
    }
    return {name: int(rows.sum()) for name, rows in found.items() if rows.any()}


def _twice(index: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Where a row keeps one position in two slots."""
    slots = index.shape[-1]
    if slots <= 16:
        twice = np.zeros(index.shape[:3], bool)
        for one in range(1, slots):
            for other in range(one):
                twice |= (index[..., one] == index[..., other]) & kept[..., one] & kept[..., other]
        return twice
    # Empty slots get positions of their own, beyond all others.
    apart = np.where(kept, index.astype(np.int64), 2**32 + np.arange(slots))
    return (np.diff(np.sort(apart, axis=-1), axis=-1) == 0).any(-1)
