"""Pictures of what a trained head does, from what it gives out: where slots look, and which dimensions sub-spaces use.

Joins `setclip.models.heads` and the drawings of `overlays`, which know nothing of each other; for reports and diagnostics.
Letters: B samples, K elements of a set, N inputs of a sample, D width.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from eval_suite.overlays import attention_cards, key_overlap, overlap_picture, profile_cosines, profile_picture
from setclip.errors import InputError
from setclip.models.heads import HeadOutput
from setclip.models.subspaces import SubSpaces
from setclip.report import SampleCard


def slot_cards(
    output: HeadOutput,
    photos: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    grid: tuple[int, int],
    scale: Literal["each", "common"] = "each",
) -> list[list[SampleCard]]:
    """Returns for each sample of a batch its photograph and where each element of its set looks, for a report.

    `output`: of an image head with attention over a grid, B samples. `photos`: B squares, (H, W, 3) uint8, as the model saw
    them. `grid`: rows and columns of patches, without a class token. Raises InputError where the head has no attention.
    """
    if output.attention is None:
        raise InputError(
            "expected a head that attends to its inputs (slot, transformer, pie), found one without attention; take one of "
            "those"
        )
    if not len(output.attention) == len(photos) == len(captions):
        raise InputError(
            f"expected photographs and captions of {len(output.attention)} samples, found {len(photos)} and "
            f"{len(captions)}; give those of the batch"
        )
    attention = output.attention.float().cpu().numpy()
    return [
        attention_cards(photo, of_sample, grid, caption, scale)
        for photo, of_sample, caption in zip(photos, attention, captions, strict=True)
    ]


def slot_words(output: HeadOutput, words: Sequence[Sequence[str]], top: int = 3) -> list[list[list[tuple[str, float]]]]:
    """Returns for each text and each element of its set the `top` words that it takes most of, with their shares.

    `output`: of a text head with attention, whose masked places come last; `words`: of each text, in the order of its
    inputs.
    """
    if output.attention is None or len(output.attention) != len(words):
        found = "none" if output.attention is None else f"that of {len(output.attention)} texts"
        raise InputError(
            f"expected attention of {len(words)} texts, found {found}; take a slot, transformer or pie head"
        )
    result = []
    for of_text, own in zip(output.attention.float().cpu(), words, strict=True):
        if not 0 < len(own) <= of_text.shape[1]:
            raise InputError(
                f"expected 1 to {of_text.shape[1]} words of a text, found {len(own)}; give as many as the head had inputs"
            )
        order = of_text[:, : len(own)].argsort(dim=1, descending=True, stable=True)[:, :top]
        result.append(
            [[(own[i], float(row[i])) for i in best.tolist()] for row, best in zip(of_text, order, strict=True)]
        )
    return result


def subspace_pictures(subspaces: SubSpaces, top: int = 100) -> list[Markup]:
    """Returns three drawings: the sub-spaces' profiles, how many of their `top` dimensions they share (a tenth of D at
    most), and the cosines of their profiles, which are near 1 where they have collapsed.
    """
    profiles = subspaces.profiles().detach().double().cpu().numpy()
    top = max(1, min(top, profiles.shape[1] // 10))
    return [
        profile_picture(profiles, "What each sub-space makes of each dimension"),
        overlap_picture(key_overlap(profiles, top), f"Share of the {top} largest dimensions in common"),
        overlap_picture(profile_cosines(profiles), "Cosines of profiles"),
    ]
