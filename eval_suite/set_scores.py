"""Scores of sets of embeddings for retrieval's metrics: any similarity of `setclip.similarity` as a `Score`.

Used by retrieval of set embeddings and by search. A score does not depend on the block that it is asked in, and equal sets
score equally, so neither do ties and ranks. Letters: Ni images, Nt texts, Ki and Kt elements in their sets, D width.
"""

import torch
from torch import Tensor

from eval_suite.metrics import Score, dot_scores
from setclip.models.matching import score_matrix
from setclip.similarity.base import GridSimilarity, SetSimilarity, VectorSimilarity
from setclip.similarity.blocks import Tiles


@torch.no_grad()
def set_scores(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    keep_bytes: int = 2**30,
) -> Score:
    """Returns the Score of image sets (rows), (Ni, Ki, D), with text sets (columns), (Nt, Kt, D), as `forward` takes them.

    Similarities of one vector a set are `dot_scores` of those vectors: sums in float64, rounded. Those of a grid are made in
    float32, in fixed tiles, as `similarity_matrix` does. Where all scores fit into `keep_bytes` each tile is made once
    and kept, since counting ranks asks for many twice; else it is made whenever it is asked for. Matching of fragments is
    made whenever it is asked for, too.
    """
    if isinstance(similarity, VectorSimilarity):
        images, texts = similarity.checked(image_sets, text_sets, image_mask, text_mask)
        dots = dot_scores(
            similarity.image_vectors(images, image_mask).cpu(), similarity.text_vectors(texts, text_mask).cpu()
        )
        divisor = similarity.divisor(image_mask, text_mask)
        if divisor is None:
            return dots
        of_pair = divisor.float().cpu().expand(len(images), len(texts))
        return lambda rows, columns: dots(rows, columns) / of_pair[rows, columns]
    if not isinstance(similarity, GridSimilarity):
        return _fragment_scores(similarity, image_sets, text_sets, image_mask, text_mask)
    tiles = Tiles(similarity, image_sets, text_sets, image_mask, text_mask)
    if 4 * len(image_sets) * len(text_sets) > keep_bytes:
        return lambda rows, columns: tiles.scores(rows, columns).cpu()
    return _Kept(tiles)


def _fragment_scores(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> Score:
    """Returns the Score of fragment matching, made whenever it is asked for, in blocks that memory can hold.

    An image or a text is compared by itself, so that only the rounding of sums can differ between blocks.
    """
    similarity.eval()

    def score(rows: slice, columns: slice) -> Tensor:
        with torch.no_grad():
            mask = None if image_mask is None else image_mask[rows]
            other = None if text_mask is None else text_mask[columns]
            return score_matrix(similarity, image_sets[rows], text_sets[columns], mask, other).cpu()

    return score


class _Kept:
    """Scores that are kept once they are made, tile by tile."""

    def __init__(self, tiles: Tiles):
        self.tiles = tiles
        images, texts = (len(sets) for sets in tiles.sets)
        self.scores = torch.empty(images, texts)
        height, width = tiles.sizes
        self.is_made = torch.zeros(-(-images // height), -(-texts // width), dtype=torch.bool)

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        height, width = self.tiles.sizes
        # Texts outside: their elements are laid out anew for each range of columns.
        for column in range(columns.start // width, -(-columns.stop // width)):
            lacking = [
                row for row in range(rows.start // height, -(-rows.stop // height)) if not self.is_made[row, column]
            ]
            if not lacking:
                continue
            # one range, which may make again what lies between: blocks are asked for in order, so it does not
            first, last = lacking[0] * height, min((lacking[-1] + 1) * height, len(self.scores))
            across = slice(column * width, min((column + 1) * width, self.scores.shape[1]))
            self.scores[first:last, across] = self.tiles.scores(slice(first, last), across).cpu()
            self.is_made[lacking[0] : lacking[-1] + 1, column] = True
        return self.scores[rows, columns]
