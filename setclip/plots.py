"""Figures as inline SVG that follow the page's colours, light or dark. Used by reports.

Matplotlib draws with stand-in colours, which become CSS variables of the page (setclip/templates/page.html); text stays
text, so it takes the page's font and can be read aloud and searched.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_INK, _GRID, _CHANCE, _HEAD, _TAIL = "#010101", "#020202", "#030303", "#040404", "#050505"
_SERIES = ("#060606", "#070707", "#080808")
_MORE_SERIES = ("#0b0b0b", "#0c0c0c", "#0d0d0d")  # where more than three lines are compared
_CARD, _STRONG = "#090909", "#0a0a0a"
_CSS = {
    _INK: "var(--soft)",
    _GRID: "var(--line)",
    _CHANCE: "var(--chance)",
    _HEAD: "var(--head)",
    _TAIL: "var(--tail)",
    _CARD: "var(--card)",
    _STRONG: "var(--ink)",
    **{color: f"var(--series-{number})" for number, color in enumerate((*_SERIES, *_MORE_SERIES), 1)},
}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^")
_HATCHES = ("", "///", "...")  # told apart without colour, too
MOST_TIMELINES = 6
"""Lines of one figure of `timelines`."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Curve:
    """A named line."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """A value with its 95 % interval."""

    value: float
    interval: tuple[float, float] | None = None


def curves(
    lines: Sequence[Curve],
    x_label: str,
    y_label: str,
    alt: str,
    chance: float | None = None,
    log_x: bool = False,
) -> Markup:
    """Lines over a common axis from zero, or a logarithmic one, with chance dashed where it is given."""
    with _drawing(alt) as (figure, axes):
        for line, color, dash, marker in zip(lines, _SERIES, _DASHES, _MARKERS, strict=False):
            few = len(line.xs) <= 12
            axes.plot(
                line.xs, line.ys, color=color, ls=dash, lw=2.2, marker=marker if few else "", ms=5, label=line.name
            )
        if chance is not None:
            axes.axhline(chance, color=_CHANCE, lw=1.4, ls=":", label="chance")
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if chance is not None:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(axes)
        return _svg(figure, alt)


@dataclass(frozen=True)
class Timeline:
    """A named line over the steps of a run; `lows` and `highs` are the span of what a point stands for."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float] | None = None
    highs: Sequence[float] | None = None
    tone: str = "series-1"
    """"series-1" to "series-6", "head", "tail" or "soft"."""


def timelines(
    lines: Sequence[Timeline],
    y_label: str,
    alt: str,
    log_y: bool = False,
    from_zero: bool = False,
    level: tuple[str, float] | None = None,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> Markup:
    """Lines over steps, each with its span shaded, and up to two kinds of marks (name to steps) as thin upright lines.

    `level`: a named horizontal line. More than MOST_TIMELINES lines cannot be told apart.
    """
    assert len(lines) <= MOST_TIMELINES, len(lines)
    colors = {f"series-{number}": color for number, color in enumerate((*_SERIES, *_MORE_SERIES), 1)}
    colors |= {"head": _HEAD, "tail": _TAIL, "soft": _INK}
    with _drawing(alt) as (figure, axes):
        for number, line in enumerate(lines):
            color, dash = colors[line.tone], _DASHES[number % len(_DASHES)]
            if line.lows is not None and line.highs is not None:
                axes.fill_between(line.xs, line.lows, line.highs, color=color, alpha=0.18, lw=0)
            marker = _MARKERS[number % len(_MARKERS)] if len(line.xs) <= 12 else ""
            axes.plot(line.xs, line.ys, color=color, ls=dash, lw=1.8, marker=marker, ms=4.5, label=line.name)
        if level is not None:
            axes.axhline(level[1], color=_CHANCE, lw=1.4, ls=":", label=level[0])
        for (name, steps), dash, color in zip((marks or {}).items(), ("-.", "-"), (_INK, _TAIL), strict=False):
            for number, step in enumerate(steps):
                axes.axvline(step, color=color, lw=0.9, ls=dash, alpha=0.7, label="" if number else name)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        elif max(max(line.ys) for line in lines) >= 10_000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        if len(lines) > 1 or level is not None or marks:
            _legend(axes)
        return _svg(figure, alt)


def grouped_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[Bar]], y_label: str, alt: str, chance: float | None = None
) -> Markup:
    """Bars side by side in each group, with their intervals, and a line for chance."""
    with _drawing(alt) as (figure, axes):
        width = 0.8 / len(series)
        highest = max([0.0, *(max(b.value, (b.interval or (0, 0))[1]) for bars in series.values() for b in bars)])
        for number, (name, bars) in enumerate(series.items()):
            xs = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
            heights = [bar.value for bar in bars]
            axes.bar(
                xs,
                heights,
                width * 0.92,
                color=_SERIES[number],
                hatch=_HATCHES[number],
                edgecolor=_GRID,
                lw=0,
                label=name,
            )
            for x, bar in zip(xs, bars, strict=True):
                low, high = bar.interval or (bar.value, bar.value)
                if bar.interval:
                    axes.plot([x, x], [low, high], color=_INK, lw=1.3, solid_capstyle="butt")
                axes.annotate(
                    f"{bar.value:.1f}", (x, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=10
                )
        if chance is not None:
            axes.axhline(chance, color=_CHANCE, lw=1.4, ls=":", label="chance")
        axes.set_ylim(0, max(highest * 1.3, 1e-9))
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(y_label)
        _legend(axes)
        return _svg(figure, alt)


def histogram(
    counts: Sequence[float],
    edges: Sequence[float],
    x_label: str,
    y_label: str,
    alt: str,
    ticks: Mapping[float, str] | None = None,
) -> Markup:
    """Bars that touch: `counts[i]` lies between `edges[i]` and `edges[i + 1]`. With `ticks` (place to text) the x axis is
    logarithmic, for ratios.
    """
    with _drawing(alt) as (figure, axes):
        widths = [high - low for low, high in itertools.pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=_SERIES[0], edgecolor=_GRID, lw=0.4)
        if ticks is not None:
            axes.set_xscale("log")
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="x", which="minor", length=0)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        # A single value gets a bar, not the whole width.
        around = 0.0 if ticks is not None else max(0.0, 5 - (edges[-1] - edges[0])) / 2
        axes.set_xlim(edges[0] - around, edges[-1] + around)
        axes.set_ylim(0, max([*counts, 1e-9]) * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure, alt)


def rank_frequency(
    names: Sequence[str],
    counts: Sequence[int],
    num_head: int,
    num_tail: int,
    alt: str,
    most_points: int | None = None,
) -> Markup:
    """Counts by rank, both logarithmic, with the head and the tail marked and some objects named.

    With `most_points` a long list is drawn at about that many ranks, evenly spaced on the axis.
    """
    with _drawing(alt, height=3.4) as (figure, axes):
        total = len(names)
        axes.axvspan(0.8, num_head + 0.5, color=_HEAD, alpha=0.14, lw=0)
        axes.axvspan(total - num_tail + 0.5, total * 1.2, color=_TAIL, alpha=0.16, lw=0)
        ranks: Sequence[int] = range(1, total + 1)
        if most_points is not None and total > most_points:
            ranks = sorted({round(total ** (step / (most_points - 1))) for step in range(most_points)})
        axes.plot(ranks, [counts[rank - 1] for rank in ranks], color=_SERIES[0], lw=0, marker="o", ms=3.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.8, total * 1.2)
        axes.set_ylim(max(0.7, min(counts) * 0.6), max(counts) * 2.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        top: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "va": "top", "fontsize": 10.5}
        axes.annotate(f"head: {num_head}", ((0.8 * (num_head + 0.5)) ** 0.5, 0.985), ha="center", color=_HEAD, **top)
        axes.annotate(f"tail: {num_tail}", (total * 1.15, 0.985), ha="right", color=_TAIL, **top)
        for row in sorted({0, num_head // 2, (num_head + total - num_tail) // 2, total - 1}):
            left = row > total // 2
            axes.annotate(
                names[row],
                (row + 1, counts[row]),
                xytext=(-8, -10) if left else (8, 5),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=10,
                arrowprops={"arrowstyle": "-", "color": _INK, "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
            )
        axes.set_xlabel("rank of the object")
        axes.set_ylabel("captions that name it")
        return _svg(figure, alt)


def confusion_matrix(names: Sequence[str], shares: Mapping[tuple[int, int], float], alt: str) -> Markup:
    """Right classes as rows, predicted ones as columns; a cell is as dark as its share (0 to 1) of the row's images.

    `shares` has an entry (row, column) for each cell that is not empty. Right answers, on the diagonal, have another
    colour than confusions; up to 15 classes the percentages stand in the cells.
    """
    side = matrix_inches(len(names))
    with _drawing(alt, side, side) as (figure, axes):
        for (row, column), share in sorted(shares.items()):
            # 8 % of colour is the least that is seen on either ground.
            color = _SERIES[0] if row == column else _SERIES[1]
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=(color, 0.08 + 0.92 * min(1.0, share)), lw=0)
            )
            if len(names) <= 15:
                text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
                axes.text(column, row, f"{100 * share:.0f}", color=_CARD if share > 0.55 else _STRONG, **text)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_aspect("equal")
        short = [name if len(name) <= 22 else f"{name[:21]}…" for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=9)
        axes.set_yticks(range(len(names)), short, fontsize=9)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_xticks([edge - 0.5 for edge in range(len(names) + 1)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(len(names) + 1)], minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(visible=True, which="minor", lw=0.4)
        axes.set_xlabel("predicted")
        axes.set_ylabel("right class")
        return _svg(figure, alt)


def matrix_inches(num_classes: int) -> float:
    """Returns the side of a confusion matrix at which its names can be read, in inches of 96 pixels on a page."""
    return 2.4 + 0.19 * num_classes


def accuracy_by_frequency(
    counts: Sequence[int], accuracies: Sequence[float], groups: Sequence[str], alt: str, chance: float | None = None
) -> Markup:
    """A point a class: accuracy in percent over how often it was named (logarithmic), and means of equal parts.

    `groups`: "head", "middle", "tail" or another name of each class, which colours it. Classes that were never named
    stand at the left, at 0.
    """
    with _drawing(alt, height=3.4) as (figure, axes):
        places = [max(float(count), 0.5) for count in counts]
        colors = {"head": _HEAD, "tail": _TAIL}
        markers = {"head": "^", "tail": "v"}
        for group in dict.fromkeys(groups):
            of_group = [row for row, name in enumerate(groups) if name == group]
            axes.plot(
                [places[row] for row in of_group],
                [accuracies[row] for row in of_group],
                color=colors.get(group, _INK),
                marker=markers.get(group, "o"),
                ms=4,
                lw=0,
                alpha=0.5,
                mew=0,
                label=group,
            )
        order = sorted(range(len(counts)), key=lambda row: places[row])
        num_parts = min(10, len(counts) // 5)
        if num_parts > 1:
            ends = [len(order) * part // num_parts for part in range(num_parts + 1)]
            parts = [order[start:end] for start, end in itertools.pairwise(ends)]
            # the geometric mean is the middle of a logarithmic axis
            middles = [math.exp(sum(math.log(places[row]) for row in part) / len(part)) for part in parts]
            means = [sum(accuracies[row] for row in part) / len(part) for part in parts]
            axes.plot(middles, means, color=_SERIES[0], lw=2.2, marker="o", ms=4, label=f"mean of {num_parts} parts")
        if chance is not None:
            axes.axhline(chance, color=_CHANCE, lw=1.4, ls=":", label="chance")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = min(places) / 1.3, max(places) * 1.3
        # over less than two decades the powers of ten are too few
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0"))
        axes.set_xlim(low, high)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("captions that name it")
        axes.set_ylabel("top-1 (%)")
        for handle in _legend(axes).legend_handles:
            if isinstance(handle, Line2D):
                handle.set(alpha=1, markersize=6)
        return _svg(figure, alt)


def ranked_levels(values: Sequence[float], levels: Mapping[str, float], x_label: str, y_label: str, alt: str) -> Markup:
    """Values in falling order as a filled line, with named horizontal lines (up to three) to read them against.

    The x axis is logarithmic, because the first few of very many are what is looked at.
    """
    with _drawing(alt) as (figure, axes):
        ranks = range(1, len(values) + 1)
        axes.fill_between(ranks, values, color=_SERIES[0], alpha=0.18, lw=0, step="mid")
        axes.step(ranks, values, where="mid", color=_SERIES[0], lw=1.8)
        for (name, level), dash in zip(levels.items(), (":", (0, (5, 2)), "-."), strict=False):
            axes.axhline(level, color=_CHANCE, lw=1.4, ls=dash, label=name)
        axes.set_xscale("log")
        axes.set_xlim(0.9, max(len(values), 2) * 1.1)
        axes.set_ylim(0, max([*values, *levels.values(), 1e-9]) * 1.08)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if levels:
            _legend(axes)
        return _svg(figure, alt)


def heat_rows(values: Sequence[Sequence[float]], names: Sequence[str], x_label: str, alt: str) -> Markup:
    """Rows of many numbers as stripes, the lowest dark and the highest light, with a scale beside."""
    with _drawing(alt, 1.3 + 0.3 * len(names)) as (figure, axes):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(visible=False)
        axes.set_xlabel(x_label)
        return _svg(figure, alt)


def square_matrix(values: Sequence[Sequence[float]], names: Sequence[str], alt: str) -> Markup:
    """Numbers from 0 to 1 between things and themselves: cells that are as dark as they are high, the number in each."""
    side = 1.4 + 0.55 * len(names)
    with _drawing(alt, side, side) as (figure, axes):
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                shade = min(1.0, max(0.0, value))
                axes.add_patch(
                    Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=(_SERIES[0], 0.05 + 0.95 * shade), lw=0)
                )
                color = _CARD if shade > 0.55 else _STRONG
                axes.text(column, row, f"{value:.2f}", color=color, ha="center", va="center", fontsize=10)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        return _svg(figure, alt)


class _drawing:
    """A figure under the style of reports, for a `with` block; equal input gives equal bytes."""

    def __init__(self, alt: str, height: float = 3.1, width: float = 4.7):
        self._context = matplotlib.rc_context({**_STYLE, "svg.hashsalt": alt})
        self._size = (width, height)

    def __enter__(self) -> tuple[Figure, Axes]:
        self._context.__enter__()
        figure = Figure(figsize=self._size, layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *exception) -> None:
        self._context.__exit__(*exception)


def _legend(axes: Axes) -> Legend:
    return axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=10.5, handlelength=1.8, columnspacing=1.0
    )


def _svg(figure: Figure, alt: str) -> Markup:
    """Returns the figure as an <svg> element with a label, its colours those of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referenced else "", svg)
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    svg = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]+pt\"", r"\1", svg)
    svg = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]+pt\"", r"\1", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))
