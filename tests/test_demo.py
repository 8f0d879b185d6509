"""The demo, small: every stage runs, the table has every model, and the sentence follows the numbers."""

import pytest

from dde_cache.demo import STUDENTS, DemoConfig, DemoStudent, conclusion, demo
from dde_cache.errors import InputError
from dde_cache.scores import EvaluationReport, Score
from dde_cache.train import RunRecord


def test_demo_runs_every_stage_and_reports_every_model(tmp_path):
    stages = {}

    def stage(name, total):
        stages[name] = [total, 0]
        return lambda done: stages[name].__setitem__(1, done)

    config = DemoConfig(pictures=30, test_pictures=20, steps=10, batch_size=16, workers=0)
    report = demo(tmp_path / "demo", config, stage)
    assert all(done == total for total, done in stages.values()), stages
    assert set(report.students) == set(STUDENTS)
    assert report.teacher.overall.pairs == 120
    assert report.extraction.pairs == 180
    assert set(report.teacher.kinds) == {"exists", "row", "neighbour"}
    with pytest.raises(InputError, match="new or empty folder"):
        demo(tmp_path / "demo", config, stage)


def score(accuracy: float) -> EvaluationReport:
    return EvaluationReport(overall=Score(pairs=5000, accuracy=accuracy), kinds={})


def student(accuracy: float) -> DemoStudent:
    run = RunRecord.model_construct(steps=1, seconds=1.0, wait_seconds=0.0)
    return DemoStudent.model_construct(score=score(accuracy), run=run)


@pytest.mark.parametrize(
    ("plain", "soft", "full", "says", "says_not"),
    [
        (0.80, 0.86, 0.92, "12.0 points above labels only; 6.0 points above soft labels", "chance alone could"),
        (0.80, 0.915, 0.92, "0.5 points above soft labels, which chance alone could make", "above its"),
        (0.92, 0.86, 0.80, "12.0 points below labels only; 6.0 points below soft labels", "points above its teacher"),
    ],
)
def test_conclusion_says_what_the_numbers_say(plain, soft, full, says, says_not):
    students = dict(zip(STUDENTS, map(student, (plain, soft, full)), strict=True))
    text = conclusion(score(0.95), students)
    assert says in text
    assert says_not not in text
