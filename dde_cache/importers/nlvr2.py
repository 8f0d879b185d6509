"""The `nlvr2` source: NLVR2 (Suhr et al., ACL 2019) as published: train.json, dev.json, test1.json, one object
a line.

An identifier is split-set-pair-sentence; the pictures of its pair are `split-set-pair-img0.png` and `-img1.png`. A
sample is a pair of pictures with all its sentences, labelled `True` or `False`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dde_cache.importers.common import Source
from dde_cache.importers.official import Groups, check_split, digests, examples, open_pictures


def nlvr2_source(split: str | None, path: Path, images: Path) -> Source:
    """Make the `nlvr2` source of an import; `split` is the file's name where it is None.

    Raises:
        InputError: the file or the pictures cannot be read.
    """
    split = split or path.stem
    check_split(split)
    groups = Groups(lambda pair: f"nlvr2-{pair}")
    for name, where, example in examples(groups, path, f"{split}-"):
        identifier = example.get("identifier")
        parts = identifier.split("-") if isinstance(identifier, str) else []
        if len(parts) != 4 or not all(parts):
            groups.fail(name, where, f"expected an identifier split-set-pair-sentence, got {identifier!r}")
            continue
        groups.add("-".join(parts[:3]), where, lambda example=example: _fields(example))  # type: ignore[misc]
    found = groups.found(lambda pair: [f"{pair}-img0.png", f"{pair}-img1.png"], open_pictures(images))
    return Source("nlvr2", split, digests(examples=path), len(groups), found)


def _fields(example: Mapping[str, Any]) -> Mapping[str, Any]:
    label = example.get("label")
    if label not in ("True", "False", None):
        raise ValueError(f"label: expected True or False, got {label!r}")
    return {"text": example["sentence"], "label": label, "meta": {"identifier": example["identifier"]}}
