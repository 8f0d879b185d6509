"""Importers of published data sets, on small files in exactly the published form; emoji on the real set."""

import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from pipeline import cli

from dde_cache.errors import InputError
from dde_cache.importers.common import import_samples
from dde_cache.importers.emoji import base_of, emoji_source
from dde_cache.importers.karpathy import karpathy_source
from dde_cache.importers.nlvr2 import nlvr2_source
from dde_cache.importers.official import open_pictures
from dde_cache.importers.snli_ve import snli_ve_source
from dde_cache.importers.vqav2 import vqav2_source
from dde_cache.samples import open_shards, read_index

EMOJI = Path(__file__).parents[2] / "shared" / "data" / "noto_emoji"
needs_emoji = pytest.mark.skipif(not EMOJI.is_dir(), reason=f"needs {EMOJI}")


def draw(folder, *names):
    """A picture of its own colour under each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 20, len(name), 7)).save(path)
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(source, out):
    import_samples(source, out)
    return {sample.key: sample for shard in open_shards(out) for sample in shard}


def problems_of(source, out):
    with pytest.raises(InputError) as caught:
        import_samples(source, out)
    assert not out.exists()
    return str(caught.value)


# --- VQAv2


def question(image, identifier, text="What color is the dog?"):
    return {"image_id": image, "question": text, "question_id": identifier}


def annotation(image, identifier, answers, common, kind="other"):
    return {
        "question_type": "what color is the",
        "multiple_choice_answer": common,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(answers, 1)
        ],
        "image_id": image,
        "answer_type": kind,
        "question_id": identifier,
    }


def vqa_files(folder, questions, annotations, subtype="train2014"):
    top = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": subtype, "license": {"name": "CC"}}
    asked = folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
    answered = folder / f"v2_mscoco_{subtype}_annotations.json"
    asked.write_text(json.dumps(top | {"task_type": "Open-Ended", "questions": questions}))
    answered.write_text(json.dumps(top | {"annotations": annotations}))
    return asked, answered


def test_vqav2(tmp_path):
    questions = [question(9, 9000), question(25, 25001, "How many?"), question(9, 9001, "Is it big?")]
    annotations = [
        annotation(9, 9001, ["yes"] * 7 + ["no"] * 3, "yes", "yes/no"),
        annotation(9, 9000, ["Brown"] * 10, "Brown"),
        annotation(25, 25001, ["2"] * 6 + ["two"] * 4, "two", "number"),
    ]
    names = ("train2014/COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000000025.jpg")
    images = draw(tmp_path / "images", *names)
    asked, answered = vqa_files(tmp_path, questions, annotations)
    found = samples_of(vqav2_source(None, asked, images, answered), tmp_path / "out")
    assert list(found) == ["vqav2-train2014-9", "vqav2-train2014-25"]
    first, second = found["vqav2-train2014-9"].texts
    assert (first.text, first.label, first.kind) == ("What color is the dog?", "brown", "other")
    assert (second.text, second.label, second.kind) == ("Is it big?", "yes", "yes/no")
    assert second.answers == ("yes",) * 7 + ("no",) * 3
    assert first.meta == {"question_id": 9000}
    assert found["vqav2-train2014-25"].texts[0].label == "2"
    assert found["vqav2-train2014-25"].images[0].content == (images / names[1]).read_bytes()
    assert read_index(tmp_path / "out").kinds == ("number", "other", "yes/no")


def test_vqav2_test_questions_have_no_answers(tmp_path):
    asked, _ = vqa_files(tmp_path, [question(1, 1000)], [], "test-dev2015")
    images = draw(tmp_path / "images", "COCO_test2015_000000000001.jpg")
    found = samples_of(vqav2_source("dev", asked, images), tmp_path / "out")
    assert found["vqav2-dev-1"].texts[0].label is None


def test_vqav2_problems_come_at_once(tmp_path):
    questions = [question(9, 9000), question(25, 25000), question(9, 9001, ""), {"image_id": "x"}, question(9, 9002)]
    bad = annotation(9, 9002, ["a"], "a") | {"answers": None}
    annotations = [annotation(9, 9000, ["a"], "a"), annotation(9, 9001, ["a"], "a"), annotation(7, 7, ["a"], "a"), bad]
    asked, answered = vqa_files(tmp_path, questions, annotations)
    images = draw(tmp_path / "images", "COCO_train2014_000000000009.jpg")
    text = problems_of(vqav2_source(None, asked, images, answered), tmp_path / "out")
    for part in (
        "missing annotation: 1",
        "no annotation of question 25000",
        "empty text: 1",
        "malformed entry: 2",
        "expected an object with image_id",
        "missing question: 1",
        "missing image: 1",
        "'COCO_train2014_000000000025.jpg' does not exist",
    ):
        assert part in text, (part, text)
    with pytest.raises(InputError, match="expected a JSON object with a list of questions"):
        vqav2_source(None, answered, images, answered)
    with pytest.raises(InputError, match="expected a file"):
        vqav2_source(None, tmp_path / "none.json", images)


# --- NLVR2


def nlvr2_line(identifier, sentence, label, directory=None):
    row = {
        "validation": {"1": label},
        "sentence": sentence,
        "left_url": "https://example.org/left.jpg",
        "identifier": identifier,
        "label": label,
        "writer": "1",
        "synset": "dog",
        "query": "dogs1",
        "right_url": "https://example.org/right.jpg",
    }
    return row if directory is None else row | {"directory": directory}


def test_nlvr2(tmp_path):
    rows = [
        nlvr2_line("train-100-0-0", "Both have dogs.", "True", 5),
        nlvr2_line("train-100-1-0", "Both have dogs.", "False", 5),
        nlvr2_line("train-100-0-1", "One has no dog.", "False", 5),
    ]
    path = lines(tmp_path / "train.json", rows)
    names = [f"images/train/5/train-100-{pair}-img{slot}.png" for pair in range(2) for slot in range(2)]
    images = draw(tmp_path / "nlvr2", *names)
    found = samples_of(nlvr2_source(None, path, images), tmp_path / "out")
    assert list(found) == ["nlvr2-train-100-0", "nlvr2-train-100-1"]
    pair = found["nlvr2-train-100-0"]
    assert [(text.text, text.label) for text in pair.texts] == [
        ("Both have dogs.", "True"),
        ("One has no dog.", "False"),
    ]
    assert pair.texts[1].meta == {"identifier": "train-100-0-1"}
    assert [image.content for image in pair.images] == [(images / name).read_bytes() for name in names[:2]]
    assert read_index(tmp_path / "out").split == "train"


def test_nlvr2_problems(tmp_path):
    rows = [
        nlvr2_line("dev-0-0-0", "a", "True"),
        nlvr2_line("dev-0-1", "a", "True"),
        nlvr2_line("dev-0-2-0", "a", "yes"),
        nlvr2_line("dev-0-3-0", "a", "True"),
    ]
    path = lines(tmp_path / "dev.json", rows)
    path.write_text(path.read_text() + "{not json\n")
    images = draw(tmp_path / "dev", *(f"dev-0-{pair}-img{slot}.png" for pair in (0, 2) for slot in (0, 1)))
    (images / "dev-0-0-img1.png").write_bytes(b"no picture")
    text = problems_of(nlvr2_source(None, path, images), tmp_path / "out")
    for part in (
        "5 of 5 samples cannot be used",
        "expected an identifier split-set-pair-sentence, got 'dev-0-1'",
        "label: expected True or False, got 'yes'",
        "'dev-0-3-img0.png' does not exist",
        "'dev-0-3-img1.png' does not exist",
        "unreadable image: 1",
        "malformed line: 1",
    ):
        assert part in text, (part, text)


# --- SNLI-VE


def test_snli_ve(tmp_path):
    def row(image, hypothesis, label, number):
        return {
            "annotator_labels": [label],
            "captionID": f"{image}.jpg#{number}",
            "gold_label": label,
            "pairID": f"{image}.jpg#{number}r1e",
            "sentence1": "A premise that the picture replaces.",
            "sentence2": hypothesis,
            "Flickr30K_ID": str(image),
        }

    rows = [
        row(36979, "A man.", "entailment", 0),
        row(5, "A cat.", "neutral", 1),
        row(36979, "No.", "contradiction", 2),
    ]
    path = lines(tmp_path / "snli_ve_dev.jsonl", rows)
    images = draw(tmp_path / "flickr30k-images", "36979.jpg", "5.jpg")
    found = samples_of(snli_ve_source(None, path, images), tmp_path / "out")
    assert list(found) == ["snli-ve-snli_ve_dev-36979", "snli-ve-snli_ve_dev-5"]
    texts = found["snli-ve-snli_ve_dev-36979"].texts
    assert [(text.text, text.label) for text in texts] == [("A man.", "entailment"), ("No.", "contradiction")]
    lines(path, [*rows, row(5, "Undecided.", "-", 3), row("x", "?", "neutral", 4)])
    text = problems_of(snli_ve_source("dev", path, images), tmp_path / "out2")
    assert "unknown label: 1" in text
    assert "expected contradiction, entailment, neutral, got '-'" in text
    assert "expected a Flickr30K_ID, got 'x'" in text


# --- Karpathy


def karpathy_file(path, dataset, rows):
    images = [
        {
            "sentids": [5 * number, 5 * number + 1],
            "imgid": number,
            "sentences": [
                {"tokens": ["a"], "raw": f"{caption} ", "imgid": number, "sentid": 5 * number + slot}
                for slot, caption in enumerate(captions)
            ],
            "split": split,
            **names,
        }
        for number, (split, names, captions) in enumerate(rows)
    ]
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    return path


def test_karpathy_coco(tmp_path):
    """Two folders hold pictures of one file name: the file path decides."""
    rows = [
        ("train", {"filepath": "train2014", "filename": "1.jpg", "cocoid": 1}, ["A dog.", "Two dogs."]),
        ("restval", {"filepath": "val2014", "filename": "1.jpg", "cocoid": 2}, ["A cat."]),
        ("test", {"filepath": "val2014", "filename": "3.jpg", "cocoid": 3}, ["A cow."]),
    ]
    path = karpathy_file(tmp_path / "dataset_coco.json", "coco", rows)
    images = draw(tmp_path / "coco", "train2014/1.jpg", "val2014/1.jpg", "val2014/3.jpg")
    found = samples_of(karpathy_source("train+restval", path, images), tmp_path / "out")
    assert list(found) == ["coco-train-0", "coco-restval-1"]
    assert [text.text for text in found["coco-train-0"].texts] == ["A dog.", "Two dogs."]
    assert found["coco-train-0"].texts[1].meta == {"sentid": 1}
    assert found["coco-restval-1"].images[0].content == (images / "val2014/1.jpg").read_bytes()
    assert list(samples_of(karpathy_source("test", path, images), tmp_path / "test")) == ["coco-test-2"]
    with pytest.raises(InputError, match="expected --split of restval, test, train, got dev"):
        karpathy_source("dev", path, images)


def test_karpathy_flickr_from_a_tar(tmp_path):
    rows = [
        ("val", {"filename": "1.jpg"}, ["A dog."]),
        ("val", {"filename": "2.jpg"}, []),
        ("test", {"filename": "3.jpg"}, ["x"]),
    ]
    path = karpathy_file(tmp_path / "dataset_flickr30k.json", "flickr30k", rows)
    images = draw(tmp_path / "flickr30k-images", "1.jpg")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, "flickr30k-images")
    assert "expected sentences" in problems_of(karpathy_source("val", path, tmp_path / "images.tar"), tmp_path / "out")
    done = cli(
        *("data", "import", "karpathy", "--split", "val", "--from", path, "--images", tmp_path / "images.tar"),
        *("--out", tmp_path / "out", "--skip-bad"),
    )
    assert done.code == 0, done.err
    assert [shard.keys for shard in open_shards(tmp_path / "out")] == [["flickr30k-val-0"]]


def test_pictures_of_one_name(tmp_path):
    pictures = open_pictures(draw(tmp_path, "a/1.png", "b/1.png", "c/2.png"))
    assert pictures.read("a/1.png") != pictures.read("b/1.png")
    assert pictures.read("elsewhere/2.png") == pictures.read("2.png")
    with pytest.raises(InputError, match="expected one file, found 2"):
        pictures.read("1.png")
    with pytest.raises(FileNotFoundError):
        pictures.read("3.png")
    with pytest.raises(InputError, match="expected a folder of pictures or an uncompressed tar"):
        open_pictures(tmp_path / "a/1.png")


def test_what_the_command_line_asks_for(tmp_path):
    done = cli("data", "import", "vqav2", "--from", "q.json", "--out", tmp_path / "out")
    assert done.code == 1
    assert "vqav2 needs --images, a folder or an uncompressed tar of its pictures" in done.message
    done = cli("data", "import", "nlvr2", "--out", tmp_path / "out")
    assert "nlvr2 needs --from, the file of examples, such as dev.json" in done.message
    done = cli("data", "import", "emoji", "--from", "x", "--annotations", "y", "--out", tmp_path / "out")
    assert "expected options of emoji, got --annotations" in done.message


# --- emoji


def test_emoji_base():
    assert base_of("1f385_1f3fb") == base_of("1f385")
    assert base_of("1f468_1f3fe_200d_1f680") == base_of("1f469_200d_1f680") == base_of("1f9d1_200d_1f680")
    assert base_of("1f3c3_1f3fb_200d_2640_200d_27a1") == base_of("1f3c3")
    assert base_of("1f3fb") == "1f3fb", "a skin tone by itself"
    assert base_of("1f3c3") != base_of("1f6b6")


def test_emoji_problems(tmp_path):
    row = {"image": "images72/1f600.png", "name": "grin", "aliases": ["x"], "group": "", "codepoints": "1f600"}
    row |= {"skin_tone_variant": False}
    draw(tmp_path, "images72/1f600.png")
    texts = []
    for split in ("train", "valid", "test"):
        lines(
            tmp_path / "captions.jsonl", [row, {**row, "name": ""}, {**row, "image": "no.png", "codepoints": "1f3c3"}]
        )
        texts.append(problems_of(emoji_source(split, tmp_path), tmp_path / "out"))
    assert all("malformed line: 1" in text and "name: " in text for text in texts), "said for every split"
    assert sum("'no.png' does not exist" in text for text in texts) == 1
    with pytest.raises(InputError, match="expected --split train, valid or test"):
        emoji_source("dev", tmp_path)


@needs_emoji
def test_emoji_splits_without_leakage(tmp_path):
    """Nothing that looks alike is in two splits: skin tones, sexes, and pictures of the same bytes."""
    seen = defaultdict(set)
    captions = defaultdict(list)
    total = 0
    for split in ("train", "valid", "test"):
        source = emoji_source(split, EMOJI)
        for found in source.found:
            assert not found.problems
            total += 1
            for mark in (base_of(found.meta["codepoints"]), found.meta["family"], found.images[0].content):
                seen[mark].add(split)
            for text in found.texts:
                captions[text.text].append(found.key)
    assert total == 3543
    assert [marks for marks in seen.values() if len(marks) > 1] == []
    assert [keys for keys in captions.values() if len(keys) > 1] == [], "a caption belongs to one picture"
    assert sum(len(keys) for keys in captions.values()) > 4500
