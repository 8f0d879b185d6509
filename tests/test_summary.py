"""`inspect`: counted again from the teacher's own maps."""

import numpy as np
import pytest
import torch
from pipeline import all_pairs, make_cache, make_shards

from dde_cache.errors import CacheError
from dde_cache.store import CacheWriter
from dde_cache.summary import pair_links, summarise

LAYER = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache", k=3)


def maps_of(teacher, shards, pair):
    sample = shards[pair.shard].read(pair.key)
    pixels = teacher.preprocessor.stack([teacher.preprocessor.pixels(sample.images[0].decode())])
    tokens = teacher.preprocessor.tokens([sample.texts[pair.text].text])
    output = teacher(tokens, [pixels], [LAYER])
    return tokens, output.attention[0, LAYER], output.logits[0]


def test_counts_and_kept_mass(teacher, shards, cache):
    found = summarise(cache)
    pairs = all_pairs(shards)
    assert (found.units, found.samples, found.pairs) == (3, 8, len(pairs))
    kept = {"t2i": [], "i2t": []}
    dense, words, patches = 0, [], []
    for pair in pairs:
        tokens, maps, _ = maps_of(teacher, shards, pair)
        words.append(tokens.ids.shape[1])
        patches.append(maps.i2t.shape[2])
        dense += 2 * 2 * 3 * words[-1] * patches[-1]
        for direction in kept:
            rows = getattr(maps, direction)
            kept[direction].append(rows.sort(-1, descending=True).values[..., :3].sum(-1).flatten())
    for direction, values in kept.items():
        mass = torch.cat(values).numpy()
        assert found.kept_mass[direction].mean == pytest.approx(mass.mean(), abs=1e-3)
        for share, value in found.kept_mass[direction].quantiles.items():
            assert value == pytest.approx(np.quantile(mass, float(share), method="inverted_cdf"), abs=2e-3), share
    assert found.dense_bytes_a_pair == dense / len(pairs)
    assert found.text_tokens == (min(words), max(words))
    assert found.image_tokens == (min(patches), max(patches))
    assert found.bytes == sum(path.stat().st_size for path in (cache.folder / "units").iterdir())
    assert found.bytes_a_pair == found.bytes / len(pairs)


def test_the_strongest_links_of_a_pair(teacher, shards, cache):
    pair = next(one for one in all_pairs(shards) if one.text == 1 and one.key == "key-004")
    tokens, maps, logits = maps_of(teacher, shards, pair)
    found = pair_links(cache, pair.key, 1, top=2)
    words = teacher.preprocessor.processor.tokenizer.convert_ids_to_tokens(tokens.ids[0].tolist())
    assert [word.word for word in found.words] == words
    kept = maps.t2i[0]
    third = kept.topk(min(3, kept.shape[-1])).values[..., -1:]
    kept = torch.where(kept >= third, kept, 0).mean(0)
    columns = shards[pair.shard].read(pair.key).images[0].decode().width // 12
    for row, word in enumerate(found.words):
        best = kept[row].argmax().item()
        name = "CLS" if best == 0 else f"row {(best - 1) // columns + 1}, column {(best - 1) % columns + 1}"
        weights = {link.image_token: link.weight for link in word.links}
        assert max(weights.values()) == pytest.approx(float(kept[row].max()), rel=0.05)
        assert name in weights
    for number, label in enumerate(("no", "yes", "red")):
        assert found.logits[label] == pytest.approx(float(logits[number]), abs=1e-5)


def test_what_is_not_there(cache, tmp_path):
    with pytest.raises(CacheError, match="expected a sample with key 'nobody', found none in 3 units"):
        pair_links(cache, "nobody")
    with pytest.raises(CacheError, match="sample 'key-000' has no text 7"):
        pair_links(cache, "key-000", 7)
    CacheWriter(tmp_path / "empty", cache.spec, cache.folder / "assets").close()
    from dde_cache.store import Cache

    with pytest.raises(CacheError, match="no finished units yet"):
        summarise(Cache(tmp_path / "empty"))
