"""Answers from stored pictures are those of the whole model; search is a full sort; every wrong turn is one message."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline import LABELS, cli, make_samples, make_shards
from students import PAIRS, SIMILARITY, save_student

from dde_cache.batches import PairDataset
from dde_cache.embed import Images, Texts, embed
from dde_cache.embeddings import EmbeddingStore
from dde_cache.errors import CacheError, InputError, RunError
from dde_cache.inference import Student
from dde_cache.pictures import open_pictures
from dde_cache.predict import predict
from dde_cache.questions import Question, read_questions
from dde_cache.samples import open_shards
from dde_cache.scores import predict as evaluate
from dde_cache.search import best_rows, cosines, search
from dde_cache.stream import PairTable
from dde_cache.train import output_of


def stored(student, data, out, **options):
    embed(student, Images(open_pictures(str(data), student.images)), out, unit_rows=3, **options)
    return EmbeddingStore(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shards, a student that answers and one that compares, and a store of each: run, find, images, found, texts."""
    folder = tmp_path_factory.mktemp("place")
    make_shards(folder / "shards")
    for name, head in (("run", None), ("find", SIMILARITY)):
        student = Student.from_pretrained(save_student(folder / name, **({"head": head} if head else {})))
        stored(student, folder / "shards", folder / f"{name}-images")
        embed(student, Texts(read_questions(folder / "shards"), "shards"), folder / f"{name}-texts", unit_rows=4)
    return folder


@pytest.fixture(scope="module")
def student(place):
    return Student.from_pretrained(place / "run")


@pytest.fixture(scope="module")
def finder(place):
    return Student.from_pretrained(place / "find")


def works(*arguments):
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert (
        arguments[0] == "predict" or "--json" in arguments or all(len(line) <= 80 for line in done.out.splitlines())
    ), done.out
    return done


def fails(*arguments, expected):
    done = cli(*arguments)
    assert done.code == 1, (done.code, done.out, done.err)
    assert done.message.startswith("error: "), done.err
    assert "Traceback" not in done.err
    assert expected in done.message, done.err


# --- answers


def test_answers_are_those_of_evaluation(place, student):
    shards = open_shards(place / "shards")
    table = PairTable.of(shards)
    dataset = PairDataset(shards, table, student.preprocessor, LABELS)
    run = output_of(student.model)
    with torch.inference_mode():
        expected = run(dataset.__getitems__([*range(len(table))])).logits.softmax(-1)
    assert torch.equal(evaluate(lambda batch: run(batch).logits, dataset).answer, expected.argmax(-1))
    questions = read_questions(place / "shards")
    answers = list(predict(student, EmbeddingStore(place / "run-images"), questions))
    assert [(one.key, one.slot, one.text) for one in answers] == [(one.key, one.slot, one.text) for one in questions]
    for row, answer in zip(expected.tolist(), answers, strict=True):
        assert answer.probabilities == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-5)
        assert answer.answer == LABELS[int(np.argmax(row))]
    assert len({answer.answer for answer in answers}) > 1


def test_no_image_tower_runs(place):
    student = Student.from_pretrained(place / "run")
    del student.model.image_tower.encoder
    question = Question("q", 0, "blue ?", ("key-003",))
    student.fingerprint = EmbeddingStore(place / "run-images").index.student
    assert len(list(predict(student, EmbeddingStore(place / "run-images"), [question]))) == 1


def test_two_pictures_an_answer(tmp_path):
    pair = Student.from_pretrained(save_student(tmp_path / "run", PAIRS))
    (tmp_path / "album").mkdir()
    for number, sample in enumerate(make_samples(3)):
        (tmp_path / "album" / f"{number}.png").write_bytes(sample.images[0].content)
    store = stored(pair, tmp_path / "album", tmp_path / "out")
    lines = tmp_path / "questions.jsonl"
    lines.write_text('{"text": "blue ?", "images": ["2.png", "0.png"]}\n{"text": "blue ?", "image": "1.png"}\n')
    answers = list(predict(pair, store, read_questions(lines)))
    for answer, names in zip(answers, (("2.png", "0.png"), ("1.png", "1.png")), strict=True):
        images = [pair.encode_images([tmp_path / "album" / name], slot=slot) for slot, name in enumerate(names)]
        expected = pair.answer(pair.encode_texts(["blue ?"]), *images)[0]
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_questions_without_a_stored_picture_are_all_listed(place, student):
    store = EmbeddingStore(place / "run-images")
    questions = [
        Question("a", 0, "blue ?", ("key-001",)),
        Question("b", 0, "blue ?", ("nowhere",)),
        Question("c", 1, "blue ?", ("key-001", "key-002")),
        Question("d", 0, "blue ?", ()),
    ]
    with pytest.raises(InputError) as caught:
        predict(student, store, questions)
    message = str(caught.value)
    assert message.startswith("3 of 4 questions")
    assert "b, text 0: 'nowhere' not in" in message
    assert "c, text 1: expected 1 pictures for this student, got 2" in message
    assert "d, text 0: expected 1 pictures for this student, got 0" in message


def test_stores_that_do_not_belong_are_refused(place, student, finder):
    questions = [Question("a", 0, "blue ?", ("key-001",))]
    with pytest.raises(CacheError, match="expected vectors of the student in"):
        predict(student, EmbeddingStore(place / "find-images"), questions)
    with pytest.raises(CacheError, match="expected a store of pictures, got one of texts"):
        predict(student, EmbeddingStore(place / "run-texts"), questions)
    with pytest.raises(RunError, match="use `dde-cache search`"):
        predict(finder, EmbeddingStore(place / "find-images"), questions)


def test_malformed_lines_are_all_listed(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"text": "a", "image": "x", "label": "yes", "kind": "k", "meta": {}}\n{"text": "a"\n{"image": "x"}\n[]\n'
        '{"text": " "}\n{"text": "a", "image": "x", "images": ["y"]}\n{"text": "a", "colour": "red"}\n'
    )
    with pytest.raises(InputError) as caught:
        read_questions(path)
    assert "6 lines are not" in str(caught.value)
    assert all(f"line {number}: " in str(caught.value) for number in range(2, 8))
    path.write_text("\n")
    with pytest.raises(InputError, match="expected texts, found none"):
        read_questions(path)
    with pytest.raises(InputError, match="no such file"):
        read_questions(tmp_path / "gone.jsonl")


# --- search


@given(
    rows=st.integers(1, 60),
    cuts=st.lists(st.integers(1, 59), max_size=4),
    top=st.integers(1, 12),
    copies=st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
def test_search_is_a_full_sort_in_blocks_of_any_size(rows, cuts, top, copies, seed):
    """Rows repeat, so there are ties, which keep their order; scales differ, which cosines do not see."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(rows, 8)).astype(np.float32)[random.integers(0, min(copies, rows), rows)]
    vectors *= 2.0 ** random.integers(-3, 4, (rows, 1))
    query = random.normal(size=8)
    edges = [0, *sorted({cut for cut in cuts if cut < rows}), rows]
    blocks = [(start, vectors[start:end]) for start, end in pairwise(edges)]
    found, scores = best_rows(blocks, cosines(query), top)
    wide = vectors.astype(np.float64)
    expected = wide @ query / np.linalg.norm(wide, axis=-1) / np.linalg.norm(query)
    order = np.lexsort((np.arange(rows), -expected.round(6)))[:top]
    assert found.tolist() == order.tolist()
    np.testing.assert_allclose(scores, expected[order], atol=6e-7)


def test_pictures_for_a_text_and_texts_for_a_picture(place, finder):
    samples = [sample for shard in open_shards(place / "shards") for sample in shard]
    texts = [(sample.key, slot, text.text) for sample in samples for slot, text in enumerate(sample.texts)]
    cosine = finder.similarity(
        finder.encode_texts([text for *_, text in texts]), finder.encode_images([one.images[0] for one in samples])
    )
    hits = search(finder, EmbeddingStore(place / "find-images"), texts[4][2], top=3)
    order = cosine[4].argsort(descending=True)[:3].tolist()
    assert [hit.key for hit in hits] == [samples[row].key for row in order]
    assert [hit.score for hit in hits] == pytest.approx(cosine[4][order].tolist(), abs=1e-5)
    picture = place / "picture.png"
    picture.write_bytes(samples[2].images[0].content)
    hits = search(finder, EmbeddingStore(place / "find-texts"), picture, top=100)
    assert len(hits) == len(texts)
    assert [hit.rank for hit in hits] == list(range(1, len(texts) + 1))
    scores = dict(zip(texts, cosine[:, 2].tolist(), strict=True))
    assert [hit.score for hit in hits] == pytest.approx([scores[hit.key, hit.slot, hit.text] for hit in hits], abs=1e-5)
    equal = [(hit.key, hit.slot) for hit in hits if hit.text == texts[0][2]]
    assert len(equal) > 1
    assert equal == sorted(equal)  # one text many times: in the order of the store


def test_a_student_that_answers_ranks_by_the_probability_of_an_answer(place, student):
    samples = [sample for shard in open_shards(place / "shards") for sample in shard]
    images = student.encode_images([one.images[0] for one in samples])
    expected = student.probabilities(student.encode_texts(["blue ?"]), images)[:, 2]
    hits = search(student, EmbeddingStore(place / "run-images"), "blue ?", top=4, answer="red")
    order = expected.argsort(descending=True)[:4].tolist()
    assert [hit.key for hit in hits] == [samples[row].key for row in order]
    assert [hit.score for hit in hits] == pytest.approx(expected[order].tolist(), abs=1e-5)
    picture = place / "picture.png"
    picture.write_bytes(samples[2].images[0].content)
    best = search(student, EmbeddingStore(place / "run-texts"), picture, top=1, answer="red")[0]
    texts = [text.text for sample in samples for text in sample.texts]
    reached = student.probabilities(student.encode_texts(texts), images[2:3])[:, 2].max()
    assert best.score == pytest.approx(float(reached), abs=1e-5)


def test_searches_that_make_no_sense_are_refused(place, student, finder, tmp_path):
    images, texts = EmbeddingStore(place / "run-images"), EmbeddingStore(place / "run-texts")
    for run, store, query, answer, error, message in (
        (student, images, "blue ?", None, RunError, r"with --answer \(no, yes, red\)"),
        (student, images, "blue ?", "green", InputError, "expected --answer among"),
        (student, texts, "blue ?", "red", CacheError, "expected a store of pictures"),
        (finder, images, "blue ?", None, CacheError, "expected vectors of the student in"),
        (finder, images, "blue ?", "red", RunError, "leave --answer out"),
        (student, images, tmp_path / "x.png", "red", CacheError, "expected a store of texts"),
        (student, texts, tmp_path / "x.png", "red", InputError, "No such file"),
    ):
        with pytest.raises(error, match=message):
            search(run, store, query, answer=answer)
    pair = Student.from_pretrained(save_student(tmp_path / "pair", PAIRS))
    with pytest.raises(RunError, match="reads 2 pictures for an answer"):
        search(pair, images, "blue ?", answer="red")


# --- the commands


def test_the_commands(place, tmp_path):
    run, data, out = place / "run", place / "shards", tmp_path / "out"
    shown = works("embed", run, "--images", data, "--out", out)
    assert "8 in 1 units" in shown.out
    assert json.loads(works("embed", run, "--images", data, "--out", out, "--json").out)["units_kept"] == 1
    lines = works("predict", run, "--image-store", out, "--questions", data, "--top", 2).out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == len(read_questions(data))
    assert all(len(answer["probabilities"]) == 2 for answer in answers)
    works("predict", run, "--image-store", out, "--questions", data, "--top", 2, "--out", tmp_path / "answers.jsonl")
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == answers
    table = works("search", run, "--store", out, "a red circle", "--answer", "yes", "--top", 3).out
    assert table.count("key-") == 3
    hits = json.loads(works("search", run, "--store", out, "a red circle", "--answer", "yes", "--json").out)["hits"]
    assert [hit["rank"] for hit in hits] == list(range(1, 9))


def test_wrong_turns(place, tmp_path):
    run, data, images = place / "run", place / "shards", place / "run-images"
    fails("embed", run, "--out", tmp_path / "x", expected="expected --images or --texts, got neither")
    fails("embed", tmp_path, "--images", data, "--out", tmp_path / "x", expected="expected a run of `dde-cache train`")
    fails("embed", run, "--images", tmp_path / "no", "--out", tmp_path / "x", expected="these do not exist")
    fails("embed", run, "--images", data, "--out", place, expected="expected a new or empty folder, or a store")
    fails("embed", place / "find", "--images", data, "--out", images, expected="begun with another student")
    fails("predict", run, "--image-store", data, "--questions", data, expected="expected a store of embeddings")
    fails("predict", run, "--image-store", place / "find-images", "--questions", data, expected="embed again with")
    fails("search", run, "--store", images, expected="expected a text or --image, got neither")
    fails("search", run, "--store", images, " ", expected="only white space")
    fails("search", run, "--store", images, "blue", expected="--answer (no, yes, red)")
