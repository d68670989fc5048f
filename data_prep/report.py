"""report.html of prepared shards: what is in them, what was left out and why, and samples to look at.

    python -m data_prep.report DIR    # writes DIR/report.html again

Written by `data_prep.merge` and whatever changes shards later. The work is bounded however many shards there are: figures
come from the manifest and objects.parquet, the rest from samples spread evenly over some shards. Equal folders give
equal bytes: no time, no path and nothing drawn at random is in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from markupsafe import Markup
from numpy.typing import NDArray

from data_prep import cards, llm_report
from data_prep.cards import Place
from data_prep.output import REPORT_PAGE
from setclip import plots, report
from setclip.config import command, parse
from setclip.log import say
from setclip.manifest import Manifest, check_shards
from setclip.objects import HEAD_SHARE, OBJECTS_NAME, ObjectTable, num_tail_objects
from setclip.shards import ShardInfo

MOST_SHARDS = 50  # looked into
MOST_SAMPLES = 2_000  # measured

_SHEET = 24  # pictures of all contact sheets together
_SHEET_SPLITS = 6
_OBJECTS_SHOWN = 6  # of the head, and of the tail
_PICTURES_AN_OBJECT = 2
_ENOUGH_TAIL = 500  # tail objects with a picture, among which some are chosen
_MOST_PARSERS = 4
_MOST_ROWS = 30  # of a table
_WORST_INPUTS = 10
_MOST_SPLITS = 4  # among the key figures
_MOST_BARS = 40  # of a histogram
_POINTS = 400  # of the curve of counts
_MOST_CHARACTERS = 300  # of a setting
_ASPECTS = {1 / 4: "1:4", 1 / 2: "1:2", 2 / 3: "2:3", 1: "1:1", 3 / 2: "3:2", 2: "2:1", 4: "4:1"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes report.html of a folder of shards again."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""


@dataclass
class Measured:
    """Sizes of some samples."""

    shards: int = 0
    samples: int = 0
    unreadable: int = 0
    unsized: int = 0
    """Samples whose pictures' sizes are not known."""
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    """Of each caption, cut at spaces."""
    objects: dict[str, list[int]] = field(default_factory=dict)
    """Parser to the number of objects of each caption."""


def write_report(folder: Path, manifest: Manifest) -> None:
    """Writes `folder`/report.html, and llm.html where a language model was asked.

    Shards and objects.parquet must be there; the manifest need not be saved yet.
    """
    report.write_page(folder / REPORT_PAGE, compose(folder, manifest))
    llm_report.write(folder, manifest)


def compose(folder: Path, manifest: Manifest) -> report.Page:
    """Returns the whole page."""
    chosen = cards.spread_shards(manifest.shards, MOST_SHARDS)
    measured = measure(folder, chosen)
    parsers = sorted(manifest.parsers.keys() | measured.objects.keys())[:_MOST_PARSERS]
    tables = cards.object_tables(folder, parsers)
    answers = llm_report.summary(folder)
    opening = [report.key_figures(key_figures(manifest, tables))]
    if manifest.warnings:
        opening.append(report.caveats("Warnings", _shortened(manifest.warnings)))
    return report.Page(
        title=f"The data: {manifest.source}",
        kicker="Setclip data report",
        lead=lead(manifest),
        opening=opening,
        sections=[
            losses_section(manifest),
            samples_section(folder, manifest, tables),
            sizes_section(manifest, measured),
            objects_section(folder, manifest, parsers, tables),
            *([answers] if answers is not None else []),
            settings_section(manifest),
        ],
        credits=[*manifest.credits, "This file loads nothing from anywhere; it can be kept and sent as it is."],
    )


def measure(folder: Path, shards: Sequence[ShardInfo]) -> Measured:
    """Returns the sizes of at most MOST_SAMPLES samples, spread evenly over the shards."""
    places = cards.spread_places(shards, MOST_SAMPLES)
    measured = Measured(shards=len({place.shard.name for place in places}), samples=len(places))
    for _, sample in cards.read(folder, places):
        if sample is None:
            measured.unreadable += 1
            continue
        if sample.width > 0 and sample.height > 0:
            measured.widths.append(sample.width)
            measured.heights.append(sample.height)
        else:
            measured.unsized += 1
        measured.words += [len(caption.split()) for caption in sample.captions]
        for parser, lists in sample.objects.items():
            measured.objects.setdefault(parser, []).extend(len(set(names)) for names in lists)
    return measured


def lead(manifest: Manifest) -> str:
    """Returns what there is, in two sentences."""
    totals = manifest.totals().values()
    samples, captions, size = (sum(total[name] for total in totals) for name in ("samples", "captions", "bytes"))
    shards = len(manifest.shards)
    text = (
        f"{_count(samples, 'picture')} with {_count(captions, 'caption')} in {_count(shards, 'shard')}, {_size(size)}. "
        f"{manifest.pairs_present:,} of {manifest.pairs_listed:,} pairs present."
    )
    if manifest.resized:
        text += f" {_count(manifest.resized, 'picture')} made smaller; the others have the bytes of the source."
    return text


def key_figures(manifest: Manifest, tables: Mapping[str, ObjectTable]) -> list[report.KeyFigure]:
    """Returns the headline numbers."""
    present, listed = manifest.pairs_present, manifest.pairs_listed
    there = [report.Value("pairs", _percent(present, listed), _share(present, listed), "series-1")]
    if manifest.samples_listed:
        samples = sum(shard.samples for shard in manifest.shards)
        share = _share(samples, manifest.samples_listed)
        detail = f"{samples:,} of {manifest.samples_listed:,} that the inputs list"
        there.append(report.Value("samples", _percent(samples, manifest.samples_listed), share, "series-2", detail))
    figures = [report.KeyFigure(f"{present:,} of {listed:,} pairs present", there)]
    totals = manifest.totals()
    most = max((total["samples"] for total in totals.values()), default=0)
    shown = list(totals.items())[:_MOST_SPLITS]
    figures.append(
        report.KeyFigure(
            "Samples by split" + (f", the first {len(shown)} of {len(totals)}" if len(shown) < len(totals) else ""),
            [
                report.Value(
                    split,
                    f"{total['samples']:,}",
                    _share(total["samples"], most),
                    "series-1",
                    f"{_count(total['captions'], 'caption')}, {_count(total['shards'], 'shard')}, {_size(total['bytes'])}",
                )
                for split, total in shown
            ],
        )
    )
    for parser, table in tables.items():
        number = len(table.names)
        mentions = int(table.counts.sum())
        figures.append(
            report.KeyFigure(
                f"Objects in captions (parser {parser})",
                [
                    report.Value("distinct", f"{number:,}", 1.0, "series-1"),
                    report.Value(
                        "tail",
                        f"{num_tail_objects(number):,}",
                        _share(num_tail_objects(number), number),
                        "series-2",
                        f"{mentions / max(1, table.num_captions):.2f} objects a caption, {mentions:,} in all",
                    ),
                ],
            )
        )
    return figures


def losses_section(manifest: Manifest) -> report.Section:
    """What was left out and why, and the inputs that lost most."""
    blocks: list[Markup] = []
    dropped = _most_first(manifest.dropped)
    if dropped:
        listed = manifest.samples_listed or sum(shard.samples for shard in manifest.shards) + sum(
            count for reason, count in dropped if not _is_of_no_samples(reason)
        )
        most = max(count for _, count in dropped)
        rows: list[list[str]] = []
        for reason, count in dropped[:_MOST_ROWS]:
            whole = manifest.pairs_listed if _is_of_no_samples(reason) else listed
            rows.append([reason, f"{count:,}", _percent(count, whole), report.bar(_share(count, most))])
        if len(dropped) > _MOST_ROWS:
            rest = sum(count for _, count in dropped[_MOST_ROWS:])
            rows.append(
                [f"{len(dropped) - _MOST_ROWS:,} other reasons", f"{rest:,}", "", report.bar(_share(rest, most))]
            )
        caption = "What was left out, as a share of the samples (or captions) that the inputs list"
        blocks.append(report.table(report.Table(caption, ["reason", "count", "share", ""], rows)))
    worst = _worst_inputs(manifest)
    if worst:
        blocks.append(
            report.table(
                report.Table(
                    f"Inputs with the most losses, {len(worst)} of {len(manifest.inputs):,}",
                    ["input", "listed", "left out", "share", "most often because of"],
                    worst,
                )
            )
        )
    intro = (
        "Everything that the inputs list and the shards do not hold is counted here by reason."
        if dropped
        else "Nothing was left out."
    )
    return report.Section("losses", "What was left out", blocks, intro, menu="Left out")


def samples_section(folder: Path, manifest: Manifest, tables: Mapping[str, ObjectTable]) -> report.Section:
    """A contact sheet of each split."""
    splits = manifest.splits[:_SHEET_SPLITS]
    blocks = []
    for split in splits:
        places = cards.spread_places(manifest.of_split(split), max(4, _SHEET // len(splits)))
        if len(manifest.splits) > 1:
            blocks.append(report.subtitle(f"Split “{split}”"))
        blocks.append(report.sample_cards(_sheet(folder, places, tables)))
    if tables:
        blocks.append(report.pill_legend(_LEGEND))
    more = len(manifest.splits) - len(splits)
    return report.Section(
        "samples",
        "Samples",
        blocks,
        "Spread evenly over the shards, not picked; each with its captions and the objects parsed from them"
        + (f". {more} further splits are not shown." if more else "."),
    )


def sizes_section(manifest: Manifest, measured: Measured) -> report.Section:
    """Histograms of pictures and captions."""
    figures = []
    if measured.widths:
        widths, heights = np.array(measured.widths), np.array(measured.heights)
        figures += [
            _whole_numbers(np.minimum(widths, heights), "Short side of the pictures", "pixels", "pictures"),
            _aspects(widths / heights),
        ]
    if measured.words:
        figures.append(_whole_numbers(np.array(measured.words), "Length of the captions", "words", "captions"))
    figures += [
        _whole_numbers(np.array(numbers), f"Objects a caption (parser {parser})", "objects", "captions")
        for parser, numbers in sorted(measured.objects.items())[:_MOST_PARSERS]
        if numbers
    ]
    if measured.samples == sum(shard.samples for shard in manifest.shards):
        basis = f"Measured on all {_count(measured.samples, 'sample')}."
    else:
        basis = (
            f"Measured on {_count(measured.samples, 'sample')}, spread evenly over {measured.shards:,} of "
            f"{_count(len(manifest.shards), 'shard')}, not on all."
        )
    intro = f"{basis} Words are what stands between spaces."
    if measured.unreadable:
        intro += f" {_count(measured.unreadable, 'sample')} could not be read."
    if measured.unsized:
        intro += f" The size of {_count(measured.unsized, 'picture')} is not known."
    return report.Section("sizes", "Pictures and captions in numbers", [report.row(*figures)], intro, menu="Sizes")


def objects_section(
    folder: Path, manifest: Manifest, parsers: Sequence[str], tables: Mapping[str, ObjectTable]
) -> report.Section:
    """Head and tail of each parser's objects, with pictures."""
    blocks: list[Markup] = []
    counted = [shard for shard in manifest.shards if shard.split == "train"] or manifest.shards
    chosen = cards.spread_shards(counted, MOST_SHARDS)
    for parser in parsers:
        if len(parsers) > 1:
            blocks.append(report.subtitle(f"Parser “{parser}”"))
        if parser in tables:
            blocks += _objects(folder, chosen, len(counted), tables[parser])
        else:
            blocks.append(Markup("<p class='soft'>{}</p>").format(f"{OBJECTS_NAME} has no objects of parser {parser}."))
    return report.Section(
        "objects",
        "Objects, head to tail",
        blocks,
        "How many captions name each object. The head is the most frequent 20 % of objects, the tail the rarest 30 %. "
        "Counts are of the split “train” where there is one."
        if parsers
        else "No caption was parsed.",
        menu="Objects",
    )


def settings_section(manifest: Manifest) -> report.Section:
    """What decided the samples."""
    provenance = manifest.provenance
    rows = [
        ["source", manifest.source],
        *([name.replace("_", " "), _setting(value)] for name, value in manifest.config.items()),
        *([f"parser {parser}", version] for parser, version in manifest.parsers.items()),
        ["Setclip", str(provenance.get("setclip", "–"))],
        ["commit", str(provenance.get("commit") or "not in a git checkout")],
        ["versions", ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()) or "–"],
    ]
    return report.Section(
        "settings",
        "How it was made",
        [report.table(report.Table("Settings and versions", ["", "value"], rows, "words"))],
        menu="Settings",
    )


_LEGEND = [
    report.Pill("head: the most frequent 20 %", "head"),
    report.Pill("middle", "middle"),
    report.Pill("tail: the rarest 30 %", "tail"),
]


def _objects(folder: Path, chosen: Sequence[ShardInfo], num_shards: int, table: ObjectTable) -> list[Markup]:
    """The curve of one parser's counts, and pictures of head and tail."""
    names, counts = table.names, table.counts
    num_head, num_tail = int(HEAD_SHARE * len(names)), num_tail_objects(len(names))
    alt = (
        f"Counts of {len(names):,} objects of parser {table.parser} by rank, both axes logarithmic: from {counts[0]:,} "
        f"captions ({names[0]}) down to {counts[-1]:,} ({names[-1]}); the first {num_head:,} are the head, the last "
        f"{num_tail:,} the tail."
    )
    mentions = int(counts.sum())
    in_tail = int(counts[table.is_tail].sum())
    shown = [_cut(name, 24) for name in names]
    curve = report.figure(
        plots.rank_frequency(shown, counts.tolist(), num_head, num_tail, alt, most_points=_POINTS),
        "How often objects are named",
        f"The tail, {num_tail:,} of {len(names):,} objects, has {_percent(in_tail, mentions)} of all mentions.",
    )
    top = report.table(
        report.Table(
            "The most frequent objects",
            ["object", "captions", "share"],
            [
                [_cut(name, 40), f"{count:,}", _percent(count, table.num_captions)]
                for name, count in zip(names[:12], counts[:12].tolist(), strict=True)
            ],
        )
    )
    head = names[: min(_OBJECTS_SHOWN, len(names))]
    tail = [names[row] for row in np.flatnonzero(table.is_tail)]  # of equally frequent ones not the last in rank
    found = _examples(folder, chosen, table.parser, head, set(tail))
    pictured_tail = [name for name in tail if name in found]
    rare = [pictured_tail[place] for place in cards.spread(len(pictured_tail), _OBJECTS_SHOWN)]
    blocks = [report.row(curve, top)]
    where = f"among {len(chosen):,} of {num_shards:,} shards" if len(chosen) < num_shards else "in the shards"
    for title, group in (("From the head", head), ("From the tail", rare)):
        pictured = [name for name in group if name in found]
        if pictured:
            blocks += [
                report.subtitle(title),
                report.card_groups([_group(folder, name, found[name], table) for name in pictured]),
            ]
        elif group or (title == "From the tail" and num_tail):
            blocks.append(Markup("<p class='soft'>{}</p>").format(f"{title}: no sample was found {where}."))
    return blocks


def _examples(
    folder: Path, shards: Sequence[ShardInfo], parser: str, head: Sequence[str], tail: set[str]
) -> dict[str, list[Place]]:
    """Returns object to its first places, for the objects of `head` and for some of `tail`."""
    found: dict[str, list[Place]] = {}
    in_tail = 0
    wanted = [*head, *sorted(tail - set(head))]
    for shard in shards:
        for name, place in cards.places_with_objects(folder, [shard], parser, wanted):
            places = found.setdefault(name, [])
            if len(places) < _PICTURES_AN_OBJECT:
                in_tail += name in tail and not places
                places.append(place)
        has_head = all(len(found.get(name, ())) == _PICTURES_AN_OBJECT for name in head)
        if has_head and in_tail >= min(_ENOUGH_TAIL, len(tail)):
            break
    return found


def _group(folder: Path, name: str, places: Sequence[Place], table: ObjectTable) -> report.CardGroup:
    count, rank = table.count_of(name), table.names.index(name) + 1
    text = f"in {_count(count, 'caption')}, rank {rank:,} of {len(table.names):,}"
    return report.CardGroup(_cut(name, 60), text, _sheet(folder, places, {table.parser: table}))


def _sheet(folder: Path, places: Sequence[Place], tables: Mapping[str, ObjectTable]) -> list[report.SampleCard]:
    return [cards.card(place, sample, tables) for place, sample in cards.read(folder, places)]


def _whole_numbers(values: NDArray[np.int64], title: str, unit: str, what: str) -> Markup:
    """A histogram whose last bar holds the largest hundredth, so that one giant does not squeeze all others."""
    low, high = int(values.min()), int(values.max())
    if high - low >= _MOST_BARS:
        high = int(np.percentile(values, 99, method="higher"))
    width = max(1, -(-(high - low + 1) // _MOST_BARS))
    edges = np.arange(low, high + width + 1, width) - 0.5
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    median, most = int(np.median(values)), int(values.max())
    text = f"Median {median:,}, from {low:,} to {most:,} {unit}."
    if most > edges[-1]:
        text += f" The last bar holds all from {int(edges[-2] + 0.5):,} {unit}."
    return report.figure(plots.histogram(counts, edges, unit, what, f"{title}, histogram. {text}"), title, text)


def _aspects(ratios: NDArray[np.float64]) -> Markup:
    low, high = min(_ASPECTS), max(_ASPECTS)
    edges = low * (high / low) ** (np.arange(33) / 32)
    edges *= 2 ** (1 / 16)  # 1:1 in the middle of a bar
    edges = np.concatenate([[edges[0] / 2 ** (1 / 8)], edges])
    counts, _ = np.histogram(np.clip(ratios, edges[0] * 1.0001, edges[-1] / 1.0001), edges)
    wide, tall = int((ratios > 1).sum()), int((ratios < 1).sum())
    title = "Width to height"
    text = f"{_percent(wide, len(ratios))} are wider than high, {_percent(tall, len(ratios))} higher than wide."
    alt = f"{title} of the pictures, histogram on a logarithmic axis. {text}"
    return report.figure(plots.histogram(counts, edges, "width : height", "pictures", alt, _ASPECTS), title, text)


def _worst_inputs(manifest: Manifest) -> list[list[str]]:
    lost = [
        (entry["listed"] - entry["packed"], name, entry)
        for name, entry in manifest.inputs.items()
        if entry["listed"] > entry["packed"]
    ]
    rows = []
    for number, name, entry in sorted(lost, key=lambda item: (-item[0], item[1]))[:_WORST_INPUTS]:
        reasons = [(reason, count) for reason, count in _most_first(entry["dropped"]) if not _is_of_no_samples(reason)]
        main = f"{reasons[0][0]} ({reasons[0][1]:,})" if reasons else "–"
        rows.append([_cut(name, 80), f"{entry['listed']:,}", f"{number:,}", _percent(number, entry["listed"]), main])
    return rows


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _is_of_no_samples(reason: str) -> bool:
    return reason.endswith(", not samples)")


def _shortened(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - _MOST_ROWS:,} more"] if len(texts) > _MOST_ROWS else []
    return [_cut(text, 500) for text in texts[:_MOST_ROWS]] + more


def _setting(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _cut(", ".join(value), _MOST_CHARACTERS)
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _MOST_CHARACTERS)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _percent(part: int, whole: int) -> str:
    share = 100 * _share(part, whole)
    return f"{share:.2f}\N{NO-BREAK SPACE}%" if 0 < share < 1 else f"{share:.1f}\N{NO-BREAK SPACE}%"


def _size(number: int) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number / 1e6:,.1f} MB"


def main() -> None:
    config = parse(ReportConfig, description=__doc__)
    manifest = Manifest.load(config.folder)
    check_shards(config.folder, manifest.shards)
    write_report(config.folder, manifest)
    say(f"report: {config.folder / REPORT_PAGE}")


if __name__ == "__main__":
    command(main)
