"""The gallery file: what reports show beside numbers, with small pictures inside, so that it needs no data to be looked at.

Some queries with their best answers, the worst failures, and `pictures`: key to a JPEG in base64. Written by the command of
retrieval beside its results (FILE.gallery.json), read by eval_suite.report and the demo's report.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval_suite.judgements import Direction
from eval_suite.ranks import Ranks
from eval_suite.relevance import RightAnswers
from eval_suite.scores import Score, top_matches
from setclip.decode import DecodeError
from setclip.report import small_jpeg

PICTURE_SIDE = 160
"""Pixels of the longer side of a picture in the file."""
MAX_PICTURE_BYTES = 12_000
"""Of one JPEG; in the file it is a third longer."""


def gallery(
    score: Score,
    i2t: Ranks | Tensor,
    t2i: Ranks | Tensor,
    image_of_text: Tensor,
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    num_queries: int = 12,
    k: int = 5,
    read_image: Callable[[str], bytes] | None = None,
    right: Mapping[Direction, RightAnswers] | None = None,
) -> dict[str, Any]:
    """Returns, for each direction, queries spread evenly over the data ("chosen") and those ranked worst ("worst").

    Each query has its image key or caption, its 1-based rank (ties against us) and its `k` best answers with key,
    caption, score and whether they are right: an image's own captions are, or what `right` says, whose queries alone
    are then shown. `i2t` and `t2i`: ranks of the best right answer, of tensors 0-based. With `read_image` (key to the bytes
    of an image file) the small pictures that they name come along as "pictures": no more than 2 · `num_queries` ·
    (`k` + 2), 2.7 MB for 12 and 5 at most, and 1 MB as a rule.
    """
    texts = [text for of_image in captions for text in of_image]
    owners = image_of_text.tolist()
    found: dict[str, Any] = {}
    both: list[tuple[Direction, Ranks | Tensor]] = [("i2t", i2t), ("t2i", t2i)]
    for direction, ranks in both:
        rank = ranks if isinstance(ranks, Tensor) else ranks.by("pessimistic")
        of_right = None if right is None else right[direction]
        asked_rows = list(range(len(rank))) if of_right is None else of_right.queries.tolist()
        spread = torch.linspace(0, len(rank) - 1, min(num_queries, len(rank))).round().long().unique().tolist()
        order = torch.sort(rank, descending=True, stable=True).indices[:num_queries].tolist()
        worst = [place for place in order if rank[place] > 0]

        def entry(
            place: int,
            direction: Direction = direction,
            rank: Tensor = rank,
            of_right: RightAnswers | None = of_right,
            asked_rows: list[int] = asked_rows,
        ) -> dict[str, Any]:
            query = asked_rows[place]
            if direction == "i2t":
                asked: dict[str, Any] = {"key": keys[query], "captions": list(captions[query])}
                hits = top_matches(score, query, len(texts), k, "row")
                named = [{"caption": texts[text], "key": keys[owners[text]]} for text, _ in hits]
                own = [owners[text] == query for text, _ in hits]
            else:
                asked = {"caption": texts[query], "key": keys[owners[query]]}
                hits = top_matches(score, query, len(keys), k, "column")
                named = [{"key": keys[image]} for image, _ in hits]
                own = [owners[query] == image for image, _ in hits]
            if of_right is not None:
                (row,) = of_right.is_right(slice(place, place + 1))
                own = [bool(row[answer]) for answer, _ in hits]
            answers = [
                {**name, "score": value, "is_right": is_right}
                for name, (_, value), is_right in zip(named, hits, own, strict=True)
            ]
            return {"query": asked, "rank": int(rank[place]) + 1, "answers": answers}

        found[direction] = {"chosen": [entry(place) for place in spread], "worst": [entry(place) for place in worst]}
    if read_image is not None:
        found["pictures"] = small_pictures(shown_keys(found), read_image)
    return found


def shown_keys(found: dict[str, Any]) -> list[str]:
    """Returns the keys of the pictures that a page shows of a gallery, each once: queries, answers and right answers."""
    entries = {d: [*found[d]["chosen"], *found[d]["worst"]] for d in ("i2t", "t2i")}
    queries = [entry["query"]["key"] for direction in entries.values() for entry in direction]
    return list(dict.fromkeys([*queries, *(answer["key"] for entry in entries["t2i"] for answer in entry["answers"])]))


def small_pictures(names: Iterable[str], read_image: Callable[[str], bytes]) -> dict[str, str]:
    """Returns name to a JPEG in base64, of at most 160 pixels on the longer side and 12,000 bytes.

    `read_image` gives the bytes of an image file by its name or key. One that cannot be decoded is left out; a report
    says which pictures it has not.
    """
    pictures: dict[str, str] = {}
    for name in names:
        try:
            jpeg = small_jpeg(read_image(name), PICTURE_SIDE, MAX_PICTURE_BYTES)
        except DecodeError:
            continue
        pictures[name] = base64.b64encode(jpeg).decode()
    return pictures
