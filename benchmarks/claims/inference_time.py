"""How long DH-Set's comparison by sets and by hybrid vectors takes, and what comes before it: towers and heads.

Used by the experiment "sets". CPU time of one thread; what is in it is said with each figure.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetune.features import PartInputs
from setclip.models.pieces import unit
from setclip.models.set_model import SetModel

_FEW = 64
_ROWS = 500


@torch.no_grad()
def inference_seconds(model: SetModel, inputs: PartInputs, repeats: int) -> dict[str, Any]:
    """Returns CPU seconds of one thread for all pictures × all texts of `inputs`, whose features are kept.

    "towers" is measured on 64 pictures and texts and scaled up; "compare_sets" is (1/K) Σ cos(v, w_i) by K products,
    "compare_mean" the same by one product with the mean of the unit w_i, "compare_hybrid" one with unit(Σ w_i).
    """
    model.eval().cpu()
    assert inputs.images is not None
    assert inputs.texts is not None
    device = torch.device("cpu")
    images = [inputs.images.of(rows, device) for rows in torch.arange(len(inputs.images)).split(_ROWS)]
    texts = [inputs.texts.of(rows, device) for rows in torch.arange(len(inputs.texts)).split(_ROWS)]
    pixels = torch.zeros(_FEW, 3, model.backbone.image_size, model.backbone.image_size)
    few = inputs.all_texts[:_FEW]
    tokens = model.backbone.tokenizer(few)
    with _one_thread():
        vectors = torch.cat([model.images(each).sets[:, 0] for each in images])
        sets = torch.cat([model.texts(each).sets for each in texts])
        elements = unit(sets)
        mix = model.pair.text.hybrid
        mean, hybrid = elements.mean(1), mix(sets)
        by_element = [elements[:, k].contiguous() for k in range(elements.shape[1])]
        of_images = _seconds(lambda: model.backbone.image(pixels), repeats) * len(inputs.images) / _FEW
        of_texts = _seconds(lambda: model.backbone.text(tokens), repeats) * len(inputs.texts) / len(few)
        return {
            "towers": of_images + of_texts,
            "heads": _seconds(lambda: [model.images(e) for e in images] + [model.texts(e) for e in texts], repeats),
            "mixing": _seconds(lambda: mix(sets), repeats),
            "compare_sets": _seconds(lambda: sum(vectors @ each.T for each in by_element) / len(by_element), repeats),
            "compare_mean": _seconds(lambda: vectors @ mean.T, repeats),
            "compare_hybrid": _seconds(lambda: vectors @ hybrid.T, repeats),
            "images": len(vectors),
            "texts": len(sets),
            "elements": sets.shape[1],
            "width": sets.shape[2],
            "repeats": repeats,
        }


def _seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
