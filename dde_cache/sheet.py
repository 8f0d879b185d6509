"""The page of `dde-cache report`, from what `compare` has found."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from dde_cache.compare import Confusion, Judged, Run, settings_table, thinned
from dde_cache.figures import bar_chart, histogram, line_chart
from dde_cache.pages import fill_page, read_part, template
from dde_cache.store import write_text

_TIMES = ("wait", "forward", "backward", "rest")
_NOT_LOSSES = ("step", "learning_rate", "valid_accuracy", "seconds")


def write_report(
    out: Path,
    runs: Sequence[Run],
    judged: Mapping[str, Judged | str],
    kept: Mapping[str, Sequence[int]] | str,
) -> int:
    """Write the page; return its size in bytes.

    Args:
        out: the HTML file; a file that is there is replaced.
        runs: side by side.
        judged: of each run by name its scores, or why there are none.
        kept: rows by kept mass and direction, or why there are none.

    Raises:
        InputError: matplotlib is not installed.
    """
    sections = [
        _section("Runs", _overview(runs)),
        _section("Curves", _curves(runs)),
        _section("Time of a step", _times(runs)),
        _section("Accuracy by kind", _kinds(judged)),
        _section("What is confused in the worst kinds", _confusions(judged)),
        _section("Kept mass of the cache", _kept(kept)),
        _section("Settings", _settings(runs)),
    ]
    names = ", ".join(run.folder.resolve().name for run in runs)
    parts = {"title": html.escape(f"Training of {names}"), "sections": "\n".join(sections)}
    write_text(out, fill_page(template("report"), parts, read_part("report.css")))
    return out.stat().st_size


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def _hint(text: str) -> str:
    return f'<p class="hint">{html.escape(text)}</p>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = (), caption: str = "") -> str:
    """A table of plain texts."""
    titles = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in head)
    lines = []
    for number, row in enumerate(rows):
        name = ' class="differs"' if number < len(marked) and marked[number] else ""
        lines.append(f"<tr{name}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    about = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "\n".join(lines)
    return f'<div class="scroll"><table>{about}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>\n'


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        record, last = run.record, int(max((line["step"] for line in run.lines), default=0))
        best = "-" if record is None or record.best_accuracy is None else f"{record.best_accuracy:.3f}"
        state = f"step {last:,}, not finished" if record is None else f"{record.steps:,} steps"
        minutes = "-" if record is None else f"{record.seconds / 60:.1f} min"
        rows.append([run.name, state, minutes, best, "-" if record is None else record.targets])
    return _table(["run", "trained", "time", "best validation accuracy", "targets"], rows)


def _curves(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    losses = [name for name in names if name not in _NOT_LOSSES and not name.endswith("_seconds")]
    order = [*losses, *(name for name in ("valid_accuracy", "learning_rate") if name in names)]
    charts = []
    for name in order:
        series = {run.name: thinned(run.curve(name)) for run in runs}
        charts.append(line_chart(series, name.replace("_", " ")))
    if not charts:
        return _hint("No run has logged a step yet.")
    missing = "" if "valid_accuracy" in names else _hint("No run was validated (train --valid).")
    return f'<div class="row">{"".join(charts)}</div>{missing}'


def _times(runs: Sequence[Run]) -> str:
    times = {run.name: run.times() for run in runs if run.times()}
    if not times:
        return _hint("No run has logged a step yet.")
    rows = [
        [name, *(f"{parts[part]:.1f}" if part in parts else "-" for part in _TIMES), f"{sum(parts.values()):.1f}"]
        for name, parts in times.items()
    ]
    stacked = {name: {part: parts.get(part, 0.0) for part in _TIMES} for name, parts in times.items()}
    table = _table(["run", *_TIMES, "all"], rows, caption="milliseconds a step, mean over the run, of the first rank")
    hint = _hint(
        "wait: for the next batch. forward: the model, its losses and, online, the teacher. backward: the gradients. "
        "rest: the optimizer, other ranks, logging. Runs of older versions have not measured forward and backward."
    )
    return f'<div class="row">{bar_chart(stacked, "milliseconds a step", "ms", stacked=True)}{table}</div>{hint}'


def _scored(judged: Mapping[str, Judged | str]) -> dict[str, Judged]:
    return {name: one for name, one in judged.items() if isinstance(one, Judged)}


def _kinds(judged: Mapping[str, Judged | str]) -> str:
    hints = "".join(_hint(f"{name}: {why}") for name, why in judged.items() if isinstance(why, str))
    scored = _scored(judged)
    if not scored:
        return hints
    kinds = list(dict.fromkeys(kind for one in scored.values() for kind in one.report.kinds))
    groups = {
        kind: {name: one.report.kinds[kind].accuracy for name, one in scored.items() if kind in one.report.kinds}
        for kind in kinds
    }
    groups["all"] = {name: one.report.overall.accuracy for name, one in scored.items()}
    groups = {kind: {run: value for run, value in held.items() if value == value} for kind, held in groups.items()}
    rows = [[kind, *(f"{held[name]:.3f}" if name in held else "-" for name in scored)] for kind, held in groups.items()]
    metrics = {name: one.report.metrics for name, one in scored.items()}
    for metric in dict.fromkeys(name for held in metrics.values() for name in held):
        rows.append([metric, *(f"{metrics[name][metric]:.3f}" if metric in metrics[name] else "-" for name in scored)])
    return f'<div class="row">{bar_chart(groups, "accuracy", "share")}{_table(["kind", *scored], rows)}</div>{hints}'


def _confusions(judged: Mapping[str, Judged | str]) -> str:
    parts = []
    for name, one in _scored(judged).items():
        tables = [_confusion(kind, found, one.report.kinds[kind].accuracy) for kind, found in one.confusions.items()]
        if tables:
            parts.append(f'<h3>{html.escape(name)}</h3><div class="row">{"".join(tables)}</div>')
    return "".join(parts) or _hint("Nothing to show: no run was scored on a task with one right answer a pair.")


def _confusion(kind: str, found: Confusion, accuracy: float) -> str:
    rows = [[label, *(f"{count:,}" for count in found.counts[number])] for number, label in enumerate(found.labels)]
    return _table(["label \\ answer", *found.labels], rows, caption=f"{kind}: accuracy {accuracy:.3f}")


def _kept(kept: Mapping[str, Sequence[int]] | str) -> str:
    if isinstance(kept, str):
        return _hint(kept)
    rows = []
    for name, bins in kept.items():
        total, shares = sum(bins), []
        for least in (0.5, 0.9, 0.98):
            shares.append(f"{sum(bins[round(least * len(bins)) :]) / max(total, 1):.1%}")
        rows.append([name, f"{total:,}", *shares])
    head = ["direction", "rows", "keep 0.50 or more", "0.90", "0.98"]
    return f'<div class="row">{histogram(kept, "rows by kept mass", "kept mass")}{_table(head, rows)}</div>'


def _settings(runs: Sequence[Run]) -> str:
    rows = settings_table(runs)
    marked = [differs for _, _, differs in rows]
    note = _hint("≠ marks what differs between the runs.") if any(marked) else ""
    return note + _table(
        ["setting", *(run.name for run in runs)], [[name, *values] for name, values, _ in rows], marked
    )
