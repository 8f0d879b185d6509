"""What the benchmarks share: arguments, the machine in words, ratios of two times of one run, and synthetic inputs.

Every benchmark times two ways of doing the same work by turns in one process, so that a noisy neighbour slows both, and
prints the median of the ratios of the rounds.
"""

import argparse
import io
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessorPil, ViltProcessor
from transformers.utils import logging

from dde_cache.samples import EncodedImage, Sample, Shard, Text, open_shards
from dde_cache.write_shards import write_shards

Size = Literal["small", "full"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a random teacher and of its pictures."""

    hidden_size: int
    layers: int
    heads: int
    side: int
    patch: int
    vocabulary: int
    classes: int

    @property
    def image_tokens(self) -> int:
        """Patches and CLS."""
        return (self.side // self.patch) ** 2 + 1


VILT_B32 = TeacherShape(hidden_size=768, layers=12, heads=12, side=384, patch=32, vocabulary=30522, classes=3129)
"""ViLT-B/32 with the answers of VQAv2."""

TINY = TeacherShape(hidden_size=48, layers=2, heads=4, side=96, patch=32, vocabulary=200, classes=5)
"""For smoke tests: seconds."""

TEXT_LENGTH = 40

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: a smoke test of seconds")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time of this process, for a machine that is shared"
    )
    parser.add_argument("--repeats", type=int, help="rounds; each times every way once")
    return parser


def machine() -> str:
    """Processor, cores, threads and versions, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "zarr", "numcodecs", "numpy"))
    threads = torch.get_num_threads()
    return f"{_processor()}, {cores} cores, {threads} torch threads; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes."""
    start = clock()
    run()
    return clock() - start


def by_turns(ways: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Measure each way once a round; every other round runs them backwards. Warm-up rounds are not kept.

    Args:
        ways: functions that measure themselves, by name.
        rounds: how many are kept.
        warm_up: how many come before.
    """
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            value = ways[name]()
            if number >= 0:
                measured[name].append(value)
    return measured


def print_ratio(
    name: str, over: Sequence[float], under: Sequence[float], *, reach: str = "report", limit: str = ""
) -> float:
    """Print the median of the ratios of each round, with their spread, the reach and the limit; return the median."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    middle = statistics.median(ratios)
    spread = f"median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else "one run"
    print(f"RATIO {name}: {middle:.3f} ({spread}); reach: {reach}")
    if limit:
        print(f"  limit: {limit}")
    return middle


def print_machine() -> None:
    """Print the last line of a benchmark."""
    print(f"  machine: {machine()}")


def text_lengths(count: int, random: np.random.Generator) -> np.ndarray:
    """Token counts of questions, [CLS] and [SEP] included: 12 on average, as in VQAv2, at most `TEXT_LENGTH`."""
    return np.minimum(6 + random.poisson(6, count), TEXT_LENGTH)


def save_teacher(folder: Path, shape: TeacherShape, seed: int = 0) -> None:
    """Save a ViLT with random weights, with ViLT's own processor settings and a tokenizer of made-up words."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    answers = {number: f"answer{number}" for number in range(shape.classes)}
    config = ViltConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden_size,
        image_size=shape.side,
        patch_size=shape.patch,
        max_position_embeddings=TEXT_LENGTH,
        id2label=answers,
        label2id={answer: number for number, answer in answers.items()},
    )
    ViltForQuestionAnswering(config).save_pretrained(folder)
    words = (*SPECIAL_TOKENS, *(f"w{number}" for number in range(shape.vocabulary - len(SPECIAL_TOKENS))))
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=TEXT_LENGTH)
    images = ViltImageProcessorPil(
        size={"shortest_edge": shape.side}, size_divisor=shape.patch, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    ViltProcessor(images, tokenizer).save_pretrained(folder)


def pictures_with_questions(folder: Path, shape: TeacherShape, pairs: int, shards: int = 1) -> list[Shard]:
    """Write shards of JPEG pictures (smooth colours with grain), each with one question of made-up words."""
    random = np.random.default_rng(0)
    samples = itertools.islice(_samples(shape, random), pairs)
    write_shards(samples, folder, source="benchmark", split="train", shard_size=-(-pairs // shards), arguments={})
    return open_shards(folder)


def _samples(shape: TeacherShape, random: np.random.Generator) -> Iterator[Sample]:
    for number in itertools.count():
        length = int(text_lengths(1, random)[0]) - 2
        words = random.integers(0, shape.vocabulary - len(SPECIAL_TOKENS), length)
        text = Text(text=" ".join(f"w{word}" for word in words), label=f"answer{random.integers(shape.classes)}")
        yield Sample(f"{number:06d}", (EncodedImage(picture(shape.side, shape.side, random), "jpg"),), (text,))


def picture(width: int, height: int, random: np.random.Generator) -> bytes:
    """A JPEG of smooth colours with grain."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = random.normal(0, 8, (height, width, 1))
    pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
