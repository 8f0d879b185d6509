"""The paper's two stages, small: pre-training and fine-tuning, with and without distillation, on emoji and on NLVR.

For each data set a teacher is trained, its cache extracted, and students are trained from random weights in four ways
with three seeds. A run that has ended is not run again, so the command goes on where it was stopped.

    way                       pre-training                          fine-tuning
    fine-tuning alone         -                                     task
    + distilled               -                                     task + teacher
    pre-training              contrast, matching, masked words      task
    + distilled               the same + attention of three passes  task + teacher

Emoji: retrieval among 423 held-out pictures; families of emoji (skin tones, sexes, directions) lie in one split. The
teacher tells a picture's names from names of other pictures. NLVR: true or false; `hidden` trains (pre-training takes
its true sentences), `dev` chooses, `test` reports; the six pictures of an example lie in one split.

Prints Markdown tables: mean and deviation over the seeds, and the difference to the way without distillation, paired by
seed.

    python benchmarks/rerun.py --data FOLDER --out rerun
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import print_machine

from dde_cache.samples import Sample, Text, open_shards
from dde_cache.write_shards import write_shards

COMMAND = (sys.executable, "-c", "from dde_cache.cli.app import main; main()")

WAYS = ("fine-tuning alone", "+ distilled", "pre-training", "pre-training + distilled")
PAIRED = (("+ distilled", "fine-tuning alone"), ("pre-training + distilled", "pre-training"))

EMOJI = {
    "steps": 800, "batch_size": 96, "learning_rate": 6e-4, "warmup": 0.1, "hidden_size": 96, "layers": 3,
    "patch_size": 12, "image_size": 72, "text_length": 20,
}  # fmt: skip
NLVR = {
    "steps": 600, "batch_size": 64, "learning_rate": 6e-4, "warmup": 0.1, "hidden_size": 64, "layers": 2,
    "patch_size": 25, "image_size": 400, "text_length": 40,
}  # fmt: skip
STUDENT = {"batch_size": 64, "learning_rate": 6e-4, "warmup": 0.1}
STEPS = {"pretrain": 500, "finetune": 300, "valid_every": 100}


def settings(values: Mapping[str, Any]) -> list[str]:
    """As options of a command."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


class Rerun:
    """Commands of one data set, each run once.

    Args:
        folder: where everything of the data set lies.
        small: a smoke test of seconds.
    """

    def __init__(self, folder: Path, *, small: bool) -> None:
        self.folder, self._small = folder, small
        self.common: dict[str, Any] = {"workers": 0 if small else 1, "precision": "no" if small else "bf16"}

    def run(self, done: str, *arguments: object) -> None:
        """Run a command of ours, unless what it writes last is there."""
        if (self.folder / done).exists():
            return
        words = [str(one) for one in arguments]
        print("$ dde-cache", *words, flush=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        begin = time.perf_counter()
        subprocess.run([*COMMAND, *words], cwd=self.folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(f"  {time.perf_counter() - begin:.0f} s", flush=True)

    def load(self, source: str, split: str, where: Path, out: str) -> None:
        """Import a split."""
        self.run(f"{out}/shards.json", "data", "import", source, "--split", split, "--from", where, "--out", out)

    def teacher(self, data: str, values: Mapping[str, Any]) -> None:
        """Train the teacher."""
        shape = {**values, **self.common} | ({"steps": 4, "batch_size": 8} if self._small else {})
        resume = ["--resume"] if (self.folder / "teacher" / "training").exists() else []
        self.run(
            "teacher/README.md",
            *("teacher", "train", f"{data}/train", "--valid", f"{data}/valid", "--out", "teacher", *resume),
            *settings(shape),
        )

    def extract(self, shards: str, cache: str, *options: str) -> None:
        """Extract a cache."""
        self.run(f"{cache}/README.md", "extract", shards, "--teacher", "teacher", "--out", cache, *options)

    def train(self, run: str, shards: str, valid: str, seed: int, *options: object, steps: int) -> None:
        """Train a student."""
        given = STUDENT | self.common | {"valid_every": STEPS["valid_every"]}
        given |= {"steps": 3, "batch_size": 8} if self._small else {"steps": steps}
        resume = ["--resume"] if (self.folder / run / "config.yaml").exists() else []
        self.run(
            f"{run}/run.json",
            *("train", shards, "--valid", valid, "--out", run, "--seed", seed, *options, *resume),
            *settings(given),
        )

    def score(self, subject: str, shards: str, *options: str) -> dict[str, Any]:
        """What `eval` says of a run or a teacher."""
        kept = self.folder / subject / "score.json"
        if not kept.exists():
            words = [*COMMAND, "eval", subject, shards, "--json", *options]
            done = subprocess.run(words, cwd=self.folder, check=True, capture_output=True, text=True)
            kept.write_text(done.stdout)
        return json.loads(kept.read_text())


def matching(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Each caption as a `yes`, and for each a name of another family of the same group and of any as a `no`."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.meta["group"], []).append(sample)
    for sample in samples:
        draw = random.Random(sample.key)
        texts = []
        for text in sample.texts:
            texts.append(Text(text=text.text, label="yes", kind="own"))
            for kind, pool in (("same group", groups[sample.meta["group"]]), ("any", samples)):
                strangers = [one for one in pool if one.meta["family"] != sample.meta["family"]] or samples
                name = draw.choice(draw.choice(strangers).texts).text
                texts.append(Text(text=name, label="no", kind=kind))
        yield Sample(sample.key, sample.images, tuple(texts), sample.meta)


Found = tuple[list[str], dict[str, list[list[float]]]]
"""Names of the metrics; for each way, and each seed, their values."""


def emoji(out: Path, data: Path, seeds: Sequence[int], *, small: bool) -> Found:
    """Retrieval."""
    of = Rerun(out, small=small)
    for split in ("train", "valid", "test"):
        of.load("emoji", split, data, f"data/{split}")
        if not (out / "matching" / split / "shards.json").exists():
            samples = [sample for shard in open_shards(out / "data" / split) for sample in shard]
            write_shards(
                matching(samples), out / "matching" / split, source="emoji", split=split, shard_size=1000, arguments={}
            )
    of.teacher("matching", EMOJI)
    of.extract("data/train", "cache", "--passes", "matched,masked,negative")
    contrast = ("--targets", "cache", "--task", "retrieval", "--set", "attention_weight=0")
    taught = ("--targets", "cache", "--task", "retrieval")
    train_ways(of, Pretraining("data/train", "data/valid", "cache"), seeds, contrast, taught)
    names = ["t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10"]
    found = {
        way: [[of.score(f"{slug(way)}-{seed}", "data/test")["metrics"][name] for name in names] for seed in seeds]
        for way in WAYS
    }
    print("teacher, yes or no on the test split:", of.score("teacher", "matching/test")["overall"]["accuracy"])
    return names, found


def nlvr(out: Path, data: Path, seeds: Sequence[int], *, small: bool) -> Found:
    """True or false."""
    of = Rerun(out, small=small)
    for name, split in (("train", "hidden"), ("valid", "dev"), ("test", "test")):
        of.load("nlvr", split, data / f"{split}.tar", f"data/{name}")
    for name in ("train", "valid"):
        if not (out / "true" / name / "shards.json").exists():
            samples = (sample for shard in open_shards(out / "data" / name) for sample in shard)
            true = (sample for sample in samples if sample.texts[0].label == "true")
            write_shards(true, out / "true" / name, source="nlvr", split=name, shard_size=1000, arguments={})
    of.teacher("data", NLVR)
    of.extract("data/train", "cache")
    of.extract("true/train", "passes", "--passes", "matched,masked,negative")
    plain = ("--targets", "cache", "--set", "attention_weight=0", "--set", "soft_weight=0", "--set", "hard_weight=1")
    taught = ("--targets", "cache", "--set", "hard_weight=1")
    train_ways(of, Pretraining("true/train", "true/valid", "passes"), seeds, plain, taught)
    found = {
        way: [[of.score(f"{slug(way)}-{seed}", "data/test")["overall"]["accuracy"]] for seed in seeds] for way in WAYS
    }
    print("teacher on the test split:", of.score("teacher", "data/test")["overall"]["accuracy"])
    return ["accuracy"], found


class Pretraining(NamedTuple):
    """What students are pre-trained on."""

    shards: str
    valid: str
    cache: str


def train_ways(
    of: Rerun, before: Pretraining, seeds: Sequence[int], plain: Sequence[str], taught: Sequence[str]
) -> None:
    """Train the four ways."""
    for seed in seeds:
        for way, options in zip(WAYS[:2], (plain, taught), strict=True):
            of.train(f"{slug(way)}-{seed}", "data/train", "data/valid", seed, *options, steps=STEPS["finetune"])
        for way, options, weight in zip(WAYS[2:], (plain, taught), (0, 1), strict=True):
            run = f"{slug(way)}-{seed}"
            stage = ("--stage", "pretrain", "--targets", before.cache, "--set", f"attention_weight={weight}")
            of.train(f"{run}-before", before.shards, before.valid, seed, *stage, steps=STEPS["pretrain"])
            options = (*options, "--init", f"{run}-before")
            of.train(run, "data/train", "data/valid", seed, *options, steps=STEPS["finetune"])


def slug(way: str) -> str:
    """A way as the name of a folder."""
    return "-".join(way.replace("+", "").split())


def table(names: Sequence[str], found: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for way, seeds in found.items():
        yield f"| {way} | " + " | ".join(spread(column) for column in zip(*seeds, strict=True)) + " |"
    for way, without in PAIRED:
        gains = [[a - b for a, b in zip(*both, strict=True)] for both in zip(found[way], found[without], strict=True)]
        cells = " | ".join(spread(column, sign="+") for column in zip(*gains, strict=True))
        yield f"| gain of distillation, {without} | {cells} |"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.3f} ± {deviation:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with noto_emoji/ and nlvr/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=("emoji", "nlvr"), default=("emoji", "nlvr"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: a smoke test")
    given = parser.parse_args()
    run = {"emoji": (emoji, "noto_emoji"), "nlvr": (nlvr, "nlvr")}
    for name in given.sets:
        rerun, source = run[name]
        out = (given.out / name).resolve()
        out.mkdir(parents=True, exist_ok=True)
        names, found = rerun(out, (given.data / source).resolve(), range(given.seeds), small=given.size == "small")
        print(f"## {name}", *table(names, found), sep="\n")
    print_machine()


if __name__ == "__main__":
    main()
