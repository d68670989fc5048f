"""llm.html of a folder of shards: what a language model named and described, beside the objects by part of speech.

Used by `data_prep.report`, which writes it wherever `data_prep.parse_llm` or `.describe` have left their accounts, and puts
their counts into report.html. The work is bounded: the means over all captions stand in the account.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_prep import cards
from data_prep.llm import agreement
from data_prep.llm.object_results import Results
from data_prep.llm.places import DESCRIPTION_ACCOUNT_NAME, FOLDER, OBJECT_ACCOUNT_NAME, OBJECT_RESULTS_NAME
from setclip import report
from setclip.descriptions import DESCRIPTIONS_NAME, Description, DescriptionTable, read_descriptions
from setclip.manifest import Manifest
from setclip.shards import Sample

PAGE_NAME = "llm.html"
SHOWN = 100  # captions, and descriptions

_POS, _LLM = "pos", "llm"  # the parsers
_MOST_CHARACTERS = 300
_QUESTIONS = {1: "first answer", 2: "second answer", 0: "fell back to pos"}


@dataclass(frozen=True)
class Compared:
    """One caption with the objects of both parsers."""

    caption: str
    by_pos: list[str]
    by_llm: list[str]
    result: dict[str, Any] | None
    """Its row of the results; None where they do not have it."""

    @property
    def iou(self) -> float:
        return agreement.iou(self.by_pos, self.by_llm)


def write(folder: Path, manifest: Manifest) -> None:
    """Writes `folder`/llm.html where there is something to show."""
    objects, descriptions = _account(folder, OBJECT_ACCOUNT_NAME), _descriptions_account(folder)
    if objects is None and descriptions is None:
        return
    sections = []
    model = (objects or descriptions or {})["model"]
    if objects is not None:
        sections += [
            _objects_section(folder, manifest, objects),
            _counts_section("objects", "Answers about captions", objects),
        ]
    if descriptions is not None:
        table = read_descriptions(folder)
        sections += [
            _descriptions_section(table),
            _counts_section("descriptions", "Answers about classes", descriptions),
        ]
    page = report.Page(
        title=f"A language model's objects and descriptions: {manifest.source}",
        kicker="Setclip data report",
        lead=f"By {model}. Captions and classes are spread evenly, not picked.",
        sections=sections,
        credits=[*manifest.credits, "This file loads nothing from anywhere; it can be kept and sent as it is."],
    )
    report.write_page(folder / PAGE_NAME, page)


def summary(folder: Path) -> report.Section | None:
    """Returns the section of report.html, or None where no language model was asked."""
    objects, descriptions = _account(folder, OBJECT_ACCOUNT_NAME), _descriptions_account(folder)
    if objects is None and descriptions is None:
        return None
    blocks = []
    if objects is not None:
        blocks += [_agreement(objects), _counts("Answers about captions", objects["account"])]
    if descriptions is not None:
        blocks.append(_counts("Answers about classes", descriptions["account"]))
    blocks.append(Markup("<p><a href='{}'>Captions and descriptions side by side</a></p>").format(PAGE_NAME))
    return report.Section(
        "llm",
        "A language model's answers",
        blocks,
        f"By {(objects or descriptions or {})['model']}. Bad answers are asked again with examples; then objects are those by "
        "part of speech, and descriptions stay empty.",
        menu="Language model",
    )


def _account(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _descriptions_account(folder: Path) -> dict[str, Any] | None:
    return _account(folder, DESCRIPTION_ACCOUNT_NAME) if (folder / DESCRIPTIONS_NAME).exists() else None


def _objects_section(folder: Path, manifest: Manifest, account: dict[str, Any]) -> report.Section:
    compared = _compared(folder, manifest, account)
    mean = sum(each.iou for each in compared) / max(len(compared), 1)
    rows: list[list[str]] = [
        [
            Markup("{}<br><small>{}</small>").format(_cut(each.caption), _how(each.result)),
            _pills(each.by_pos, each.by_llm),
            _pills(each.by_llm, each.by_pos, (each.result or {}).get("unmentioned") or ()),
            Markup("<span style='white-space:nowrap'>{}</span>").format(f"{each.iou:.2f}"),
        ]
        for each in compared
    ]
    legend = report.pill_legend(
        [
            report.Pill("found by both", "head"),
            report.Pill("by this one only", "tail"),
            report.Pill("… (not said)", "tail"),
        ]
    )
    header = ["caption", "by part of speech", "by the model", "IoU"]
    return report.Section(
        "captions",
        f"Objects of {len(compared)} captions by both parsers",
        [_agreement(account), legend, report.table(report.Table("Objects side by side", header, rows, "words"))],
        f"Mean IoU of those shown {mean:.3f}, of all captions {account['agreement']['mean_iou']:.3f}. “Not said” marks objects "
        "that the caption does not name, in the singular, plural or as part of a word; they are kept.",
        menu="Captions",
    )


def _compared(folder: Path, manifest: Manifest, account: dict[str, Any]) -> list[Compared]:
    path = folder / FOLDER / OBJECT_RESULTS_NAME
    results = Results(path, account["room"]) if path.exists() else None
    places = cards.spread_places(manifest.shards, SHOWN)
    each = -(-SHOWN // max(len(places), 1))  # captions of a sample: more than one where there are few samples
    compared = [
        _compare(sample, (number + further) % len(sample.captions), results)
        for number, (_, sample) in enumerate(cards.read(folder, places))
        if sample is not None and {_POS, _LLM} <= sample.objects.keys()
        for further in range(min(each, len(sample.captions)))
    ]
    return compared[:SHOWN]


def _compare(sample: Sample, chosen: int, results: Results | None) -> Compared:
    caption = sample.captions[chosen]
    row = results.of([caption])[0] if results is not None and caption.strip() else None
    return Compared(caption, sample.objects[_POS][chosen], sample.objects[_LLM][chosen], row)


def _agreement(account: dict[str, Any]) -> Markup:
    agreed, counts = account["agreement"], account["account"]
    said = counts["unsaid"], counts["objects"]
    left = sum(counts["second_bad"].values())
    figures = [
        report.KeyFigure(
            f"Agreement over {agreed['captions']:,} captions",
            [
                report.Value("mean IoU", f"{agreed['mean_iou']:.3f}", agreed["mean_iou"], "series-1"),
                report.Value(
                    "equal sets",
                    _percent(agreed["equal"], agreed["captions"]),
                    _share(agreed["equal"], agreed["captions"]),
                    "series-2",
                    f"{agreed['empty']:,} of them without an object",
                ),
            ],
        ),
        report.KeyFigure(
            "Objects a caption",
            [
                report.Value(
                    "by part of speech", f"{agreed['pos_objects_a_caption']:.2f}", _length(agreed, "pos"), "series-1"
                ),
                report.Value(
                    "by the model", f"{agreed['llm_objects_a_caption']:.2f}", _length(agreed, "llm"), "series-2"
                ),
            ],
        ),
        report.KeyFigure(
            f"Of {counts['asked']:,} distinct captions",
            [
                report.Value(
                    "fell back to pos", _percent(left, counts["asked"]), _share(left, counts["asked"]), "series-1"
                ),
                report.Value(
                    "objects not said",
                    _percent(*said),
                    _share(*said),
                    "series-2",
                    f"{said[0]:,} of the model's {said[1]:,} objects",
                ),
            ],
        ),
    ]
    return report.key_figures(figures)


def _length(agreed: dict[str, Any], parser: str) -> float:
    most = max(agreed["pos_objects_a_caption"], agreed["llm_objects_a_caption"])
    return _share(agreed[f"{parser}_objects_a_caption"], most)


def _descriptions_section(table: DescriptionTable) -> report.Section:
    shown = [table.rows[place] for place in cards.spread(len(table.rows), SHOWN)]
    rows: list[list[str]] = [[_cut(row.name), row.text or "–", _flags(row)] for row in shown]
    return report.Section(
        "classes",
        f"Descriptions of {len(shown)} classes",
        [report.table(report.Table("Descriptions", ["class", "description", "flags"], rows, "words"))],
        f"{len(table.texts):,} of {len(table.rows):,} objects ({table.chosen} of parser {table.parser}) are described.",
        menu="Descriptions",
    )


def _counts_section(anchor: str, title: str, account: dict[str, Any]) -> report.Section:
    return report.Section(
        f"{anchor}-counts", title, [_counts(title, account["account"])], account["version"], menu=title
    )


def _counts(title: str, counts: dict[str, Any]) -> Markup:
    asked = counts["asked"]
    again, left = (sum(counts[name].values()) for name in ("first_bad", "second_bad"))
    rows = [
        ["asked", f"{asked:,}", "", ""],
        ["asked again", f"{again:,}", _percent(again, asked), report.bar(_share(again, asked))],
        ["without a good answer", f"{left:,}", _percent(left, asked), report.bar(_share(left, asked))],
    ]
    groups = {"first_bad": "first answer", "second_bad": "second answer", "repaired": "repaired", "flags": "flag"}
    for name, what in groups.items():
        rows += [
            [f"{what}: {reason}", f"{count:,}", _percent(count, asked), report.bar(_share(count, asked))]
            for reason, count in counts[name].items()
        ]
    tokens = f"{counts['prompt_tokens']:,} tokens of prompts, {counts['completion_tokens']:,} of answers"
    return report.table(report.Table(f"{title}: counts, {tokens}", ["", "count", "share of those asked", ""], rows))


def _pills(names: Sequence[str], others: Sequence[str], unsaid: Sequence[str] = ()) -> Markup:
    pills = [
        report.Pill(f"{name} (not said)" if name in unsaid else name, "head" if name in others else "tail")
        for name in names
    ]
    return Markup(" ").join(
        Markup("<span class='pill {}'>{}</span>").format(pill.kind, _cut(pill.text)) for pill in pills
    )


def _how(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return _QUESTIONS[row["question"]] + (f" ({'; then '.join(row['reasons'])})" if row["reasons"] else "")


def _flags(row: Description) -> str:
    which = "second answer" if row.prompt_version.startswith("description with examples") else ""
    return "; ".join(text for text in (which, *row.flags) if text) or "–"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percent(part: int, whole: int) -> str:
    return f"{100 * _share(part, whole):.1f}\N{NO-BREAK SPACE}%"
