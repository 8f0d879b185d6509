"""Samples -> WebDataset shards and their index. Only this module knows webdataset."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import webdataset

from dde_cache.samples import INDEX_NAME, Sample, SampleRecord, ShardEntry, ShardsIndex


def write_shards(
    samples: Iterator[Sample], folder: Path, *, source: str, split: str, shard_size: int, arguments: Mapping[str, Any]
) -> ShardsIndex:
    """Write samples into `folder` as `000000.tar`, ... of `shard_size` samples each, then `shards.json`.

    The tars carry no clock time and no user, so the same samples give the same bytes. The index is written last:
    a folder without one was cut short.

    Raises:
        OSError: the folder cannot be written or its disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    labels: set[str] = set()
    kinds: set[str] = set()
    for group in _groups(samples, shard_size):
        name = f"{len(entries):06d}.tar"
        partial = folder / (name + ".partial")
        counted = pairs = 0
        with _tar_writer(partial) as write:
            for sample in group:
                write(_members(sample))
                counted += 1
                pairs += len(sample.texts)
                labels.update(text.label for text in sample.texts if text.label is not None)
                kinds.update(text.kind for text in sample.texts if text.kind is not None)
        os.replace(partial, folder / name)
        entries.append(ShardEntry(name=name, samples=counted, pairs=pairs))
    made: dict[str, Any] = {"source": source, "split": split, "arguments": dict(arguments)}
    index = ShardsIndex(**made, labels=tuple(sorted(labels)), kinds=tuple(sorted(kinds)), shards=tuple(entries))
    write_index(folder, index)
    return index


def write_index(folder: Path, index: ShardsIndex) -> None:
    """Write `shards.json` of a folder of shards, whole or not at all.

    Raises:
        OSError: the folder cannot be written or its disk is full.
    """
    partial = folder / (INDEX_NAME + ".partial")
    partial.write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / INDEX_NAME)


def _groups(samples: Iterator[Sample], size: int) -> Iterator[Iterator[Sample]]:
    for first in samples:
        yield itertools.chain([first], itertools.islice(samples, size - 1))


@contextlib.contextmanager
def _tar_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    # An open file: webdataset runs some names as commands. PAX: USTAR ends names at 100 bytes. A float for mtime would
    # cost each member a PAX header.
    with (
        open(path, "wb") as file,
        webdataset.TarWriter(
            file, encoder=False, mtime=0, user="", group="", compress=False, format="PAX_FORMAT"
        ) as writer,
    ):
        yield writer.write


def _members(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {"__key__": sample.key}
    for slot, image in enumerate(sample.images):
        row[f"image{slot}.{image.format}"] = image.content
    record = SampleRecord(texts=sample.texts, meta=dict(sample.meta))
    row["json"] = record.model_dump_json(exclude_defaults=True).encode()
    return row
