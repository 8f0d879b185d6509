"""The page of `dde-cache view` where a cache has one direction: this one whole, and of the other one sentence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomise
from families import save_family
from pipeline import all_pairs, cli, make_cache, make_samples, make_shards, whole_batch
from test_two_images import pairs_of_pictures
from test_view import QUICK, Page, by_pair, made, percents, ready, student_of
from transformers import ViltForImagesAndTextClassification

from dde_cache.distill import StudentLosses, TrainConfig, student_output
from dde_cache.errors import CacheError
from dde_cache.gallery import Choice, view
from dde_cache.losses import attention_kl, log_attention
from dde_cache.sources import CachedTargets
from dde_cache.store import Cache
from dde_cache.student import DualEncoder
from dde_cache.targets import CacheTargets, decoded
from dde_cache.teachers.vilt import Vilt
from dde_cache.train import train

LAYER = 2
WAYS = ("t2i", "i2t")
OTHER = {"t2i": "i2t", "i2t": "t2i"}
LACKS = {
    "t2i": "This cache has no image-to-text attention: there is no row of a patch to show.",
    "i2t": "This cache has no text-to-image attention: there is no row of a word to show.",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(6))


@pytest.fixture(scope="module")
def one_way(shards, teacher_folder, tmp_path_factory):
    """Caches of a ViLT that is said to have one direction, by direction and settings."""
    found = {}

    def make(way, data=shards, teacher=teacher_folder, **config):
        name = (way, str(teacher), *sorted(config))
        if name not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Vilt, "directions", (way,))
                found[name] = make_cache(data, teacher, tmp_path_factory.mktemp("cache") / "cache", **config)
        assert found[name].spec.directions == (way,)
        return found[name]

    return make


@pytest.fixture(scope="module")
def runs(shards, teacher_folder, one_way, tmp_path_factory):
    """Runs that learnt one direction, or both, with large random weights: fresh ones have nearly even attention."""
    folder = tmp_path_factory.mktemp("runs")
    both = make_cache(shards, teacher_folder, tmp_path_factory.mktemp("both") / "cache")
    for way in (*WAYS, "both"):
        cache = both if way == "both" else one_way(way)
        train(shards, CachedTargets(cache), folder / way, TrainConfig(directions=way, **QUICK))
        model = folder / way / "model"
        randomise(DualEncoder.from_pretrained(model), seed=5).save_pretrained(model)
    return folder


# --- numbers


@pytest.mark.parametrize("learnt", ["one", "both"])
@pytest.mark.parametrize("way", WAYS)
def test_the_page_has_the_numbers_of_the_direction_that_there_is(one_way, runs, shards, tmp_path, way, learnt):
    """Whether the student has learnt this direction alone or both; the worst by this direction's loss come first."""
    cache, run = one_way(way), runs / (way if learnt == "one" else "both")
    report, page = made(cache, shards, tmp_path, Choice(count=100), run=run)
    assert page.about["directions"] == [way]
    assert (report.order, report.learnt) == ("divergence", None)
    batch = whole_batch(shards, cache.preprocessor(), (), CacheTargets(cache, shards, LAYER, rows=(way,)))
    output = student_output(student_of(run), batch)
    query, key = (output.text, output.image) if way == "t2i" else (output.image, output.text)
    log = log_attention(query.query_key.query, key.query_key.key, key.mask).detach()
    teacher = decoded(batch, way, cache.spec.steps)
    kl = attention_kl(teacher, log, key.mask)
    scores, places = (kl.mean(1) * query.mask).sum(-1) / query.mask.sum(-1), by_pair(page)
    for row, pair in enumerate(all_pairs(shards)):
        number = places[pair.key, pair.text]
        found = page.maps(number, student=True)
        assert {name for name, _ in found} == {way}
        _, queries, keys = found[way, "teacher"].shape
        for part, weights in (("teacher", teacher), ("student", log.exp())):
            exact = weights[row, :, :queries, :keys].numpy()
            assert np.abs(np.sqrt(found[way, part]) - np.sqrt(exact)).max() <= 0.501 / 254
        assert found[way, "kl"] == pytest.approx(kl[row, :, :queries].numpy(), abs=6e-4)
        assert page.pairs[number]["score"] == pytest.approx(float(scores[row]), rel=1e-4)
    shown = [pair["score"] for pair in page.pairs]
    assert shown == sorted(shown, reverse=True)
    # It is the loss that training reports.
    config = TrainConfig(directions=way, soft_weight=0.0)
    losses = StudentLosses(config, CachedTargets(cache), False)
    with torch.inference_mode():
        alone = losses(student_of(run), whole_batch(shards, cache.preprocessor(), (), CacheTargets(
            cache, shards, LAYER, rows=(way,)), pairs=[0]))  # fmt: skip
    assert float(alone["loss"]) == pytest.approx(float(scores[0]), rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_lowest_kept_mass_of_this_direction_comes_first(one_way, shards, tmp_path, way):
    cache = one_way(way, k=2)
    report, page = made(cache, shards, tmp_path, Choice(count=100))
    assert report.order == "kept mass"
    batch = whole_batch(shards, cache.preprocessor(), (), CacheTargets(cache, shards, LAYER, rows=(way,)))
    tail = decoded(batch, way, None).tail
    for row, pair in enumerate(all_pairs(shards)):
        number = by_pair(page)[pair.key, pair.text]
        kept = page.maps(number, sparse=True)[way, "kept"]
        assert kept == pytest.approx(1 - tail[row, :, : kept.shape[1]].numpy(), abs=6e-5)
        assert page.pairs[number]["score"] == pytest.approx(1 - kept.mean(), abs=1e-3)
    shown = [pair["score"] for pair in page.pairs]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > shown[-1]


@pytest.mark.parametrize("way", WAYS)
def test_a_student_that_learnt_the_other_direction_is_shown_and_that_is_said(one_way, runs, shards, tmp_path, way):
    report, page = made(one_way(way), shards, tmp_path, Choice(count=1), run=runs / OTHER[way])
    assert report.learnt == page.about["learnt"] == f"the student learnt from {OTHER[way]} attention alone"


def test_blip(tmp_path):
    """The family that has text-to-image alone, as a user takes it from shards to a page."""
    words = {"no": "unmatched", "yes": "matched", "red": None}
    samples = [
        replace(one, texts=tuple(text.model_copy(update={"label": words[text.label]}) for text in one.texts))
        for one in make_samples(4)
    ]
    make_shards(tmp_path / "data", samples)
    save_family("blip", tmp_path / "teacher")
    common = ("train", tmp_path / "data", "--targets", tmp_path / "cache", "--out", tmp_path / "run")
    options = ("--steps", 2, "--batch-size", 4, "--set", "workers=0", "--directions", "t2i")
    page = ("view", tmp_path / "cache", tmp_path / "data", "--run", tmp_path / "run", "--out", tmp_path / "page.html")
    for command in (
        ("extract", tmp_path / "data", "--teacher", tmp_path / "teacher", "--out", tmp_path / "cache"),
        (*common, *options),
        page,
    ):
        done = cli(*command)
        assert done.code == 0, done.err
    shown = Page(tmp_path / "page.html")
    assert shown.about["directions"] == ["t2i"]
    found = shown.maps(0, student=True)
    assert found["t2i", "teacher"].sum(-1) == pytest.approx(1, abs=0.02)
    assert {pair["teacher"] for pair in shown.pairs} <= {"unmatched", "matched"}


def test_what_is_no_map_over_patches_stays_refused(one_way, shards, tmp_path):
    """Regions of a detector have no grid. (No version of ours writes such caches yet.)"""
    cache = Cache(one_way("t2i").folder)
    cache.manifest = cache.manifest.model_copy(
        update={"spec": cache.spec.model_copy(update={"rule": "block-softmax, regions"})}
    )
    with pytest.raises(CacheError, match=r"a picture's patches.* got another image axis \(block-softmax, r"):
        view(cache, shards, tmp_path / "no.html", Choice())
    assert not (tmp_path / "no.html").exists()


# --- in a browser


def no_empty_widgets(browser):
    """Nothing that is announced or reached by keyboard is without content or name."""
    empty = browser.run(
        "[...document.querySelector('main').querySelectorAll('h3, p:not(#problem):not(#spoken), section, tbody, thead,"
        " button, select, [role=group], td, figure')]"
        ".filter(one => !one.textContent.trim()).map(one => one.outerHTML)"
    )
    assert empty == []
    unnamed = "[...document.querySelectorAll('canvas')].filter(one => !one.getAttribute('aria-label')).length"
    assert browser.run(unnamed) == 0
    dangling = (
        "[...document.querySelectorAll('[aria-labelledby]')].filter(one =>"
        " !document.getElementById(one.getAttribute('aria-labelledby'))?.textContent.trim()).length"
    )
    assert browser.run(dangling) == 0


def walked(browser):
    """What the keyboard reaches, from the first pair on."""
    found = []
    for _ in range(60):
        browser.press("Tab")
        one = browser.run(
            "(e => e === document.body ? null : e.closest('figure') ? e.tagName : e.closest('#pairs') ? 'pair' :"
            " e.closest('[role=group]')?.id ?? e.id)(document.activeElement)"
        )
        if one is None:
            break
        found.append(one)
    return found


def test_a_page_without_rows_of_patches(browser, one_way, runs, shards, tmp_path):
    _, page = made(one_way("t2i"), shards, tmp_path, Choice(keys=("key-002",)), run=runs / "t2i")
    ready(browser, tmp_path / "page.html")
    pair, maps = page.pairs[0], page.maps(0, student=True)
    assert browser.text("#patch-title") == "Patches to the sentence"
    assert browser.text("section[aria-labelledby=patch-title] .none") == LACKS["t2i"]
    assert browser.run("document.querySelectorAll('.none').length") == 1
    no_empty_widgets(browser)
    assert browser.run("document.querySelectorAll('#links, #patch-facts, button.cls').length") == 0
    assert "patch" not in browser.text(".controls .hint")
    # Its half is whole.
    browser.click("#words button:nth-child(2)")
    word = pair["words"][1]
    row = maps["t2i", "teacher"].mean(0)[word["tokens"]].mean(0)
    assert percents(browser, "#patches td:nth-child(2)") == pytest.approx(sorted(row, reverse=True)[:6], abs=6e-3)
    kl = maps["t2i", "kl"].mean(0)[word["tokens"]].mean()
    assert f"KL of the student {kl:.3f} nats" in browser.text("#row-facts")
    assert browser.text("figure[data-side=student] .cls").startswith("CLS ")
    assert browser.text("#spoken").startswith(f"{word['text']}: ")
    browser.press("h")
    assert "head 1" in browser.text("#word-title")
    # Pictures are pictures: nothing happens there, and the keyboard goes past them.
    assert browser.run("[...document.querySelectorAll('canvas')].map(one => one.getAttribute('role'))") == ["img"] * 2
    pixels = "document.querySelector('canvas').toDataURL()"
    before = browser.run(pixels)
    browser.click("figure[data-side=teacher] canvas", x=0.9, y=0.9)
    assert browser.run(pixels) == before
    ready(browser, tmp_path / "page.html")
    assert walked(browser) == ["pair", "head", *["words"] * len(pair["words"]), *["special"] * len(pair["special"])]
    assert browser.complaints() == []
    ready(browser, tmp_path / "page.html", width=400)
    assert browser.run("document.documentElement.scrollWidth <= 400")


def test_a_page_without_rows_of_words(browser, one_way, runs, shards, tmp_path):
    _, page = made(one_way("i2t"), shards, tmp_path, Choice(keys=("key-002",)), run=runs / "i2t")
    ready(browser, tmp_path / "page.html")
    pair, maps = page.pairs[0], page.maps(0, student=True)
    assert browser.text("#word-title") == "Words to the picture"
    assert browser.text("section[aria-labelledby=word-title] .none") == LACKS["i2t"]
    assert browser.run("document.querySelectorAll('.none').length") == 1
    no_empty_widgets(browser)
    assert browser.run("document.querySelectorAll('#words, #special, #row-facts, #patches, #heads').length") == 0
    assert "word" not in browser.text(".controls .hint")
    assert browser.text("#answers dd") == pair["text"]
    # One picture, drawn plain, that patches are chosen on.
    assert browser.run("document.querySelectorAll('canvas').length") == 1
    rows, columns = pair["images"][0]["grid"]
    units = [*pair["words"], *pair["special"]]

    def expected(side, token, head=None):
        row = maps["i2t", side].mean(0) if head is None else maps["i2t", side][head]
        return pytest.approx([row[token][unit["tokens"]].sum() for unit in units], abs=6e-3)

    browser.click("canvas", x=(columns - 0.5) / columns, y=(rows - 0.5) / rows)
    assert f"row {rows}, column {columns}" in browser.text("#patch-title")
    assert percents(browser, "#links td:nth-child(2)") == expected("teacher", rows * columns)
    assert percents(browser, "#links td:nth-child(3)") == expected("student", rows * columns)
    kl = maps["i2t", "kl"].mean(0)[rows * columns]
    assert f"KL of the student {kl:.3f} nats" in browser.text("#patch-facts")
    assert browser.run("document.querySelectorAll('#links tr.now').length") == 0
    browser.press("h")
    assert "head 1" in browser.text("#patch-title")
    assert percents(browser, "#links td:nth-child(2)") == expected("teacher", rows * columns, 0)
    assert browser.text("#spoken").startswith(f"row {rows}, column {columns}: ")
    browser.click(".cls")
    assert "Patch CLS" in browser.text("#patch-title")
    assert browser.run("document.querySelector('.cls').getAttribute('aria-pressed')") == "true"
    browser.run("document.querySelector('#pairs button').focus()")
    assert walked(browser) == ["head", "CANVAS", "BUTTON"]
    browser.run("document.querySelector('canvas').focus()")
    pixels = "document.querySelector('canvas').toDataURL()"
    before = browser.run(pixels)
    browser.press("ArrowRight")
    assert "column 2" in browser.text("#patch-title")
    assert browser.run(pixels) != before
    assert browser.complaints() == []
    ready(browser, tmp_path / "page.html", width=400)
    assert browser.run("document.documentElement.scrollWidth <= 400")


def test_two_pictures_without_rows_of_patches(browser, save_teacher, one_way, tmp_path):
    """No picture can be pointed at, so the table of heads has both."""
    answers = {0: "False", 1: "True"}
    teacher = save_teacher(
        ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3, id2label=answers,
        label2id={name: number for number, name in answers.items()},
    )  # fmt: skip
    shards = make_shards(tmp_path / "train", pairs_of_pictures(), size=4)
    _, page = made(one_way("t2i", shards, teacher), shards, tmp_path, Choice(count=1))
    ready(browser, tmp_path / "page.html")
    names = browser.run("[...document.querySelectorAll('#heads td:first-child')].map(one => one.textContent)")
    assert names == [f"image {image}, {head}" for image in (1, 2) for head in ("mean", 1, 2, 3)]
    strongest = browser.run("[...document.querySelectorAll('#heads td:last-child')].map(one => one.textContent)")
    word = page.pairs[0]["words"][0]["tokens"]
    for slot in (0, 1):
        row = page.maps(0, slot)["t2i", "teacher"].mean(0)[word].mean(0)
        assert float(strongest[4 * slot].rpartition("(")[2].split()[0]) / 100 == pytest.approx(row.max(), abs=6e-3)
    no_empty_widgets(browser)
    assert browser.complaints() == []
