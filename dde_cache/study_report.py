"""A study's table as Markdown, and its files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dde_cache.cells import CELLS, DEFAULT, FAMILIES, LABELS, LOSSLESS, Cell
from dde_cache.claims import SkippedRun, StudyReport, StudyRow, points, study_report
from dde_cache.figures import Point, scatter_svg
from dde_cache.manifest import write_bytes
from dde_cache.outcomes import read_outcomes
from dde_cache.study_folder import check_results
from dde_cache.testbeds import GROUPS, StudyConfig

REPORT, TABLE = "report.json", "report.md"


def sum_up(out: Path, config: StudyConfig, skipped: Sequence[SkippedRun] = ()) -> StudyReport:
    """Read everything that is finished in a study's folder, and write `report.json` and `report.md` beside it.

    Args:
        out: folder of the study.
        config: its settings.
        skipped: runs that were not made, and why.

    Raises:
        RunError: nothing was tested yet, a file cannot be read, or a run was made with other settings.
    """
    check_results(out, config)
    report = study_report(config.testbed, read_outcomes(out), config.needs, GROUPS.get(config.testbed, {}), skipped)
    write_bytes(out / REPORT, (report.model_dump_json(indent=1) + "\n").encode())
    write_bytes(out / TABLE, ("\n".join(markdown(report)) + "\n").encode())
    return report


def placed(rows: Sequence[StudyRow]) -> list[tuple[int, StudyRow]]:
    """Rows with their depth, each below the one that it is compared with, where that is there."""
    names = {row.cell for row in rows}

    def below(base: str | None, depth: int) -> Iterator[tuple[int, StudyRow]]:
        for row in rows:
            if base == (row.base if row.base in names - {row.cell} else None):
                yield depth, row
                yield from below(row.cell, depth + 1)

    return list(below(None, 0))


def markdown(report: StudyReport) -> list[str]:
    """The lines of a study's table, its claims, and what was skipped."""
    groups = list(report.teacher_groups)
    lines = [
        f"{report.questions:,} test questions about {report.pictures:,} pictures. Differences in points, paired by "
        "seed, with the interval of 95 % (bootstrap over seeds and pictures) and the smallest that could be seen.",
        "",
        f"| cell | seeds | accuracy | of single seeds | {''.join(f'{name} | ' for name in groups)}bytes a pair "
        "| difference | seen from | to | |",
        "|---" * (9 + len(groups)) + "|",
        f"| teacher | | {report.teacher:.3f} | | "
        + "".join(f"{value:.3f} | " for value in report.teacher_groups.values())
        + "| | | | |",
    ]
    for family in FAMILIES:
        lines += [_line(row) for row in report.rows if row.family == family]
    if report.codes > 1:
        lines += [
            "",
            f"**Made by {report.codes} states of the code**: where it changed, seeds differ by more than chance.",
        ]
    if report.proves_nothing:
        lines += ["", "**This set proves nothing**: a plain dual encoder is as good as the teacher on it."]
    lines += ["", "| claim | verdict | numbers |", "|---|---|---|"]
    lines += [f"| {one.claim} | **{one.verdict}** | {one.because} |" for one in report.claims]
    if report.skipped:
        lines += ["", skipped_line(report)]
    return lines


def _line(row: StudyRow) -> str:
    spread = "" if row.deviation is None else f" ± {row.deviation:.3f}"
    groups = "".join(f"{value:.3f} | " for value in row.groups.values())
    size = "" if row.bytes_a_pair is None else f"{row.bytes_a_pair:,.0f}"
    span = f"{row.lowest:.3f} to {row.highest:.3f}" if row.seeds > 1 else ""
    change, seen, base, verdict = "", "", "", ""
    if row.difference is not None:
        change, base, verdict = points(row.difference), row.base, str(row.verdict)
        seen = f"{100 * row.difference.visible:.1f}"
        if row.difference.seeds < row.seeds:
            base += f", {row.difference.seeds} of these seeds"
    begin = f"| {row.cell} | {row.seeds} | {row.accuracy:.3f}{spread} | {span} | {groups}{size} | "
    return begin + f"{change} | {seen} | {base} | {verdict} |"


TAILS = {"bucket": "tail as one outcome", "uniform": "even tail", "renormalise": "no tail"}


def write_plots(out: Path, report: StudyReport) -> tuple[str, ...]:
    """Draw accuracy against bytes a pair (as differences to the lossless cell), and against the share of pictures with
    labels, where there are such cells.

    Returns:
        the names of the files.

    Raises:
        InputError: matplotlib is not installed.
    """
    teacher = f"teacher {report.teacher:.3f}"
    charts = {
        "accuracy-bytes.svg": (
            _bytes_points(report),
            (f"{report.testbed}: accuracy against {LOSSLESS}, {teacher}; 95 %", "bytes a pair", "points"),
        ),
        "accuracy-labels.svg": (
            _label_points(report),
            (f"{report.testbed}, {teacher}; deviation of seeds", "pictures with labels, %", "accuracy"),
        ),
    }
    found = {name: chart for name, chart in charts.items() if len(chart[0]) > 1}
    for name, (points_, words) in found.items():
        write_bytes(out / name, scatter_svg(points_, *words))
    return tuple(found)


def _bytes_points(report: StudyReport) -> list[Point]:
    """Differences to the lossless cell, paired by seed: what seeds have in common would hide them."""
    rows = {row.cell: row for row in report.rows if row.bytes_a_pair}
    if LOSSLESS not in rows:
        return []
    found = []
    for cell in (cell for cell in CELLS if cell.name in rows and (cell.family == "keys" or cell.name == DEFAULT)):
        row = rows[LOSSLESS if cell.name == DEFAULT else cell.name]
        one = row.difference
        low, mean, high = (0.0, 0.0, 0.0) if cell.name == LOSSLESS or one is None else (one.low, one.mean, one.high)
        if cell.name == DEFAULT:
            low, mean, high = -high, -mean, -low
        size = rows[cell.name].bytes_a_pair or 0.0
        # The series says which tail.
        name = "sqrt8" if cell.name == DEFAULT else cell.name.partition(",")[0]
        found.append(Point(name, _series(cell), size, 100 * mean, 100 * low, 100 * high))
    return found


def _series(cell: Cell) -> str:
    if cell.name == DEFAULT:
        return "every key, one byte (default)"
    if "mass" in cell.extract:
        return "keys by mass"
    if cell.extract.get("k") is None:
        return "every key, other codes"
    return f"strongest keys, {TAILS[str(cell.train['tail'])]}"


def _label_points(report: StudyReport) -> list[Point]:
    cells = {cell.name: cell for cell in CELLS if cell.family == "labels" or cell.name == LABELS}
    if not any(row.family == "labels" for row in report.rows):
        return []
    return [
        Point(
            "",
            LABELS if cells[row.cell].targets == "none" else "labels + cache of all",
            100 * (cells[row.cell].labelled or 1.0),
            row.accuracy,
            row.accuracy - (row.deviation or 0.0),
            row.accuracy + (row.deviation or 0.0),
        )
        for row in report.rows
        if row.cell in cells
    ]


def skipped_line(report: StudyReport) -> str:
    """What was not made, in one sentence."""
    cells: dict[str, list[str]] = {}
    for one in report.skipped:
        cells.setdefault(f"{one.cell} ({one.why})", []).append(str(one.seed))
    listed = "; ".join(f"{cell}: seed{'s'[: len(seeds) > 1]} {', '.join(seeds)}" for cell, seeds in cells.items())
    return f"Skipped {len(report.skipped)} runs: {listed}."
