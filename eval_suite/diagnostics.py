"""Looks into a model: the modality gap, the dimensions that carry a word, and, of sets, whether their elements differ, where
they look, which words they take, and what sub-spaces share.

    python -m eval_suite.diagnostics scenes                                  # under $SETCLIP_DATA, newest run
    python -m eval_suite.diagnostics --data SHARDS --split dev --checkpoint RUN --words dog "traffic light"
    python -m eval_suite.diagnostics flickr30k --regions DIR --checkpoint RUN       # of a model on features of regions
    python -m eval_suite.diagnostics --data SHARDS --embeddings DIR          # of eval_suite.embed, also sets
    python -m eval_suite.diagnostics --data SHARDS --checkpoint RUN --pictures 12   # of finetune.run: pictures of its head

Writes a results file and beside it a page, FILE.html. `diagnose` does the same over encode functions; the figures
themselves are functions of modules of their own (`modality_gap`, `word_dimensions`, `set_diagnostics`, `head_diagnostics`).
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eval_suite.diagnostics_page import write_diagnostics_page
from eval_suite.embed_files import Embeddings
from eval_suite.embedded import embedded_features
from eval_suite.encode import EncodeImage, EncodeText, encode_functions, encode_images, encode_texts
from eval_suite.feature_similarity import FeatureSimilarity, similarity_options_of
from eval_suite.head_diagnostics import (
    HeadDiagnostics,
    diagnose_head,
    head_details,
    head_metrics,
    write_looks,
)
from eval_suite.images import ShardImages, image_batches
from eval_suite.modality_gap import ModalityGap, central_vectors, modality_gap
from eval_suite.model import model_to_evaluate
from eval_suite.preprocess import model_pictures
from eval_suite.regions import CAPTIONS_OF_PICTURE, RegionBatches, RegionSplit, check_width, open_regions, usual_split
from eval_suite.results import Metric, Results, default_out, markdown_table
from eval_suite.retrieval_data import open_retrieval, retrieval_place
from eval_suite.scores import MakeScore
from eval_suite.set_diagnostics import (
    CircularVariance,
    check_similarity,
    circular_variance,
    element_contribution,
    without_contribution,
)
from eval_suite.word_dimensions import (
    THRESHOLD,
    WordDimensions,
    frequent_words,
    pairs_of_word,
    word_dimensions,
)
from setclip.config import command, parse, to_dict
from setclip.errors import InputError
from setclip.log import say, warn
from setclip.models.set_model import SetModel
from setclip.shards import Shard

MOST_TOP = 100  # dimensions a pair, as the paper of word_dimensions takes of 1,024


@dataclass(frozen=True)
class Diagnostics:
    """What was found."""

    gap: ModalityGap
    words: list[WordDimensions]
    variance: dict[str, CircularVariance]
    """"image" and "text", of sets; empty for single vectors."""
    contribution: dict[str, dict[str, Metric]]
    """`element_contribution`, of sets; empty where there is none."""
    head: HeadDiagnostics | None = None
    """Of a fine-tuned model."""
    missing: list[str] = field(default_factory=list)
    """What does not apply to these features, and why."""


def diagnose(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    images: Iterable[Tensor],
    captions: Sequence[Sequence[str]],
    words: Sequence[str] = (),
    make_score: MakeScore | None = None,
    top: int | None = None,
    threshold: float = THRESHOLD,
    show_progress: bool = True,
) -> Diagnostics:
    """Returns the diagnostics of a model on images with captions.

    `images`: batches as `encode_image` takes them, in the order of `captions`. `words`: whose dimensions are wanted; the
    pairs of a word are each caption that has it with its image, of sets by their central vectors. `top`: dimensions
    marked a pair; None: a tenth of D, at most 100. `make_score`: of sets, for the contribution of elements; None:
    smooth_chamfer. Raises InputError on a word that no caption has.
    """
    check_words(words, captions)
    texts = [text for of_image in captions for text in of_image]
    text_features = encode_texts(encode_text, texts, show_progress=show_progress)
    image_features = encode_images(encode_image, images, len(captions), show_progress)
    return diagnose_features(image_features, text_features, captions, words, make_score, top, threshold)


def check_words(words: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
    """Raises InputError on a word that no caption has."""
    texts = [text for of_image in captions for text in of_image]
    without = [word for word in words if not pairs_of_word(word, texts)]
    if without:
        raise InputError(
            f"expected words that captions have, found none of {len(texts):,} captions with {', '.join(map(repr, without))}; "
            "words match as a whole, in any case: give them as the captions write them"
        )


def diagnose_features(
    image_features: Tensor,
    text_features: Tensor,
    captions: Sequence[Sequence[str]],
    words: Sequence[str] = (),
    make_score: MakeScore | None = None,
    top: int | None = None,
    threshold: float = THRESHOLD,
) -> Diagnostics:
    """Returns the same of features, (N, …, D) and (N', …, D), in the order of `captions`; arguments as of `diagnose`."""
    check_words(words, captions)
    texts = [text for of_image in captions for text in of_image]
    image_of_text = torch.tensor(
        [image for image, of_image in enumerate(captions) for _ in of_image], dtype=torch.int64
    )
    rows_of_word = {word: pairs_of_word(word, texts) for word in words}
    image_vectors, text_vectors = central_vectors(image_features), central_vectors(text_features)
    width = image_vectors.shape[1]
    top = top or max(1, min(MOST_TOP, width // 10))
    found = [
        word_dimensions(word, image_vectors[image_of_text[rows]], text_vectors[rows], top, threshold)
        for word, rows in rows_of_word.items()
    ]
    sets = {what: f for what, f in (("image", image_features), ("text", text_features)) if f.ndim == 3}
    make_score = make_score or FeatureSimilarity()
    missing = without_contribution(make_score, image_features, text_features)
    contribution = {}
    if not missing:
        contribution = element_contribution(image_features, text_features, image_of_text, make_score)
    return Diagnostics(
        gap=modality_gap(image_vectors, text_vectors, image_of_text),
        words=found,
        variance={what: circular_variance(features) for what, features in sets.items()},
        contribution=contribution,
        missing=missing,
    )


def metrics_of(found: Diagnostics) -> dict[str, Metric]:
    """Returns the numbers of the diagnostics for a results file."""
    gap = found.gap
    pairs = f"{gap.num_images:,} images and {gap.num_texts:,} captions, unit vectors"
    metrics = {
        "gap": _number(
            gap.distance,
            f"Distance between the centroids of images and captions (Liang et al. 2022); {pairs}.",
            gap.num_texts,
        ),
        "gap_constant": _number(
            100 * gap.constant_share,
            "Share of the mean squared distance of matched pairs that is one vector common to all pairs.",
            gap.num_texts,
            "%",
        ),
        "matched_cosine": _number(
            gap.matched_cosine, f"Mean cosine of captions with their own image; {pairs}.", gap.num_texts
        ),
    }
    if gap.unmatched_cosine is not None:
        unmatched = gap.num_images * gap.num_texts - gap.num_texts
        metrics["unmatched_cosine"] = _number(
            gap.unmatched_cosine, f"Mean cosine of all other pairs; {pairs}.", unmatched
        )
    for what, variance in found.variance.items():
        for name, value, how in (
            ("log_of_mean", variance.log_of_mean, "Natural logarithm of the mean"),
            ("mean_of_logs", variance.mean_of_logs, "Mean of the natural logarithms"),
        ):
            if value is not None:
                protocol = f"{how} of the circular variance, 1 − ‖mean of the unit elements‖, of the {what} sets."
                metrics[f"variance_{what}_{name}"] = _number(value, protocol, len(variance.of_sets))
    return metrics | (head_metrics(found.head) if found.head is not None else {})


def details_of(found: Diagnostics) -> dict[str, Any]:
    """Returns what else was found, for a results file."""
    return {
        "gap": dataclasses.asdict(found.gap),
        "words": [
            {
                "word": word.word,
                "pairs": word.num_pairs,
                "top": word.top,
                "threshold": word.threshold,
                "marked": word.marked.tolist(),
                "in_half_of_the_pairs": word.common.tolist(),
                "dimensions": word.dimensions.tolist(),
                "probabilities": word.probabilities.tolist(),
                "notes": word.notes,
            }
            for word in found.words
        ],
        "collapsed_sets": {what: variance.num_collapsed for what, variance in found.variance.items()},
        "contribution": {
            kept: {name: metric.value for name, metric in metrics.items()}
            for kept, metrics in found.contribution.items()
        },
        **({} if found.head is None else {"head": head_details(found.head)}),
        "does_not_apply": found.missing,
    }


def _number(value: float, protocol: str, samples: int, unit: str = "") -> Metric:
    return Metric(value=value, unit=unit, protocol=protocol, samples=samples)


# --- the command


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """What is looked into, on what, and where the page goes."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Data set: scenes, flickr30k, coco, cub, or any folder of shards under $SETCLIP_DATA."""
    data: Path | None = None
    """Folder of shards elsewhere."""
    regions: Path | None = None
    """Folder of region features in SCAN's layout, of a model that was fine-tuned on such."""
    region_captions: int = CAPTIONS_OF_PICTURE
    """Captions of each picture in --regions; of flickr30k and coco five anyway."""
    split: str | None = None
    """Default: test, dev or val, whichever is there first."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    embeddings: Path | None = None
    """Take these, written by eval_suite.embed, instead of a model's: single vectors or sets."""
    out: Path | None = None
    """Results file; the page lies beside it. Default: results/ of the run."""
    words: tuple[str, ...] = ()
    """Words whose dimensions are wanted. Default: the objects that most captions name."""
    num_words: int = 6
    """How many words, where they are not given."""
    parser: str = "pos"
    """Whose objects these are."""
    top: int | None = None
    """Dimensions marked a pair. Default: a tenth of them, at most 100."""
    threshold: float = THRESHOLD
    """Level above which a dimension is said to carry a word."""
    pictures: int = 6
    """Of a fine-tuned model: pictures on which it is shown where elements look, and captions whose words they take."""
    scale: Literal["each", "common"] = "each"
    """each element is shown against its own highest attention, or all of a picture against the highest of all (common)."""
    similarity: str | None = None
    """Of sets. Default: what the checkpoint names, else smooth_chamfer."""
    similarity_options: tuple[str, ...] = ()
    """Its options, as alpha=16."""
    batch_size: int = 128
    """Images a batch."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.embeddings is not None:
            raise ValueError(
                f"expected --checkpoint or --embeddings, found both ({self.checkpoint}; {self.embeddings}); embeddings "
                "know which model made them"
            )
        if self.regions is not None and (self.data is not None or self.embeddings is not None):
            raise ValueError(
                f"expected --regions, --data or --embeddings, found more than one beside {self.regions}; leave the others out"
            )
        if self.region_captions < 1:
            raise ValueError(f"region_captions must be at least 1, found {self.region_captions}")
        if self.pictures < 0:
            raise ValueError(f"expected pictures of at least 0, found {self.pictures}; 0 draws none")


def evaluate(config: DiagnosticsConfig) -> tuple[Results, Diagnostics]:
    """Does what the command does but for writing. Raises InputError before the model is loaded where data are wrong."""
    regions: RegionSplit | None = None
    shards: list[Shard] = []
    if config.regions is not None:
        place = config.regions
        name, split = config.name or place.resolve().name, config.split or usual_split(place)
        regions = open_regions(place, split, config.name, True, config.region_captions)
        data, is_partial = regions.data, regions.is_partial
    else:
        name, place = retrieval_place(config.name, config.data)
        split, shards, data, _, is_partial = open_retrieval(config.name, place, config.split, allow_partial=True)
    words = config.words or _words_of(shards, config.parser, config.num_words)
    if not words:
        warn(f"no captions parsed by {config.parser!r} at {place}, so no words are chosen: name some with --words")
    options = similarity_options_of(config.similarity_options)
    if config.embeddings is not None:
        check_words(words, data.captions)
        embeddings = Embeddings.open(config.embeddings)
        identity = embeddings.description["model"]
        similarity = FeatureSimilarity(config.similarity, options, identity)
        start = time.monotonic()
        features = embedded_features(embeddings, data.keys, data.captions)
        if config.similarity is not None:
            check_similarity(similarity, *features)
        found = diagnose_features(*features, data.captions, words, similarity, config.top, config.threshold)
        if any(each.ndim == 3 for each in features):
            why = "Where elements look, their words and sub-spaces: these are of the model; give it with --checkpoint."
            found = replace(found, missing=[*found.missing, why])
    else:
        loaded = model_to_evaluate(config.checkpoint, config.device)
        identity = loaded.identity
        similarity = FeatureSimilarity(config.similarity, options, identity)
        start = time.monotonic()
        images: ShardImages | None = None
        if regions is not None:
            check_width(loaded, regions.regions)
        else:
            images = ShardImages(shards, model_pictures(loaded))
        encoders = encode_functions(loaded)
        if config.similarity is not None:  # what is asked for and cannot be is told before all is encoded
            encode_image, encode_text = encoders
            first = _batches(images, regions, 1, 0)[0]
            with torch.no_grad():
                sides = (encode_image(first), encode_text([data.captions[0][0]]))
            check_similarity(similarity, *(each.float().cpu() for each in sides))
        batches = _batches(images, regions, config.batch_size, config.workers)
        found = diagnose(*encoders, batches, data.captions, words, similarity, config.top, config.threshold)
        if images is None:
            why = "Where elements look, their words and sub-spaces: they are told of models of pictures alone."
            found = replace(found, missing=[*found.missing, why])
        elif isinstance(loaded.model, SetModel):
            head = diagnose_head(loaded, images, data.captions, config.pictures, config.scale)
            variance = dict(found.variance)
            if head.text_variance is not None:
                variance.setdefault("text", head.text_variance)
            found = replace(found, head=head, variance=variance, missing=[*found.missing, *head.missing])
        else:
            why = (
                "Slots, their words and sub-spaces: the model has two towers and no heads; `python -m finetune.run` trains heads "
                "that make sets."
            )
            found = replace(found, missing=[*found.missing, why])
    metrics = metrics_of(found)
    results = Results(
        evaluation="diagnostics",
        dataset={
            "name": name,
            "place": str(place),
            "split": split,
            "images": len(data.keys),
            "captions": sum(map(len, data.captions)),
            "captions_sha256": data.captions_sha256,
        },
        metrics=metrics,
        headline=list(metrics),
        checkpoint=dict(identity),
        config=to_dict(config),
        is_partial=is_partial,
        details={**similarity.described, **details_of(found)},
        seconds=round(time.monotonic() - start, 3),
    )
    return results, found


def _batches(
    images: ShardImages | None, regions: RegionSplit | None, batch_size: int, workers: int | None
) -> Sequence[Tensor]:
    if regions is not None:
        return RegionBatches(regions.regions, batch_size)
    assert images is not None
    return image_batches(images, batch_size, workers)


def _words_of(shards: Sequence[Shard], parser: str, num: int) -> list[str]:
    samples = (sample for shard in shards for sample in shard)
    return frequent_words((names for sample in samples for names in sample.objects.get(parser, [])), num)


def main() -> None:
    """Runs the command."""
    config: DiagnosticsConfig = parse(DiagnosticsConfig, description=__doc__)
    results, found = evaluate(config)
    dataset = f"{results.dataset['name']}_{results.dataset['split']}"
    out = config.out or default_out("diagnostics", dataset, results.checkpoint)
    results.save(out)
    page = out.with_suffix(".html")
    write_diagnostics_page(page, results, found.words, found.contribution, found.head, found.missing)
    if found.head is not None and found.head.cards:
        write_looks(out.with_suffix(".looks.json"), found.head)
    say(f"\n{markdown_table([results])}")
    for word in found.words:
        best = ", ".join(map(str, word.dimensions[:5].tolist()))
        say(f"{word.word}: {word.num_pairs:,} pairs, strongest dimensions {best}")
    for why in found.missing:
        say(f"does not apply: {why}")
    for note in dict.fromkeys(note for word in found.words for note in word.notes):
        say(note)
    say(f"\nresults: {out}\npage: {page}")


if __name__ == "__main__":
    command(main)
