"""The page of diagnostics: numbers with their protocols, a drawing a word, and the elements of sets.

Used by `eval_suite.diagnostics`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from eval_suite.head_diagnostics import HeadDiagnostics
from eval_suite.results import Metric, Results, model_names
from eval_suite.set_diagnostics import contribution_rows
from eval_suite.word_dimensions import WordDimensions
from setclip import plots, report

_GAP = ("gap", "gap_constant", "matched_cosine", "unmatched_cosine")
_NAMES = {
    "gap": "distance of the centroids",
    "gap_constant": "of it the same for all pairs, %",
    "matched_cosine": "cosine of a caption with its image",
    "unmatched_cosine": "cosine with other images",
    "variance_image_log_of_mean": "images, log of the mean",
    "variance_image_mean_of_logs": "images, mean of the logs",
    "variance_text_log_of_mean": "captions, log of the mean",
    "variance_text_mean_of_logs": "captions, mean of the logs",
    "slots_image_inputs": "places that an element looks at",
    "slots_image_overlap": "attention shared by two elements, %",
    "slots_text_inputs": "words that an element takes",
    "slots_text_overlap": "words shared by two elements, %",
    "subspaces_kept": "entries kept",
    "subspaces_near_threshold": "entries near their threshold",
    "subspaces_profile_cosine": "cosine of profiles",
    "subspaces_top_overlap": "key dimensions in common",
}


def write_diagnostics_page(
    path: Path,
    results: Results,
    words: Sequence[WordDimensions],
    contribution: Mapping[str, Mapping[str, Metric]],
    head: HeadDiagnostics | None = None,
    missing: Sequence[str] = (),
) -> None:
    """Writes the page; `contribution` as `element_contribution` gives it, empty where there is none; `head`: of a fine-tuned
    model; `missing`: what does not apply, and why.
    """
    sections = [
        report.Section(
            anchor="gap",
            title="Modality gap",
            intro="Images and captions of one model lie on cones of their own (Liang et al. 2022, arXiv 2203.02053).",
            blocks=[_numbers(results, [name for name in _GAP if name in results.metrics], "modality gap")],
        )
    ]
    if words:
        notes = list(dict.fromkeys(note for word in words for note in word.notes))
        sections.append(
            report.Section(
                anchor="words",
                title="Dimensions that carry a word",
                menu="Words",
                intro="Each caption that has the word is a pair with its image. The products of their vectors are taken "
                f"dimension by dimension, the {words[0].top} largest are marked, and marks are counted. A few dimensions far "
                "above the rest carry the word.",
                blocks=[
                    *([report.caveats("How to read these", notes)] if notes else []),
                    report.row(*(word_figure(word) for word in words)),
                    _word_table(words),
                ],
            )
        )
    variances = [name for name in results.metrics if name.startswith("variance_")]
    if variances:
        sections.append(
            report.Section(
                anchor="sets",
                title="Elements of sets",
                menu="Sets",
                intro="Circular variance: near 0 (a very negative logarithm) where a set's elements are all the same.",
                blocks=[_numbers(results, variances, "circular variance, natural logarithm")],
            )
        )
    if contribution:
        sections.append(
            report.Section(
                anchor="contribution",
                title="What one element finds",
                menu="Contribution",
                intro="One element of one side is kept against all elements of the other; the difference from all stands in "
                "brackets.",
                blocks=[
                    report.table(
                        report.Table(
                            "contribution of elements",
                            ["kept", "image to text R@1, %", "text to image R@1, %", "RSUM"],
                            contribution_rows(contribution),
                        )
                    )
                ],
            )
        )
    if head is not None:
        sections += head_sections(results, head)
    if missing:
        sections.append(
            report.Section(
                anchor="missing",
                title="What does not apply",
                menu="Does not apply",
                blocks=[report.caveats("Left out here", list(missing))],
            )
        )
    dataset = results.dataset
    report.write_page(
        path,
        report.Page(
            title="Diagnostics",
            kicker=model_names([results])[0],
            lead=f"{dataset['name']} {dataset['split']}: {dataset['images']:,} images, {dataset['captions']:,} captions.",
            sections=sections,
            credits=[f"Made by Setclip, commit {results.provenance.get('commit') or 'unknown'}."],
        ),
    )


def head_sections(results: Results, head: HeadDiagnostics) -> list[report.Section]:
    """Returns the sections on a head: where its elements look, which words they take, and its sub-spaces."""
    sections = []
    if head.image is not None:
        names = [name for name in results.metrics if name.startswith("slots_image_")]
        sections.append(
            report.Section(
                anchor="looks",
                title="Where elements look",
                menu="Looks",
                intro=f"The head {head.head} makes {len(head.image.places)} elements of a picture. Colour shows what each takes "
                "of the patches; elements that are worth their place look at different things.",
                blocks=[*map(report.sample_cards, head.cards), _numbers(results, names, "attention over pictures")],
            )
        )
    if head.text is not None:
        names = [name for name in results.metrics if name.startswith("slots_text_")]
        elements = [f"slot {number}" for number in range(1, len(head.text.places) + 1)]
        blocks = [_numbers(results, names, "attention over captions")]
        if head.words:
            rows = [[one.caption, *(_shares(shares) for shares in one.of_elements)] for one in head.words]
            table = report.Table("words that elements take most of", ["caption", *elements], rows, "wide-words")
            blocks.insert(0, report.table(table))
        if head.favourites:
            rows = [[name, _shares(shares)] for name, shares in zip(elements, head.favourites, strict=True)]
            title = f"over {head.text.samples:,} captions, share of an element's attention"
            blocks.append(report.table(report.Table(title, ["", "most"], rows, "words")))
        sections.append(
            report.Section(
                anchor="taken",
                title="Which words elements take",
                menu="Words of elements",
                intro="What each element of a caption takes most of, with its share of the element's attention.",
                blocks=blocks,
            )
        )
    if head.subspaces:
        names = [name for name in results.metrics if name.startswith("subspaces_")]
        about = (
            ("Profiles", "Dimensions by the sub-space that weighs them most."),
            ("Key dimensions in common", "Share of the largest dimensions of each."),
            ("Cosines of profiles", ""),
        )
        figures = [report.figure(drawing, *words) for drawing, words in zip(head.drawings, about, strict=False)]
        sections.append(
            report.Section(
                anchor="subspaces",
                title="Sub-spaces",
                intro="A profile says how much a sub-space makes of each dimension (DH-Set's, our reconstruction: "
                "docs/heads.md). Sub-spaces that have collapsed have one profile: cosines near 1, and key dimensions in common.",
                blocks=[*([report.row(*figures)] if figures else []), _numbers(results, names, "sub-spaces")],
            )
        )
    return sections


def _shares(shares: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {100 * share:.0f}\N{NO-BREAK SPACE}%" for word, share in shares)


def word_figure(word: WordDimensions) -> Markup:
    """Returns the drawing of a word: the level of each dimension, falling, and what to read it against."""
    levels = {"uniform": word.uniform, "half of the pairs": 0.5 * word.ceiling}
    if word.threshold <= word.ceiling:
        levels[f"threshold {word.threshold:g}"] = word.threshold
    strongest = ", ".join(str(dimension) for dimension in word.dimensions[:5].tolist())
    alt = f"dimensions of “{word.word}”, falling from {word.probabilities[0].item():.4f}"
    svg = plots.ranked_levels(word.probabilities.tolist(), levels, "dimension, by rank", "share of the marks", alt)
    return report.figure(svg, f"“{word.word}”", f"{word.num_pairs:,} pairs. Strongest dimensions: {strongest}.")


def _word_table(words: Sequence[WordDimensions]) -> Markup:
    rows = [
        [
            word.word,
            f"{word.num_pairs:,}",
            f"{word.probabilities[0].item() / word.uniform:.1f}",
            f"{len(word.common):,}",
            f"{len(word.marked):,}",
        ]
        for word in words
    ]
    header = [
        "word",
        "pairs",
        "highest level, times uniform",
        "marked by half of the pairs",
        f"above {words[0].threshold:g}",
    ]
    return report.table(report.Table("dimensions by word", header, rows))


def _numbers(results: Results, names: Sequence[str], caption: str) -> Markup:
    rows = [
        [_NAMES[name], f"{metric.value:.3f}", f"{metric.samples:,}", metric.protocol]
        for name, metric in ((name, results.metrics[name]) for name in names)
    ]
    return report.table(report.Table(caption, ["", "value", "over", "protocol"], rows, kind="wide-words"))
