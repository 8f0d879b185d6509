"""The oracle of every loss here is `reference_kl` in NumPy float64, or the published implementation's numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, pad

from dde_cache.attention import SparseAttention, block_softmax, densify, mask_keys, sparsify
from dde_cache.losses import (
    attention_kl,
    dense_kl,
    label_sum,
    log_attention,
    soft_label_sum,
    sparse_kl,
    weighted_sum,
)

GOLDEN = Path(__file__).parent / "golden" / "dide_attention_loss.npz"
CASES = ("no_padding", "text_padding", "image_padding", "both_peaky", "single_valid_token")
SIDES = ("student_text_q", "student_text_k", "student_image_q", "student_image_k")
TAILS = ("bucket", "uniform", "renormalise")


def dense_loss(teacher, student, key_mask):
    return dense_kl(teacher, student)


def sparse_loss(tail):
    return lambda teacher, student, key_mask: sparse_kl(sparsify(teacher, None), student, key_mask, tail)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", [dense_loss, *map(sparse_loss, TAILS)], ids=["dense", *TAILS])
def test_published_loss_and_gradients(case, loss):
    with np.load(GOLDEN) as golden:
        case = {name.split("/")[1]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith(case)}
    student = {side: case[side].requires_grad_() for side in SIDES}
    text_mask, image_mask = case["text_mask"].bool(), case["image_mask"].bool()
    length, scale = text_mask.shape[1], float(case["scale"])
    assert scale == pytest.approx(case["teacher_q"].shape[-1] ** -0.5)
    query, key = case["teacher_q"], case["teacher_k"]
    total = torch.zeros(())
    for direction, teacher_query, teacher_key, key_mask in (
        (("student_text_q", "student_image_k"), query[:, :, :length], key[:, :, length:], image_mask),
        (("student_image_q", "student_text_k"), query[:, :, length:], key[:, :, :length], text_mask),
    ):
        teacher = block_softmax(teacher_query, teacher_key, key_mask, scale)
        rows = loss(teacher, log_attention(*(student[side] for side in direction), key_mask), key_mask)
        # Every query row counts once, padded ones too: the published mean.
        total = total + rows.mean()
    total.backward()
    assert total.item() == pytest.approx(case["loss"].item(), rel=1e-5, abs=1e-7)
    for side in SIDES:
        torch.testing.assert_close(student[side].grad, case[f"grad_{side}"], atol=1e-5, rtol=0)


def reference_kl(teacher, query, key, key_mask, k, tail):
    """KL of each row and its gradient by the student's logits, in NumPy float64, one row at a time.

    An outcome is a set of keys with one probability p; with s the student's sum over them, d(-p log s) / d logit is
    p * student everywhere, less p * student / s on the keys of the outcome.
    """
    teacher, query, key = (tensor.detach().double().numpy() for tensor in (teacher, query, key))
    scale = query.shape[-1] ** -0.5
    loss = np.zeros(teacher.shape[:3])
    grad_query, grad_key = np.zeros_like(query), np.zeros_like(key)
    for b, h, q in np.ndindex(*teacher.shape[:3]):
        valid = np.flatnonzero(key_mask[b].numpy())
        logits = scale * key[b, h, valid] @ query[b, h, q]
        student = np.exp(logits - logits.max())
        student /= student.sum()
        row = teacher[b, h, q, valid]
        order = np.argsort(-row, kind="stable")
        kept = order[:k][row[order[:k]] > 0]
        rest = np.setdiff1d(order, kept)
        mass = row[rest].sum()
        outcomes = [([one], row[one] / (1 - mass if tail == "renormalise" else 1)) for one in kept]
        if tail == "bucket":
            outcomes.append((rest, mass))
        if tail == "uniform":
            outcomes += [([one], mass / len(rest)) for one in rest]
        by_logit = np.zeros_like(row)
        for keys, p in outcomes:
            if p > 0:
                s = student[keys].sum()
                loss[b, h, q] += p * math.log(p / s)
                by_logit += p * student
                by_logit[keys] -= p * student[keys] / s
        grad_query[b, h, q] += scale * by_logit @ key[b, h, valid]
        grad_key[b, h, valid] += scale * np.outer(by_logit, query[b, h, q])
    return loss, grad_query, grad_key


def draw_pair(seed, samples=2, heads=2, queries=4, keys=9, width=6, sharpness=2.0):
    """A teacher's rows, a student's projections, and a key mask with at least one valid key."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(samples, heads, queries, width, generator=generator) * sharpness
    key = torch.randn(samples, heads, keys, width, generator=generator)
    mask = torch.rand(samples, keys, generator=generator) > 0.3
    mask[torch.arange(samples), torch.randint(keys, (samples,), generator=generator)] = True
    logits = torch.randn(samples, heads, queries, keys, generator=generator) * sharpness
    return mask_keys(logits, mask).softmax(-1), query.requires_grad_(), key.requires_grad_(), mask


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 3, 8, 9])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_loss_and_gradients_match_float64(tail, k, seed):
    teacher, query, key, mask = draw_pair(seed)
    rows = sparse_kl(sparsify(teacher, k), log_attention(query, key, mask), mask, tail)
    loss, grad_query, grad_key = reference_kl(teacher, query, key, mask, k, tail)
    rows.sum().backward()
    np.testing.assert_allclose(rows.detach().numpy(), loss, atol=2e-6)
    np.testing.assert_allclose(query.grad.numpy(), grad_query, atol=2e-6)
    np.testing.assert_allclose(key.grad.numpy(), grad_key, atol=2e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_sparse_loss_with_every_key_has_the_dense_gradient(tail):
    teacher, query, key, mask = draw_pair(0)
    dense_kl(teacher, log_attention(query, key, mask)).mean().backward()
    dense = query.grad.clone(), key.grad.clone()
    query.grad = key.grad = None
    sparse_kl(sparsify(teacher, None), log_attention(query, key, mask), mask, tail).mean().backward()
    torch.testing.assert_close((query.grad, key.grad), dense, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_whole_rows_have_no_tail(tail):
    teacher, query, key, mask = draw_pair(0)
    student = log_attention(query, key, mask)
    assert torch.equal(attention_kl(teacher, student, mask, tail), dense_kl(teacher, student))
    sparse = sparsify(teacher, 2)
    assert torch.equal(attention_kl(sparse, student, mask, tail), sparse_kl(sparse, student, mask, tail))


def test_uniform_is_dense_kl_against_an_evenly_spread_tail():
    teacher, query, key, mask = draw_pair(1)
    student = log_attention(query, key, mask)
    sparse = sparsify(teacher, 2)
    spread = densify(sparse, teacher.shape[-1])
    rest = mask[:, None, None] & (spread == 0)
    spread = spread + rest * (sparse.tail / rest.sum(-1).clamp_min(1))[..., None]
    torch.testing.assert_close(spread.sum(-1), torch.ones_like(sparse.tail))
    torch.testing.assert_close(
        sparse_kl(sparse, student, mask, "uniform"), dense_kl(spread, student), atol=1e-6, rtol=1e-5
    )


@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([0.1, 1.0, 4.0, 10.0]))
def test_bucket_lies_between_zero_and_the_dense_loss(seed, k, sharpness):
    teacher, query, key, mask = draw_pair(seed, sharpness=sharpness)
    student = log_attention(query, key, mask)
    rows, dense = sparse_kl(sparsify(teacher, k), student, mask), dense_kl(teacher, student)
    assert (rows >= -1e-6).all()
    assert (rows <= dense + 1e-6 * (1 + dense)).all()


def test_bucket_is_zero_for_the_teacher_itself_and_truncation_is_not():
    torch.manual_seed(0)
    query, key, mask = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 9, 4), torch.ones(1, 9, dtype=torch.bool)
    student = log_attention(query, key, mask)
    sparse = sparsify(student.exp(), 3)
    torch.testing.assert_close(sparse_kl(sparse, student, mask), torch.zeros(1, 2, 3), atol=1e-6, rtol=0)
    assert (sparse_kl(sparse, student, mask, "renormalise") > 0.05).all()


@given(st.data())
def test_no_nan_with_any_mask_that_leaves_one_key(data):
    keys = data.draw(st.integers(1, 8))
    masks = st.lists(st.booleans(), min_size=keys, max_size=keys).filter(any)
    mask = torch.tensor([data.draw(masks), data.draw(masks)])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    size = data.draw(st.sampled_from([1e-3, 1.0, 100.0, 3e4]))
    query = (torch.randn(2, 2, 3, 4, generator=generator) * size).requires_grad_()
    key = torch.randn(2, 2, keys, 4, generator=generator).requires_grad_()
    teacher_query = torch.randn(2, 2, 3, 4, generator=generator) * size
    teacher = block_softmax(teacher_query, torch.randn(2, 2, keys, 4, generator=generator), mask, 0.5)
    mean_heads = data.draw(st.booleans())
    sparse = sparsify(teacher.mean(1, keepdim=True) if mean_heads else teacher, data.draw(st.integers(1, keys)))
    student = log_attention(query, key, mask, mean_heads=mean_heads)
    losses = [sparse_kl(sparse, student, mask, tail) for tail in TAILS]
    if not mean_heads:
        losses.append(dense_kl(teacher, student))
    for rows in losses:
        assert torch.isfinite(rows).all()
        for gradient in torch.autograd.grad(rows.sum(), (query, key), retain_graph=True):
            assert torch.isfinite(gradient).all()


def test_rows_that_are_not_stored_give_nothing():
    teacher, query, key, mask = draw_pair(2)
    kept = sparsify(teacher, 3)
    blank = SparseAttention(kept.index * 0, kept.weight * 0, kept.tail * 0)
    for tail in TAILS:
        rows = sparse_kl(blank, log_attention(query, key, mask), mask, tail)
        assert (rows == 0).all()
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(rows.sum(), (query, key)))


@pytest.mark.parametrize("tail", TAILS)
def test_empty_slots_change_nothing(tail):
    """They point at key 0, which may be kept, or be one of the others."""
    teacher, query, key, mask = draw_pair(6)
    student, sparse = log_attention(query, key, mask), sparsify(teacher, 3)
    wide = SparseAttention(pad(sparse.index, (0, 2)), pad(sparse.weight, (0, 2)), sparse.tail)
    assert (sparse.index == 0).any(-1).sum() not in (0, sparse.tail.numel())
    assert torch.equal(sparse_kl(wide, student, mask, tail), sparse_kl(sparse, student, mask, tail))


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_tail_without_keys_to_hold_it_is_left_out(tail):
    """Rounding in somebody's cache may leave a tail where every key is kept."""
    teacher, query, key, mask = draw_pair(7)
    student, sparse = log_attention(query, key, mask), sparsify(teacher, None)
    rounded = SparseAttention(sparse.index, sparse.weight, torch.full_like(sparse.tail, 1e-4))
    torch.testing.assert_close(sparse_kl(rounded, student, mask, tail), dense_kl(teacher, student))


@pytest.mark.parametrize("tail", TAILS)
def test_the_smallest_tail_gives_a_finite_loss(tail):
    tiny = torch.tensor([[[1e-45]]])
    teacher = SparseAttention(torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1, 1), tiny)
    student = torch.tensor([[[[0.0, -200.0, -200.0, -200.0]]]])
    rows = sparse_kl(teacher, student, torch.ones(1, 4, dtype=torch.bool), tail)
    assert rows.item() == pytest.approx(0, abs=1e-30)


def test_mean_heads_is_the_log_of_the_mean_probability():
    _, query, key, mask = draw_pair(3, heads=4)
    each = log_attention(query, key, mask).exp()
    mean = log_attention(query, key, mask, mean_heads=True)
    assert mean.shape[1] == 1
    torch.testing.assert_close(mean.exp(), each.mean(1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(mean).all()


def test_log_attention_is_the_log_of_block_softmax():
    _, query, key, mask = draw_pair(4)
    torch.testing.assert_close(
        log_attention(query, key, mask).exp(), block_softmax(query, key, mask, 6**-0.5), atol=1e-6, rtol=1e-5
    )


def test_loss_inside_autocast_is_the_float32_loss():
    teacher, query, key, mask = draw_pair(5)
    sparse = sparsify(teacher, 3)
    outside = sparse_kl(sparse, log_attention(query, key, mask), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sparse_kl(sparse, log_attention(query, key, mask), mask)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_weighted_sum_counts_each_row_by_its_weight():
    rows = torch.tensor([[[1.0, 2.0, 5.0]], [[3.0, 4.0, 7.0]]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    assert weighted_sum(rows, weight).item() == pytest.approx(1 + 2 + 3 + 14)
    assert weighted_sum(rows.expand(-1, 4, -1), weight).item() == pytest.approx(1 + 2 + 3 + 14)
    repeated = torch.cat([rows, rows[..., 2:]], dim=-1)
    one_each = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    assert weighted_sum(repeated, one_each).item() == pytest.approx(4.0 * 5)


def test_soft_label_sum_is_kl_over_classes():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3) * 3
    target = teacher.softmax(-1)
    expected = (target * (target.log() - student.log_softmax(-1))).sum()
    assert soft_label_sum(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert soft_label_sum(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_label_sum_leaves_out_what_has_no_label():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    label = torch.tensor([2, -100, 0, -100])
    expected = cross_entropy(logits[[0, 2]], label[[0, 2]], reduction="sum")
    assert label_sum(logits, label).item() == pytest.approx(expected.item(), rel=1e-6)
    nothing = label_sum(logits, torch.full((4,), -100))
    nothing.backward()
    assert nothing.item() == 0
    assert (logits.grad == 0).all()
