"""The figure of a page: an SVG that can be read on a light and on a dark ground. Used by `benchmarks.claims`."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from setclip.files import replacing

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "claims",  # the same figure is the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "legend.frameon": False,
}
_MARKERS = "os^vDPX*<>hp"
_COLOURS = 10
"""That matplotlib has before they begin anew"""


def write_figure(path: Path, plot: Mapping[str, Any]) -> None:
    """Writes the figure of a page's "plot" (`experiment.Plot` as JSON)."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        series = plot["series"]
        if plot["is_bars"]:
            for number, points in enumerate(series.values()):
                for _, y, deviation in points:
                    axes.errorbar(y, number, xerr=deviation, fmt="o", color="C0", capsize=3)
            axes.set_yticks(range(len(series)), list(series))
            axes.invert_yaxis()
            axes.set_xlabel(plot["y_label"])
        else:
            for number, (name, points) in enumerate(series.items()):
                xs, ys = [point[0] for point in points], [point[1] for point in points]
                look = {
                    "marker": _MARKERS[number % len(_MARKERS)],
                    "ls": "-" if number < _COLOURS else "--",
                    "ms": 4,
                    "lw": 1.3,
                }
                if len(points[0]) > 2:
                    spread = [point[2] for point in points]
                    axes.errorbar(xs, ys, yerr=spread, capsize=2, label=name, **look)
                else:
                    axes.plot(xs, ys, label=name, **look)
            if plot["log_x"]:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel(plot["x_label"])
            axes.set_ylabel(plot["y_label"])
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_title(plot["title"], fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    with replacing(path) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")
