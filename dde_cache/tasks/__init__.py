"""What a student is trained for: from labels to target tensors, its head, its losses, its metric.

One file a task. A task of one's own is a class in any importable module, named `module:Class`; see
docs/how-to/own-task.md.
"""

import importlib
import re

from dde_cache.errors import InputError
from dde_cache.tasks.classification import Classification
from dde_cache.tasks.contract import SingleLabel, Task
from dde_cache.tasks.entailment import Entailment
from dde_cache.tasks.nlvr2 import Nlvr2
from dde_cache.tasks.retrieval import Retrieval
from dde_cache.tasks.vqa import Vqa

__all__ = ["TASKS", "SingleLabel", "Task", "is_own", "load_task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "vqa": Vqa,
    "nlvr2": Nlvr2,
    "entailment": Entailment,
    "retrieval": Retrieval,
}
"""Tasks by name."""

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether a name refers to code of the user's own, `module:Class`."""
    return ":" in name


def load_task(name: str) -> Task:
    """Make a task by its name in `TASKS`, or from `module:Class`, whose module is imported.

    Raises:
        InputError: there is no such task, the module cannot be imported, or the class is no `Task`.
    """
    if name in TASKS:
        return TASKS[name]()
    if not _OWN.fullmatch(name):
        raise InputError(f"expected --task {', '.join(TASKS)}, or module:Class for your own, got {name!r}")
    module, _, own = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--task {name}: cannot be imported ({error}); the module's folder must be in PYTHONPATH, or installed"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"--task {name}: expected a class derived from dde_cache.tasks.Task, got {found!r}")
    try:
        return found()
    except TypeError as error:
        raise InputError(f"--task {name}: cannot be made without arguments: {error}") from error
