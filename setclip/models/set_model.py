"""A backbone with a pair of heads: what fine-tuning makes and evaluation loads.

    model = SetModel(make_backbone({"kind": "open_clip", "model": model_cfg}), HeadSettings("slot", width=256))
    sets = model.encode_image(pixels)                    # (B, K, D), or (B, D) where a set is one vector
    again = SetModel.of_description(model.description)   # without its weights

`encode_image` and `encode_text` give what `similarity_of_features` compares: unit vectors (but see `keeps_norms`), zero where a
set has no element. So whatever evaluates features evaluates sets (`eval_suite`). Letters: B samples, K elements, D width, L text
tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.backbones import Backbone, Features, make_backbone
from setclip.models.heads import HEADS, HeadOutput, HeadPair, make_pair
from setclip.models.heads.dhset import DhSetText
from setclip.models.pieces import unit
from setclip.models.subspaces import SubSpaces

Inference = Literal["set", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What builds a pair of heads, but for the backbone's widths: arguments of `make_pair`."""

    name: str = "slot"
    width: int = 1024
    options: Mapping[str, Any] = field(default_factory=dict)
    image_options: Mapping[str, Any] = field(default_factory=dict)
    text_options: Mapping[str, Any] = field(default_factory=dict)
    similarity: str | None = None
    similarity_options: Mapping[str, Any] = field(default_factory=dict)
    inference: Inference | None = None
    """None: hybrid where the head has it"""
    projection: str | None = None
    """In front of the image head: vseinf, dive or none"""


class SetModel(nn.Module):
    """`inference`: "set", or "hybrid" of a head that has one; what `encode_text` and `similarity_of_features` go by."""

    def __init__(self, backbone: Backbone, settings: HeadSettings):
        super().__init__()
        self.backbone, self.settings = backbone, settings
        self.pair = _pair(backbone, settings)
        name = settings.name
        has_hybrid = name in HEADS and HEADS[name].has_hybrid
        self.inference: Inference = settings.inference or ("hybrid" if has_hybrid else "set")
        self.inferences: tuple[Inference, ...] = ("set", "hybrid") if name == "dhset" else (self.inference,)
        """Those that evaluation can take"""
        self.norm: str = getattr(self.pair.text, "norm", "cos")
        if name == "dhset_fragment":
            self.norm = getattr(self.pair.similarity, "norm", "cos")
        if self.inference == "hybrid" and not has_hybrid:
            raise InputError(
                f"expected inference set of head {name}, found hybrid, which dhset and dhset_fragment alone have; leave it out"
            )

    @property
    def keeps_norms(self) -> bool:
        """Whether what is compared counts as long as it is; else features are unit vectors."""
        name = self.settings.name
        is_set_of_words = name == "dhset_fragment" and self.inference == "set"
        return name == "pcme" or is_set_of_words or self.norm == "none" or self.settings.similarity == "laps"

    @property
    def description(self) -> dict[str, Any]:
        """What builds the same model anew, weights aside: JSON."""
        return {"backbone": self.backbone.description, "head": asdict(self.settings)}

    @classmethod
    def of_description(cls, description: Mapping[str, Any]) -> "SetModel":
        """Returns a new model of what `description` said of one. Raises InputError where it does not fit."""
        return cls(make_backbone(description["backbone"]), HeadSettings(**description["head"]))

    def images(self, features: Features) -> HeadOutput:
        """Returns the sets of pictures, of the backbone's features of them."""
        return self.pair.image(features.local, features.mask, features.pooled)

    def texts(self, features: Features) -> HeadOutput:
        """Returns the sets of texts."""
        return self.pair.text(features.local, features.mask, features.pooled)

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Returns (B, K, D) of pictures (B, 3, S, S), or (B, D) where a set is one vector."""
        return as_features(self.images(self.backbone.image(pixels)))

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Returns (B, K, D) of texts (B, L), or (B, D): the hybrid vectors where these are compared."""
        return self.text_features(self.texts(self.backbone.text(tokens)), self.inference)

    def text_features(self, output: HeadOutput, inference: Inference) -> Tensor:
        """Returns what is compared at an inference, (B, K, D) or (B, D), of a text head's output."""
        if inference == "set" or not isinstance(self.pair.text, DhSetText):
            return as_features(output)
        if self.settings.name == "dhset":
            return output.sets.sum(1) if self.norm == "none" else self.pair.text.hybrid(output.sets)
        # the sub-spaces' vectors of a word stand side by side; their sum is all that the hybrid comparison looks at
        words = output.sets.unflatten(1, (-1, len(self.pair.text.subspaces.alpha))).sum(2)
        words = words if self.norm == "none" else unit(words)
        mask = None if output.mask is None else output.mask.view(*words.shape[:2], -1)[..., 0]
        return words if mask is None else words.masked_fill(~mask[..., None], 0.0)

    def similarity_of_features(self, inference: Inference | None = None) -> dict[str, Any]:
        """Returns what compares features, {"name": …, options}, learned numbers included: for setclip_config.json."""
        inference = inference or self.inference
        if isinstance(self.pair.text, DhSetText) and self.settings.name == "dhset":
            if inference == "set" and self.norm == "l2":
                return {"name": "dhset_rows", **_of_rows(self.pair.text.subspaces), "weights": "pair.text."}
            of_norm = {"norm": "none"} if self.norm == "none" else {}
            if inference == "set":
                return {"name": "dhset_set", **of_norm}
            return {"name": "dhset_hybrid", **of_norm} if of_norm else {"name": "cosine"}
        if isinstance(self.pair.text, DhSetText):
            scale = float(self.pair.similarity.scale.detach())  # type: ignore[operator]
            number = 1 if inference == "hybrid" else len(self.pair.text.subspaces.alpha)
            options = {"num_elements": number, "scale": scale, "learns_scale": False, "norm": self.norm}
            return {"name": "dhset_fragment", **options}
        if self.settings.similarity == "laps":
            return {"name": "laps", **self.settings.similarity_options, "weights": "pair.similarity."}
        name = self.settings.similarity or HEADS[self.settings.name].similarity
        learned = {name: float(value.detach()) for name, value in self.pair.similarity.named_parameters()}
        return {"name": name, **self.settings.similarity_options, **learned}


def as_features(output: HeadOutput) -> Tensor:
    """Returns sets, zero where there is no element, as features: (B, K, D), or (B, D) of sets of one vector."""
    sets = output.sets if output.mask is None else output.sets.masked_fill(~output.mask[..., None], 0.0)
    return sets[:, 0] if sets.shape[1] == 1 and output.mask is None else sets


def _of_rows(subspaces: SubSpaces) -> dict[str, Any]:
    """Returns the options of `dhset_rows`."""
    num, rows, width = subspaces.weight.shape
    return {
        "width": width,
        "num_elements": num,
        "num_rows": rows,
        "sharpness": subspaces.sharpness,
        "row_activation": subspaces.row_activation,
        "unit_rows": subspaces.unit_rows,
    }


def _pair(backbone: Backbone, settings: HeadSettings) -> HeadPair:
    image_options = dict(settings.image_options)
    if backbone.scales is not None:
        if settings.name != "asa":
            raise InputError(
                f"expected the head asa for maps of several scales, found {settings.name}; take one map, or asa"
            )
        image_options = {"scales": backbone.scales, "widths": backbone.scale_widths, **image_options}
    return make_pair(
        settings.name,
        backbone.image_widths,
        backbone.text_widths,
        settings.width,
        settings.options,
        image_options,
        settings.text_options,
        settings.similarity,
        settings.similarity_options,
        "set",
        settings.projection,
    )
