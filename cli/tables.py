"""Reports as tables that fit 80 columns."""

from rich.markup import escape
from rich.table import Table

from dde_cache.scores import EvaluationReport

_COLUMNS = {
    "accuracy": "accuracy",
    "frequent_answer": "most frequent\nanswer",
    "frequent_answer_to_question": "most frequent\nto question",
    "agreement": "agrees with\nteacher",
}


def score_table(report: EvaluationReport, title: str) -> Table:
    """Accuracy by kind of question, with the baselines and the agreement that the report has."""
    shown = [name for name in _COLUMNS if getattr(report.overall, name) is not None]
    table = Table(title=title)
    table.add_column("kind")
    table.add_column("pairs", justify="right")
    for name in shown:
        table.add_column(_COLUMNS[name], justify="right")
    for kind, score in [*report.kinds.items(), ("all", report.overall)]:
        table.add_row(
            escape(kind),
            f"{score.pairs:,}",
            *(f"{getattr(score, name):.3f}" for name in shown),
            style="bold" if kind == "all" else None,
        )
    return table
