"""Recalls of a model in training and of the chosen one, by the evaluation suite's own protocols. Collective throughout.

Features of frozen towers come from memory (`finetune.features`); the sets that heads make of them are what `eval_suite.retrieval`
makes of pictures, and so are the figures.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval_suite.encode import EncodeImage, EncodeText, KeepsNorms
from eval_suite.feature_similarity import FeatureSimilarity
from eval_suite.preprocess import model_pictures
from eval_suite.protocols import DIRECTIONS, RECALLS, ProtocolOutcome, Setting
from eval_suite.results import Results
from eval_suite.retrieval import KEPT_SCORES, score_of
from eval_suite.scores import Score, remembered
from finetune.data import Part
from finetune.features import PartInputs, Pictures, picture_batches, pixels_of
from finetune.noise import features_of_pictures
from setclip.checkpoint import LoadedModel
from setclip.distributed import World
from setclip.models.set_model import Inference, SetModel, as_features

_AT_A_TIME = 128


def score_with(
    model: SetModel, inputs: PartInputs, loaded: LoadedModel, world: World, inference: Inference, show_progress: bool
) -> tuple[Score, FeatureSimilarity]:
    """Returns the Score of all pictures of a part against all texts, as evaluation makes it, and the similarity."""
    device = world.device
    pictures = None if inputs.images is not None else Pictures(inputs.part, model_pictures(loaded))

    def encode_image(rows: Tensor) -> Tensor:
        if inputs.images is not None:
            found = features_of_pictures(model.backbone, inputs.images.of(rows, device))
            return as_features(model.images(found))
        assert pictures is not None
        batch = next(picture_batches(pictures, _once([(int(row), 0) for row in rows]), 0))
        return model.encode_image(pixels_of(batch, loaded, device))

    def encode_text(texts: list[str]) -> Tensor:
        if inputs.texts is not None:
            features = inputs.texts.of(inputs.rows_of_texts(texts), device)
        else:
            features = model.backbone.text(model.backbone.tokenizer(texts).to(device))
        return model.text_features(model.texts(features), inference)

    number = len(inputs.part)
    batches = [torch.arange(i, min(i + _AT_A_TIME, number)) for i in range(0, number, _AT_A_TIME)]
    named = dict(model.similarity_of_features(inference))
    similarity = FeatureSimilarity(identity={"similarity": named}, weights=model.state_dict())
    image: EncodeImage = KeepsNorms(encode_image) if model.keeps_norms else encode_image
    text: EncodeText = KeepsNorms(encode_text) if model.keeps_norms else encode_text
    was_training = model.training
    model.eval()
    try:
        score = score_of(image, text, batches, inputs.part.data.captions, similarity, show_progress, world)
    finally:
        model.train(was_training)
    return score, similarity


def validate(model: SetModel, inputs: PartInputs, loaded: LoadedModel, world: World) -> dict[str, float]:
    """Returns the figures of the first protocol by name, on all ranks; "rsum" is what chooses. Of DH-Set also those of the
    other comparison, with its name in front.
    """
    found: dict[str, float] = {}
    protocol = next(iter(inputs.part.protocols.values()))
    for inference in model.inferences:
        score, _ = score_with(model, inputs, loaded, world, inference, show_progress=False)
        outcome = protocol.run(remembered(score), inputs.part.data, Setting(resamples=1, world=world))
        values = {name.removeprefix(protocol.prefix): metric.value for name, metric in outcome.metrics.items()}
        # class matching has no RSUM of its own
        values.setdefault(
            "rsum", sum(values[f"{direction}_{recall}"] for direction in DIRECTIONS for recall in RECALLS)
        )
        front = "" if inference == model.inference else f"{inference}_"
        found |= {front + name: value for name, value in values.items()}
    return found


def results_of(
    model: SetModel,
    inputs: PartInputs,
    loaded: LoadedModel,
    world: World,
    inference: Inference,
    identity: dict[str, Any],
    config: dict[str, Any],
) -> Results:
    """Returns the results of all protocols of a part, with intervals, as the command of retrieval writes them."""
    begun = time.monotonic()
    score, similarity = score_with(model, inputs, loaded, world, inference, show_progress=False)
    details = {**similarity.described, "inference": inference}
    return results_of_score(
        remembered(score, KEPT_SCORES // world.size), inputs.part, world, identity, config, details, begun
    )


def results_of_score(
    score: Score,
    part: Part,
    world: World,
    identity: dict[str, Any],
    config: dict[str, Any],
    details: dict[str, Any],
    begun: float,
) -> Results:
    """Returns the results of all protocols of a part from scores of its pictures with its texts. `begun`: time.monotonic()."""
    setting = Setting(world=world)
    found: dict[str, ProtocolOutcome] = {
        name: protocol.run(score, part.data, setting) for name, protocol in part.protocols.items()
    }
    names = []
    for number, protocol in enumerate(part.protocols.values()):
        names += protocol.headline() if number == 0 else [protocol.prefix + name for name in protocol.brief]
    return Results(
        evaluation="retrieval",
        dataset={
            "name": part.name,
            "place": str(part.place),
            "split": part.split,
            "images": len(part),
            "captions": sum(map(len, part.data.captions)),
            "captions_sha256": part.data.captions_sha256,
        },
        metrics={name: metric for outcome in found.values() for name, metric in outcome.metrics.items()},
        headline=names,
        checkpoint=identity,
        config=config,
        is_partial=part.is_partial,
        details={
            "protocols": {name: protocol.sentence for name, protocol in part.protocols.items()},
            **details,
            "captions_left_out": part.data.left_out,
            "ranks": world.size,
        },
        seconds=round(time.monotonic() - begun, 3),
    )


def results_path(out: Path, split: str, inference: Inference, is_main: bool) -> Path:
    """Returns where the results of a split lie in a run."""
    return out / "results" / f"retrieval_{split}{'' if is_main else f'_{inference}'}.json"


def _once(places: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    yield places
