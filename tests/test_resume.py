"""kill -9 at a random step: the resumed run's loss curve and weights are the uninterrupted run's, bit for bit."""

import json
import os
import random
import signal
import time

import pytest
import torch
from pipeline import Child, cli, killed_in, make_cache, make_samples, make_shards, tree, wait_for

from dde_cache.errors import RunError
from dde_cache.fit import Fit, seed_of
from dde_cache.preprocess import Preprocessor
from dde_cache.runs import FitConfig, Metrics, with_steps
from dde_cache.terms import Objective, Term

STEPS = 40
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(16), size=4)


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache")


def arguments(shards, cache, out, *more, workers=0, **changes):
    """Four batches an epoch, so that most steps lie inside one; dropout, labels and validation are on."""
    settings = {"log_every": 1, "save_every": SAVE_EVERY, "valid_every": 10, "dropout": 0.1, "hard_weight": 0.5}
    given = [part for name, value in (settings | changes).items() for part in ("--set", f"{name}={value}")]
    folder = shards[0].path.parent
    fixed = ["--steps", STEPS, "--batch-size", 7, "--workers", workers, "--valid", folder]
    return ["train", folder, "--targets", cache.folder, "--out", out, *fixed, *given, *more]


def run(*command):
    done = cli(*command)
    assert done.code == 0, done.err


def curve(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def steps_of(out):
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.fixture(scope="module")
def whole(shards, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*arguments(shards, cache, out))
    return out


def killed(folder, out, *command, after):
    """Start the command in a process of its own and kill it, once it has logged so many steps."""
    child = Child(*command, folder=folder)
    wait_for(lambda: steps_of(out) >= after)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.printed


@pytest.mark.parametrize(("draw", "before", "after"), [(0, 0, 0), (1, 0, 2), (2, 1, 0)])
def test_killed_and_resumed_with_other_workers(shards, cache, whole, tmp_path, draw, before, after):
    out = tmp_path / "run"
    stop = random.Random(draw).randrange(1, STEPS - 10)
    killed(tmp_path, out, *arguments(shards, cache, out, workers=before), after=stop)
    run(*arguments(shards, cache, out, "--resume", workers=after))
    assert curve(out) == curve(whole)
    assert tree(out / "model") == tree(whole / "model")
    last = f"{STEPS:08d}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert tree(out / "checkpoints")[f"{last}/{name}"] == tree(whole / "checkpoints")[f"{last}/{name}"]


def test_killed_twice_in_micro_batches(shards, cache, tmp_path):
    """Killed again after it was resumed; the second time perhaps in the middle of the same epoch."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(*arguments(shards, cache, whole, accumulate=2))
    killed(tmp_path, out, *arguments(shards, cache, out, accumulate=2), after=5)
    killed(tmp_path, out, *arguments(shards, cache, out, "--resume", accumulate=2, workers=1), after=17)
    run(*arguments(shards, cache, out, "--resume", accumulate=2))
    assert curve(out) == curve(whole)
    assert tree(out / "model") == tree(whole / "model")


def test_killed_before_it_has_begun(shards, cache, whole, tmp_path):
    """Between the two files that begin a run: there is nothing to go on with, and nothing in the way."""
    out = tmp_path / "run"
    child = Child(*arguments(shards, cache, out), folder=tmp_path, before=killed_in("replace", 1, "config.yaml"))
    assert child.wait() == -signal.SIGKILL, child.printed
    assert (out / "inputs.json").is_file()
    none = cli(*arguments(shards, cache, out, "--resume"))
    assert none.code == 1
    assert "expected a run to resume, found none; start without --resume" in none.message
    run(*arguments(shards, cache, out))
    assert tree(out / "model") == tree(whole / "model")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def killed_in_saving(monkeypatch):
    """A hook for a child: it ends when the student's weights are written, and its processor is not."""

    def install():
        monkeypatch.setattr(Preprocessor, "save", lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    return install


def test_killed_while_the_student_is_saved(shards, cache, whole, tmp_path, monkeypatch):
    """A student appears whole or not at all."""
    out = tmp_path / "run"
    child = Child(*arguments(shards, cache, out), folder=tmp_path, before=killed_in_saving(monkeypatch))
    assert child.wait() == -signal.SIGKILL, child.printed
    assert not (out / "model").exists()
    run(*arguments(shards, cache, out, "--resume"))
    assert tree(out / "model") == tree(whole / "model")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_resumed_on_labels_with_another_like(shards, cache, save_teacher, teacher_folder, tmp_path):
    """The shape of the towers is no matter of a damaged checkpoint."""
    command = ["train", shards[0].path.parent, "--targets", "none", "--steps", 2, "--batch-size", 7, "--workers", 0]
    out = ("--out", tmp_path / "run")
    run(*command, *out, "--like", teacher_folder)
    run(*command, *out, "--like", cache.folder, "--resume")
    other = cli(*command, *out, "--like", save_teacher(hidden_size=12), "--resume")
    assert other.code == 1
    assert "like: begun with width 24, 3 blocks, 3 heads, 3 answers" in other.message
    assert "now width 12, 3 blocks" in other.message
    assert "damaged" not in other.message


def test_a_scheduler_stops_a_run_and_its_workers(shards, cache, whole, tmp_path):
    """SIGTERM to the whole group: the running step is finished, a checkpoint written, the workers end with the run."""
    out = tmp_path / "run"
    changes = {"save_every": 1000}
    child = Child(*arguments(shards, cache, out, workers=2, **changes), folder=tmp_path)
    wait_for(lambda: steps_of(out) >= 4)
    child.send(signal.SIGTERM)
    child.send(signal.SIGTERM)
    assert child.wait() == 130, child.printed
    assert "stopped." in child.message
    assert "Traceback" not in child.printed
    done = curve(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"{done:08d}"]
    run(*arguments(shards, cache, out, "--resume", **changes))
    assert curve(out) == curve(whole)
    assert tree(out / "model") == tree(whole / "model")


def test_metrics_are_cut_back_whole(tmp_path):
    """A line that the kill cut in two goes, and so does every step after the checkpoint's."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    with Metrics(path, 2) as metrics:
        metrics.write(3, {"loss": 1.5})
    assert [(line["step"], line["loss"]) for line in curve(tmp_path)] == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert list(tmp_path.iterdir()) == [path]


def test_parts_have_seeds_of_their_own():
    seeds = {seed_of(seed, step, part) % 2**32 for seed in (0, 1) for step in range(2000) for part in range(64)}
    assert len(seeds) == 2 * 2000 * 64


def test_each_micro_batch_is_seeded_by_its_number(tmp_path):
    """Else micro-batches and ranks would all drop the same units."""
    seen = []

    def forward(model, batch, _sizes):
        seen.append(torch.initial_seed())
        return model(batch["x"])

    config = FitConfig(steps=2, batch_size=3, accumulate=3, seed=5)
    fit = Fit(Line(), Objective(forward, {"square": SQUARE}), config, tmp_path, save_best=lambda model: None)
    fit(lambda step, share: iter([{"x": torch.ones(1, 3)}] * 6))
    assert seen == [seed_of(5, step, part) for step in (0, 1) for part in (0, 1, 2)]


# --- fp16: its scale is state too


class Line(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 1)


SQUARE = Term(1.0, lambda batch, sizes: len(batch["x"]), lambda output, batch, sizes: output.square().sum())


def scaled_fit(run, steps, scale):
    """A fit with fp16's scaler, which accelerate itself makes on GPUs only; everything else is the real thing."""
    torch.manual_seed(0)
    fixed = {"batch_size": 2, "log_every": 1, "save_every": 2, "warmup": 0.0, "learning_rate": 0.1}
    config = FitConfig(steps=steps, max_grad_norm=None, **fixed)
    objective = Objective(lambda model, batch, sizes: model(batch["x"]), {"square": SQUARE})
    fit = Fit(Line(), objective, config, run, save_best=lambda model: None)
    fit._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    fit._optimizer = fit._accelerator.prepare_optimizer(fit._optimizer.optimizer)
    return fit


def batches(stop=None):
    def loader(step, share):
        while step != stop:
            yield {"x": torch.full((2, 3), 1.0 + step)}
            step += 1
        raise RunError("stopped")

    return loader


def test_the_scale_of_fp16_goes_on(tmp_path):
    """The scale grows every third step and falls on overflow: a fresh one would skip other steps."""
    whole = scaled_fit(tmp_path / "whole", 9, 2.0**127)
    whole(batches())
    with pytest.raises(RunError, match="stopped"):
        scaled_fit(tmp_path / "run", 9, 2.0**127)(batches(stop=5))
    resumed = scaled_fit(tmp_path / "run", 9, 2.0)
    resumed.resume()
    resumed(batches())
    assert resumed._accelerator.scaler.state_dict() == whole._accelerator.scaler.state_dict()
    assert whole._accelerator.scaler.get_scale() < 2.0**127, "the first steps overflow"
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed._plain.parameters(), whole._plain.parameters(), strict=True))


# --- epochs, and TensorBoard


def test_epochs_are_steps_of_full_batches(shards, cache, tmp_path):
    assert with_steps(FitConfig(steps=7, batch_size=10), 99).steps == 7
    assert with_steps(FitConfig(steps=7, batch_size=10, epochs=3), 99).steps == 27
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 2\nbatch_size: 7\nworkers: 0\n")
    command = ["train", shards[0].path.parent, "--targets", cache.folder, "--config", recipe]
    run(*command, "--out", tmp_path / "two")
    pairs = sum(len(sample.texts) for shard in shards for sample in shard)
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["steps"] == 2 * (pairs // 7)
    run(*command, "--out", tmp_path / "three", "--steps", 3)
    assert json.loads((tmp_path / "three" / "run.json").read_text())["steps"] == 3
    run(*command, "--out", tmp_path / "two", "--resume")
    both = cli(*command, "--out", tmp_path / "x", "--steps", 3, "--epochs", 2)
    assert both.code == 1
    assert "expected --steps or --epochs, got both" in both.message
    run(*command, "--out", tmp_path / "four", "--set", "steps=4")
    assert json.loads((tmp_path / "four" / "run.json").read_text())["steps"] == 4
    other = cli(*command, "--out", tmp_path / "two", "--resume", "--valid", shards[0].path.parent)
    assert other.code == 1
    assert "valid" in other.message, "the best checkpoint was chosen on other data"


def scalars(folder):
    """What TensorBoard shows of a run: name -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_metrics(shards, cache, tmp_path):
    """Of a run that was killed and resumed too: the steps that were done again are shown once."""
    out = tmp_path / "run"
    killed(tmp_path, out, *arguments(shards, cache, out, "--tensorboard"), after=8)
    # TensorBoard reads files in the order of their names, which begin with whole seconds.
    time.sleep(1)
    run(*arguments(shards, cache, out, "--tensorboard", "--resume"))
    shown = scalars(out / "tensorboard")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line} - {"step"}
    assert {"loss", "t2i", "i2t", "soft", "hard", "learning_rate", "valid_accuracy"} <= names == shown.keys()
    for name in names - {"seconds", "wait_seconds", "forward_seconds", "backward_seconds"}:
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
        assert shown[name] == expected, name
    assert len(shown["loss"]) == STEPS


def test_without_the_package(shards, cache, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused = cli(*arguments(shards, cache, tmp_path / "run", "--tensorboard"))
    assert refused.code == 1
    assert "pip install 'dde-cache[tensorboard]'" in refused.message
    assert not (tmp_path / "run").exists()
