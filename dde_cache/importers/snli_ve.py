"""The `snli-ve` source: SNLI-VE (Xie, Lai, Doran and Kadav, 2019) as published: snli_ve_train.jsonl and so on, on the
pictures of Flickr30k.

A sample is a picture with all its hypotheses (`sentence2`), labelled contradiction, entailment or neutral.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dde_cache.importers.common import Source
from dde_cache.importers.official import Groups, check_split, digests, examples, open_pictures
from dde_cache.tasks.entailment import ANSWERS


def snli_ve_source(split: str | None, path: Path, images: Path) -> Source:
    """Make the `snli-ve` source of an import; `split` is the file's name where it is None.

    Raises:
        InputError: the file or the pictures cannot be read.
    """
    split = split or path.stem
    check_split(split)
    groups = Groups(lambda image: f"snli-ve-{split}-{image}")
    for name, where, example in examples(groups, path):
        image = str(example.get("Flickr30K_ID", ""))
        if not image.isdigit():
            groups.fail(name, where, f"expected a Flickr30K_ID, got {image!r}")
            continue
        label = example.get("gold_label")
        if label not in ANSWERS:
            groups.fail(image, where, f"expected {', '.join(ANSWERS)}, got {label!r}", "unknown label")
            continue
        groups.add(image, where, lambda example=example: _fields(example))  # type: ignore[misc]
    found = groups.found(lambda image: [f"{image}.jpg"], open_pictures(images))
    return Source("snli-ve", split, digests(examples=path), len(groups), found)


def _fields(example: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = {"pairID": example["pairID"]} if "pairID" in example else {}
    return {"text": example["sentence2"], "label": example["gold_label"], "meta": meta}
