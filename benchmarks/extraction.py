"""Extraction against the bare forward pass of its teacher, and against a naive loop.

Measured: wall time of `extract` on shards of JPEG pictures and questions, from the first picture read to the finished
cache: reading and decoding, the processor, the teacher, the cross-modal blocks, top 8, encoding, hashing, writing. The
time to load the teacher is printed beside it. Every pair has a picture of its own, so no decoding is saved.

Limit: the stock Hugging Face model on the very same batches, already in memory, without attention outputs.

The naive loop does the same work as it is often written: stock model with `output_attentions=True`, the last block cut
to the two cross-modal blocks of the valid tokens and renormalised, one dense float16 npz a pair.

    python benchmarks/extraction.py
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    CLOCKS,
    TINY,
    VILT_B32,
    arguments,
    by_turns,
    pictures_with_questions,
    print_machine,
    print_ratio,
    save_teacher,
    timed,
)
from transformers import ViltForQuestionAnswering, ViltProcessor

from dde_cache.extract import ExtractConfig, ExtractProgress, ExtractSummary, extract
from dde_cache.samples import Sample, Shard

Inputs = dict[str, torch.Tensor]


def processed(processor: Any, samples: Sequence[Sample]) -> Inputs:
    """What the stock model reads."""
    pictures = [sample.images[0].decode() for sample in samples]
    texts = [sample.texts[0].text for sample in samples]
    return dict(processor(pictures, texts, padding=True, truncation=True, return_tensors="pt"))


def batches_of(shards: Sequence[Shard], size: int) -> list[list[Sample]]:
    """Samples by batch; batches end with their shard, as in an extraction."""
    batches = []
    for shard in shards:
        samples = list(shard)
        batches += [samples[start : start + size] for start in range(0, len(samples), size)]
    return batches


@torch.inference_mode()
def naive_loop(model: Any, processor: Any, batches: Sequence[Sequence[Sample]], out: Path) -> None:
    """Save dense maps of the last block, one file a pair."""
    out.mkdir()
    for samples in batches:
        inputs = processed(processor, samples)
        output = model(**inputs, output_attentions=True)
        length = inputs["input_ids"].shape[1]
        for row, sample in enumerate(samples):
            words = int(inputs["attention_mask"][row].sum())
            last = output.attentions[-1][row]
            t2i, i2t = last[:, :words, length:], last[:, length:, :words]
            np.savez(
                out / f"{sample.key}.npz",
                t2i=(t2i / t2i.sum(-1, keepdim=True)).half().numpy(),
                i2t=(i2t / i2t.sum(-1, keepdim=True)).half().numpy(),
                logits=output.logits[row].numpy(),
            )


@torch.inference_mode()
def forward(model: Any, batches: Sequence[Inputs]) -> None:
    """The bare forward pass."""
    for batch in batches:
        model(**batch)


class Extraction:
    """Runs an extraction into a fresh folder and keeps its summary."""

    def __init__(
        self, shards: Sequence[Shard], teacher: Path, folder: Path, config: ExtractConfig, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._shards, self._teacher, self._folder, self._config = shards, teacher, folder, config
        self.loading: list[float] = []
        self.summary: ExtractSummary | None = None

    def __call__(self) -> float:
        """Seconds from the first picture to the finished cache."""
        out = self._folder / "cache"
        shutil.rmtree(out, ignore_errors=True)
        began = self._clock()
        marks: list[float] = []
        progress = ExtractProgress(start=lambda *_: marks.append(self._clock()))
        self.summary = extract(self._shards, str(self._teacher), out, self._config, progress)
        self.loading.append(marks[0] - began)
        return self._clock() - marks[0]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    full = given.size == "full"
    clock = CLOCKS[given.clock]
    shape = VILT_B32 if full else TINY
    pairs = given.pairs or (64 if full else 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", shape)
        shards = pictures_with_questions(folder / "shards", shape, pairs)
        batches = batches_of(shards, given.batch_size)
        model = ViltForQuestionAnswering.from_pretrained(folder / "teacher").eval()
        processor = ViltProcessor.from_pretrained(folder / "teacher")
        inputs = [processed(processor, batch) for batch in batches]
        extraction = Extraction(shards, folder / "teacher", folder, ExtractConfig(batch_size=given.batch_size), clock)
        dense = folder / "dense"

        def naive() -> float:
            shutil.rmtree(dense, ignore_errors=True)
            return timed(lambda: naive_loop(model, processor, batches, dense), clock)

        forward(model, inputs[:1])
        ways: dict[str, Callable[[], float]] = {
            "bare": lambda: timed(lambda: forward(model, inputs), clock),
            "extraction": extraction,
            "naive": naive,
        }
        seconds = by_turns(ways, given.repeats or (4 if full else 1))
        dense_bytes = sum(path.stat().st_size for path in dense.iterdir())
    each = {way: statistics.median(values) / pairs for way, values in seconds.items()}
    summary = extraction.summary
    if summary is None:
        raise RuntimeError("expected the extraction to have run in at least one round, but no round ran it")
    print_ratio(
        "extraction / bare teacher forward",
        seconds["extraction"],
        seconds["bare"],
        reach="<= 1.10",
        limit=f"{each['bare'] * 1000:.1f} ms a pair: the stock model on the same batches, without attentions",
    )
    print_ratio(
        "naive loop / extraction, time",
        seconds["naive"],
        seconds["extraction"],
        limit="no more work than the bare forward",
    )
    print_ratio(
        "naive loop / extraction, bytes",
        [dense_bytes],
        [summary.bytes],
        limit=f"kept mass {summary.kept_mass:.3f} of a random teacher's near-uniform rows; size.py has a trained one",
    )
    print(
        f"  extraction {each['extraction'] * 1000:.1f} ms a pair, naive loop {each['naive'] * 1000:.1f} ms; {pairs} "
        f"pairs of {shape.side} px, width {shape.hidden_size}, {shape.layers} blocks, batches of {given.batch_size}, "
        f"{given.clock} time; "
        f"loading and hashing the teacher {statistics.median(extraction.loading):.1f} s more"
    )
    print_machine()


if __name__ == "__main__":
    main()
