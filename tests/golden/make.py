"""Write the golden caches of format version 1, and what they decode to, from fixed numbers.

    python tests/golden/make.py NAME

Each is made once, when what it shows comes into the format, and then read for ever: do not run this again for one that
is there. What they decode to (`expected-NAME.npz`) is computed here in plain Python from the numbers that go in, not by
the package.

    two-images   2 images a sample, 2 views, 2 passes, 2 layers, 2 heads, log8 with at most 3 keys, 3 answers; one unit
                 has positions above 255, one has a group that no reader knows and none needs
    passes       2 views, masked and negative passes; partners in the unit and elsewhere; logits of matched pairs alone
    whole-rows   mean head, float16, every key, padded query rows, no predictions
    every-key    sqrt8 of 40 steps, padded query rows, 2 layers, 3 answers; pictures of two sizes
    logits       predictions alone
    beside       rows over the whole sequence, hidden states of width 5; 2 images, 2 layers, sqrt8, padded query rows
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from dde_cache.card import close_with_card
from dde_cache.codec import from_numpy
from dde_cache.spec import FORMAT_VERSION, Group, Provenance, TargetSpec, TeacherIdentity, UnitAttributes, hash_keys
from dde_cache.store import CacheWriter
from dde_cache.unit import MapColumns, UnitArrays, write_unit

FOLDER = Path(__file__).parent / "v1"
HIGHEST = 6
"""Text length of the teacher that never was."""

TEACHER = TeacherIdentity(
    family="vilt",
    **{name: f"{number}" * 64 for number, name in enumerate(("weights", "config", "tokenizer", "processor"))},
)
COMMON = {
    "teacher": TEACHER, "rule": "block-softmax, cls first, row-major patches", "teacher_layers": 4,
    "text_length": HIGHEST, "patch_size": 16, "dtype": "float32", "directions": ("t2i", "i2t"),
    "view": "as-processed", "views": 1, "passes": ("matched",), "images": 1,
    "k": None, "mass": None, "steps": None, "groups": {},
}  # fmt: skip
DIFFERENT = {
    "two-images": {
        "teacher_heads": 2, "view": "example 1", "views": 2, "passes": ("matched", "masked example 1"), "images": 2,
        "layers": (1, 3), "heads": "all", "queries": "valid", "k": 3, "weights": "log8", "classes": 3,
        "groups": {"hologram": {"depth": 2}},
    },
    "passes": {
        "teacher_heads": 2, "view": "example 1", "views": 2, "layers": (3,), "heads": "all", "queries": "valid",
        "weights": "sqrt8", "steps": 56, "classes": 3,
        "passes": (
            "matched",
            "masked 1: 15 % of the tokens, at least one; of these 80 % [MASK], 10 % random, 10 % kept",
            "negative 1: the picture of another sample of the shard",
        ),
        "groups": {"partners": {"exchanged": "picture"}},
    },
    "whole-rows": {
        "teacher_heads": 2, "layers": (3,), "heads": "mean", "queries": "all", "weights": "float16", "classes": None,
    },
    "every-key": {
        "teacher_heads": 2, "layers": (0, 3), "heads": "all", "queries": "all", "weights": "sqrt8", "steps": 40,
        "classes": 3,
    },
    "one-way": {
        "teacher_heads": 2, "layers": (3,), "directions": ("t2i",), "heads": "all", "queries": "valid",
        "weights": "sqrt8", "steps": 56, "classes": None,
    },
    "logits": {
        "teacher_heads": 2, "images": 2, "layers": (), "heads": "all", "queries": "valid", "k": 3, "weights": "log8",
        "classes": 3,
    },
    "beside": {
        "teacher_heads": 2, "images": 2, "layers": (1, 2), "heads": "all", "queries": "all", "weights": "sqrt8",
        "steps": 56, "classes": 3,
        "groups": {
            "whole": {"keys": "valid text then valid image v1"}, "hidden": {"states": "block output v1", "width": 5},
        },
    },
}  # fmt: skip
SPECS = {name: TargetSpec(**COMMON | different) for name, different in DIFFERENT.items()}
UNITS = {
    "two-images": (("a", "b/ü"), ("wide",)),
    "passes": (("a", "long"),),
    "whole-rows": (("a", "c"),),
    "every-key": (("a", "long"),),
    "one-way": (("a", "b"),),
    "logits": (("a", "b"), ("c",)),
    "beside": (("a", "long"),),
}
"""Sample keys of each unit."""

GRIDS = {"wide": ((20, 16), (1, 1)), "long": ((1, 3), (1, 1))}
"""Patch grids of the first and the second image; other samples have 2 x 2 and 1 x 3."""


def records_of(spec: TargetSpec, keys: tuple[str, ...]) -> list[tuple[int, ...]]:
    """(sample, text, view, pass, image, layer) of each map, sorted; the second sample has two texts."""
    return [
        (sample, text, view, number, image, layer)
        for sample in range(len(keys))
        for text in range(1 + sample % 2)
        for view in range(spec.views)
        for number in range(len(spec.passes))
        for image in range(spec.images)
        for layer in spec.layers
    ]


def row_of(spec: TargetSpec, seed: int, keys: int) -> tuple[list[int], list[float], list[int], float]:
    """One attention row: positions, weights as stored (codes for log8), and the tail as stored."""
    kept = min(keys, spec.k or keys)
    start, step = seed % keys, 1 + (seed // 7) % max(keys - 1, 1)
    positions: list[int] = []
    for number in range(keys):
        place = (start + number * step) % keys
        if place not in positions and len(positions) < kept:
            positions.append(place)
    if spec.weights == "log8":
        tail = [0.0, 0.25, -0.125, 0.5, -0.4375][seed % 5] if keys > len(positions) else 0.0
        steps = np.cumsum([0] + [(seed // (number + 2)) % 60 for number in range(len(positions) - 1)])
        raw = 2.0 ** (-steps / 16)
        weights = raw / raw.sum() * (-tail if tail < 0 else 1 - tail)
        codes = np.minimum(np.round(-16 * np.log2(weights)), 254).astype(int).tolist()
        return positions, [2.0 ** (-code / 16) for code in codes], codes, tail
    raw = np.array([1 / (number + 1 + seed % 3) for number in range(len(positions))])
    weights = (raw / raw.sum()).astype(np.float16).astype(float).tolist()
    return positions, weights, [], 0.0


def whole_row_of(steps: int, seed: int, keys: int) -> tuple[list[int], list[float]]:
    """The codes of one attention row with every key, and the weights that they mean."""
    raw = [1 / (1 + (number + seed) % keys) ** (1 + seed % 9) for number in range(keys)]
    levels = [round(steps * (weight / sum(raw)) ** 0.5) for weight in raw]
    meant = [level**2 + 1 / 12 if level else 1 / 48 for level in levels]
    return [level + 1 for level in levels], [weight / sum(meant) for weight in meant]


def whole_direction_of(
    spec: TargetSpec, rows: list[int], keys: list[int], queries: int, salt: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As `direction_of`, for sqrt8."""
    shape = (len(rows), spec.stored_heads, queries, max(keys))
    code, dense = np.zeros(shape, np.uint8), np.zeros(shape)
    for record in range(len(rows)):
        for head in range(spec.stored_heads):
            for query in range(rows[record]):
                codes, weights = whole_row_of(spec.steps, salt + 1009 * record + 101 * head + 13 * query, keys[record])
                code[record, head, query, : keys[record]] = codes
                dense[record, head, query, : keys[record]] = weights
    return {"weight": code}, dense


def direction_of(
    spec: TargetSpec, rows: list[int], keys: list[int], queries: int, salt: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of all records in one direction by name, and the dense maps that they mean.

    Args:
        spec: of the cache.
        rows: query rows of each record that are stored.
        keys: valid keys of each record.
        queries: length of the query axis.
        salt: makes the numbers of one direction other than those of the other.
    """
    heads, slots, widest = spec.stored_heads, min(spec.k or max(keys), max(keys)), max(keys)
    shape = (len(rows), heads, queries, slots)
    index = np.zeros(shape, np.uint8 if widest <= 256 else np.uint16)
    log8 = spec.weights == "log8"
    weight = np.zeros(shape, np.uint8 if log8 else np.float16)
    if log8:
        weight[..., 0] = 255
    tail = np.zeros(shape[:3], np.float16)
    dense = np.zeros((*shape[:3], widest))
    for record in range(len(rows)):
        for head in range(heads):
            for query in range(rows[record]):
                seed = salt + 1009 * record + 101 * head + 13 * query
                positions, weights, codes, stored_tail = row_of(spec, seed, keys[record])
                index[record, head, query, : len(positions)] = positions
                tail[record, head, query] = stored_tail
                if log8:
                    filled = codes + [255] * (slots - len(codes))
                    weight[record, head, query] = np.diff(filled, prepend=0)
                else:
                    weight[record, head, query, : len(weights)] = weights
                mass = -stored_tail if stored_tail < 0 else 1 - stored_tail
                for position, value in zip(positions, weights, strict=True):
                    dense[record, head, query, position] = value / sum(weights) * mass
    return {"index": index, "weight": weight, "tail": tail}, dense


def partners_of(spec: TargetSpec, keys: tuple[str, ...], content: np.ndarray) -> dict[str, np.ndarray]:
    """The partner of every record of pass 2: of a first text the other sample, of a second one that is not here."""
    places = [place[:4] for place in records_of(spec, keys) if place[3] == 2]
    others = [1 - sample if text == 0 else None for sample, text, *_ in places]
    named = ["elsewhere/\u00df".encode() if other is None else keys[other].encode() for other in others]
    hashes = [np.arange(32) if other is None else content[other] for other in others]
    columns = np.array(places).T
    return {
        "partners/sample": columns[0].astype(np.uint32),
        "partners/text": columns[1].astype(np.uint16),
        "partners/view": columns[2].astype(np.uint16),
        "partners/pass": columns[3].astype(np.uint8),
        "partners/key_bytes": np.frombuffer(b"".join(named), np.uint8),
        "partners/key_offsets": np.cumsum([0, *map(len, named)]).astype(np.uint64),
        "partners/content": np.stack(hashes).astype(np.uint8),
    }


def states_of(width: int, tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hidden states of every record: of token n in place w of record r some wave of r, n and w; 0 behind the tokens."""
    arrays = {}
    for name, counts in tokens.items():
        record, token, place = np.indices((len(counts), max(counts), width))
        wave = np.sin(record + 2 * token + 3 * place + len(name)) * 100
        arrays[f"hidden/{name}"] = np.where(token < counts[:, None, None], wave, 0).astype(np.float16)
    return arrays


def unit_of(spec: TargetSpec, keys: tuple[str, ...], number: int) -> tuple[UnitArrays, dict[str, np.ndarray]]:
    """A unit's arrays and what they decode to."""
    content = (np.arange(32 * len(keys)).reshape(-1, 32) * 7 + number).astype(np.uint8)
    pairs = sorted({(sample, text, view, each) for sample, text, view, each, *_ in records_of(
        spec.model_copy(update={"layers": (0,)}), keys) if not (each and "partners" in spec.groups)})  # fmt: skip
    logits = np.array([[np.sin(row + 3 * column + number) * 4 for column in range(3)] for row in range(len(pairs))])
    columns = np.array(pairs).T
    expected = {"keys": np.array(keys), "content": content}
    arrays = {"keys": list(keys), "content": content, "maps": None, "t2i": None, "i2t": None, "logits": None}
    arrays |= {f"prediction_{name}": columns[place] for place, name in enumerate(("sample", "text", "view", "pass"))}
    if spec.classes is not None:
        arrays["logits"] = logits.astype(np.float32)
        expected |= {"predictions": columns.T, "logits": logits.astype(np.float32)}
    if spec.layers:
        records = np.array(records_of(spec, keys))
        sample, text, view, passes, image, layer = records.T
        words = (3 + (sample + 2 * text) % 3).astype(np.int64)
        grid = np.array([GRIDS.get(keys[s], ((2, 2), (1, 3)))[i] for s, i in zip(sample, image, strict=True)])
        ids = np.array([[101 + (s + p + t) % 50 if p < n else 0 for p in range(max(words))]
                        for s, t, n in zip(sample, text, words, strict=True)])  # fmt: skip
        patches = grid.prod(-1) + 1
        arrays["maps"] = MapColumns(sample, text, image, view, passes, layer, words, ids, grid)
        padded = spec.queries == "all"
        rows = {"t2i": [HIGHEST] * len(words) if padded else words.tolist(), "i2t": (patches + padded).tolist()}
        count = {"t2i": patches.tolist(), "i2t": words.tolist()}
        count |= dict.fromkeys(("t2w", "i2w"), (words + patches).tolist())
        rows |= {"t2w": rows["t2i"], "i2w": rows["i2t"]}
        further = ("t2w", "i2w") if "whole" in spec.groups else ()
        for salt, direction in enumerate((*spec.directions, *further)):
            make = direction_of if spec.steps is None else whole_direction_of
            stored, dense = make(spec, rows[direction], count[direction], max(rows[direction]), 17 * salt)
            signed = {name: part.view(np.int16) if part.dtype == np.uint16 else part for name, part in stored.items()}
            into = arrays.setdefault("whole", {}) if direction in further else arrays
            into[direction] = from_numpy(signed, spec.steps)
            expected[direction] = dense.astype(np.float32)
        expected |= {"maps": records, "text_tokens": words, "token_ids": ids, "grid": grid}
    if "partners" in spec.groups:
        arrays["further"] = partners_of(spec, keys, content)
    if "hidden" in spec.groups:
        arrays["further"] = states_of(spec.groups["hidden"]["width"], {"text": words, "image": patches})
    expected |= {name.replace("/", "_"): values for name, values in arrays.get("further", {}).items()}
    if number == 1 and "hologram" in spec.groups:
        arrays["further"] = {"hologram/depth": np.arange(6, dtype=np.float32)}
    return UnitArrays(**arrays), expected


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        spec = SPECS[name]
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as assets:
            (Path(assets) / "labels.json").write_text(json.dumps(["no", "yes", "red"] if spec.classes else None))
            shape = {
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "patch_size": 16,
                "max_position_embeddings": HIGHEST,
            }
            (Path(assets) / "config.json").write_text(json.dumps({"model_type": "vilt"} | shape))
            writer = CacheWriter(FOLDER / name, spec, Path(assets))
        provenance = Provenance(versions={"golden": "1"}, device="paper", batch_size=1, teacher="none", shards="golden")
        expected = {}
        for number, keys in enumerate(UNITS[name]):
            arrays, decoded = unit_of(spec, keys, number)
            held = {"samples": True} | ({"maps": True} if spec.layers else {})
            held |= {"predictions": True} if spec.classes else {}
            held |= {"hologram": False} if "hologram/depth" in arrays.further else {}
            held |= {group: False for group in ("whole", "hidden", "partners") if group in spec.groups}
            fields = {
                "format_version": FORMAT_VERSION,
                "spec": spec,
                "fingerprint": spec.fingerprint,
                "assets": dict(writer.assets),
                "source": f"{number:06d}.tar",
                "samples": len(keys),
                "pairs": sum(1 + sample % 2 for sample in range(len(keys))),
                "keys": hash_keys(keys),
                "groups": {group: Group(required=required) for group, required in held.items()},
                "provenance": provenance,
            }
            attributes = UnitAttributes(**fields)
            write_unit(writer.unit_path(f"{number:06d}.zarr.zip"), arrays, attributes)
            expected |= {f"{number}.{part}": values for part, values in decoded.items()}
        close_with_card(writer, provenance)
        np.savez_compressed(FOLDER / f"expected-{name}.npz", **expected)


if __name__ == "__main__":
    main(sys.argv[1:])
