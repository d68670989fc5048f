"""The numbers and names of metrics as text. Used by the tables of eval_suite and by the reports of evaluations and the demo."""

import re

_WORDS = {
    "i2t_medr": "picture → caption, median rank",
    "t2i_medr": "caption → picture, median rank",
    "rsum": "sum of the six recalls",
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
}
_DIRECTIONS = {"i2t": "picture → caption", "t2i": "caption → picture"}
_MEASURES = {"map_at_r": "mAP@R", "r_precision": "R-precision", "rprecision": "R-precision", "rp": "R-precision"}


def number_text(value: float | None, unit: str) -> str:
    """Returns a value with the digits that its unit deserves; a dash for None."""
    if value is None:
        return "–"
    if unit == "rank":
        return f"{value:,.0f}"
    return f"{value:.2f}" if 0 < abs(value) < 1 else f"{value:.1f}"


def interval_text(interval: tuple[float, float], unit: str, between: str = ", ") -> str:
    """Returns both ends of an interval."""
    return between.join(number_text(end, unit) for end in interval)


def with_interval(value: float, unit: str, interval: tuple[float, float] | None) -> str:
    """Returns "45.2 [43.1, 47.3]", or the value alone where there is no interval."""
    text = number_text(value, unit)
    return text if interval is None else f"{text} [{interval_text(interval, unit)}]"


def metric_words(name: str, unit: str) -> str:
    """Returns the name of a metric as a reader says it: "i2t_r5" is "picture → caption, R@5, %"."""
    percent = ", %" if unit == "%" else ""
    if name in _WORDS:
        return _WORDS[name] + percent
    direction, _, rest = name.partition("_")
    if direction in _DIRECTIONS:
        recall = re.fullmatch(r"r(\d+)", rest)
        measure = f"R@{recall[1]}" if recall else _MEASURES.get(rest, rest.replace("_", " "))
        return f"{_DIRECTIONS[direction]}, {measure}{percent}"
    return f"{name.replace('top1_', 'top-1, ').replace('top5_', 'top-5, ').replace('_', ' ')}{percent}"
