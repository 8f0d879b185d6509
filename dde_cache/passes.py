"""Passes: what a teacher is shown of a pair beside text and picture as the shard pairs them.

`masked` hides some tokens of the text, `negative` exchanges the picture for that of another sample. Either is a pure
function of (recipe, key, text slot, view), and of the shard where a picture is exchanged: its random numbers are
SHA-256 of those, so that teacher and student see the same, in whatever order and by how many processes they read.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dde_cache.errors import InputError
from dde_cache.stream import Pair
from dde_cache.views import draws

PassName = Literal["matched", "masked", "negative"]

MATCHED = "matched"
MASKED = "masked 1: 15 % of the tokens, at least one; of these 80 % [MASK], 10 % random, 10 % kept"
NEGATIVE = "negative 1: the picture of another sample of the shard"

RECIPES: Mapping[PassName, str] = {"matched": MATCHED, "masked": MASKED, "negative": NEGATIVE}
"""What `spec.passes` says, by the short names that options take, in the order in which a cache numbers them."""

UNMASKED = -100
"""Label of a token that is not to be guessed; torch's losses ignore it."""

_SHARE, _HIDDEN, _RANDOM = 0.15, 0.8, 0.1


def pass_name(recipe: str) -> PassName:
    """The short name of what an entry of `spec.passes` says.

    Raises:
        InputError: no recipe of this version; another one would mask other tokens, or take other pictures, than the
            teacher saw.
    """
    for name, known in RECIPES.items():
        if recipe == known:
            return name
    raise InputError(
        f"expected a pass that this version can make again ({'; '.join(RECIPES.values())}), got {recipe[:100]!r}; "
        "update dde-cache, or extract again"
    )


def ordered(names: Iterable[PassName]) -> tuple[PassName, ...]:
    """Passes in the order in which a cache numbers them.

    Raises:
        ValueError: one comes twice, or `matched`, of which the logits are, is not among them.
    """
    given = list(names)
    if MATCHED not in given or len(set(given)) != len(given):
        raise ValueError(
            f"expected matched and any of masked and negative, each once, got {', '.join(given) or 'none'}"
        )
    return tuple(name for name in RECIPES if name in given)


@dataclass(frozen=True)
class Words:
    """What masking needs of a tokenizer.

    Attributes:
        mask: id of the token that hides another.
        special: ids that are never masked.
        others: ids that a random token is drawn from, rising.
    """

    mask: int
    special: frozenset[int]
    others: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Words":
        """Those of a Hugging Face tokenizer.

        Raises:
            InputError: it has no mask token, or nothing but special ones.
        """
        special = frozenset(tokenizer.all_special_ids)
        others = tuple(sorted(set(tokenizer.get_vocab().values()) - special))
        if tokenizer.mask_token_id is None or not others:
            raise InputError(
                "the masked pass needs a tokenizer with a mask token and words, the teacher's has none; leave masked "
                "out of --passes"
            )
        return cls(int(tokenizer.mask_token_id), special, others)


def mask_tokens(
    ids: Sequence[int], words: Words, key: str, text: int, view: int = 0, recipe: str = MASKED
) -> tuple[list[int], list[int]]:
    """Hide tokens of one text (BERT, arXiv 1810.04805, section 3.1: 15 %, of these 80/10/10).

    Each token that is not special is chosen by itself; where none is, the one nearest to it. A text of special tokens
    alone stays as it is.

    Args:
        ids: its valid tokens, [CLS] and [SEP] included.
        words: of the tokenizer.
        key, text, view: of the pair.
        recipe: with its version.

    Returns:
        The tokens to read, and the tokens to guess, `UNMASKED` where there is nothing to guess.
    """
    draw = draws(f"{recipe}\n{key}\n{text}\n{view}")
    chances = {place: next(draw) for place, token in enumerate(ids) if token not in words.special}
    chosen = [place for place, chance in chances.items() if chance < _SHARE]
    if chances and not chosen:
        chosen = [min(chances, key=chances.__getitem__)]
    read, guess = list(ids), [UNMASKED] * len(ids)
    for place in chosen:
        guess[place] = ids[place]
        how, which = next(draw), next(draw)
        if how < _HIDDEN:
            read[place] = words.mask
        elif how < _HIDDEN + _RANDOM:
            read[place] = words.others[int(which * len(words.others))]
    return read, guess


def mask_batch(ids: Tensor, mask: Tensor, pairs: Sequence[Pair], words: Words) -> tuple[Tensor, Tensor]:
    """Hide tokens of a batch of texts: `mask_tokens` row by row.

    Args:
        ids: [b, t].
        mask: [b, t], 1 = valid.
        pairs: which pair each row is of.
        words: of the tokenizer.

    Returns:
        Tokens to read and tokens to guess, [b, t]; `UNMASKED` behind the valid ones.
    """
    read, guess = ids.clone(), torch.full_like(ids, UNMASKED)
    for row, (pair, count) in enumerate(zip(pairs, mask.sum(-1).tolist(), strict=True)):
        shown, hidden = mask_tokens(ids[row, :count].tolist(), words, pair.key, pair.text, pair.view)
        read[row, :count], guess[row, :count] = torch.tensor(shown), torch.tensor(hidden)
    return read, guess


def of_pass(batch: Mapping[str, Tensor], name: PassName) -> dict[str, Tensor]:
    """A batch as one of its passes shows it: what is not its own is that of the matched one."""
    if name == "matched":
        return dict(batch)
    prefix = f"{name}."
    own = {field.removeprefix(prefix): value for field, value in batch.items() if field.startswith(prefix)}
    return {field: value for field, value in batch.items() if not field.startswith("target.")} | own


def plain(text: str) -> str:
    """A text without what does not change its meaning: case and spaces."""
    return " ".join(text.casefold().split())


def identities(contents: Sequence[bytes]) -> Int[Tensor, " b"]:
    """One number for each content, equal where contents are: eight bytes of SHA-256."""
    digests = (hashlib.sha256(content).digest()[:8] for content in contents)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
