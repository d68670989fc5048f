"""How far the two parsers agree about captions. Used by `data_prep.parse_llm` and its page."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from data_prep.parallel import run_tasks
from setclip.shards import Shard


def agreement(shards: Sequence[Shard], processes: int) -> dict[str, Any]:
    """Returns how far two parsers agree: the mean over captions of the IoU of their objects, 1 where both found none.

    `equal` counts captions of equal sets, `empty` those of them without any object; `pos` and `llm` are mean set sizes.
    """
    tasks = [partial(_agreement, shard) for shard in shards]
    total: Counter[str] = Counter()
    for each in run_tasks(tasks, processes, description="comparing parsers", sizes=[1] * len(tasks), unit="shards"):
        total.update(each)
    captions = max(total["captions"], 1)
    return {
        "captions": int(total["captions"]),
        "mean_iou": total["iou"] / captions,
        "equal": int(total["equal"]),
        "empty": int(total["empty"]),
        "pos_objects_a_caption": total["pos"] / captions,
        "llm_objects_a_caption": total["llm"] / captions,
    }


def iou(one: Sequence[str], other: Sequence[str]) -> float:
    """Returns the intersection over the union of two sets of objects; 1 where both are empty."""
    union = len(set(one) | set(other))
    return len(set(one) & set(other)) / union if union else 1.0


def _agreement(shard: Shard) -> Counter[str]:
    lists = shard.object_lists()
    total: Counter[Any] = Counter()
    for by_pos, by_llm in zip(lists["pos"].to_pylist(), lists["llm"].to_pylist(), strict=True):
        for one, other in zip(by_pos or [], by_llm or [], strict=True):
            same = iou(one, other)
            total.update({"captions": 1, "iou": same, "equal": same == 1, "empty": not one and not other})
            total.update({"pos": len(one), "llm": len(other)})
    return total
