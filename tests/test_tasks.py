"""What each task makes of labels, and its metric, against examples worked by hand and plain NumPy."""

import numpy as np
import pytest
import torch
from conftest import vilt_config
from hypothesis import given
from hypothesis import strategies as st
from pipeline import make_samples, make_shards, whole_batch

from dde_cache.errors import InputError
from dde_cache.samples import Sample, Text
from dde_cache.scores import Baselines, Predictions
from dde_cache.student import DualEncoder, DualEncoderOutput, Head, new_student
from dde_cache.tasks import TASKS, SingleLabel, load_task
from dde_cache.tasks.nlvr2 import sentence_of
from dde_cache.tasks.retrieval import TIE, Vectors, image_ranks, text_ranks
from dde_cache.tasks.vqa import answer_label, answer_vocabulary, normalise, soft_scores, vqa_accuracy
from dde_cache.towers.contract import TowerOutput


class Own(SingleLabel):
    """A task outside the table."""


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_contract(name):
    task = load_task(name)
    texts = [Text(text="a", label="no"), Text(text="b", label="yes"), Text(text="c")]
    targets = task.targets(texts, {"no": 0, "yes": 1})
    assert all(len(rows) == 3 for rows in targets.values())
    assert targets["label"].tolist() == [0, 1, -100]
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    if task.soft:
        # A teacher that agrees is the smallest loss: its gradient is 0 there.
        student = logits.clone().requires_grad_()
        task.soft_sum(student, logits).backward()
        assert student.grad.abs().max() < 1e-6
    if task.head == "classes":
        right = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [0.0, 0.0]])
        assert task.hard_sum(DualEncoderOutput(logits=right), targets) < 1e-3
        assert task.hard_sum(DualEncoderOutput(logits=-right), targets) > 1
        none = task.targets([Text(text="c")] * 2, {"no": 0, "yes": 1})
        assert task.hard_sum(DualEncoderOutput(logits=right[:2]), none) == 0, "nothing is labelled"


def test_tasks_by_name():
    assert isinstance(load_task("test_tasks:Own"), Own)
    with pytest.raises(
        InputError, match=r"expected --task classification, .*, or module:Class for your own, got 'vpa'"
    ):
        load_task("vpa")
    with pytest.raises(InputError, match=r"cannot be imported .*PYTHONPATH"):
        load_task("no_such_module:Task")
    with pytest.raises(InputError, match="cannot be imported"):
        load_task("test_tasks:Missing")
    with pytest.raises(InputError, match=r"expected a class derived from dde_cache\.tasks\.Task"):
        load_task("collections:Counter")
    with pytest.raises(InputError, match="cannot be made without arguments"):
        load_task("dde_cache.tasks.contract:Task")


# --- vqa


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("she's", "she's"),
        ("yes!", "yes "),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("2.5 m.", "2.5 m"),
        ("10:30", "10:30"),
        ("girl's", "girl's"),
        ("t-shirt", "t shirt"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_in_the_official_evaluation(answer, expected):
    assert normalise(answer) == " ".join(expected.split())


def test_official_accuracy_by_hand():
    """Of ten annotators n gave the answer: leaving one of them out leaves n - 1, any other leaves n."""
    for count, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        given = ["cat"] * count + [f"other {number}" for number in range(10 - count)]
        assert vqa_accuracy("cat", given) == pytest.approx(expected), count
    assert vqa_accuracy("a cat.", ["cat"] * 9 + ["dog"]) == 1, "both sides are normalised where annotators differ"
    assert vqa_accuracy("cat", ["Cat", "the cat", "cat!", "cat", *(["dog"] * 6)]) == 1
    assert vqa_accuracy("a cat", ["cat"] * 10) == 0, "and neither where all agree"
    assert vqa_accuracy("2", ["two"] * 2 + ["3"] * 8) == pytest.approx(0.6)
    with pytest.raises(InputError, match="expected the annotators' answers"):
        vqa_accuracy("cat", [])


@given(st.lists(st.sampled_from(("red", "blue", "the red", "Red.", "3")), min_size=1, max_size=12))
def test_official_accuracy_leaves_out_each_annotator_in_turn(given):
    """The definition, in NumPy."""
    differ = len(set(given)) > 1
    compared = [normalise(one) if differ else one for one in given]
    for answer in ("red", "3"):
        subsets = [compared[:out] + compared[out + 1 :] for out in range(len(compared))]
        expected = np.mean([min(1, sum(one == answer for one in rest) / 3) for rest in subsets])
        assert vqa_accuracy(answer, given) == pytest.approx(expected)


def test_soft_scores_and_vocabulary_of_vilt():
    text = Text(text="?", label="red", answers=["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["pink"])
    assert soft_scores(text) == {"red": 1.0, "blue": 0.9, "green": 0.6, "pink": 0.3}
    assert soft_scores(Text(text="?", label="red")) == {"red": 1.0}
    assert soft_scores(Text(text="?")) == {}
    targets = load_task("vqa").targets([text, Text(text="?")], {"blue": 0, "pink": 1, "black": 2})
    torch.testing.assert_close(targets["scores"], torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.0, 0.0]]))
    assert targets["answered"].tolist() == [True, False]
    labels = [answer_label(one) for one in ["Two"] * 5 + ["the 2"] * 4 + ["yes"] * 8 + ["no"] * 9]
    assert answer_vocabulary(labels) == ["2", "no"], "in order of first appearance, from 9 on"


def test_binary_cross_entropy_times_the_number_of_answers():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 5, 7))
    p, q = 1 / (1 + np.exp(-student)), 1 / (1 + np.exp(-teacher))
    expected = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean() * 7
    student, teacher = torch.from_numpy(student).float(), torch.from_numpy(teacher).float()
    assert float(load_task("vqa").soft_sum(student, teacher)) == pytest.approx(5 * expected, rel=1e-5)
    scores = torch.tensor([[0.0] * 7, [0.3, 0.6] + [0.0] * 5, [0.0] * 7, [1.0] * 7, [0.0] * 7])
    batch, rows = {"scores": scores}, -(scores.numpy() * np.log(p) + (1 - scores.numpy()) * np.log(1 - p)).sum(-1)
    hard = load_task("vqa").hard_sum(DualEncoderOutput(logits=student), batch)
    left_out = "questions with no answer in the vocabulary"
    assert float(hard) == pytest.approx(float(rows[[1, 3]].sum()), rel=1e-5), left_out


def labelled(tmp_path, texts, per_sample=2):
    picture = make_samples(1)[0].images
    groups = [tuple(texts[start : start + per_sample]) for start in range(0, len(texts), per_sample)]
    samples = [Sample(f"s{number}", picture, group) for number, group in enumerate(groups)]
    return make_shards(tmp_path / "shards", samples)


def test_vqa_report_by_type_of_answer(tmp_path):
    texts = [
        Text(text="how many", kind="number", label="2", answers=["2"] * 3 + ["two"] * 2 + ["3"] * 5),
        Text(text="colour", kind="other", label="red", answers=["red"] * 2 + [f"x{number}" for number in range(8)]),
        Text(text="colour", kind="other", label="red", answers=["red"] * 10),
        Text(text="nobody knows", kind="other"),
    ]
    shards = labelled(tmp_path, texts)
    labels = ("red", "2")
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    task = load_task("vqa")
    predictions = Predictions(
        logits.argmax(-1), torch.tensor([1, 0, 0, -100]), 2, torch.tensor([0.9, 0.6, 0.0, torch.nan])
    )
    taught = {("s0", 0): torch.tensor([1.0, 0.0]), ("s0", 1): torch.tensor([1.0, 0.0])}
    found = task.report(predictions, shards, labels, Baselines(answer="red", by_question={"how many": "3"}), taught)
    assert found.kinds["number"].accuracy == 1, "five of ten said 2 or two"
    assert found.kinds["other"].accuracy == pytest.approx((0.6 + 0) / 2)
    assert (found.overall.pairs, found.kinds["other"].pairs) == (3, 2)
    assert found.overall.accuracy == pytest.approx(1.6 / 3)
    assert found.overall.frequent_answer == pytest.approx((0 + 0.6 + 1) / 3)
    assert found.overall.frequent_answer_to_question == pytest.approx((1 + 0.6 + 1) / 3)
    assert found.overall.agreement == 0.5
    assert task.score(predictions) == pytest.approx((0.9 + 0.6 + 0) / 3)
    with pytest.raises(InputError, match="found none"):
        task.report(predictions, labelled(tmp_path / "bare", [Text(text="?")] * 4), labels)
    with pytest.raises(InputError, match="found none"):
        task.score(Predictions(logits.argmax(-1), torch.full((4,), -100), 2, torch.full((4,), torch.nan)))


# --- nlvr2, entailment


def test_consistency_counts_sentences_all_of_whose_pairs_are_right(tmp_path):
    assert sentence_of("test1-0-1-2") == sentence_of("test1-0-3-2") != sentence_of("test1-0-1-1")
    assert sentence_of("7-9") is None
    identifiers = ["dev-0-0-0", "dev-0-1-0", "dev-0-0-1", "dev-0-1-1", "dev-1-0-0", "dev-2-0-0"]
    right = [True, True, True, False, True, True]
    texts = [
        Text(text="s", label="True" if number < 5 else None, meta={"identifier": identifier})
        for number, identifier in enumerate(identifiers)
    ]
    logits = torch.tensor([[0.0, 1.0] if good else [1.0, 0.0] for good in right])
    label = torch.tensor([1, 1, 1, 1, 1, -100])
    task = load_task("nlvr2")
    found = task.report(Predictions(logits.argmax(-1), label, 2), labelled(tmp_path, texts), ("False", "True"))
    assert found.overall.accuracy == pytest.approx(4 / 5)
    assert found.metrics == {"consistency": pytest.approx(2 / 3)}
    plain = labelled(tmp_path / "plain", [Text(text="s", label="True")] * 6)
    assert task.report(Predictions(logits.argmax(-1), label, 2), plain, ("False", "True")).metrics == {}


def test_entailment_has_a_fixed_order_and_accuracy_of_each_class(tmp_path):
    task = load_task("entailment")
    task.check_answers(("contradiction", "entailment", "neutral"))
    with pytest.raises(InputError, match="expected a teacher of the answers contradiction, entailment, neutral, in"):
        task.check_answers(("entailment", "neutral", "contradiction"))
    texts = [Text(text="s", label=name) for name in ("contradiction", "entailment", "entailment", "entailment")]
    predictions = Predictions(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 1, 1]), 3)
    found = task.report(predictions, labelled(tmp_path, texts), task.answers([]))
    assert found.metrics == {"accuracy_contradiction": 1.0, "accuracy_entailment": pytest.approx(2 / 3)}


# --- retrieval


def dense_ranks(vectors):
    """Everything against everything; an own partner comes after all foreign ones that are as near."""
    cosine = (vectors.text @ vectors.image.T).double().numpy()
    owner = vectors.owner.numpy()
    images = [int(sum(row >= row[own] - TIE)) - 1 for row, own in zip(cosine, owner, strict=True)]
    texts = []
    for number in range(cosine.shape[1]):
        column, mine = cosine[:, number], owner == number
        texts.append(int(sum(column[~mine] >= column[mine].max() - TIE)))
    return images, texts


@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans())
def test_ranks_are_those_of_the_whole_table(seed, pictures, ties):
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(1, 4, (pictures,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(pictures), captions)
    text, image = (torch.randn(count, 3, generator=generator) for count in (len(owner), pictures))
    if ties:
        text, image = text.sign(), image.sign()
    vectors = Vectors(text, image, owner)
    images, texts = dense_ranks(vectors)
    assert image_ranks(vectors).tolist() == images
    assert text_ranks(vectors).tolist() == texts


def test_ranking_in_blocks_is_ranking_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    owner = torch.repeat_interleave(torch.arange(7), torch.tensor([1, 2, 5, 1, 3, 1, 2]))
    vectors = Vectors(torch.randn(15, 4, generator=generator), torch.randn(7, 4, generator=generator), owner)
    expected = image_ranks(vectors), text_ranks(vectors)
    monkeypatch.setattr("dde_cache.tasks.retrieval._BLOCK", 30)
    assert torch.equal(image_ranks(vectors), expected[0])
    assert torch.equal(text_ranks(vectors), expected[1])


def test_a_model_that_sees_no_difference_gets_nothing():
    """Ties count against the model: equal vectors are no retrieval."""
    vectors = Vectors(torch.ones(20, 2), torch.ones(10, 2), torch.arange(20) // 2)
    assert (image_ranks(vectors) == 9).all()
    assert (text_ranks(vectors) == 18).all()


def contrasted(text, image, batch, scale=2.5):
    """The loss of one rank, from pooled vectors and what tells contents apart."""
    sides = (TowerOutput(pooled, torch.ones(len(pooled), 2, dtype=torch.bool), None) for pooled in (text, image))
    output = DualEncoderOutput(**dict(zip(("text", "image"), sides, strict=True)), scale=torch.tensor(scale))
    return float(load_task("retrieval").hard_sum(output, batch))


def test_what_belongs_together_is_told_by_content(tmp_path, teacher):
    """Twice the same picture in two samples, and twice the same words: as if they were of one sample."""
    pictures = [make_samples(3, seed=4)[number].images for number in (0, 1, 2)]
    said = ("a red circle", "blue ?", "is there a red square ?", "A red  circle")
    samples = [
        Sample(f"s{number}", pictures[picture], (Text(text=text),))
        for number, (picture, text) in enumerate(zip((0, 0, 1, 2), said, strict=True))
    ]
    shards = make_shards(tmp_path / "apart", samples)
    batch = whole_batch(shards, teacher.preprocessor, (), identities=True)
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn(2, 4, 5, generator=generator)
    text[3], image[1] = text[0], image[0]
    cosine = 2.5 * torch.nn.functional.normalize(text, dim=-1) @ torch.nn.functional.normalize(image, dim=-1).T
    together = np.array([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]])
    expected = 0.0
    for logits, right in ((cosine, together), (cosine.T, together.T)):
        chances = logits.log_softmax(-1).numpy()
        expected -= sum(chances[row][right[row] > 0].mean() for row in range(4)) / 2
    assert contrasted(text, image, batch) == pytest.approx(expected, rel=1e-5)
    one = {name: value[:1] for name, value in batch.items()}
    assert contrasted(text[:1], image[:1], one) == pytest.approx(0, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        lower = contrasted(text.bfloat16(), image.bfloat16(), batch)
    exact = contrasted(text.bfloat16().float(), image.bfloat16().float(), batch)
    assert lower == exact, "cosines are in fp32, whatever the precision"


def test_retrieval_trains_its_temperature_and_keeps_it(tmp_path):
    student = new_student(vilt_config(), (), head=Head("similarity", task="retrieval"))
    assert not hasattr(student, "fusion")
    assert float(student.logit_scale.exp().detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        student.logit_scale.fill_(1.25)
    student.save_pretrained(tmp_path)
    again = DualEncoder.from_pretrained(tmp_path)
    assert float(again.logit_scale.detach()) == 1.25
    assert again.config.task == "retrieval"
    side = TowerOutput(torch.randn(3, 24), torch.ones(3, 2, dtype=torch.bool), None)
    output = DualEncoderOutput(text=side, image=side, scale=student.logit_scale.exp())
    load_task("retrieval").hard_sum(output, {"text": torch.arange(3), "picture": torch.arange(3)}).backward()
    assert student.logit_scale.grad.abs() > 0
