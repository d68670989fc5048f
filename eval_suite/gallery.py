"""Retrieved pictures and captions for reports: some queries with their best answers, and the worst failures.

Used by the command of retrieval, which writes them beside the results.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval_suite.metrics import Ranks, Score, top_matches


def gallery(
    score: Score,
    i2t: Ranks,
    t2i: Ranks,
    image_of_text: Tensor,
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    num_queries: int = 12,
    k: int = 5,
) -> dict[str, Any]:
    """Returns, for each direction, queries spread evenly over the data ("chosen") and those ranked worst ("worst").

    Each query has its image key or caption, its 1-based rank (ties against us) and its `k` best answers with key,
    caption, score and whether they are right.
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
    return found
