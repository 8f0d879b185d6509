"""The whole road as a user walks it, and every wrong turn: one message, exit code 1, no traceback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pipeline import cli, make_cache, make_samples, make_shards
from transformers import BertConfig, BertModel

from dde_cache.samples import Sample, Text

TINY = {"hidden_size": 24, "layers": 2, "heads": 3, "text_length": 16}
QUICK = ("--steps", 3, "--batch-size", 8, "--set", "workers=0", "--set", "log_every=1")


def works(*arguments):
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    if "--json" not in arguments:
        assert all(len(line) <= 80 for line in done.out.splitlines()), done.out
    return done


def fails(*arguments, expected):
    done = cli(*arguments)
    assert done.code == 1, (done.code, done.out, done.err)
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
    assert done.message.startswith("error: "), done.err
    for part in [expected] if isinstance(expected, str) else expected:
        assert part in done.message, done.err
    return done


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Data, teacher and cache, all by the command line."""
    folder = tmp_path_factory.mktemp("road")
    for split, count in (("train", 12), ("valid", 5)):
        works(
            "data", "import", "shapes", "--out", folder / split, "--split", split, "--count", count, "--shard-size", 5
        )
    (folder / "teacher.yaml").write_text(yaml.safe_dump(TINY))
    works(
        "teacher", "train", folder / "train", "--valid", folder / "valid", "--config", folder / "teacher.yaml",
        "--out", folder / "teacher", *QUICK,
    )  # fmt: skip
    for split in ("train", "valid"):
        works("extract", folder / split, "--teacher", folder / "teacher", "--out", folder / f"cache-{split}")
    return folder


@pytest.fixture(scope="module")
def run(road):
    works(
        "train",
        road / "train",
        "--targets",
        road / "cache-train",
        "--valid",
        road / "valid",
        "--out",
        road / "run",
        *QUICK,
    )
    return road / "run"


# --- the road


def test_the_teacher_has_a_card_and_a_processor(road):
    names = {path.name for path in (road / "teacher").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    card = (road / "teacher" / "README.md").read_text()
    for kind in ("exists", "row", "neighbour"):
        assert f"| {kind} |" in card


def test_inspect(road):
    shown = works("inspect", road / "cache-train").out
    for word in (
        "fingerprint",
        "every key, sqrt8 weights of 56 steps",
        "72 pairs of 12 samples in 3 units",
        "dense float16",
    ):
        assert word in shown
    summary = json.loads(works("inspect", road / "cache-train", "--json").out)
    assert summary["pairs"] == 72
    assert summary["labels"] == ["no", "yes"]
    key = "shapes-train-0000003"
    table = works("inspect", road / "cache-train", "--key", key, "--text", 2).out
    assert "[CLS]" in table
    assert "row " in table
    links = json.loads(works("inspect", road / "cache-train", "--key", key, "--top", 1, "--json").out)
    assert links["key"] == key
    assert all(len(word["links"]) == 1 for word in links["words"])


def test_train_and_eval(road, run):
    record = json.loads((run / "run.json").read_text())
    assert record["steps"] == 3
    assert record["best_accuracy"] is not None
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_size"] == 8
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps if "loss" in one] == [1, 2, 3]
    report = json.loads(works("eval", run, road / "valid", "--targets", road / "cache-valid", "--json").out)
    assert report["overall"]["pairs"] == 30
    assert set(report["kinds"]) == {"exists", "row", "neighbour"}
    assert report["overall"]["accuracy"] == pytest.approx(record["best_accuracy"])
    assert report["overall"]["agreement"] is not None
    table = works("eval", run, road / "valid", "--targets", road / "cache-valid").out
    assert "agrees with" in table
    assert "most frequent" in table
    teacher = json.loads(works("eval", road / "teacher", road / "valid", "--baseline", road / "train", "--json").out)
    assert teacher["overall"]["frequent_answer"] is not None


def test_the_other_sources_of_targets(road, tmp_path):
    for name, source in (
        ("labels", ("--targets", "none", "--like", road / "cache-train")),
        ("online", ("--teacher", road / "teacher")),
    ):
        record = json.loads(works("train", road / "train", *source, "--out", tmp_path / name, *QUICK, "--json").out)
        assert record["steps"] == 3
    first = json.loads((tmp_path / "labels" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == first["hard"]


def test_the_preset(road, tmp_path):
    out = tmp_path / "run"
    dide = ("--preset", "dide", "--init", road / "teacher", *QUICK)
    fails(
        "train", road / "train", "--targets", road / "cache-train", "--preset", "dide", "--out", out,
        expected="starts both towers from a ViLT checkpoint: pass --init CHECKPOINT",
    )  # fmt: skip
    refused = cli("train", road / "train", "--targets", road / "cache-train", "--out", out, *dide)
    assert refused.code == 1
    assert "padded query rows (queries all): extract with --queries all" in refused.message
    works("extract", road / "train", "--teacher", road / "teacher", "--out", tmp_path / "all", "--queries", "all")
    done = works("train", road / "train", "--targets", tmp_path / "all", "--out", out, *dide, "--set", "dropout=0.25")
    assert done.message.count("not as published:") == 1, "whole rows are kept; augmentation is not"
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["queries"], settings["learning_rate"], settings["hard_weight"]) == ("all", 1e-4, 0.0)
    assert settings["dropout"] == 0.25, "--set wins over the preset"


def test_a_runs_own_configuration_repeats_it(road, run, tmp_path):
    (tmp_path / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("max_grad_norm: 1.0", "max_grad_norm: null")
    )
    works(
        "train", road / "train", "--targets", road / "cache-train", "--config", tmp_path / "config.yaml",
        "--out", tmp_path / "run", "--set", "eps=1e-7", "--steps", 2,
    )  # fmt: skip
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["max_grad_norm"] is None
    assert (settings["eps"], settings["steps"], settings["batch_size"]) == (1e-7, 2, 8)


def test_the_installed_program():
    """As a program of its own: the help comes without torch, an error without a traceback."""
    program = Path(sys.executable).with_name("dde-cache")
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", program, "--help"], capture_output=True, text=True, check=True
    )
    for name in ("data", "teacher", "extract", "inspect", "merge", "subset", "train", "eval", "demo"):
        assert f"│ {name} " in shown.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy", "zarr"} & imported
    broken = subprocess.run([program, "inspect", "/nowhere"], capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert broken.stderr.startswith("error: /nowhere: expected a cache")
    assert broken.stdout == ""


# --- wrong turns


def test_wrong_teachers(road, tmp_path):
    def extraction(teacher, expected):
        fails("extract", road / "train", "--teacher", teacher, "--out", tmp_path / "cache", expected=expected)
        assert not (tmp_path / "cache").exists()

    extraction(tmp_path / "nowhere", "expected a checkpoint folder, a hub id (owner/name) or `sample`")
    (tmp_path / "empty").mkdir()
    extraction(tmp_path / "empty", "expected a folder or hub id with a checkpoint of a fusion encoder")
    shape = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(shape).save_pretrained(tmp_path / "bert")
    extraction(
        tmp_path / "bert",
        "expected a fusion encoder (model_type vilt, bridgetower, blip, flava, lxmert), got model_type bert",
    )
    resizing = shutil.copytree(road / "teacher", tmp_path / "resizing")
    path = resizing / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= {"do_resize": True, "size": {"shortest_edge": 36}, "size_divisor": 32}
    path.write_text(json.dumps(settings))
    extraction(resizing, "resizes pictures to multiples of 32 px, which the patch of 12 px does not divide")


def test_a_processor_that_resizes_says_so(road, tmp_path):
    resizing = shutil.copytree(road / "teacher", tmp_path / "resizing")
    path = resizing / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= {"do_resize": True, "size": {"shortest_edge": 24}, "size_divisor": 12}
    path.write_text(json.dumps(settings))
    done = works("extract", road / "train", "--teacher", resizing, "--out", tmp_path / "cache")
    assert "pictures 36 x 36 px, resized to 24 x 24: 2 x 2 patches" in done.message


def test_wrong_shards(road, tmp_path):
    teacher = ("--teacher", road / "teacher", "--out", tmp_path / "cache")
    fails("extract", tmp_path / "nowhere", *teacher, expected="expected shards at")
    (tmp_path / "empty").mkdir()
    fails("extract", tmp_path / "empty", *teacher, expected="expected .tar shards")
    import tarfile

    (tmp_path / "bare").mkdir()
    picture = tmp_path / "a.image0.png"
    picture.write_bytes(make_samples(1)[0].images[0].content)
    with tarfile.open(tmp_path / "bare" / "000000.tar", "w") as tar:
        tar.add(picture, picture.name)
    fails("extract", tmp_path / "bare", *teacher, expected="expected texts in one a.json, found 0")
    with tarfile.open(tmp_path / "bare" / "000000.tar", "w"):
        pass
    fails("extract", tmp_path / "bare", *teacher, expected="expected samples, found none")
    odd = make_shards(tmp_path / "odd", make_samples(2, sizes=((30, 24),)))
    fails(
        "extract", odd[0].path.parent, *teacher, expected=["multiples of the patch of 12 px, got 30 x 24 px", "key-000"]
    )
    assert not (tmp_path / "cache").exists()


def test_a_row_keeps_as_many_keys_as_it_needs(road, tmp_path):
    extraction = ("extract", road / "valid", "--teacher", road / "teacher", "--out", tmp_path / "cache")
    fails(*extraction, "--mass", 0.9, "--k", 4, expected="expected --k, or --mass with --max-k, got both")
    works(*extraction, "--mass", 0.3, "--max-k", 9)
    assert "the keys of 0.3 of the mass, at most 9, log8" in works("inspect", tmp_path / "cache").out
    summary = json.loads(works("inspect", tmp_path / "cache", "--json").out)
    for mass in summary["kept_mass"].values():
        assert 0.3 <= mass["quantiles"]["0.05"] <= mass["mean"] < 0.6
    fails(
        *extraction,
        expected=["mass: expected null, got 0.3", "k: expected null, got 9", 'weights: expected "sqrt8", got "log8"'],
    )


def test_one_codec_at_a_time(road, tmp_path):
    extraction = ("extract", road / "valid", "--teacher", road / "teacher", "--out", tmp_path / "cache")
    for options in (("--k", 4), ("--mass", 0.9)):
        fails(*extraction, "--weights", "sqrt8", *options, expected="sqrt8 weights keep every key: expected neither k")
    fails(*extraction, "--k", 4, "--sqrt-steps", 40, expected="expected steps with sqrt8 weights alone, got log8")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "four.yaml").write_text("k: 4")
    for name, options, shown in (
        ("steps", ("--sqrt-steps", 40), "every key, sqrt8 weights of 40 steps"),
        ("all", ("--config", tmp_path / "four.yaml", "--k", "all"), "every key, log8 weights"),
        ("half", ("--weights", "float16"), "the 8 strongest keys, float16 weights"),
    ):
        works(*extraction[:-1], tmp_path / name, *options)
        assert shown in works("inspect", tmp_path / name).out


def test_an_empty_shard_among_others(road, tmp_path):
    import tarfile

    make_shards(tmp_path / "s", make_samples(3, sizes=((36, 36),)))
    (tmp_path / "s" / "shards.json").unlink()
    with tarfile.open(tmp_path / "s" / "000001.tar", "w"):
        pass
    fails(
        "extract", tmp_path / "s", "--teacher", road / "teacher", "--out", tmp_path / "cache",
        expected="1.tar: expected samples, found none",
    )  # fmt: skip


def test_wrong_options(road, tmp_path):
    extraction = ("extract", road / "train", "--teacher", road / "teacher", "--out", tmp_path / "cache")
    for option, value, expected in (
        ("--k", "many", "expected --k as a number or `all`, got 'many'"),
        ("--k", "0", "k: Input should be greater than or equal to 1, got 0"),
        ("--k", "17", "expected k up to 16 (image tokens 10, text tokens 16), got 17; use --k all"),
        ("--mass", "1.5", "mass: Input should be less than or equal to 1, got 1.5"),
        ("--max-k", "4", "expected --mass together with --max-k"),
        ("--layers", "last", "expected --layers as numbers with commas, for example 10,11, got 'last'"),
        ("--layers", "2", "expected different layers from 0 to 1, got [2]"),
        ("--weights", "log9", "weights: Input should be 'sqrt8', 'log8', 'float16' or 'float32', got 'log9'"),
        ("--sqrt-steps", "255", "steps: Input should be less than or equal to 254, got 255"),
        ("--device", "toaster", "expected --device cpu or a GPU that torch can use here, got 'toaster'"),
    ):
        fails(*extraction, option, value, expected=expected)
    fails(
        "train", road / "train", "--targets", road / "cache-train", "--preset", "vilt", "--out", tmp_path / "r",
        expected="expected --preset dide or dide-t2i",
    )  # fmt: skip
    labels = ("--targets", "none", "--like", road / "cache-train")
    for options, expected in (
        ((), "got none of them"),
        (("--targets", road / "cache-train", "--teacher", road / "teacher"), "got both"),
        (("--targets", "none"), "expected --like CACHE|TEACHER together with --targets none"),
        (("--targets", road / "cache-train", "--on-missing", "ask"), "expected --on-missing error or skip, got 'ask'"),
        (("--targets", tmp_path / "nowhere"), "expected a cache, but it has no manifest.json"),
        (("--teacher", road / "teacher", "--set", "layer=7"), "expected layer up to 1 for this teacher, got 7"),
        (("--targets", road / "cache-train", "--init", tmp_path / "nowhere"), "expected a checkpoint folder"),
        (("--targets", road / "cache-train", "--valid", tmp_path / "nowhere"), "expected shards at"),
        (("--targets", road / "cache-train", "--set", "steps"), "expected --set name=value, got 'steps'"),
        (("--targets", road / "cache-train", "--set", "steps=["), "(values are YAML)"),
        (("--targets", road / "cache-train", "--batch-size", 100), "at least one batch of 100 pairs, got 72 pairs"),
        (("--targets", road / "cache-train", "--batch-size", 8, "--resume"), "expected a run to resume, found none"),
        (("--teacher", road / "teacher", "--on-missing", "skip"), "expected --on-missing with --targets CACHE alone"),
        ((*labels, "--on-missing", "skip"), "expected --on-missing with --targets CACHE alone"),
        ((*labels, "--allow-pixel-drift"), "expected --allow-pixel-drift with a cache of views alone"),
        (("--targets", road / "cache-train", "--allow-pixel-drift"), "--allow-pixel-drift with a cache of views alone"),
        (
            (*labels, "--task", "retrieval", "--set", "head_learning_rate_factor=3"),
            "expected head_learning_rate_factor 1",
        ),
    ):
        fails("train", road / "train", "--out", tmp_path / "r", *options, expected=expected)
        assert not (tmp_path / "r").exists()
    page = ("view", road / "cache-train", road / "train", "--out", tmp_path / "page.html")
    for options, expected in (
        (("--key", "000000", "--count", 3), "expected --count and --among without --key and --keys"),
        (("--key", "000000", "--among", 3), "expected --count and --among without --key and --keys"),
        (("--device", "cpu"), "expected --device together with --run"),
    ):
        fails(*page, *options, expected=expected)
    fails(
        "embed", road / "run", "--texts", road / "train", "--skip-bad", "--out", tmp_path / "store",
        expected="expected --skip-bad with --images alone",
    )  # fmt: skip
    for options, expected in ((("--targets", road / "cache-train", "--set", "steps=0"), "steps"),):
        fails("train", road / "train", "--out", tmp_path / "r", *options, expected=expected)
        assert not (tmp_path / "r").exists()
    fails("teacher", "train", road / "train", "--out", tmp_path / "t", "--batch-size", 100, expected="got 72 pairs")
    fails("eval", tmp_path / "nowhere", road / "valid", expected="expected a checkpoint folder")
    fails("inspect", road / "cache-train", "--key", "nobody", expected="expected a sample with key 'nobody'")


def test_all_mistakes_of_a_configuration_at_once(road, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: -1\nlearning_rate: fast\nlayers: 3\ntail: none\n")
    done = fails(
        "train", road / "train", "--targets", road / "cache-train", "--config", path, "--out", tmp_path / "r",
        expected=["steps: ", "learning_rate: ", "layers: ", "tail: ", "known fields: "],
    )  # fmt: skip
    assert done.err.count("\n  - ") == 4
    for text, expected in (("- 1\n", "expected a YAML mapping"), ("a: [", "cannot be read")):
        path.write_text(text)
        fails(
            "train", road / "train", "--targets", road / "cache-train", "--config", path, "--out", tmp_path / "r",
            expected=expected,
        )  # fmt: skip


def test_a_cache_of_something_else(road, teacher_folder, tmp_path):
    fails(
        "train", road / "valid", "--targets", road / "cache-train", "--out", tmp_path / "r", *QUICK,
        expected=["no key is on both sides", "another data set"],
    )  # fmt: skip
    fails(
        "extract", road / "train", "--teacher", teacher_folder, "--out", road / "cache-train",
        expected=["holds a cache of other targets", "teacher.weights", "text_length: expected 12, got 16"],
    )  # fmt: skip
    changed = make_shards(
        tmp_path / "changed",
        [Sample(one.key, one.images, (Text(text="blue ?", label="yes"),)) for one in make_samples(3)],
    )
    cache = make_cache(make_shards(tmp_path / "s", make_samples(3)), teacher_folder, tmp_path / "cache")
    fails(
        "train", changed[0].path.parent, "--targets", cache.folder, "--out", tmp_path / "r", "--steps", 1,
        "--batch-size", 2, "--set", "workers=0", expected="not those that the teacher saw",
    )  # fmt: skip


def test_places_that_cannot_be_written(road, tmp_path):
    (tmp_path / "file").write_text("precious")
    for command in (
        ("extract", road / "train", "--teacher", road / "teacher"),
        ("train", road / "train", "--targets", road / "cache-train", *QUICK),
        ("teacher", "train", road / "train", *QUICK),
    ):
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            fails(*command, "--out", out, expected="expected")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.docx").write_text("precious")
    fails(
        "teacher",
        "train",
        road / "train",
        *QUICK,
        "--out",
        tmp_path / "other",
        expected="expected a new or empty folder",
    )
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.docx"]
