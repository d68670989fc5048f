"""Linear probe: a logistic regression on frozen image features, its penalty chosen on a part of the training pictures.

    python -m eval_suite.linear_probe --train DIR --test DIR --checkpoint RUN    # class folders
    python -m eval_suite.linear_probe --data DIR --test-share 0.2                # one folder, a part held out

Radford et al. 2021 (arXiv 2103.00020), appendix A.3, with scikit-learn's L-BFGS; the features here are unit vectors, so
penalties are not on the scale of that paper. The test part is looked at once, at the end. `linear_probe` is the
evaluation as a function over features. Letters: N pictures, C classes, D width.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from eval_suite.encode import encode_functions, encode_images
from eval_suite.images import ClassFolders, FolderImages, find_class_folders, image_batches
from eval_suite.metrics import (
    class_counts,
    mean_per_class_accuracy,
    per_class_interval,
    recall_at_k,
    wilson_interval,
)
from eval_suite.model import model_to_evaluate
from eval_suite.preprocess import model_pictures
from eval_suite.results import Metric, Results, default_out, markdown_table
from setclip.config import command, parse, to_dict
from setclip.errors import InputError
from setclip.hashing import permutation
from setclip.log import Meter, say, warn

ChosenBy = Literal["top1", "mean_per_class"]


@dataclass(frozen=True)
class SweepPoint:
    """One penalty that was tried."""

    c: float
    """scikit-learn's C, the inverse of the penalty's strength."""
    top1: float
    """On the validation part, in percent."""
    mean_per_class: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class ProbeOutcome:
    """What a linear probe found."""

    metrics: dict[str, Metric]
    predictions: Tensor
    """(number of test pictures,) int64."""
    c: float
    """The chosen one."""
    sweep: list[SweepPoint]
    """In the order of C."""
    iterations: int
    """Of the last fit, on all training pictures."""
    converged: bool
    num_validation: int

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        notes = []
        if not self.converged:
            notes.append(
                f"the last fit had not converged after {self.iterations:,} iterations; raise --most-iterations"
            )
        stopped = [point.c for point in self.sweep if not point.converged]
        if stopped:
            notes.append(
                f"{len(stopped)} of {len(self.sweep)} fits of the sweep had not converged (C from {min(stopped):g})"
            )
        if self.c in (self.sweep[0].c, self.sweep[-1].c) and len(self.sweep) > 1:
            notes.append(f"the chosen C = {self.c:g} is the end of the range; widen it with --lowest-c or --highest-c")
        return notes


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    lowest_c: float = 1e-6,
    highest_c: float = 1e6,
    finest: float = 0.125,
    chosen_by: ChosenBy = "top1",
    validation_share: float = 0.2,
    iterations: int = 1000,
    most_iterations: int = 16_000,
    seed: int = 0,
    show_progress: bool = True,
) -> ProbeOutcome:
    """Fits on training features with a swept penalty and judges on test features once.

    Features: (N, D) float; labels: (N,) int64 in [0, C), each class with two training pictures or more. The sweep fits
    on `1 - validation_share` of each class and judges on the rest: C from `lowest_c` to `highest_c` two decades apart,
    then halving the steps around the best down to `finest` decades; of equal accuracies (`chosen_by`) the smallest C
    wins. A fit that has not converged goes on with four times the iterations, up to `most_iterations`.

    Metrics, in percent: `top1`, `mean_per_class`. Raises InputError where counts or labels do not fit.
    """
    _check(train_features, train_labels, num_classes, "training")
    _check(test_features, test_labels, num_classes, "test")
    if not (0 < lowest_c <= highest_c and finest > 0 and 0 < validation_share < 1):
        raise InputError(
            f"expected 0 < lowest C ≤ highest C, a finest step above 0 and a validation share in (0, 1), found "
            f"{lowest_c:g}, {highest_c:g}, {finest:g} and {validation_share:g}; correct them"
        )
    counts = torch.bincount(train_labels, minlength=num_classes)
    if int(counts.min()) < 2:
        label = int(counts.argmin())
        raise InputError(
            f"expected at least two training pictures of each of {num_classes} classes, one to fit and one to choose the "
            f"penalty, found {int(counts.min())} of class number {label}; add some or leave the class out"
        )
    fit_rows, validation_rows = split_classes(train_labels, validation_share, seed)
    x, y = train_features.double().numpy(), train_labels.numpy()
    points: dict[float, SweepPoint] = {}
    meter = Meter(None, "choosing the penalty", "fits") if show_progress else None

    def try_c(exponent: float) -> None:
        exponent = round(exponent, 9)  # the same point reached by other sums
        if exponent in points:
            return
        fit = _fit(x[fit_rows], y[fit_rows], 10.0**exponent, iterations, most_iterations)
        right = torch.from_numpy(fit.predict(x[validation_rows])) == train_labels[validation_rows]
        points[exponent] = SweepPoint(
            c=10.0**exponent,
            top1=recall_at_k((~right).long(), 1),
            mean_per_class=mean_per_class_accuracy(right, train_labels[validation_rows]),
            iterations=fit.iterations,
            converged=fit.converged,
        )
        if meter is not None:
            meter.update(note=f"C {10.0**exponent:g}: {getattr(points[exponent], chosen_by):.1f} %")

    def best() -> float:
        return min(points, key=lambda exponent: (-getattr(points[exponent], chosen_by), exponent))

    try:
        low, high = math.log10(lowest_c), math.log10(highest_c)
        step = 2.0
        for number in range(math.floor((high - low) / step + 1e-9) + 1):
            try_c(low + number * step)
        try_c(high)
        while step / 2 >= finest - 1e-9:
            step /= 2
            centre = best()
            for exponent in (centre - step, centre + step):
                if low <= exponent <= high:
                    try_c(exponent)
    finally:
        if meter is not None:
            meter.close()
    chosen = best()
    last = _fit(x, y, 10.0**chosen, iterations, most_iterations)
    predictions = torch.from_numpy(last.predict(test_features.double().numpy()))
    return ProbeOutcome(
        metrics=_metrics(predictions == test_labels, test_labels, num_classes, len(train_labels)),
        predictions=predictions,
        c=points[chosen].c,
        sweep=[points[exponent] for exponent in sorted(points)],
        iterations=last.iterations,
        converged=last.converged,
        num_validation=len(validation_rows),
    )


def split_classes(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns (rows kept, rows held out), ascending: of each class `share`, at least one and not all of two or more.

    Which ones depends on the seed and the labels' order alone. A class with a single row keeps it.
    """
    held: list[int] = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        num = min(len(rows) - 1, max(1, round(share * len(rows))))
        held += rows[permutation(len(rows), seed, label)[:num]].tolist()
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[held] = True
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()


@dataclass(frozen=True)
class _Fit:
    model: LogisticRegression
    iterations: int
    converged: bool

    def predict(self, features: NDArray[np.float64]) -> NDArray[np.int64]:
        return self.model.predict(features)


def _fit(x: NDArray[np.float64], y: NDArray[np.int64], c: float, iterations: int, most: int) -> _Fit:
    """Fits; one that has not converged goes on from where it stands."""
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=min(iterations, most), warm_start=True)
    total = 0
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y)
        for warning in caught:
            if not issubclass(warning.category, ConvergenceWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        ran = int(np.max(model.n_iter_))
        total += ran
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        # L-BFGS also gives up where rounding leaves it no better point; more iterations then change nothing.
        if converged or total >= most or ran < model.max_iter:
            return _Fit(model, total, converged)
        model.max_iter = min(3 * total, most - total)


def _check(features: Tensor, labels: Tensor, num_classes: int, what: str) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise InputError(
            f"expected {what} features (N, D) and N labels, found {tuple(features.shape)} and {len(labels)} labels; of "
            "sets of vectors take one vector each, such as their mean"
        )
    if num_classes < 2 or not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise InputError(
            f"expected {what} labels in [0, {num_classes}) of at least two classes, found "
            f"{int(labels.min())} to {int(labels.max())}; check them"
        )
    if not bool(features.isfinite().all()):
        raise InputError(f"expected finite {what} features, found NaN or infinite ones; evaluate an earlier checkpoint")


def _metrics(right: Tensor, labels: Tensor, num_classes: int, num_train: int) -> dict[str, Metric]:
    num, top1 = len(labels), recall_at_k((~right).long(), 1)
    how = f"a logistic regression fitted on the frozen unit features of {num_train:,} training pictures"
    chance = 100.0 / num_classes
    return {
        "top1": Metric(
            value=top1,
            unit="%",
            protocol=f"Share of the test pictures whose class of {num_classes:,} is predicted by {how}.",
            samples=num,
            chance=chance,
            interval_95=wilson_interval(top1 / 100.0 * num, num),
            interval_method="Wilson, images independent, training pictures fixed",
        ),
        "mean_per_class": Metric(
            value=mean_per_class_accuracy(right, labels),
            unit="%",
            protocol=f"Mean over the classes that have test pictures of each class's share that is predicted by {how}.",
            samples=len(class_counts(right, labels)[1]),
            chance=chance,
            interval_95=per_class_interval(right, labels),
            interval_method="bootstrap, 1,000 draws, images resampled in their class, training pictures fixed",
        ),
    }


# --- the command


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """What is fitted, on what, and where the results go."""

    train: Path | None = None
    """Class folders to fit on."""
    test: Path | None = None
    """Class folders to judge on."""
    data: Path | None = None
    """Instead of both: class folders of which a part is held out for the test."""
    test_share: float = 0.2
    """Of each class, with --data."""
    name: str | None = None
    """Name of the data set in results. Default: that of the test folder."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    out: Path | None = None
    """Results file. Default: results/ of the run."""
    chosen_by: ChosenBy = "top1"
    """The accuracy on the validation part that chooses the penalty."""
    validation_share: float = 0.2
    """Of each class's training pictures, to choose the penalty."""
    lowest_c: float = 1e-6
    """Strongest penalty, as scikit-learn's C."""
    highest_c: float = 1e6
    """Weakest penalty."""
    finest: float = 0.125
    """Smallest step of the sweep, in decades."""
    iterations: int = 1000
    """Iterations of a fit; one that has not converged goes on."""
    most_iterations: int = 16_000
    """Where a fit stops in any case; results then say so."""
    seed: int = 0
    """Of the parts that are held out."""
    batch_size: int = 128
    """Images a batch."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""


def probe_folders(config: LinearProbeConfig) -> tuple[ClassFolders, ClassFolders]:
    """Returns (training, test) pictures with labels over the same classes. Raises InputError where they do not fit."""
    if config.data is not None and config.train is None and config.test is None:
        if not 0 < config.test_share < 1:
            raise InputError(
                f"expected --test-share between 0 and 1, found {config.test_share:g}; give 0.2, for example"
            )
        found = find_class_folders(config.data)
        return tuple(_part(found, rows) for rows in split_classes(found.labels, config.test_share, config.seed + 1))  # type: ignore[return-value]
    if config.data is not None or config.train is None or config.test is None:
        raise InputError(
            "expected --train DIR and --test DIR, or --data DIR with a part held out, found "
            f"train {config.train}, test {config.test}, data {config.data}; give class folders"
        )
    if config.train.resolve() == config.test.resolve():
        raise InputError(
            f"expected other pictures for the test than for training, found {config.train} for both; hold a part out "
            f"with --data {config.train}"
        )
    train = find_class_folders(config.train)
    own = find_class_folders(config.test).classes
    unknown = [name for name in own if name not in train.classes]
    if unknown:
        raise InputError(
            f"expected the test classes among the {len(train.classes):,} of {config.train}, found others: "
            f"{', '.join(unknown[:5])}; name the folders alike, or leave them out"
        )
    return train, find_class_folders(config.test, train.classes)


def _part(found: ClassFolders, rows: Tensor) -> ClassFolders:
    paths = tuple(found.paths[row] for row in rows.tolist())
    return ClassFolders(found.folder, found.classes, paths, found.labels[rows])


def evaluate(config: LinearProbeConfig) -> tuple[Results, ProbeOutcome]:
    """Does what the command does but for writing. Raises InputError before the model is loaded where data are wrong."""
    train, test = probe_folders(config)
    empty = [name for name, count in _counts(train).items() if count < 2]
    if empty:
        raise InputError(
            f"expected at least two training pictures of each class in {train.folder}, found fewer of {len(empty):,}: "
            f"{', '.join(empty[:5])}; add some or leave the folders out"
        )
    loaded = model_to_evaluate(config.checkpoint, config.device)
    start = time.monotonic()
    encode_image, _ = encode_functions(loaded)

    def features_of(found: ClassFolders) -> Tensor:
        images = FolderImages(found.paths, model_pictures(loaded))
        return encode_images(encode_image, image_batches(images, config.batch_size, config.workers), len(found.paths))

    outcome = linear_probe(
        features_of(train),
        train.labels,
        features_of(test),
        test.labels,
        len(train.classes),
        lowest_c=config.lowest_c,
        highest_c=config.highest_c,
        finest=config.finest,
        chosen_by=config.chosen_by,
        validation_share=config.validation_share,
        iterations=config.iterations,
        most_iterations=config.most_iterations,
        seed=config.seed,
    )
    name = config.name or test.folder.resolve().name
    results = Results(
        evaluation="linear_probe",
        dataset={
            "name": name,
            "place": str(test.folder),
            "train_place": str(train.folder),
            "images": len(test.paths),
            "train_images": len(train.paths),
            "validation_images": outcome.num_validation,
            "classes": len(train.classes),
            "classes_with_images": len(test.labels.unique()),
            "held_out": config.data is not None,
        },
        metrics=outcome.metrics,
        headline=["top1", "mean_per_class"],
        checkpoint=loaded.identity,
        config=to_dict(config),
        details=details_of(outcome, config.chosen_by),
        seconds=round(time.monotonic() - start, 3),
    )
    return results, outcome


def details_of(outcome: ProbeOutcome, chosen_by: ChosenBy) -> dict[str, Any]:
    """Returns how the penalty was chosen, for results."""
    return {
        "c": outcome.c,
        "chosen_by": f"{chosen_by} on {outcome.num_validation:,} training pictures held out",
        "iterations": outcome.iterations,
        "converged": outcome.converged,
        "notes": outcome.notes,
        "sweep": [asdict(point) for point in outcome.sweep],
    }


def sweep_table(sweep: Sequence[SweepPoint]) -> str:
    """Returns the sweep as a Markdown table."""
    rows = [
        f"| {p.c:.3g} | {p.top1:.2f} | {p.mean_per_class:.2f} | {p.iterations:,}{'' if p.converged else ' (stopped)'} |"
        for p in sweep
    ]
    return "\n".join(["| C | validation top-1 % | mean per class % | iterations |", "|---:|---:|---:|---:|", *rows])


def _counts(found: ClassFolders) -> dict[str, int]:
    return dict(zip(found.classes, found.labels.bincount(minlength=len(found.classes)).tolist(), strict=True))


def main() -> None:
    """Runs the command."""
    config: LinearProbeConfig = parse(LinearProbeConfig, description=__doc__)
    results, outcome = evaluate(config)
    out = config.out or default_out("linear_probe", results.dataset["name"], results.checkpoint)
    results.save(out)
    say(f"\n{sweep_table(outcome.sweep)}\n\nC = {outcome.c:.4g}, then fitted on all training pictures\n")
    for note in outcome.notes:
        warn(note)
    say(f"{markdown_table([results])}\nresults: {out}")


if __name__ == "__main__":
    command(main)
