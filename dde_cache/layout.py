"""What the arrays of a unit must look like, from its own specification and counts, before anything of them is read.

docs/format.md has the same table in words.
"""

from collections.abc import Mapping

import numpy as np

from dde_cache.blocks import Blocks, Layout
from dde_cache.codec import part_names
from dde_cache.spec import HASH_BYTES, HIDDEN, POOLED, WHOLE, Direction, Rows, TargetSpec, UnitAttributes
from dde_cache.stream import CHUNK_PAIRS

DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2t")
KNOWN_GROUPS = frozenset({"samples", "maps", "predictions", "views", "partners", WHOLE, HIDDEN, POOLED})

GROUP_OF_ROWS: Mapping[Rows, str] = {"t2i": "maps", "i2t": "maps", "t2w": WHOLE, "i2w": WHOLE}
HIDDEN_ARRAYS = ("text", "image")

MAX_RECORDS = 2**24
"""Records a unit."""

MAX_TOKENS = 2**20
"""Image tokens of one picture."""

SAMPLE_ARRAYS = ("key_bytes", "key_offsets", "content")

MAP_COLUMNS: Mapping[str, type[np.generic]] = {
    "sample": np.uint32,
    "text": np.uint16,
    "image": np.uint8,
    "view": np.uint16,
    "pass": np.uint8,
    "layer": np.uint16,
    "text_tokens": np.uint16,
    "token_ids": np.uint32,
    "grid": np.uint16,
}

PREDICTION_COLUMNS: Mapping[str, type[np.generic]] = {
    "sample": np.uint32,
    "text": np.uint16,
    "view": np.uint16,
    "pass": np.uint8,
}

PARTNER_COLUMNS = PREDICTION_COLUMNS

VIEW_COLUMNS: Mapping[str, type[np.generic]] = {"sample": np.uint32, "image": np.uint8, "view": np.uint16}

_INDEX = ("uint8", "uint16", "uint32")
_WEIGHT = {"sqrt8": "uint8", "log8": "uint8", "float16": "float16", "float32": "float32"}
_TAIL = {"log8": "float16", "float16": "float16", "float32": "float32"}

Axis = int | tuple[int, int]
"""A length, or the least and the greatest."""


def known_groups(spec: TargetSpec) -> frozenset[str]:
    """The groups that this version reads; one whose parameters it does not know is as one that it does not know."""
    unread = {WHOLE: not spec.has_whole, HIDDEN: spec.hidden_width is None, POOLED: spec.pooled_width is None}
    return KNOWN_GROUPS - {name for name, other in unread.items() if other}


def array_names(attributes: UnitAttributes) -> list[str]:
    """The arrays that a unit with these groups must have."""
    names = [f"samples/{name}" for name in SAMPLE_ARRAYS]
    if "maps" in attributes.groups:
        names += [f"maps/{name}" for name in MAP_COLUMNS]
        names += [
            f"{GROUP_OF_ROWS[rows]}/{rows}/{part}"
            for rows in attributes.spec.rows
            for part in part_names(attributes.spec.steps)
        ]
        names += [name for states in attributes.spec.states for name in states.arrays]
    if "predictions" in attributes.groups:
        names += [f"predictions/{name}" for name in (*PREDICTION_COLUMNS, "logits")]
    if "views" in attributes.groups:
        names += [f"views/{name}" for name in (*VIEW_COLUMNS, "pixels")]
    if "partners" in attributes.groups:
        names += [f"partners/{name}" for name in (*PARTNER_COLUMNS, *SAMPLE_ARRAYS)]
    return names


def layout_problems(blocks: Blocks, attributes: UnitAttributes) -> list[str]:
    """List the arrays that are missing, of another make or type, or larger than the specification allows.

    Only metadata is read.
    """
    problems: list[str] = []
    layouts: dict[str, Layout] = {}
    for name in array_names(attributes):
        try:
            layouts[name] = blocks.layout(name)
        except KeyError:
            problems.append(f"{name}: missing")
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    problems += [
        f"{name}: {problem}"
        for name, (types, axes) in _expected(layouts, attributes).items()
        if name in layouts
        for problem in _compare(layouts[name], types, axes)
    ]
    problems += [
        f"{name}: expected at most {CHUNK_PAIRS} records a chunk, got {layout.records}"
        for name, layout in layouts.items()
        if name.endswith(("/index", "/weight", "/tail", "/logits")) or name.startswith((f"{HIDDEN}/", f"{POOLED}/"))
        if layout.records > CHUNK_PAIRS
    ]
    if "maps" in attributes.groups:
        further = {WHOLE: attributes.spec.has_whole, **{one.group: True for one in attributes.spec.states}}
        problems += [
            f"{name}: expected among the groups, as the specification says"
            for name, there in further.items()
            if there and name not in attributes.groups
        ]
    if attributes.samples > MAX_RECORDS:
        problems.append(f"samples: expected at most {MAX_RECORDS:,} a unit, got {attributes.samples:,}")
    return problems


def _expected(
    layouts: Mapping[str, Layout], attributes: UnitAttributes
) -> dict[str, tuple[tuple[str, ...], tuple[Axis, ...]]]:
    """Types and axes of each array; the first array of a table says how many records it has."""
    spec = attributes.spec
    rows: Axis = (0, MAX_RECORDS)

    def length(name: str) -> Axis:
        return layouts[name].shape[0] if name in layouts and layouts[name].shape[0] <= MAX_RECORDS else rows

    expected: dict[str, tuple[tuple[str, ...], tuple[Axis, ...]]] = {
        "samples/key_bytes": (("uint8",), ((0, 2**30),)),
        "samples/key_offsets": (("uint64",), (attributes.samples + 1,)),
        "samples/content": (("uint8",), (attributes.samples, 32)),
    }
    records = length("maps/sample")
    wide: Mapping[str, tuple[Axis, ...]] = {"token_ids": ((0, spec.text_length),), "grid": (2,)}
    for name, dtype in MAP_COLUMNS.items():
        expected[f"maps/{name}"] = ((np.dtype(dtype).name,), (records, *wide.get(name, ())))
    least = 0 if records == 0 else 1
    for rows_of in spec.rows:
        folder = f"{GROUP_OF_ROWS[rows_of]}/{rows_of}"
        queries = spec.text_length if rows_of in ("t2i", "t2w") else MAX_TOKENS
        keys = {"t2i": MAX_TOKENS, "i2t": spec.text_length}.get(rows_of, spec.text_length + MAX_TOKENS)
        if spec.steps is not None:
            dense: tuple[Axis, ...] = (records, spec.stored_heads, (least, queries), (least, keys))
            expected[f"{folder}/weight"] = ((_WEIGHT[spec.weights],), dense)
            continue
        index = layouts.get(f"{folder}/index")
        slots = (least, min(spec.k or keys, keys))
        # The three arrays of a direction have the same axes; the index says which.
        same = index is not None and len(index.shape) == 4
        row: tuple[Axis, ...] = (records, spec.stored_heads, index.shape[2] if same and index else (least, queries))
        slot: Axis = index.shape[3] if same and index else slots
        expected[f"{folder}/index"] = (_INDEX, (records, spec.stored_heads, (least, queries), slots))
        expected[f"{folder}/weight"] = ((_WEIGHT[spec.weights],), (*row, slot))
        expected[f"{folder}/tail"] = ((_TAIL[spec.weights],), row)
    for states in spec.states:
        for name, stored in states.arrays.items():
            most = spec.text_length if "/text" in name else MAX_TOKENS
            axes: tuple[Axis, ...] = (records, (least, most)) if states.per_token else (records,)
            expected[name] = ((stored,), axes if name.endswith("_scale") else (*axes, states.width))
    predictions = length("predictions/sample")
    for name, dtype in PREDICTION_COLUMNS.items():
        expected[f"predictions/{name}"] = ((np.dtype(dtype).name,), (predictions,))
    classes: Axis = (0, 0) if spec.classes is None else spec.classes
    expected["predictions/logits"] = (("float32",), (predictions, classes))
    views = length("views/sample")
    for name, dtype in VIEW_COLUMNS.items():
        expected[f"views/{name}"] = ((np.dtype(dtype).name,), (views,))
    expected["views/pixels"] = (("uint8",), (views, HASH_BYTES))
    partners = length("partners/sample")
    for name, dtype in PARTNER_COLUMNS.items():
        expected[f"partners/{name}"] = ((np.dtype(dtype).name,), (partners,))
    offsets: Axis = partners + 1 if isinstance(partners, int) else (1, MAX_RECORDS + 1)
    expected["partners/key_bytes"] = (("uint8",), ((0, 2**30),))
    expected["partners/key_offsets"] = (("uint64",), (offsets,))
    expected["partners/content"] = (("uint8",), (partners, 32))
    return expected


def _compare(layout: Layout, types: tuple[str, ...], axes: tuple[Axis, ...]) -> list[str]:
    problems = []
    if layout.dtype.name not in types:
        problems.append(f"expected {' or '.join(types)}, got {layout.dtype.name}")
    fits = len(layout.shape) == len(axes) and all(
        size == axis if isinstance(axis, int) else axis[0] <= size <= axis[1]
        for size, axis in zip(layout.shape, axes, strict=True)
    )
    if not fits:
        shape = ", ".join(str(axis) if isinstance(axis, int) else f"{axis[0]} to {axis[1]}" for axis in axes)
        problems.append(f"expected shape [{shape}], got {list(layout.shape)}")
    return problems
