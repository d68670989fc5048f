"""The page of diagnostics: numbers with their protocols, a drawing a word, and the elements of sets.

Used by `eval_suite.diagnostics`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

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
}


def write_diagnostics_page(
    path: Path,
    results: Results,
    words: Sequence[WordDimensions],
    contribution: Mapping[str, Mapping[str, Metric]],
) -> None:
    """Writes the page; `contribution` as `element_contribution` gives it, empty for single vectors."""
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
