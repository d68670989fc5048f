"""Which similarity compares a model's features: the one that is asked for, what its checkpoint names, or what fits them.

Used by the commands of retrieval, diagnostics and search. A checkpoint names it in setclip_config.json, as a name or as
{"name": "match_prob", "a": 12.1, "b": -3.4}: options, and numbers that were learned. Letters: N samples, K elements of a
set, D width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from eval_suite.scores import MakeScore, Score
from eval_suite.set_scores import set_scores
from setclip.checkpoint import weights_path
from setclip.errors import InputError
from setclip.log import say, warn
from setclip.lookup import look_up
from setclip.models.matching import MATCHINGS, make_matching
from setclip.similarity import SetSimilarity

WEIGHTS = "weights"
"""Option of a similarity with layers: what stands before the names of its weights in the checkpoint."""

OF_SETS = "smooth_chamfer"
"""What compares sets where nothing is named."""


class FeatureSimilarity:
    """A MakeScore, for features (N, D) or sets (N, K, D); afterwards it says by what it compared them."""

    def __init__(
        self,
        asked: str | None = None,
        options: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ):
        """`asked`: a name, with `options`; None: what the identity of a checkpoint names, else cosine of single vectors and
        smooth_chamfer of sets. `weights`: of the model, for a similarity that has layers; None: of the checkpoint that
        `identity` names. Raises InputError on an unknown name or option.
        """
        self.name, self.options = similarity_named(asked, options or {}, identity or {})
        self.similarity = None if self.name is None else _made(self.name, self.options, identity or {}, weights)

    def __call__(self, image_features: Tensor, text_features: Tensor) -> Score:
        if self.similarity is None:
            self.name = "cosine" if image_features.ndim == text_features.ndim == 2 else OF_SETS
            self.similarity = _made(self.name, {}, {}, None)
            if self.name == OF_SETS:
                say(f"sets of vectors, and no similarity is named: comparing them by {OF_SETS} (see --similarity)")
        return scores_of(self.similarity)(image_features, text_features)

    @property
    def described(self) -> dict[str, Any]:
        """What results say of it."""
        return {"similarity": self.name, "similarity_options": dict(self.options)}


def similarity_named(
    asked: str | None, options: Mapping[str, Any], identity: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Returns (name, options); None where nothing names one.

    Options of the checkpoint hold where it has the similarity that is asked for; those given go first. Options without a
    name are of smooth_chamfer. Raises InputError on an identity whose similarity has no name.
    """
    of_model = identity.get("similarity")
    named: dict[str, Any] = {"name": of_model} if isinstance(of_model, str) else dict(of_model or {})
    own_name = named.pop("name", None)
    if of_model is not None and not isinstance(own_name, str):
        raise InputError(
            f"expected the checkpoint's similarity as a name, or as an object with a name and options, found {of_model!r}; "
            "correct setclip_config.json, or name one with --similarity"
        )
    name = asked or own_name or (OF_SETS if options else None)  # which single vectors have no options for
    if name is None:
        return None, {}
    is_own = own_name is not None and look_up(MATCHINGS, name, "similarity") is MATCHINGS.get(own_name)
    return name, {**(named if is_own else {}), **options}


def similarity_options_of(entries: Sequence[str]) -> dict[str, Any]:
    """Returns {"alpha": 16.0} of ("alpha=16.0",); values are JSON, else text. Raises InputError on one without "="."""
    options: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            raise InputError(
                f"expected an option of the similarity as NAME=VALUE, found {entry!r}; write alpha=16, for example"
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def scores_of(similarity: SetSimilarity) -> MakeScore:
    """Returns a MakeScore of a similarity of sets, for features (N, K, D), or (N, D) as sets of one element.

    Zero vectors are elements that are not there, as `encode_images` and `encode_texts` fill sets up with.
    """

    def make_score(image_features: Tensor, text_features: Tensor) -> Score:
        images, texts = (each.unsqueeze(1) if each.ndim == 2 else each for each in (image_features, text_features))
        return set_scores(similarity, images, texts, mask_of(images), mask_of(texts))

    return make_score


def mask_of(sets: Tensor) -> Tensor | None:
    """Returns where sets, (N, K, D), have an element, (N, K) bool: what is not zero; None: everywhere."""
    mask = sets.any(-1)
    return None if bool(mask.all()) else mask


def _made(
    name: str, options: Mapping[str, Any], identity: Mapping[str, Any], weights: Mapping[str, Tensor] | None
) -> SetSimilarity:
    options = dict(options)
    prefix = options.pop(WEIGHTS, None)
    similarity = make_matching(name, **options)
    if prefix is not None:
        _fill(similarity, str(prefix), identity, weights)
        return similarity
    untold = [each for each, _ in similarity.named_parameters() if each not in options]
    if untold:
        values = ", ".join(f"{each} = {getattr(similarity, each).item():g}" for each in untold)
        warn(
            f"{name} learns {' and '.join(untold)}, and neither the checkpoint nor --similarity-options gives them: "
            f"taking {values}, where training starts"
        )
    return similarity


def _fill(
    similarity: SetSimilarity, prefix: str, identity: Mapping[str, Any], weights: Mapping[str, Tensor] | None
) -> None:
    """Puts in the weights of a similarity's layers, those of the model in memory or of its checkpoint. Raises InputError."""
    where = Path(str(identity.get("where", "")))
    if weights is None:
        path = weights_path(where)
        if not path.is_file():
            raise InputError(
                f"expected the weights of the similarity in the checkpoint, found none at {path}; evaluate with --checkpoint, on "
                "the machine that has it"
            )
        weights = load_file(path)
    own = similarity.state_dict()
    missing = [name for name in own if prefix + name not in weights]
    if missing:
        raise InputError(f"expected {prefix}{missing[0]} among the weights of {where}, found none; train anew")
    similarity.load_state_dict({name: weights[prefix + name].detach().float().cpu() for name in own})
