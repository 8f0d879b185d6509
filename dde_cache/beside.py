"""The student of a run, as it stands beside its teacher on a page: model, answers, layers, and the maps of its heads.

What `RUN/model` holds has no maps between heads: they serve training alone. The newest checkpoint has them, together
with the student of that step. So of a run with maps this student is shown, whole: the one of `RUN/model` may be of an
earlier step, and maps of another step would say nothing about it.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dde_cache.batches import torch_device
from dde_cache.choices import DistillConfig, LayerPair
from dde_cache.configs import read_yaml
from dde_cache.distill import ATTENTION_MAPS
from dde_cache.errors import InputError, RunError, first_line
from dde_cache.initial import MODEL, load_student
from dde_cache.match import AttentionMaps, Raw, heads_fit
from dde_cache.preprocess import Preprocessor
from dde_cache.runs import CHECKPOINTS, CONFIG, INPUTS
from dde_cache.spec import TargetSpec
from dde_cache.store import Cache
from dde_cache.student import DualEncoder

_SETTINGS = ("layer", "layer_map", "heads", "directions")

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Beside:
    """A run's student, its processor and answers, and what it learnt from.

    Attributes:
        run: its folder.
        model: in eval mode.
        preprocessor: that it is used with.
        labels: its answers.
        choices: of the run, as far as they say what is compared with what.
        maps: from its heads to the teacher's; `Raw` where they are compared as they are.
        notes: what is to be known of it, in words.
    """

    run: Path
    model: DualEncoder
    preprocessor: Preprocessor
    labels: tuple[str, ...]
    choices: DistillConfig
    maps: nn.Module = field(default_factory=Raw)
    notes: tuple[str, ...] = ()

    @property
    def mean_heads(self) -> bool:
        """Whether it was trained on the heads' average."""
        return self.choices.heads == "mean"


class ShownLayer(NamedTuple):
    """What is shown: the teacher's layer, the student's block beside it (None: the last), and why, if that is no matter
    of course."""

    number: int
    block: int | None = None
    learnt: str | None = None


def load_beside(run: Path, device: str) -> Beside:
    """The student of a run.

    Raises:
        RunError: the run has no model that can be read, or settings of no run.
        InputError: no such device.
    """
    target = torch_device(device)
    model, preprocessor = load_student(run)
    settings = read_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
    try:
        choices = DistillConfig.model_validate({name: settings[name] for name in _SETTINGS if name in settings})
    except ValidationError as error:
        raise RunError(f"{run / CONFIG}: expected the settings of a run, got {error.errors()[0]['msg']}") from error
    labels = tuple(model.config.id2label[number] for number in range(model.config.num_labels))
    notes = ("the student learnt without attention",) if settings.get("attention_weight") == 0 else ()
    return Beside(run, model.to(target).eval(), preprocessor, labels, choices, notes=notes)


def shown_layer(spec: TargetSpec, asked: int | None, student: Beside | None) -> ShownLayer:
    """The layer that is asked for, or that a student learns from, or the last.

    Raises:
        InputError: the cache lacks the one that the student learns from.
    """
    if student is None:
        return ShownLayer(spec.layers[-1] if asked is None else asked)
    pairs = student.choices.pairs(spec.layers)
    mapped = student.choices.layer_map
    # The student's blocks are numbered where there is a map.
    taken = max(pairs, key=lambda pair: pair.student or 0)
    if asked is not None:
        taken = next((pair for pair in pairs if pair.teacher == asked), LayerPair(asked, None))
    elif taken.teacher not in spec.layers:
        raise InputError(
            f"the run learns from layer {taken.teacher}, but the cache has {list(spec.layers)}; pass --layer to "
            "look at one of these"
        )
    if mapped is None:
        return ShownLayer(taken.teacher)
    beside = "its last block" if taken.student is None else f"block {taken.student}"
    which = "" if asked is not None else ", the last of its layer map; --layer shows another"
    return ShownLayer(taken.teacher, taken.student, f"{beside} of the student beside it{which}")


def fitted(student: Beside, cache: Cache, layer: ShownLayer) -> Beside:
    """The student with what brings its heads to the teacher's: itself where they are compared as they are, otherwise
    the one of the newest checkpoint, with its maps. Its notes say what of this is no matter of course.

    Raises:
        RunError: its heads are others, and no checkpoint has maps of this layer.
    """
    spec, only = cache.spec, student.choices.directions
    notes = [] if layer.learnt is None else [layer.learnt]
    if only != "both" and spec.directions != (only,):
        notes.append(f"the student learnt from {only} attention alone")
    student = replace(student, notes=(*student.notes, *notes))
    twins = student.model.config.text is None and student.model.config.image is None
    average = student.mean_heads or spec.heads == "mean"
    if twins or heads_fit(student.model, spec.teacher_heads, mean_heads=average):
        return student
    found = sorted(path for path in (student.run / CHECKPOINTS).glob("*") if path.name.isdigit())
    if not found:
        raise _lacking(student, spec, f"its newest checkpoint would, but {student.run} has none in {CHECKPOINTS}/")
    return _of_checkpoint(found[-1], student, cache, layer)


def _of_checkpoint(checkpoint: Path, student: Beside, cache: Cache, layer: ShownLayer) -> Beside:
    """The student of a checkpoint, with its maps of a layer."""
    try:
        state = json.loads((checkpoint / "state.json").read_bytes())
        targets = str(json.loads((student.run / INPUTS).read_bytes())["targets"])
        held = load_file(checkpoint / "model.safetensors")
        # In pre-training the student is a part of what is fitted.
        whole = {name.removeprefix("student."): weight for name, weight in held.items()}
        names = student.model.state_dict().keys()
        sets = {name.split(".")[1] for name in whole if name.startswith(f"{ATTENTION_MAPS}.")}
        number = _number(student, cache, layer, len(sets), targets)
        prefix = f"{ATTENTION_MAPS}.{number}."
        weights = {name.removeprefix(prefix): one for name, one in whole.items() if name.startswith(prefix)}
        heads = cache.spec.teacher_heads
        maps = AttentionMaps(*student.model.towers, heads, len(weights["text_query.bias"]) // heads)
        maps.load_state_dict(weights)
        student.model.load_state_dict({name: whole[name] for name in names})
        step, best = int(state["step"]), state["best_step"]
    except _UNREADABLE as error:
        raise RunError(
            f"{checkpoint}: expected a checkpoint with the student and the maps of its heads, but it cannot be read: "
            f"{first_line(error)}; leave --run out to look at the teacher alone"
        ) from error
    note = f"the student of step {step}, the newest checkpoint, whose learned maps bring its heads to the teacher's"
    note += f" (the saved student is of step {best})" if best not in (None, step) else ""
    device = next(student.model.parameters()).device
    return replace(student, maps=maps.to(device).eval(), notes=(*student.notes, note))


def _number(student: Beside, cache: Cache, layer: ShownLayer, sets: int, targets: str) -> int:
    """Which of so many sets of maps is a layer's, in a run of such targets.

    Raises:
        RunError: none is, or they are maps to another teacher's heads.
    """
    spec = cache.spec
    if not sets:
        raise _lacking(student, spec, "its run has learned none: it did not compare attention")
    if targets not in (f"cache {cache.manifest.fingerprint}", f"teacher {spec.teacher.weights}"):
        raise _lacking(student, spec, f"those of its newest checkpoint were learned from other targets ({targets})")
    layers = [pair.teacher for pair in student.choices.pairs(spec.layers)]
    if layer.number not in layers or len(layers) != sets:
        raise _lacking(student, spec, f"its newest checkpoint has {sets} for layers {layers}, none for {layer.number}")
    return layers.index(layer.number)


def _lacking(student: Beside, spec: TargetSpec, why: str) -> RunError:
    text, image = student.model.towers
    return RunError(
        f"{student.run}: its towers' heads (text {text.heads} x {text.head_size}, image {image.heads} x "
        f"{image.head_size}) are not the teacher's {spec.teacher_heads}: they were compared through maps that only "
        f"training has, not {MODEL}/; {why}. Leave --run out to look at the teacher alone"
    )
