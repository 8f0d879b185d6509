"""Hard negatives: what is mined, what is scored, the ranking loss, rounds end to end, faults."""

import contextlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import picture, vilt_config
from pipeline import Child, cli, killed_in, make_cache, make_shards, png, tree
from safetensors.torch import load_file
from students import SIMILARITY, save_student
from test_choices import _stop_after, metrics_of
from test_ranks import Ranks
from transformers import ViltForImageAndTextRetrieval, ViltModel

from dde_cache.batches import PairDataset
from dde_cache.candidates import NONE, read_candidates
from dde_cache.distill import TrainConfig
from dde_cache.errors import CacheError, InputError, RunError, TeacherError
from dde_cache.fit import Progress
from dde_cache.inference import Student
from dde_cache.losses import ranking_sum
from dde_cache.matching import CANDIDATES, INDEX, Scores, verify_scores
from dde_cache.mine import mine, nearest, round_of
from dde_cache.ranking import RankedLosses, RankingReader
from dde_cache.samples import Sample, Text
from dde_cache.scoring import ScoreConfig, score
from dde_cache.several import losses_of
from dde_cache.sources import CachedTargets, LabelsOnly
from dde_cache.stream import PairTable
from dde_cache.tasks.retrieval import Retrieval
from dde_cache.train import train

WORDS = ("a red circle", "blue ?", "a green square", "is there a red square", "the circle", "left of the square ?")
QUICK = {"steps": 3, "batch_size": 4, "workers": 0, "log_every": 1, "task": "retrieval", "soft_weight": 0.0}


def samples():
    """Ten of one or two texts; 8 has the picture of 2, and 9 a text of 3 in other case: these belong together."""
    made = []
    for number in range(10):
        shown = png(picture(36, 36, 2 if number == 8 else number))
        texts = [f"{WORDS[number % 6]} {'of ' * (number // 6)}".strip()] + ([WORDS[(number + 2) % 6]] * (number % 2))
        if number == 9:
            texts = [f"{made[3].texts[0].text.upper()} "]
        made.append(Sample(f"key-{number}", (shown,), tuple(Text(text=text) for text in texts)))
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "all", samples(), size=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("run") / "run", SIMILARITY, seed=3)


@pytest.fixture(scope="module")
def matcher(save_teacher):
    return save_teacher(ViltForImageAndTextRetrieval, seed=4)


@pytest.fixture(scope="module")
def mined(shards, run, tmp_path_factory):
    path = tmp_path_factory.mktemp("mined") / "1.candidates"
    mine(run, shards, path, top=3, batch_size=4)
    return path


@pytest.fixture(scope="module")
def scored(shards, mined, matcher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "1"
    score(shards, str(matcher), mined, folder, ScoreConfig(batch_size=5))
    return Scores(folder)


# --- mining


def belongs(text, sample, every):
    """Whether any sample has both."""
    same = [one for one in every if one.images[0].content == sample.images[0].content]
    return " ".join(text.casefold().split()) in {" ".join(t.text.casefold().split()) for one in same for t in one.texts}


def test_candidates_are_the_nearest_that_do_not_belong(shards, run, mined):
    """The oracle ranks every text against every picture, one by one."""
    found, every = read_candidates(mined), samples()
    student = Student.from_pretrained(run)
    vectors = torch.nn.functional.normalize(student.encode_images([one.images[0] for one in every]).double(), dim=-1)
    texts = [(number, slot, text.text) for number, one in enumerate(every) for slot, text in enumerate(one.texts)]
    words = torch.nn.functional.normalize(student.encode_texts([text for *_, text in texts]).double(), dim=-1)
    cosine = (words @ vectors.T).numpy().round(6)
    assert found.keys == [one.key for one in every]
    assert list(zip(found.sample, found.slot, strict=True)) == [(number, slot) for number, slot, _ in texts]
    first_text = {}
    for row, (*_, text) in enumerate(texts):
        first_text.setdefault(" ".join(text.casefold().split()), row)
    for row, (_, _, text) in enumerate(texts):
        order = sorted((-cosine[row, n], n) for n in range(10) if n != 8 and not belongs(text, every[n], every))
        assert found.pictures[row].tolist() == [number for _, number in order[:3]]
    for number, one in enumerate(every):
        order = sorted(
            (-cosine[row, number], row) for row in first_text.values() if not belongs(texts[row][2], one, every)
        )
        assert found.texts[number].tolist() == [row for _, row in order[:3]]
    assert 9 not in found.pictures[found.starts[3]], "its words, in other case"
    assert (found.attributes.round, found.attributes.student) == (1, student.fingerprint)


def test_few_candidates_leave_places_empty():
    near = nearest(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), {0: {0}, 1: {0, 1, 2}}, 4)
    assert near.tolist() == [[1, 2, -1, -1], [-1] * 4, [2, 0, 1, -1]]


def test_a_student_of_no_numbers_mines_nothing():
    with pytest.raises(RunError, match="expected finite vectors from the student"):
        nearest(np.full((2, 3), np.nan), np.eye(3), {}, 2)


def test_blocks_do_not_change_what_is_nearest(monkeypatch):
    random = np.random.default_rng(0)
    texts, pictures = (random.normal(size=(30, 8)).astype(np.float32) for _ in range(2))
    whole = nearest(texts, pictures, {}, 5)
    monkeypatch.setattr("dde_cache.mine._BLOCK", 64)
    assert (nearest(texts, pictures, {}, 5) == whole).all()


def test_what_cannot_be_mined(shards, run, mined, tmp_path, save_teacher):
    with pytest.raises(InputError, match="expected a new file, but it is there"):
        mine(run, shards, mined)
    with pytest.raises(RunError, match="its vectors are not comparable"):
        mine(save_student(tmp_path / "answers"), shards, tmp_path / "c")
    twice = make_shards(tmp_path / "twice", [samples()[0]]) + make_shards(tmp_path / "again", [samples()[0]])
    with pytest.raises(InputError, match="expected each key once in the shards"):
        mine(run, twice, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_flipped_bytes_of_candidates_are_found(mined, tmp_path):
    content = mined.read_bytes()
    path, refused = tmp_path / "flipped", 0
    whole = read_candidates(mined)
    for place in range(40, len(content), len(content) // 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        # What the zip keeps twice or does not use can be read: whoever uses the file knows its SHA-256.
        with contextlib.suppress(CacheError):
            found = read_candidates(path)
            assert found.sha256 != whole.sha256
            assert (found.pictures == whole.pictures).all()
            assert (found.texts == whole.texts).all()
            continue
        refused += 1
    assert refused > 40


# --- scoring


def alone(teacher, text, sample):
    """One pair through the stock model: its patches come in random order, which the pooled vector does not see."""
    tokens = teacher.preprocessor.tokens([text])
    pixels = teacher.preprocessor.stack([teacher.preprocessor.pixels(sample.images[0].decode())])
    with torch.no_grad():
        return float(
            teacher.model(
                input_ids=tokens.ids, attention_mask=tokens.mask, pixel_values=pixels.pixels,
                pixel_mask=torch.ones(pixels.pixels.shape[0], *pixels.pixels.shape[2:], dtype=torch.long),
            ).logits[0, 0]
        )  # fmt: skip


def test_scores_are_those_of_the_stock_model(scored, matcher):
    from dde_cache.teacher import FusionTeacher

    teacher, every, found = FusionTeacher.load(matcher), samples(), scored.candidates
    for text, (sample, slot) in enumerate(zip(found.sample, found.slot, strict=True)):
        words = every[sample].texts[slot].text
        assert scored.own[text] == pytest.approx(alone(teacher, words, every[sample]), abs=1e-4)
        for number, value in zip(found.pictures[text], scored.pictures[text], strict=True):
            assert value == pytest.approx(alone(teacher, words, every[number]), abs=1e-4)
    for number in range(10):
        for text, value in zip(found.texts[number], scored.texts[number], strict=True):
            words = every[found.sample[text]].texts[found.slot[text]].text
            assert value == pytest.approx(alone(teacher, words, every[number]), abs=1e-4)


def test_two_classes_score_too_and_others_do_not(shards, mined, save_teacher, tmp_path):
    from dde_cache.teacher import FusionTeacher

    labels = {"id2label": {0: "Yes", 1: "no"}, "label2id": {"Yes": 0, "no": 1}}
    folder = save_teacher(seed=6, **labels)
    score(shards, str(folder), mined, tmp_path / "two")
    teacher, scores = FusionTeacher.load(folder), Scores(tmp_path / "two")
    tokens = teacher.preprocessor.tokens([samples()[1].texts[0].text])
    pixels = teacher.preprocessor.stack([teacher.preprocessor.pixels(samples()[1].images[0].decode())])
    logits = teacher(tokens, [pixels], (2,)).logits[0]
    assert scores.own[1] == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)
    for other in (save_teacher(ViltModel), save_teacher()):
        with pytest.raises(TeacherError, match="expected a teacher with a matching head"):
            score(shards, str(other), mined, tmp_path / "none")


def test_a_killed_extraction_leaves_nothing_half_written(shards, mined, matcher, scored, tmp_path, monkeypatch):
    monkeypatch.setattr("dde_cache.matching.UNIT_SAMPLES", 3)
    whole, out = tmp_path / "whole", tmp_path / "cut"
    score(shards, str(matcher), mined, whole)
    data = shards[0].path.parent
    command = ["extract", data, "--teacher", matcher, "--candidates", mined, "--out"]

    def kill():
        replace, calls = os.replace, []

        def call(source, target):
            calls.append(target)
            if str(target).endswith("000002.zarr.zip"):
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(source, target)

        os.replace = call

    child = Child(*command, out, folder=tmp_path, before=kill)
    assert child.wait() == -signal.SIGKILL, child.printed
    assert sorted(path.name for path in (out / "units").iterdir() if not path.name.startswith(".")) == [
        "000000.zarr.zip",
        "000001.zarr.zip",
    ]
    with pytest.raises(CacheError, match=r"has no scores.json: run the same extract again"):
        Scores(out)
    assert cli("verify", out).code == 1
    done = cli(*command, out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["units_kept"] == 2
    assert tree(out) == tree(whole)
    assert cli("verify", out, "--against", data).code == 0


def test_a_killed_call_leaves_no_partial_file_for_ever(shards, mined, matcher, tmp_path):
    """Killed while it copies the candidates, while it writes a unit, and while it writes the index."""
    out = tmp_path / "scores"
    command = ["extract", shards[0].path.parent, "--teacher", matcher, "--candidates", mined, "--out", out]
    for name in (CANDIDATES, "000000.zarr.zip", INDEX):
        child = Child(*command, folder=tmp_path, before=killed_in("replace", 1, name))
        assert child.wait() == -signal.SIGKILL, child.printed
        assert [path for path in out.rglob("*.partial") if name in path.name]
    assert cli(*command).code == 0
    assert {path.name for path in out.iterdir()} == {CANDIDATES, INDEX, "units"}
    assert [path.name for path in (out / "units").iterdir()] == ["000000.zarr.zip"]
    assert cli("verify", out).code == 0


def test_a_damaged_unit_is_named_and_made_again_as_the_message_says(shards, scored, matcher, tmp_path):
    out = tmp_path / "scores"
    shutil.copytree(scored.folder, out)
    unit, whole = out / "units" / "000000.zarr.zip", tree(out)
    unit.write_bytes(unit.read_bytes()[:-40])
    data = shards[0].path.parent
    command = ["extract", data, "--teacher", matcher, "--candidates", out / CANDIDATES, "--out", out, "--batch-size", 5]
    advice = (
        f"delete it and run `dde-cache extract SHARDS --teacher TEACHER --candidates {out / CANDIDATES} --out {out}`"
    )
    assert f"{unit}: this unit of scores is damaged" in cli(*command).message
    assert advice in cli(*command).message
    assert f"{unit}: not the bytes that {INDEX} lists; {advice[:60]}" in verify_scores(out).findings[0].examples[0]
    unit.unlink()
    assert f"{unit}: this unit of scores is missing" in verify_scores(out).findings[0].examples[0]
    assert cli(*command).code == 0
    assert tree(out) == whole


def test_what_is_no_cache_is_called_by_its_name(scored, mined, shards, tmp_path):
    """Every command that reads caches says of candidates and scores what they are and what reads them."""
    data, scores = shards[0].path.parent, scored.folder
    for place, said in (
        (
            mined,
            "got a file of candidates of `dde-cache mine`; `dde-cache extract SHARDS --teacher TEACHER --candidates "
            f"{mined}",
        ),
        (
            scores,
            "got scores of `dde-cache extract --candidates`; `dde-cache verify` judges them and says how bad ones",
        ),
    ):
        commands = [
            ("inspect", place),
            ("repair", place),
            ("subset", place, "--layers", "0", "--out", tmp_path / "part"),
            ("train", data, "--targets", place, "--out", tmp_path / "run"),
            *([("verify", place)] if place == mined else []),
        ]
        for command in commands:
            done = cli(*command)
            assert done.code == 1, command
            assert said in done.message, (command, done.message)
    assert "make one with `dde-cache extract`" in cli("inspect", tmp_path).message


def test_verify_counts_pairs_and_refuses_what_means_nothing_to_scores(scored):
    found, index = scored.candidates, scored.index
    pairs = {(text, int(found.sample[text])) for text in range(len(found.sample))}
    pairs |= {(text, int(n)) for text, some in enumerate(found.pictures) for n in some if n != NONE}
    pairs |= {(int(text), n) for n, some in enumerate(found.texts) for text in some if text != NONE}
    assert verify_scores(scored.folder).pairs == len(pairs) > index.texts
    for options in (("--fast",), ("--sample", 64), ("--device", "cpu"), ("--teacher", "sample")):
        done = cli("verify", scored.folder, *options)
        assert f"expected a cache with {options[0]}; scores of candidates" in done.message


def test_verify_finds_every_flipped_byte(scored, tmp_path):
    folder = tmp_path / "scores"
    shutil.copytree(scored.folder, folder)
    assert verify_scores(folder).sound
    for name in (INDEX, CANDIDATES, "units/000000.zarr.zip"):
        content = (folder / name).read_bytes()
        for place in range(0, len(content), max(len(content) // 25, 1)):
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert not verify_scores(folder).sound, (name, place)
            with pytest.raises(CacheError):
                Scores(folder)
        (folder / name).write_bytes(content)
    assert verify_scores(folder).sound
    (folder / "units/000000.zarr.zip").unlink()
    done = cli("verify", folder)
    assert done.code == 1
    assert "missing" in done.out


def test_scores_of_other_things_are_not_continued(shards, mined, scored, run, matcher, save_teacher, tmp_path):
    with pytest.raises(CacheError, match="holds scores of another teacher"):
        score(shards, str(save_teacher(ViltForImageAndTextRetrieval, seed=5)), mined, scored.folder)
    fresh = save_student(tmp_path / "other", SIMILARITY, seed=9)
    mine(fresh, shards, tmp_path / "other.candidates", top=3)
    with pytest.raises(CacheError, match="holds scores of the candidates of round 1, mined by student"):
        score(shards, str(matcher), tmp_path / "other.candidates", scored.folder)
    changed = make_shards(
        tmp_path / "changed", [*samples()[1:], Sample("new", samples()[0].images, samples()[1].texts)]
    )
    with pytest.raises(InputError, match=r"(?s)2 samples differ:.*new: new.*key-0: gone"):
        score(changed, str(matcher), mined, tmp_path / "scores")
    done = cli("extract", tmp_path / "changed", "--teacher", matcher, "--candidates", mined, "--out", "x", "--k", 3)
    assert done.code == 1
    assert "expected --candidates without --k" in done.message


# --- the loss


def test_the_loss_is_that_of_dense_maths():
    random = torch.Generator().manual_seed(0)
    query, own, others = (torch.randn(n, 6, generator=random, requires_grad=True) for n in (4, 4, 7))
    index = torch.tensor([[0, 3, 6], [2, -1, -1], [-1, -1, -1], [5, 5, 1]])
    teacher = 3 * torch.randn(4, 4, generator=random)
    scale, heat = torch.tensor(2.5, requires_grad=True), 1.7
    loss = ranking_sum(query, own, others, index, teacher, scale, heat)
    expected = 0
    for row in range(4):
        places = [place for place in index[row].tolist() if place >= 0]
        vectors = [own[row]] + [others[place] for place in places]
        c = torch.stack([query[row] @ v / (query[row].norm() * v.norm()) for v in vectors]) * scale
        z = teacher[row, : 1 + len(places)] / heat
        p, q = z.exp() / z.exp().sum(), c.exp() / c.exp().sum()
        expected = expected + (p * (p / q).log()).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, (query, own, others, scale), retain_graph=True)
    theirs = torch.autograd.grad(expected, (query, own, others, scale))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_has_its_candidates_and_their_scores(shards, scored, run):
    """Every number and picture of a batch, in any order of pairs, against the samples themselves."""
    student, every, found = Student.from_pretrained(run), samples(), scored.candidates
    reader = RankingReader(scored, shards, student.preprocessor, top=2)
    table = PairTable.of(shards)
    read = student.preprocessor, ()
    dataset = PairDataset(shards, table, *read, encode=Retrieval().targets, others=reader, identities=True)
    order = [7, 0, 12, 3]
    batch = dataset.__getitems__(order)
    assert batch["ranking.picture"].shape == batch["ranking.text"].shape == (4, 2)
    for row, number in enumerate(order):
        for column in range(2):
            shown = batch["ranking.pixels0"][batch["ranking.picture"][row, column]]
            other = every[found.pictures[number][column]]
            np.testing.assert_array_equal(shown, student.pixels(other.images[0]))
            text = found.texts[found.sample[number]][column]
            words = every[found.sample[text]].texts[found.slot[text]].text
            tokens = student.preprocessor.tokens([words]).ids[0]
            ids = batch["ranking.input_ids"][batch["ranking.text"][row, column]]
            assert ids[: len(tokens)].tolist() == tokens.tolist()
            assert batch["ranking.picture_score"][row, column + 1] == scored.pictures[number][column]
            assert batch["ranking.text_score"][row, column + 1] == scored.texts[found.sample[number]][column]
        assert batch["ranking.picture_score"][row, 0] == batch["ranking.text_score"][row, 0] == scored.own[number]
    config = TrainConfig(task="retrieval", soft_weight=0, hard_weight=0.5, ranking_weight=2.0)
    targets = LabelsOnly(student.preprocessor, vilt_config(), ())
    losses = RankedLosses(losses_of(config, targets, False), config)
    terms = losses(student.model.requires_grad_(True), batch)
    model = student.model
    text = model.text_tower(batch["input_ids"], batch["attention_mask"]).pooled
    image = model.image_tower(batch["pixels0"], batch["grid0"]).pooled
    sides = (
        (text, image, model.image_tower(batch["ranking.pixels0"], batch["ranking.grid0"]).pooled, "picture"),
        (image, text, model.text_tower(batch["ranking.input_ids"], batch["ranking.attention_mask"]).pooled, "text"),
    )
    scale = model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"]).scale
    sums = [ranking_sum(a, b, c, batch[f"ranking.{n}"], batch[f"ranking.{n}_score"], scale) for a, b, c, n in sides]
    torch.testing.assert_close(terms["ranking"], sum(sums) / 2 / 4)
    torch.testing.assert_close(terms["loss"], terms["hard"] + 2 * terms["ranking"])


# --- rounds


def test_rounds_from_the_command_line_and_stale_ones_refused(shards, matcher, save_teacher, tmp_path):
    data = shards[0].path.parent
    cache = make_cache(shards, save_teacher(seed=0), tmp_path / "cache")
    quick = ["--task", "retrieval", "--steps", 3, "--batch-size", 4, "--workers", 0, "--set", "log_every=1"]

    def good(*arguments):
        done = cli(*arguments)
        assert done.code == 0, done.err
        return done

    def learn(run, *options):
        return ["train", data, "--targets", cache.folder, "--out", tmp_path / run, *quick, *options]

    good(*learn("run0"))
    for number in (1, 2):
        before, candidates = tmp_path / f"run{number - 1}", tmp_path / f"{number}.candidates"
        report = json.loads(good("mine", before, data, "--out", candidates, "--top", 2, "--json").out)
        assert report["round"] == number
        extracting = ["extract", data, "--teacher", matcher, "--candidates", candidates, "--out"]
        if number == 2:
            done = cli(*extracting, tmp_path / "scores1")
            assert done.code == 1
            assert "holds scores of the candidates of round 1" in done.message
            done = cli(*learn("stale", "--init", before, "--candidates", tmp_path / "scores1"))
            assert done.code == 1
            assert "a stale round: its candidates are of round 1" in done.message
            assert not (tmp_path / "stale").exists()
        good(*extracting, tmp_path / f"scores{number}")
        good("verify", tmp_path / f"scores{number}", "--against", data)
        good(*learn(f"run{number}", "--init", before, "--candidates", tmp_path / f"scores{number}"))
        assert round_of(tmp_path / f"run{number}") == number
        assert metrics_of(tmp_path / f"run{number}")[0]["ranking"] > 0
    done = cli(*learn("alone", "--set", "ranking_weight=1"))
    assert done.code == 1
    assert "got a weight alone; pass --candidates SCORES" in done.message
    other = make_shards(tmp_path / "other", samples()[:6], size=4)
    done = cli("train", other[0].path.parent, "--targets", "none", "--like", cache.folder, "--out", tmp_path / "x",
               *quick, "--candidates", tmp_path / "scores1")  # fmt: skip
    assert done.code == 1
    assert "4 samples differ" in done.message


def test_candidates_are_learned_bit_for_bit_after_a_stop(shards, scored, run, save_teacher, tmp_path):
    cache = make_cache(shards, save_teacher(seed=0), tmp_path / "cache")
    config = TrainConfig(**QUICK | {"steps": 5, "save_every": 2, "ranking_weight": 1.0, "hard_weight": 1.0})
    targets, given = CachedTargets(cache), {"init": str(run), "candidates": scored}
    train(shards, targets, tmp_path / "whole", config, **given)
    with pytest.raises(KeyboardInterrupt):
        train(shards, targets, tmp_path / "cut", config, progress=Progress(step=_stop_after(3)), **given)
    train(shards, targets, tmp_path / "cut", config, resume=True, **given)
    whole, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    parts = TrainConfig(**{**config.model_dump(), "steps": 1, "accumulate": 2, "hard_weight": 0.0})
    train(shards, targets, tmp_path / "parts", parts, **given)
    one = TrainConfig(**{**parts.model_dump(), "accumulate": 1})
    train(shards, targets, tmp_path / "one", one, **given)
    rows = [metrics_of(tmp_path / name)[0] for name in ("parts", "one")]
    assert rows[0]["ranking"] == pytest.approx(rows[1]["ranking"], rel=1e-5)


def test_the_first_rank_alone_compares_the_shards_also_of_a_resumed_run(shards, scored, teacher_folder, tmp_path):
    def blind(rank):
        def look(_sample):
            raise AssertionError("another rank than the first read the samples")

        if rank:
            Sample.content_hash = look

    data = tmp_path / "data"
    shutil.copytree(shards[0].path.parent, data)
    settings = [part for name, value in (QUICK | {"save_every": 2}).items() for part in ("--set", f"{name}={value}")]
    command = ["train", data, "--targets", "none", "--like", teacher_folder, "--candidates", scored.folder, *settings]
    command += ["--set", "hard_weight=1", "--set", "attention_weight=0", "--out", tmp_path / "run"]
    ranks = Ranks(2, tmp_path, *command, before=blind)
    assert ranks.wait() == [0, 0], "\n".join(ranks.printed)
    shutil.rmtree(data)
    make_shards(data, [Sample(one.key, one.images, (Text(text="other"),)) for one in samples()], size=4)
    ranks = Ranks(2, tmp_path, *command, "--resume", before=blind)
    assert ranks.wait() == [1, 1]
    first, second = (" ".join(text.split()) for text in ranks.printed)
    assert "its candidates were mined in other shards than these: 10 samples differ" in first
    assert "the first rank could not go on; its own message says why" in second


def test_ranking_wants_candidates_and_vectors(shards, scored, tmp_path, teacher_folder):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    with pytest.raises(InputError, match="expected ranking_top together with --candidates"):
        train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(**QUICK | {"ranking_top": 1}))
    with pytest.raises(InputError, match="got candidates alone"):
        train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(**QUICK), candidates=scored)
    answers = TrainConfig(**QUICK | {"task": "classification", "ranking_weight": 1.0})
    with pytest.raises(InputError, match="expected --candidates with --task retrieval"):
        train(shards, CachedTargets(cache), tmp_path / "run", answers, candidates=scored)
    skipping = CachedTargets(cache, on_missing="skip")
    with pytest.raises(InputError, match="expected --on-missing error with --candidates"):
        train(shards, skipping, tmp_path / "run", TrainConfig(**QUICK | {"ranking_weight": 1.0}), candidates=scored)
