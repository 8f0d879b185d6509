"""A resumed run is an uninterrupted one, bit for bit; the best checkpoint is the best."""

import json
from dataclasses import replace

import pytest
import torch
from pipeline import make_cache, make_shards, tree

from dde_cache.distill import TrainConfig
from dde_cache.errors import RunError
from dde_cache.fit import Fit, Progress
from dde_cache.optimizer import rate_at
from dde_cache.runs import FitConfig, open_run
from dde_cache.sources import CachedTargets
from dde_cache.student import DualEncoder
from dde_cache.tasks import SingleLabel
from dde_cache.terms import Objective, Term
from dde_cache.train import train

STEPS = 9  # three batches an epoch: steps 4 and 8 are inside one


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def targets(shards, teacher_folder, tmp_path_factory):
    return CachedTargets(make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache"))


def settings(**changes):
    plain = {"steps": STEPS, "batch_size": 5, "workers": 0, "log_every": 1, "save_every": 4, "valid_every": 3}
    return TrainConfig(**(plain | {"dropout": 0.1, "learning_rate": 1e-3} | changes))


def stop_after(number):
    def step(done, _record):
        if done == number:
            raise Stopped

    return Progress(step=step)


def metrics(out):
    timed = ("seconds", "wait_seconds", "forward_seconds", "backward_seconds")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.fixture(scope="module")
def whole(shards, targets, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    record = train(shards, targets, out, settings(), valid=shards)
    return out, record


@pytest.mark.parametrize(("stop", "workers"), [(6, 0), (8, 0), (6, 1)])
def test_resume_is_the_uninterrupted_run(shards, targets, whole, tmp_path, stop, workers):
    """Stopped between checkpoints (4 and 8): the steps since are done again, their metrics cut and written again."""
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(shards, targets, out, settings(), valid=shards, progress=stop_after(stop))
    assert metrics(out)[-1]["step"] == stop
    torch.manual_seed(1234)
    record = train(shards, targets, out, settings(workers=workers), valid=shards, resume=True)
    assert metrics(out) == metrics(whole[0])
    assert tree(out / "model") == tree(whole[0] / "model")
    assert (
        tree(out / "checkpoints")[f"{STEPS:08d}/model.safetensors"]
        == (tree(whole[0] / "checkpoints")[f"{STEPS:08d}/model.safetensors"])
    )
    assert (record.best_accuracy, record.best_step) == (whole[1].best_accuracy, whole[1].best_step)


def test_workers_do_not_change_a_run(shards, targets, whole, tmp_path):
    train(shards, targets, tmp_path / "run", settings(workers=1), valid=shards)
    assert metrics(tmp_path / "run") == metrics(whole[0])
    assert tree(tmp_path / "run" / "model") == tree(whole[0] / "model")


def test_another_seed_is_another_run(shards, targets, whole, tmp_path):
    train(shards, targets, tmp_path / "run", settings(seed=1), valid=shards)
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(whole[0])[0]["loss"]


def test_a_finished_run_resumes_to_itself(shards, targets, whole):
    before = tree(whole[0] / "model")
    record = train(shards, targets, whole[0], settings(), valid=shards, resume=True)
    assert record.steps == STEPS
    assert tree(whole[0] / "model") == before


def test_only_the_newest_checkpoint_is_kept(whole):
    assert [path.name for path in (whole[0] / "checkpoints").iterdir()] == [f"{STEPS:08d}"]


def test_validation_chooses_the_best(shards, targets, tmp_path, monkeypatch):
    """Scripted accuracies at steps 3, 6, 9: a tie goes to the later one, a fall changes nothing."""
    saved = {}
    accuracies = iter([0.5, 0.5, 0.2])
    monkeypatch.setattr(SingleLabel, "score", lambda self, predictions: next(accuracies))
    original = DualEncoder.save_pretrained

    def save(model, folder, **options):
        saved[len(saved)] = {name: value.clone() for name, value in model.state_dict().items()}
        return original(model, folder, **options)

    monkeypatch.setattr(DualEncoder, "save_pretrained", save)
    record = train(shards, targets, tmp_path / "run", settings(), valid=shards)
    assert (record.best_accuracy, record.best_step) == (0.5, 6)
    assert len(saved) == 2
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(kept["head.0.weight"], saved[1]["head.0.weight"])
    last = load_file(tmp_path / "run" / "checkpoints" / f"{STEPS:08d}" / "model.safetensors")
    assert not torch.equal(kept["head.0.weight"], last["head.0.weight"])


def test_without_validation_the_last_is_kept(shards, targets, tmp_path):
    from safetensors.torch import load_file

    record = train(shards, targets, tmp_path / "run", settings())
    assert record.best_accuracy is None
    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / f"{STEPS:08d}" / "model.safetensors")
    assert all(torch.equal(kept[name], last[name]) for name in kept)


# --- the loop alone


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 1)

    def forward(self, batch):
        return self.head(self.body(batch["x"]))


SQUARE = Term(1.0, lambda batch, sizes: len(batch["x"]), lambda output, batch, sizes: output.square().sum())


def line(term=SQUARE):
    return Objective(lambda model, batch, sizes: model(batch), {"square": term})


def fit(run, objective=None, **changes):
    torch.manual_seed(0)
    plain = {"steps": 10, "log_every": 1, "warmup": 0.2, "learning_rate": 0.1}
    return Fit(Line(), objective or line(), FitConfig(**(plain | changes)), run, save_best=lambda model: None)


def batches(step, share):
    while True:
        yield {"x": torch.full((2, 3), float(step))}


def test_learning_rate_rises_and_falls(tmp_path):
    config = FitConfig(steps=10, warmup=0.2)
    assert [rate_at(step, config) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )
    loop = fit(tmp_path, head_learning_rate_factor=10.0)
    loop(batches)
    rates = sorted({group["lr"] for group in loop._optimizer.param_groups})
    assert rates == pytest.approx([0.0125, 0.125])
    assert [line["learning_rate"] for line in metrics(tmp_path)] == pytest.approx(
        [0.1 * rate_at(step, config) for step in range(10)]
    )


def test_biases_and_norms_do_not_decay(tmp_path):
    loop = fit(tmp_path, weight_decay=0.5)
    decays = {
        name: group["weight_decay"]
        for group in loop._optimizer.param_groups
        for name, parameter in loop._plain.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert decays == {"body.weight": 0.5, "body.bias": 0.0, "head.weight": 0.5, "head.bias": 0.0}


def test_a_loss_that_is_not_finite(tmp_path):
    broken = replace(SQUARE, total=lambda output, batch, sizes: output.sum() * float("nan"))
    with pytest.raises(RunError, match=r"step 1: expected finite losses.*lower the learning rate"):
        fit(tmp_path, line(broken))(batches)


def test_a_precision_that_the_device_lacks(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU does fp16")
    with pytest.raises(RunError, match="expected a precision that this device can do, got 'fp16'"):
        fit(tmp_path, precision="fp16")


def test_a_run_that_was_begun_before_a_setting_was_there(tmp_path):
    open_run(tmp_path, FitConfig(), resume=False)
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line for line in lines if not line.startswith("weight_decay")))
    open_run(tmp_path, FitConfig(), resume=True)
    with pytest.raises(RunError, match=r"weight_decay: begun with 0.01, now 0.5"):
        open_run(tmp_path, FitConfig(weight_decay=0.5), resume=True)


def test_a_run_that_is_there(tmp_path):
    open_run(tmp_path / "run", FitConfig(), resume=False)
    with pytest.raises(RunError, match="holds a run; choose another --out, or pass --resume"):
        open_run(tmp_path / "run", FitConfig(), resume=False)
    open_run(tmp_path / "run", FitConfig(workers=3, save_every=7), resume=True)
    with pytest.raises(RunError, match=r"(?s)eps: begun with 1e-08, now 1e-06.*seed: begun with 0, now 3"):
        open_run(tmp_path / "run", FitConfig(seed=3, eps=1e-6), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.docx").write_text("precious")
    with pytest.raises(RunError, match="is not empty and no run of ours"):
        open_run(tmp_path / "other", FitConfig(), resume=False)
    (tmp_path / "other" / "thesis.docx").rename(tmp_path / "other" / "inputs.json")
    for content in ("precious", '{"precious": 1}'):
        (tmp_path / "other" / "inputs.json").write_text(content)
        with pytest.raises(RunError, match="is not empty and no run of ours"):
            open_run(tmp_path / "other", FitConfig(), resume=False, inputs={"shards": "a"})
    with pytest.raises(RunError, match="expected a run to resume, found none"):
        open_run(tmp_path / "other", FitConfig(), resume=True)
