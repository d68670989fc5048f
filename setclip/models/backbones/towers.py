"""A backbone of two towers that need not know each other: an image tower and a text tower, each from a plain dict of names.

    Towers(image={"kind": "timm", "name": "resnet152"}, text={"kind": "recurrent", "words": "<pad> <unk> …"})

What the dicts hold builds the towers without any file or network, so a checkpoint needs no more than them and the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from setclip.lookup import look_up
from setclip.models.backbones.base import Backbone, Features, ImageTower, TextTower
from setclip.models.backbones.hugging_face import HuggingFaceText
from setclip.models.backbones.open_clip_sides import OpenClipImage, OpenClipText
from setclip.models.backbones.recurrent import Recurrent
from setclip.models.backbones.regions import Regions
from setclip.models.backbones.timm_tower import TimmTower
from setclip.word_noise import Draw

IMAGE_TOWERS: dict[str, type[ImageTower]] = {"open_clip": OpenClipImage, "regions": Regions, "timm": TimmTower}
TEXT_TOWERS: dict[str, type[TextTower]] = {
    "hugging_face": HuggingFaceText,
    "open_clip": OpenClipText,
    "recurrent": Recurrent,
}


class Towers(Backbone):
    """`image` and `text`: a kind of the dicts above, and the arguments of its class."""

    def __init__(self, image: Mapping[str, Any], text: Mapping[str, Any]):
        super().__init__()
        self.image_tower: ImageTower = _made(IMAGE_TOWERS, image, "image tower")
        self.text_tower: TextTower = _made(TEXT_TOWERS, text, "text tower")
        self.image_widths, self.text_widths = self.image_tower.widths, self.text_tower.widths
        self.image_size, self.takes_regions = self.image_tower.image_size, isinstance(self.image_tower, Regions)
        self.tokenizer = self.text_tower.tokenizer
        self.scales, self.scale_widths = self.image_tower.scales, self.image_tower.scale_widths

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "towers", "image": self.image_tower.description, "text": self.text_tower.description}

    def image(self, pixels: Tensor) -> Features:
        return self.image_tower(pixels)

    def regions(self, values: Tensor, mask: Tensor) -> Features:
        return self.image_tower(values, mask)

    def text(self, tokens: Tensor) -> Features:
        return self.text_tower(tokens)

    def words_of(self, texts: Sequence[str]) -> list[list[str]] | None:
        return self.text_tower.words_of(texts)

    def noisy_tokens(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        return self.text_tower.noisy_tokens(texts, rate, draws)

    def side_of(self, name: str) -> str:
        return "image" if name.startswith("image_tower.") else "text"


def _made(kinds: Mapping[str, Any], description: Mapping[str, Any], what: str) -> Any:
    options = dict(description)
    return look_up(kinds, str(options.pop("kind")), what)(**options)
