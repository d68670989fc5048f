"""The protocols of retrieval: what counts as right, over which gallery, and which numbers are reported.

A protocol is an entry of PROTOCOLS with one sentence, which stands in the results. All share the tie rule (equal scores
count against us; the other rules stand beside), any-hit recalls, chance, and bootstrap intervals over images with their
captions. Each is a function over a Score and the data, so it serves single vectors, sets and joint scores alike; the
ranks of a `world` share its work. Used by the command and the function of retrieval and by paired tests.
Letters: Q queries, U images with queries, M metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eval_suite.judgements import Direction, Judged, in_rows, judgements
from eval_suite.metrics import (
    bootstrap_percentages,
    chance_median_rank,
    chance_of_lists,
    chance_recall_at_k,
    median_rank,
    percentile_interval,
)
from eval_suite.ranks import TIE_RULES, Ranks, TieRule, retrieval_ranks
from eval_suite.relevance import Relevance, RightAnswers, answers_of_class, listed_answers, relevance
from eval_suite.results import Metric
from eval_suite.retrieval_data import RetrievalData
from eval_suite.scores import Score
from eval_suite.sharing import ALONE
from setclip.distributed import World
from setclip.errors import InputError

DIRECTIONS: tuple[Direction, ...] = ("i2t", "t2i")
HEADLINE_RULE: TieRule = "pessimistic"
TIES = f"Ties: {TIE_RULES[HEADLINE_RULE]}."
NUM_FOLDS = 5

MEASURES = {
    "r1": "Recall at 1 (any-hit): queries whose first answer is right.",
    "r5": "Recall at 5 (any-hit): queries with at least one right answer among the first 5.",
    "r10": "Recall at 10 (any-hit): queries with at least one right answer among the first 10.",
    "r_precision": "R-Precision: mean over queries of the share of right ones among the first R answers, where R is the "
    "number of the query's right answers.",
    "map_at_r": "mAP@R: mean over queries of 1/R times the sum, over the right ones among the first R answers, of the "
    "share of right ones up to there, where R is the number of the query's right answers.",
}
"""Means over queries. Name of each to what it is."""

RECALLS = ("r1", "r5", "r10")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all protocols of an evaluation."""

    resamples: int = 1000
    """Bootstrap draws."""
    seed: int = 0
    """Of the bootstrap."""
    world: World = ALONE


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What became of the queries of one direction."""

    image: Tensor
    """(Q,) int64, the image that each is or belongs to."""
    rank: dict[TieRule, Tensor]
    """(Q,) int64, 0-based ranks of the best right answer."""
    lists: dict[str, dict[TieRule, Tensor]] = field(default_factory=dict)
    """`r_precision` and `map_at_r`, (Q,) float64 shares, where the protocol has them."""
    fold: Tensor | None = None
    """(Q,) int64, where a metric is the mean over folds."""

    def values(self, measure: str, rule: TieRule = HEADLINE_RULE) -> Tensor:
        """Returns (Q,) float64, what each query adds to a measure: 0 to 1."""
        if measure in self.lists:
            return self.lists[measure][rule]
        return (self.rank[rule] < int(measure.removeprefix("r"))).double()

    def weights(self) -> Tensor:
        """Returns (Q,) float64: each fold weighs the same, and so does each query in it."""
        if self.fold is None:
            return torch.ones(len(self.image), dtype=torch.float64)
        return 1.0 / self.fold.bincount().double()[self.fold]

    def mean(self, values: Tensor) -> float:
        """Returns the mean of `values` in percent; of folds the mean of their means."""
        if self.fold is None:
            return 100.0 * values.double().mean().item()
        return 100.0 * float(torch.stack([values[rows].double().mean() for rows in self._folds()]).mean())

    def median_rank(self, rule: TieRule = HEADLINE_RULE) -> float:
        """Returns Med r; of folds the mean of theirs."""
        if self.fold is None:
            return float(median_rank(self.rank[rule]))
        medians = [median_rank(self.rank[rule][rows]) for rows in self._folds()]
        return sum(medians) / len(medians)

    def _folds(self) -> list[Tensor]:
        assert self.fold is not None
        return [self.fold == each for each in self.fold.unique()]


@dataclass(frozen=True, kw_only=True)
class ProtocolOutcome:
    """What one protocol found."""

    metrics: dict[str, Metric]
    queries: dict[Direction, Queries]
    ranks: tuple[Ranks, Ranks] | None = None
    """Image→text and text→image, of protocols in which an image's own captions are right."""
    right: Mapping[Direction, RightAnswers] | None = None
    """What is right for each query, of the others."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of ranking and counting."""

    sentence: str
    """What results say of it."""
    prefix: str
    """Of its metrics' names."""
    measures: tuple[str, ...]
    """Names in MEASURES, in both directions."""
    run: Callable[[Score, RetrievalData, Setting], ProtocolOutcome]
    faults: Callable[[RetrievalData], list[str]] = lambda data: []
    """What of the protocol's samples is missing from the data. Raises InputError where the data has not what it needs."""
    has_rsum: bool = False
    has_medr: bool = False
    brief: tuple[str, ...] = ()
    """Metrics for a narrow table where it is not the first protocol, without the prefix."""

    def headline(self) -> list[str]:
        """Returns the names of its metrics, for a narrow table, in its order."""
        names = [f"{direction}_{measure}" for direction in DIRECTIONS for measure in self.measures]
        names += ["rsum"] if self.has_rsum else []
        names += [f"{direction}_medr" for direction in DIRECTIONS] if self.has_medr else []
        return [self.prefix + name for name in names]


# --- metrics from queries


def protocol_metrics(
    prefix: str,
    measures: Sequence[str],
    queries: Mapping[Direction, Queries],
    sentences: Mapping[Direction, str],
    chances: Mapping[str, float],
    setting: Setting,
    has_rsum: bool = False,
) -> dict[str, Metric]:
    """Returns the metrics that are means over queries, and RSUM.

    `sentences` say who ranks what, `chances` hold "i2t_r1" and so on, in percent.
    """
    names = [(direction, measure) for direction in DIRECTIONS for measure in measures]
    draws = _bootstrap(queries, names, setting)
    folds = "within folds " if queries["i2t"].fold is not None else ""
    method = f"bootstrap over images with their captions, {folds}{setting.resamples:,} draws, seed {setting.seed}, gallery fixed"
    metrics: dict[str, Metric] = {}
    for column, (direction, measure) in enumerate(names):
        of = queries[direction]
        by_rule = {rule: of.mean(of.values(measure, rule)) for rule in TIE_RULES}
        metrics[f"{prefix}{direction}_{measure}"] = Metric(
            value=by_rule.pop(HEADLINE_RULE),
            unit="%",
            protocol=f"{MEASURES[measure]} {sentences[direction]} {TIES}",
            samples=len(of.image),
            chance=chances[f"{direction}_{measure}"],
            interval_95=percentile_interval(draws[:, column]),
            interval_method=method,
            tie_variants={str(rule): value for rule, value in by_rule.items()},
        )
    if has_rsum:
        recalls = list(metrics.values())
        of_folds = "their averages over folds of " if folds else ""
        metrics[f"{prefix}rsum"] = Metric(
            value=sum(m.value for m in recalls),
            unit="sum of %",
            protocol=f"RSUM: sum of {of_folds}the six recalls, i2t and t2i at 1, 5 and 10. {TIES}",
            samples=sum(len(of.image) for of in queries.values()),
            chance=sum(chances.values()),
            interval_95=percentile_interval(draws.sum(1)),
            interval_method=method,
            tie_variants={str(r): sum(m.tie_variants[r] for m in recalls) for r in TIE_RULES if r != HEADLINE_RULE},
        )
    return metrics


def units_of(queries: Mapping[Direction, Queries]) -> tuple[dict[Direction, Tensor], int, Tensor | None]:
    """Returns what a resampling draws: (unit of each query by direction, number of units U, folds of the units).

    Units are the images that have queries, each with its captions: captions of one image are not independent.
    """
    images = torch.cat([queries[direction].image for direction in DIRECTIONS])
    found, units = images.unique(return_inverse=True)
    unit_of = dict(zip(DIRECTIONS, units.split([len(queries[d].image) for d in DIRECTIONS]), strict=True))
    folds = torch.zeros(len(found), dtype=torch.int64)
    for direction in DIRECTIONS:
        fold = queries[direction].fold
        if fold is None:
            return unit_of, len(found), None
        folds[unit_of[direction]] = fold
    return unit_of, len(found), folds


def per_unit(queries: Queries, unit: Tensor, num_units: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what each unit adds to the numerator and to the denominator of a mean over queries, (U,) float64 each."""
    weights = queries.weights()
    sums = unit.bincount(weights=weights * values.double(), minlength=num_units)
    return sums, unit.bincount(weights=weights, minlength=num_units)


def _bootstrap(
    queries: Mapping[Direction, Queries], names: Sequence[tuple[Direction, str]], setting: Setting
) -> Tensor:
    """Returns (resamples, M) draws of each (direction, measure)."""
    unit_of, num_units, folds = units_of(queries)
    columns = [per_unit(queries[d], unit_of[d], num_units, queries[d].values(measure)) for d, measure in names]
    hits, counts = (torch.stack(each, dim=1) for each in zip(*columns, strict=True))
    return bootstrap_percentages(hits, counts, setting.resamples, setting.seed, folds)


def _median_ranks(
    prefix: str,
    queries: Mapping[Direction, Queries],
    sentences: Mapping[Direction, str],
    chances: Mapping[Direction, float],
) -> dict[str, Metric]:
    metrics = {}
    for direction, of in queries.items():
        by_rule = {rule: of.median_rank(rule) for rule in TIE_RULES}
        metrics[f"{prefix}{direction}_medr"] = Metric(
            value=by_rule.pop(HEADLINE_RULE),
            unit="rank",
            protocol=f"Med r: floor of the median 0-based rank, plus 1. {sentences[direction]} {TIES}",
            samples=len(of.image),
            chance=chances[direction],
            tie_variants={str(rule): value for rule, value in by_rule.items()},
        )
    return metrics


# --- an image's own captions are right: whole gallery, and folds


def whole_gallery(score: Score, image_of_text: Tensor, num_images: int, setting: Setting) -> ProtocolOutcome:
    """Ranks all captions for each image and all images for each caption; an image's own captions are right."""
    i2t, t2i = retrieval_ranks(score, image_of_text, num_images, world=setting.world)
    return ProtocolOutcome(
        metrics=retrieval_metrics(i2t, t2i, image_of_text, setting.resamples, setting.seed),
        queries=_own_queries(i2t, t2i, image_of_text),
        ranks=(i2t, t2i),
    )


def retrieval_metrics(
    i2t: Ranks, t2i: Ranks, image_of_text: Tensor, resamples: int = 1000, seed: int = 0
) -> dict[str, Metric]:
    """Returns the metrics of a whole gallery from its ranks: `i2t_r1` … `t2i_r10`, `rsum`, `i2t_medr`, `t2i_medr`."""
    num_images, num_texts = len(i2t.better), len(t2i.better)
    sentences: dict[Direction, str] = {
        "i2t": f"{num_images:,} images each rank {num_texts:,} captions; the best of an image's own counts.",
        "t2i": f"{num_texts:,} captions each rank {num_images:,} images; a caption's own image counts.",
    }
    queries = _own_queries(i2t, t2i, image_of_text)
    setting = Setting(resamples=resamples, seed=seed)
    chances = _own_chances(image_of_text, num_images)
    medians = {d: chances.pop(f"{d}_medr") for d in DIRECTIONS}
    metrics = protocol_metrics("", RECALLS, queries, sentences, chances, setting, has_rsum=True)
    return metrics | _median_ranks("", queries, sentences, medians)


def folded(
    score: Score, image_of_text: Tensor, num_images: int, setting: Setting, num_folds: int = NUM_FOLDS
) -> ProtocolOutcome:
    """Ranks within folds, runs of images in their order with their captions; each metric is the mean over folds.

    RSUM is the sum of the six averages. Texts must stand in the order of their images.
    """
    parts: dict[Direction, list[Queries]] = {"i2t": [], "t2i": []}
    chances: list[dict[str, float]] = []
    for number in range(num_folds):
        rows = slice(number * num_images // num_folds, (number + 1) * num_images // num_folds)
        first, last = torch.searchsorted(image_of_text, torch.tensor([rows.start, rows.stop])).tolist()
        owners = image_of_text[first:last] - rows.start

        def of_fold(r: slice, c: slice, row: int = rows.start, column: int = first) -> Tensor:
            return score(slice(r.start + row, r.stop + row), slice(c.start + column, c.stop + column))

        size = rows.stop - rows.start
        found = _own_queries(*retrieval_ranks(of_fold, owners, size, world=setting.world), owners)
        chances.append(_own_chances(owners, size))
        for direction, of in found.items():
            fold = torch.full_like(of.image, number)
            parts[direction].append(Queries(image=of.image + rows.start, rank=of.rank, fold=fold))
    queries: dict[Direction, Queries] = {
        direction: Queries(
            image=torch.cat([of.image for of in each]),
            rank={rule: torch.cat([of.rank[rule] for of in each]) for rule in TIE_RULES},
            fold=torch.cat([of.fold for of in each if of.fold is not None]),
        )
        for direction, each in parts.items()
    }
    sizes = sorted({int(count) for count in queries["i2t"].fold.bincount()})  # type: ignore[union-attr]
    in_folds = f"In {num_folds} folds of {' or '.join(f'{size:,}' for size in sizes)} images in file order"
    sentences: dict[Direction, str] = {
        "i2t": f"{in_folds} each image ranks the captions of its fold, and the best of its own counts; mean over folds.",
        "t2i": f"{in_folds} each caption ranks the images of its fold, and its own counts; mean over folds.",
    }
    chance = {name: sum(each[name] for each in chances) / num_folds for name in chances[0]}
    medians = {d: chance.pop(f"{d}_medr") for d in DIRECTIONS}
    metrics = protocol_metrics("1k_5fold_", RECALLS, queries, sentences, chance, setting, has_rsum=True)
    return ProtocolOutcome(metrics=metrics | _median_ranks("1k_5fold_", queries, sentences, medians), queries=queries)


def _own_queries(i2t: Ranks, t2i: Ranks, image_of_text: Tensor) -> dict[Direction, Queries]:
    def by_rules(ranks: Ranks) -> dict[TieRule, Tensor]:
        return {rule: ranks.by(rule) for rule in TIE_RULES}

    return {
        "i2t": Queries(image=torch.arange(len(i2t.better)), rank=by_rules(i2t)),
        "t2i": Queries(image=image_of_text, rank=by_rules(t2i)),
    }


def _own_chances(image_of_text: Tensor, num_images: int) -> dict[str, float]:
    num_texts, texts_of_image = len(image_of_text), image_of_text.bincount(minlength=num_images)
    recalls = {
        **{f"i2t_r{k}": chance_recall_at_k(k, num_texts, texts_of_image) for k in (1, 5, 10)},
        **{f"t2i_r{k}": chance_recall_at_k(k, num_images) for k in (1, 5, 10)},
    }
    medians = (chance_median_rank(num_texts, texts_of_image), chance_median_rank(num_images))
    return {**recalls, "i2t_medr": float(medians[0]), "t2i_medr": float(medians[1])}


def _run_whole(score: Score, data: RetrievalData, setting: Setting) -> ProtocolOutcome:
    return whole_gallery(score, data.image_of_text, len(data.keys), setting)


def _run_folds(score: Score, data: RetrievalData, setting: Setting) -> ProtocolOutcome:
    return folded(score, data.image_of_text, len(data.keys), setting)


def _faults_5k(data: RetrievalData) -> list[str]:
    faults = [] if len(data.keys) == 5_000 else [f"{len(data.keys):,} images instead of 5,000"]
    others = sum(len(texts) != 5 for texts in data.captions)
    if len(data.keys) < NUM_FOLDS:
        raise InputError(f"expected at least {NUM_FOLDS} images for {NUM_FOLDS} folds, found {len(data.keys)}")
    return faults + ([f"{others:,} images without 5 captions"] if others else [])


# --- several right answers: judgements of COCO's test split, and classes


def judged_pairs(
    score: Score,
    right: Mapping[Direction, RightAnswers],
    image_of_text: Tensor,
    prefix: str,
    measures: Sequence[str],
    whose: str,
    setting: Setting,
) -> ProtocolOutcome:
    """Ranks the whole gallery for the queries that are judged; `whose` names what is right in the protocol's text."""
    num_texts = len(image_of_text)
    num_images = right["t2i"].gallery_size
    num_queries: dict[Direction, int] = {"i2t": num_images, "t2i": num_texts}
    with_lists = any(measure not in RECALLS for measure in measures)
    queries: dict[Direction, Queries] = {}
    sentences: dict[Direction, str] = {}
    chances: dict[str, float] = {}
    for direction, of in right.items():
        found: Relevance = relevance(score, of, direction, num_queries[direction], with_lists, world=setting.world)
        lists = {"r_precision": found.r_precision, "map_at_r": found.map_at_r} if with_lists else {}
        image = of.queries if direction == "i2t" else image_of_text[of.queries]
        queries[direction] = Queries(image=image, rank=found.rank, lists=lists)
        asked, answers = ("images", "captions") if direction == "i2t" else ("captions", "images")
        sentences[direction] = (
            f"{len(of.queries):,} {asked} each rank all {of.gallery_size:,} {answers}; {whose}, "
            f"{float(of.num_right.double().mean()):.1f} a query."
        )
        lists_chance = chance_of_lists(of.gallery_size, of.num_right)
        known = {f"r{k}": chance_recall_at_k(k, of.gallery_size, of.num_right) for k in (1, 5, 10)}
        known |= dict(zip(("r_precision", "map_at_r"), lists_chance, strict=True))
        chances |= {f"{direction}_{measure}": known[measure] for measure in measures}
    metrics = protocol_metrics(prefix, measures, queries, sentences, chances, setting)
    return ProtocolOutcome(metrics=metrics, queries=queries, right=right)


def _coco_ids(data: RetrievalData, protocol: str) -> dict[Direction, tuple[list[int], list[int]]]:
    """Returns for each direction the ids of queries and of answers. Raises InputError where samples have none."""
    for key, image, captions, texts in zip(data.keys, data.image_ids, data.caption_ids, data.captions, strict=True):
        if image is None or captions is None or len(captions) != len(texts):
            raise InputError(
                f"protocol {protocol}: expected coco_id and one of sentids for each caption in every sample's JSON, found "
                f"none in {key}; prepare COCO with `python -m data_prep.run coco`, or choose other --protocols"
            )
    images = [image for image in data.image_ids if image is not None]
    caption_ids = [int(each) for ids in data.caption_ids if ids is not None for each in ids]
    return {"i2t": (images, caption_ids), "t2i": (caption_ids, images)}


def _in_rows(name: str, direction: Direction, queries: Sequence[int], answers: Sequence[int]) -> Judged:
    gallery = judgements("original", "t2i" if direction == "i2t" else "i2t")
    return in_rows(judgements(name, direction), queries, answers, gallery)


def _faults_judged(name: str) -> Callable[[RetrievalData], list[str]]:
    def faults(data: RetrievalData) -> list[str]:
        found = []
        for direction, (queries, answers) in _coco_ids(data, name).items():
            judged = _in_rows(name, direction, queries, answers)
            if not judged.queries:
                raise InputError(
                    f"protocol {name}: expected images of COCO's test split, found none that {name} judged; evaluate the "
                    "test split, or choose other --protocols"
                )
            for missing, what in (
                (judged.missing_queries, "judged queries"),
                (judged.missing_answers, "right answers"),
            ):
                if missing:
                    found.append(f"{direction}: {len(missing):,} {what} missing (first id: {missing[0]})")
        return found

    return faults


def _run_judged(name: str, measures: tuple[str, ...], whose: str) -> Callable[..., ProtocolOutcome]:
    def run(score: Score, data: RetrievalData, setting: Setting) -> ProtocolOutcome:
        right: dict[Direction, RightAnswers] = {}
        for direction, (queries, answers) in _coco_ids(data, name).items():
            judged = _in_rows(name, direction, queries, answers)
            right[direction] = listed_answers(judged.queries, judged.answers, len(answers), judged.num_right)
        return judged_pairs(score, right, data.image_of_text, f"{name}_", measures, whose, setting)

    return run


def _classes(data: RetrievalData) -> Tensor:
    without = next((key for key, each in zip(data.keys, data.class_ids, strict=True) if each is None), None)
    if without is not None:
        raise InputError(
            f"expected class_id in every sample's JSON to match by class, found none in {without}; prepare CUB with "
            "`python -m data_prep.run cub`, or use --match instance"
        )
    return torch.tensor([int(each) for each in data.class_ids if each is not None], dtype=torch.int64)


def _run_class(score: Score, data: RetrievalData, setting: Setting) -> ProtocolOutcome:
    of_images = _classes(data)
    of_texts = of_images[data.image_of_text]
    right: dict[Direction, RightAnswers] = {
        "i2t": answers_of_class(of_images, of_texts),
        "t2i": answers_of_class(of_texts, of_images),
    }
    whose = "all of the query's class are right"
    return judged_pairs(score, right, data.image_of_text, "class_match_", PROTOCOLS["class"].measures, whose, setting)


def _faults_class(data: RetrievalData) -> list[str]:
    _classes(data)
    return []


ECCV_MEASURES = ("map_at_r", "r_precision", "r1")
_WHOLE: dict[str, Any] = {"prefix": "", "measures": RECALLS, "has_rsum": True, "has_medr": True, "run": _run_whole}

PROTOCOLS: dict[str, Protocol] = {
    "full": Protocol(
        sentence="Each image ranks all captions and each caption all images; an image's own captions are right.",
        **_WHOLE,
    ),
    "5k": Protocol(
        sentence="COCO 5K: each of 5,000 images ranks 25,000 captions, the first five of each image, and each caption "
        "all images; an image's own captions are right.",
        faults=_faults_5k,
        **_WHOLE,
    ),
    "1k-5fold": Protocol(
        sentence="COCO 1K: five folds of 1,000 images in file order, each a gallery of its own; the mean over folds of "
        "each metric, and RSUM as the sum of the six averages.",
        prefix="1k_5fold_",
        measures=RECALLS,
        has_rsum=True,
        has_medr=True,
        run=_run_folds,
        faults=_faults_5k,
        brief=("rsum",),
    ),
    "eccv": Protocol(
        sentence="ECCV Caption: 1,261 images and 1,332 captions of COCO's test split, judged anew by machines and people, "
        "each rank the whole 5K gallery; R is the number of right answers.",
        prefix="eccv_",
        measures=ECCV_MEASURES,
        run=_run_judged("eccv", ECCV_MEASURES, "those that ECCV Caption found are right"),
        faults=_faults_judged("eccv"),
        brief=("i2t_map_at_r", "t2i_map_at_r"),
    ),
    "cxc": Protocol(
        sentence="CxC: images and captions of COCO's test split rank the whole 5K gallery; the pairs that CrissCrossed "
        "Captions' raters found alike are right besides the original ones.",
        prefix="cxc_",
        measures=RECALLS,
        run=_run_judged("cxc", RECALLS, "those that CxC found are right"),
        faults=_faults_judged("cxc"),
        brief=("i2t_r1", "t2i_r1"),
    ),
    "class": Protocol(
        sentence="Each image ranks all captions and each caption all images; all of the query's class are right.",
        prefix="class_match_",
        measures=(*RECALLS, "r_precision", "map_at_r"),
        run=_run_class,
        faults=_faults_class,
        brief=("i2t_r1", "t2i_r1"),
    ),
}
