"""The parts of a report of evaluations, each from results files alone. Used by eval_suite.report, which puts them together.

Tables, comparison, retrieved pictures and settings; what is drawn of classes is in eval_suite.report_classes. A part that
the results hold nothing for is left out.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from markupsafe import Markup

from eval_suite.per_query import load_per_query
from eval_suite.protocols import PROTOCOLS
from eval_suite.report_data import Entry, Group, Pictures, per_query_of
from eval_suite.results import Metric, by_protocol, protocol_words, split_protocol
from eval_suite.significance import Difference, differences
from setclip import report
from setclip.errors import InputError
from setclip.log import duration
from setclip.metric_text import interval_text, metric_words, number_text

MAX_SERIES = 3  # colours and hatches of a plot

EVALUATIONS = {"zeroshot": "Zero-shot classification", "retrieval": "Retrieval", "linear_probe": "Linear probe"}
"""Evaluations in words; another is shown by its name."""


def evaluation_words(evaluation: str) -> str:
    """Returns an evaluation's name in words."""
    return EVALUATIONS.get(evaluation, evaluation.replace("_", " ").capitalize())


def title_of(group: Group) -> str:
    """Returns "Retrieval: coco test"."""
    return f"{evaluation_words(group.evaluation)}: {place_of(group)}"


def place_of(group: Group) -> str:
    """Returns the data set with its split."""
    return f"{group.dataset} {group.split}".strip()


def percent(value: float, unit: str) -> str:
    """Returns a value with the sign of its unit where that is short."""
    return number_text(value, unit) + ("\N{NO-BREAK SPACE}%" if unit == "%" else "")


def main_metrics(group: Group, number: int = 2) -> list[str]:
    """Returns the names of the metrics that stand for a group: recall at 1 both ways, or accuracy and that of the tail."""
    wanted = ("i2t_r1", "t2i_r1") if group.evaluation == "retrieval" else ()
    headline = list(dict.fromkeys(name for entry in group.entries for name in entry.results.headline))
    first = [*wanted, *headline[:1], "top1_tail", *headline[1:]]
    known = [name for name in dict.fromkeys(first) if _of(group, name)]
    return known[:number]


def metric_title(name: str) -> str:
    """Returns a metric's name in words, without unit, its protocol behind it."""
    protocol, measure = split_protocol(name)
    words = metric_words(measure, "")
    return f"{words} ({protocol_words(protocol)})" if protocol else words


# --- numbers


def tables(group: Group) -> list[Markup]:
    """One table for each protocol: all metrics with intervals, chance and counts; below, how each comes about."""
    names = _all_metrics(group)
    blocks = []
    for protocol, of_protocol in by_protocol(names).items():
        rows: list[list[str | Markup]] = []
        for name in of_protocol:
            first = _first(group, name)
            row: list[str | Markup] = [_row_name(name, first)]
            row += [_cell(entry.results.metrics.get(name)) for entry in group.entries]
            rows.append([*row, number_text(first.chance, first.unit), _samples(group, name)])
        words = protocol_words(protocol, [entry.results for entry in group.entries])
        title = place_of(group) + (f", {words}" if words else "")
        header = ["", *_with_marks(group), "chance", "of"]
        if sentence := _sentence(group, protocol):
            blocks.append(report.paragraph(sentence))
        blocks.append(report.table(report.Table(title, header, rows)))
    meaning: list[list[str | Markup]] = [_meaning(group, name) for name in names]
    how = report.table(
        report.Table("Protocols", ["", "protocol", "95 % interval", "equal scores"], meaning, "wide-words")
    )
    return [
        *blocks,
        report.paragraph(
            "In brackets, the 95 % interval. Chance is what a random order or guess is expected to give; “of” is how many "
            f"queries, images or classes a value is a mean or median over. {_ties(group)}"
        ),
        report.unfolding("How each number comes about", how),
    ]


def _sentence(group: Group, prefix: str) -> str:
    """Returns what a retrieval's results say of the protocol with this prefix; empty where they say nothing."""
    told = group.entries[0].results.details.get("protocols")
    names = [name for name, protocol in PROTOCOLS.items() if protocol.prefix.removesuffix("_") == prefix]
    return next((str(told[name]) for name in names if name in told), "") if isinstance(told, dict) else ""


def _meaning(group: Group, name: str) -> list[str | Markup]:
    first = _first(group, name)
    told = {
        entry.name: _variants(metric)
        for entry in group.entries
        if (metric := entry.results.metrics.get(name)) and metric.tie_variants
    }
    if len(set(told.values())) == 1:
        variants = next(iter(told.values()))
    else:
        variants = "; ".join(f"{model}: {text}" for model, text in told.items())
    protocol = split_protocol(name)[0]
    title = _row_name(name, first) + (f" ({protocol_words(protocol)})" if protocol else "")
    return [title, first.protocol, first.interval_method or "none", variants or "–"]


def _variants(metric: Metric) -> str:
    others = {rule: value for rule, value in metric.tie_variants.items() if value != metric.value}
    if not others:
        return "the same under each rule"
    return ", ".join(f"{rule.replace('_', ' ')} {number_text(value, metric.unit)}" for rule, value in others.items())


def tie_span(group: Group) -> float:
    """Returns by how much the rule for equal scores can change a percentage of a group, at most."""
    metrics = [m for entry in group.entries for m in entry.results.metrics.values() if m.unit == "%"]
    return max((abs(value - m.value) for m in metrics for value in m.tie_variants.values()), default=0.0)


def _ties(group: Group) -> str:
    if not any(m.tie_variants for entry in group.entries for m in entry.results.metrics.values()):
        return ""
    span = tie_span(group)
    if span == 0:
        return "Equal scores change nothing here: the percentages are the same under every rule for them."
    return f"The rule for equal scores changes a percentage by {number_text(span, '%')} at most."


# --- comparison


def comparison(group: Group, draws: int) -> list[Markup]:
    """Each further model against the first: paired where the files of queries are there, else by intervals only."""
    base, *others = group.entries
    blocks = []
    for other in others:
        paired, why_not = paired_differences(base, other, draws)
        rows = []
        for name in _all_metrics(group) if paired else _headline(group):
            a, b = base.results.metrics.get(name), other.results.metrics.get(name)
            if a is not None and b is not None:
                rows.append(_comparison_row(name, a, b, paired))
        header = ["", base.name, other.name, "difference", "p" if paired else "95 % intervals"]
        blocks.append(report.table(report.Table(f"{other.name} against {base.name}", header, rows)))
        if paired:
            images = max(difference.images for difference in paired.values())
            blocks.append(
                report.paragraph(
                    f"Paired over {images:,} images: in brackets, the 95 % interval of the difference (bootstrap); p of a "
                    f"two-sided sign-flip test; {draws:,} draws each. p is not corrected for the number of metrics. Where "
                    "there is no pairing, it says whether the models' own intervals overlap."
                )
            )
        else:
            blocks.append(
                report.paragraph(
                    f"Intervals only: {why_not} Each model's 95 % interval is for itself: where two are apart, the models "
                    "differ on these samples; where they overlap, they still may."
                )
            )
    return [*blocks, report.paragraph("All this counts the samples of the test, not the seeds of training.")]


def paired_differences(base: Entry, other: Entry, draws: int) -> tuple[dict[str, Difference], str]:
    """Returns (differences by metric, why there are none): paired over images, from the files of queries."""
    places = [per_query_of(entry) for entry in (base, other)]
    if without := [place.name for place in places if not place.is_file()]:
        return {}, f"no {' and '.join(without)} beside the results."
    try:
        found = differences(load_per_query(places[0]), load_per_query(places[1]), draws)
    except InputError as error:
        return {}, f"the files of queries cannot be paired ({error})."
    return {difference.metric: difference for difference in found}, ""


def _comparison_row(name: str, a: Metric, b: Metric, paired: Mapping[str, Difference]) -> list[str | Markup]:
    protocol, _ = split_protocol(name)
    title = _row_name(name, a) + (f" ({protocol_words(protocol)})" if protocol else "")
    values: list[str | Markup] = [number_text(metric.value, metric.unit) for metric in (a, b)]
    difference = _signed(b.value - a.value, a.unit)
    if name not in paired:
        return [title, *values, difference, f"intervals {_verdict(a, b)}" if paired else _verdict(a, b)]
    found = paired[name]
    p = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    if found.interval_95 is None:
        return [title, *values, difference, p]
    ends = ", ".join(_signed(end, found.unit) for end in found.interval_95)
    return [title, *values, Markup("{} <small>[{}]</small>").format(difference, ends), p]


def _verdict(a: Metric, b: Metric) -> str:
    if a.interval_95 is None or b.interval_95 is None:
        return "no interval"
    apart = a.interval_95[0] > b.interval_95[1] or b.interval_95[0] > a.interval_95[1]
    return "apart" if apart else "overlap"


def _signed(value: float, unit: str) -> str:
    text = number_text(abs(value), unit)
    return f"{'−' if value < 0 else '+'}{text}" if value else text


# --- retrieved pictures


def retrieved(group: Group, pictures: Mapping[str, Pictures], number: int) -> list[Markup]:
    """Queries of both directions with their best answers, and the worst failures, of the first model with a gallery."""
    shown = next((entry for entry in group.entries if entry.gallery and "t2i" in entry.gallery), None)
    if shown is None or shown.gallery is None:
        return []
    found = pictures[shown.name]
    parts = [
        ("Captions look for pictures", "t2i", "chosen"),
        ("Pictures look for captions", "i2t", "chosen"),
        ("Worst failures: captions", "t2i", "worst"),
        ("Worst failures: pictures", "i2t", "worst"),
    ]
    blocks: list[Markup] = []
    for title, direction, which in parts:
        queries = [
            _query(entry, direction, group, found, note)
            for entry, note in _chosen(group, shown, direction, which, number)
        ]
        if queries:
            blocks += [report.subtitle(title), report.gallery(queries)]
    note = found.note()
    intro = (
        f"Ranked by {shown.name}. The queries are spread evenly over the data, not picked; the worst failures are those "
        f"whose right answer stands lowest. Right answers are marked{_what_is_right(shown)}. Another answer may fit as well "
        "and still counts as wrong."
    )
    return [report.paragraph(f"{intro} {note}".strip()), *blocks]


def _what_is_right(shown: Entry) -> str:
    """Returns, in brackets, what the protocol takes for right; galleries of earlier versions do not say."""
    what = (shown.gallery or {}).get("right")
    return f" ({str(what).rstrip('.')})" if what else ""


def _chosen(
    group: Group, shown: Entry, direction: str, which: str, number: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields queries with a note: the rank of the right answer, and that of other models where known."""
    assert shown.gallery is not None
    entries = shown.gallery[direction][which]
    if which == "chosen" and len(entries) > number:
        entries = [entries[place * len(entries) // number] for place in range(number)]
    dataset = shown.results.dataset
    total = dataset.get("images" if direction == "t2i" else "captions")
    others = {
        entry.name: {_query_id(q): q["rank"] for part in entry.gallery[direction].values() for q in part}
        for entry in group.entries
        if entry is not shown and entry.gallery and direction in entry.gallery
    }
    for query in entries[:number]:
        told = [f"{name}: {ranks[_query_id(query)]:,}" for name, ranks in others.items() if _query_id(query) in ranks]
        right = "right picture" if direction == "t2i" else "right caption"
        note = f"{right} at rank {query['rank']:,}" + (f" of {total:,}" if isinstance(total, int) else "")
        yield query, note + (f" ({', '.join(told)})" if told else "")


def _query_id(query: Mapping[str, Any]) -> str:
    return json.dumps([query["query"].get("key"), query["query"].get("caption")])


def _query(entry: Mapping[str, Any], direction: str, group: Group, pictures: Pictures, note: str) -> report.Query:
    query = entry["query"]
    is_found = any(answer["is_right"] for answer in entry["answers"])
    if direction == "t2i":
        answers = [
            report.Answer(a["is_right"], a["score"], pictures.find(a["key"], f"answer {place}"))
            for place, a in enumerate(entry["answers"], 1)
        ]
        right = pictures.find(query["key"], "right picture")
        wanted = None if is_found else report.Answer(True, 0.0, right, "← the right picture")
        return report.Query(f"“{query['caption']}”", note, answers, wanted=wanted)
    answers = [report.Answer(a["is_right"], a["score"], text=a["caption"]) for a in entry["answers"]]
    own = f"“{query['captions'][0]}”"
    picture = pictures.find(query["key"], f"query picture, captioned: {query['captions'][0]}")
    wanted = None if is_found else report.Answer(True, 0.0, text=f"Right caption: {own}")
    return report.Query("Best captions", note, answers, picture, wanted)


# --- settings


def settings(group: Group) -> list[Markup]:
    """What was evaluated, with what, and from which commit; one column a model."""
    columns = [_settings(entry) for entry in group.entries]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows: list[list[str | Markup]] = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    kind: Literal["words", "wide-words"] = "words" if len(columns) == 1 else "wide-words"
    return [report.table(report.Table(place_of(group), ["", *group.names], rows, kind))]


def _settings(entry: Entry) -> dict[str, str]:
    results, checkpoint = entry.results, entry.results.checkpoint
    provenance = results.provenance
    data = checkpoint.get("data") if isinstance(checkpoint.get("data"), dict) else {}
    pairs = results.training_pairs
    found = {
        "model": ", ".join(str(checkpoint[key]) for key in ("where", "model") if checkpoint.get(key)),
        "recipe": checkpoint.get("recipe"),
        "training": _words({k: checkpoint.get(k) for k in ("step", "samples_seen", "epoch")}),
        "loss": _words(checkpoint["loss"]) if isinstance(checkpoint.get("loss"), dict) else checkpoint.get("loss"),
        "training data": data.get("source") if isinstance(data, dict) else None,
        "training pairs": f"{pairs['present']:,} of {pairs['listed']:,} listed" if pairs else None,
        "trained with commit": (checkpoint.get("provenance") or {}).get("commit"),
        "data": _words({k: v for k, v in results.dataset.items() if k not in ("prompts", "name", "split")}),
        "prompts": _prompts(results.dataset.get("prompts")),
        "partial": "yes: samples that the protocol asks for were missing" if results.is_partial else None,
        "configuration": _words(results.config),
        "evaluated with commit": provenance.get("commit"),
        "versions": ", ".join(
            [
                f"Setclip {provenance.get('setclip', '?')}",
                *(f"{k} {v}" for k, v in provenance.get("versions", {}).items()),
            ]
        ),
        "evaluated": results.created,
        "took": duration(results.seconds) if results.seconds is not None else None,
        "results file": str(entry.path),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _words(values: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)

    return ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in values.items() if value is not None)


def _prompts(prompts: Any) -> str | None:
    if not isinstance(prompts, list) or not prompts:
        return None
    first = "; ".join(f"“{prompt}”" for prompt in prompts[:5])
    return f"{len(prompts):,}: {first}" + ("; …" if len(prompts) > 5 else "")


# --- what several parts need


def _all_metrics(group: Group) -> list[str]:
    """Returns the names of all metrics: the headline ones first, those of further protocols in their own order."""
    everything = [name for e in group.entries for name in e.results.metrics]
    first = [name for name in _headline(group) if not split_protocol(name)[0]]
    return list(dict.fromkeys([*first, *everything]))


def _headline(group: Group) -> list[str]:
    return [n for n in dict.fromkeys(name for e in group.entries for name in e.results.headline) if _of(group, n)]


def _of(group: Group, name: str) -> list[Metric]:
    return [entry.results.metrics[name] for entry in group.entries if name in entry.results.metrics]


def _first(group: Group, name: str) -> Metric:
    return _of(group, name)[0]


def _row_name(name: str, metric: Metric) -> str:
    return metric_words(split_protocol(name)[1], metric.unit) + (" ↓" if metric.unit == "rank" else "")


def _cell(metric: Metric | None) -> str | Markup:
    if metric is None:
        return "–"
    value = number_text(metric.value, metric.unit)
    if metric.interval_95 is None:
        return value
    return Markup("{} <small>[{}]</small>").format(value, interval_text(metric.interval_95, metric.unit))


def _samples(group: Group, name: str) -> str:
    found = list(dict.fromkeys(f"{metric.samples:,}" for metric in _of(group, name)))
    return " / ".join(found)


def _with_marks(group: Group) -> list[str]:
    return [entry.name + (" (partial)" if entry.results.is_partial else "") for entry in group.entries]


def with_chance(metric: Metric) -> str:
    """Returns a value with interval and chance, for a sentence."""
    text = percent(metric.value, metric.unit)
    text += f" [{interval_text(metric.interval_95, metric.unit)}]" if metric.interval_95 else ""
    return text + (f" (chance {percent(metric.chance, metric.unit)})" if metric.chance is not None else "")
