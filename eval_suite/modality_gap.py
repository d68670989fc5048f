"""The modality gap: images and texts of a model lie apart in the common space, each on a cone of its own.

Liang et al. 2022, "Mind the Gap" (arXiv 2203.02053). Letters: N images, N' texts, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from setclip.errors import InputError


@dataclass(frozen=True)
class ModalityGap:
    """Where images and texts lie to each other; all of unit vectors."""

    distance: float
    """Between the centroids of images and of texts, 0 to 2."""
    constant_share: float
    """Of the mean squared distance of matched pairs, how much is the distance of the centroids of the pairs: 1 if the
    difference text − image is the same vector for all pairs, 0 if it has no common part."""
    matched_cosine: float
    """Mean over image–text pairs that belong together."""
    unmatched_cosine: float | None
    """Mean over all image–text pairs that do not; None with a single image."""
    image_cone: float
    """Length of the images' centroid: 1 if all are the same, near 0 if they point everywhere."""
    text_cone: float
    num_images: int
    num_texts: int


def modality_gap(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> ModalityGap:
    """Returns the gap, computed in float64 over all pairs.

    `image_features` (N, D), `text_features` (N', D), brought to unit norm; `image_of_text` (N',) int64. Sets are given
    by one vector each (`central_vectors`).
    """
    if image_features.ndim != 2 or text_features.ndim != 2 or not len(image_features) or not len(text_features):
        raise InputError(
            f"expected single vectors (N, D) of images and texts, found {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}; of sets take their central vectors"
        )
    images = torch.nn.functional.normalize(image_features.double(), dim=-1)
    texts = torch.nn.functional.normalize(text_features.double(), dim=-1)
    own = images[image_of_text]
    matched = (own * texts).sum(-1)
    image_centre, text_centre = images.mean(0), texts.mean(0)
    differences = texts - own
    mean_square = differences.square().sum(-1).mean()
    num_unmatched = len(images) * len(texts) - len(texts)
    unmatched = (images.sum(0) @ texts.sum(0) - matched.sum()) / num_unmatched if num_unmatched else None
    return ModalityGap(
        distance=(text_centre - image_centre).norm().item(),
        constant_share=(differences.mean(0).square().sum() / mean_square).item() if mean_square > 0 else 0.0,
        matched_cosine=matched.mean().item(),
        unmatched_cosine=None if unmatched is None else unmatched.item(),
        image_cone=image_centre.norm().item(),
        text_cone=text_centre.norm().item(),
        num_images=len(images),
        num_texts=len(texts),
    )


def central_vectors(features: Tensor) -> Tensor:
    """Returns (N, D) unit vectors: single vectors as they are, sets (N, K, D) by the direction of their mean."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return unit if unit.ndim == 2 else torch.nn.functional.normalize(unit.sum(1), dim=-1)
