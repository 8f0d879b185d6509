"""The `karpathy` source: captions and splits of Karpathy and Fei-Fei (CVPR 2015): dataset_flickr30k.json and
dataset_coco.json, on the pictures of Flickr30k and COCO.

A sample is a picture with all its captions (five, in a few cases more), without labels: for retrieval.
"""

from pathlib import Path
from typing import Any

from dde_cache.errors import InputError
from dde_cache.importers.common import Source
from dde_cache.importers.official import Groups, check_split, digests, open_pictures, read_object


def karpathy_source(split: str, path: Path, images: Path) -> Source:
    """Make the `karpathy` source of an import.

    Args:
        split: train, val, test or restval, or several of them: `train+restval`, as COCO is mostly trained on.
        path: the file of captions.
        images: the pictures, a folder or a tar.

    Raises:
        InputError: a file is not as published, or has no such split.
    """
    check_split(split)
    content = read_object(path, "--from", "images")
    name = content.get("dataset", path.stem)
    wanted = split.split("+")
    held = sorted({str(one.get("split")) for one in content["images"] if isinstance(one, dict)})
    unknown = [one for one in wanted if one not in held]
    if unknown:
        raise InputError(f"--from {path}: expected --split of {', '.join(held)}, got {', '.join(unknown)}")
    groups = Groups(lambda key: f"{name}-{key}")
    files: dict[str, str] = {}
    for number, one in enumerate(content["images"]):
        where = f"{path.name} image {number}"
        if not isinstance(one, dict) or "imgid" not in one or not isinstance(one.get("filename"), str):
            groups.fail(f"image-{number}", where, "expected an object with imgid and filename")
            continue
        if one.get("split") not in wanted:
            continue
        key = f"{one['split']}-{one['imgid']}"
        files[key] = "/".join(part for part in (one.get("filepath"), one["filename"]) if part)
        _add_captions(groups, key, where, one.get("sentences"))
    found = groups.found(lambda key: [files[key]], open_pictures(images))
    return Source("karpathy", split, digests(captions=path), len(groups), found)


def _add_captions(groups: Groups, key: str, where: str, sentences: Any) -> None:
    if not isinstance(sentences, list) or not sentences:
        groups.fail(key, where, "expected sentences")
        return
    for sentence in sentences:
        groups.add(
            key,
            where,
            lambda sentence=sentence: {  # type: ignore[misc]
                "text": sentence["raw"].strip(),
                "meta": {"sentid": sentence["sentid"]} if "sentid" in sentence else {},
            },
        )
