"""The recipe files are configurations that `train` takes, with the values of the published runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from dde_cache.cli.train import train as command
from pipeline import make_cache, make_shards
from typer.main import get_command

from dde_cache.configs import resolve_config
from dde_cache.distill import TrainConfig
from dde_cache.presets import PRESETS
from dde_cache.pretraining import PretrainConfig
from dde_cache.sources import CachedTargets
from dde_cache.train import train

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

PUBLISHED = {
    "vqav2": {"batch_size": 256, "epochs": 10, "learning_rate": 1e-4, "head_learning_rate_factor": 10.0},
    "nlvr2": {"batch_size": 128, "epochs": 20, "learning_rate": 1e-4, "head_learning_rate_factor": 1.0},
    "snli-ve": {"batch_size": 256, "epochs": 10, "learning_rate": 1e-4, "head_learning_rate_factor": 1.0},
}
"""DiDE's published code, by task."""


def test_every_run_of_the_paper_has_a_recipe():
    assert {path.stem for path in RECIPES} == {*PUBLISHED, "flickr30k", "pretrain"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_configuration(path):
    config = resolve_config(PretrainConfig if path.stem == "pretrain" else TrainConfig, path)
    given = PUBLISHED.get(path.stem, {})
    assert {name: getattr(config, name) for name in given} == given
    # What all runs share is the preset's.
    shared = ("betas", "eps", "weight_decay", "dropout", "queries", "tail", "attention_weight")
    assert {name: getattr(config, name) for name in shared} == {name: PRESETS["dide"][name] for name in shared}
    assert config.precision == "fp16"
    # Each value is said, none is the program's default of today.
    said = yaml.safe_load(path.read_text()).keys()
    assert {*shared, "batch_size", "learning_rate", "warmup", "precision", "soft_weight", "hard_weight"} <= said
    assert {"epochs", "steps"} & said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command(path):
    first = path.read_text().splitlines()[0]
    words = shlex.split(first.removeprefix("# "))
    assert words[words.index("dde-cache") + 1] == "train"
    assert words[words.index("--config") + 1] == f"recipes/{path.name}"
    single = typer.Typer()
    single.command()(command)
    known = {option for parameter in get_command(single).params for option in parameter.opts}
    after = words[words.index("train") :]
    assert {word for word in after if re.match("--", word)} <= known


def test_warm_up_of_pretraining_is_vilts():
    config = resolve_config(PretrainConfig, FOLDER / "pretrain.yaml")
    assert config.warmup * config.steps == 2500
    assert config.batch_size == 4096


def test_a_recipe_trains(teacher_folder, tmp_path):
    """The file as it is, but for the size of what it is tried on, and fp16, which wants a GPU."""
    shards = make_shards(tmp_path / "shards")
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", queries="all")
    small = ["epochs=1", "batch_size=5", "accumulate=2", "workers=0", "precision=no"]
    config = resolve_config(TrainConfig, FOLDER / "vqav2.yaml", small)
    record = train(shards, CachedTargets(cache), tmp_path / "run", config, init=str(teacher_folder))
    assert record.steps == 3
