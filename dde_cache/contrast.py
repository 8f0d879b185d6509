"""Contrast of the pairs of a batch, over all ranks: what belongs together, and what is told apart.

What belongs together is told by content, in pre-training and in fine-tuning alike: the same picture or text may come in
two samples, which are then no strangers. Shapes: m pairs of this rank, n of all ranks, w width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dde_cache.ranks import Ranks


@dataclass(frozen=True)
class Everyone:
    """Pooled vectors of the pairs of all ranks, and what tells them apart; this rank's are `own`.

    Attributes:
        text, image: pooled vectors.
        text_id, picture_id: equal where texts, or pictures, are the same.
        valid: rows that are pairs; the others fill up a rank that has fewer.
        own: rows of this rank.
    """

    text: Float[Tensor, "n w"]
    image: Float[Tensor, "n w"]
    text_id: Int[Tensor, " n"]
    picture_id: Int[Tensor, " n"]
    valid: Bool[Tensor, " n"]
    own: slice

    @cached_property
    def together(self) -> tuple[Bool[Tensor, "m n"], Bool[Tensor, "m n"]]:
        """Which pictures belong to this rank's texts, and which texts to its pictures: some pair has both."""
        text = (self.text_id[:, None] == self.text_id) & self.valid
        picture = (self.picture_id[:, None] == self.picture_id) & self.valid
        # Counts of pairs that have the one and the other; exact in fp32.
        with torch.autocast(self.text.device.type, enabled=False):
            return text[self.own].float() @ picture.float() > 0, picture[self.own].float() @ text.float() > 0


def everyone(
    ranks: Ranks, text: Float[Tensor, "m w"], image: Float[Tensor, "m w"], batch: Mapping[str, Tensor], most: int
) -> Everyone:
    """Gather the pooled vectors of all ranks, with gradients.

    Args:
        ranks: that take this step together.
        text, image: pooled vectors of this rank's pairs.
        batch: with `text` and `picture` [m], as `PairDataset` gives them with `identities`.
        most: pairs of the rank that has the most.
    """
    # In one message: the ranks then speak in the same order backwards, too.
    both = ranks.gather(torch.cat([text, image], dim=-1), most)
    ids = torch.stack([batch["text"], batch["picture"], torch.ones_like(batch["text"])], dim=-1)
    text_id, picture_id, valid = ranks.gather(ids, most).unbind(-1)
    first, width = ranks.number * most, text.shape[1]
    own = slice(first, first + len(ids))
    return Everyone(both[:, :width], both[:, width:], text_id, picture_id, valid > 0, own)


def contrastive_sum(everyone: Everyone, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Contrast over all pairs of the global batch, both ways (CLIP, arXiv 2103.00020), halved; summed over this rank's.

    The target is soft: several texts of a picture, and several pictures of a text, are all right, each with an equal
    share of the probability.

    Args:
        everyone: the pairs of all ranks.
        scale: factor of the cosines, 1 / temperature.
    """
    total = torch.zeros((), device=everyone.text.device)
    for logits, together in zip(similarities(everyone, scale), everyone.together, strict=True):
        target = together / together.sum(-1, keepdim=True)
        chances = logits.masked_fill(~everyone.valid, torch.finfo(torch.float32).min).log_softmax(-1)
        total = total - (target * chances).sum() / 2
    return total


def similarities(everyone: Everyone, scale: Float[Tensor, ""]) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n"]]:
    """Scaled cosines, in float32 whatever the precision: of this rank's texts with all pictures, and the reverse."""
    with torch.autocast(everyone.text.device.type, enabled=False):
        text, image = (nn.functional.normalize(side.float(), dim=-1) for side in (everyone.text, everyone.image))
        own, factor = everyone.own, scale.float()
        return factor * text[own] @ image.T, factor * image[own] @ text.T
