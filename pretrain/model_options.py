"""What is trained: the model, where its weights begin, and what is done to it for training alone. Used by pretrain.

Locked towers, gradient checkpointing and patch dropout do not change a checkpoint's form: what is saved is the plain model.
"""

import contextlib
import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.patch_dropout import PatchDropoutWithIndices

from pretrain.patch_dropout import PatchDropout
from setclip.errors import InputError
from setclip.models.clip import build_clip

SCALARS = ("logit_scale", "logit_bias")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    name: str = "ViT-B-32"
    """A name of open_clip's, one of ours (conv-tiny-64, conv-small-96), or a JSON file of the same form."""
    pretrained: str | None = None
    """Start from weights: a run, a checkpoint folder, `local-dir:DIR`, a file, `hf-hub:USER/NAME`, or an open_clip tag."""
    pretrained_image: bool = False
    """Start the image tower from timm's weights, where the model has one of timm's."""
    pretrained_text: bool = False
    """Start the text tower from Hugging Face's weights, where the model has one of theirs."""
    lock_image: bool = False
    """Keep the image tower's weights and statistics as they begin (LiT); timm's towers keep training their projection."""
    lock_image_unlocked: int = 0
    """With --model.lock-image: groups of layers, counted from the end, that are trained all the same (open_clip's)."""
    lock_text: bool = False
    """Keep the text tower's weights as they begin."""
    lock_text_unlocked: int = 0
    """With --model.lock-text: groups of layers, counted from the end, that are trained all the same (open_clip's)."""
    grad_checkpointing: bool = False
    """Keep only what goes into each block and compute the rest again in the backward pass: less memory, a third more time."""
    patch_dropout: float | None = None
    """Share of a picture's patches that are left out in training; None: as the model's configuration says."""

    def __post_init__(self) -> None:
        for name in ("lock_image", "lock_text"):
            unlocked = getattr(self, f"{name}_unlocked")
            flag = f"--model.{name.replace('_', '-')}"
            if unlocked < 0:
                raise ValueError(f"{name}_unlocked must not be negative, found {unlocked}")
            if unlocked and not getattr(self, name):
                raise ValueError(f"{name}_unlocked {unlocked} is for a locked tower; give {flag} True with it")
        if self.pretrained is not None and (self.pretrained_image or self.pretrained_text):
            raise ValueError(
                f"pretrained {self.pretrained!r} has both towers; give it, or pretrained_image and pretrained_text, not both"
            )
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout must lie in [0, 1), found {self.patch_dropout}")

    def course(self) -> dict[str, Any]:
        """Returns what a resume must not change, beside the model itself."""
        names = ("lock_image", "lock_image_unlocked", "lock_text", "lock_text_unlocked", "patch_dropout")
        return {name: getattr(self, name) for name in names}


def build_for_training(model_cfg: Mapping[str, Any], config: ModelConfig) -> torch.nn.Module:
    """Returns a freshly initialised model, fp32, with what `config` asks for in training. Raises InputError."""
    model = build_clip(training_cfg(model_cfg, config))
    prepare(model, config)
    return model


def with_pretrained_towers(model_cfg: Mapping[str, Any], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Returns weights of a new model whose towers of timm or Hugging Face have their own, as asked for. Raises InputError."""
    image, text = (
        model_cfg[name].get(key) for name, key in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name"))
    )
    for wanted, flag, has, whose in (
        (config.pretrained_image, "--model.pretrained-image", image, "an image tower of timm"),
        (config.pretrained_text, "--model.pretrained-text", text, "a text tower of Hugging Face"),
    ):
        if wanted and not has:
            raise InputError(
                f"expected a model with {whose} for {flag}, found {config.name}, whose own towers have no weights by themselves; "
                "use --model.pretrained, or another model"
            )
    return build_clip(model_cfg, False, config.pretrained_image, config.pretrained_text).state_dict()


def training_cfg(model_cfg: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the open_clip configuration of which the model that trains is built: with the patch dropout that is asked for."""
    result = copy.deepcopy(dict(model_cfg))
    if config.patch_dropout is not None:
        result["vision_cfg"]["patch_dropout"] = config.patch_dropout
    return result


def prepare(model: torch.nn.Module, config: ModelConfig) -> None:
    """Locks, checkpoints and puts in patch dropout as asked for, in a model that was built of `training_cfg`.

    Raises InputError where the model cannot do it.
    """
    _put_in_patch_dropout(model, config)
    if config.grad_checkpointing:
        _checkpoint_image(model, config)
        _checkpoint_text(model, config)
    _lock(model, config)


def patch_dropout_of(model: torch.nn.Module) -> PatchDropout | None:
    """Returns the patch dropout that `prepare` has put in."""
    return next((module for module in model.modules() if isinstance(module, PatchDropout)), None)


def locked_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the batch norms whose weights are locked; their statistics are to stay too."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    return [
        norm
        for norm in norms
        if [*norm.parameters()] and not any(parameter.requires_grad for parameter in norm.parameters())
    ]


def _put_in_patch_dropout(model: torch.nn.Module, config: ModelConfig) -> None:
    tower: Any = model.visual
    if isinstance(tower, VisionTransformer):
        share = getattr(tower.patch_dropout, "prob", 0.0)
        if share:
            tower.patch_dropout = PatchDropout(share, 1)
            tower.patch_dropout.patches = tower.grid_size[0] * tower.grid_size[1]
        return
    theirs = getattr(tower.trunk, "patch_drop", None) if isinstance(tower, TimmModel) else None
    share = getattr(theirs, "prob", 0.0)
    if share:
        with_indices = isinstance(theirs, PatchDropoutWithIndices)
        tower.trunk.patch_drop = PatchDropout(share, theirs.num_prefix_tokens, with_indices)  # type: ignore[union-attr]
        tower.trunk.patch_drop.patches = tower.trunk.patch_embed.num_patches
    elif config.patch_dropout:
        raise InputError(
            f"expected an image tower with patches for --model.patch-dropout {config.patch_dropout:g}, found {_kind(tower)} in "
            f"{config.name}; leave it out, or choose a ViT"
        )


def _checkpoint_image(model: torch.nn.Module, config: ModelConfig) -> None:
    tower: Any = model.visual
    if isinstance(tower, TimmModel):  # open_clip's own would only log that it does nothing
        try:
            tower.trunk.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError, TypeError) as error:
            raise _cannot_checkpoint(f"{type(tower.trunk).__name__} of timm cannot ({error})", config) from error
    elif isinstance(tower, ModifiedResNet):  # open_clip's own does nothing and says nothing
        raise _cannot_checkpoint("open_clip's ResNets cannot", config)
    else:
        tower.set_grad_checkpointing(True)


def _checkpoint_text(model: torch.nn.Module, config: ModelConfig) -> None:
    tower: Any = getattr(model, "text", None)
    if isinstance(tower, HFTextEncoder):
        try:
            tower.transformer.config.use_cache = False  # is of no use here, and warns
            _enable_checkpointing(tower.transformer)
        except ValueError as error:
            raise _cannot_checkpoint(f"{type(tower.transformer).__name__} cannot ({error})", config) from error
    elif tower is not None:
        tower.set_grad_checkpointing(True)
    else:
        model.transformer.grad_checkpointing = True  # type: ignore[union-attr]


def _enable_checkpointing(transformer: Any) -> None:
    if hasattr(transformer, "activation_checkpointing_enable"):  # transformers 5's name
        transformer.activation_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _cannot_checkpoint(reason: str, config: ModelConfig) -> InputError:
    return InputError(
        f"expected towers that can be checkpointed for --model.grad-checkpointing, found {config.name}: {reason}; save memory "
        "with --engine.accumulation instead"
    )


def _lock(model: torch.nn.Module, config: ModelConfig) -> None:
    locks: Any = model
    if config.lock_image:
        try:
            locks.lock_image_tower(unlocked_groups=config.lock_image_unlocked)
        except (AssertionError, KeyError, RuntimeError) as error:
            raise InputError(
                f"expected an image tower of which groups can be unlocked for --model.lock-image-unlocked "
                f"{config.lock_image_unlocked}, found {_kind(model.visual)} in {config.name} ({error}); leave it out"
            ) from error
    if config.lock_text:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # open_clip prints
                locks.lock_text_tower(unlocked_layers=config.lock_text_unlocked)
        except (AttributeError, KeyError) as error:  # open_clip does not know the layers of every architecture
            raise InputError(
                f"expected a text tower of which groups can be unlocked for --model.lock-text-unlocked "
                f"{config.lock_text_unlocked}, found {type(locks.text.transformer).__name__} of Hugging Face in {config.name}, "
                f"whose layers open_clip does not know ({error}); leave it out"
            ) from error
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name not in SCALARS]
    if not trained:
        raise InputError(
            f"expected weights to train, found none in {config.name} but the logit scale: both towers are locked; unlock one, or "
            "some of its groups (--model.lock-image-unlocked, --model.lock-text-unlocked)"
        )


def _kind(tower: Any) -> str:
    return f"{type(tower.trunk).__name__} of timm" if isinstance(tower, TimmModel) else type(tower).__name__
