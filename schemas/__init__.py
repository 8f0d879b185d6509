"""JSON Schemas of everything written to disk, generated from the models: `python -m dde_cache.schemas`."""

import json
from pathlib import Path

from pydantic import BaseModel

from dde_cache.demo import DemoReport
from dde_cache.extract import ExtractConfig, ExtractSummary
from dde_cache.samples import SampleRecord, ShardsIndex
from dde_cache.scores import Baselines, EvaluationReport
from dde_cache.spec import Manifest, UnitAttributes
from dde_cache.summary import CacheSummary, PairLinks
from dde_cache.teach import TeachConfig
from dde_cache.train import RunRecord, TrainConfig

MODELS: dict[str, type[BaseModel]] = {
    "baselines": Baselines,
    "cache-summary": CacheSummary,
    "demo-report": DemoReport,
    "evaluation-report": EvaluationReport,
    "extract-config": ExtractConfig,
    "extract-summary": ExtractSummary,
    "manifest": Manifest,
    "pair-links": PairLinks,
    "run": RunRecord,
    "sample": SampleRecord,
    "shards": ShardsIndex,
    "teach-config": TeachConfig,
    "train-config": TrainConfig,
    "unit-attributes": UnitAttributes,
}
"""What is written to disk or printed with `--json`, by the name of its schema file."""


def render(name: str) -> str:
    """The schema of one model as the text of its file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | MODELS[name].model_json_schema()
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def folder() -> Path:
    """Where the schema files lie."""
    return Path(__file__).parent
