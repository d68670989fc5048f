"""Backbones: what gives heads their local and global features of pictures and texts. A plain dict of names.

    backbone = make_backbone({"kind": "open_clip", "model": model_cfg})     # of a checkpoint, or a new one
    features = backbone.image(pixels)                                       # Features: local, mask, pooled

Used by fine-tuning, and by evaluation, which loads its checkpoints (`setclip.models.set_model`). Read `base` for the interface.
"""

from collections.abc import Mapping
from typing import Any

from setclip.lookup import look_up
from setclip.models.backbones.base import Backbone, Features
from setclip.models.backbones.open_clip_towers import OpenClipTowers
from setclip.models.backbones.towers import Towers

__all__ = ["BACKBONES", "RECURRENT", "Backbone", "Features", "make_backbone"]

RECURRENT = ("bigru", "bigru_concat", "gru")
"""Text towers that begin at random (`recurrent`)"""

BACKBONES: dict[str, type[Backbone]] = {"open_clip": OpenClipTowers, "towers": Towers}


def make_backbone(description: Mapping[str, Any]) -> Backbone:
    """Returns a new backbone of what `Backbone.description` said of one. Raises InputError on an unknown kind."""
    options = dict(description)
    return look_up(BACKBONES, str(options.pop("kind")), "backbone")(**options)
