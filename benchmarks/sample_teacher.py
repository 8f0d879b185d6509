"""Make the sample teacher again, by the very commands, and score it beside models that should do worse.

In this process it runs `dde-cache data import shapes`, `dde-cache teacher train` with sample_teacher.yaml beside this
file, and `dde-cache eval` on the test split: the teacher; a question-only model (the most frequent answer to that very
question in the training data); and a plain dual encoder of the teacher's size, trained on labels alone for the same
steps, batch and rate. About an hour for the teacher and another for the dual encoder on two cores; not in CI.

Limit: 1, every answer right. The floor of a question-only model is one half: `shapes` balances its answers.

    python benchmarks/sample_teacher.py --out OUT
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from common import arguments, print_machine, print_ratio
from dde_cache.cli.app import main as command

CONFIG = Path(__file__).with_name("sample_teacher.yaml")
FIT = ("steps", "batch_size", "learning_rate", "warmup", "precision")
SHARED = (*FIT, "valid_every", "save_every", "log_every", "workers")
PICTURES = {"train": 40_000, "valid": 500, "test": 1_000}
SMALL = {"steps": 4, "batch_size": 8, "valid_every": 4, "save_every": 4}


def dde_cache(*arguments: object) -> str:
    """Run a command, show it, and return what it printed."""
    words = [str(argument) for argument in arguments]
    print("dde-cache " + " ".join(words), flush=True)
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["dde-cache", *words]), contextlib.redirect_stdout(printed):
        try:
            command()
        except SystemExit as stop:
            if stop.code:
                raise
    return printed.getvalue()


def score(subject: Path, test: Path, train: Path) -> dict[str, Any]:
    """Evaluate on the test split."""
    return json.loads(dde_cache("eval", subject, test, "--baseline", train, "--json"))


def settings(values: dict[str, Any]) -> list[str]:
    """Settings as options."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def make(out: Path, full: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run everything; return the reports of the teacher and of the dual encoder."""
    for split, pictures in PICTURES.items():
        count = pictures if full else 40
        dde_cache("data", "import", "shapes", "--split", split, "--count", count, "--out", out / split)
    changed = {} if full else SMALL
    train, valid, teacher, plain = out / "train", out / "valid", out / "teacher", out / "dual-encoder"
    dde_cache("teacher", "train", train, "--valid", valid, "--config", CONFIG, "--out", teacher, *settings(changed))
    same = {name: value for name, value in yaml.safe_load(CONFIG.read_text()).items() if name in SHARED} | changed
    same |= {"hard_weight": 1, "soft_weight": 0, "attention_weight": 0}
    dde_cache(
        "train", train, "--targets", "none", "--like", teacher, "--valid", valid, "--out", plain, *settings(same)
    )  # fmt: skip
    return score(teacher, out / "test", train), score(plain, out / "test", train)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder for data, teacher and dual encoder; without it, a temporary one"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        teacher, plain = make(given.out or Path(name), given.size == "full")
    rows = {"all": (teacher["overall"], plain["overall"])}
    rows |= {kind: (teacher["kinds"][kind], plain["kinds"][kind]) for kind in teacher["kinds"]}
    print("| kind | pairs | teacher | dual encoder, labels only | question only |")
    print("|---|---|---|---|---|")
    for kind, (first, second) in rows.items():
        guess = first["frequent_answer_to_question"]
        print(f"| {kind} | {first['pairs']} | {first['accuracy']:.4f} | {second['accuracy']:.4f} | {guess:.4f} |")
    print_ratio(
        "accuracy of teacher / plain dual encoder",
        [teacher["overall"]["accuracy"]],
        [plain["overall"]["accuracy"]],
        limit="an accuracy of 1 for both",
    )
    print_machine()


if __name__ == "__main__":
    main()
