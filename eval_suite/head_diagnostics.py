"""What the heads of a fine-tuned model do: where elements of sets look, which words they take, and sub-spaces.

    found = diagnose_head(loaded, ShardImages(shards, model_pictures(loaded)), captions)

Figures are over a few hundred pictures and their first captions, spread evenly over the data; pictures and tables are of some
of these. Used by the command of diagnostics and by the demo. Letters: K elements of a set, N inputs (patches, words).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from eval_suite.head_pictures import slot_cards, slot_words, subspace_pictures
from eval_suite.results import Metric
from eval_suite.set_diagnostics import CircularVariance, circular_variance
from setclip.checkpoint import LoadedModel
from setclip.files import write_json
from setclip.images import normalize
from setclip.models.heads import HeadOutput
from setclip.models.set_model import SetModel
from setclip.models.subspaces import SubSpaces
from setclip.report import SampleCard

LOOKED_AT = 256
"""Pictures, and captions, that figures are over, where there are so many."""
TOP_WORDS = 3
_SIDE = 160  # pictures are shown at least so large, in pixels
_AT_A_TIME = 64


@dataclass(frozen=True)
class Attention:
    """Where the K elements of sets look, over some samples of one side."""

    places: list[float]
    """Of each element, how many inputs it looks at: the exponential of the entropy of its attention, a mean over samples"""
    inputs: float
    """How many there are: the most that `places` can be"""
    overlap: float | None
    """Of two elements' attention, Σ over inputs of the smaller one, a mean over pairs and samples: 1 where all elements look
    alike, 0 where no two share an input; None of one element"""
    samples: int


@dataclass(frozen=True)
class CaptionWords:
    """A caption, and for each element of its set the words that it takes most of, with their shares."""

    caption: str
    of_elements: list[list[tuple[str, float]]]


@dataclass(frozen=True)
class HeadDiagnostics:
    """What was found. What a head does not have is empty or None, and `missing` says why."""

    head: str
    image: Attention | None = None
    text: Attention | None = None
    cards: list[list[SampleCard]] = field(default_factory=list)
    """Of each picture that is shown, itself and where each element looks"""
    words: list[CaptionWords] = field(default_factory=list)
    """Of the first captions of these pictures"""
    favourites: list[list[tuple[str, float]]] = field(default_factory=list)
    """Of each element of a text, the words that it takes most of over all captions looked at, with their shares"""
    text_variance: CircularVariance | None = None
    """Of the sub-spaces' vectors of a text, of DH-Set, where evaluation compares their sum alone"""
    subspaces: dict[str, float] = field(default_factory=dict)
    """`SubSpaces.statistics`"""
    drawings: list[Markup] = field(default_factory=list)
    """`subspace_pictures`"""
    missing: list[str] = field(default_factory=list)


def diagnose_head(
    loaded: LoadedModel,
    images: Dataset[Tensor],
    captions: Sequence[Sequence[str]],
    num_shown: int = 6,
    scale: Literal["each", "common"] = "each",
) -> HeadDiagnostics:
    """Returns the diagnostics of a fine-tuned model's heads on pictures with captions.

    `images`: (3, S, S) uint8 as the model takes them, in the order of `captions`; `loaded.model` is a SetModel. `num_shown`:
    pictures that are drawn; `scale`: of `attention_overlays`.
    """
    model = loaded.model
    assert isinstance(model, SetModel)
    rows = spread(len(captions), LOOKED_AT)
    shown = [rows[i] for i in spread(len(rows), num_shown)]
    missing: list[str] = []
    name = model.settings.name
    image, cards = _image_side(model, loaded, images, captions, rows, shown, scale, missing)
    text, words, favourites, variance = _text_side(model, captions, rows, shown, missing)
    sides = [side for side, found in (("pictures", image), ("captions", text)) if found is None]
    if sides:
        missing.append(
            f"Where elements look and which words they take: of {' and '.join(sides)} the head {name} has no attention (slot, "
            "transformer and pie have)."
        )
    subspaces = getattr(model.pair.text, "subspaces", None)
    drawings: list[Markup] = []
    if not isinstance(subspaces, SubSpaces):
        subspaces = None
        missing.append(f"Sub-spaces are DH-Set's; the head {name} has none.")
    elif subspaces.row_activation == "identity":
        missing.append("Pictures of sub-spaces: with row_activation identity profiles are negative in part.")
    else:
        drawings = subspace_pictures(subspaces)
    return HeadDiagnostics(
        head=name,
        image=image,
        text=text,
        cards=cards,
        words=words,
        favourites=favourites,
        text_variance=variance,
        subspaces={} if subspaces is None else subspaces.statistics(),
        drawings=drawings,
        missing=missing,
    )


def spread(number: int, most: int) -> list[int]:
    """Returns `most` places, or all, spread evenly over `number`."""
    wanted = min(number, most)
    return [i * number // wanted for i in range(wanted)]


# --- sides


@torch.no_grad()
def _image_side(
    model: SetModel,
    loaded: LoadedModel,
    images: Dataset[Tensor],
    captions: Sequence[Sequence[str]],
    rows: Sequence[int],
    shown: Sequence[int],
    scale: Literal["each", "common"],
    missing: list[str],
) -> tuple[Attention | None, list[list[SampleCard]]]:
    device = next(model.parameters()).device
    sums, cards = _Sums(), list[list[SampleCard]]()
    for start in range(0, len(rows), _AT_A_TIME):
        own = rows[start : start + _AT_A_TIME]
        pictures = torch.stack([images[row] for row in own])
        features = model.backbone.image(normalize(pictures.to(device), loaded.mean, loaded.std))
        output = model.images(features)
        if output.attention is None:
            return None, []
        sums.add(output.attention, None)
        drawn = [i for i, row in enumerate(own) if row in set(shown)]
        if not drawn:
            continue
        number = output.attention.shape[2]
        side = round(number**0.5)
        if features.mask is not None or side * side != number:
            # not all places are of one grid: a class token among them, or several maps
            missing.append(
                f"Overlays on pictures: the {number:,} inputs of the image head are not places of one square grid."
            )
            shown = ()
            continue
        some = HeadOutput(output.sets[drawn], attention=output.attention[drawn])
        photos = [_enlarged(pictures[i].permute(1, 2, 0).numpy()) for i in drawn]
        cards += slot_cards(some, photos, [_first(captions[own[i]]) for i in drawn], (side, side), scale)
    return sums.attention, cards


@torch.no_grad()
def _text_side(
    model: SetModel,
    captions: Sequence[Sequence[str]],
    rows: Sequence[int],
    shown: Sequence[int],
    missing: list[str],
) -> tuple[Attention | None, list[CaptionWords], list[list[tuple[str, float]]], CircularVariance | None]:
    backbone, device = model.backbone, next(model.parameters()).device
    texts = [_first(captions[row]) for row in rows if captions[row]]
    shown_texts = {_first(captions[row]) for row in shown if captions[row]}
    sums, found, sets = _Sums(), [], []
    taken: list[Counter[str]] = []
    for start in range(0, len(texts), _AT_A_TIME):
        own = texts[start : start + _AT_A_TIME]
        features = backbone.text(backbone.tokenizer(own).to(device))
        output = model.texts(features)
        sets.append(output.sets.float().cpu())
        if output.attention is None:
            continue
        sums.add(output.attention, features.mask)
        words = backbone.words_of(own)
        if words is None:
            continue
        for text, of_elements in zip(own, slot_words(output, words, top=10**9), strict=True):
            taken += [Counter() for _ in range(len(of_elements) - len(taken))]
            for counter, shares in zip(taken, of_elements, strict=True):
                for word, share in shares:
                    counter[word] += share  # type: ignore[assignment]
            if text in shown_texts:
                shown_texts.discard(text)
                found.append(CaptionWords(text, [shares[:TOP_WORDS] for shares in of_elements]))
    if sums.attention is not None and not taken:
        missing.append("Words: this backbone does not tell which words its inputs are.")
    favourites = [[(word, share / len(texts)) for word, share in counter.most_common(5)] for counter in taken]
    # elsewhere the features are the sets, and their variance is reported of all of them
    is_apart = model.settings.name == "dhset" and model.inference == "hybrid"
    return sums.attention, found, favourites, circular_variance(torch.cat(sets)) if is_apart else None


class _Sums:
    """Adds up the figures of attention, batch by batch."""

    def __init__(self) -> None:
        self._places = torch.zeros(0, dtype=torch.float64)
        self._overlap = self._inputs = 0.0
        self._samples = 0

    def add(self, attention: Tensor, mask: Tensor | None) -> None:
        """`attention`: (B, K, N); `mask`: (B, N), True where there is an input."""
        weights = attention.double().cpu()
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        num_samples, num_elements, num_inputs = weights.shape
        places = torch.special.entr(weights).sum(-1).exp().sum(0)
        self._places = self._places + places if self._samples else places
        self._inputs += float(num_samples * num_inputs if mask is None else mask.sum())
        pairs = [torch.minimum(weights[:, i], weights[:, j]).sum(-1) for i, j in combinations(range(num_elements), 2)]
        self._overlap += float(torch.stack(pairs).mean(0).sum()) if pairs else 0.0
        self._samples += num_samples

    @property
    def attention(self) -> Attention | None:
        """The means; None where nothing was added."""
        if not self._samples:
            return None
        return Attention(
            places=(self._places / self._samples).tolist(),
            inputs=self._inputs / self._samples,
            overlap=self._overlap / self._samples if len(self._places) > 1 else None,
            samples=self._samples,
        )


def _enlarged(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = photo.shape[0]
    if side >= _SIDE:
        return photo
    return np.asarray(Image.fromarray(photo).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _first(texts: Sequence[str]) -> str:
    return texts[0] if texts else ""


# --- for results files


_SUBSPACES = {
    "kept": "Share of the sub-spaces' entries that their masks keep (above 1/2).",
    "near_threshold": "Share of the sub-spaces' entries near their threshold (|λ(w − t)| < 4), through which α learns.",
    "profile_cosine": "Mean cosine of the profiles of two sub-spaces: near 1 where they have collapsed to one.",
    "top_overlap": "Mean share of the largest dimensions of one sub-space (a tenth of all, at most 100) that another has too.",
}


def head_metrics(head: HeadDiagnostics) -> dict[str, Metric]:
    """Returns the numbers for a results file."""
    metrics = {}
    for side, found, inputs in (("image", head.image, "places"), ("text", head.text, "words")):
        if found is None:
            continue
        metrics[f"slots_{side}_inputs"] = Metric(
            value=sum(found.places) / len(found.places),
            unit="",
            protocol=f"{inputs.capitalize()} that an element of a set looks at, exp of the entropy of its attention, mean over "
            f"elements and {found.samples:,} samples; there are {found.inputs:.1f}.",
            samples=found.samples,
        )
        if found.overlap is not None:
            metrics[f"slots_{side}_overlap"] = Metric(
                value=100 * found.overlap,
                unit="%",
                protocol=f"Attention that two elements of a set share over {inputs}, Σ of the smaller one, mean over pairs and "
                f"{found.samples:,} samples; 100 % where all look alike.",
                samples=found.samples,
            )
    for name, value in head.subspaces.items():
        metrics[f"subspaces_{name}"] = Metric(value=value, unit="", protocol=_SUBSPACES[name], samples=1)
    return metrics


def write_looks(path: Path, head: HeadDiagnostics) -> None:
    """Writes the pictures of `cards` for other reports: for each picture a list of cards, the photograph first, with "src" (a
    data URI), "alt", "caption" and "note".
    """
    content = [
        [{**asdict(card.picture), "caption": card.caption, "note": card.note} for card in cards] for cards in head.cards
    ]
    write_json(path, content)


def head_details(head: HeadDiagnostics) -> dict[str, Any]:
    """Returns what else was found, for a results file."""
    return {
        "head": head.head,
        "elements": {
            side: {"inputs_looked_at": found.places, "inputs": found.inputs, "overlap": found.overlap}
            for side, found in (("image", head.image), ("text", head.text))
            if found is not None
        },
        "words": [
            {"caption": one.caption, "elements": [[list(pair) for pair in of] for of in one.of_elements]}
            for one in head.words
        ],
        "favourite_words": [[list(pair) for pair in of_element] for of_element in head.favourites],
    }
