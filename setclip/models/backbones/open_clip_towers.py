"""Towers of open_clip, ours or any: patches or places of a map, and words, before pooling; global features after projection.

Local features have passed the tower's last norm where it has one there, and no projection. The token that begins a text is
the same in all and is left out; the one that ends it, which carries a causal tower's sentence, is its last word.
Used through the dict of `setclip.models.backbones`. Letters: B samples, N places, E width, L text tokens.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from open_clip.hf_model import ClsPooler, HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor

from setclip.errors import InputError
from setclip.models.backbones.base import Backbone, Features, cut, places_of
from setclip.models.clip import build_clip, image_size_of, tokenizer_for
from setclip.models.heads import SideWidths, side_by_side


class OpenClipTowers(Backbone):
    """`model`: open_clip's configuration (embed_dim, vision_cfg, text_cfg). `maps`: of a convolutional tower, how many of its
    last maps, side by side, for the head asa; 1: the last, as an ordinary set of places.
    """

    def __init__(self, model: Mapping[str, Any], maps: int = 1):
        super().__init__()
        self.model_cfg, self.maps = dict(model), maps
        self.clip: Any = build_clip(model, scalar_logit_scale=True)
        self.image_size = image_size_of(self.clip)
        self.tokenizer = _tokenizer(json.dumps(model["text_cfg"]))
        tower = self.visual
        if isinstance(tower, VisionTransformer):
            if tower.pool_type == "none" and tower.attn_pool is None:
                raise InputError(
                    "expected an image tower with a global feature, found pool_type none; choose another model"
                )
            tower.output_tokens = True
        elif not isinstance(tower, ModifiedResNet | TimmModel):
            raise InputError(
                f"expected a tower of open_clip or timm, found {type(tower).__name__}; choose another model"
            )
        if not 1 <= maps <= 3 or (maps > 1 and not isinstance(tower, ModifiedResNet)):
            raise InputError(
                f"expected 1 to 3 maps of a convolutional tower of open_clip, found {maps} of {type(tower).__name__}; take 1"
            )
        if self.words is not None:
            if not isinstance(self.words, TextTransformer | HFTextEncoder):
                raise InputError(
                    f"expected a text tower of open_clip or Hugging Face, found {type(self.words).__name__}; choose another"
                )
            self.words.output_tokens = True
        for name in ("logit_scale", "logit_bias"):  # of the contrastive loss, which has its own here
            if isinstance(getattr(self.clip, name, None), torch.nn.Parameter):
                getattr(self.clip, name).requires_grad = False
        self._measure()

    @property
    def visual(self) -> Any:
        """The image tower."""
        return self.clip.visual

    @property
    def words(self) -> Any:
        """The text tower where it is a module of its own; None: it is part of open_clip's CLIP."""
        return getattr(self.clip, "text", None)

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "open_clip", "model": self.model_cfg, "maps": self.maps}

    def image(self, pixels: Tensor) -> Features:
        tower = self.visual
        if isinstance(tower, VisionTransformer):
            pooled, tokens = tower(pixels)
            return Features(tokens, None, pooled)
        if isinstance(tower, ModifiedResNet):
            maps = [tower.layer1(tower.stem(pixels))]
            for layer in (tower.layer2, tower.layer3, tower.layer4):
                maps.append(layer(maps[-1]))
            return Features(side_by_side(maps[-self.maps :]), None, tower.attnpool(maps[-1]))
        found = tower.trunk.forward_features(pixels)
        pooled = tower.head(tower.trunk.forward_head(found))
        return Features(places_of(tower.trunk, found), None, pooled)

    def text(self, tokens: Tensor) -> Features:
        if isinstance(self.words, HFTextEncoder):
            return self._hugging_face(tokens)
        if isinstance(self.words, TextTransformer):
            pooled, local = self.words(tokens)
        else:
            local, pooled = self._own(tokens)
        return cut(Features(local[:, 1:], _words_there(tokens, *self._pooling())[:, 1:], pooled))

    def _own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (words, global feature) of the text tower that is part of open_clip's CLIP: its `encode_text`, in two."""
        clip = self.clip
        dtype = clip.transformer.get_cast_dtype()
        x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding.to(dtype)
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
        pooled = text_global_pool(x, tokens, clip.text_pool_type, eos_token_id=getattr(clip, "text_eos_id", None))
        if clip.text_projection is not None:
            is_layer = isinstance(clip.text_projection, torch.nn.Linear)
            pooled = clip.text_projection(pooled) if is_layer else pooled @ clip.text_projection
        return x, pooled

    def _hugging_face(self, tokens: Tensor) -> Features:
        pooled, local = self.words(tokens)
        mask = tokens != self.words.config.pad_token_id
        # open_clip has left the class token out where it pools by it
        local = local if type(self.words.pooler) is ClsPooler else local[:, 1:]
        return cut(Features(local, mask[:, 1:], pooled))

    def words_of(self, texts: Sequence[str]) -> list[list[str]]:
        tokens = self.tokenizer(list(texts))
        if isinstance(self.words, HFTextEncoder):
            names = self.tokenizer.tokenizer.convert_ids_to_tokens  # type: ignore[attr-defined]
            there = (tokens != self.words.config.pad_token_id)[:, 1:]
            return [names(own[mask].tolist()) for own, mask in zip(tokens[:, 1:], there, strict=True)]
        how, pad = self._pooling()
        there = _words_there(tokens, how, pad)[:, 1:]
        decoder = self.tokenizer.decoder  # type: ignore[attr-defined]
        return [
            [decoder[number].removesuffix("</w>") for number in own[mask].tolist()]
            for own, mask in zip(tokens[:, 1:], there, strict=True)
        ]

    def _pooling(self) -> tuple[str, int]:
        """Returns how the text tower finds its sentence, and the number of padding."""
        if isinstance(self.words, TextTransformer):
            return self.words.pool_type, getattr(self.words, "pad_id", 0)
        return self.clip.text_pool_type, 0

    def side_of(self, name: str) -> str:
        return "image" if name.startswith("clip.visual.") else "text"

    @torch.no_grad()
    def _measure(self) -> None:
        """Sees the widths of features by giving the towers something."""
        was_training = self.clip.training
        self.clip.eval()
        size = self.image_size
        images = self.image(torch.zeros(1, 3, size, size))
        texts = self.text(self.tokenizer(["a"]))
        self.clip.train(was_training)
        for what, features in (("image", images), ("text", texts)):
            pooled = features.pooled
            if features.local.ndim != 3 or (pooled is not None and pooled.ndim != 2):
                raise InputError(
                    f"expected an {what} tower with local features (B, N, E) and a global one, found shapes "
                    f"{tuple(features.local.shape)} and {None if pooled is None else tuple(pooled.shape)}; choose another model"
                )
        self.image_widths = SideWidths(images.local.shape[2], images.pooled.shape[1])  # type: ignore[union-attr]
        self.text_widths = SideWidths(texts.local.shape[2], texts.pooled.shape[1])  # type: ignore[union-attr]
        if self.maps > 1:
            layers = (self.visual.layer2, self.visual.layer3, self.visual.layer4)[-self.maps :]
            self.scale_widths = [layer[-1].bn3.num_features for layer in layers]
            sides = [size // 32 * 2**i for i in reversed(range(self.maps))]
            self.scales = [(side, side) for side in sides]


@functools.cache
def _tokenizer(text_cfg: str) -> Callable[[list[str]], Tensor]:
    """Returns the tokenizer of a configuration as JSON: one for all towers of a process, as it takes half a second to make."""
    return tokenizer_for({"text_cfg": json.loads(text_cfg)})


def _words_there(tokens: Tensor, how: str, pad: int) -> Tensor:
    """Returns (B, L) bool, True up to the token that ends a text, CLIP's being the highest number, or else at what is no
    padding.
    """
    if how == "argmax":
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return places <= tokens.argmax(1, keepdim=True)
    return tokens != pad
