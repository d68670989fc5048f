"""What a report draws of classes: groups by frequency, best and worst ones, confusions, and the sweep of a linear probe.

Each from results files alone; a part that the results hold nothing for is left out. Used by eval_suite.report.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from scipy.stats import spearmanr

from eval_suite import report_sections as sections
from eval_suite.report_data import Entry, Group, Pictures
from eval_suite.results import Metric, Results
from setclip import plots, report
from setclip.objects import GROUPS

MAX_CLASSES_IN_MATRIX = 40
_FEWER_CLASSES = 24  # of a data set with more classes than fit
NUM_CLASSES_LISTED = 12
NUM_CONFUSIONS = 12
NUM_EXAMPLES = 3


def groups_of_classes(group: Group) -> list[Markup]:
    """Head, middle and tail as bars, and accuracy against frequency where the counts are known."""
    shown = group.entries[: sections.MAX_SERIES]
    names = [name for name in (*GROUPS, "unseen") if all(f"top1_{name}" in e.results.metrics for e in shown)]
    blocks = []
    if names:
        bars = {e.name: [_bar(e.results.metrics[f"top1_{name}"]) for name in names] for e in shown}
        first = shown[0].results.metrics
        labels = [f"{name}\n{first[f'top1_{name}'].samples:,} pictures" for name in names]
        told = "; ".join(
            f"{model}: " + ", ".join(f"{name} {bar.value:.1f}" for name, bar in zip(names, of_model, strict=True))
            for model, of_model in bars.items()
        )
        alt = f"Top-1 in percent by how often the training captions name a class. {told}"
        drawn = plots.grouped_bars(labels, bars, "top-1 (%)", alt, first[f"top1_{names[0]}"].chance)
        text = "Head: the most frequent 20 % of objects; tail: the rarest 30 %. Lines are 95 % intervals."
        text += (
            f" The first {sections.MAX_SERIES} models are shown." if len(group.entries) > sections.MAX_SERIES else ""
        )
        blocks.append(report.figure(drawn, "Accuracy by frequency", text))
    blocks += [
        _by_frequency(entry, counted, len(group.entries) > 1)
        for entry in shown
        if len(counted := [c for c in classes_of(entry.results) if isinstance(c.get("count"), int)]) > 1
    ]
    return [report.row(*blocks)] if blocks else []


def _by_frequency(entry: Entry, counted: Sequence[Mapping[str, Any]], several: bool) -> Markup:
    counts = [c["count"] for c in counted]
    accuracies = [_accuracy(c) for c in counted]
    rho = float(spearmanr(counts, accuracies).statistic) if len(set(counts)) > 1 and len(set(accuracies)) > 1 else 0.0
    top1 = entry.results.metrics.get("top1")
    alt = (
        f"Top-1 accuracy of {len(counted):,} classes against how often the training captions name them, from "
        f"{min(counts):,} to {max(counts):,} times; rank correlation {rho:.2f}."
    )
    groups = [str(c.get("group") or "class") for c in counted]
    order = [*GROUPS, "unseen"]
    ranked = sorted(
        range(len(counted)), key=lambda row: order.index(groups[row]) if groups[row] in order else len(order)
    )
    counts, accuracies = [counts[row] for row in ranked], [accuracies[row] for row in ranked]
    groups = [groups[row] for row in ranked]
    drawn = plots.accuracy_by_frequency(counts, accuracies, groups, alt, top1.chance if top1 else None)
    title = "Accuracy against frequency" + (f": {entry.name}" if several else "")
    text = f"A point a class. Spearman's rank correlation of accuracy and count is {rho:.2f} over {len(counted):,} classes."
    return report.figure(drawn, title, text)


def classes(group: Group) -> list[Markup]:
    """How accuracy spreads over classes, and the worst and best ones of the first model beside those of the others."""
    listed = {e.name: [c for c in classes_of(e.results) if c["images"]] for e in group.entries}
    listed = {name: found for name, found in listed.items() if found}
    if not listed:
        return []
    shown, own = next(iter(listed.items()))
    by_model = {name: {c["name"]: c for c in found} for name, found in list(listed.items())[: sections.MAX_SERIES + 1]}
    # of classes with equal accuracy the surest and the most frequent first: their failure says most
    ordered = sorted(own, key=lambda c: (_accuracy(c), -c["images"], -(c.get("count") or 0), c["name"]))
    number = min(NUM_CLASSES_LISTED, len(own) // 2)
    worst, best = ordered[:number], sorted(ordered[-number:], key=lambda c: (-_accuracy(c), c["name"]))
    made = [
        _classes_table(title, chosen, by_model, own) for title, chosen in (("Worst", worst), ("Best", best)) if chosen
    ]
    spread = [_spread(name, found) for name, found in list(listed.items())[: sections.MAX_SERIES] if len(found) >= 10]
    if len(by_model) > 1:
        others = report.paragraph(f"In the order of {shown}.")
        return [*([report.row(*spread)] if spread else []), others, report.row(*made)]
    return [report.row(*spread, *made)]


def _classes_table(
    title: str,
    chosen: Sequence[Mapping[str, Any]],
    by_model: Mapping[str, Mapping[str, Mapping[str, Any]]],
    own: Sequence[Mapping[str, Any]],
) -> Markup:
    rows: list[list[str | Markup]] = []
    for c in chosen:
        note = f" ({c['group']})" if c.get("group") else ""
        cells = [_class_cell(of_model.get(c["name"])) for of_model in by_model.values()]
        rows.append([f"{c['name']}{note}", *cells, f"{c['images']:,}"])
    edge = _accuracy(chosen[0])
    alike = sum(_accuracy(c) == edge for c in own)
    more = f" ({alike:,} have {sections.percent(edge, '%')})" if alike > len(chosen) else ""
    header = ["", *(by_model if len(by_model) > 1 else ["top-1"]), "pictures"]
    return report.table(report.Table(f"{title} classes{more}", header, rows))


def _spread(name: str, found: Sequence[Mapping[str, Any]]) -> Markup:
    edges = [10.0 * step for step in range(11)]
    counts = [0] * 10
    for c in found:
        counts[min(9, int(_accuracy(c) // 10))] += 1
    alt = f"{name}: classes by top-1 accuracy in steps of 10 %: " + ", ".join(
        f"{low:.0f} to {low + 10:.0f} %: {count}" for low, count in zip(edges, counts, strict=False)
    )
    drawn = plots.histogram(counts, edges, "top-1 of a class (%)", "classes", alt)
    return report.figure(drawn, f"How accuracy spreads: {name}", f"{len(found):,} classes with pictures.")


def confusions(group: Group, pictures: Mapping[str, Pictures]) -> list[Markup]:
    """What the first model that says so confuses: a matrix, and the most frequent pairs with pictures."""
    shown = next((entry for entry in group.entries if entry.results.details.get("confusions")), None)
    if shown is None:
        return []
    found = sorted(shown.results.details["confusions"], key=lambda c: -c["count"])
    by_name = {c["name"]: c for c in classes_of(shown.results)}
    blocks: list[Markup] = []
    if len(group.entries) > 1:
        blocks.append(report.paragraph(f"Of {shown.name}."))
    matrix = _matrix(found, by_name)
    if matrix is not None:
        blocks.append(matrix)
    cards = []
    for c in found[:NUM_CONFUSIONS]:
        images = by_name.get(c["true"], {}).get("images")
        text = (
            f"{c['count']:,}" + (f" of {images:,}" if images else "") + (" picture" if c["count"] == 1 else " pictures")
        )
        some = [
            pictures[shown.name].find(str(name), f"{c['true']}, taken for {c['predicted']}")
            for name in c.get("examples", ())[:NUM_EXAMPLES]
        ]
        cards.append(report.PictureGroup(f"{c['true']} → {c['predicted']}", text, some))
    blocks.append(report.subtitle("Most frequent confusions"))
    blocks.append(report.paragraph("Right class → predicted class."))
    blocks.append(report.picture_groups(cards))
    if note := pictures[shown.name].note():
        blocks.append(report.paragraph(note))
    return blocks


def _matrix(found: Sequence[Mapping[str, Any]], by_name: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    if not by_name:
        return None
    if len(by_name) <= MAX_CLASSES_IN_MATRIX:
        chosen = list(by_name)
        text = "All classes."
    else:
        # pair after pair, so that classes that are confused stand together
        ranked = dict.fromkeys(name for c in found for name in (c["true"], c["predicted"]) if name in by_name)
        chosen = list(ranked)[:_FEWER_CLASSES]
        text = f"The {len(chosen):,} classes of the most frequent confusions, of {len(by_name):,}."
    if len(chosen) < 2:
        return None
    places = {name: place for place, name in enumerate(chosen)}
    shares: dict[tuple[int, int], float] = {}
    for name, place in places.items():
        if by_name[name]["correct"]:
            shares[place, place] = by_name[name]["correct"] / by_name[name]["images"]
    for c in found:
        if c["true"] in places and c["predicted"] in places:
            shares[places[c["true"]], places[c["predicted"]]] = c["count"] / by_name[c["true"]]["images"]
    worst = [f"{c['true']} as {c['predicted']} {c['count']}" for c in found[:5]]
    alt = (
        f"Confusion matrix of {len(chosen)} classes, rows right, columns predicted. Most frequent: {', '.join(worst)}."
    )
    pixels = round(96 * plots.matrix_inches(len(chosen)))
    listed = sum(c["count"] for c in found)
    wrong = sum(c["images"] - c["correct"] for c in by_name.values())
    rest = f" The results list {listed:,} of {wrong:,} wrong answers; the rest is not drawn." if listed < wrong else ""
    text += f" A cell is as dark as its share of the row's pictures; the diagonal is right.{rest}"
    drawn = plots.confusion_matrix(chosen, shares, alt)
    return report.figure(drawn, "Confusion matrix", text, (min(pixels, 640), round(1.15 * pixels)))


def classes_of(results: Results) -> list[dict[str, Any]]:
    """Returns name, images and correct (with group and count where known) of each class; empty where not told."""
    found = results.details.get("classes")
    return found if isinstance(found, list) else []


def _accuracy(entry: Mapping[str, Any]) -> float:
    return 100.0 * entry["correct"] / entry["images"] if entry["images"] else 0.0


def _class_cell(entry: Mapping[str, Any] | None) -> str:
    return "–" if entry is None or not entry["images"] else sections.percent(_accuracy(entry), "%")


# --- linear probe


def sweep(group: Group) -> list[Markup]:
    """Accuracy on the validation part over the penalty, as a linear probe tried it."""
    lines, told = [], []
    for entry in group.entries[: sections.MAX_SERIES]:
        points = entry.results.details.get("sweep")
        if isinstance(points, list) and len(points) > 1:
            lines.append(plots.Curve(entry.name, [p["c"] for p in points], [p["top1"] for p in points]))
            told.append(f"{entry.name}: C = {entry.results.details.get('c', float('nan')):.3g} was taken")
    if not lines:
        return []
    ends = [
        f"{c.name} from {min(c.ys):.1f} to {max(c.ys):.1f}, best at {c.xs[c.ys.index(max(c.ys))]:.3g}" for c in lines
    ]
    alt = f"Top-1 in percent on the validation part over C. {'; '.join(ends)}"
    drawn = plots.curves(lines, "C (inverse of the penalty)", "top-1 (%)", alt, log_x=True)
    chosen_by = next(
        (e.results.details.get("chosen_by") for e in group.entries if e.results.details.get("chosen_by")), ""
    )
    text = f"{'; '.join(told)}{f', by {chosen_by}' if chosen_by else ''}."
    return [report.figure(drawn, "Choice of the penalty", text, (280, 640))]


def _bar(metric: Metric) -> plots.Bar:
    return plots.Bar(metric.value, metric.interval_95)
