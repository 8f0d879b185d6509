import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from dde_cache.attention import (
    SparseAttention,
    attention_logits,
    block_softmax,
    densify,
    mask_keys,
    query_rows,
    sparsify,
)
from dde_cache.errors import InputError


@st.composite
def attentions(draw, spread=20.0):
    """Rows that sum to 1 over the valid keys of their sample, at least one; peaked and flat ones, with ties."""
    samples, heads, queries, keys = (draw(st.integers(1, high)) for high in (3, 2, 3, 12))
    logits = draw(
        st_np.arrays(np.float32, (samples, heads, queries, keys), elements=st.floats(-spread, spread, width=32))
    )
    mask = draw(st_np.arrays(np.bool_, (samples, keys)))
    mask[np.arange(samples), draw(st_np.arrays(np.int64, samples, elements=st.integers(0, keys - 1)))] = True
    return mask_keys(torch.from_numpy(logits), torch.from_numpy(mask)).softmax(-1), torch.from_numpy(mask)


def test_block_softmax_is_the_block_of_the_whole_attention_over_its_row_sum():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 11, 8)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 9:] = False
    whole = mask_keys(attention_logits(query, key, 8**-0.5), mask).softmax(-1)
    block = whole[..., 4:] / whole[..., 4:].sum(-1, keepdim=True)
    ours = block_softmax(query, key[:, :, 4:], mask[:, 4:], 8**-0.5)
    torch.testing.assert_close(ours, block, atol=1e-6, rtol=0)
    assert (ours[1, :, :, 5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_computed_in_float32_whatever_the_inputs_are_in(dtype):
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 8).to(dtype), torch.randn(1, 2, 7, 8).to(dtype)
    exact = query.double() @ key.double().transpose(-1, -2) * 0.3
    torch.testing.assert_close(attention_logits(query, key, 0.3).double(), exact, atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_logits(query.float(), key.float(), 0.3)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.double(), exact, atol=1e-5, rtol=0)


@given(attentions())
def test_keeping_every_key_loses_nothing(drawn):
    attention, _ = drawn
    sparse = sparsify(attention, None)
    assert torch.equal(densify(sparse, attention.shape[-1]), attention)
    assert (sparse.tail == 0).all()


@given(attentions(), st.integers(1, 12))
def test_sparsify_keeps_the_largest_and_sums_up_the_rest(drawn, k):
    attention, mask = drawn
    k = min(k, attention.shape[-1])
    sparse = sparsify(attention, k)
    largest = np.sort(attention.numpy(), axis=-1)[..., ::-1]
    np.testing.assert_array_equal(sparse.weight.numpy(), largest[..., :k])
    np.testing.assert_allclose(sparse.tail.numpy(), largest[..., k:].sum(-1), atol=1e-7)
    np.testing.assert_allclose((sparse.weight.sum(-1) + sparse.tail).numpy(), 1, atol=1e-6)
    dense = densify(sparse, attention.shape[-1])
    assert torch.equal(dense.sort(-1, descending=True).values[..., :k], sparse.weight)
    assert torch.equal(torch.where(dense > 0, attention, 0), dense)
    assert (sparse.index[sparse.weight == 0] == 0).all()
    few = (mask.sum(-1) <= k)[:, None, None].expand_as(sparse.tail)
    assert torch.equal(dense[few], attention[few]), "a row with fewer valid keys than slots keeps them all"
    assert (sparse.tail[few] == 0).all()


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(InputError, match=rf"between 1 and the key axis of 7, got {k}"):
        sparsify(torch.full((1, 1, 1, 7), 1 / 7), k)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 1024), st.sampled_from([0.1, 2.0, 20.0]))
def test_a_row_keeps_the_fewest_keys_that_reach_the_mass(seed, k, mass, spread):
    # Weights in 1024ths add up exactly in float32, so the oracle is one of integers, without a tolerance.
    generator = np.random.default_rng(seed)
    shares = [generator.multinomial(1024, row) for row in generator.dirichlet(np.full(9, 1 / spread), size=20)]
    attention = torch.tensor(np.array(shares), dtype=torch.float32).reshape(2, 2, 5, 9) / 1024
    sparse = sparsify(attention, k, mass / 1024)
    for row, kept, tail in zip(shares, sparse.weight.reshape(-1, k), sparse.tail.flatten(), strict=True):
        largest = np.sort(row)[::-1]
        needed = int((largest.cumsum() < mass).sum()) + 1
        expected = np.where(np.arange(k) < needed, largest[:k], 0)
        np.testing.assert_array_equal(kept.numpy() * 1024, expected)
        assert tail * 1024 == 1024 - expected.sum()
    whole = sparsify(attention, k)
    assert torch.equal(sparse.weight, torch.where(sparse.weight > 0, whole.weight, 0))


@pytest.mark.parametrize("mass", [0.0, -1.0, 1.01])
def test_a_mass_that_cannot_be_kept(mass):
    with pytest.raises(InputError, match="mass must be above 0 and at most 1"):
        sparsify(torch.full((1, 1, 1, 7), 1 / 7), 3, mass)


def test_rows_picks_and_repeats_query_rows():
    torch.manual_seed(0)
    attention = torch.randn(2, 3, 4, 6).softmax(-1)
    position = torch.tensor([[0, 3, 3], [2, 1, 0]])
    sparse = sparsify(attention, None)
    picked = sparse.rows(position)
    assert isinstance(picked, SparseAttention)
    expected = torch.stack([attention[0][:, [0, 3, 3]], attention[1][:, [2, 1, 0]]])
    assert torch.equal(densify(picked, 6), expected)
    few = sparsify(attention, 2)
    assert torch.equal(few.rows(position).tail[0], few.tail[0][:, [0, 3, 3]])
    assert torch.equal(few.rows(position).tail[1], few.tail[1][:, [2, 1, 0]])
    assert torch.equal(query_rows(attention, position), densify(query_rows(sparse, position), 6))
