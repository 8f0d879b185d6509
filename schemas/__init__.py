"""JSON Schemas of everything written to disk, generated from the models: `python -m dde_cache.schemas`."""

import json
from pathlib import Path

from pydantic import BaseModel

from dde_cache.candidates import CandidateAttributes
from dde_cache.claims import StudyReport
from dde_cache.demo import DemoReport
from dde_cache.embed import EmbedReport
from dde_cache.embeddings import EmbeddingIndex
from dde_cache.export import ExportRecord
from dde_cache.extract import ExtractConfig, ExtractSummary
from dde_cache.index import IndexRecord
from dde_cache.matching import ScoreAttributes, ScoreIndex, ScoreReport
from dde_cache.merge import MergeReport
from dde_cache.mine import MineReport
from dde_cache.objects import Receipts
from dde_cache.outcomes import StudyResult
from dde_cache.plan import ExtractPlan
from dde_cache.predict import Prediction
from dde_cache.pretraining import PretrainConfig
from dde_cache.questions import QuestionLine
from dde_cache.repair import RepairReport
from dde_cache.samples import SampleRecord, ShardsIndex
from dde_cache.scores import Baselines, EvaluationReport
from dde_cache.search import SearchReport
from dde_cache.several import TeachersFile
from dde_cache.share import TransferReport
from dde_cache.spec import Manifest, UnitAttributes
from dde_cache.stored_rows import EmbeddingAttributes
from dde_cache.subset import SubsetReport
from dde_cache.summary import CacheSummary, PairLinks
from dde_cache.teach import TeachConfig
from dde_cache.testbeds import StudyConfig
from dde_cache.train import RunRecord, TrainConfig
from dde_cache.verify import VerifyReport

MODELS: dict[str, type[BaseModel]] = {
    "baselines": Baselines,
    "cache-summary": CacheSummary,
    "candidate-attributes": CandidateAttributes,
    "demo-report": DemoReport,
    "embed-report": EmbedReport,
    "embedding-attributes": EmbeddingAttributes,
    "embedding-store": EmbeddingIndex,
    "evaluation-report": EvaluationReport,
    "export": ExportRecord,
    "extract-config": ExtractConfig,
    "extract-plan": ExtractPlan,
    "extract-summary": ExtractSummary,
    "index": IndexRecord,
    "manifest": Manifest,
    "merge-report": MergeReport,
    "mine-report": MineReport,
    "pair-links": PairLinks,
    "pretrain-config": PretrainConfig,
    "prediction": Prediction,
    "question": QuestionLine,
    "receipts": Receipts,
    "repair-report": RepairReport,
    "run": RunRecord,
    "sample": SampleRecord,
    "score-attributes": ScoreAttributes,
    "score-report": ScoreReport,
    "scores": ScoreIndex,
    "search-report": SearchReport,
    "shards": ShardsIndex,
    "study-config": StudyConfig,
    "study-report": StudyReport,
    "study-result": StudyResult,
    "subset-report": SubsetReport,
    "teach-config": TeachConfig,
    "teachers": TeachersFile,
    "train-config": TrainConfig,
    "transfer-report": TransferReport,
    "unit-attributes": UnitAttributes,
    "verify-report": VerifyReport,
}
"""What is written to disk or printed with `--json`, by the name of its schema file."""


def render(name: str) -> str:
    """The schema of one model as the text of its file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | MODELS[name].model_json_schema()
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def folder() -> Path:
    """Where the schema files lie."""
    return Path(__file__).parent
