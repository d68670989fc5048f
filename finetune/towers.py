"""What a run's towers begin as: those of a pretrained model, of timm, of Hugging Face, a recurrent one, or features of regions.

Used by finetune.run, before anything is trained. What does not fit is told in the first seconds.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import timm
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from torch import Tensor

from eval_suite.model import model_to_evaluate
from finetune.config import BackboneConfig, FinetuneConfig
from finetune.data import Parts
from setclip.checkpoint import OPEN_CLIP_CONFIG_NAME, LoadedModel
from setclip.errors import InputError, first_line
from setclip.images import MEAN, STD
from setclip.log import say
from setclip.models.backbones import RECURRENT
from setclip.models.backbones.hugging_face import SHORT as SHORT_TEXT
from setclip.models.backbones.hugging_face import make_encoder
from setclip.models.backbones.timm_tower import SHORT as SHORT_IMAGE
from setclip.models.backbones.timm_tower import make_trunk
from setclip.models.clip import model_config
from setclip.models.set_model import SetModel
from setclip.vocabulary import SPECIAL, Vocabulary

RESIZE: dict[str, str] = {
    # stated: DivE and VSE++ crop the middle 224 of 256, DivE and VSE∞ take 512 × 512 whole; LAPS takes the whole square
    "resnet152": "classic",
    "resnext101": "squash",
    "swin224": "squash",
    "swin384": "squash",
    "vit224": "squash",
    "vit384": "squash",
}
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Beginning:
    """What the towers of a run are, and what they begin with."""

    source: LoadedModel
    """The pretrained model where a side is its tower, else none; and how pictures are prepared"""
    backbone: dict[str, Any]
    """Its description (`setclip.models.backbones.make_backbone`)"""
    weights: dict[str, Tensor]
    """Those of the backbone's weights that all seeds begin with: all but a recurrent tower's"""


def check_towers(config: FinetuneConfig) -> None:
    """Raises InputError where the settings of towers and of noise do not go together, before any data are read."""
    own, noise = config.backbone, config.noise
    if (own.image == "regions") != (config.regions is not None):
        found = f"--regions {config.regions}" if config.regions is not None else "no --regions"
        raise InputError(
            f"expected --backbone.image regions together with --regions DIR (its features), found --backbone.image {own.image} "
            f"and {found}; give both, or neither"
        )
    if config.regions is not None and config.needs_objects():
        raise InputError(
            "expected captions with parsed objects for --shared-objects or a contrastive loss with soft targets, found region "
            "features, whose captions have none; leave these out, or take pictures"
        )
    if noise.words and own.text == "open_clip":
        raise InputError(
            "expected a text tower with a token for masked words for --noise.words, found open_clip's, which has none; take "
            "--backbone.text bigru or bert, or leave the noise out"
        )
    if noise.regions and own.maps > 1:
        raise InputError(
            f"expected one map for --noise.regions, found --backbone.maps {own.maps}, whose places must all be there; take one "
            "map, or leave the noise out"
        )
    if own.glove is not None and not own.is_recurrent:
        raise InputError(
            f"expected --backbone.text {' or '.join(RECURRENT)} for --backbone.glove, found {own.text}; leave it out"
        )
    if own.image == "regions" and (own.image_size is not None or own.maps > 1):
        raise InputError(
            f"expected no --backbone.image-size and one map for regions, found {own.image_size} and {own.maps}; leave them out"
        )
    for side in ("image", "text"):
        weights = getattr(own, f"{side}_weights")
        if weights not in ("pretrained", "random") and not Path(weights).is_file():
            raise InputError(
                f"expected pretrained, random or a file of weights as --backbone.{side}-weights, found {weights!r}, which is "
                "no file; correct it"
            )
        if weights != "pretrained" and getattr(own, side) == "open_clip":
            raise InputError(
                f"expected the weights of --model for the {side} tower of open_clip, found --backbone.{side}-weights {weights}; "
                "name the model with --model (NAME: random weights; a run or a folder: its own)"
            )
    if own.glove is not None and not own.glove.is_file():
        raise InputError(
            f"expected word vectors at {own.glove}, found no such file; fetch glove.6B.zip from nlp.stanford.edu/projects/glove "
            "and unpack it, or leave --backbone.glove out"
        )
    if own.image not in ("open_clip", "regions") and not timm.is_model(SHORT_IMAGE.get(own.image, own.image)):
        make_trunk(own.image, None)


def towers_of(config: FinetuneConfig, parts: Parts) -> Beginning:
    """Returns what the towers begin as; pretrained weights are fetched, and the vocabulary is that of the training captions.

    Raises InputError where a tower or its weights cannot be had.
    """
    own = config.backbone
    loaded = _pretrained(config.model) if "open_clip" in (own.image, own.text) else None
    source = loaded[0] if loaded else None
    if loaded and (own.image, own.text) == ("open_clip", "open_clip"):
        model_cfg = loaded[1]
        weights = {f"clip.{name}": value for name, value in loaded[0].model.state_dict().items()}
        if own.resize != "own" or own.image_size not in (None, loaded[0].image_size):
            raise InputError(
                f"expected the pictures of the pretrained model ({loaded[0].image_size} pixels), found --backbone.image-size "
                f"{own.image_size} and --backbone.resize {own.resize}; leave them out, or take an image tower of timm"
            )
        return Beginning(loaded[0], {"kind": "open_clip", "model": model_cfg, "maps": own.maps}, weights)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        image, image_weights, prepared = _image_tower(own, loaded, parts)
        text, text_weights = _text_tower(own, loaded, parts)
    weights = {f"image_tower.{name}": value for name, value in image_weights.items()}
    weights |= {f"text_tower.{name}": value for name, value in text_weights.items()}
    sides = []
    for name, begins in ((own.image, own.image_weights), (own.text, own.text_weights)):
        where = f" of {source.identity.get('where')}" if name == "open_clip" and source is not None else f" ({begins})"
        sides.append(name + ("" if name == "regions" or name in RECURRENT else where))
    identity = {"where": " and ".join(sides), "model": f"{own.image} and {own.text}"}
    backbone = {"kind": "towers", "image": image, "text": text}
    kept = torch.nn.Identity() if source is None else source.model
    return Beginning(LoadedModel(model=kept, tokenizer=_no_tokenizer, identity=identity, **prepared), backbone, weights)


def _no_tokenizer(texts: list[str]) -> Tensor:
    raise AssertionError("a run's tokenizer is that of its backbone")


def _pretrained(model: str | None) -> tuple[LoadedModel, dict[str, Any]]:
    """Returns the pretrained model, on the CPU, and its configuration as open_clip has it. Raises InputError."""
    loaded = model_to_evaluate(model, "cpu")
    if isinstance(loaded.model, SetModel):
        raise InputError(
            f"expected a pretrained model with two towers, found a fine-tuned one at {loaded.identity['where']}; give the model "
            f"that it began with ({loaded.identity.get('from', {}).get('where', 'see its setclip_config.json')})"
        )
    loaded.model.requires_grad_(False)
    folder = Path(str(loaded.identity["where"]))
    if folder.is_dir():
        return loaded, json.loads((folder / OPEN_CLIP_CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
    return loaded, model_config(str(loaded.identity["model"]))


# --- pictures


def _image_tower(
    own: BackboneConfig, loaded: tuple[LoadedModel, dict[str, Any]] | None, parts: Parts
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Returns (description, pretrained weights, how pictures are prepared: arguments of LoadedModel)."""
    if own.image == "regions":
        regions = parts.train.regions
        assert regions is not None
        usual = {"image_size": 0, "mean": MEAN, "std": STD}
        return {"kind": "regions", "width": regions.width}, {}, usual
    if own.image == "open_clip":
        assert loaded is not None
        source, model_cfg = loaded
        prepared = {
            name: getattr(source, name) for name in ("image_size", "mean", "std", "interpolation", "resize_mode")
        }
        weights = {n: v for n, v in source.model.state_dict().items() if n.startswith("visual.")}
        return {"kind": "open_clip", "model": model_cfg, "maps": own.maps}, _under("towers.clip.", weights), prepared
    name = SHORT_IMAGE.get(own.image, own.image)
    if own.image_weights == "pretrained":
        _check_timm_weights(name)
        trunk = _fetched(name, lambda: make_trunk(name, own.image_size, pretrained=True))
    else:
        trunk = make_trunk(name, own.image_size)
        if own.image_weights != "random":
            _load_into_trunk(trunk, name, Path(own.image_weights))
    data = timm.data.resolve_model_data_config(trunk)
    size = own.image_size or int(data["input_size"][-1])
    usual_mode = RESIZE.get(own.image) or _resize_of(data)
    if usual_mode == "classic" and size > 256:
        usual_mode = "squash"
    mode = own.resize if own.resize != "own" else usual_mode
    prepared = {
        "image_size": size,
        "mean": tuple(map(float, data["mean"])),
        "std": tuple(map(float, data["std"])),
        "interpolation": "bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        "resize_mode": mode,
    }
    description = {"kind": "timm", "name": name, "image_size": size, "maps": own.maps}
    return description, _under("trunk.", trunk.state_dict()), prepared


def _resize_of(data: Mapping[str, Any]) -> str:
    """Returns the resizing nearest to what timm says of a model."""
    if data.get("crop_mode") == "squash":
        return "squash"
    return "classic" if data.get("crop_pct", 1.0) <= 0.9 else "shortest"


def _check_timm_weights(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise InputError(
            f"expected pretrained weights for timm's {name!r}, found that timm has none; name a model with weights (as "
            f"{', '.join(timm.list_models(name.split('.')[0] + '*', pretrained=True)[:3]) or 'resnet152'}), or give "
            "--backbone.image-weights FILE or random"
        )
    if cfg.hf_hub_id:
        _check_reachable(cfg.hf_hub_id, ("model.safetensors", "pytorch_model.bin"), "image")


def _load_into_trunk(trunk: torch.nn.Module, name: str, path: Path) -> None:
    """Loads a file of weights as timm would, and raises InputError where it does not hold all of them."""
    try:
        state = timm.models.load_state_dict(str(path))
        module = sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]
        if (fit := getattr(module, "checkpoint_filter_fn", None)) is not None:
            state = fit(state, trunk)
        _load_whole(trunk, state, path, "image")
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"expected weights of timm's {name!r} in {path}, found what cannot be read as such "
            f"({first_line(error)}); give a safetensors file or "
            "a state dict of torch"
        ) from error


def _load_whole(module: torch.nn.Module, state: Mapping[str, Tensor], path: Path, side: str) -> None:
    """Loads weights; those that only a classifier or a language head has are left out, and none may be missing."""
    own = module.state_dict()
    missing = [n for n in own if n not in state and not n.endswith(("num_batches_tracked", "position_ids"))]
    other = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or other:
        first = (
            missing[0] if missing else f"{other[0]}: {tuple(state[other[0]].shape)} for {tuple(own[other[0]].shape)}"
        )
        raise InputError(
            f"expected all weights of the {side} tower in {path}, found {len(missing):,} of {len(own):,} missing and "
            f"{len(other):,} of another shape (first: {first}); give weights of the same model as --backbone.{side}"
        )
    module.load_state_dict({n: state[n] for n in own if n in state}, strict=False)


# --- texts


def _text_tower(
    own: BackboneConfig, loaded: tuple[LoadedModel, dict[str, Any]] | None, parts: Parts
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns (description, pretrained weights)."""
    if own.text == "open_clip":
        assert loaded is not None
        source, model_cfg = loaded
        left_out = ("visual.", "logit_scale", "logit_bias")
        weights = {n: v for n, v in source.model.state_dict().items() if not n.startswith(left_out)}
        return {"kind": "open_clip", "model": model_cfg}, _under("towers.clip.", weights)
    if own.is_recurrent:
        return _recurrent(own, parts)
    name = SHORT_TEXT.get(own.text, own.text)
    if not Path(name).is_dir():
        _check_reachable(name, ("config.json",), "text")
    config = _fetched(name, lambda: transformers.AutoConfig.from_pretrained(name))
    tokenizer = _fetched(name, lambda: transformers.AutoTokenizer.from_pretrained(name))
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise InputError(
            f"expected a tokenizer with a tokenizer.json and a padding token in {name}, found "
            f"{type(tokenizer).__name__}{'' if tokenizer.is_fast else ', which has no tokenizer.json'}; take another text tower"
        )
    pad = int(tokenizer.pad_token_id)
    places = int(getattr(config, "max_position_embeddings", own.text_length))
    if "roberta" in config.model_type:  # its places begin behind the padding's number
        places -= pad + 1
    text = {
        "kind": "hugging_face",
        "config": config.to_dict(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "pad": pad,
        "mask": tokenizer.mask_token_id,
        "length": min(own.text_length, places, tokenizer.model_max_length),
    }
    encoder = make_encoder(text["config"])
    if own.text_weights == "random":
        return text, _under("encoder.", encoder.state_dict())
    if own.text_weights == "pretrained":
        found = _fetched(name, lambda: transformers.AutoModel.from_pretrained(name, dtype=torch.float32))
        state = dict(found.state_dict())
        place = Path(name)
    else:
        place = Path(own.text_weights)
        state = _state_of(place, str(encoder.base_model_prefix))
    _load_whole(encoder, state, place, "text")
    return text, _under("encoder.", encoder.state_dict())


def _state_of(path: Path, prefix: str) -> dict[str, Tensor]:
    """Returns the weights of a file, without the name of the encoder in front that models with a head have."""
    try:
        state = timm.models.load_state_dict(str(path))
    except Exception as error:
        raise InputError(
            f"expected weights of a text tower in {path}, found what cannot be read as such ({type(error).__name__}); give a "
            "safetensors file or a state dict of torch"
        ) from error
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items()}


def _recurrent(own: BackboneConfig, parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    captions = [text for texts in parts.train.data.captions for text in texts]
    vocabulary = Vocabulary.of_captions(captions, own.min_count)
    say(
        f"vocabulary: {len(vocabulary):,} words, those that stand at least {own.min_count} times in {len(captions):,} training "
        "captions"
    )
    text = {
        "kind": "recurrent",
        "words": " ".join(vocabulary.words),
        "cell": own.text,
        "word_width": own.word_width,
        "hidden_width": own.hidden_width,
        "dropout": own.dropout,
        "length": own.text_length,
        **({"local": own.words} if own.words != "states" else {}),
    }
    if own.glove is None:
        return text, {}
    vectors, found = glove_vectors(own.glove, vocabulary, own.word_width)
    words = len(vocabulary) - len(SPECIAL)
    say(f"{own.glove}: vectors of {found:,} of {words:,} words; {words - found:,} are not in it and begin at random")
    return text, {"embedding.weight": vectors}


def glove_vectors(path: Path, vocabulary: Vocabulary, width: int) -> tuple[Tensor, int]:
    """Returns (vectors (words, `width`), how many words the file has); the others are random, the same at each call.

    Raises InputError where the file is not one word and `width` numbers a line.
    """
    random = torch.Generator().manual_seed(0)
    vectors = torch.empty(len(vocabulary), width).uniform_(-0.1, 0.1, generator=random)
    found: set[int] = set()
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line, text in enumerate(file, 1):
                word, _, rest = text.partition(" ")
                number = vocabulary.number(word)
                if line > 1 and (number < len(SPECIAL) or number in found):
                    continue
                numbers = rest.split()
                if line == 1 and len(numbers) == 1 and width > 1:
                    continue  # the first line of word2vec's format: how many words, how wide
                if line > 1 and len(numbers) > width:
                    continue  # a few words of large files have a space in them
                if len(numbers) != width:
                    raise InputError(
                        f"{path}, line {line}: expected a word and {width} numbers, found {len(numbers)}; give vectors that are "
                        "--backbone.word-width wide"
                    )
                if number >= len(SPECIAL):
                    vectors[number] = torch.from_numpy(np.array(numbers, np.float32))
                    found.add(number)
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"expected a text file of word vectors at {path}, found one that cannot be read ({error}); unpack it, or leave "
            "--backbone.glove out"
        ) from error
    if not found:
        raise InputError(
            f"expected vectors of the captions' words in {path}, found none of {len(vocabulary) - len(SPECIAL):,}; give GloVe's "
            "text file, in lower case"
        )
    return vectors, len(found)


# --- fetching


def _check_reachable(repo: str, names: tuple[str, ...], side: str) -> None:
    """Raises InputError where a model is neither in the cache nor can the Hub be asked: within seconds, without its retries."""
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str) for name in names):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
            return
        except Exception as error:
            reason = f"{constants.ENDPOINT} does not answer: {str(error).strip().splitlines()[0]}"
    folder = "a folder of that name, in " if side == "text" else ""
    more = " (with --backbone.text FOLDER, which has configuration and tokenizer)" if side == "text" else ""
    raise InputError(
        f"expected the {side} tower {repo!r} in {folder}Hugging Face's cache or on the Hub, found it in no cache, and {reason}; "
        f"fetch it once where there is a network (`hf download {repo}`) and share its cache (HF_HOME), or give "
        f"--backbone.{side}-weights FILE{more}"
    )


def _fetched(name: str, load: Any) -> Any:
    try:
        return load()
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise InputError(
            f"expected the tower {name!r} with configuration, weights and tokenizer in a folder, in Hugging Face's cache or on "
            f"the Hub, found none ({reason}); fetch it once where there is a network (`hf download {name}`) and share its cache "
            "(HF_HOME), or give weights random or a FILE"
        ) from error


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}
