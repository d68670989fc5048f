"""Compares two runs query by query: is the difference of their numbers more than chance?

    python -m eval_suite.significance runs/a/results/retrieval_coco.json runs/b/results/retrieval_coco.json
    python -m eval_suite.significance A.json B.json --json difference.json

Both must be of the same data: same images, captions and protocols, or same images and labels. For each metric it gives
B − A with

- a 95 % interval: a paired bootstrap over images, each drawn with its captions and with what both runs made of it;
- a two-sided p value: a sign-flip (paired permutation) test, in which both runs change places on each image with
  probability 1/2; p = (1 + draws with a difference at least as large) / (1 + draws).

Numbers of one gallery are compared; another choice of images is what the interval is about. Many metrics are many tests: with
a dozen of them one is below 0.05 for nothing every other time. Letters: U images, Q queries, M metrics, R draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from eval_suite.judgements import Direction
from eval_suite.metrics import percentile_interval
from eval_suite.per_query import PerQuery, load_per_query, per_query_path
from eval_suite.protocols import DIRECTIONS, HEADLINE_RULE, PROTOCOLS, Protocol, Queries, per_unit, units_of
from eval_suite.results import Results
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say
from setclip.lookup import look_up
from setclip.provenance import describe

NUMBERS_AT_A_TIME = 2**22


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two runs."""

    metric: str
    unit: str
    """"%", "rank" (smaller is better), or "sum of %"."""
    first: float
    second: float
    difference: float
    """Second less first."""
    interval_95: tuple[float, float] | None
    p_value: float
    images: int
    """What is drawn and flipped."""


@dataclass(frozen=True)
class Means:
    """Metrics that are means over images' queries, as sums of what each image adds."""

    names: list[str]
    first: Tensor
    """(U, M) numerators of the first run, in percent points."""
    second: Tensor
    counts: Tensor
    """(U, M) denominators, of both runs alike."""
    strata: Tensor | None
    """(U,) int64, parts from each of which as many images are drawn as it has."""
    sums: dict[str, list[str]]
    """Further metrics that are sums of these: RSUM."""


@dataclass(frozen=True)
class Medians:
    """Med r of one direction of one protocol."""

    name: str
    first: Queries
    second: Queries
    unit: Tensor
    """(Q,) int64, the image of each query among those that are drawn."""
    num_units: int
    strata: Tensor | None


def differences(first: PerQuery, second: PerQuery, draws: int = 10_000, seed: int = 0) -> list[Difference]:
    """Returns the difference of each metric that both have. Raises InputError where they are not of the same data."""
    check_same_data(first, second)
    found: list[Difference] = []
    for means in _zero_shot(first, second) if first.kind == "zeroshot" else _means(first, second):
        found += _of_means(means, draws, seed)
    for medians in [] if first.kind == "zeroshot" else _medians(first, second):
        found.append(_of_medians(medians, draws, seed))
    return found


def check_same_data(first: PerQuery, second: PerQuery) -> None:
    """Raises InputError that says in what the data of two runs differ."""
    if first.kind != second.kind:
        raise InputError(f"expected two runs of one evaluation, found {first.kind} and {second.kind}; choose two alike")
    if len(first.keys) != len(second.keys) or (first.keys != second.keys).any():
        ours, theirs = set(first.keys.tolist()), set(second.keys.tolist())
        raise InputError(
            f"expected two runs on the same images in the same order, found {len(first.keys):,} and "
            f"{len(second.keys):,} with {len(ours & theirs):,} in common; evaluate both on the same data"
        )
    if first.kind == "zeroshot":
        other = (first.arrays["labels"] != second.arrays["labels"]).sum()
        if other:
            raise InputError(
                f"expected two runs with the same labels, found other ones for {other:,} of {len(first.keys):,} images; "
                "evaluate both with the same classes"
            )
        return
    digests = [each.about.get("captions_sha256") for each in (first, second)]
    if digests[0] != digests[1]:
        raise InputError(
            f"expected two runs with the same captions, found SHA-256 {digests[0]} and {digests[1]}; evaluate both on "
            "the same captions"
        )
    if not set(first.protocols()) & set(second.protocols()):
        raise InputError(
            f"expected a protocol that both runs have, found {', '.join(first.protocols())} and "
            f"{', '.join(second.protocols())}; evaluate both with the same --protocols"
        )
    for name in first.arrays.keys() & second.arrays.keys():
        if name.endswith((".image", ".fold")) and not np.array_equal(first.arrays[name], second.arrays[name]):
            raise InputError(f"expected the same queries in both runs, found others in {name}; evaluate both anew")


# --- what each kind of evaluation compares


def _zero_shot(first: PerQuery, second: PerQuery) -> Iterator[Means]:
    a, b = (100.0 * torch.tensor(each.arrays["correct"]).double()[:, None] for each in (first, second))
    labels = torch.tensor(first.arrays["labels"].astype(np.int64))
    yield Means(["top1"], a, b, torch.ones_like(a), None, {})
    # Each class weighs the same, and images are drawn in their class, as in the interval of the metric.
    classes, of_image = labels.unique(return_inverse=True)
    weights = (1.0 / of_image.bincount().double())[of_image, None] / len(classes)
    yield Means(["mean_per_class"], weights * a, weights * b, weights, of_image, {})


def _means(first: PerQuery, second: PerQuery) -> Iterator[Means]:
    for protocol, both in _protocols(first, second):
        unit_of, num_units, strata = units_of(both[0])
        names, columns = [], []
        for direction in DIRECTIONS:
            for measure in protocol.measures:
                of = [each[direction] for each in both]
                sums = [per_unit(q, unit_of[direction], num_units, q.values(measure)) for q in of]
                columns.append((100.0 * sums[0][0], 100.0 * sums[1][0], sums[0][1]))
                names.append(f"{protocol.prefix}{direction}_{measure}")
        a, b, counts = (torch.stack(each, dim=1) for each in zip(*columns, strict=True))
        yield Means(names, a, b, counts, strata, {f"{protocol.prefix}rsum": names} if protocol.has_rsum else {})


def _medians(first: PerQuery, second: PerQuery) -> Iterator[Medians]:
    for protocol, both in _protocols(first, second):
        if protocol.has_medr:
            unit_of, num_units, strata = units_of(both[0])
            for direction in DIRECTIONS:
                a, b = (each[direction] for each in both)
                yield Medians(f"{protocol.prefix}{direction}_medr", a, b, unit_of[direction], num_units, strata)


def _protocols(first: PerQuery, second: PerQuery) -> Iterator[tuple[Protocol, list[dict[Direction, Queries]]]]:
    for name in first.protocols():
        if name in second.protocols():
            protocol = look_up(PROTOCOLS, name, "protocol")
            yield protocol, [_queries(each, name) for each in (first, second)]


def _queries(of: PerQuery, protocol: str) -> dict[Direction, Queries]:
    found: dict[Direction, Queries] = {}
    for direction in DIRECTIONS:
        arrays = {
            name.rpartition(".")[2]: torch.tensor(values.astype(np.float64 if values.dtype.kind == "f" else np.int64))
            for name, values in of.arrays.items()
            if name.startswith(f"{protocol}.{direction}.")
        }
        if "rank" not in arrays:
            raise InputError(f"expected both directions of protocol {protocol}, found no {direction}; evaluate again")
        measures = [str(name) for name in ("r_precision", "map_at_r") if name in arrays]
        lists = {name: {HEADLINE_RULE: arrays[name]} for name in measures}
        rank = {HEADLINE_RULE: arrays["rank"]}
        found[direction] = Queries(image=arrays["image"], rank=rank, lists=lists, fold=arrays.get("fold"))
    return found


# --- the two tests


def _of_means(means: Means, draws: int, seed: int) -> list[Difference]:
    difference = means.second - means.first
    totals = means.counts.sum(0)
    observed = difference.sum(0) / totals
    bootstrap = torch.cat(
        [(drawn @ difference) / (drawn @ means.counts) for drawn in _drawn(len(difference), means.strata, draws, seed)]
    )
    flipped = torch.cat([(signs @ difference) / totals for signs in _signs(len(difference), draws, seed)])
    values = [each.sum(0) / totals for each in (means.first, means.second)]
    columns = {name: [number] for number, name in enumerate(means.names)}
    columns |= {name: [means.names.index(each) for each in parts] for name, parts in means.sums.items()}
    return [
        Difference(
            metric=name,
            unit="%" if len(of) == 1 else "sum of %",
            first=float(values[0][of].sum()),
            second=float(values[1][of].sum()),
            difference=float(observed[of].sum()),
            interval_95=percentile_interval(bootstrap[:, of].sum(1)),
            p_value=_p_value(float(observed[of].sum()), flipped[:, of].sum(1)),
            images=len(difference),
        )
        for name, of in columns.items()
    ]


def _of_medians(medians: Medians, draws: int, seed: int) -> Difference:
    """Medians are no sums, so each draw is looked at by itself, by counting how often each rank occurs."""
    ranks = [each.rank[HEADLINE_RULE].numpy() for each in (medians.first, medians.second)]
    fold = np.zeros_like(ranks[0]) if medians.first.fold is None else medians.first.fold.numpy()
    shape = (int(fold.max()) + 1, max(int(each.max()) for each in ranks) + 1)
    first, second = (fold * shape[1] + each for each in ranks)  # cells of a table of folds and ranks
    unit = medians.unit.numpy()

    def median(cells: np.ndarray, times: np.ndarray | None = None) -> float:
        return _median_of_counts(np.bincount(cells, times, minlength=shape[0] * shape[1]).reshape(shape))

    bootstrap, flipped = [], []
    for table in _drawn(medians.num_units, medians.strata, draws, seed):
        for drawn in table.numpy():
            times = drawn[unit]
            bootstrap.append(median(second, times) - median(first, times))
    for table in _signs(medians.num_units, draws, seed):
        for signs in table.numpy():
            keeps = signs[unit] > 0
            flipped.append(median(np.where(keeps, second, first)) - median(np.where(keeps, first, second)))
    observed = median(second) - median(first)
    return Difference(
        metric=medians.name,
        unit="rank",
        first=median(first),
        second=median(second),
        difference=observed,
        interval_95=percentile_interval(torch.tensor(bootstrap, dtype=torch.float64)),
        p_value=_p_value(observed, torch.tensor(flipped, dtype=torch.float64)),
        images=medians.num_units,
    )


def _median_of_counts(counts: np.ndarray) -> float:
    """Returns Med r, the mean over folds of theirs, from how often each 0-based rank occurs, (folds, ranks)."""
    up_to = counts.cumsum(1)
    medians = []
    for row in up_to[up_to[:, -1] > 0]:
        middle = np.searchsorted(row, [(row[-1] - 1) // 2, row[-1] // 2], side="right")
        medians.append(int(middle.sum()) // 2 + 1)
    return sum(medians) / len(medians)


def _drawn(num_units: int, strata: Tensor | None, draws: int, seed: int) -> Iterator[Tensor]:
    """Yields (R, U) float64, how often each image is drawn, with replacement; `draws` rows in all."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(num_units) if strata is None else torch.sort(strata, stable=True).indices
    groups = torch.zeros(num_units, dtype=torch.int64) if strata is None else strata[order]
    sizes = groups.bincount()
    start, size = (sizes.cumsum(0) - sizes)[groups], sizes[groups]
    for rows in _rows_at_a_time(num_units, draws):
        shares = torch.rand(rows, num_units, generator=generator, dtype=torch.float64)
        drawn = order[start + (shares * size).long()]
        table = torch.zeros(rows, num_units, dtype=torch.float64)
        yield table.scatter_add_(1, drawn, torch.ones_like(table))


def _signs(num_units: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Yields (R, U) float64 of 1 and −1 with probability 1/2; `draws` rows in all."""
    generator = torch.Generator().manual_seed(seed + 1)
    for rows in _rows_at_a_time(num_units, draws):
        yield torch.randint(0, 2, (rows, num_units), generator=generator).double() * 2 - 1


def _rows_at_a_time(num_units: int, draws: int) -> Iterator[int]:
    step = max(1, NUMBERS_AT_A_TIME // num_units)
    for start in range(0, draws, step):
        yield min(step, draws - start)


def _p_value(observed: float, flipped: Tensor) -> float:
    # Sums in another order differ in their last bits, and equal differences must count as equal.
    as_large = int((flipped.abs() >= abs(observed) - 1e-9).sum())
    return (1 + as_large) / (1 + len(flipped))


# --- the command


@dataclass(frozen=True, kw_only=True)
class SignificanceConfig:
    """Which two runs are compared."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Two results files A.json and B.json; the difference is B − A. Beside each lies its FILE.queries.npz."""
    json: Path | None = None
    """Where the differences are written, too."""
    draws: int = 10_000
    """Of the bootstrap and of the test; p is at least 1/(draws + 1)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 100:
            raise ValueError(f"draws must be at least 100, found {self.draws}")


def compare(config: SignificanceConfig) -> tuple[list[Difference], list[Results]]:
    """Does what the command does but for writing. Raises InputError where the runs cannot be compared."""
    if len(config.results) != 2:
        raise InputError(
            f"expected two results files, found {len(config.results)}; `python -m eval_suite.significance A.json B.json`"
        )
    results = [Results.load(path) for path in config.results]
    queries = []
    for path, each in zip(config.results, results, strict=True):
        named = each.details.get("queries")
        queries.append(load_per_query(path.with_name(named) if named else per_query_path(path)))
    return differences(queries[0], queries[1], config.draws, config.seed), results


def markdown(found: list[Difference], results: list[Results], draws: int, seed: int) -> str:
    """Returns the differences as Markdown."""
    rows = ["| metric | A | B | B − A | 95 % interval | p |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for each in found:
        interval = "–" if each.interval_95 is None else "[{:+.2f}, {:+.2f}]".format(*each.interval_95)
        better = " ↓" if each.unit == "rank" else (" %" if each.unit == "%" else "")
        p = f"{each.p_value:.4f}" if each.p_value > 1.5 / (1 + draws) else f"≤ {1 / (1 + draws):.4f}"
        rows.append(
            f"| {each.metric.replace('_', ' ')}{better} | {each.first:.2f} | {each.second:.2f} | {each.difference:+.2f} | "
            f"{interval} | {p} |"
        )
    places = [f"{name}: {each.checkpoint.get('where', 'model')}" for name, each in zip("AB", results, strict=True)]
    note = (
        f"Paired over {max(each.images for each in found):,} images: bootstrap interval and sign-flip test, two-sided, "
        f"{draws:,} draws each, seed {seed}; p is not corrected for the number of metrics."
    )
    return "\n".join([*places, "", *rows, "", note]) + "\n"


def main() -> None:
    """Runs the command."""
    config: SignificanceConfig = parse(SignificanceConfig, description=__doc__)
    found, results = compare(config)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, _as_json(config, found, results))
    say(markdown(found, results, config.draws, config.seed).rstrip())


def _as_json(config: SignificanceConfig, found: list[Difference], results: list[Results]) -> dict[str, Any]:
    return {
        "first": {"results": str(config.results[0]), "checkpoint": results[0].checkpoint},
        "second": {"results": str(config.results[1]), "checkpoint": results[1].checkpoint},
        "dataset": results[0].dataset,
        "method": "paired over images: bootstrap interval, sign-flip test, two-sided, not corrected for many metrics",
        "draws": config.draws,
        "seed": config.seed,
        "differences": [vars(each) for each in found],
        "provenance": describe(),
    }


if __name__ == "__main__":
    command(main)
