"""Checks the metrics on this machine: against cases worked out by hand, plain sorting, and other people's functions.

    python -m eval_suite.selftest
    python -m eval_suite.selftest --require-all        # a peer that is not installed is a failure

Each line of the table is one check: what is compared, with whose function (and version), on how many random cases, and
the largest difference that was seen. Random scores come with and without ties. What a peer does with equal scores is not
always said; with ties its value must then lie between ours with all ties against and all ties for the right answer. Exits
with 1 where a check fails.
"""

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import binomtest, hypergeom
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor

from eval_suite import metrics, protocols, ranks, relevance
from eval_suite.judgements import Direction, judgements
from eval_suite.metrics import Score
from eval_suite.results import Metric
from eval_suite.retrieval_data import RetrievalData
from setclip.config import command, parse
from setclip.log import say

TOLERANCE = 1e-9
"""In percent or ranks: sums of the same float64 numbers in another order."""

Status = Literal["pass", "FAIL", "not run"]


class NotInstalledError(Exception):
    """A peer is not there; the text says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison."""

    name: str
    against: str
    """Whose values; the name of a distribution package stands alone, and its version is added."""
    differences: Callable[[torch.Generator, int], Iterator[float]]
    """(random numbers, number of cases) to the size of the difference of each case; 0 where all is well."""
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    against: str
    cases: int
    largest: float | None
    status: Status
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SelftestConfig:
    """How much is checked."""

    cases: int = 20
    """Random cases of each check."""
    seed: int = 0
    """Of the random cases."""
    require_all: bool = False
    """Whether a peer that is not installed is a failure."""

    def __post_init__(self) -> None:
        if self.cases < 1:
            raise ValueError(f"cases must be at least 1, found {self.cases}")


def run_checks(config: SelftestConfig) -> list[Row]:
    """Returns a row for each of CHECKS. A check that raises has failed."""
    rows = []
    for check in CHECKS:
        against = f"{check.against} {_version(check.against)}".strip()
        generator = torch.Generator().manual_seed(config.seed)
        found: list[float] = []
        try:
            found.extend(check.differences(generator, config.cases))
        except NotInstalledError as error:
            rows.append(Row(check.name, check.against, 0, None, "not run", str(error)))
            continue
        except Exception as error:  # whatever a broken metric raises is a failure of this check, not of the others
            rows.append(Row(check.name, against, len(found), None, "FAIL", f"{type(error).__name__}: {error}"))
            continue
        largest = float(np.max(found)) if found else float("nan")  # unlike max() it keeps a NaN
        rows.append(Row(check.name, against, len(found), largest, "pass" if largest <= check.tolerance else "FAIL"))
    return rows


def is_good(rows: list[Row], require_all: bool) -> bool:
    """Whether nothing failed, and with `require_all` everything ran."""
    bad = {"FAIL", "not run"} if require_all else {"FAIL"}
    return not any(row.status in bad for row in rows)


def markdown(rows: list[Row]) -> str:
    """Returns the table as Markdown, and what is to be said of single checks below it."""
    lines = ["| check | against | cases | largest difference | |", "| --- | --- | ---: | ---: | --- |"]
    for row in rows:
        largest = "–" if row.largest is None else f"{row.largest:.1e}" if row.largest else "0"
        lines.append(f"| {row.name} | {row.against} | {row.cases} | {largest} | {row.status} |")
    notes = [f"{row.status}: {row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, *([""] if notes else []), *notes])


# --- by hand

# Four images, two captions each (columns 0-1, 2-3, 4-5, 6-7).
_SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0],  # best own 0.9: rank 0
        [0.8, 0.7, 0.6, 0.1, 0.0, 0.0, 0.0, 0.0],  # best own 0.6, behind 0.8 and 0.7: rank 2
        [0.0, 0.0, 0.0, 0.0, 0.1, 0.5, 0.4, 0.3],  # best own 0.5: rank 0
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # best own 0.3, behind six: rank 6
    ]
)
_OWNERS = torch.arange(8) // 2


def _recalls_by_hand(_: torch.Generator, __: int) -> Iterator[float]:
    i2t, t2i = ranks.retrieval_ranks(_table(_SCORES), _OWNERS, 4)
    expected = {
        "pessimistic": ([0, 2, 0, 6], [1, 2, 1, 2, 1, 0, 1, 1]),  # captions 0 and its image: 0.9, as image 3 has
        "first_come": ([0, 2, 0, 6], [0, 2, 1, 2, 1, 0, 1, 1]),
        "optimistic": ([0, 2, 0, 6], [0, 2, 1, 2, 1, 0, 1, 1]),
    }
    for rule in ranks.TIE_RULES:
        yield _distance(i2t.by(rule), expected[rule][0])
        yield _distance(t2i.by(rule), expected[rule][1])
    of_images = i2t.by("pessimistic")
    for k, percent in ((1, 50.0), (3, 75.0), (7, 100.0)):
        yield abs(metrics.recall_at_k(of_images, k) - percent)
    yield abs(metrics.median_rank(of_images) - 2)  # the median of 0, 0, 2, 6 is 1
    found = protocols.retrieval_metrics(i2t, t2i, _OWNERS, resamples=10)
    # R@1, 5 and 10 of images: 50, 75, 100; of captions: 12.5, 100, 100
    yield abs(found["rsum"].value - (50 + 75 + 100 + 12.5 + 100 + 100))


def _constant_by_hand(_: torch.Generator, __: int) -> Iterator[float]:
    i2t, t2i = ranks.retrieval_ranks(_table(torch.zeros(4, 8)), _OWNERS, 4)
    yield abs(metrics.recall_at_k(i2t.by("pessimistic"), 5))  # a model that has collapsed is worth nothing
    yield abs(metrics.recall_at_k(t2i.by("pessimistic"), 1))
    yield abs(metrics.recall_at_k(t2i.by("first_come"), 1) - 25.0)
    yield abs(metrics.recall_at_k(t2i.by("optimistic"), 1) - 100.0)


def _lists_by_hand(_: torch.Generator, __: int) -> Iterator[float]:
    right = relevance.listed_answers([0], [[0, 2, 4]], 5)
    found = relevance.relevance(_table(torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])), right, "i2t", 1)
    for rule in ranks.TIE_RULES:  # right, wrong, right among the first three
        yield abs(found.r_precision[rule].item() - 2 / 3)
        yield abs(found.map_at_r[rule].item() - (1 / 1 + 2 / 3) / 3)
    tied = relevance.relevance(_table(torch.ones(1, 5)), relevance.listed_answers([0], [[0, 2]], 5), "i2t", 1)
    for rule, precision, rank in (("pessimistic", 0.0, 3), ("first_come", 0.5, 0), ("optimistic", 1.0, 0)):
        yield abs(tied.r_precision[rule].item() - precision)
        yield abs(tied.map_at_r[rule].item() - precision)
        yield abs(tied.rank[rule].item() - rank)


def _folds_by_hand(_: torch.Generator, __: int) -> Iterator[float]:
    # Two folds of two images with a caption each. In the first both are right; in the second each is taken for the other.
    scores = torch.zeros(4, 4)
    scores[[0, 1, 2, 3], [0, 1, 3, 2]] = 1.0
    scores[0, 2:] = 5.0  # of the other fold: not to be seen
    found = protocols.folded(_table(scores), torch.arange(4), 4, protocols.Setting(resamples=10), num_folds=2).metrics
    for direction in protocols.DIRECTIONS:
        yield abs(found[f"1k_5fold_{direction}_r1"].value - 50.0)
        yield abs(found[f"1k_5fold_{direction}_medr"].value - 1.5)
    yield abs(found["1k_5fold_rsum"].value - (50 + 100 + 100) * 2)


def _classes_by_hand(_: torch.Generator, __: int) -> Iterator[float]:
    labels = torch.tensor([0, 0, 0, 0, 3])  # classes 1 and 2 have no images
    is_correct = torch.tensor([True, False, False, False, True])
    yield abs(metrics.mean_per_class_accuracy(is_correct, labels) - (25 + 100) / 2)
    found, predicted = ranks.class_ranks(
        _table(torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.3, 0.3]])), torch.tensor([1, 2]), 3
    )
    yield _distance(predicted, [0, 1])  # of equal classes the first
    yield _distance(found.by("pessimistic"), [1, 1])
    yield _distance(found.by("optimistic"), [0, 0])


# --- against plain sorting


def _ranks_sorted(generator: torch.Generator, cases: int) -> Iterator[float]:
    for case in range(cases):
        scores, owners = _random_retrieval(generator, case)
        i2t, t2i = ranks.retrieval_ranks(_table(scores), owners, len(scores), block_size=1 + case % 40)
        table = scores.double().numpy()
        for rule in ranks.TIE_RULES:
            of_images = [_sorted_hits(row, owners.numpy() == i, rule).argmax() for i, row in enumerate(table)]
            own = [np.arange(len(table)) == owner for owner in owners.tolist()]
            of_texts = [_sorted_hits(table[:, t], own[t], rule).argmax() for t in range(len(own))]
            yield max(_distance(i2t.by(rule), of_images), _distance(t2i.by(rule), of_texts))


def _lists_sorted(generator: torch.Generator, cases: int) -> Iterator[float]:
    for case in range(cases):
        scores, right, masks = _random_judged(generator, case)
        found = relevance.relevance(_table(scores), right, "i2t", len(scores), block_size=1 + case % 40)
        for rule in ranks.TIE_RULES:
            expected = []
            for row, mask in zip(scores.double().numpy(), masks, strict=True):
                hits, r = _sorted_hits(row, mask, rule), int(mask.sum())
                precisions = hits.cumsum() / np.arange(1, len(hits) + 1)
                expected.append((hits.argmax(), hits[:r].mean(), (precisions * hits)[:r].sum() / r))
            of_rule = (found.rank[rule], found.r_precision[rule], found.map_at_r[rule])
            yield max(
                _distance(ours, theirs) for ours, theirs in zip(of_rule, zip(*expected, strict=True), strict=True)
            )


def _sorted_hits(scores: np.ndarray, is_right: np.ndarray, rule: str) -> np.ndarray:
    """Returns which answers are right, in the order of one query."""
    index = np.arange(len(scores))
    second = {"pessimistic": is_right, "optimistic": ~is_right, "first_come": index}[rule]
    return is_right[np.lexsort((index, second, -scores))]


# --- against the package eccv-caption


def _eccv_caption(generator: torch.Generator, cases: int) -> Iterator[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import it misses libraries that would make it faster
        from eccv_caption import Metrics

        theirs = Metrics()
    data = _part_of_coco()
    images, texts = list(map(int, data.image_ids)), [each for ids in data.caption_ids for each in ids]  # type: ignore
    _keep_only(theirs, images, texts)
    for case in range(max(1, cases // 10)):
        scores = torch.randn(len(images), len(texts), generator=generator)
        scores[data.image_of_text, torch.arange(len(texts))] += 2.0
        if case % 2:
            scores = (scores * 4).round() / 4  # ties, for which its lists are given in the order of "first come"
        retrieved = {
            "i2t": {image: _in_order(row, texts) for image, row in zip(images, scores, strict=True)},
            "t2i": {text: _in_order(row, images) for text, row in zip(texts, scores.T, strict=True)},
        }
        expected = _their_values(theirs, retrieved)
        setting = protocols.Setting(resamples=2)
        found: dict[str, Metric] = {}
        for name in ("full", "1k-5fold", "eccv", "cxc"):
            found |= protocols.PROTOCOLS[name].run(_table(scores), data, setting).metrics
        for name, value in expected.items():
            yield abs(found[name].tie_variants["first_come"] - value)


def _part_of_coco(num_images: int = 100) -> RetrievalData:
    """Returns images of COCO's test split with their ids, those first that ECCV Caption judged."""
    texts_of = judgements("original", "i2t")
    images = list(dict.fromkeys([*judgements("eccv", "i2t"), *texts_of]))[:num_images]
    return RetrievalData(
        keys=[str(image) for image in images],
        captions=[[""] * len(texts_of[image]) for image in images],
        image_ids=list(images),
        caption_ids=[list(texts_of[image]) for image in images],
        class_ids=[None] * len(images),
    )


def _keep_only(theirs, images: list[int], texts: list[int]) -> None:
    """Leaves of its right answers those among these images and captions; what no gallery holds still counts in R."""
    known: dict[Direction, tuple[set[int], set[int]]] = {
        "i2t": (set(images), set(texts)),
        "t2i": (set(texts), set(images)),
    }
    for gts in (theirs.coco_gts, theirs.cxc_gts, theirs.eccv_gts):
        for direction, (queries, answers) in known.items():
            other = judgements("original", "t2i" if direction == "i2t" else "i2t")
            kept = {q: [a for a in right if a in answers or a not in other] for q, right in gts[direction].items()}
            gts[direction] = {q: right for q, right in kept.items() if q in queries and set(right) & answers}
    theirs.coco_ids = np.array(texts)


def _their_values(theirs, retrieved) -> dict[str, float]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it shows progress whatever one asks
        warnings.simplefilter("ignore")
        found: dict[str, float] = {}
        for k in (1, 5, 10):
            recalls = {
                "": theirs.coco_5k_recalls(retrieved, "all", K=k),
                "1k_5fold_": theirs.coco_1k_recalls(retrieved, "all", K=k),
                "cxc_": theirs.cxc_recalls(retrieved, "all", K=k),
            }
            found |= {f"{prefix}{d}_r{k}": 100 * each[d] for prefix, each in recalls.items() for d in each}
        names = {"eccv_map_at_r": "map_at_r", "eccv_rprecision": "r_precision", "eccv_r1": "r1"}
        judged = theirs.eccv_metrics(retrieved, "all")
        found |= {f"eccv_{d}_{ours}": 100 * judged[name][d] for name, ours in names.items() for d in judged[name]}
    for prefix in ("", "1k_5fold_"):
        found[f"{prefix}rsum"] = sum(found[f"{prefix}{d}_r{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10))
    return found


def _in_order(scores: Tensor, ids: list[int]) -> list[int]:
    return [ids[i] for i in torch.sort(scores, descending=True, stable=True).indices.tolist()]


# --- against CLIP_benchmark


def _clip_benchmark_recall(generator: torch.Generator, cases: int) -> Iterator[float]:
    theirs = _clip_benchmark("zeroshot_retrieval").recall_at_k
    for case in range(cases):
        scores, owners = _random_retrieval(generator, case)
        i2t, t2i = ranks.retrieval_ranks(_table(scores), owners, len(scores))
        is_right = owners == torch.arange(len(scores))[:, None]
        for of, table, mask in ((i2t, scores, is_right), (t2i, scores.T, is_right.T)):
            for k in (1, 5, 10):
                value = 100 * (theirs(table, mask, k) > 0).double().mean().item()
                yield _outside(value, of, k)


def _clip_benchmark_accuracy(generator: torch.Generator, cases: int) -> Iterator[float]:
    module = _clip_benchmark("zeroshot_classification")
    # 1.6.2 turns an array of one number into a float, which numpy refuses from 2.4 on.
    module.float = lambda array: array.item()
    theirs = module.accuracy
    for case in range(cases):
        scores, labels = _random_classification(generator, case)
        of, _ = ranks.class_ranks(_table(scores), labels, scores.shape[1])
        for k, value in zip((1, 5), theirs(scores, labels, topk=(1, 5)), strict=True):
            yield _outside(100 * value, of, k)


def _clip_benchmark(module: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"clip_benchmark.metrics.{module}")
    except ImportError as error:
        raise NotInstalledError("not installed: pip install clip-benchmark") from error


# --- against scikit-learn and scipy


def _balanced_accuracy(generator: torch.Generator, cases: int) -> Iterator[float]:
    for case in range(cases):
        scores, labels = _random_classification(generator, case)
        _, predicted = ranks.class_ranks(_table(scores), labels, scores.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that are predicted and do not occur
            theirs = 100 * balanced_accuracy_score(labels.numpy(), scores.numpy().argmax(1))
        yield abs(metrics.mean_per_class_accuracy(predicted == labels, labels) - theirs)


def _top_k_accuracy(generator: torch.Generator, cases: int) -> Iterator[float]:
    for case in range(cases):
        scores, labels = _random_classification(generator, case)
        of, _ = ranks.class_ranks(_table(scores), labels, scores.shape[1])
        for k in (1, 5):
            classes = np.arange(scores.shape[1])
            theirs = 100 * top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=classes)
            yield _outside(theirs, of, k)


def _average_precision(generator: torch.Generator, cases: int) -> Iterator[float]:
    for case in range(cases):
        scores, right, masks = _random_judged(
            generator, 2 * case
        )  # of equal scores it takes the precision after them all
        # mAP@R with R the whole gallery is average precision, but for the factor right answers / gallery.
        answers = [np.flatnonzero(mask).tolist() for mask in masks]
        size = scores.shape[1]
        whole = relevance.listed_answers(right.queries.tolist(), answers, size, [size] * len(masks))
        found = relevance.relevance(_table(scores), whole, "i2t", len(scores)).map_at_r
        for row, mask in enumerate(masks):
            theirs = average_precision_score(mask, scores[row].numpy())
            yield from (abs(float(found[rule][row]) * size / mask.sum() - theirs) for rule in ranks.TIE_RULES)


def _chance(generator: torch.Generator, cases: int) -> Iterator[float]:
    for _ in range(cases):
        n = int(torch.randint(10, 3_000, (), generator=generator))
        m = int(torch.randint(1, n, (), generator=generator))
        for k in (1, 5, 10):
            yield abs(metrics.chance_recall_at_k(k, n, m) - 100 * hypergeom.sf(0, n, m, k))


def _wilson(generator: torch.Generator, cases: int) -> Iterator[float]:
    for _ in range(cases):
        n = int(torch.randint(1, 3_000, (), generator=generator))
        correct = int(torch.randint(0, n + 1, (), generator=generator))
        theirs = binomtest(correct, n).proportion_ci(method="wilson")
        yield _distance(
            torch.tensor(metrics.wilson_interval(correct, n), dtype=torch.float64),
            [100 * theirs.low, 100 * theirs.high],
        )


# --- random cases


def _random_retrieval(generator: torch.Generator, case: int) -> tuple[Tensor, Tensor]:
    """Returns (scores, image of each text): odd cases have ties, the others none."""
    num_images = 12 + case
    owners = torch.cat((torch.arange(num_images), torch.randint(num_images, (2 * num_images,), generator=generator)))
    return _random_scores(generator, num_images, len(owners), case), owners


def _random_classification(generator: torch.Generator, case: int) -> tuple[Tensor, Tensor]:
    scores = _random_scores(generator, 50, 7 + case, case)
    return scores, torch.randint(scores.shape[1], (50,), generator=generator)


def _random_judged(generator: torch.Generator, case: int) -> tuple[Tensor, relevance.RightAnswers, list[np.ndarray]]:
    scores = _random_scores(generator, 8, 30 + case, case)
    masks = torch.rand(scores.shape, generator=generator) < 0.3
    masks[:, 0] |= ~masks.any(1)
    answers = [mask.nonzero().flatten().tolist() for mask in masks]
    return scores, relevance.listed_answers(range(8), answers, scores.shape[1]), list(masks.numpy())


def _random_scores(generator: torch.Generator, rows: int, columns: int, case: int) -> Tensor:
    if case % 2:
        return torch.randint(2 + case, (rows, columns), generator=generator).float()
    # A permutation of whole numbers has no ties.
    return torch.randperm(rows * columns, generator=generator).reshape(rows, columns).float()


def _table(scores: Tensor) -> Score:
    return lambda rows, columns: scores[rows, columns]


def _distance(ours: Tensor, theirs) -> float:
    return float((ours.double() - torch.tensor(np.asarray(theirs, dtype=np.float64))).abs().max())


def _outside(theirs: float, ours: ranks.Ranks, k: int) -> float:
    """Returns how far a recall lies outside of ours with all ties against and all for the right answer."""
    least, most = (metrics.recall_at_k(ours.by(rule), k) for rule in ("pessimistic", "optimistic"))
    return max(least - theirs, theirs - most, 0.0)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


CHECKS: tuple[Check, ...] = (
    Check(name="ranks, R@K, Med r, RSUM", against="worked out by hand", differences=_recalls_by_hand),
    Check(name="all scores equal", against="worked out by hand", differences=_constant_by_hand),
    Check(name="R-Precision, mAP@R", against="worked out by hand", differences=_lists_by_hand),
    Check(name="mean over folds", against="worked out by hand", differences=_folds_by_hand),
    Check(name="accuracy per class, argmax", against="worked out by hand", differences=_classes_by_hand),
    Check(name="ranks under each tie rule", against="plain sorting in float64", differences=_ranks_sorted),
    Check(name="R-Precision, mAP@R under each tie rule", against="plain sorting in float64", differences=_lists_sorted),
    Check(name="COCO 5K, 1K, CxC, ECCV Caption", against="eccv-caption", differences=_eccv_caption),
    Check(name="R@K of retrieval", against="clip-benchmark", differences=_clip_benchmark_recall),
    Check(name="top-1, top-5", against="clip-benchmark", differences=_clip_benchmark_accuracy),
    Check(name="mean per class", against="scikit-learn", differences=_balanced_accuracy),
    Check(name="top-1, top-5", against="scikit-learn", differences=_top_k_accuracy),
    Check(name="average precision", against="scikit-learn", differences=_average_precision),
    Check(name="chance of R@K", against="scipy", differences=_chance),
    Check(name="Wilson's interval", against="scipy", differences=_wilson),
)


def main() -> None:
    """Runs the command."""
    config: SelftestConfig = parse(SelftestConfig, description=__doc__)
    rows = run_checks(config)
    say(markdown(rows))
    if not is_good(rows, config.require_all):
        raise SystemExit(1)


if __name__ == "__main__":
    command(main)
