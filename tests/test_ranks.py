"""Parts of a batch, in turn or on several ranks, give what one whole batch gives."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import randomise, vilt_config
from hypothesis import given
from hypothesis import strategies as st
from pipeline import LABELS, Child, cli, make_cache, make_samples, make_shards, wait_for, whole_batch
from safetensors.torch import load_file

from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.errors import RunError
from dde_cache.fit import Fit
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets
from dde_cache.stream import BatchOrder, PairTable, Share, Shuffle
from dde_cache.student import new_student
from dde_cache.targets import CacheTargets
from dde_cache.terms import Objective, Term
from dde_cache.train import train

LAYER = 2
COMMAND = Path(sys.executable).with_name("dde-cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    samples = make_samples(17)
    # Two samples have no labels: rows of the parts differ in number.
    for number in (3, 9):
        texts = tuple(text.model_copy(update={"label": None}) for text in samples[number].texts)
        samples[number] = type(samples[number])(samples[number].key, samples[number].images, texts)
    return make_shards(tmp_path_factory.mktemp("shards") / "train", samples, size=6)


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    return make_cache(shards, teacher_folder, folder, queries="all", k=None, weights="float32")


# --- the terms


def student(seed=5):
    return randomise(new_student(vilt_config(hidden_dropout_prob=0.0), LABELS), seed=seed).eval()


def global_loss(objective, model, parts):
    """What a step does: rows of all parts first, then each part's gradient."""
    model.zero_grad()
    sizes = objective.sizes(parts)
    rows = objective.rows(parts, sizes)
    total = {}
    for part in parts:
        losses = objective.means(objective.sums(model, part, sizes), rows)
        losses["loss"].backward()
        total = {name: total.get(name, 0.0) + value.detach() for name, value in losses.items()}
    return total, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("queries", ["valid", "all"])
@pytest.mark.parametrize("source", ["cache", "teacher", "labels"])
def test_four_parts_are_one_batch(shards, cache, teacher, source, queries):
    """32 pairs at once and 4 x 8: pictures of four sizes, texts of several lengths, and some without a label."""
    every = queries == "all"
    config = TrainConfig(queries=queries, hard_weight=0.5)
    targets = {
        "cache": CachedTargets(cache),
        "teacher": OnlineTargets(teacher, LAYER),
        "labels": LabelsOnly(teacher.preprocessor, teacher.config, LABELS),
    }[source]
    reader = CacheTargets(cache, shards, LAYER, padded_queries=every) if source == "cache" else None

    def batch(numbers):
        return whole_batch(shards, teacher.preprocessor, LABELS, reader, every, numbers)

    # By size, so that some parts lack the largest pictures, whose tokens all are padded to.
    tokens = whole_batch(shards, teacher.preprocessor, LABELS)["grid0"].prod(-1)
    numbers = tokens[:32].argsort(stable=True).tolist()
    parts = [batch(numbers[first : first + 8]) for first in range(0, 32, 8)]
    objective, model = StudentLosses(config, targets, False), student()
    whole, gradient = global_loss(objective, model, [batch(numbers)])
    cut, added = global_loss(objective, model, parts)
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-6, atol=1e-6)
    assert gradient.keys() == added.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(added[name], value, rtol=1e-5, atol=1e-6)


def test_parts_of_different_length_are_padded_alike(shards, cache, teacher):
    """The published mean counts as many image rows for each sample as the batch's largest picture has tokens."""
    batches = [whole_batch(shards, teacher.preprocessor, LABELS, None, True, [number]) for number in range(32)]
    small, large = (min if end else max for end in (True, False))
    tokens = [int(batch["grid0"].prod()) + 1 for batch in batches]
    parts = [batches[tokens.index(small(tokens))], batches[tokens.index(large(tokens))]]
    objective = StudentLosses(TrainConfig(queries="all"), CachedTargets(cache), False)
    sizes = objective.sizes(parts)
    assert objective.rows(parts, sizes)["i2t"] == 2 * max(tokens)
    assert objective.rows(parts[:1], sizes)["i2t"] == max(tokens) > min(tokens)


def test_a_mean_of_no_rows_is_zero():
    objective = Objective(
        lambda model, batch, sizes: None, {"hard": Term(2.0, lambda *_: 0, lambda *_: torch.zeros(()))}
    )
    assert {name: float(value) for name, value in objective(torch.nn.Identity(), {}).items()} == {"loss": 0, "hard": 0}


# --- who reads what


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10))
def test_ranks_read_the_batches_of_one_process(sizes, ranks, accumulate, first):
    table = PairTable([[(f"{shard}-{number}", 0) for number in range(size)] for shard, size in enumerate(sizes)])
    batch_size = min(13, len(table))
    whole = list(BatchOrder(table, Shuffle(0), batch_size, first, first + 5))
    orders = [
        list(BatchOrder(table, Shuffle(0), batch_size, first, first + 5, Share(rank, ranks, accumulate)))
        for rank in range(ranks)
    ]
    assert {len(order) for order in orders} == {5 * accumulate}
    for step, batch in enumerate(whole):
        parts = [part for order in orders for part in order[step * accumulate : (step + 1) * accumulate]]
        assert [number for part in parts for number in part] == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_fewer_pairs_than_parts(tmp_path):
    config = TrainConfig(batch_size=4, accumulate=5)
    objective = Objective(lambda model, batch, sizes: None, {})
    with pytest.raises(RunError, match="1 ranks x accumulate 5, got batch_size 4; raise it, or lower accumulate"):
        Fit(torch.nn.Linear(1, 1), objective, config, tmp_path, save_best=lambda model: None)


# --- whole runs


SETTINGS = {
    "steps": 6, "batch_size": 8, "workers": 0, "log_every": 1, "save_every": 100, "valid_every": 3,
    "hard_weight": 0.5, "queries": "all", "learning_rate": 1e-3, "eps": 1e-3,
}  # fmt: skip
"""A large eps: Adam would else make steps of full size from the last bits of gradients that are 0 in exact numbers, as
those of key biases are."""


def metrics(out):
    """Lines without what is timed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def weights(out):
    return load_file(next((out / "checkpoints").iterdir()) / "model.safetensors")


def assert_same_run(one, other, tolerance=1e-6):
    first, second = metrics(one), metrics(other)
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), a["step"]
    expected = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def whole(shards, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(shards, CachedTargets(cache), out, TrainConfig(**SETTINGS), valid=shards)
    return out


def test_a_run_in_micro_batches_is_the_whole_run(shards, cache, whole, tmp_path):
    config = TrainConfig(**SETTINGS | {"accumulate": 3, "workers": 1})
    train(shards, CachedTargets(cache), tmp_path / "run", config, valid=shards)
    assert_same_run(tmp_path / "run", whole)


def arguments(shards, cache, out, **changes):
    settings = [part for name, value in (SETTINGS | changes).items() for part in ("--set", f"{name}={value}")]
    folder = shards[0].path.parent
    return ["train", folder, "--targets", cache.folder, "--valid", folder, "--out", out, *settings]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """The command line on several ranks: processes of their own, with the variables that `torchrun` sets."""

    def __init__(self, count, folder, *command, before=lambda rank: None):
        port = free_port()
        places = [self._place(count, rank, port, before) for rank in range(count)]
        self.ranks = [Child(*command, folder=folder, before=place) for place in places]

    @staticmethod
    def _place(count, rank, port, before):
        def place():
            before(rank)
            # The forked process must not believe what its parent found out about itself.
            AcceleratorState._reset_state(reset_partial_state=True)
            local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            given = local | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            os.environ |= {name: str(value) for name, value in given.items()}

        return place

    def wait(self):
        return [rank.wait(120) for rank in self.ranks]

    @property
    def printed(self):
        return [rank.printed for rank in self.ranks]


def on_two_ranks(folder, *command):
    run = Ranks(2, folder, *command)
    assert run.wait() == [0, 0], "\n".join(run.printed)
    return run.printed


def test_two_ranks_are_one(shards, cache, whole, tmp_path):
    """Losses to 1e-6, the same weights; the first rank alone writes and speaks."""
    out = tmp_path / "run"
    first, second = on_two_ranks(tmp_path, *arguments(shards, cache, out, workers=1))
    assert_same_run(out, whole)
    assert "saved in" in first
    assert second == ""
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    best = [json.loads((place / "run.json").read_text())["best_step"] for place in (out, whole)]
    assert best[0] == best[1]


def test_two_ranks_drop_what_two_micro_batches_drop(shards, cache, tmp_path):
    """Dropout is seeded by the part's number, whoever computes it."""
    changes = {"dropout": 0.2, "steps": 3}
    on_two_ranks(tmp_path, *arguments(shards, cache, tmp_path / "two", **changes))
    one = cli(*arguments(shards, cache, tmp_path / "one", accumulate=2, **changes))
    assert one.code == 0, one.err
    assert_same_run(tmp_path / "two", tmp_path / "one")
    other = cli(*arguments(shards, cache, tmp_path / "other", **changes))
    assert other.code == 0, other.err
    assert metrics(tmp_path / "other")[0]["loss"] != pytest.approx(metrics(tmp_path / "one")[0]["loss"], rel=1e-4)


def test_retrieval_contrasts_the_pairs_of_all_ranks(shards, cache, tmp_path):
    """Ranks of 7 and 8 pairs, each with the other's as candidates, in both directions."""
    changes = {"task": "retrieval", "soft_weight": 0, "hard_weight": 1, "batch_size": 15, "steps": 3}
    on_two_ranks(tmp_path, *arguments(shards, cache, tmp_path / "two", **changes))
    one = cli(*arguments(shards, cache, tmp_path / "one", **changes))
    assert one.code == 0, one.err
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_every_choice_on_two_ranks(shards, teacher_folder, tmp_path):
    """Whole rows, several layers, hidden states with their projections: what each rank has is one part of a sum."""
    cache = make_cache(
        shards, teacher_folder, tmp_path / "cache", queries="all", layers=(0, 2), targets=("cross", "whole", "hidden")
    )
    chosen = {"attention": "whole", "layer_map": "0:1,2:2", "hidden_weight": 0.5, "temperature": 2.0, "heads": "mean"}
    command = arguments(shards, cache, tmp_path / "two", **chosen)
    on_two_ranks(tmp_path, *command)
    one = cli(*arguments(shards, cache, tmp_path / "one", **chosen))
    assert one.code == 0, one.err
    assert "hidden@0:1" in metrics(tmp_path / "one")[0]
    assert_same_run(tmp_path / "two", tmp_path / "one", tolerance=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_on_two_ranks_resumed_on_one(shards, cache, tmp_path, number):
    """A signal to one rank (the one that does not write) stops both after the same step, with a checkpoint."""
    changes = {"steps": 60, "valid_every": 100, "workers": 1}
    out = tmp_path / "run"
    run = Ranks(2, tmp_path, *arguments(shards, cache, out, **changes))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 3)
    run.ranks[1].send(number)  # to its workers too, as launchers do
    assert run.wait() == [130, 130], "\n".join(run.printed)
    assert all("stopped." in text and "Traceback" not in text for text in run.printed)
    done = metrics(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"{done:08d}"]
    assert done < 60
    resumed = cli(*arguments(shards, cache, out, **changes), "--resume")
    assert resumed.code == 0, resumed.err
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, 61))


def test_begun_on_one_rank_resumed_on_two(shards, cache, whole, tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, _record):
        if step == 3:
            raise Stopped

    from dde_cache.fit import Progress

    out = tmp_path / "run"
    config = TrainConfig(**SETTINGS | {"save_every": 2})
    with pytest.raises(Stopped):
        train(shards, CachedTargets(cache), out, config, valid=shards, progress=Progress(step=stop))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000002"]
    inputs = json.loads((out / "inputs.json").read_text())
    command = arguments(shards, cache, out, save_every=2)
    on_two_ranks(tmp_path, *command, "--resume")
    assert json.loads((out / "inputs.json").read_text()) == inputs
    assert_same_run(out, whole)


def test_what_the_first_rank_refuses_stops_all(shards, cache, whole, tmp_path):
    run = Ranks(2, tmp_path, *arguments(shards, cache, whole))
    assert run.wait() == [1, 1]
    first, second = (" ".join(text.split()) for text in run.printed)
    assert "holds a run; choose another --out, or pass --resume" in first
    assert "the first rank could not go on; its own message says why" in second
    assert "Traceback" not in first + second


def test_a_rank_that_dies_stops_the_other(shards, cache, tmp_path):
    out = tmp_path / "run"
    run = Ranks(2, tmp_path, *arguments(shards, cache, out, steps=5000, valid_every=5000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 2)
    run.ranks[1].send(signal.SIGKILL)
    assert run.wait() == [1, -signal.SIGKILL]
    assert "expected an answer of every rank, but one has stopped" in " ".join(run.printed[0].split())
    assert "Traceback" not in run.printed[0]


def test_torchrun(shards, cache, whole, tmp_path):
    """The launcher itself, as the README says it."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, COMMAND, *arguments(shards, cache, out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole)
