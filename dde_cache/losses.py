"""Distillation losses: the published dense attention loss, its sparse form, and the soft-label losses.

DiDE (arXiv 2112.08723): L_attn = mean over heads and text queries of KL(teacher P_t2i || student P_t2i) + the same for
image queries and P_i2t, in fp32, without a temperature.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dde_cache.attention import Attention, SparseAttention, attention_logits, mask_keys

Tail = Literal["bucket", "uniform", "renormalise"]


def log_attention(
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b h k d"],
    key_mask: Bool[Tensor, "b k"],
    *,
    mean_heads: bool = False,
) -> Float[Tensor, "b h q k"]:
    """Log-probabilities of the student's attention over the valid keys, in fp32; scale d ** -0.5.

    With `mean_heads` the probabilities are averaged over the heads, and the head axis has length 1.
    """
    log = mask_keys(attention_logits(query, key, query.shape[-1] ** -0.5), key_mask).log_softmax(-1)
    return log.logsumexp(1, keepdim=True) - math.log(log.shape[1]) if mean_heads else log


def dense_kl(teacher: Float[Tensor, "b h q k"], student: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q"]:
    """KL(teacher || student) of each row, in nats.

    Args:
        teacher: probabilities; exactly 0 on padded keys.
        student: log-probabilities; finite everywhere (see `attention.mask_keys`).
    """
    # xlogy is 0 where the teacher is 0, with gradient 0; the student's lowest finite value never becomes inf * 0.
    return (torch.xlogy(teacher, teacher) - teacher * student).sum(-1)


def sparse_kl(
    teacher: SparseAttention,
    student: Float[Tensor, "b h q k"],
    key_mask: Bool[Tensor, "b k"],
    tail: Tail = "bucket",
) -> Float[Tensor, "b h q"]:
    """KL(teacher || student) of each row when only the teacher's strongest keys and its tail mass are known.

    Args:
        teacher: kept weights and tail mass of each row.
        student: log-probabilities of every key; finite everywhere.
        key_mask: valid keys.
        tail: `bucket` treats all other keys as one outcome: never negative, never above the dense KL (the grouping
            property of KL). `uniform` spreads the tail evenly over the other valid keys. `renormalise` forgets the tail
            on the teacher's side only: the student is pushed onto the kept keys.
    """
    kept = teacher.weight > 0
    log_kept = student.gather(-1, teacher.index)
    weight, mass = teacher.weight, teacher.tail
    if tail == "renormalise":
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return (torch.xlogy(weight, weight) - weight * log_kept).sum(-1)
    known = (torch.xlogy(weight, weight) - weight * log_kept).sum(-1)
    # Empty slots all point at key 0 and add 0 there, so they cannot hide a kept key 0.
    taken = torch.zeros_like(student).scatter_add(-1, teacher.index, kept.to(student.dtype)) > 0
    rest = key_mask[:, None, None, :] & ~taken
    open_rows = (mass > 0) & rest.any(-1)
    if tail == "uniform":
        count = rest.sum(-1).clamp_min(1)
        # Not log(mass / count): the smallest masses would become log(0).
        negative_entropy = torch.xlogy(mass, mass) - mass * count.log()
        even = negative_entropy - mass / count * torch.where(rest, student, 0.0).sum(-1)
        return known + torch.where(open_rows, even, 0.0)
    others = torch.where(rest, student, torch.finfo(student.dtype).min)
    log_rest = torch.where(open_rows[..., None], others, 0.0).logsumexp(-1)
    return known + torch.where(open_rows, torch.xlogy(mass, mass) - mass * log_rest, 0.0)


def attention_kl(
    teacher: Attention, student: Float[Tensor, "b h q k"], key_mask: Bool[Tensor, "b k"], tail: Tail = "bucket"
) -> Float[Tensor, "b h q"]:
    """KL(teacher || student) of each row: `sparse_kl`, or `dense_kl` of whole rows, where `tail` has no meaning."""
    if isinstance(teacher, SparseAttention):
        return sparse_kl(teacher, student, key_mask, tail)
    return dense_kl(teacher, student)


def weighted_sum(rows: Float[Tensor, "b h q"], row_weight: Float[Tensor, "b q"]) -> Float[Tensor, ""]:
    """Sum over weighted query rows of the mean over heads."""
    return (rows * row_weight[:, None, :]).sum() / rows.shape[1]


def soft_label_sum(student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
    """KL(teacher || student) over classes at temperature 1, summed over pairs (DiDE, NLVR2 and SNLI-VE)."""
    return nn.functional.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="sum", log_target=True
    )


def label_sum(student: Float[Tensor, "b c"], label: Tensor) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, summed over the labelled pairs."""
    return nn.functional.cross_entropy(student.float(), label, reduction="sum", ignore_index=-100)


def answer_bce_sum(student: Float[Tensor, "b c"], target: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of every answer by itself, summed over answers and pairs.

    By pair, that is the mean over answers times their number (ViLT and DiDE, VQAv2).

    Args:
        student: logits.
        target: soft scores of the annotators, or the teacher's sigmoid.
    """
    return nn.functional.binary_cross_entropy_with_logits(student.float(), target.float(), reduction="sum")


def ranking_sum(
    query: Float[Tensor, "b w"],
    own: Float[Tensor, "b w"],
    candidates: Float[Tensor, "n w"],
    index: Int[Tensor, "b k"],
    teacher: Float[Tensor, "b k1"],
    scale: Float[Tensor, ""],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher || student) over the true partner and the candidates of each query, summed (LoopITR, 2203.05465).

    The teacher's distribution is softmax(scores / temperature), the student's softmax(scale x cosines). A query without
    candidates adds 0. In fp32, inside autocast too.

    Args:
        query: pooled vectors; normalised here, as the others.
        own: those of their true partners.
        candidates: vectors of candidates.
        index: which of them are each query's; -1: none.
        teacher: scores of the true partner, then of the candidates (k + 1; where there is none, nothing is read).
        scale: factor of the cosines.
        temperature: of the teacher's scores.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, own, candidates = (nn.functional.normalize(side.float(), dim=-1) for side in (query, own, candidates))
        chosen = candidates[index.clamp_min(0)]
        cosine = torch.cat([(query * own).sum(-1, keepdim=True), (query[:, None] * chosen).sum(-1)], dim=1)
        there = torch.cat([torch.ones_like(index[:, :1], dtype=torch.bool), index >= 0], dim=1)
        lowest = torch.finfo(torch.float32).min
        student = (scale.float() * cosine).masked_fill(~there, lowest).log_softmax(-1)
        target = (teacher.float() / temperature).masked_fill(~there, lowest).softmax(-1)
        return dense_kl(target, student).sum()
