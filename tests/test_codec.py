"""`expected_rows` is the codec's oracle: what docs/format.md says, in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dde_cache.attention import SparseAttention, densify, mask_keys, sparsify
from dde_cache.codec import (
    EMPTY,
    RELATIVE_ERROR,
    EncodedDense,
    EncodedSparse,
    blank,
    concatenate,
    decode,
    dense_rows,
    encode,
    encode_dense,
    ends_of_codes,
    fill,
    from_numpy,
    index_dtype,
    weights_of_codes,
)
from dde_cache.losses import dense_kl, sparse_kl

WEIGHTS = ("log8", "float16", "float32")
SMALLEST = {"log8": 2**-15.875, "float16": 2**-14, "float32": 2.0**-126}
"""Below these a weight's relative error is not bounded by `RELATIVE_ERROR`."""


def draw(seed, spread, k=None, shape=(2, 2, 3, 12), masked=True):
    """Attention rows, their top k, and the key mask; the ratio of two weights is at most exp(2 * spread)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.rand(shape, generator=generator) * 2 - 1) * spread
    mask = torch.ones(shape[0], shape[3], dtype=torch.bool)
    if masked:
        mask = torch.rand(shape[0], shape[3], generator=generator) > 0.3
        mask[:, 3] = True
    attention = mask_keys(logits, mask).softmax(-1)
    return attention, sparsify(attention, k), mask


seeds = st.integers(0, 2**32)
spreads = st.sampled_from([0.1, 1.0, 3.0, 10.0, 40.0])
slots = st.none() | st.integers(1, 12)


def expected_rows(sparse, weights):
    weight, tail = sparse.weight.double().numpy(), sparse.tail.double().numpy()
    if weights == "log8":
        code = np.clip(np.round(-16 * np.log2(np.where(weight > 0, weight, 1))), 0, 254)
        stored = np.where(weight > 0, 2 ** (-code / 16), 0)
    else:
        stored = weight.astype(weights).astype(float)
    if weights != "float32":
        kept = sparse.weight.sum(-1).double().numpy()
        smaller = np.minimum(kept, tail).astype(np.float16).astype(float)
        tail = np.where(kept < tail, 1 - smaller, smaller)
    return stored * ((1 - tail) / stored.sum(-1))[..., None], tail


def stored_weight(encoded):
    """Weights before the row is scaled."""
    if encoded.weight.dtype != torch.uint8:
        return encoded.weight.double()
    code = encoded.weight.long().cumsum(-1)
    return torch.where(code == EMPTY, 0, 2 ** (-code.double() / 16))


@pytest.mark.parametrize("weights", WEIGHTS)
@given(seeds, spreads, slots)
def test_decoded_rows_are_those_of_the_specification(weights, seed, spread, k):
    _, sparse, _ = draw(seed, spread, k)
    decoded = decode(encode(sparse, weights, 12))
    weight, tail = expected_rows(sparse, weights)
    codes = -16 * np.log2(np.where(sparse.weight > 0, sparse.weight, 1).astype(float))
    clear = (np.abs(codes % 1 - 0.5) > 1e-4).all(-1)  # halfway between two codes, rounding may go either way
    np.testing.assert_allclose(decoded.weight.numpy()[clear], weight[clear], rtol=2e-6, atol=1e-12)
    np.testing.assert_allclose(decoded.tail.numpy(), tail, rtol=1e-6)
    assert decoded.weight.dtype == decoded.tail.dtype == torch.float32
    held = decoded.weight > 0
    assert torch.equal(decoded.index[held], sparse.index[held])


@pytest.mark.parametrize("weights", WEIGHTS)
@given(seeds, spreads, slots)
def test_kept_and_tail_sum_to_one(weights, seed, spread, k):
    _, sparse, _ = draw(seed, spread, k)
    decoded = decode(encode(sparse, weights, 12))
    np.testing.assert_allclose((decoded.weight.sum(-1) + decoded.tail).numpy(), 1, atol=1e-6)
    assert (decoded.weight.diff(dim=-1) <= 0).all(), "weights fall along the slots"


@pytest.mark.parametrize("weights", WEIGHTS)
@given(seeds, spreads, slots)
def test_stored_weights_keep_the_stated_relative_error(weights, seed, spread, k):
    _, sparse, _ = draw(seed, spread, k)
    stored, weight = stored_weight(encode(sparse, weights, 12)), sparse.weight.double()
    held = weight >= SMALLEST[weights]
    relative = (stored[held] / weight[held] - 1).abs()
    assert (relative <= RELATIVE_ERROR[weights] + 1e-6).all()
    if weights == "log8":
        small = (weight > 0) & (weight < SMALLEST["log8"])
        assert torch.allclose(stored[small], torch.tensor(SMALLEST["log8"], dtype=torch.double))
    assert (stored[weight == 0] == 0).all()


def test_the_stated_relative_errors_are_reached():
    weight = torch.linspace(0.5, 1, 20_001).flip(0)[:, None, None, None]
    sparse = SparseAttention(torch.zeros_like(weight, dtype=torch.long), weight, 1 - weight[..., 0])
    for weights in ("log8", "float16"):
        relative = (stored_weight(encode(sparse, weights, 1)) / weight.double() - 1).abs().max()
        assert relative == pytest.approx(RELATIVE_ERROR[weights], rel=0.02)
    assert RELATIVE_ERROR["log8"] < 0.022


def kl_excess_bound(weights, exact_kl):
    """How far quantisation may move the loss of a row.

    Let p be a row's outcomes (kept keys and the tail), p' the decoded ones, s the student's, and p'/p in [e^-e, e^e].
    KL(p'||s) - KL(p||s) = KL(p'||p) + sum (p' - p) log(p/s). The first term is at most e, the second at most
    (e^e - 1) sum p |log(p/s)|, and sum p |log(p/s)| <= KL(p||s) + 2/exp(1), as x log(1/x) <= 1/exp(1).

    Scaling a row moves a weight by as much as the row's weights were off together, so e is twice the codec's error,
    and what rounding the smaller of tail and kept mass to float16 (relative 2^-11) does to either.
    """
    e = 2 * math.log1p(RELATIVE_ERROR[weights]) - (0 if weights == "float32" else math.log1p(-(2**-11)))
    return e + math.expm1(e) * (exact_kl + 2 / math.e) + 2e-6 * (1 + exact_kl)


@pytest.mark.parametrize("weights", WEIGHTS)
@given(seeds, st.sampled_from([0.1, 1.0, 3.0]), slots, st.sampled_from([0.1, 1.0, 4.0, 15.0]))
def test_quantisation_moves_the_loss_by_no_more_than_its_bound(weights, seed, spread, k, student_spread):
    attention, sparse, mask = draw(seed, spread, k)
    assert (sparse.weight[sparse.weight > 0] > 2**-14).all()
    generator = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(attention.shape, generator=generator) * student_spread
    student = mask_keys(logits, mask).log_softmax(-1)
    exact, dense = sparse_kl(sparse, student, mask), dense_kl(attention, student)
    quantised = sparse_kl(decode(encode(sparse, weights, 12)), student, mask)
    bound = kl_excess_bound(weights, exact)
    assert ((quantised - exact).abs() <= bound).all()
    assert (quantised <= dense + kl_excess_bound(weights, dense)).all()
    assert (quantised >= -1e-6).all()


@pytest.mark.parametrize("weights", WEIGHTS)
@given(seeds, spreads, slots, st.integers(0, 3), st.integers(0, 3))
def test_padding_then_decoding_is_decoding_then_padding(weights, seed, spread, k, more_queries, more_slots):
    _, sparse, _ = draw(seed, spread, k)
    encoded = encode(sparse, weights, 12)
    queries, width = sparse.index.shape[2] + more_queries, sparse.index.shape[3] + more_slots
    padded, plain = decode(encoded.pad_to(queries, width)), decode(encoded)
    grow = (0, more_slots, 0, more_queries)
    assert torch.equal(padded.index, torch.nn.functional.pad(plain.index, grow))
    torch.testing.assert_close(padded.weight, torch.nn.functional.pad(plain.weight, grow), atol=0, rtol=1e-6)
    assert torch.equal(padded.tail, torch.nn.functional.pad(plain.tail, (0, more_queries)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_short_rows_keep_every_key(weights):
    attention, _, mask = draw(0, 1.0, k=6)
    mask = mask & (mask.cumsum(-1) <= 4)
    attention = attention * mask[:, None, None]
    attention = attention / attention.sum(-1, keepdim=True)
    decoded = decode(encode(sparsify(attention, 6), weights, 12))
    assert (decoded.tail == 0).all()
    assert ((decoded.weight > 0).sum(-1) == mask.sum(-1)[:, None, None]).all()
    torch.testing.assert_close(densify(decoded, 12), attention, atol=0, rtol=2.01 * RELATIVE_ERROR[weights] + 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("keys", [1, 256, 257, 2**15, 2**15 + 1])
def test_indices_of_any_key_axis_survive(weights, keys):
    weight = torch.tensor([0.5, 0.25]).expand(1, 1, 1, 2)[..., : min(keys, 2)]
    index = torch.tensor([keys - 1, 0]).expand(1, 1, 1, 2)[..., : min(keys, 2)]
    encoded = encode(SparseAttention(index, weight, 1 - weight.sum(-1)), weights, keys)
    assert encoded.index.dtype == index_dtype(keys)
    assert torch.equal(decode(encoded).index, index)


def test_one_code_is_one_weight_wherever_it_stands():
    """Vectorised functions round the last few elements of a tensor in another way than the others."""
    index = torch.zeros(1, 1, 37, 2).long()
    for code in range(255):
        weight = torch.tensor([1.0, 2 ** (-code / 16)]).expand(1, 1, 37, 2)
        decoded = decode(encode(SparseAttention(index, weight, torch.zeros(1, 1, 37)), "log8", 2))
        assert (decoded.weight == decoded.weight[:, :, :1]).all()


def test_codes_beyond_the_last_are_empty_slots():
    """Damage that a checksum let through, or somebody's mistake."""
    steps = torch.tensor([[[[16, 250, 250]]]], dtype=torch.uint8)
    decoded = decode(EncodedSparse(torch.zeros(1, 1, 1, 3).to(torch.uint8), steps, torch.zeros(1, 1, 1)))
    assert decoded.weight.tolist() == [[[[1.0, 0.0, 0.0]]]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_row_without_weights_decodes_to_zeros(weights):
    zeros = torch.zeros(1, 1, 2, 3)
    decoded = decode(encode(SparseAttention(zeros.long(), zeros, zeros[..., 0]), weights, 9))
    assert (decoded.weight == 0).all()
    assert (decoded.tail == 0).all()


def test_log8_takes_two_bytes_a_weight_and_two_a_tail():
    _, sparse, _ = draw(0, 1.0, k=4)
    rows = 2 * 2 * 3
    assert encode(sparse, "log8", 12).nbytes == rows * (4 * 2 + 2)
    assert encode(sparse, "float32", 12).nbytes == rows * (4 * 5 + 4)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blank_records_decode_to_zeros_in_the_widest_shape(weights):
    _, few, _ = draw(0, 3.0, k=2)
    _, many, _ = draw(1, 3.0, k=5)
    narrow, wide = encode(few, weights, 12), encode(many, weights, 300)
    for like in ([narrow, wide], [wide, narrow]):
        empty = blank(like, pairs=3, queries=4, keys=9)
        assert empty.index.shape == empty.weight.shape == (3, 2, 4, 5)
        assert (empty.index.dtype, empty.weight.dtype, empty.tail.dtype) == (
            torch.int16,
            wide.weight.dtype,
            wide.tail.dtype,
        )
        decoded = decode(empty)
        assert not decoded.weight.any()
        assert not decoded.tail.any()
        assert not decoded.index.any()


def test_arrays_from_a_disk_are_wrapped_without_a_copy():
    _, sparse, _ = draw(0, 3.0, k=4)
    encoded = encode(sparse, "log8", 12)
    parts = {name: part.numpy() for name, part in encoded.parts.items()}
    wrapped = from_numpy(parts, None)
    assert isinstance(wrapped, EncodedSparse)
    assert torch.equal(decode(wrapped).weight, decode(encoded).weight)
    assert wrapped.weight.data_ptr() == parts["weight"].__array_interface__["data"][0]


def test_log8_bytes_are_frozen():
    """The codec is a contract: these codes must never change."""
    weight = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.9, 1e-9, 0.0]]]])
    index = torch.tensor([[[[2, 0, 0], [3, 0, 1], [1, 2, 0]]]])
    encoded = encode(SparseAttention(index, weight, torch.tensor([[[0.0, 0.0, 0.1]]])), "log8", 4)
    assert encoded.weight.tolist() == [[[[0, 255, 0], [16, 16, 0], [2, 252, 1]]]]
    assert encoded.index.dtype == torch.uint8
    assert encoded.tail.dtype == torch.float16


@pytest.mark.parametrize("keys", [241, 2000])
def test_the_mass_of_a_single_kept_key_among_many_keeps_its_precision(keys):
    even = torch.full((1, 1, 1, keys), 1 / keys)
    decoded = decode(encode(sparsify(even, 1), "log8", keys))
    assert decoded.weight.item() == pytest.approx(1 / keys, rel=2**-11)


# --- whole rows


STEPS = st.sampled_from([1, 2, 7, 56, 254])
EVERY_ROW = torch.ones(2, 3, dtype=torch.bool)


def expected_whole_rows(code, steps):
    """What docs/format.md says, in plain Python."""
    meant = [0 if one == 0 else 1 / 48 if one == 1 else (one - 1) ** 2 + 1 / 12 for one in code]
    return [weight / sum(meant) if sum(meant) else 0 for weight in meant]


@given(STEPS, seeds, spreads)
def test_decoded_whole_rows_are_those_of_the_specification(steps, seed, spread):
    attention, _, mask = draw(seed, spread)
    encoded = encode_dense(attention, EVERY_ROW, mask, steps)
    decoded = decode(encoded)
    for code, row in zip(encoded.weight.reshape(-1, 12).tolist(), decoded.reshape(-1, 12).tolist(), strict=True):
        np.testing.assert_allclose(row, expected_whole_rows(code, steps), rtol=1e-5)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.sum(-1), torch.ones(2, 2, 3))


@given(STEPS, seeds, spreads)
def test_square_roots_are_off_by_half_a_step(steps, seed, spread):
    """Each code's ends hold the weight, and so a row's ends hold its sum."""
    attention, _, mask = draw(seed, spread)
    code = encode_dense(attention, EVERY_ROW, mask, steps).weight
    there = torch.broadcast_to(mask[:, None, None], code.shape)
    assert ((code > 0) == there).all()
    root, level = attention.double().sqrt()[there], code.double()[there] - 1
    rounding = 1e-5
    assert (level <= steps).all()
    assert ((root - level / steps).abs() <= 0.5 / steps + rounding).all()
    meant = torch.from_numpy(weights_of_codes(steps))[code.int()]
    assert ((meant.double().sqrt()[there] - root).abs() <= 0.55 / steps + rounding).all()
    least, most = (torch.from_numpy(end)[code.int()] for end in ends_of_codes(steps))
    assert (least <= attention + rounding).all()
    assert (attention <= most + rounding).all()
    assert (least.sum(-1) <= 1 + 1e-4).all()
    assert (most.sum(-1) >= 1 - 1e-4).all()


def test_sqrt8_bytes_are_frozen():
    """The codec is a contract: these codes must never change."""
    attention = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.9999, 1e-4, 0.0]]]])
    rows, keys = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
    assert encode_dense(attention, rows, keys, 56).weight.tolist() == [[[[57, 1, 0], [41, 29, 0], [57, 2, 0]]]]
    assert encode_dense(attention, rows, keys, 254).weight.tolist() == [[[[255, 1, 0], [181, 128, 0], [255, 4, 0]]]]
    some = torch.tensor([[True, False, False]])
    assert encode_dense(attention, some, keys, 56).weight.sum() == 58


@given(seeds, spreads)
def test_the_loss_of_whole_rows_is_near_the_exact_one(seed, spread):
    """|KL(p'||s) - KL(p||s)| <= |H(p') - H(p)| + sum |p' - p| max |log s|: stated loosely, for 56 steps and 12 keys."""
    attention, _, mask = draw(seed, spread)
    student = mask_keys(torch.randn(attention.shape, generator=torch.Generator().manual_seed(seed)), mask).log_softmax(
        -1
    )
    decoded = decode(encode_dense(attention, EVERY_ROW, mask, 56))
    assert (decoded[~torch.broadcast_to(mask[:, None, None], decoded.shape)] == 0).all()
    assert ((dense_kl(decoded, student) - dense_kl(attention, student)).abs() < 0.12).all()
    assert float((dense_kl(decoded, student) - dense_kl(attention, student)).mean().abs()) < 0.04


@pytest.mark.parametrize("weights", ["sqrt8", "log8", "float16"])
def test_records_are_gathered_padded_and_cut(weights):
    """Records of two widths, put together or one by one, decode to what they were."""
    held = []
    for seed, keys in ((0, 5), (1, 12)):
        attention, _, mask = draw(seed, 3.0, shape=(2, 2, 3, keys))
        sparse = encode(sparsify(attention, None), weights, keys) if weights != "sqrt8" else None
        held.append(sparse or encode_dense(attention, EVERY_ROW, mask, 56))
    expected = [dense_rows(one, 12) for one in held]
    together = concatenate(held)
    torch.testing.assert_close(dense_rows(together, 12), torch.cat(expected), rtol=0, atol=5e-7)
    into = blank(held, pairs=4, queries=5, keys=12)
    fill(into, [3, 0], held[0], [0, 1])
    fill(into, [1], held[1], [1])
    found = dense_rows(into, 12)
    for number, source in ((3, expected[0][0]), (0, expected[0][1]), (1, expected[1][1])):
        torch.testing.assert_close(found[number, :, :3], source, rtol=0, atol=5e-7)
    assert found[2].abs().sum() == found[:, :, 3:].abs().sum() == 0
    assert isinstance(into, EncodedDense if weights == "sqrt8" else EncodedSparse)
    narrow = together.records(torch.tensor([1, 0])).cut(2, 5)
    torch.testing.assert_close(dense_rows(narrow, 5), expected[0][[1, 0], :, :2, :5], rtol=0, atol=5e-7)
