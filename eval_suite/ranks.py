"""Where right answers stand: ranks by counting what scores higher, so that nothing is sorted.

No more than one block of scores exists at a time. Used by zero-shot classification, retrieval and the evaluations that
training makes on its way. Letters: N queries, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval_suite.scores import BLOCK_SIZE, Score, blocks, checked, pieces
from eval_suite.sharing import ALONE, largest, own_run, summed, together
from setclip.distributed import World
from setclip.errors import InputError

TieRule = Literal["pessimistic", "first_come", "optimistic"]
TIE_RULES: dict[TieRule, str] = {
    "pessimistic": "equal scores count against the right answer",
    "first_come": "of equal scores the one with the lower index comes first",
    "optimistic": "equal scores count for the right answer",
}


@dataclass(frozen=True)
class Ranks:
    """For each of N queries, what stands before its (best) right answer; three (N,) int64 counts."""

    better: Tensor
    """Wrong answers that score higher than the best right one."""
    equal_before: Tensor
    """Wrong answers with exactly its score and a lower index."""
    equal: Tensor
    """Wrong answers with exactly its score."""

    def by(self, rule: TieRule) -> Tensor:
        """Returns the 0-based ranks, (N,) int64, under one rule for equal scores."""
        if rule == "pessimistic":
            return self.better + self.equal
        return self.better + self.equal_before if rule == "first_come" else self.better


def retrieval_ranks(
    score: Score, image_of_text: Tensor, num_images: int, block_size: int = BLOCK_SIZE, world: World = ALONE
) -> tuple[Ranks, Ranks]:
    """Returns the ranks image→text (one query an image, its best caption counts) and text→image (one query a text).

    `image_of_text`: (number of texts,) int64, the image that each text belongs to; an image may have several texts and
    needs at least one. Texts in the order of their images are cheapest: blocks that hold a right pair are asked for
    twice (`eval_suite.scores.remembered` keeps them), all others once. At most `block_size`² scores exist at a time.
    The ranks of `world` share the blocks; each returns the whole result. Raises InputError on an image without text and
    on a score that is not finite.
    """
    num_texts = len(image_of_text)
    if num_texts == 0 or not bool(((image_of_text >= 0) & (image_of_text < num_images)).all()):
        raise InputError(
            f"expected texts of images 0 to {num_images - 1}, found {num_texts} texts of others; check both"
        )
    without = torch.bincount(image_of_text, minlength=num_images).eq(0).nonzero().flatten().tolist()
    if without:
        raise InputError(
            f"expected a text for each of {num_images} images, found none for {len(without)} of them"
            f" (first: number {without[0]}); leave such images out"
        )

    every_block = list(blocks(num_images, num_texts, block_size))
    own_blocks = every_block[own_run(len(every_block), world)]

    # Pass 1: the score of each right pair, from the blocks that hold one.
    own = torch.full((num_texts,), -torch.inf)  # of each text with its image
    with together(world):
        for rows, columns in own_blocks:
            owner = image_of_text[columns]
            inside = ((owner >= rows.start) & (owner < rows.stop)).nonzero().flatten()
            if len(inside):
                found = checked(score, rows, columns)[owner[inside] - rows.start, inside]
                own[inside + columns.start] = found
    own = largest(own, world)
    best = torch.full((num_images,), -torch.inf)  # of each image with its best text
    best.scatter_reduce_(0, image_of_text, own, "amax")
    is_best = own == best[image_of_text]
    texts = torch.arange(num_texts)
    first_best = torch.full((num_images,), num_texts)  # the first text with that score
    first_best.scatter_reduce_(0, image_of_text[is_best], texts[is_best], "amin")

    # Pass 2: count what stands before it, in both directions at once.
    of_images, of_texts = (
        torch.zeros((3, num_images), dtype=torch.int64),
        torch.zeros((3, num_texts), dtype=torch.int64),
    )
    i2t, t2i = Ranks(*of_images), Ranks(*of_texts)
    images = torch.arange(num_images)
    with together(world):
        for rows, columns in own_blocks:
            scores = checked(score, rows, columns)
            wrong = image_of_text[columns] != images[rows, None]
            i2t.better[rows] += (wrong & (scores > best[rows, None])).sum(1)
            t2i.better[columns] += (wrong & (scores > own[columns])).sum(0)
            equal = wrong & (scores == best[rows, None])
            i2t.equal[rows] += equal.sum(1)
            i2t.equal_before[rows] += (equal & (texts[columns] < first_best[rows, None])).sum(1)
            equal = wrong & (scores == own[columns])
            t2i.equal[columns] += equal.sum(0)
            t2i.equal_before[columns] += (equal & (images[rows, None] < image_of_text[columns])).sum(0)
    return Ranks(*summed(of_images, world)), Ranks(*summed(of_texts, world))


def class_ranks(score: Score, labels: Tensor, num_classes: int, block_size: int = 2048) -> tuple[Ranks, Tensor]:
    """Returns the rank of each image's class among all classes, and the predicted classes, (N,) int64.

    `labels`: (N,) int64 in [0, C). Of several classes with the highest score the first is predicted. `block_size` is
    in images. Raises InputError on a score that is not finite.
    """
    if len(labels) == 0 or not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise InputError(f"expected labels in [0, {num_classes}) of at least one image, found {len(labels)} labels")
    ranks = Ranks(*torch.zeros((3, len(labels)), dtype=torch.int64))
    predicted = torch.zeros(len(labels), dtype=torch.int64)
    classes = torch.arange(num_classes)
    for rows in pieces(0, len(labels), block_size):
        scores, label = checked(score, rows, slice(0, num_classes)), labels[rows, None]
        own = scores.gather(1, label)
        equal = (scores == own) & (classes != label)
        ranks.better[rows] = (scores > own).sum(1)
        ranks.equal[rows] = equal.sum(1)
        ranks.equal_before[rows] = (equal & (classes < label)).sum(1)
        # torch.argmax does not say which of equal values it returns
        is_highest = scores == scores.amax(1, keepdim=True)
        predicted[rows] = torch.where(is_highest, classes, num_classes).amin(1)
    return ranks, predicted
