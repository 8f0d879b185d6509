"""The page of `dde-cache view`: its numbers against cache and model, its markup, and what a browser does with it."""

import base64
import json
import re
import shutil
import zlib
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import randomise
from families import bert_tokenizer, roberta_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pipeline import all_pairs, changed, cli, make_cache, make_samples, make_shards, whole_batch
from test_two_images import pairs_of_pictures
from transformers import ViltForImagesAndTextClassification

from dde_cache.distill import TrainConfig, student_output
from dde_cache.errors import CacheError, InputError, RunError
from dde_cache.gallery import Choice, text_units, view
from dde_cache.losses import attention_kl, log_attention
from dde_cache.pages import fill_page, json_text
from dde_cache.preprocess import Preprocessor
from dde_cache.sources import CachedTargets
from dde_cache.student import DualEncoder
from dde_cache.subset import Selection, subset
from dde_cache.targets import CacheTargets, decoded
from dde_cache.train import train

LAYER = 2
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!-- {{script}} $& \u2028 'red' square"
QUICK = {"steps": 2, "batch_size": 4, "workers": 0, "log_every": 1}


def hostile_samples():
    samples = make_samples(7)
    bad = samples[3].texts[0].model_copy(update={"text": HOSTILE, "kind": "<b>kind</b>"})
    samples[3] = changed(samples[3], texts=(bad, *samples[3].texts[1:]))
    return samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", hostile_samples())


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def sparse(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("sparse") / "sparse", k=2, layers=(1, 2))


@pytest.fixture(scope="module")
def run(shards, cache, tmp_path_factory):
    """A run whose student has large random weights: a fresh one has nearly even attention, which hides mistakes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(shards, CachedTargets(cache), folder, TrainConfig(**QUICK))
    randomise(DualEncoder.from_pretrained(folder / "model"), seed=5).save_pretrained(folder / "model")
    return folder


class Page(HTMLParser):
    """Elements and attributes of a page, and the content of its scripts by id."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.scripts, self._inside = [], [], {}, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        held = json.loads(self.scripts["page-data"])
        self.about, self.pairs = held["about"], held["pairs"]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._inside = dict(attributes).get("id", "own") if tag == "script" else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, content):
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + content

    def maps(self, pair, slot=0, student=False, sparse=False):
        """The numbers of a picture as the page's script reads them: weights, KL and kept mass by direction."""
        content = zlib.decompress(base64.b64decode(self.scripts[f"maps-{pair}-{slot}"]))
        shown = self.pairs[pair]
        texts = sum(len(unit["tokens"]) for unit in (*shown["words"], *shown["special"]))
        places = int(np.prod(shown["images"][slot]["grid"])) + 1
        heads, found = self.about["heads"], {}
        for name in self.about["directions"]:
            rows, keys = (texts, places) if name == "t2i" else (places, texts)
            for part in ("teacher", "student")[: 1 + student]:
                levels = np.frombuffer(content[: heads * rows * keys], np.uint8).reshape(heads, rows, keys)
                content = content[heads * rows * keys :]
                found[name, part] = (levels / self.about["levels"]) ** 2
            for part, unit in (("kl", "kl_unit"), ("kept", "kept_unit")):
                if {"kl": student, "kept": sparse}[part]:
                    steps = np.frombuffer(content[: heads * rows * 2], "<u2").reshape(heads, rows)
                    content = content[heads * rows * 2 :]
                    found[name, part] = steps * self.about[unit]
        assert not content
        return found


def made(cache, shards, folder, choice=None, **options):
    report = view(cache, shards, folder / "page.html", choice or Choice(), **options)
    return report, Page(folder / "page.html")


def by_pair(page):
    return {(pair["key"], pair["slot"]): number for number, pair in enumerate(page.pairs)}


def student_of(run):
    return DualEncoder.from_pretrained(run / "model").eval()


def oracle(cache, shards, run, layer=LAYER, block=None):
    """Teacher's rows, student's log-probabilities and KL of every pair, by direction, from one batch."""
    batch = whole_batch(shards, cache.preprocessor(), (), CacheTargets(cache, shards, layer))
    student = student_of(run)
    student.keep_blocks([] if block is None else [block])
    output = student_output(student, batch)
    text, image, found = output.text, output.image, {}
    for name, query, key in (("t2i", text, image), ("i2t", image, text)):
        log = log_attention(query.block(block).query_key.query, key.block(block).query_key.key, key.mask)
        teacher = decoded(batch, name, cache.spec.steps)
        found[name] = teacher, log.exp().detach(), attention_kl(teacher, log, key.mask).detach(), query.mask
    return found


# --- numbers


def test_the_page_has_the_numbers_of_the_cache_and_of_the_student(cache, shards, run, tmp_path):
    report, page = made(cache, shards, tmp_path, Choice(count=100), run=run)
    pairs, expected, places = all_pairs(shards), oracle(cache, shards, run), by_pair(page)
    assert report.order == "divergence"
    assert report.pairs == len(pairs) == len(places) == report.of
    for row, pair in enumerate(pairs):
        found = page.maps(places[pair.key, pair.text], student=True)
        for name, (teacher, student, kl, _) in expected.items():
            _, queries, keys = found[name, "teacher"].shape
            for part, weights in (("teacher", teacher), ("student", student)):
                exact = weights[row, :, :queries, :keys].numpy()
                assert np.abs(np.sqrt(found[name, part]) - np.sqrt(exact)).max() <= 0.501 / 254
                assert exact.sum(-1) == pytest.approx(1, abs=1e-4)
            assert found[name, "kl"] == pytest.approx(kl[row, :, :queries].numpy(), abs=6e-4)


def test_the_worst_pairs_come_first(cache, shards, run, tmp_path):
    expected = 0
    for _, _, kl, mask in oracle(cache, shards, run).values():
        expected = expected + (kl.mean(1) * mask).sum(-1) / mask.sum(-1)
    order = expected.argsort(descending=True).tolist()
    pairs = all_pairs(shards)
    _, page = made(cache, shards, tmp_path, Choice(count=5), run=run)
    assert [(pair["key"], pair["slot"]) for pair in page.pairs] == [(pairs[n].key, pairs[n].text) for n in order[:5]]
    assert [pair["score"] for pair in page.pairs] == pytest.approx(expected[order[:5]].tolist(), rel=1e-4)


@pytest.mark.parametrize(("asked", "layer", "block"), [(None, 1, 1), (2, 2, 0)])
def test_of_a_layer_map_the_last_block_is_shown(sparse, shards, run, tmp_path, asked, layer, block):
    """Or the one that learns from the layer that is asked for."""
    mapped = tmp_path / "run"
    shutil.copytree(run, mapped)
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"layer_map": "1:1,2:0"}
    (mapped / "config.yaml").write_text(yaml.safe_dump(settings))
    report, page = made(sparse, shards, tmp_path, Choice(count=1, layer=asked), run=mapped)
    assert (report.layer, page.about["layer"]) == (layer, layer)
    assert report.learnt == page.about["learnt"]
    assert f"block {block} of the student" in report.learnt
    assert ("the last of its layer map" in report.learnt) == (asked is None)
    expected = 0
    for _, _, kl, mask in oracle(sparse, shards, run, layer, block).values():
        expected = expected + (kl.mean(1) * mask).sum(-1) / mask.sum(-1)
    assert page.pairs[0]["score"] == pytest.approx(float(expected.max()), rel=1e-4)
    assert made(sparse, shards, tmp_path, Choice(count=1), run=run)[0].learnt is None


def test_the_lowest_kept_mass_comes_first_without_a_run(sparse, shards, tmp_path):
    report, page = made(sparse, shards, tmp_path, Choice(count=100, layer=1))
    assert (report.order, report.layer) == ("kept mass", 1)
    batch = whole_batch(shards, sparse.preprocessor(), (), CacheTargets(sparse, shards, 1))
    kept = []
    for row, pair in enumerate(all_pairs(shards)):
        found = page.maps(by_pair(page)[pair.key, pair.text], sparse=True)
        for name in ("t2i", "i2t"):
            held = decoded(batch, name, None)
            queries = found[name, "kept"].shape[1]
            assert found[name, "kept"] == pytest.approx(1 - held.tail[row, :, :queries].numpy(), abs=6e-5)
            assert found[name, "teacher"].sum(-1) == pytest.approx(found[name, "kept"], abs=0.02)
        kept.append(np.mean([found[name, "kept"].mean() for name in ("t2i", "i2t")]))
    scores = [pair["score"] for pair in page.pairs]
    assert scores == sorted(scores, reverse=True)
    assert sorted(scores, reverse=True) == pytest.approx(sorted(1 - np.array(kept), reverse=True), abs=1e-3)


def test_where_every_key_is_kept_pairs_are_spread(cache, shards, tmp_path):
    report, page = made(cache, shards, tmp_path, Choice(count=4))
    assert report.order == "spread"
    pairs = all_pairs(shards)
    numbers = np.linspace(0, len(pairs) - 1, 4).round().astype(int)
    assert [(pair["key"], pair["slot"]) for pair in page.pairs] == [(pairs[n].key, pairs[n].text) for n in numbers]
    assert all(pair["score"] is None and pair["student"] is None for pair in page.pairs)


def test_the_worst_are_looked_for_among_so_many(cache, shards, run, tmp_path):
    report, page = made(cache, shards, tmp_path, Choice(count=2, among=5), run=run)
    assert (report.pairs, report.among, len(page.pairs)) == (2, 5, 2)
    assert "2 of 5 looked at" in page.about["chosen"]


def test_asked_keys_come_with_all_their_texts_in_the_order_asked(cache, shards, tmp_path):
    report, page = made(cache, shards, tmp_path, Choice(keys=("key-005", "key-001")))
    assert report.order == "keys"
    assert [(pair["key"], pair["slot"]) for pair in page.pairs] == [
        ("key-005", 0), ("key-005", 1), ("key-005", 2), ("key-001", 0), ("key-001", 1),
    ]  # fmt: skip


def test_a_student_that_learnt_no_attention_is_shown_and_that_is_said(cache, shards, run, tmp_path):
    train(shards, CachedTargets(cache), tmp_path / "soft", TrainConfig(**QUICK, attention_weight=0.0))
    report, page = made(cache, shards, tmp_path, Choice(count=1), run=tmp_path / "soft")
    assert report.learnt == page.about["learnt"] == "the student learnt without attention"
    assert made(cache, shards, tmp_path, Choice(count=1), run=run)[0].learnt is None


def test_answers_and_labels_are_those_of_the_models_and_the_shards(cache, shards, run, tmp_path):
    _, page = made(cache, shards, tmp_path, Choice(count=100), run=run)
    batch = whole_batch(shards, cache.preprocessor(), cache.labels, CacheTargets(cache, shards, LAYER))
    student = student_output(student_of(run), batch).logits.argmax(-1)
    teacher = batch["target.logits"].argmax(-1)
    for row, pair in enumerate(all_pairs(shards)):
        shown = page.pairs[by_pair(page)[pair.key, pair.text]]
        text = shards[pair.shard].read(pair.key).texts[pair.text]
        answers = cache.labels[teacher[row]], cache.labels[student[row]]
        assert (shown["teacher"], shown["student"]) == answers
        assert (shown["text"], shown["label"], shown["kind"]) == (text.text, text.label, text.kind)


def test_a_student_with_other_heads_is_compared_by_means(cache, sparse, shards, run, tmp_path):
    shape = json.loads((run / "model/config.json").read_text())
    shape["tower"]["num_attention_heads"] = 2
    other = tmp_path / "other"
    config = DualEncoder.config_class.from_dict(shape)
    randomise(DualEncoder(config)).save_pretrained(other / "model")
    cache.preprocessor().save(other / "model")
    _, page = made(cache, shards, tmp_path, Choice(keys=("key-000",)), run=other)
    assert page.about["heads"] == 1
    batch = whole_batch(shards, cache.preprocessor(), (), CacheTargets(cache, shards, LAYER))
    mean = decoded(batch, "t2i", cache.spec.steps)[0].mean(0)
    found = page.maps(0, student=True)["t2i", "teacher"][0]
    assert found == pytest.approx(mean[: found.shape[0], : found.shape[1]].numpy(), abs=5e-3)
    with pytest.raises(RunError, match="the means of log8 weights are not known"):
        view(sparse, shards, tmp_path / "no.html", Choice(), run=other)


def test_two_pictures_a_sample(save_teacher, tmp_path):
    answers = {0: "False", 1: "True"}
    teacher = save_teacher(
        ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3, id2label=answers,
        label2id={name: number for number, name in answers.items()},
    )  # fmt: skip
    shards = make_shards(tmp_path / "train", pairs_of_pictures(), size=4)
    cache = make_cache(shards, teacher, tmp_path / "cache")
    train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(task="nlvr2", **QUICK))
    _, page = made(cache, shards, tmp_path, Choice(count=3), run=tmp_path / "run")
    assert all(len(pair["images"]) == 2 for pair in page.pairs)
    batch = whole_batch(shards, cache.preprocessor(), (), CacheTargets(cache, shards, LAYER))
    rows = {(pair.key, pair.text): row for row, pair in enumerate(all_pairs(shards))}
    for number, pair in enumerate(page.pairs):
        found = page.maps(number, slot=1, student=True)["t2i", "teacher"]
        exact = decoded(batch, "t2i", cache.spec.steps, 1)[rows[pair["key"], pair["slot"]]]
        assert found == pytest.approx(exact[:, : found.shape[1], : found.shape[2]].numpy(), abs=5e-3)


def test_a_view_is_shown_with_its_own_pixels(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", views=2)
    pages = [made(cache, shards, tmp_path, Choice(keys=("key-000",), view=number))[1] for number in (0, 1)]
    assert "view 1 of 2" in pages[1].about["view"]
    pictures = [page.pairs[0]["images"][0]["picture"] for page in pages]
    assert pictures[0] != pictures[1]
    with pytest.raises(InputError, match="from 0 to 1, got 2"):
        view(cache, shards, tmp_path / "no.html", Choice(view=2))


TOKENIZERS = {"bert": bert_tokenizer(), "roberta": roberta_tokenizer()}


def tokens_alone(tokenizer):
    return Preprocessor(SimpleNamespace(tokenizer=tokenizer, image_processor=None), patch_size=12, text_length=32)


NEAR = st.text(st.sampled_from("redcircle squarthf?'-  \té🙂"), max_size=24)


@given(text=NEAR | st.text(max_size=24), name=st.sampled_from(sorted(TOKENIZERS)))
def test_words_of_a_text_have_every_token_once_and_read_as_the_text_does(text, name):
    tokenizer = TOKENIZERS[name]
    preprocessor = tokens_alone(tokenizer)
    words, special = text_units(preprocessor, text)
    ids = preprocessor.tokens([text]).ids[0].tolist()
    assert sorted(token for unit in (*words, *special) for token in unit["tokens"]) == list(range(len(ids)))
    assert [ids[unit["tokens"][0]] for unit in special] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    place = 0
    for word in words:
        place = text.index(word["text"], place) + len(word["text"])


def test_words_stand_as_in_the_text_whatever_the_tokenizer():
    text = "Is there a red-ish circle?"
    words, special = text_units(tokens_alone(TOKENIZERS["bert"]), text.lower())
    assert [word["text"] for word in words] == ["is", "there", "a", "red", "-", "ish", "circle", "?"]
    assert {word["text"]: word["pieces"] for word in words}["ish"] == ["[UNK]"]
    assert [one["text"] for one in special] == ["[CLS]", "[SEP]"]
    words, special = text_units(tokens_alone(TOKENIZERS["roberta"]), "there is a redis")
    assert [(word["text"], word["pieces"]) for word in words] == [
        ("there", ["there"]), ("is", ["is"]), ("a", ["a"]), ("redis", ["red", "i", "s"]),
    ]  # fmt: skip
    assert [one["text"] for one in special] == ["<s>", "</s>"]


# --- markup


@given(st.text())
def test_json_in_a_page_is_the_value_and_no_markup(text):
    written = json_text({"text": text})
    assert json.loads(written) == {"text": text}
    assert not re.search(r"[<>&\u2028\u2029]", written)


@given(st.text(), st.text())
def test_what_stands_in_one_part_is_no_place_of_another(one, other):
    page = fill_page("a {{one}} b {{other}} c {{policy}}{{style}}{{script}}", {"one": one, "other": other}, "")
    assert page.startswith(f"a {one} b {other} c default-src 'none'")


def test_strangers_texts_stay_text(cache, shards, run, tmp_path):
    _, page = made(cache, shards, tmp_path, Choice(count=100), run=run)
    assert HOSTILE in [pair["text"] for pair in page.pairs]
    assert "img" not in page.tags
    assert page.tags.count("script") == len(page.pairs) + 2
    assert not [one for one in page.attributes if one[1].startswith("on") or one[1] in ("src", "href")]
    assert "http:" not in page.source
    assert "https:" not in page.source


# --- what cannot be shown


def test_what_cannot_be_shown_is_said(cache, sparse, shards, tmp_path):
    for choice, match in (
        (Choice(keys=("key-000", "nobody", "no-one")), "nobody\n  - no-one"),
        (Choice(layer=0), r"--layer as one of the cache's \[1, 2\], got 0"),
    ):
        with pytest.raises(InputError, match=match):
            view(sparse, shards, tmp_path / "no.html", choice)
    with pytest.raises(RunError, match="expected a run of `dde-cache train` with a saved student"):
        view(cache, shards, tmp_path / "no.html", Choice(), run=tmp_path)
    subset(cache, tmp_path / "part", Selection(fields=("predictions",)))
    with pytest.raises(CacheError, match="predictions alone"):
        view(type(cache)(tmp_path / "part"), shards, tmp_path / "no.html", Choice())
    assert not (tmp_path / "no.html").exists()


def test_the_command(cache, shards, run, tmp_path):
    folder = shards[0].path.parent
    (tmp_path / "keys.txt").write_text("key-002\n")
    options = ("--run", run, "--key", "key-004", "--keys", tmp_path / "keys.txt", "--out", tmp_path / "page.html")
    done = cli("view", cache.folder, folder, *options)
    assert done.code == 0, done.err
    assert "5 pairs (keys) of layer 2" in done.out
    assert {pair["key"] for pair in Page(tmp_path / "page.html").pairs} == {"key-004", "key-002"}
    report = json.loads(cli("view", cache.folder, folder, "--out", tmp_path / "page.html", "--json").out)
    assert (report["order"], report["pairs"]) == ("spread", 13)
    wrong = cli("view", cache.folder, folder, "--key", "nobody", "--out", tmp_path / "page.html")
    assert wrong.code == 1
    assert "nobody" in wrong.message


# --- in a browser


def ready(browser, path, pair=0, **options):
    browser.open(path, **options)
    browser.wait(f"document.body.dataset.pair === '{pair}'")
    browser.settle()


def percents(browser, selector):
    texts = browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.textContent)")
    return [float(text.removesuffix(" %")) / 100 for text in texts]


def test_pointing_at_words_and_patches(browser, cache, shards, run, tmp_path):
    _, page = made(cache, shards, tmp_path, Choice(keys=("key-002",)), run=run)
    ready(browser, tmp_path / "page.html")
    pair, maps = page.pairs[0], page.maps(0, student=True)
    assert browser.run("document.querySelectorAll('#words button').length") == len(pair["words"])
    assert browser.run("document.querySelectorAll('#special button').length") == 2
    # A click chooses a word: its row, averaged over heads, in the table and beside the pictures.
    browser.click("#words button:nth-child(2)")
    word = pair["words"][1]
    assert word["text"] in browser.text("#word-title")
    row = maps["t2i", "teacher"].mean(0)[word["tokens"]].mean(0)
    assert percents(browser, "#patches td:nth-child(2)") == pytest.approx(sorted(row, reverse=True)[:6], abs=6e-3)
    kl = maps["t2i", "kl"].mean(0)[word["tokens"]].mean()
    assert f"KL of the student {kl:.3f} nats" in browser.text("#row-facts")
    # One head: by the list, then by a key.
    browser.press("h")
    assert "head 1" in browser.text("#word-title")
    row = maps["t2i", "student"][0][word["tokens"]].mean(0)
    shown = float(browser.text("figure[data-side=student] .cls").removeprefix("CLS ").removesuffix(" %")) / 100
    assert shown == pytest.approx(row[0], abs=6e-3)
    for _ in range(3):
        browser.press("h")
    assert "mean of the heads" in browser.text("#word-title")
    # A click on a patch: its weights over the words.
    rows, columns = pair["images"][0]["grid"]
    browser.click("figure[data-side=teacher] canvas", x=(columns - 0.5) / columns, y=(rows - 0.5) / rows)
    assert f"row {rows}, column {columns}" in browser.text("#patch-title")
    row = maps["i2t", "teacher"].mean(0)[rows * columns]
    units = [*pair["words"], *pair["special"]]
    expected = [row[unit["tokens"]].sum() for unit in units]
    assert percents(browser, "#links td:nth-child(2)") == pytest.approx(expected, abs=6e-3)
    assert browser.text("#spoken").startswith(f"row {rows}, column {columns}: ")
    assert browser.complaints() == []


def test_hovering_shows_for_a_moment(browser, cache, shards, tmp_path):
    _, page = made(cache, shards, tmp_path, Choice(keys=("key-002",)))
    ready(browser, tmp_path / "page.html")
    words = [word["text"] for word in page.pairs[0]["words"]]
    browser.point("#words button:nth-child(3)")
    assert f"“{words[2]}”" in browser.text("#word-title")
    browser.point("h1")
    assert f"“{words[0]}”" in browser.text("#word-title")
    before = browser.text("#patch-title")
    browser.point("canvas", x=0.99, y=0.99)
    assert browser.text("#patch-title") != before
    browser.point("h1")
    assert browser.text("#patch-title") == before


def test_the_keyboard_is_enough(browser, cache, shards, run, tmp_path):
    _, page = made(cache, shards, tmp_path, Choice(count=6), run=run)
    ready(browser, tmp_path / "page.html")
    browser.press("Tab")
    browser.press("ArrowDown")
    browser.wait("document.body.dataset.pair === '1'")
    browser.settle()
    assert page.pairs[1]["key"] in browser.text("#key")
    assert browser.text("#pairs button[aria-current=true]").startswith("2. ")
    browser.press("Tab")  # heads
    browser.press("Tab")  # first word
    browser.press("ArrowRight")
    assert f"“{page.pairs[1]['words'][1]['text']}”" in browser.text("#word-title")
    steps = 0
    while browser.run("document.activeElement.tagName") != "CANVAS":
        browser.press("Tab")
        steps += 1
        assert steps < 40
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    columns, rows = page.pairs[1]["images"][0]["grid"][1], page.pairs[1]["images"][0]["grid"][0]
    assert f"row {min(2, rows)}, column {min(2, columns)}" in browser.text("#patch-title")
    assert browser.complaints() == []


def test_a_strangers_page_does_nothing(browser, cache, shards, run, tmp_path):
    made(cache, shards, tmp_path, Choice(keys=("key-003",)), run=run)
    ready(browser, tmp_path / "page.html")
    assert browser.text("#answers dd") == HOSTILE
    assert browser.run("document.title") == "Attention in cache"
    assert browser.run("document.querySelectorAll('#answers img, #pairs img, #answers b').length") == 0
    assert browser.complaints() == []


def test_the_policy_stops_what_is_not_ours(browser, cache, shards, tmp_path):
    made(cache, shards, tmp_path)
    path = tmp_path / "page.html"
    path.write_text(path.read_text().replace("</main>", "<script>document.title = 'taken'</script></main>"))
    ready(browser, path)
    assert browser.run("document.title") == "Attention in cache"
    assert browser.complaints()
    with pytest.raises(RuntimeError, match="Failed to fetch"):
        browser.run("fetch('https://example.org')")


def test_pictures_are_drawn_with_squares_in_both_schemes(browser, cache, shards, run, tmp_path):
    made(cache, shards, tmp_path, Choice(count=2), run=run)
    ready(browser, tmp_path / "page.html")
    pixels = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 60, 60).data].join()"
    first = browser.run(pixels)
    assert len(set(first.split(","))) > 20
    browser.click("#words button:nth-child(2)")
    assert browser.run(pixels) != first
    papers = []
    for dark in (False, True):
        ready(browser, tmp_path / "page.html", dark=dark)
        papers.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(255, 255, 255)", "rgb(22, 22, 26)"]
    ready(browser, tmp_path / "page.html", width=400)
    assert browser.run("document.documentElement.scrollWidth <= 400")


def test_a_damaged_page_says_so(browser, cache, shards, tmp_path):
    made(cache, shards, tmp_path)
    path = tmp_path / "page.html"
    path.write_text(re.sub(r'(id="maps-0-0">)....', r"\1AAAA", path.read_text()))
    browser.open(path)
    browser.wait("!document.getElementById('problem').hidden")
    assert "damaged" in browser.text("#problem")
