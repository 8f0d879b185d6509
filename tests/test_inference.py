"""A student at work: its two sides apart give what the whole model gives, and what is not a student is refused."""

import json

import pytest
import torch
from conftest import picture
from PIL import Image
from pipeline import LABELS, all_pairs, make_samples, make_shards, whole_batch
from students import ANSWERS, PAIRS, SIMILARITY, save_student

from dde_cache.batches import pictures_of
from dde_cache.errors import InputError, RunError
from dde_cache.inference import Student
from dde_cache.samples import Sample

QUESTIONS = ("is there a red square ?", "blue ?", "a red circle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def student(folder):
    return Student.from_pretrained(folder)


@pytest.fixture
def files(tmp_path, pictures):
    for number, one in enumerate(pictures):
        one.save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(len(pictures))]


def test_both_sides_apart_give_the_whole_models_logits(tmp_path, student):
    shards = make_shards(tmp_path / "shards")
    batch = whole_batch(shards, student.preprocessor, LABELS)
    expected = student.model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"]).logits
    samples = {sample.key: sample for shard in shards for sample in shard}
    pairs = all_pairs(shards)
    texts = student.encode_texts([samples[pair.key].texts[pair.text].text for pair in pairs], batch_size=3)
    images = student.encode_images([samples[pair.key].images[0] for pair in pairs], batch_size=4)
    assert torch.allclose(student.logits(texts, images), expected, atol=1e-5)
    assert expected.std(0).min() > 1e-3  # large enough for a mistake to show


def test_two_pictures_are_encoded_by_their_slots(tmp_path):
    pair = Student.from_pretrained(save_student(tmp_path / "pair", PAIRS))
    samples = [Sample(one.key, (one.images[0], other.images[0]), one.texts) for one, other in zip(
        make_samples(4), make_samples(4, seed=5), strict=True)]  # fmt: skip
    batch = whole_batch(make_shards(tmp_path / "shards", samples), pair.preprocessor, LABELS)
    first, second = pictures_of(batch)
    expected = pair.model(
        batch["input_ids"], batch["attention_mask"], first.pixels, first.grid, second.pixels, second.grid
    ).logits
    rows = [(one, text.text) for one in samples for text in one.texts]
    images = [pair.encode_images([one.images[slot] for one, _ in rows], slot=slot) for slot in (0, 1)]
    got = pair.logits(pair.encode_texts([text for _, text in rows]), *images)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(images[1], pair.encode_images([one.images[1] for one, _ in rows], slot=0), atol=1e-3)
    with pytest.raises(InputError, match="expected 2 pictures an answer"):
        pair.answer(got, images[0])


def test_order_and_batches_do_not_matter(student, files):
    texts = [*QUESTIONS, "is the green circle left of the square ?"]
    whole = student.encode_texts(texts)
    assert torch.allclose(student.encode_texts(texts[::-1], batch_size=1).flip(0), whole, atol=1e-6)
    assert torch.allclose(
        student.encode_images(files, batch_size=1),
        student.encode_images([Image.open(file) for file in files]),
        atol=1e-6,
    )


def test_answers_are_named_and_sorted_and_one_picture_stands_for_all(student, files):
    texts, images = student.encode_texts(QUESTIONS), student.encode_images(files[:1])
    answers = student.answer(texts, images)
    logits = student.logits(texts, images.expand(3, -1))
    for row, answer in zip(logits, answers, strict=True):
        assert answer.probabilities == pytest.approx(dict(zip(LABELS, row.softmax(-1).tolist(), strict=True)))
        assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)
        assert answer.answer == LABELS[int(row.argmax())]
        assert answer.probability == max(answer.probabilities.values())
    assert [len(answer.probabilities) for answer in student.answer(texts, images, top=2)] == [2, 2, 2]


def test_each_answer_of_vqa_has_a_probability_of_its_own(student, tmp_path, files):
    vqa = Student.from_pretrained(save_student(tmp_path / "vqa", type(ANSWERS)(task="vqa")))
    sides = vqa.encode_texts(QUESTIONS), vqa.encode_images(files[:1])
    assert torch.equal(vqa.probabilities(*sides), vqa.logits(*sides).sigmoid())


def test_similarity_is_the_cosine(tmp_path, student, files):
    finder = Student.from_pretrained(save_student(tmp_path / "find", SIMILARITY))
    texts, images = finder.encode_texts(QUESTIONS), finder.encode_images(files)
    cosine = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1)
    assert torch.allclose(finder.similarity(texts, images), cosine, atol=1e-6)
    assert finder.labels == ()
    with pytest.raises(RunError, match="trained for retrieval, it has no answers"):
        finder.answer(texts[:1], images[:1])
    with pytest.raises(RunError, match="not comparable by themselves"):
        student.similarity(texts, images)


def test_all_pictures_that_cannot_be_read_are_listed(student, files, tmp_path):
    (tmp_path / "torn.png").write_bytes(files[0].read_bytes()[:60])
    picture(35, 36).save(tmp_path / "odd.png")
    bad = [tmp_path / "torn.png", tmp_path / "gone.png", tmp_path / "odd.png"]
    with pytest.raises(InputError) as caught:
        student.encode_images([files[0], *bad, files[1]], batch_size=2)
    assert str(caught.value).startswith("3 pictures cannot be used")
    assert all(str(path) in str(caught.value) for path in bad)


def test_wrong_shapes_are_refused(student):
    for sides in ((torch.zeros(2, 24), torch.zeros(3, 24)), (torch.zeros(2, 24), torch.zeros(2, 5))):
        with pytest.raises(InputError, match="expected vectors"):
            student.logits(*sides)
    with pytest.raises(InputError, match="slot below 1"):
        student.encode_images([], slot=1)
    assert student.encode_images([]).shape == student.encode_texts([]).shape == (0, 24)


def test_the_fingerprint_is_of_weights_answers_and_processor(folder, student, tmp_path):
    assert Student.from_pretrained(folder / "model").fingerprint == student.fingerprint
    prints = {student.fingerprint}
    for name, file, old, new in (
        ("labels", "config.json", '"no"', '"never"'),
        ("task", "config.json", '"classification"', '"vqa"'),
        ("processor", "processor_config.json", "0.5", "0.25"),
        ("tokenizer", "tokenizer.json", '"green"', '"grey"'),
    ):
        path = save_student(tmp_path / name) / "model" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        prints.add(Student.from_pretrained(tmp_path / name).fingerprint)
    prints.add(Student.from_pretrained(save_student(tmp_path / "weights", seed=1)).fingerprint)
    assert len(prints) == 6


def test_what_is_no_student_is_refused(folder, tmp_path, teacher_folder):
    with pytest.raises(RunError, match="expected a run of `dde-cache train`"):
        Student.from_pretrained(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        Student.from_pretrained(teacher_folder)
    torn = save_student(tmp_path / "torn")
    weights = torn / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match="cannot be read"):
        Student.from_pretrained(torn)
    other = save_student(tmp_path / "other")
    config = json.loads((other / "model" / "config.json").read_text())
    (other / "model" / "config.json").write_text(json.dumps(config | {"images": 2}))
    with pytest.raises(RunError, match=r"missing or of another\s+shape, for example head\.0"):
        Student.from_pretrained(other)
