"""Features of a data set from embeddings that were exported before, instead of from a model.

Used by the commands of retrieval and diagnostics (`--embeddings`): whatever made the embeddings, single vectors or sets, is
evaluated by the same protocols. Letters: N images, N' captions, K elements of a set, D width.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from eval_suite.embed_files import Embeddings, What
from setclip.errors import InputError

Name = TypeVar("Name")


def embedded_features(
    embeddings: Embeddings, keys: Sequence[str], captions: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """Returns the features of images, (N, …, D), and of captions, (N', …, D), float32 of unit norm, in the order of the data.

    Pictures are found by their key, captions by key and number, and must read the same. What is embedded beside them is
    left out. Raises InputError where one is missing or reads otherwise, and on a feature that is not finite.
    """
    texts = {(key, number): text for key, own in zip(keys, captions, strict=True) for number, text in enumerate(own)}
    in_order = [(key, number) for key, own in zip(keys, captions, strict=True) for number in range(len(own))]

    def caption_names(columns: dict[str, list[Any]]) -> Iterator[tuple[str, int]]:
        for key, number, text in zip(columns["key"], columns["caption"], columns["text"], strict=True):
            expected = texts.get((key, number))
            if expected is not None and expected != text:
                raise InputError(
                    f"{embeddings.folder}: expected of sample {key} caption {number} as the data has it, {expected!r}, "
                    f"found {text!r}; embed the data anew"
                )
            yield key, number

    return (
        _in_order(embeddings, "images", keys, lambda columns: columns["key"]),
        _in_order(embeddings, "texts", in_order, caption_names),
    )


def _in_order(embeddings: Embeddings, what: What, wanted: Sequence[Name], names_of: Any) -> Tensor:
    """Returns the features of `wanted`, in this order; `names_of(columns)` names the rows of a part."""
    rows_of: dict[Name, list[int]] = defaultdict(list)
    for row, name in enumerate(wanted):
        rows_of[name].append(row)
    features: Tensor | None = None
    is_found = torch.zeros(len(wanted), dtype=torch.bool)
    for columns, vectors in embeddings.parts(what):
        names: Iterable[Name] = names_of(columns)
        pairs = [(row, place) for place, name in enumerate(names) for row in rows_of.get(name, ())]
        if not pairs:
            continue
        rows, places = map(list, zip(*pairs, strict=True))
        if features is None:
            features = torch.zeros(len(wanted), *vectors.shape[1:])
        features[rows] = torch.from_numpy(vectors[places])
        is_found[rows] = True
    missing = (~is_found).nonzero().flatten().tolist()
    if features is None or missing:
        kind = "pictures" if what == "images" else "captions"
        raise InputError(
            f"{embeddings.folder}: expected embeddings of all {len(wanted):,} {kind} of the data, found none of "
            f"{len(missing):,} (first: {wanted[missing[0]]}); embed the whole split, with its captions, of the same shards"
        )
    if not bool(features.isfinite().all()):
        bad = (~features.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise InputError(
            f"{embeddings.folder}: expected finite embeddings, found NaN or infinite ones for {len(bad):,} of "
            f"{len(features):,} {what} (first: {wanted[int(bad[0])]}); embed with an earlier checkpoint"
        )
    return torch.nn.functional.normalize(features, dim=-1)
