"""Features of images and texts from encode functions, in batches, with every sample counted.

Used by zero-shot classification and retrieval. `encode_functions` makes the two functions from a loaded model; any
other pair of functions with these signatures can be evaluated alike. All ranks of a `world` share the batches of one process
(`eval_suite.sharing`). Letters: B samples of a batch, N samples, D width.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval_suite.sharing import ALONE, gathered, own_run, together
from setclip import distributed
from setclip.checkpoint import LoadedModel
from setclip.distributed import World
from setclip.errors import InputError
from setclip.images import normalize
from setclip.log import Meter

EncodeImage = Callable[[Tensor], Tensor]
"""A batch of images as the caller has them (ours: (B, 3, height, width) uint8) to features, (B, …, D) float."""
EncodeText = Callable[[list[str]], Tensor]
"""B texts to features, (B, …, D) float."""


@dataclass(frozen=True)
class KeepsNorms:
    """An encode function whose features count as long as they are: samples of Gaussians, sub-spaces compared by inner products,
    patches before LAPS's choice. Features of others are brought to unit norm.
    """

    encode: Callable[[Any], Tensor]

    def __call__(self, batch: Any) -> Tensor:
        return self.encode(batch)


def encode_functions(loaded: LoadedModel) -> tuple[EncodeImage, EncodeText]:
    """Returns (encode_image, encode_text) of a model, on the device that its weights are on.

    Images are (B, 3, image_size, image_size) uint8, or (B, N, E) float of a model that takes regions. The model is neither put
    into eval mode nor moved.
    """
    device = next(loaded.model.parameters()).device

    def encode_image(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        pixels = images if loaded.takes_regions else normalize(images, loaded.mean, loaded.std)
        return loaded.model.encode_image(pixels, normalize=True)  # type: ignore[operator]

    def encode_text(texts: list[str]) -> Tensor:
        return loaded.model.encode_text(loaded.tokenizer(texts).to(device), normalize=True)  # type: ignore[operator]

    if getattr(loaded.model, "keeps_norms", False):
        return KeepsNorms(encode_image), KeepsNorms(encode_text)
    return encode_image, encode_text


def check_unit(encode: EncodeImage | EncodeText) -> None:
    """Raises InputError where features are no unit vectors, for what stores or searches such."""
    if isinstance(encode, KeepsNorms):
        raise InputError(
            "expected a model whose features are unit vectors, found one whose features count as long as they are (pcme, "
            "similarity laps, or DH-Set without cosines); evaluate it with `python -m eval_suite.retrieval --checkpoint`"
        )


def encode_images(
    encode_image: EncodeImage,
    batches: Iterable[Tensor],
    expected: int,
    show_progress: bool = True,
    world: World = ALONE,
) -> Tensor:
    """Returns the features of all images in `batches`, (N, …, D) float32 of unit norm, on the CPU (`KeepsNorms` aside).

    Where batches give sets of different sizes, zero vectors stand for the elements that are not there. The ranks of
    `world` share the batches, which must then be a sequence (`image_batches` gives one), and each returns all features.
    Raises InputError if N is not `expected`, or if a feature is not finite.
    """
    if world.size > 1:
        if not isinstance(batches, Sequence):
            raise InputError(
                f"expected batches that {world.size} ranks can share (a list, or what image_batches gives), found "
                f"{type(batches).__name__}, which can only be walked through; make a list of it"
            )
        batches = batches[own_run(len(batches), world)]
    return _encode(encode_image, ((batch, len(batch)) for batch in batches), expected, "image", show_progress, world)


def encode_texts(
    encode_text: EncodeText,
    texts: Sequence[str],
    batch_size: int = 256,
    show_progress: bool = True,
    world: World = ALONE,
) -> Tensor:
    """Returns the features of `texts`, (N, …, D) float32 of unit norm, on the CPU, as `encode_images` does."""
    parts = [list(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    parts = parts[own_run(len(parts), world)]
    return _encode(encode_text, ((part, len(part)) for part in parts), len(texts), "text", show_progress, world)


@torch.no_grad()
def _encode(encode, batches, expected: int, what: str, show_progress: bool, world: World) -> Tensor:
    # Ranks have equally many batches, give or take one, so rank 0 speaks for all.
    meter = Meter(-(-expected // world.size), f"encoding {what}s", f"{what}s") if show_progress else None
    parts: list[Tensor] = []
    try:
        with together(world):
            for batch, size in batches:
                features = encode(batch).float().cpu()
                if len(features) != size:
                    raise InputError(
                        f"expected encode_{what} to give {size} features for {size} {what}s, found {len(features)}; "
                        f"an encode function must keep its batch"
                    )
                keeps = isinstance(encode, KeepsNorms)
                parts.append(features if keeps else torch.nn.functional.normalize(features, dim=-1))
                if meter is not None:
                    meter.update(size)
    finally:
        if meter is not None:
            meter.close()
    features = _joined(parts, world)
    if len(features) != expected or len(features) == 0:
        raise InputError(
            f"expected features of {expected} {what}s, found {len(features)}; figures over other samples than the stated "
            "ones would not compare: check the data"
        )
    if not bool(features.isfinite().all()):
        bad = (~features.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise InputError(
            f"expected finite features, found NaN or infinite ones for {len(bad)} of {expected} {what}s (first: number "
            f"{bad[0]}); the model has diverged: evaluate an earlier checkpoint"
        )
    return features


def _joined(parts: list[Tensor], world: World) -> Tensor:
    """Returns the features of all batches of all ranks, in order; smaller sets get zero vectors behind."""
    shapes = {tuple(part.shape[1:]) for part in parts}
    if world.size > 1:
        shapes = set().union(*distributed.gather_objects(shapes))
    largest = largest_shape(shapes)
    own = torch.cat([_padded(part, largest) for part in parts]) if parts else torch.zeros(0, *largest)
    return gathered(own, world)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Returns features of batches, (B, …, D) each, together; smaller sets get zero vectors behind. Raises InputError as
    `largest_shape`.
    """
    largest = largest_shape({tuple(part.shape[1:]) for part in parts})
    return torch.cat([_padded(part, largest) for part in parts])


def largest_shape(shapes: Collection[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape that holds features of all these, (…, D). Raises InputError where they are of different kinds."""
    if len({(len(shape), shape[-1:]) for shape in shapes}) > 1:
        raise InputError(
            f"expected features of one width, single or in sets, found shapes {sorted(shapes)}; an encode function must "
            "give the same kind for each batch"
        )
    return tuple(map(max, zip(*shapes, strict=True)))


def _padded(features: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = [wanted - there for wanted, there in zip(shape, features.shape[1:], strict=True)]
    if not any(missing):
        return features
    return torch.nn.functional.pad(features, [amount for size in reversed(missing) for amount in (0, size)])
