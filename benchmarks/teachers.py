"""Teachers with fused attention, and without what nobody asked for, against the stock modules with hooks.

Measured, by family and by turns, on the same random batch: one forward pass with the maps of the last layer. `stock`:
the model library's attention modules, which write out every weight, with hooks on the last layer's queries and keys,
and the head. `fused`: the same with torch's fused attention. `fused, no logits`: the pass ends where the last layer's
queries and keys are there. Before that, maps and logits are compared with those of `stock`: what they differ by is
printed, and the run fails where it is more than 1e-5 (float32; of logits by their largest).

Limit: the `fused` pass with attention that is next to no work (each query gets the mean of the values).

    python benchmarks/teachers.py
    python benchmarks/teachers.py --device cuda --dtype bfloat16
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import CLOCKS, arguments, by_turns, print_machine, print_ratio, timed
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    FlavaConfig,
    FlavaForPreTraining,
    LxmertConfig,
    LxmertForQuestionAnswering,
    ViltConfig,
    ViltForQuestionAnswering,
)

from dde_cache.preprocess import PixelBatch, RegionBatch, TokenBatch
from dde_cache.teacher import FusionTeacher, TeacherOutput
from dde_cache.teachers import blip as blip_family
from dde_cache.teachers import quick

REGIONS, FEATURES = 36, 2048
TINY_ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TINY_TEXT = TINY_ENCODER | {"vocab_size": 200, "max_position_embeddings": 48}
TINY_IMAGE = TINY_ENCODER | {"image_size": 96, "patch_size": 32}


def vilt(full: bool) -> Any:
    """ViLT-B/32."""
    return ViltForQuestionAnswering(ViltConfig(num_labels=3129) if full else ViltConfig(**(TINY_TEXT | TINY_IMAGE)))


def bridgetower(full: bool) -> Any:
    """BridgeTower-base."""
    if full:
        return BridgeTowerForImageAndTextRetrieval(BridgeTowerConfig())
    wide = {"hidden_size": 64}
    vision = {"num_hidden_layers": 2, "image_size": 96, "patch_size": 32} | wide
    shape = BridgeTowerConfig(text_config=TINY_TEXT | wide, vision_config=vision, num_hidden_layers=2, **wide)
    return BridgeTowerForImageAndTextRetrieval(shape)


def blip(full: bool) -> Any:
    """BLIP-base, its image-text matching."""
    if full:
        return BlipForImageTextRetrieval(BlipConfig(text_config={"num_attention_heads": 12}))
    return BlipForImageTextRetrieval(BlipConfig(text_config=TINY_TEXT, vision_config=TINY_IMAGE))


def flava(full: bool) -> Any:
    """FLAVA-full."""
    if full:
        return FlavaForPreTraining(FlavaConfig(init_codebook=False))
    shape = FlavaConfig(
        hidden_size=48, text_config=TINY_TEXT, image_config=TINY_IMAGE, multimodal_config=TINY_ENCODER,
        init_codebook=False,
    )  # fmt: skip
    return FlavaForPreTraining(shape)


def lxmert(full: bool) -> Any:
    """LXMERT-base."""
    few = {"l_layers": 1, "x_layers": 2, "r_layers": 1, "num_qa_labels": 5}
    tiny = TINY_TEXT | {"num_hidden_layers": None} | few
    return LxmertForQuestionAnswering(LxmertConfig() if full else LxmertConfig(**tiny))


FAMILIES: dict[str, Callable[[bool], Any]] = {
    "vilt": vilt,
    "bridgetower": bridgetower,
    "blip": blip,
    "flava": flava,
    "lxmert": lxmert,
}


def spread(model: nn.Module) -> nn.Module:
    """Weights that keep the spread of what they read: with fresh ones all attention is uniform, and hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def batch_of(teacher: FusionTeacher, rows: int, words: int, device: str) -> tuple[TokenBatch, PixelBatch | RegionBatch]:
    """Random texts, the first as long as the longest, the last half as long, and random pictures or regions."""
    shape = teacher.shape
    ids = torch.randint(5, shape.words, (rows, words))
    length = torch.linspace(words, words / 2, rows).round().long()
    mask = (torch.arange(words) < length[:, None]).long()
    padding = getattr(teacher.config.get_text_config(), "pad_token_id", 0) or 0
    tokens = TokenBatch(torch.where(mask.bool(), ids, padding).to(device), mask.to(device))
    if teacher.family.name == "lxmert":
        features, boxes = torch.randn(rows, REGIONS, FEATURES), torch.rand(rows, REGIONS, 4)
        return tokens, RegionBatch(features.to(device), boxes.to(device), torch.full((rows,), REGIONS))
    side = shape.side or teacher.config.image_size
    grid = torch.full((rows, 2), side // shape.patch_size)
    return tokens, PixelBatch(torch.randn(rows, 3, side, side, device=device), grid)


def ways_of(teacher: FusionTeacher, rows: int, words: int, device: str) -> dict[str, Callable[[], TeacherOutput]]:
    """The ways that are compared, each a forward pass."""
    tokens, picture = batch_of(teacher, rows, words, device)
    last, replaced = teacher.layers - 1, type(teacher.family).attention

    def run(*, fused: bool, logits: bool) -> TeacherOutput:
        teacher.family.attention = replaced if fused else {}  # type: ignore[misc]
        output = teacher(tokens, [picture], [last], logits=logits)
        if device != "cpu":
            torch.cuda.synchronize()
        return output

    return {
        "stock": lambda: run(fused=False, logits=True),
        "fused": lambda: run(fused=True, logits=True),
        "fused, no logits": lambda: run(fused=True, logits=False),
        "no attention": lambda: without_attention(lambda: run(fused=True, logits=True)),
    }


def without_attention(run: Callable[[], TeacherOutput]) -> TeacherOutput:
    """A pass whose attention is next to no work."""

    def mean(query: Tensor, _key: Tensor, value: Tensor, **_options: object) -> Tensor:
        return value.mean(2, keepdim=True).expand(query.shape)

    kernel = "scaled_dot_product_attention"
    with mock.patch.object(quick, kernel, mean), mock.patch.object(blip_family, kernel, mean):
        return run()


def difference(one: TeacherOutput, other: TeacherOutput, layer: int) -> tuple[float, float]:
    """Largest difference of two passes' maps, and of their logits by the largest of them."""
    maps = [
        float((getattr(one.attention[0, layer], name) - getattr(other.attention[0, layer], name)).abs().max())
        for name in ("t2i", "i2t")
        if getattr(one.attention[0, layer], name) is not None
    ]
    if one.logits is None or other.logits is None:
        return max(maps), 0.0
    return max(maps), float((one.logits - other.logits).abs().max() / one.logits.abs().max())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--words", type=int, default=40, help="tokens of the longest text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    given = parser.parse_args()
    for name in given.families:
        measure(name, given)
    print(f"  {given.dtype} on {given.device}, texts of up to {given.words} tokens, random weights")
    print_machine()


def measure(name: str, given: argparse.Namespace) -> None:
    """Compare the ways of one family and print their ratios."""
    full = given.size == "full"
    torch.manual_seed(0)
    model = spread(FAMILIES[name](full)).to(given.device, getattr(torch, given.dtype))
    # Batches are random tensors: no processor is asked.
    teacher = FusionTeacher(model, None)  # type: ignore[arg-type]
    rows = given.batch_size or (8 if full else 2)
    ways = ways_of(teacher, rows, given.words, given.device)
    outputs = {way: run() for way, run in ways.items()}
    for way in ("fused", "fused, no logits"):
        maps, logits = difference(outputs["stock"], outputs[way], teacher.layers - 1)
        print(f"  {name}, {way}: maps differ by at most {maps:.1e}, logits by {logits:.1e}")
        if given.dtype == "float32" and max(maps, logits) > 1e-5:
            raise SystemExit(f"expected the maps and logits of the stock modules to 1e-5, got {maps:.1e}, {logits:.1e}")
    timings = {way: lambda run=run: timed(run, CLOCKS[given.clock]) for way, run in ways.items()}
    seconds = by_turns(timings, given.repeats or (5 if full else 1), warm_up=int(full))
    limit = statistics.median(seconds["no attention"]) / statistics.median(seconds["stock"])
    for way in ("fused", "fused, no logits"):
        print_ratio(
            f"{name}, {way} / stock",
            seconds[way],
            seconds["stock"],
            limit=f"{limit:.3f}: attention that is no work, logits wanted; stock: "
            f"{1000 * statistics.median(seconds['stock']) / rows:.1f} ms a pair",
        )


if __name__ == "__main__":
    main()
