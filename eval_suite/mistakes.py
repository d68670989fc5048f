"""What a classifier gets right and wrong: accuracy class by class, and the most frequent confusions with examples.

Used by the command of zero-shot classification; reports draw it. Letters: N images, C classes.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval_suite.image_sources import ImageSource
from setclip.report import small_jpeg

NUM_CONFUSIONS = 50
NUM_EXAMPLES = 3
_NUM_WITH_PICTURES = 12  # reports show as many
_PICTURE_SIDE = 96


def class_table(
    predictions: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    groups: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Returns for each class its name, images and correct ones; group and count in the training captions where known.

    `predictions` and `labels`: (N,) int64 in [0, C).
    """
    images = labels.bincount(minlength=len(class_names)).tolist()
    correct = labels[predictions == labels].bincount(minlength=len(class_names)).tolist()
    table = []
    for row, name in enumerate(class_names):
        entry: dict[str, Any] = {"name": name, "images": images[row], "correct": correct[row]}
        if groups is not None:
            entry["group"] = groups[row]
        if counts is not None:
            entry["count"] = counts[row]
        table.append(entry)
    return table


def confusions(
    predictions: Tensor, labels: Tensor, class_names: Sequence[str], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the most frequent pairs of right and predicted class, with their number and the keys of some images."""
    wrong = (predictions != labels).nonzero().flatten()
    pairs = labels[wrong] * len(class_names) + predictions[wrong]
    values, counts = pairs.unique(return_counts=True)  # sorted by class, so that of equal counts the first come first
    order = torch.sort(counts, descending=True, stable=True).indices[:NUM_CONFUSIONS]
    found = []
    for pair, count in zip(values[order].tolist(), counts[order].tolist(), strict=True):
        rows = wrong[(pairs == pair).nonzero().flatten()[:NUM_EXAMPLES]].tolist()
        true, predicted = divmod(pair, len(class_names))
        found.append(
            {
                "true": class_names[true],
                "predicted": class_names[predicted],
                "count": count,
                "examples": [keys[row] for row in rows],
            }
        )
    return found


def example_pictures(found: Sequence[Mapping[str, Any]], source: ImageSource) -> dict[str, str]:
    """Returns small JPEGs, in base64 by key, of the examples of the first confusions: about 100 kB."""
    row_of = {key: row for row, key in enumerate(source.keys)}
    wanted = dict.fromkeys(key for entry in found[:_NUM_WITH_PICTURES] for key in entry["examples"])
    return {key: base64.b64encode(small_jpeg(source.encoded(row_of[key]), _PICTURE_SIDE)).decode() for key in wanted}
