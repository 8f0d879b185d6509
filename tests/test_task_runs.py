"""Tasks on the road from shards to figures; the page on a task of one's own, as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import randomise, vilt_config
from pipeline import LABELS, changed, cli, make_cache, make_samples, make_shards, whole_batch

from dde_cache.batches import PairDataset
from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.errors import InputError, RunError
from dde_cache.evaluate import load_subject
from dde_cache.presets import task_settings
from dde_cache.sources import CachedTargets
from dde_cache.stream import PairTable
from dde_cache.student import new_student
from dde_cache.targets import CacheTargets
from dde_cache.tasks import load_task
from dde_cache.train import train

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "own-task.md"


def annotated(count=6):
    """Ten annotators; some answers are not among the teacher's."""
    answers = (["no"] * 8 + ["maybe"] * 2, ["yes"] * 3 + ["red"] * 2 + ["No"] * 5, ["maybe"] * 10)
    return [
        changed(
            one,
            texts=tuple(
                text.model_copy(
                    update={"answers": tuple(answers[(number + slot) % 3]), "label": answers[(number + slot) % 3][-1]}
                )
                for slot, text in enumerate(one.texts)
            ),
        )
        for number, one in enumerate(make_samples(count))
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", annotated())


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache", queries="all")


def test_losses_of_vqa_are_sums_over_answers(shards, cache):
    """The terms of a batch against NumPy: soft scores, and the teacher's sigmoid."""
    task = "vqa"
    student = randomise(new_student(vilt_config(), LABELS), seed=5).eval()
    config = TrainConfig(task=task, attention_weight=0, hard_weight=0.5)
    table = PairTable.of(shards)
    reader = CacheTargets(cache, shards, 2, attention=False)
    dataset = PairDataset(shards, table, cache.preprocessor(), LABELS, reader, encode=load_task(task).targets)
    batch = dataset.__getitems__(list(range(len(table))))
    terms = StudentLosses(config, CachedTargets(cache), False)(student, batch)
    output = student(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])
    logits = output.logits.detach().double().numpy()

    def bce(target):
        p = 1 / (1 + np.exp(-logits))
        return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(-1)

    taught = 1 / (1 + np.exp(-batch["target.logits"].double().numpy()))
    assert float(terms["soft"].detach()) == pytest.approx(bce(taught).mean(), rel=1e-5)
    scores = batch["scores"].double().numpy()
    assert set(scores.flatten().round(2).tolist()) == {0, 0.6, 0.9, 1}
    known = scores.sum(-1) > 0
    assert 0 < known.sum() < len(known), "questions of unknown answers are left out"
    assert float(terms["hard"].detach()) == pytest.approx(bce(scores)[known].sum() / len(scores), rel=1e-5)
    assert float(terms["loss"].detach()) == pytest.approx(float((terms["soft"] + terms["hard"] / 2).detach()), rel=1e-6)


def test_vqa_by_the_command_line(shards, cache, teacher_folder, tmp_path):
    data = shards[0].path.parent
    options = ["--steps", 2, "--batch-size", 4, "--workers", 0, "--valid", data, "--init", teacher_folder]
    done = cli(
        *("train", data, "--targets", cache.folder, "--out", tmp_path / "run", "--task", "vqa", "--preset", "dide"),
        *options,
    )
    assert done.code == 0, done.err
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["task"], config["head_learning_rate_factor"], config["soft_weight"]) == ("vqa", 10.0, 1.0)
    done = cli("eval", tmp_path / "run", data, "--targets", cache.folder, "--json")
    assert done.code == 0, done.err
    overall = json.loads(done.out)["overall"]
    assert overall["pairs"] == 12, "questions of unknown answers count"
    assert overall["accuracy"] < 1
    # A run's own file of settings says the task.
    done = cli(
        *(
            "train",
            data,
            "--targets",
            cache.folder,
            "--out",
            tmp_path / "again",
            "--config",
            tmp_path / "run/config.yaml",
        ),
        *("--init", teacher_folder),
    )
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "again/run.json").read_text())["task"] == "vqa"


def test_what_tasks_begin_with():
    assert task_settings("retrieval") == {"soft_weight": 0.0, "hard_weight": 1.0, "task": "retrieval"}
    assert task_settings("nlvr2", "dide")["batch_size"] == 128
    assert task_settings("entailment", "dide")["batch_size"] == 256
    assert task_settings("vqa", "dide")["head_learning_rate_factor"] == 10
    assert TrainConfig(**task_settings("retrieval", "dide")).soft_weight == 0


def test_a_teacher_of_other_answers(shards, cache, teacher_folder, tmp_path):
    with pytest.raises(InputError, match="task entailment: expected a teacher of the answers contradiction"):
        train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(task="entailment", batch_size=4))
    with pytest.raises(InputError, match="task entailment: expected a teacher of the answers contradiction"):
        load_subject(str(teacher_folder), task="entailment")


def test_what_a_run_names_is_not_imported(shards, cache, tmp_path):
    """A stranger's run may name any module."""
    train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(steps=1, batch_size=4, workers=0, task="vqa"))
    path = tmp_path / "run/model/config.json"
    path.write_text(path.read_text().replace('"vqa"', '"strange:Thing"'))
    sys.modules.pop("strange", None)
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(RunError, match="pass --task strange:Thing to run that code"):
            load_subject(str(tmp_path / "run"))
        assert not (tmp_path / "ran").exists()
        with pytest.raises(InputError, match="cannot be imported"):
            load_subject(str(tmp_path / "run"), task="strange:Thing")
        assert (tmp_path / "ran").exists(), "asked for, it is"
    finally:
        sys.path.remove(str(tmp_path))


def test_the_page_on_a_task_of_your_own_runs_as_it_stands(teacher_folder, tmp_path):
    page = PAGE.read_text()
    (tmp_path / "balanced.py").write_text(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL).group(1))
    make_samples_of = [make_samples(40, seed=seed) for seed in (0, 1)]
    train_shards, _ = (
        make_shards(tmp_path / "data" / name, samples, size=20)
        for name, samples in zip(("train", "test"), make_samples_of, strict=True)
    )
    make_cache(train_shards, teacher_folder, tmp_path / "caches" / "train")
    commands = re.findall(r"^    (export .*|dde-cache .*)$", page, flags=re.MULTILINE)
    assert len(commands) == 3
    commands = [command + " --batch-size 16" if " train " in command else command for command in commands]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "balanced_accuracy" in done.stdout
    assert json.loads((tmp_path / "runs/own/run.json").read_text())["task"] == "balanced:Balanced"


def test_samples_say_which_pairs_share_a_picture(shards, cache):
    batch = whole_batch(shards, cache.preprocessor(), LABELS)
    keys = [sample.key for shard in shards for sample in shard for _ in sample.texts]
    same = torch.tensor([[one == other for other in keys] for one in keys])
    assert torch.equal(batch["sample"][:, None] == batch["sample"][None], same)
