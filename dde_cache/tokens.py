"""Texts that teacher and student cut into other tokens: what the student reads, and which token lies in which."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dde_cache.preprocess import Preprocessor, TokenBatch


class Spans(NamedTuple):
    """Tokens of some texts, where in the text each lies (start, end; in characters), and which are special."""

    tokens: TokenBatch
    place: Int[np.ndarray, "b n 2"]
    special: Bool[np.ndarray, "b n"]


def with_tokenizer(preprocessor: Preprocessor, tokenizer: Any, text_length: int) -> Preprocessor:
    """The same pictures, with other tokens, of which at most `text_length` are read."""
    family = type(preprocessor.processor)
    processor = family(preprocessor.processor.image_processor, tokenizer)
    return Preprocessor(processor, preprocessor.patch_size, text_length, preprocessor.side)


def same_tokens(one: Preprocessor, other: Preprocessor) -> bool:
    """Whether two processors cut every text into the same tokens (but for its length)."""
    return one.tokenizer_json() == other.tokenizer_json()


def spans(preprocessor: Preprocessor, texts: Sequence[str]) -> Spans:
    """Tokenize as `Preprocessor.tokens` does, and say where the tokens lie."""
    encoded = preprocessor.processor.tokenizer(
        list(texts),
        truncation=True,
        max_length=preprocessor.text_length,
        padding="longest",
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=True,
    )
    mask = np.asarray(encoded["attention_mask"], np.int64)
    tokens = TokenBatch(torch.tensor(encoded["input_ids"]), torch.from_numpy(mask))
    special = np.asarray(encoded["special_tokens_mask"], bool) & (mask > 0)
    return Spans(tokens, np.asarray(encoded["offset_mapping"], np.int64).reshape(*mask.shape, 2), special)


def overlaps(teacher: Spans, student: Spans) -> Int[np.ndarray, "b t s"]:
    """Characters that each token of the student shares with each of the teacher's.

    Special tokens have no characters; they are matched by what they are for: one that opens a text (CLS) with one that
    opens it, one that ends it (SEP) with one that ends it. All others have no counterpart.
    """
    start = np.maximum(teacher.place[:, :, None, 0], student.place[:, None, :, 0])
    end = np.minimum(teacher.place[:, :, None, 1], student.place[:, None, :, 1])
    shared = np.clip(end - start, 0, None)
    rows = np.arange(len(shared))
    for last in (False, True):
        places = [_edge(side, last=last) for side in (teacher, student)]
        both = [side.special[rows, place] for side, place in zip((teacher, student), places, strict=True)]
        # A text of one special token alone opens with it.
        both += [place > 0 for place in places] if last else []
        shared[rows, places[0], places[1]] += np.logical_and.reduce(both)
    return shared


def _edge(side: Spans, *, last: bool) -> Int[np.ndarray, " b"]:
    mask = side.tokens.mask.numpy()
    return mask.shape[1] - 1 - mask[:, ::-1].argmax(1) if last else mask.argmax(1)


class TokenAligner:
    """Reads texts twice.

    Args:
        teacher: whose tokens the targets are of.
        student: whose tokens the text tower reads.
    """

    def __init__(self, teacher: Preprocessor, student: Preprocessor) -> None:
        self.teacher, self.student = teacher, student

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`student_ids` and `student_mask` [b, s], and `token_overlap` [b, t, s], float32: shared characters."""
        own, others = spans(self.teacher, texts), spans(self.student, texts)
        return {
            "student_ids": others.tokens.ids,
            "student_mask": others.tokens.mask,
            "token_overlap": torch.from_numpy(overlaps(own, others)).float(),
        }

    def lacking(self, texts: Sequence[str]) -> list[str]:
        """Tokens of the teacher that the student has nothing of, each with its text."""
        own, others = spans(self.teacher, texts), spans(self.student, texts)
        alone = (overlaps(own, others).sum(-1) == 0) & (own.tokens.mask.numpy() > 0)
        words = self.teacher.processor.tokenizer
        return [
            f"{words.convert_ids_to_tokens(int(own.tokens.ids[row, place]))!r} in {texts[row]!r:.80}"
            for row, place in np.argwhere(alone)
        ]

    def cut(self, texts: Sequence[str]) -> int:
        """How many texts the student does not read to their end."""
        return sum(length > self.student.text_length for length in self.student.lengths(texts))
