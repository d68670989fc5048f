"""The gallery file: what reports show beside numbers, with small pictures inside, so that it needs no data to be looked at.

Some queries with their best answers, the worst failures, and `pictures`: key to a JPEG in base64. Written by the command of
retrieval beside its results (FILE.gallery.json), read by eval_suite.report and the demo's report.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from eval_suite.ranks import Ranks
from eval_suite.scores import Score, top_matches
from setclip.decode import DecodeError
from setclip.report import small_jpeg

PICTURE_SIDE = 160
"""Pixels of the longer side of a picture in the file."""
MAX_PICTURE_BYTES = 12_000
"""Of one JPEG; in the file it is a third longer."""


def gallery(
    score: Score,
    i2t: Ranks,
    t2i: Ranks,
    image_of_text: Tensor,
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    num_queries: int = 12,
    k: int = 5,
    read_image: Callable[[str], bytes] | None = None,
) -> dict[str, Any]:
    """Returns, for each direction, queries spread evenly over the data ("chosen") and those ranked worst ("worst").

    Each query has its image key or caption, its 1-based rank (ties against us) and its `k` best answers with key,
    caption, score and whether they are right. With `read_image` (key to the bytes of an image file) the small
    pictures that they name come along as "pictures": no more than 2 · `num_queries` · (`k` + 2), 2.7 MB for 12 and 5
    at most, and 1 MB as a rule.
    """
    texts = [text for of_image in captions for text in of_image]
    owners = image_of_text.tolist()
    found: dict[str, Any] = {}
    for direction, ranks in (("i2t", i2t), ("t2i", t2i)):
        rank = ranks.by("pessimistic")
        spread = torch.linspace(0, len(rank) - 1, min(num_queries, len(rank))).round().long().unique().tolist()
        order = torch.sort(rank, descending=True, stable=True).indices[:num_queries].tolist()
        worst = [query for query in order if rank[query] > 0]

        def entry(query: int, direction: str = direction, rank: Tensor = rank) -> dict[str, Any]:
            if direction == "i2t":
                asked: dict[str, Any] = {"key": keys[query], "captions": list(captions[query])}
                answers = [
                    {
                        "caption": texts[text],
                        "key": keys[owners[text]],
                        "score": value,
                        "is_right": owners[text] == query,
                    }
                    for text, value in top_matches(score, query, len(texts), k, "row")
                ]
            else:
                asked = {"caption": texts[query], "key": keys[owners[query]]}
                answers = [
                    {"key": keys[image], "score": value, "is_right": owners[query] == image}
                    for image, value in top_matches(score, query, len(keys), k, "column")
                ]
            return {"query": asked, "rank": int(rank[query]) + 1, "answers": answers}

        found[direction] = {"chosen": [entry(q) for q in spread], "worst": [entry(q) for q in worst]}
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
