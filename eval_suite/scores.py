"""Scores of images against texts, in blocks: what an evaluation ranks by, whatever the similarity.

A Score is a function of a block, so no more than a block need exist at a time, and a similarity of single vectors, of
sets or of fragments that are judged jointly is all the same to ranks and protocols. Letters: N images or texts, K
elements of a set, D width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from setclip.errors import InputError

Score = Callable[[slice, slice], Tensor]
"""`score(rows, columns)` gives the scores of these rows against these columns, (rows, columns) float32; higher is
more alike. Rows are images; columns are texts or classes. The same call must give the same numbers each time."""

MakeScore = Callable[[Tensor, Tensor], Score]
"""Image features and text features, (N, …, D) float32 each, to the Score of a similarity."""

JointScore = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
"""`score(images, texts, masks)` judges fragments jointly: images (R, K, D), texts (C, K', D), and masks (R, K) and
(C, K') bool, true where an element is one; gives (R, C)."""

BLOCK_SIZE = 500
"""Images and texts a block. Folds of 1,000 images with five captions each are whole blocks of it, so that a protocol on
folds finds the scores that the whole gallery's has computed (`remembered`)."""

FEW_SCORES = 2**25
"""128 MB: what ranking by one protocol keeps, the blocks that hold right pairs."""


def dot_scores(rows: Tensor, columns: Tensor) -> Score:
    """Returns the Score of dot products of unit vectors: `rows` (N, D) and `columns` (N', D), float.

    Sums are formed in float64 and rounded to float32. A float32 product depends in its last bits on the shape of the
    block that it is computed in, so that equal vectors would tie in one block and not in the next; this way ties,
    and so ranks, do not depend on the block size. Raises InputError on sets.
    """
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise InputError(
            f"expected single vectors of one width, found images {tuple(rows.shape)} and texts {tuple(columns.shape)}; "
            "sets of vectors need a similarity of sets (--similarity)"
        )
    rows64, columns64 = rows.double(), columns.double()
    return lambda r, c: (rows64[r] @ columns64[c].T).float()


def joint_scores(score: JointScore) -> MakeScore:
    """Returns a MakeScore from a function that judges pairs jointly (fragments against fragments).

    Elements that are not there are zero vectors, as `encode_images` and `encode_texts` pad with; the masks say so.
    """

    def make_score(image_features: Tensor, text_features: Tensor) -> Score:
        image_mask, text_mask = image_features.any(-1), text_features.any(-1)
        return lambda r, c: score(image_features[r], text_features[c], (image_mask[r], text_mask[c]))

    return make_score


def remembered(score: Score, max_scores: int = FEW_SCORES) -> Score:
    """Returns the same Score, which keeps the blocks that it has computed, up to `max_scores` numbers of 4 bytes.

    Ranking needs the scores of right pairs before it can count, and protocols look at the same blocks again.
    """
    kept: dict[tuple[int, int, int, int], Tensor] = {}
    room = max_scores

    def remembering(rows: slice, columns: slice) -> Tensor:
        nonlocal room
        place = (rows.start, rows.stop, columns.start, columns.stop)
        found = kept.get(place)
        if found is None:
            found = score(rows, columns).float().cpu()
            if found.numel() <= room:
                kept[place], room = found, room - found.numel()
        return found

    return remembering


def blocks(num_rows: int, num_columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yields the blocks (rows, columns) that cover all scores, row by row of blocks."""
    for rows in pieces(0, num_rows, size):
        for columns in pieces(0, num_columns, size):
            yield rows, columns


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Returns the slices of at most `size` that cover start to stop."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def checked(score: Score, rows: slice, columns: slice) -> Tensor:
    """Returns a block of scores, float32 on the CPU. Raises InputError on one that is not finite.

    A NaN compares as neither better nor equal and would count as a perfect rank.
    """
    scores = score(rows, columns).float().cpu()
    expected = (rows.stop - rows.start, columns.stop - columns.start)
    assert scores.shape == expected, f"score gave {tuple(scores.shape)} for a block of {expected}"
    if not bool(scores.isfinite().all()):
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"expected finite scores, found {scores[row, column].item()} for row {rows.start + row} and column"
            f" {columns.start + column}; the model gives NaN or infinite features: evaluate an earlier checkpoint"
        )
    return scores


def top_matches(score: Score, query: int, gallery_size: int, k: int, axis: str) -> list[tuple[int, float]]:
    """Returns (index, score) of the `k` best answers of one query, best first; of equal scores the lower index first.

    `axis` says what the query is: "row" (an image, answers are columns) or "column" (a text, answers are rows).
    """
    everything, one = slice(0, gallery_size), slice(query, query + 1)
    scores = score(one, everything)[0] if axis == "row" else score(everything, one)[:, 0]
    values, indices = torch.sort(scores, descending=True, stable=True)
    return list(zip(indices[:k].tolist(), values[:k].tolist(), strict=True))
