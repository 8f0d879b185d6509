"""Scores against a NumPy oracle that knows only texts, labels and logits."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from pipeline import LABELS, make_cache, make_samples, make_shards
from safetensors.torch import load_file, save_file

from dde_cache.distill import TrainConfig
from dde_cache.errors import CacheError, InputError, RunError, TeacherError
from dde_cache.evaluate import evaluate, load_subject
from dde_cache.samples import Sample, Text
from dde_cache.scores import Baselines, Predictions, accuracy, report
from dde_cache.sources import CachedTargets
from dde_cache.store import Cache
from dde_cache.train import train


def rows(shards):
    """(key, slot, question, kind, label) of every pair."""
    return [
        (sample.key, slot, text.text, text.kind or "other", text.label)
        for shard in shards
        for sample in shard
        for slot, text in enumerate(sample.texts)
    ]


def most_frequent(labels):
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def relabelled(samples, label_of):
    return [
        Sample(
            one.key,
            one.images,
            tuple(text.model_copy(update={"label": label_of(number, slot)}) for slot, text in enumerate(one.texts)),
        )
        for number, one in enumerate(samples)
    ]


@pytest.fixture(scope="module")
def train_shards(tmp_path_factory):
    generator = np.random.default_rng(3)
    samples = relabelled(make_samples(12), lambda number, slot: str(generator.choice(LABELS, p=[0.5, 0.3, 0.2])))
    return make_shards(tmp_path_factory.mktemp("train") / "train", samples)


@pytest.fixture(scope="module")
def test_shards(tmp_path_factory):
    generator = np.random.default_rng(4)
    samples = relabelled(make_samples(9, seed=1), lambda number, slot: str(generator.choice(LABELS)))
    unseen = Text(text="a question that nobody asked", label="yes", kind="where")
    unlabelled = Text(text="blue ?", kind="exists")
    samples.append(Sample("last", samples[0].images, (unseen, unlabelled)))
    return make_shards(tmp_path_factory.mktemp("test") / "test", samples)


def oracle(pairs, logits, training, teacher=None):
    """Shares by kind, in NumPy."""
    overall = most_frequent([label for *_, label in training])
    answers = defaultdict(list)
    for _, _, question, _, label in training:
        answers[question].append(label)
    marks = defaultdict(lambda: defaultdict(list))
    for number, (key, slot, question, kind, label) in enumerate(pairs):
        guess = LABELS[int(np.argmax(logits[number]))]
        to_question = most_frequent(answers[question]) if question in answers else overall
        for where in (kind, "all"):
            if label is not None:
                marks[where]["accuracy"].append(guess == label)
                marks[where]["frequent_answer"].append(overall == label)
                marks[where]["frequent_answer_to_question"].append(to_question == label)
            if teacher is not None:
                marks[where]["agreement"].append(guess == LABELS[int(np.argmax(np.asarray(teacher[key, slot])))])
    return {kind: {name: np.mean(values) for name, values in found.items()} for kind, found in marks.items()}


def assert_scores(found, expected):
    assert set(found.kinds) == set(expected) - {"all"}
    for kind, shares in expected.items():
        score = found.overall if kind == "all" else found.kinds[kind]
        for name, value in shares.items():
            assert getattr(score, name) == pytest.approx(value), (kind, name)


def test_scores_of_the_teacher(teacher_folder, train_shards, test_shards, tmp_path):
    cache = make_cache(test_shards, teacher_folder, tmp_path / "cache")
    subject = load_subject(str(teacher_folder))
    found = evaluate(subject, test_shards, cache=cache, baseline_shards=train_shards, batch_size=4)
    unit_logits = [cache.unit(entry).array("predictions/logits") for entry in cache.manifest.units]
    logits = np.concatenate(unit_logits)
    pairs = rows(test_shards)
    teacher = {(key, slot): logits[number] for number, (key, slot, *_) in enumerate(pairs)}
    assert_scores(found, oracle(pairs, logits, rows(train_shards), teacher))
    assert found.overall.agreement == 1
    assert found.overall.pairs == len(pairs) - 1, "one has no label"


def test_scores_of_arbitrary_logits(train_shards, test_shards):
    pairs = rows(test_shards)
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(len(pairs), 3)).astype(np.float32)
    taught = {(key, slot): torch.from_numpy(generator.normal(size=3)) for key, slot, *_ in pairs}
    label = torch.tensor([LABELS.index(label) if label else -100 for *_, label in pairs])
    predictions = Predictions(torch.from_numpy(logits).argmax(-1), label, logits.shape[1])
    found = report(predictions, test_shards, LABELS, Baselines.of(train_shards), taught)
    expected = oracle(pairs, logits, rows(train_shards), taught)
    assert_scores(found, expected)
    assert accuracy(predictions) == pytest.approx(expected["all"]["accuracy"])
    assert 0 < expected["all"]["accuracy"] < 1
    assert 0 < expected["all"]["agreement"] < 1
    plain = report(predictions, test_shards, LABELS)
    assert plain.overall.frequent_answer is None
    assert plain.overall.agreement is None


def test_an_unseen_question_gets_the_most_frequent_answer(train_shards):
    baselines = Baselines.of(train_shards)
    assert baselines.answer == most_frequent([label for *_, label in rows(train_shards)])
    assert baselines.answer_to("a question that nobody asked") == baselines.answer
    assert Baselines.model_validate_json(baselines.model_dump_json()) == baselines


def test_a_baseline_outside_the_vocabulary_is_wrong(test_shards):
    pairs = rows(test_shards)
    label = torch.tensor([LABELS.index(label) if label else -100 for *_, label in pairs])
    predictions = Predictions(torch.zeros(len(pairs), dtype=torch.int64), label, 3)
    found = report(predictions, test_shards, LABELS, Baselines(answer="maybe", by_question={}))
    assert found.overall.frequent_answer == found.overall.frequent_answer_to_question == 0


def test_ties_go_to_the_first_in_the_alphabet(tmp_path):
    samples = relabelled(make_samples(4), lambda number, slot: ("yes", "no")[number % 2])
    samples = [Sample(one.key, one.images, one.texts[:1]) for one in samples]
    assert Baselines.of(make_shards(tmp_path / "s", samples)).answer == "no"


def test_a_run_keeps_the_baselines_of_its_training_shards(teacher_folder, train_shards, test_shards, tmp_path):
    targets = CachedTargets(make_cache(train_shards, teacher_folder, tmp_path / "cache"))
    train(train_shards, targets, tmp_path / "run", TrainConfig(steps=1, batch_size=4, workers=0))
    subject = load_subject(str(tmp_path / "run"))
    assert subject.baselines == Baselines.of(train_shards)
    assert subject.labels == LABELS
    taught = make_cache(test_shards, teacher_folder, tmp_path / "test-cache")
    found = evaluate(subject, test_shards, cache=taught)
    assert found.overall.frequent_answer is not None
    assert 0 <= found.overall.agreement <= 1
    with pytest.raises(CacheError, match=r"shards and cache do not hold the same samples|no key is on both sides"):
        evaluate(subject, train_shards, cache=taught)


# --- errors


def test_no_labels_at_all(teacher_folder, tmp_path):
    shards = make_shards(tmp_path / "s", relabelled(make_samples(3), lambda number, slot: None))
    with pytest.raises(InputError, match="expected labels in the shards to measure accuracy, found none"):
        evaluate(load_subject(str(teacher_folder)), shards)


def test_unknown_labels(teacher_folder, tmp_path):
    shards = make_shards(tmp_path / "s", relabelled(make_samples(3), lambda number, slot: "maybe"))
    with pytest.raises(InputError, match=r"(?s)answers, got 1 others.*'maybe'"):
        evaluate(load_subject(str(teacher_folder)), shards)


def test_a_cache_of_other_answers(save_teacher, teacher_folder, test_shards, tmp_path):
    other = save_teacher(id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    cache = make_cache(test_shards, other, tmp_path / "cache")
    with pytest.raises(CacheError, match=r"expected the answers \('no', 'yes', 'red'\), got \('x', 'y', 'z'\)"):
        evaluate(load_subject(str(teacher_folder)), test_shards, cache=Cache(cache.folder))


def test_no_subject(tmp_path):
    with pytest.raises(TeacherError, match="expected a checkpoint folder"):
        load_subject(str(tmp_path / "nowhere"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "baselines.json").write_text("{}")
    with pytest.raises(RunError, match="expected a run of `dde-cache train` with a saved student"):
        load_subject(str(tmp_path / "run"))
    with pytest.raises(InputError, match="expected --device"):
        load_subject("sample", "toaster")


def test_a_student_that_lacks_weights_is_not_scored(train_shards, teacher_folder, tmp_path):
    """The library would fill the gap with random numbers, and the figures would be those of chance."""
    folder, targets = tmp_path / "run", CachedTargets(make_cache(train_shards, teacher_folder, tmp_path / "cache"))
    train(train_shards, targets, folder, TrainConfig(steps=1, batch_size=4, workers=0))
    weights = load_file(folder / "model" / "model.safetensors")
    weights.pop("head.3.weight")
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"1 tensors are missing .*head\.3\.weight"):
        load_subject(str(folder))
