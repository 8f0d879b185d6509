"""The schema files are in step with the models, and what is written to disk validates against them."""

import json

import jsonschema
import pytest

from dde_cache import schemas
from dde_cache.samples import SampleRecord, Text


@pytest.mark.parametrize("name", sorted(schemas.MODELS))
def test_schema_file_is_what_the_model_gives(name):
    path = schemas.folder() / f"{name}.json"
    assert path.read_text() == schemas.render(name), "run `make schemas`"


def test_there_are_no_other_schema_files():
    assert {path.stem for path in schemas.folder().glob("*.json")} == set(schemas.MODELS)


def test_written_samples_validate():
    record = SampleRecord(texts=(Text(text="is there a circle", label="yes"),), meta={"scene": 1})
    schema = json.loads((schemas.folder() / "sample.json").read_text())
    jsonschema.validate(json.loads(record.model_dump_json(exclude_defaults=True)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"texts": []}, schema)
