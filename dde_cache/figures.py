"""Charts as pictures inside a page, drawn by matplotlib, which is imported where one is asked for.

Each is drawn twice, for light and for dark pages, and embedded as an SVG image: text in it stays text, and nothing in
it can run. Series differ in dashes, hatching and order beside colour.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dde_cache.errors import InputError

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points by name."""

_COLOURS = {
    False: ("#0a58ca", "#b35900", "#00795c", "#9c2a7a", "#5d5d68", "#7a5c00"),
    True: ("#7fb2ff", "#ffb454", "#4fd1ad", "#f08fd0", "#b5b5c0", "#e0cf5a"),
}
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
_INK = {False: "#1b1b1f", True: "#ececf1"}
_PAPER = {False: "#ffffff", True: "#16161a"}


@dataclass(frozen=True)
class Pen:
    """Axes of a chart with the colours of its scheme."""

    axes: Any
    colours: tuple[str, ...]
    ink: str
    paper: str


@dataclass(frozen=True)
class Point:
    """A named point of a scatter chart, the series that it is of, and the ends of its bar."""

    name: str
    series: str
    x: float
    y: float
    low: float
    high: float


def _draw(draw: Callable[[Pen], None], size: tuple[float, float], dark: bool) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(_svg(draw, size, dark)).decode()


def _svg(draw: Callable[[Pen], None], size: tuple[float, float], dark: bool) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "expected matplotlib, which draws the charts of a report, found none; pip install 'dde-cache[report]'"
        ) from error
    ink, paper = _INK[dark], _PAPER[dark]
    settings = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
        **{"svg.fonttype": "none", "svg.hashsalt": "dde-cache", "text.parse_math": False, "font.size": 9},
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.8},
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained", facecolor=paper)
        axes = figure.add_subplot(facecolor=paper)
        draw(Pen(axes, _COLOURS[dark], ink, paper))
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _picture(draw: Callable[[Pen], None], alt: str, size: tuple[float, float] = (5.2, 2.9)) -> str:
    light, dark = (_draw(draw, size, scheme) for scheme in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
    )


def line_chart(series: Series, title: str, across: str = "step") -> str:
    """Lines by name, as markup; a series without points keeps its colour and dashes for the charts that have it.

    Raises:
        InputError: matplotlib is not installed.
    """

    def draw(pen: Pen) -> None:
        for number, (name, points) in enumerate(series.items()):
            if not points:
                continue
            pen.axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=pen.colours[number % len(pen.colours)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker="o" if len(points) < 20 else None,
                markersize=3,
                label=name,
            )
        pen.axes.set_title(title, loc="left", fontsize=10)
        pen.axes.set_xlabel(across)
        if len(series) > 1:
            pen.axes.legend()

    last = ", ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in series.items() if points)
    return _picture(draw, f"{title} by {across}: {last}")


def bar_chart(groups: Mapping[str, Mapping[str, float]], title: str, across: str, *, stacked: bool = False) -> str:
    """Horizontal bars: for each group its values by name, one beside or behind the other, as markup.

    Raises:
        InputError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))

    def draw(pen: Pen) -> None:
        height = 0.8 if stacked else 0.8 / len(names)
        starts = dict.fromkeys(groups, 0.0)
        for number, name in enumerate(names):
            shift = 0.0 if stacked else (number - (len(names) - 1) / 2) * height
            places = [place + shift for place in range(len(groups))]
            values = [group.get(name, 0.0) for group in groups.values()]
            left = list(starts.values()) if stacked else None
            pen.axes.barh(
                places,
                values,
                height,
                left=left,
                label=name,
                color=pen.colours[number % len(pen.colours)],
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor=pen.paper,
            )
            starts = {group: starts[group] + value for group, value in zip(groups, values, strict=True)}
        pen.axes.set_yticks(range(len(groups)), list(groups))
        pen.axes.invert_yaxis()
        pen.axes.set_xlabel(across)
        pen.axes.set_title(title, loc="left", fontsize=10)
        if len(names) > 1:
            pen.axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    rows = len(groups) * (1 if stacked else len(names))
    return _picture(draw, f"{title}; the numbers are in the table", (5.6, 1.2 + 0.28 * rows))


def histogram(counts: Mapping[str, Sequence[int]], title: str, across: str) -> str:
    """Shares of values in equal bins from 0 to 1, by name, as markup.

    Raises:
        InputError: matplotlib is not installed.
    """

    def draw(pen: Pen) -> None:
        for number, (name, bins) in enumerate(counts.items()):
            edges = [place / len(bins) for place in range(len(bins) + 1)]
            pen.axes.stairs(
                [count / max(sum(bins), 1) for count in bins],
                edges,
                color=pen.colours[number],
                linestyle=_DASHES[number],
                linewidth=1.6,
                label=name,
            )
        pen.axes.set_xlabel(across)
        pen.axes.set_ylabel("share of rows")
        pen.axes.set_title(title, loc="left", fontsize=10)
        pen.axes.legend()

    return _picture(draw, title)


def scatter_svg(points: Sequence[Point], title: str, across: str, up: str) -> bytes:
    """An SVG file of named points over a logarithmic axis, with bars.

    Raises:
        InputError: matplotlib is not installed.
    """

    def draw(pen: Pen) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        for number, series in enumerate(dict.fromkeys(point.series for point in points)):
            some = sorted((point for point in points if point.series == series), key=lambda point: point.x)
            pen.axes.errorbar(
                [point.x for point in some],
                [point.y for point in some],
                yerr=[[point.y - point.low for point in some], [point.high - point.y for point in some]],
                color=pen.colours[number % len(pen.colours)],
                linestyle=_DASHES[number % len(_DASHES)] if len(some) > 1 else "",
                marker="osD^vP"[number % 6],
                markersize=4,
                linewidth=1,
                capsize=2,
                label=series,
            )
        for number, point in enumerate(sorted(points, key=lambda point: point.x)):
            # Neighbours have their names on four sides.
            beside, side = ((4, "left"), (-4, "right"))[number // 2 % 2]
            pen.axes.annotate(
                point.name,
                (point.x, point.y),
                xytext=(beside, 5 if number % 2 else -11),
                textcoords="offset points",
                ha=side,
                fontsize=7,
            )
        pen.axes.set_xscale("log")
        # Plain numbers: the usual powers of ten are formulas, which these charts do not read.
        pen.axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        pen.axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        pen.axes.xaxis.set_minor_formatter(NullFormatter())
        pen.axes.set_title(title, loc="left", fontsize=10)
        pen.axes.set_xlabel(across)
        pen.axes.set_ylabel(up)
        pen.axes.legend(fontsize=8)

    return _svg(draw, (7.0, 4.2), dark=False)
