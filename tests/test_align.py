"""Attention on another model's axes: against dense maths in NumPy, and by its properties."""

import numpy as np
import pytest
import torch
from conftest import TEXT_LENGTH, vilt_processor
from encoders import letters
from hypothesis import given, settings
from hypothesis import strategies as st

from dde_cache.align import Axes, AxisMap, aligned_log, overlap_lengths, patch_map, without_keys
from dde_cache.attention import densify, sparsify
from dde_cache.errors import InputError
from dde_cache.losses import log_attention, sparse_kl
from dde_cache.preprocess import Preprocessor
from dde_cache.tokens import TokenAligner, overlaps, same_tokens, spans, with_tokenizer
from dde_cache.towers.contract import PatchLayout

sides = st.integers(1, 7)


def areas(rows, columns, layout):
    """Overlap of every pair of cells, counted on a grid so fine that both grids lie on it."""
    fine = np.lcm(rows, layout.rows), np.lcm(columns, layout.columns)
    own = np.arange(rows).repeat(fine[0] // rows)[:, None] * columns + np.arange(columns).repeat(fine[1] // columns)
    other = np.arange(layout.rows).repeat(fine[0] // layout.rows)[:, None] * layout.columns
    other = other + np.arange(layout.columns).repeat(fine[1] // layout.columns)
    counted = np.zeros((rows * columns, layout.rows * layout.columns))
    np.add.at(counted, (own.ravel(), other.ravel()), 1)
    return counted


@given(sides, sides, sides, sides)
def test_overlaps_are_areas(rows, columns, own_rows, own_columns):
    layout = PatchLayout(1, own_rows, own_columns)
    found = patch_map(torch.tensor([[rows, columns]]), layout, torch.device("cpu")).overlap[0].numpy()
    expected = areas(rows, columns, layout)
    assert found[0, 0] == 1
    assert not found[0, 1:].any()
    assert not found[1:, 0].any()
    np.testing.assert_allclose(found[1:, 1:] / found[1:, 1:].sum(), expected / expected.sum(), atol=1e-7)


@given(sides, sides)
def test_lengths_of_one_side(teacher, student):
    lengths = overlap_lengths(teacher, student)
    assert (lengths.sum(0) == teacher).all()
    assert (lengths.sum(1) == student).all()


@given(sides, sides, sides, sides, st.integers(0, 4))
def test_mass_is_kept_and_uniform_stays_proportional_to_area(rows, columns, own_rows, own_columns, first):
    layout = PatchLayout(first, own_rows, own_columns)
    mapped = patch_map(torch.tensor([[rows, columns]]), layout, torch.device("cpu"))
    random = (
        torch.rand(1, 2, 3, layout.tokens, generator=torch.Generator().manual_seed(0)) * mapped.counted[:, None, None]
    )
    torch.testing.assert_close(mapped.to_keys(random).sum(-1), random.sum(-1))
    assert mapped.counted[0].tolist() == [True] * bool(first) + [False] * max(first - 1, 0) + [True] * (
        own_rows * own_columns
    )
    assert mapped.held[0].tolist() == [bool(first)] + [True] * (rows * columns)
    patches = torch.zeros(1, 1, 1, layout.tokens)
    patches[..., first:] = 1 / (own_rows * own_columns)
    even = mapped.to_keys(patches)[0, 0, 0, 1:]
    torch.testing.assert_close(even, torch.full_like(even, 1 / (rows * columns)))
    ones = torch.ones(1, 1, layout.tokens, 5)
    rows_of = mapped.to_queries(ones)[0, 0]
    torch.testing.assert_close(rows_of[1:], torch.ones_like(rows_of[1:]))


@given(sides, sides)
def test_equal_grids_change_nothing(rows, columns):
    layout = PatchLayout(1, rows, columns)
    mapped = patch_map(torch.tensor([[rows, columns]]), layout, torch.device("cpu"))
    values = torch.rand(1, 2, 3, layout.tokens, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mapped.to_keys(values), values)
    torch.testing.assert_close(mapped.to_queries(values.transpose(-1, -2)), values.transpose(-1, -2))


def numpy_rows(query, key, valid, queries, keys):
    """The definition, pair by pair and head by head."""
    found = []
    for pair in range(len(query)):
        heads = []
        for q, k in zip(query[pair], key[pair], strict=True):
            counted = valid[pair] & (keys[pair].sum(0) > 0)
            logits = np.where(counted, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
            rows = np.exp(logits - logits.max(1, keepdims=True))
            rows /= rows.sum(1, keepdims=True)
            shares = keys[pair] / np.maximum(keys[pair].sum(0), 1e-9)
            means = queries[pair] / np.maximum(queries[pair].sum(1, keepdims=True), 1e-9)
            heads.append(means @ rows @ shares.T)
        found.append(heads)
    return np.array(found)


@pytest.mark.parametrize("mean_heads", [False, True])
def test_the_dense_definition(mean_heads):
    """Two pictures of unlike grids, a text axis with a token that has no counterpart, both directions."""
    random = np.random.default_rng(0)
    grid, layout = torch.tensor([[2, 3], [1, 2]]), PatchLayout(2, 3, 3)
    patches = patch_map(grid, layout, torch.device("cpu"))
    words = AxisMap(torch.tensor(random.integers(0, 3, (2, 4, 6))).float())
    words.overlap[0, :, 2] = 0  # a token of the student alone
    words.overlap[1, 3] = 0  # and one of the teacher alone
    text, image = (random.normal(size=(2, 3, count, 8)) for count in (6, layout.tokens))
    valid = np.array([[True] * 6, [True] * 5 + [False]])
    words.overlap[1, :, 5] = 0
    own = torch.from_numpy(text).float(), torch.from_numpy(image).float()
    everything = torch.ones(2, layout.tokens, dtype=torch.bool)
    log, held = aligned_log(own[0], own[1], everything, words, patches, mean_heads=mean_heads)
    expected = numpy_rows(text, image, everything.numpy(), words.overlap.numpy(), patches.overlap.numpy())
    expected = expected.mean(1, keepdims=True) if mean_heads else expected
    rows = torch.where(held[:, None, None], log.exp(), 0)
    np.testing.assert_allclose(rows.numpy(), expected, atol=1e-6)
    assert held.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    log, held = aligned_log(own[1], own[0], torch.from_numpy(valid), patches, words, mean_heads=mean_heads)
    expected = numpy_rows(image, text, valid, patches.overlap.numpy(), words.overlap.numpy())
    expected = expected.mean(1, keepdims=True) if mean_heads else expected
    np.testing.assert_allclose(torch.where(held[:, None, None], log.exp(), 0).numpy(), expected, atol=1e-6)
    assert not held[1, 3]


def test_without_maps_it_is_the_plain_loss():
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, count, 8, generator=random) for count in (4, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    log, held = aligned_log(query, key, mask, None, None)
    plain = log_attention(query, key, mask)
    assert torch.equal(held, mask)
    torch.testing.assert_close(log[:, :, :, :2], plain[:, :, :, :2])
    torch.testing.assert_close(log.exp(), plain.exp())


def test_nothing_is_infinite_where_the_student_is_certain():
    """A probability that underflows, and its gradient."""
    query = torch.full((1, 1, 1, 4), 200.0, requires_grad=True)
    key = torch.zeros(1, 1, 9, 4)
    key[0, 0, 0] = 10
    patches = patch_map(torch.tensor([[3, 3]]), PatchLayout(0, 3, 3), torch.device("cpu"))
    log, held = aligned_log(query, key, torch.ones(1, 9, dtype=torch.bool), None, patches)
    teacher = sparsify(torch.full((1, 1, 1, 10), 0.1), 4)
    loss = sparse_kl(without_keys(teacher, held), log, held).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(query.grad).all()


@given(st.integers(2, 6), st.integers(1, 6), st.data())
def test_dropped_keys_leave_rows_that_sum_to_one(keys, k, data):
    held = torch.tensor([data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))])
    rows = torch.rand(1, 2, 3, keys, generator=torch.Generator().manual_seed(keys)) + 0.01
    rows = rows / rows.sum(-1, keepdim=True)
    dense = without_keys(rows, held)
    whole = float(held.any())
    torch.testing.assert_close(dense.sum(-1), torch.full((1, 2, 3), whole))
    assert not dense[..., ~held[0]].any()
    every = without_keys(sparsify(rows, None), held)
    torch.testing.assert_close(densify(every, keys), dense)
    some = without_keys(sparsify(rows, min(k, keys)), held)
    total = some.weight.sum(-1) + some.tail
    assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
    kept = densify(some, keys)
    assert not kept[..., ~held[0]].any()
    if not (held[0] & (densify(sparsify(rows, min(k, keys)), keys) == 0)).any():
        torch.testing.assert_close(kept, dense)  # every key that is left was kept
    else:
        # No key of the tail weighs more than the smallest that was kept.
        spare = (held[0] & (densify(sparsify(rows, min(k, keys)), keys) == 0)).sum(-1)
        least = torch.where(some.weight > 0, some.weight, torch.inf).amin(-1)
        known = (some.weight > 0).all(-1)
        assert (some.tail <= spare * least + 1e-5)[known].all()
    # What is known keeps its proportions.
    both = (kept > 0) & (dense > 0)
    ratio = torch.where(both, kept / dense, torch.nan)
    spread = ratio.nan_to_num(-9).amax(-1) - ratio.nan_to_num(9).amin(-1)
    assert (spread[both.any(-1)] < 1e-4).all()


def test_grids_may_be_refused():
    axes = Axes(image=PatchLayout(1, 3, 3), same_grids=True)
    cpu = torch.device("cpu")
    assert axes.image_map(torch.tensor([[3, 3], [3, 3]]), cpu) is not None
    with pytest.raises(InputError, match=r"grid of 3 x 3 patches .*got 2 x 3; train with --grids resample"):
        axes.image_map(torch.tensor([[3, 3], [2, 3]]), cpu)
    assert Axes().image_map(torch.tensor([[2, 3]]), cpu) is None


# --- texts


def words_of(length=TEXT_LENGTH):
    return Preprocessor(vilt_processor(), 12, length)


def aligner(length=TEXT_LENGTH, **options):
    tokenizer = letters(**options)
    return TokenAligner(words_of(length), with_tokenizer(words_of(), tokenizer, tokenizer.model_max_length))


def test_letters_lie_in_their_words():
    read = aligner()(["a red Circle ?", "blue"])
    assert read["student_mask"].sum(-1).tolist() == [13, 6]
    overlap = read["token_overlap"][0].numpy()
    assert overlap.shape == (6, 13)
    # [CLS] a red circle ? [SEP] against <s> a r e d c i r c l e ? </s>
    expected = np.zeros((6, 13))
    for word, some in enumerate(([0], [1], [2, 3, 4], range(5, 11), [11], [12])):
        expected[word, list(some)] = 1
    assert (overlap == expected).all()
    assert not read["token_overlap"][1, 3:].any()
    assert not read["token_overlap"][1, :, 6:].any()


@given(st.lists(st.sampled_from(["red", "green", "a", "?", "circle", "zzz"]), min_size=1, max_size=14))
@settings(max_examples=30)
def test_every_character_that_both_read_is_counted_once(words):
    one = aligner(length=9)
    own, other = (spans(side, [" ".join(words)]) for side in (one.teacher, one.student))
    shared = overlaps(own, other)[0]
    seen = [{place for start, end in side.place[0] for place in range(start, end)} for side in (own, other)]
    assert shared.sum() == len(seen[0] & seen[1]) + 2
    # Each letter lies in one word at most.
    assert ((shared > 0).sum(0) <= 1).all()


def test_the_same_tokenizer_on_both_sides_is_the_identity():
    same = TokenAligner(words_of(), words_of())
    read = same(["is there a red square ?", "blue ?"])
    assert torch.equal(read["student_ids"], words_of().tokens(["is there a red square ?", "blue ?"]).ids)
    for overlap, count in zip(read["token_overlap"], (8, 4), strict=True):
        assert torch.equal(overlap > 0, torch.diag(torch.arange(8) < count))
    assert same_tokens(words_of(), words_of(5))
    assert not same_tokens(same.teacher, aligner().student)


@pytest.mark.parametrize(("options", "lacking"), [({"opens": False}, "'[CLS]'"), ({"ends": False}, "'[SEP]'")])
def test_special_tokens_without_counterpart(options, lacking):
    one = aligner(**options)
    (found,) = one.lacking(["red ?"])
    assert found == f"{lacking} in 'red ?'"
    assert aligner().lacking(["red ?"]) == []
    overlap = one(["red ?"])["token_overlap"][0]
    row = 0 if lacking == "'[CLS]'" else 3
    assert not overlap[row].any()
    assert overlap.sum() == 5


def test_a_text_of_special_tokens_alone():
    """The one that a tokenizer writes opens the text; it does not end it too."""
    assert aligner().lacking([""]) == []
    (found,) = aligner(ends=False).lacking([""])
    assert found == "'[SEP]' in ''"


def test_a_text_that_is_longer_than_the_student_reads():
    one = aligner(length=8)
    text = "is there a red square ?"
    assert one.lacking([text]) == []
    short = TokenAligner(one.teacher, with_tokenizer(one.teacher, letters(length=8), 8))
    assert short.cut([text, "red"]) == 1
    assert [line.split()[0] for line in short.lacking([text])] == ["'a'", "'red'", "'square'", "'?'"]
    assert short(["red", text])["student_ids"].shape[1] == 8
