"""Figures as inline SVG that follow the page's colours, light or dark. Used by reports.

Matplotlib draws with stand-in colours, which become CSS variables of the page (setclip/templates/page.html); text stays
text, so it takes the page's font and can be read aloud and searched.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

_INK, _GRID, _CHANCE, _HEAD, _TAIL = "#010101", "#020202", "#030303", "#040404", "#050505"
_SERIES = ("#060606", "#070707", "#080808")
_CSS = {
    _INK: "var(--soft)",
    _GRID: "var(--line)",
    _CHANCE: "var(--chance)",
    _HEAD: "var(--head)",
    _TAIL: "var(--tail)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)},
}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^")
_HATCHES = ("", "///", "...")  # told apart without colour, too
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


def curves(lines: Sequence[Curve], x_label: str, y_label: str, alt: str, chance: float | None = None) -> Markup:
    """Lines over a common axis from zero, with chance dashed where it is given."""
    with _drawing(alt) as (figure, axes):
        for line, color, dash, marker in zip(lines, _SERIES, _DASHES, _MARKERS, strict=False):
            few = len(line.xs) <= 12
            axes.plot(
                line.xs, line.ys, color=color, ls=dash, lw=2.2, marker=marker if few else "", ms=5, label=line.name
            )
        if chance is not None:
            axes.axhline(chance, color=_CHANCE, lw=1.4, ls=":", label="chance")
        axes.set_xlim(left=0)
        if chance is not None:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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


class _drawing:
    """A figure under the style of reports, for a `with` block; equal input gives equal bytes."""

    def __init__(self, alt: str, height: float = 3.1):
        self._context = matplotlib.rc_context({**_STYLE, "svg.hashsalt": alt})
        self._height = height

    def __enter__(self) -> tuple[Figure, Axes]:
        self._context.__enter__()
        figure = Figure(figsize=(4.7, self._height), layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *exception) -> None:
        self._context.__exit__(*exception)


def _legend(axes: Axes) -> None:
    axes.legend(
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
