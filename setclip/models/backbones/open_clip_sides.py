"""One tower of an open_clip model beside a tower of another kind: the other one of the model is left out.

`model`: open_clip's configuration, as `setclip.models.backbones.open_clip_towers` takes it; features are those of it too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from setclip.models.backbones.base import Features, ImageTower, TextTower
from setclip.models.backbones.open_clip_towers import OpenClipTowers


class OpenClipImage(ImageTower):
    """`maps`: of a convolutional tower, how many of its last maps."""

    def __init__(self, model: Mapping[str, Any], maps: int = 1):
        super().__init__()
        self.towers = OpenClipTowers(model, maps)
        _remove(self.towers.clip, "text")
        self.widths, self.image_size = self.towers.image_widths, self.towers.image_size
        self.scales, self.scale_widths = self.towers.scales, self.towers.scale_widths

    @property
    def description(self) -> dict[str, Any]:
        return self.towers.description

    def forward(self, inputs: Tensor) -> Features:
        return self.towers.image(inputs)


class OpenClipText(TextTower):
    """The text tower alone."""

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        self.towers = OpenClipTowers(model)
        _remove(self.towers.clip, "image")
        self.widths, self.tokenizer = self.towers.text_widths, self.towers.tokenizer

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "open_clip", "model": self.towers.model_cfg}

    def forward(self, tokens: Tensor) -> Features:
        return self.towers.text(tokens)

    def words_of(self, texts: Sequence[str]) -> list[list[str]] | None:
        return self.towers.words_of(texts)


def _remove(clip: Any, side: str) -> None:
    """Takes the weights of one side, and the contrastive loss's scale and bias, out of a model of open_clip."""
    names = [name for name, _ in (*clip.named_children(), *clip.named_parameters(recurse=False))]
    for name in names:
        is_image = name == "visual"
        if is_image == (side == "image") or name in ("logit_scale", "logit_bias"):
            setattr(clip, name, None)
