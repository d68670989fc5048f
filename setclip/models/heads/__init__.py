"""Heads: sets of embeddings from a backbone's features. One interface, a plain dict of names; fine-tuning, evaluation and
export build them.

    pair = make_pair("slot", SideWidths(768, 512), SideWidths(512, 512), width=512)
    images = pair.image(patches, None, pooled)              # (B, N, E), mask, (B, F) → HeadOutput
    texts = pair.text(words, mask, sentence)
    scores = pair.scores(images, texts)                     # (B images, B' texts), with gradient
    scores = pair.scores(images, texts, inference=True)     # as evaluation compares: DH-Set's hybrid, else the same

A pair is a head of each side and the similarity that compares their sets. Read `base` for the interface, `slot` for the
main head, `dhset` and `subspaces` for the other; `setclip.similarity` and `setclip.models.matching` compare. Formulas, and
what is stated and what reconstructed: docs/heads.md. Letters: B samples, N inputs, E their width, F width of the global
feature, K elements, D width.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.models.heads.asa import Asa, side_by_side
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.heads.dhset import DhSetImage, DhSetText
from setclip.models.heads.dhset_fragment import DhSetFragmentText
from setclip.models.heads.gpo import Gpo
from setclip.models.heads.local import Local
from setclip.models.heads.max import Max
from setclip.models.heads.mean import Mean
from setclip.models.heads.pcme import Pcme
from setclip.models.heads.pie import Pie
from setclip.models.heads.projected import projected
from setclip.models.heads.single import Single
from setclip.models.heads.slot import Slot
from setclip.models.heads.transformer import Transformer
from setclip.models.matching import DhSetFragment, DhSetRows, HybridOf, make_matching, score_matrix
from setclip.similarity import SetSimilarity

__all__ = [
    "HEADS",
    "HeadKind",
    "HeadOutput",
    "HeadPair",
    "SetHead",
    "SideWidths",
    "make_pair",
    "side_by_side",
]


@dataclass(frozen=True)
class HeadKind:
    """An entry of `HEADS`."""

    image: type[SetHead]
    text: type[SetHead]
    similarity: str
    """Of training, a name in `setclip.models.matching.MATCHINGS`"""
    image_defaults: Mapping[str, Any] = field(default_factory=dict)
    text_defaults: Mapping[str, Any] = field(default_factory=dict)
    has_hybrid: bool = False
    """Whether evaluation can take one hybrid vector a text"""


HEADS: dict[str, HeadKind] = {
    "slot": HeadKind(Slot, Slot, "smooth_chamfer", text_defaults={"position": "sine"}),
    "transformer": HeadKind(Transformer, Transformer, "smooth_chamfer", text_defaults={"position": "sine"}),
    "pie": HeadKind(Pie, Pie, "mil"),
    "pcme": HeadKind(Pcme, Pcme, "match_prob_l2", {"noise_seed": 0}, {"noise_seed": 1}),
    "dhset": HeadKind(DhSetImage, DhSetText, "dhset_set", has_hybrid=True),
    "dhset_fragment": HeadKind(Local, DhSetFragmentText, "dhset_fragment", has_hybrid=True),
    "asa": HeadKind(Asa, Local, "scan"),
    "laps": HeadKind(Local, Local, "max_mean"),
    "scan": HeadKind(Local, Local, "scan"),
    "gpo": HeadKind(Gpo, Gpo, "cosine"),
    "mean": HeadKind(Mean, Mean, "cosine"),
    "max": HeadKind(Max, Max, "cosine"),
    "single": HeadKind(Single, Single, "cosine"),
}


@dataclass(frozen=True)
class SideWidths:
    """What a backbone gives of one side."""

    local: int
    """E, of its local features"""
    pooled: int | None = None
    """F, of its global feature; None: it has none"""


class HeadPair(nn.Module):
    """Heads of both sides and what compares their sets; `hybrid`: at inference, None where it is the same."""

    def __init__(self, image: SetHead, text: SetHead, similarity: SetSimilarity, hybrid: SetSimilarity | None = None):
        super().__init__()
        self.image, self.text, self.similarity, self.hybrid = image, text, similarity, hybrid

    def scores(
        self, images: HeadOutput, texts: HeadOutput, inference: bool = False, block_size: int | None = None
    ) -> Tensor:
        """Returns the scores of all images with all texts, (B, B') float32, in blocks of `block_size` sets a side.

        `inference`: by the similarity that evaluation takes. Raises InputError as the similarity does.
        """
        chosen = self.hybrid if inference and self.hybrid is not None else self.similarity
        return score_matrix(chosen, images.sets, texts.sets, images.mask, texts.mask, block_size)


def make_pair(
    name: str,
    image: SideWidths,
    text: SideWidths,
    width: int = 1024,
    options: Mapping[str, Any] | None = None,
    image_options: Mapping[str, Any] | None = None,
    text_options: Mapping[str, Any] | None = None,
    similarity: str | None = None,
    similarity_options: Mapping[str, Any] | None = None,
    inference: str = "set",
    projection: str | None = None,
) -> HeadPair:
    """Returns a new pair of heads of that name.

    `options` go to each side that knows them, `image_options` and `text_options` to one. `similarity`: another than the
    head's own, by name. `inference` "hybrid" (DH-Set) or "set": what evaluation compares. `projection`: "vseinf" or "dive", a
    residual MLP in front of the image head (`projected`). Raises InputError on an
    unknown name, on an option that no side knows, and on values that do not fit.
    """
    kind = look_up(HEADS, name, "head")
    if inference not in ("set", "hybrid") or (inference == "hybrid" and not kind.has_hybrid):
        able = ", ".join(n for n, k in HEADS.items() if k.has_hybrid)
        raise InputError(f"expected inference set, or hybrid of {able}, found {inference!r} of {name}; take set")
    shared = dict(options or {})
    sides: list[SetHead] = []
    used: set[str] = set()
    for which, cls, widths, defaults, own in (
        ("image", kind.image, image, kind.image_defaults, image_options or {}),
        ("text", kind.text, text, kind.text_defaults, text_options or {}),
    ):
        known = _options_of(cls)
        unknown = sorted(set(own) - set(known))
        if unknown:
            raise InputError(
                f"expected {which} options of head {name} among {', '.join(known) or 'none'}, found {', '.join(unknown)}; "
                "leave them out"
            )
        used |= set(shared) & set(known)
        chosen = {**defaults, **{key: value for key, value in shared.items() if key in known}, **own}
        if which == "image" and projection is not None:
            sides.append(projected(projection, widths.local, width, cls, chosen))  # type: ignore[arg-type]
        else:
            sides.append(cls(widths.local, width, widths.pooled, **chosen))
    if set(shared) - used:
        known = sorted({*_options_of(kind.image), *_options_of(kind.text)})
        raise InputError(
            f"expected options of head {name} among {', '.join(known) or 'none'}, found "
            f"{', '.join(sorted(set(shared) - used))}; leave them out"
        )
    trained, judged = _similarities(name, kind, sides[1], similarity, dict(similarity_options or {}), inference)
    return HeadPair(sides[0], sides[1], trained, judged)


def _similarities(
    name: str, kind: HeadKind, text: SetHead, similarity: str | None, options: dict[str, Any], inference: str
) -> tuple[SetSimilarity, SetSimilarity | None]:
    """Returns the similarities of training and, where it is another, of inference."""
    if name in ("dhset", "dhset_fragment") and similarity not in (None, kind.similarity):
        raise InputError(
            f"expected similarity {kind.similarity} of head {name}, found {similarity}; leave it out, and say inference "
            "set or hybrid"
        )
    if isinstance(text, DhSetText):
        if name == "dhset_fragment":
            options = {"num_elements": len(text.subspaces.alpha), **options}
        elif text.norm != "l2":
            options = {"norm": text.norm, **options}
    if isinstance(text, DhSetText) and text.norm == "l2":
        trained: SetSimilarity = DhSetRows(text.subspaces, **options)
    else:
        trained = make_matching(similarity or kind.similarity, **options)
    if inference != "hybrid":
        return trained, None
    if isinstance(trained, DhSetRows | DhSetFragment):
        return trained, HybridOf(trained)
    return trained, make_matching("dhset_hybrid", **options)


def _options_of(cls: type[SetHead]) -> list[str]:
    """Returns the names of a head's options."""
    return [name for name in inspect.signature(cls).parameters if name not in ("in_width", "width", "global_width")]
