"""Image–text retrieval: each image ranks all captions, each caption ranks all images.

    python -m eval_suite.retrieval scenes                                    # under $SETCLIP_DATA, newest run
    python -m eval_suite.retrieval --data SHARDS --split dev --checkpoint RUN --out FILE
    srun python -m eval_suite.retrieval --data SHARDS --checkpoint RUN       # the same on Slurm, one process

R@1/5/10 both ways, median rank and RSUM, beside chance, with 95 % intervals and under each rule for equal scores. A
small FILE.gallery.json holds some queries with their best answers, and the worst failures, for reports. `retrieval` is
the evaluation as a function over encode functions; training calls it on its way.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eval_suite.encode import EncodeImage, EncodeText, encode_functions, encode_images, encode_texts
from eval_suite.gallery import gallery
from eval_suite.images import ShardImages, image_batches
from eval_suite.metrics import (
    TIE_RULES,
    Ranks,
    Score,
    TieRule,
    bootstrap_percentages,
    chance_median_rank,
    chance_recall_at_k,
    dot_scores,
    median_rank,
    percentile_interval,
    recall_at_k,
    retrieval_ranks,
)
from eval_suite.model import model_to_evaluate
from eval_suite.results import Metric, Results, default_out, markdown_table
from eval_suite.retrieval_data import retrieval_place
from setclip.config import command, parse, to_dict
from setclip.errors import InputError
from setclip.files import write_json
from setclip.images import eval_transform
from setclip.log import say
from setclip.manifest import open_split
from setclip.shards import Shard

KS = (1, 5, 10)
HEADLINE_RULE: TieRule = "pessimistic"
Direction = Literal["i2t", "t2i"]


@dataclass(frozen=True)
class RetrievalOutcome:
    """What an evaluation found."""

    metrics: dict[str, Metric]
    i2t: Ranks
    """Of each image's best caption among all captions."""
    t2i: Ranks
    """Of each caption's image among all images."""
    score: Score
    image_of_text: Tensor
    """(number of captions,) int64."""


def retrieval(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    images: Iterable[Tensor],
    captions: Sequence[Sequence[str]],
    make_score: Callable[[Tensor, Tensor], Score] = dot_scores,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> RetrievalOutcome:
    """Ranks all captions for each image and all images for each caption.

    `images`: batches as `encode_image` takes them, in the order of `captions`, which has at least one for each image.
    `make_score(image_features, text_features)` makes the Score of the similarity, by default the dot product.
    `resamples` and `seed` are those of the bootstrap. `show_progress=False` where another progress bar is on
    the screen.

    Metrics: `i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_…` (percent), `rsum` (their sum), `i2t_medr`, `t2i_medr`. Raises
    InputError where the counts do not fit or a feature or score is not finite.
    """
    image_of_text = torch.tensor([image for image, texts in enumerate(captions) for _ in texts], dtype=torch.int64)
    text_features = encode_texts(
        encode_text, [text for texts in captions for text in texts], show_progress=show_progress
    )
    image_features = encode_images(encode_image, images, len(captions), show_progress)
    score = make_score(image_features, text_features)
    i2t, t2i = retrieval_ranks(score, image_of_text, len(captions))
    return RetrievalOutcome(retrieval_metrics(i2t, t2i, image_of_text, resamples, seed), i2t, t2i, score, image_of_text)


def retrieval_metrics(
    i2t: Ranks, t2i: Ranks, image_of_text: Tensor, resamples: int = 1000, seed: int = 0
) -> dict[str, Metric]:
    """Returns the metrics of `retrieval` from ranks."""
    num_images, num_texts = len(i2t.better), len(t2i.better)
    texts_of_image = image_of_text.bincount(minlength=num_images)
    ties = f"Ties: {TIE_RULES[HEADLINE_RULE]}."
    protocols = {
        "i2t": f"{num_images:,} images each rank {num_texts:,} captions; the best of an image's own counts. {ties}",
        "t2i": f"{num_texts:,} captions each rank {num_images:,} images; a caption's own image counts. {ties}",
    }
    ranks = {"i2t": i2t, "t2i": t2i}
    chances = {
        **{f"i2t_r{k}": chance_recall_at_k(k, num_texts, texts_of_image) for k in KS},
        **{f"t2i_r{k}": chance_recall_at_k(k, num_images) for k in KS},
    }
    bootstrap = _bootstrap(i2t, t2i, image_of_text, resamples, seed)
    method = f"bootstrap over images with their captions, {resamples:,} draws, seed {seed}, gallery fixed"
    metrics: dict[str, Metric] = {}
    for column, name in enumerate(chances):
        direction, k = name[:3], int(name[5:])
        by_rule = {rule: recall_at_k(ranks[direction].by(rule), k) for rule in TIE_RULES}
        metrics[name] = Metric(
            value=by_rule.pop(HEADLINE_RULE),
            unit="%",
            protocol=f"Recall at {k}: queries whose right answer is among the first {k}. {protocols[direction]}",
            samples=len(ranks[direction].better),
            chance=chances[name],
            interval_95=percentile_interval(bootstrap[:, column]),
            interval_method=method,
            tie_variants={str(rule): value for rule, value in by_rule.items()},
        )
    recalls = list(metrics.values())
    metrics["rsum"] = Metric(
        value=sum(m.value for m in recalls),
        unit="sum of %",
        protocol=f"RSUM: sum of the six recalls, i2t and t2i at 1, 5 and 10. {ties}",
        samples=num_images + num_texts,
        chance=sum(chances.values()),
        interval_95=percentile_interval(bootstrap.sum(1)),
        interval_method=method,
        tie_variants={str(r): sum(m.tie_variants[r] for m in recalls) for r in TIE_RULES if r != HEADLINE_RULE},
    )
    for direction, gallery_size, positives in (("i2t", num_texts, texts_of_image), ("t2i", num_images, 1)):
        by_rule = {rule: float(median_rank(ranks[direction].by(rule))) for rule in TIE_RULES}
        metrics[f"{direction}_medr"] = Metric(
            value=by_rule.pop(HEADLINE_RULE),
            unit="rank",
            protocol=f"Med r: floor of the median 0-based rank, plus 1. {protocols[direction]}",
            samples=len(ranks[direction].better),
            chance=float(chance_median_rank(gallery_size, positives)),
            tie_variants={str(rule): value for rule, value in by_rule.items()},
        )
    return metrics


def _bootstrap(i2t: Ranks, t2i: Ranks, image_of_text: Tensor, resamples: int, seed: int) -> Tensor:
    """Returns (resamples, 6) recalls. Captions of one image are not independent: images are drawn with theirs."""
    num_images = len(i2t.better)
    hits = [(i2t.by(HEADLINE_RULE) < k).double() for k in KS]
    of_texts = [(t2i.by(HEADLINE_RULE) < k).double() for k in KS]
    hits += [image_of_text.bincount(weights=hit, minlength=num_images) for hit in of_texts]
    texts_of_image = image_of_text.bincount(minlength=num_images).double()
    counts = [torch.ones(num_images, dtype=torch.float64)] * len(KS) + [texts_of_image] * len(KS)
    return bootstrap_percentages(torch.stack(hits, 1), torch.stack(counts, 1), resamples, seed)


# --- the command


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is evaluated, on what, and where the results go."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Data set: a folder of shards under $SETCLIP_DATA (scenes, …)."""
    data: Path | None = None
    """Folder of shards elsewhere."""
    split: str | None = None
    """Default: test, dev or val, whichever is there first."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    out: Path | None = None
    """Results file. Default: results/ of the run."""
    gallery_queries: int = 12
    """Queries of each kind in the gallery; 0: no gallery."""
    resamples: int = 1000
    """Bootstrap draws for the intervals."""
    seed: int = 0
    """Of the bootstrap."""
    batch_size: int = 128
    """Images a batch."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, found {self.resamples}")


def evaluate(config: RetrievalConfig) -> tuple[Results, dict[str, Any] | None]:
    """Does what the command does but for writing: returns (results, gallery). Raises InputError."""
    name, place = retrieval_place(config.name, config.data)
    split, shards = open_split(place, config.split)
    keys, captions = read_captions(shards)
    loaded = model_to_evaluate(config.checkpoint, config.device)
    start = time.monotonic()
    images = ShardImages(shards, eval_transform(loaded.image_size))
    batches = image_batches(images, config.batch_size, config.workers)
    outcome = retrieval(*encode_functions(loaded), batches, captions, resamples=config.resamples, seed=config.seed)
    seconds = time.monotonic() - start
    results = Results(
        evaluation="retrieval",
        dataset={
            "name": name,
            "place": str(place),
            "split": split,
            "images": len(keys),
            "captions": len(outcome.image_of_text),
        },
        metrics=outcome.metrics,
        headline=[*(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in KS), "rsum", "i2t_medr", "t2i_medr"],
        checkpoint=loaded.identity,
        config=to_dict(config),
        seconds=round(seconds, 3),
    )
    if config.gallery_queries < 1:
        return results, None
    found = (outcome.score, outcome.i2t, outcome.t2i, outcome.image_of_text)
    pictures = gallery(*found, keys, captions, config.gallery_queries)
    return results, {"data": str(place), "split": split, "checkpoint": loaded.identity, **pictures}


def read_captions(shards: Sequence[Shard]) -> tuple[list[str], list[list[str]]]:
    """Returns (keys, captions of each sample) in the order of the shards. Raises InputError on one without caption."""
    keys: list[str] = []
    captions: list[list[str]] = []
    for shard in shards:
        for sample in shard:
            if not any(text.strip() for text in sample.captions):
                raise InputError(
                    f"{shard.path}, sample {sample.key}: expected a caption, found none; prepare the shards again"
                )
            keys.append(sample.key)
            captions.append(sample.captions)
    if not keys:
        raise InputError(f"expected samples in {[str(s.path) for s in shards]}, found none; prepare the shards again")
    return keys, captions


def main() -> None:
    """Runs the command."""
    config: RetrievalConfig = parse(RetrievalConfig, description=__doc__)
    results, pictures = evaluate(config)
    dataset = f"{results.dataset['name']}_{results.dataset['split']}"
    out = config.out or default_out("retrieval", dataset, results.checkpoint)
    if pictures is not None:
        gallery_path = out.with_name(f"{out.stem}.gallery.json")
        gallery_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(gallery_path, pictures)
        results.details["gallery"] = gallery_path.name
    results.save(out)
    say(f"\n{markdown_table([results])}\nresults: {out}")
    if pictures is not None:
        say(f"gallery: {gallery_path}")


if __name__ == "__main__":
    command(main)
