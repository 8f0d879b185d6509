"""Recipe: one page on which a cache's attention can be looked at, with a student's beside it.

Of a cache with one direction the page has this direction, and says that there is no other.
"""

import base64
import html
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dde_cache.batches import PairDataset
from dde_cache.beside import fitted, load_beside, shown_layer
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.join import join
from dde_cache.pages import data_element, fill_page, json_text, read_part, template
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Shard, Text
from dde_cache.seen import LEVELS, SeenImage, SeenPair, SeenStudent, Seer
from dde_cache.spec import Model
from dde_cache.store import Cache, write_text
from dde_cache.stream import Pair, PairTable
from dde_cache.targets import CacheTargets
from dde_cache.teachers.contract import ROW_MAJOR
from dde_cache.tokens import TokenAligner, same_tokens
from dde_cache.views import parse_recipe

Order = Literal["keys", "divergence", "kept mass", "spread"]

BATCH = 32
KL_UNIT, KEPT_UNIT = 1e-3, 1e-4
"""Steps in which a page has them, in two bytes each."""

_ORDERS: Mapping[Order, str] = {
    "keys": "the pairs that were asked for",
    "divergence": "the pairs with the largest attention loss of the student first",
    "kept mass": "the pairs with the lowest mean kept mass first",
    "spread": "pairs spread evenly over the shards (every key is kept, so that none is worse than another)",
}


class ViewReport(Model):
    """What `dde-cache view` has written."""

    out: str
    order: Order = Field(description="how the pairs were chosen")
    pairs: int
    among: int = Field(description="pairs that were looked at to choose them")
    of: int = Field(description="pairs that shards and cache have in common")
    layer: int
    learnt: str | None = Field(
        default=None, description="what to know of the student: its block of a layer map, its direction, its checkpoint"
    )
    bytes: int


@dataclass(frozen=True)
class Choice:
    """Which pairs go on a page.

    Attributes:
        keys: every text of these samples, in this order; none: the worst pairs.
        count: how many of the worst.
        among: how many pairs, spread evenly, are looked at to find them; None: all.
        layer: of the cache; None: the one that the run learns from (of a layer map, the one that its last block
            learns from), or the last.
        view: number of the view.
    """

    keys: tuple[str, ...] = ()
    count: int = 24
    among: int | None = 2000
    layer: int | None = None
    view: int = 0


def view(
    cache: Cache,
    shards: Sequence[Shard],
    out: Path,
    choice: Choice,
    *,
    run: Path | None = None,
    device: str = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> ViewReport:
    """Write one page that needs nothing else.

    Args:
        cache: whose targets are shown.
        shards: the samples that they were made from.
        out: the HTML file; a file that is there is replaced.
        choice: which pairs.
        run: whose student is shown beside the teacher.
        device: where it runs.
        advance: called with the pairs that are done and their number.

    Raises:
        InputError: no such keys, view or layer, or the samples are not the cache's.
        CacheError: the cache has no maps, or none over patches; or it is damaged.
        RunError: the run has no model that can be read, or one whose heads cannot be compared with the teacher's.
    """
    _check(cache, choice)
    student = None if run is None else load_beside(run, device)
    layer = shown_layer(cache.spec, choice.layer, student)
    if student is not None:
        student = fitted(student, cache, layer)
    table = join(shards, cache, "skip").table
    order, numbers = _candidates(cache, table, choice, student is not None)
    views = cache.spec.views
    numbers = [number * views + choice.view for number in numbers]
    preprocessor = cache.preprocessor()
    tokens = None
    if student and same_tokens(preprocessor, student.preprocessor):
        preprocessor = student.preprocessor
    elif student:
        tokens = TokenAligner(preprocessor, student.preprocessor)
    reader = CacheTargets(cache, shards, layer.number, rows=cache.spec.directions)
    in_views, recipe = table.in_views(views), parse_recipe(cache.spec.view)
    dataset = PairDataset(shards, in_views, preprocessor, (), reader, recipe=recipe, tokens=tokens)
    own = None if student is None else SeenStudent(student.model, layer.block, student.maps, tokens is not None)
    seer = Seer(dataset, cache.spec, preprocessor, own)
    among = len(numbers)
    count = among if order == "keys" else min(choice.count, among)
    ranked = order in ("divergence", "kept mass")
    done = _Done(advance, count + among * ranked)
    scores: dict[int, float] = {}
    for some in _batches(numbers) if ranked else ():
        scores |= dict(zip(some, seer.scores(some), strict=True))
        done.add(len(some))
    shown, blocks = [], []
    for some in _batches(sorted(numbers, key=lambda number: -scores[number])[:count] if ranked else numbers[:count]):
        for pair in seer.pairs(some):
            place = in_views[pair.number]
            text = shards[place.shard].read(place.key).texts[place.text]
            answers = {
                "teacher": _answer(pair.teacher_logits, cache.labels),
                "student": _answer(pair.student_logits, student.labels if student else None),
            }
            about_pair = _described(pair, place, text, preprocessor)
            shown.append({**about_pair, **answers, "score": scores.get(pair.number)})
            names = [f"maps-{len(shown) - 1}-{slot}" for slot in range(len(pair.images))]
            blocks += [data_element(name, _packed(image)) for name, image in zip(names, pair.images, strict=True)]
        done.add(len(some))
    learnt = "; ".join(student.notes) or None if student else None
    about = {
        **{"cache": Path(cache.name).name, "run": None if run is None else run.name, "layer": layer.number},
        "directions": cache.spec.directions,
        **{"heads": seer.heads, "levels": LEVELS, "kl_unit": KL_UNIT, "kept_unit": KEPT_UNIT, "order": order},
        "chosen": f"{_ORDERS[order]}; {count:,} of {among:,} looked at, of {len(table):,}",
        "view": f"view {choice.view} of {views}" if views > 1 else "",
        "learnt": learnt or "",
    }
    write_text(out, _page(about, shown, blocks))
    size = out.stat().st_size
    seen = {"pairs": count, "among": among, "of": len(table), "layer": layer.number, "learnt": learnt}
    return ViewReport(out=str(out), order=order, **seen, bytes=size)


class _Done:
    """Counts what is done, and tells."""

    def __init__(self, advance: Callable[[int, int], None], total: int) -> None:
        self._advance, self._total, self._done = advance, total, 0

    def add(self, pairs: int) -> None:
        """So many more."""
        self._done += pairs
        self._advance(self._done, self._total)


def _check(cache: Cache, choice: Choice) -> None:
    spec = cache.spec
    if not spec.layers:
        raise CacheError(f"{cache.name}: expected attention maps to look at, but it has predictions alone")
    if str(spec.rule) != ROW_MAJOR:
        raise CacheError(
            f"{cache.name}: expected maps over a picture's patches, which a page draws as a grid ({ROW_MAJOR}), got "
            f"another image axis ({spec.rule})"
        )
    if choice.layer is not None and choice.layer not in spec.layers:
        raise InputError(f"expected --layer as one of the cache's {list(spec.layers)}, got {choice.layer}")
    if not 0 <= choice.view < spec.views:
        raise InputError(f"expected --view-number from 0 to {spec.views - 1}, got {choice.view}")


def _candidates(cache: Cache, table: PairTable, choice: Choice, student: bool) -> tuple[Order, list[int]]:
    """How pairs are chosen, and the numbers of those among which that is done."""
    if choice.keys:
        places: dict[str, list[int]] = {key: [] for key in choice.keys}
        for number in range(len(table)):
            places.get(table[number].key, []).append(number)
        missing = [key for key, found in places.items() if not found]
        if missing:
            raise InputError(
                f"expected keys of samples that both shards and {cache.name} have, found none for:"
                f"{bullet_list(missing)}"
            )
        return "keys", [number for found in places.values() for number in found]
    order: Order = "divergence" if student else "kept mass" if cache.spec.steps is None else "spread"
    wanted = choice.count if order == "spread" else choice.among
    size = len(table) if wanted is None else min(len(table), max(wanted, choice.count))
    return order, np.linspace(0, len(table) - 1, size).round().astype(int).tolist()


def _batches(numbers: Sequence[int]) -> Iterable[list[int]]:
    return (list(numbers[start : start + BATCH]) for start in range(0, len(numbers), BATCH))


def _described(pair: SeenPair, place: Pair, text: Text, preprocessor: Preprocessor) -> dict[str, Any]:
    """What a page says of a pair in words."""
    words, special = text_units(preprocessor, text.text)
    return {
        "key": place.key,
        "slot": place.text,
        "text": text.text,
        "label": text.label,
        "kind": text.kind,
        "words": words,
        "special": special,
        "images": [
            {
                "grid": image.grid,
                "sides": [side * preprocessor.patch_size for side in reversed(image.grid)],
                "picture": f"data:{image.media_type};base64,{base64.b64encode(image.picture).decode()}",
                "student": all(rows.student is not None for rows in image.rows.values()),
                "kept": all(rows.kept is not None for rows in image.rows.values()),
            }
            for image in pair.images
        ],
    }


def text_units(preprocessor: Preprocessor, text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tokens of a text as its reader sees them: words, each with its pieces, and special tokens.

    Words are those of the tokenizer itself, written as the text writes them, so a byte-level token has no marks.

    Returns:
        words: for each its `text`, its `pieces` and the numbers of their `tokens`.
        special: for each special token its `text` and its number in `tokens`.
    """
    tokenizer = preprocessor.processor.tokenizer
    encoded = tokenizer(text, truncation=True, max_length=preprocessor.text_length, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    words: dict[int, dict[str, Any]] = {}
    special = []
    for number, (name, word, (start, end)) in enumerate(
        zip(names, encoded.word_ids(), encoded["offset_mapping"], strict=True)
    ):
        if word is None:
            special.append({"text": name, "tokens": [number]})
            continue
        unit = words.setdefault(word, {"start": start, "pieces": [], "tokens": []})
        unit["text"] = text[unit["start"] : end]
        unit["pieces"].append(name if name == tokenizer.unk_token else text[start:end])
        unit["tokens"].append(number)
    return [{name: unit[name] for name in ("text", "pieces", "tokens")} for unit in words.values()], special


def _answer(logits: np.ndarray | None, labels: Sequence[str] | None) -> str | None:
    """The answer with the largest logit."""
    if logits is None or labels is None or len(labels) != len(logits):
        return None
    return labels[int(logits.argmax())]


def _packed(image: SeenImage) -> str:
    """The numbers of one picture as base64 of zlib: of each direction that the cache has, in the order of its
    specification, teacher and student, then KL and kept mass."""
    parts: list[bytes] = []
    for rows in image.rows.values():
        parts += [part.tobytes() for part in (rows.teacher, rows.student) if part is not None]
        parts += [_steps(part, unit) for part, unit in ((rows.kl, KL_UNIT), (rows.kept, KEPT_UNIT)) if part is not None]
    return base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()


def _steps(values: np.ndarray, unit: float) -> bytes:
    return (values / unit).round().clip(0, 65535).astype("<u2").tobytes()


def _page(about: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> str:
    content = json_text({"about": about, "pairs": pairs})
    parts = {
        "title": html.escape(f"Attention in {about['cache']}"),
        "data": data_element("page-data", content, "application/json") + "".join(blocks),
    }
    return fill_page(template("view"), parts, read_part("view.css"), read_part("view.js"))
