"""docs/how-to/write-a-teacher-adapter.md: its family works as it stands, and its table says what the families say."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, randomise
from families import FEATURES, TEXT, bert_tokenizer, save_family
from test_teachers import regions
from transformers import VisualBertConfig, VisualBertForVisualReasoning

from dde_cache import checkpoint, teacher, teachers
from dde_cache.teacher import FusionTeacher
from dde_cache.teachers.contract import REGIONS, ROW_MAJOR

PAGE = (Path(__file__).parent.parent / "docs" / "how-to" / "write-a-teacher-adapter.md").read_text()


@pytest.fixture
def visual_bert(monkeypatch, tmp_path):
    """A tiny teacher of the page's family."""
    found = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], found)
    family = found["VisualBert"]
    for table in (teachers.FAMILIES, checkpoint.FAMILIES):
        monkeypatch.setitem(table, family.name, family)
    for table in (teachers.ARCHITECTURES, checkpoint.ARCHITECTURES, teacher.ARCHITECTURES):
        for model in family.architectures:
            monkeypatch.setitem(table, model.__name__, (family, model))
    shape = VisualBertConfig(**TEXT, visual_embedding_dim=FEATURES)
    randomise(VisualBertForVisualReasoning(shape)).save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    return FusionTeacher.load(tmp_path)


def test_the_family_of_the_page_gives_what_the_stock_model_gives(visual_bert):
    tokens, batch = visual_bert.preprocessor.tokens(list(TEXTS)), regions((5, 3, 1, 4))
    mask = torch.arange(5) < batch.count[:, None]
    with torch.inference_mode():
        stock = visual_bert.model(
            tokens.ids,
            tokens.mask,
            visual_embeds=batch.features,
            visual_attention_mask=mask.long(),
            output_attentions=True,
            output_hidden_states=True,
        )
    ours = visual_bert(tokens, [batch], [0, 1], hidden=True, whole=True)
    torch.testing.assert_close(ours.logits, stock.logits, atol=1e-5, rtol=1e-6)
    assert visual_bert.labels == ("False", "True")
    for layer in (0, 1):
        for row, text in enumerate(tokens.mask.sum(-1).tolist()):
            end, seen = tokens.mask.shape[1], int(batch.count[row])
            block = stock.attentions[layer][row, :, :text, end : end + seen]
            t2i = ours.attention[0, layer].t2i[row, :, :text, :seen]
            torch.testing.assert_close(t2i, block / block.sum(-1, keepdim=True), atol=5e-6, rtol=0)
            block = stock.attentions[layer][row, :, end : end + seen, :text]
            i2t = ours.attention[0, layer].i2t[row, :, :seen, :text]
            torch.testing.assert_close(i2t, block / block.sum(-1, keepdim=True), atol=5e-6, rtol=0)
            states = stock.hidden_states[layer + 1][row, :text]
            torch.testing.assert_close(ours.hidden[0, layer].text[row, :text], states, atol=1e-5, rtol=1e-5)
    short = visual_bert(tokens, [batch], [0], logits=False)
    assert torch.equal(short.attention[0, 0].t2i, ours.attention[0, 0].t2i)


def test_the_python_of_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    lines = re.search(r"^    from dde_cache.preprocess import .*?(?=\n\n##)", PAGE, re.M | re.S)[0]
    save_family("lxmert", tmp_path / "lxmert")
    monkeypatch.chdir(tmp_path)
    batch = regions((5,))
    found = {"features": batch.features, "boxes": batch.boxes, "count": batch.count}
    exec("\n".join(line[4:] for line in lines.splitlines()), found)
    assert found["maps"].t2i.shape[-1] == found["maps"].i2t.shape[2] == 5


def test_the_table_says_what_the_families_say():
    rows = {
        cells[1].strip(" `"): [cell.strip() for cell in cells[3:-1]]
        for cells in (line.split("|") for line in PAGE.splitlines() if line.startswith("| `"))
    }
    assert set(rows) == set(teachers.FAMILIES)
    for name, (maps, axis, _logits, whole, hidden, padded, _pictures) in rows.items():
        family = teachers.FAMILIES[name]
        assert maps == ("both" if len(family.directions) == 2 else family.directions[0])
        assert {"CLS, patches": ROW_MAJOR, "regions": REGIONS}[axis] == family.rule
        held = (family.whole, family.hidden, family.padded_queries)
        assert tuple(cell == "yes" for cell in (whole, hidden, padded)) == held
