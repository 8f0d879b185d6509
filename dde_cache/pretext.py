"""What a dual encoder learns in pre-training beside the teacher's attention: three tasks that need no labels.

Image-text contrast, image-text matching and masked words, as they are usual (CLIP, arXiv 2103.00020; ALBEF,
arXiv 2107.07651; BERT, arXiv 1810.04805); how they are put together here is our own design (docs/pretraining.md).
Shapes: m pairs of this rank, n of all ranks, w width, c words.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dde_cache.contrast import Everyone, similarities
from dde_cache.passes import UNMASKED
from dde_cache.student import DualEncoder

MATCHING_ROWS = 3
"""Of each pair: itself, its text beside another picture, its picture beside another text."""


class Pretrainer(nn.Module):
    """A student with the heads that only pre-training needs.

    Args:
        student: with a `pretraining` head.
    """

    def __init__(self, student: DualEncoder) -> None:
        super().__init__()
        shape, width = student.config.vilt(), student.width
        self.student = student
        self.matching = nn.Linear(width, 2)
        self.condition = nn.Linear(width, width, bias=False)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(shape.vocab_size))
        # As Hugging Face draws those of the student: its deviation, and biases of 0.
        for name, parameter in self.named_parameters():
            if name.startswith(("matching.", "condition.", "transform.0.")):
                nn.init.normal_(parameter, std=student.config.initializer_range if parameter.ndim > 1 else 0.0)

    def match(self, text: Float[Tensor, "m w"], image: Float[Tensor, "m w"]) -> Float[Tensor, "m 2"]:
        """Logits of pairs not belonging together, and belonging together, from their pooled vectors."""
        return self.matching(self.student.interact(text, image))

    def words(self, states: Float[Tensor, "k w"], image: Float[Tensor, "k w"]) -> Float[Tensor, "k c"]:
        """Logits of words from text states and the pooled pictures beside them; the decoder is the word embedding."""
        hidden = self.transform(states + self.condition(image))
        return hidden @ self.student.text_tower.text_embeddings.word_embeddings.weight.T + self.word_bias


def hard_negatives(everyone: Everyone, scale: Float[Tensor, ""]) -> tuple[Int[Tensor, "2 m"], Bool[Tensor, " m"]]:
    """For each pair of this rank another picture for its text, and another text for its picture, from all ranks.

    They are drawn with probabilities proportional to exp(scale x cosine) among pairs that do not belong together with
    it (Gumbel's trick); the noise is a hash of text and picture, so that ranks, order and batch size do not change it.

    Returns:
        Rows of `everyone` (pictures, texts), and whether there is any.
    """
    own, ids = everyone.own, (everyone.text_id, everyone.picture_id)
    strange = [~together & everyone.valid for together in everyone.together]
    with torch.no_grad():
        sides = similarities(everyone, scale)
    noise = gumbel(ids[0][own], ids[1]), gumbel(ids[1][own], ids[0])
    lowest = torch.finfo(torch.float32).min
    drawn = [
        (side + one).masked_fill(~others, lowest).argmax(-1)
        for side, one, others in zip(sides, noise, strange, strict=True)
    ]
    return torch.stack(drawn), strange[0].any(-1) & strange[1].any(-1)


def gumbel(own: Int[Tensor, " m"], others: Int[Tensor, " n"]) -> Float[Tensor, "m n"]:
    """Gumbel noise that is a function of two numbers (splitmix64)."""
    state = own[:, None] * -7046029254386353131 + others
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        state = (state ^ ((state >> shift) & (2 ** (64 - shift) - 1))) * factor
    state = state ^ ((state >> 31) & (2**33 - 1))
    even = (((state >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return -(-even.log()).log().float()


def matching_logits(
    model: Pretrainer, everyone: Everyone, scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, "r 2"], Int[Tensor, " r"]]:
    """Logits of this rank's pairs, of their texts beside strange pictures and of their pictures beside strange texts.

    Returns:
        Logits, and labels: 1 belongs together, 0 does not, `UNMASKED` where no pair of the batch is strange.
    """
    text, image = everyone.text[everyone.own], everyone.image[everyone.own]
    (picture, other), found = hard_negatives(everyone, scale)
    logits = model.match(
        torch.cat([text, text, everyone.text[other]]), torch.cat([image, everyone.image[picture], image])
    )
    strange = torch.where(found, 0, UNMASKED)
    return logits, torch.cat([torch.ones_like(strange), strange, strange])


def word_logits(
    model: Pretrainer, states: Float[Tensor, "m t w"], image: Float[Tensor, "m w"], guess: Int[Tensor, "m t"]
) -> tuple[Float[Tensor, "k c"], Int[Tensor, " k"]]:
    """Logits of the hidden words of a batch, and the words.

    Args:
        model: with its heads.
        states: of the masked texts.
        image: pooled vectors of their pictures.
        guess: words, `UNMASKED` where there is nothing to guess.
    """
    chosen = guess != UNMASKED
    beside = image[:, None].expand(-1, states.shape[1], -1)
    return model.words(states[chosen], beside[chosen]), guess[chosen]


def class_sum(logits: Float[Tensor, "r c"], label: Int[Tensor, " r"]) -> Float[Tensor, ""]:
    """Cross-entropy summed over rows that have a label."""
    return nn.functional.cross_entropy(logits.float(), label, reduction="sum", ignore_index=UNMASKED)


def right_sum(logits: Float[Tensor, "r c"], label: Int[Tensor, " r"]) -> Float[Tensor, ""]:
    """How many rows have their largest logit at the label."""
    return (logits.detach().argmax(-1) == label).sum().float()
