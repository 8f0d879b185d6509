"""Who may import what, and other rules of the house."""

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "dde_cache").rglob("*.py"))
PRODUCT = [*CORE, *sorted((ROOT / "cli").glob("*.py"))]

ORDER = (
    "errors", "files", "canonical", "spec", "pages", "configs", "attention", "blocks", "codec", "states", "mirror",
    "bounds", "images", "tars", "samples", "write_shards", "stream", "chunks", "layout", "arrays", "unit",
    "candidates", "preprocess", "tokens", "vilt", "teachers", "views", "passes", "partners", "audit", "drift",
    "assets", "manifest", "store", "card", "network", "remote", "fetch", "streamed", "hub", "objects", "share",
    "staging", "subset", "merge", "checkpoint", "teacher", "towers", "student", "initial", "ranks", "contrast",
    "pretext", "losses", "align", "join", "lookup", "targets", "agreement", "batches", "terms", "encoder", "records",
    "buckets", "scores", "tasks", "runs", "replay", "interrupt", "optimizer", "clock", "fit", "choices", "sources",
    "match", "distill", "several", "pretraining", "model_card", "presets", "teach", "identity", "plan", "extract",
    "recompute", "verify", "matching", "scoring", "repair", "summary", "importers", "asked", "prepare", "ready",
    "inference", "ranking", "train", "pretrain", "evaluate", "seen", "beside", "gallery", "figures", "compare", "sheet",
    "doctor", "mine", "pictures", "questions", "stored_rows", "embeddings", "embed", "predict", "search", "index",
    "indexing", "graphs",
    "export", "demo", "equivalence", "cells", "testbeds", "outcomes", "claims", "study_folder",
    "study", "study_report",
)  # fmt: skip
"""Imports go up this list only (down the layout of the design). The package itself is below all."""

MAX_LINES, MAX_FUNCTION = 350, 55


@cache
def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def imports_of(path):
    """Every module that a file imports, relative ones with their dots."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            yield name
            if name in ("transformers", "dde_cache"):
                yield from (f"{name}.{alias.name}" for alias in node.names)


def name_of(path):
    parts = path.relative_to(ROOT / "dde_cache").with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def core_name(module):
    return module.split(".")[1] if module.startswith("dde_cache.") and module != "dde_cache.__version__" else ""


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in CORE}
    assert folders <= set(listed)


def test_every_file_has_its_place():
    assert {name_of(path) for path in CORE} - {"", "sample_teacher"} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    place = {"": -1, "sample_teacher": len(ORDER)} | {name: number for number, name in enumerate(ORDER)}
    own = name_of(path)
    for module in imports_of(path):
        other = core_name(module)
        if other and other != own:
            assert place[other] < place[own], f"{path.name} imports {module}, which comes after it"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_never_imports_the_console(path):
    for module in imports_of(path):
        assert module.split(".")[0] not in ("cli", "schemas", "typer", "rich", "click"), module
        assert not module.startswith(("dde_cache.cli", "dde_cache.schemas", ".")), module


def test_the_command_line_refers_to_itself_by_dots():
    for path in (ROOT / "cli").glob("*.py"):
        assert not any(module.startswith(("cli", "dde_cache.cli")) for module in imports_of(path)), path


def users_of(matches):
    return {path.name for path in PRODUCT for module in imports_of(path) if matches(module)}


def test_who_knows_what():
    assert users_of(lambda name: name.split(".")[0] in ("webdataset", "tarfile", "braceexpand")) <= {
        "samples.py",
        "write_shards.py",
        "tars.py",
        "nlvr.py",  # reads the official tar of a data set; no shards
        "official.py",  # pictures of data sets in a tar
    }
    vilt = {"vilt.py", "student.py", "twins.py", "teach.py", "preprocess.py"}
    shape_alone = {"sources.py", "initial.py", "prepare.py", "checkpoint.py", "teacher.py", "contract.py", "match.py"}
    assert users_of(lambda name: "transformers" in name and "vilt" in name.lower()) <= vilt | shape_alone
    assert users_of(lambda name: name.startswith("transformers.Vilt") and name != "transformers.ViltConfig") <= vilt
    assert users_of(lambda name: name.split(".")[0] == "zarr") <= {"arrays.py"}
    assert users_of(lambda name: name.split(".")[0] == "accelerate") <= {"fit.py", "ranks.py"}
    assert users_of(lambda name: name.split(".")[0] == "faiss") <= {"index.py"}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_no_pickle(path):
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: an error says more"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"{path}:{node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"{path}:{node.value.lineno}"
    assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve"} & {name.split(".")[0] for name in imports_of(path)}


def definitions(node, private=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            hidden = private or child.name.startswith("_")
            yield child, hidden
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, hidden)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_described(path):
    module = tree_of(path)
    assert ast.get_docstring(module), path
    for node, private in definitions(module):
        if not private:
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name}"


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    """Docstrings not counted."""
    module = tree_of(path)
    first = module.body[0].end_lineno
    assert len(path.read_text().splitlines()) - first <= MAX_LINES
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION, f"{path}:{node.lineno}: {node.name} has {lines} lines"
