"""Whether a batch is what the teacher read."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dde_cache.errors import CacheError
from dde_cache.stream import Pair


def check_inputs(batch: Mapping[str, Tensor], pairs: Sequence[Pair]) -> None:
    """Refuse targets that the teacher made from other tokens or another patch grid than this batch has."""
    if "target.grid" not in batch:
        return
    length = batch["target.token_ids"].shape[1]
    ids = (batch["input_ids"] * batch["attention_mask"])[:, :length]
    grids = [
        (f"patch grid{' of image 1' if slot else ''}", batch[name], batch[f"grid{slot}"])
        for slot, name in enumerate(("target.grid", "target.grid1"))
        if name in batch
    ]
    for name, expected, got in (("tokens", batch["target.token_ids"], ids), *grids):
        wrong = [0] if expected.shape != got.shape else (expected != got).any(-1).nonzero()[:, 0].tolist()
        if wrong:
            pair = pairs[wrong[0]]
            raise CacheError(
                f"sample {pair.key!r}, text {pair.text}: the teacher saw {name} {expected[wrong[0]].tolist()}, here "
                f"they are {got[wrong[0]].tolist()}; tokenizer or image processor are not the teacher's"
            )
