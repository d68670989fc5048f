"""Features of images and texts from encode functions, in batches, with every sample counted.

Used by zero-shot classification and retrieval. `encode_functions` makes the two functions from a loaded model; any
other pair of functions with these signatures can be evaluated alike. Letters: B samples of a batch, N samples, D width.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from setclip.checkpoint import LoadedModel
from setclip.errors import InputError
from setclip.images import normalize
from setclip.log import Meter

EncodeImage = Callable[[Tensor], Tensor]
"""A batch of images as the caller has them (ours: (B, 3, height, width) uint8) to features, (B, …, D) float."""
EncodeText = Callable[[list[str]], Tensor]
"""B texts to features, (B, …, D) float."""


def encode_functions(loaded: LoadedModel) -> tuple[EncodeImage, EncodeText]:
    """Returns (encode_image, encode_text) of a model, on the device that its weights are on.

    Images are (B, 3, image_size, image_size) uint8. The model is neither put into eval mode nor moved.
    """
    device = next(loaded.model.parameters()).device

    def encode_image(images: Tensor) -> Tensor:
        pixels = normalize(images.to(device, non_blocking=True), loaded.mean, loaded.std)
        return loaded.model.encode_image(pixels, normalize=True)  # type: ignore[operator]

    def encode_text(texts: list[str]) -> Tensor:
        return loaded.model.encode_text(loaded.tokenizer(texts).to(device), normalize=True)  # type: ignore[operator]

    return encode_image, encode_text


def encode_images(
    encode_image: EncodeImage, batches: Iterable[Tensor], expected: int, show_progress: bool = True
) -> Tensor:
    """Returns the features of all images in `batches`, (N, …, D) float32 of unit norm, on the CPU.

    Raises InputError if N is not `expected`, or if a feature is not finite.
    """
    return _encode(encode_image, ((batch, len(batch)) for batch in batches), expected, "image", show_progress)


def encode_texts(
    encode_text: EncodeText, texts: Sequence[str], batch_size: int = 256, show_progress: bool = True
) -> Tensor:
    """Returns the features of `texts`, (N, …, D) float32 of unit norm, on the CPU. Raises as `encode_images`."""
    parts = (list(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size))
    return _encode(encode_text, ((part, len(part)) for part in parts), len(texts), "text", show_progress)


@torch.no_grad()
def _encode(encode, batches, expected: int, what: str, show_progress: bool) -> Tensor:
    meter = Meter(expected, f"encoding {what}s", f"{what}s") if show_progress else None
    parts: list[Tensor] = []
    num_encoded = 0
    try:
        for batch, size in batches:
            features = encode(batch).float().cpu()
            if len(features) != size:
                raise InputError(
                    f"expected encode_{what} to give {size} features for {size} {what}s, found {len(features)}; "
                    f"an encode function must keep its batch"
                )
            parts.append(torch.nn.functional.normalize(features, dim=-1))
            num_encoded += size
            if meter is not None:
                meter.update(size)
    finally:
        if meter is not None:
            meter.close()
    if num_encoded != expected or not parts:
        raise InputError(
            f"expected features of {expected} {what}s, found {num_encoded}; figures over other samples than the stated "
            "ones would not compare: check the data"
        )
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        bad = (~features.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise InputError(
            f"expected finite features, found NaN or infinite ones for {len(bad)} of {expected} {what}s (first: number "
            f"{bad[0]}); the model has diverged: evaluate an earlier checkpoint"
        )
    return features
