"""How far maps that `train --remap-flips` mirrors lie from those that the teacher gives of the mirrored picture.

Measured: mean KL(teacher on the mirrored picture || stored maps with the image axis permuted), over heads and valid
query rows, in float32, of the teacher's last layer. Compared with two controls: the stored maps as they are, not
permuted, and rows that are all alike (uniform over the valid keys), which know nothing. And the teacher's answers,
which are not remapped: how often it gives the mirrored picture another one.

With `--teacher` a teacher of your own on `--shards`; without, the sample teacher on generated pictures.

Limit: 0, of an equivariant teacher.

    python benchmarks/remap.py
"""

import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from common import TINY, arguments, print_machine, print_ratio, save_teacher

from dde_cache.importers.shapes import shapes
from dde_cache.mirror import mirrored_order
from dde_cache.preprocess import PixelBatch
from dde_cache.samples import Shard, open_shards
from dde_cache.teacher import SAMPLE_TEACHER, FusionTeacher, resolve
from dde_cache.write_shards import write_shards


def divergence(true: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean KL over heads and rows of one pair's maps [h, q, k]."""
    return (true * (true.clamp_min(1e-30).log() - other.clamp_min(1e-30).log())).sum(-1).mean()


def compare(teacher: FusionTeacher, shards: list[Shard], pairs: int) -> None:
    """Print the ratios."""
    layer = teacher.layers - 1
    sums: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, list[float]] = defaultdict(list)
    for sample in (sample for shard in shards for sample in shard):
        picture = teacher.preprocessor.stack([teacher.preprocessor.pixels(sample.images[0].decode())])
        mirrored = PixelBatch(picture.pixels.flip(-1), picture.grid)
        order = mirrored_order(picture.grid[0].tolist())
        for text in sample.texts:
            tokens = teacher.preprocessor.tokens([text.text])
            stored, true = (teacher(tokens, [one], [layer]) for one in (picture, mirrored))
            before, after = stored.attention[0, layer], true.attention[0, layer]
            for direction, kept, exact, moved in (
                ("t2i", before.t2i[0], after.t2i[0], before.t2i[0][..., order]),
                ("i2t", before.i2t[0], after.i2t[0], before.i2t[0][:, order]),
            ):
                sums[f"{direction} remapped"].append(float(divergence(exact, moved)))
                sums[f"{direction} as stored"].append(float(divergence(exact, kept)))
                sums[f"{direction} uniform"].append(
                    float(divergence(exact, torch.full_like(exact, 1 / exact.shape[-1])))
                )
            sides = "left" in text.text or "right" in text.text
            changed = int(stored.logits.argmax()) != int(true.logits.argmax())
            answers["texts with left or right" if sides else "other texts"].append(float(changed))
        if len(sums["t2i remapped"]) >= pairs:
            break
    mean = {name: sum(values) / len(values) for name, values in sums.items()}
    for direction in ("t2i", "i2t"):
        for control in ("as stored", "uniform"):
            print_ratio(
                f"KL of remapped maps / KL of maps {control}, {direction}",
                [mean[f"{direction} remapped"]],
                [mean[f"{direction} {control}"]],
                limit=f"0: no error; KL {mean[f'{direction} remapped']:.4f} remapped, "
                f"{mean[f'{direction} {control}']:.4f} {control}, nats a row, {len(sums['t2i remapped'])} pairs",
            )
    for name, changed in answers.items():
        print(f"  another answer on the mirrored picture, {name}: {sum(changed) / len(changed):.3f} of {len(changed)}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--teacher", default=SAMPLE_TEACHER, help="folder, hub id, or `sample`")
    parser.add_argument("--shards", help="samples; without them, generated ones")
    parser.add_argument("--pairs", type=int, default=2000, help="about so many")
    given = parser.parse_args()
    full = given.size == "full"
    with tempfile.TemporaryDirectory() as name:
        folder, teacher = Path(name), given.teacher
        if teacher == SAMPLE_TEACHER and not (Path(resolve(SAMPLE_TEACHER)) / "model.safetensors").is_file():
            teacher = str(folder / "teacher")
            save_teacher(folder / "teacher", TINY)
            print("  the sample teacher is not there; a random one stands in for it")
        if given.shards is None:
            count = 500 if full else 4
            write_shards(
                shapes("test", count), folder / "shards", source="shapes", split="test", shard_size=1000, arguments={}
            )
        shards = open_shards(given.shards or folder / "shards")
        compare(FusionTeacher.load(teacher), list(shards), given.pairs if full else 16)
    print_machine()


if __name__ == "__main__":
    main()
