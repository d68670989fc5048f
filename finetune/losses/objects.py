"""How many objects images and texts of a batch share: soft targets, and pairs that are not to count as negatives.

Object-IoU is the idea of AlignCLIP (Zhang et al., ACM MM 2024); that it masks negatives of the triplet loss is ours.
Letters: B images, T texts, M objects of a caption (padded).
"""

import torch
from torch import Tensor

from pretrain.losses import ObjectWeights
from pretrain.losses.similarity import AtLeast
from setclip.errors import InputError


def shared_and_union(
    image_objects: Tensor, text_objects: Tensor, weights: ObjectWeights | None = None
) -> tuple[Tensor, Tensor]:
    """Returns |A ∩ B| and |A ∪ B| of all pairs, (B, T) float64 each, or with `weights` the sums of what objects count.

    `image_objects`: (B, M) and `text_objects`: (T, M') int64 ids, negative ones are padding; repeated ids count once.
    """
    for name, ids in (("image", image_objects), ("text", text_objects)):
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise InputError(
                f"expected {name} objects (N, M) int64, found {tuple(ids.shape)} of {ids.dtype}; pad with -1"
            )
    used = torch.cat((image_objects[image_objects >= 0], text_objects[text_objects >= 0]))
    vocabulary = used.unique()
    counts = vocabulary.new_ones(len(vocabulary), dtype=torch.float64)
    if weights is not None:
        counts = weights.look_up(vocabulary)
    images, texts = (_indicators(ids, vocabulary) for ids in (image_objects, text_objects))
    shared = (images * counts) @ texts.T
    return shared, (images @ counts)[:, None] + texts @ counts - shared


def object_iou(image_objects: Tensor, text_objects: Tensor, weights: ObjectWeights | None = None) -> Tensor:
    """Returns the IoU of all pairs of object sets, (B, T) float64; 0 where nothing is shared. Inputs as above."""
    shared, union = shared_and_union(image_objects, text_objects, weights)
    return torch.where(shared > 0, shared / union.where(shared > 0, torch.ones_like(union)), 0.0)


def share_objects(
    image_objects: Tensor, text_objects: Tensor, threshold: float = 0.5, weights: ObjectWeights | None = None
) -> Tensor:
    """Returns (B, T) bool, True where the IoU is at least `threshold`, for `Pairs.excluded`. Inputs as above."""
    if not 0 < threshold <= 1:
        raise InputError(f"expected a threshold in (0, 1], found {threshold}; 1 takes equal sets alone")
    if weights is not None:
        return AtLeast(threshold).from_iou(object_iou(image_objects, text_objects, weights)) > 0
    return AtLeast(threshold).from_counts(*shared_and_union(image_objects, text_objects)) > 0


def _indicators(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """Returns (N, V) float64, 1 where a row has an object."""
    found = torch.zeros(len(ids), len(vocabulary) + 1, dtype=torch.float64, device=ids.device)
    places = torch.searchsorted(vocabulary, ids).masked_fill(ids < 0, len(vocabulary))
    return found.scatter_(1, places, 1.0)[:, :-1]
