"""All experiments: a plain dict of names."""

from collections.abc import Callable

from benchmarks.claims import batch, corpus, labels_photos, sets
from benchmarks.claims.experiment import Experiment, Options

EXPERIMENTS: dict[str, Callable[[Options], Experiment]] = {
    "sets": sets.experiment,
    "labels": corpus.labels,
    "labels-photos": labels_photos.experiment,
    "domains": corpus.domains,
    "tail": corpus.tail,
    "batch": batch.batch,
}
