"""Trains several arms that differ in a few flags, with several seeds, by the commands that users type; one table.

Restartable: a run whose results are there is not run again. Used by `benchmarks.labels` and `benchmarks.photos`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setclip.checkpoint import find_checkpoint
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import duration, say
from setclip.provenance import describe


def run_arm(out: Path, train: Sequence[str], evaluations: Mapping[str, Sequence[str]], threads: int) -> dict[str, Any]:
    """Trains into `out` (pretrain.run with `train`), evaluates, and returns {metric: value} with the chance levels.

    `evaluations`: name to the module and its flags, without checkpoint and output.
    """
    summary = out / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    start = time.monotonic()
    _run(["pretrain.run", *train, "--out", str(out), "--overwrite"], threads)
    seconds = time.monotonic() - start
    checkpoint = find_checkpoint(out)
    found: dict[str, Any] = {"train_seconds": seconds, "provenance": describe(), "values": {}, "chance": {}}
    for name, flags in evaluations.items():
        place = out / f"{name}.json"
        _run([*flags, "--checkpoint", str(checkpoint), "--out", str(place)], threads)
        for metric, content in json.loads(place.read_text())["metrics"].items():
            found["values"][metric] = content["value"]
            found["chance"][metric] = content.get("chance")
    write_json(summary, found)
    return found


def compare(
    out: Path,
    arms: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    train: Sequence[str],
    evaluations: Mapping[str, Sequence[str]],
    jobs: int = 1,
) -> dict[str, list[dict[str, Any]]]:
    """Returns arm → the results of each seed; `train` are the flags that all arms share (recipe first).

    `jobs` runs go on at a time, each with its share of the cores: two runs of one thread do more than one of two.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with ThreadPoolExecutor(jobs) as pool:
        # Seed by seed, so that an interrupted comparison is a fair one of fewer seeds.
        started = {
            (arm, seed): pool.submit(
                run_arm, out / f"{arm}-seed{seed}", [*train, *flags, "--seed", str(seed)], evaluations, threads
            )
            for seed in seeds
            for arm, flags in arms.items()
        }
        for (arm, seed), future in started.items():
            results[arm].append(future.result())
            say(f"{arm}, seed {seed}: {duration(results[arm][-1]['train_seconds'])}")
    return results


def markdown(results: Mapping[str, list[dict[str, Any]]], metrics: Mapping[str, str]) -> str:
    """Returns a Markdown table, arm by metric: mean ± sample standard deviation over seeds, and a row of chance levels.

    `metrics`: metric to its heading.
    """
    lines = ["| arm | " + " | ".join(metrics.values()) + " |", "|---" * (len(metrics) + 1) + "|"]
    for arm, runs in results.items():
        cells = []
        for metric in metrics:
            values = [run["values"][metric] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    chances = [next(iter(results.values()))[0]["chance"].get(metric) for metric in metrics]
    lines.append("| chance | " + " | ".join("" if c is None else f"{c:.2g}" for c in chances) + " |")
    return "\n".join(lines)


def mean(results: Mapping[str, list[dict[str, Any]]], arm: str, metric: str) -> float:
    """Returns an arm's mean over seeds."""
    return statistics.mean(run["values"][metric] for run in results[arm])


def _run(arguments: Sequence[str], threads: int) -> None:
    say(f"\n$ OMP_NUM_THREADS={threads} python -m {' '.join(arguments)}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if subprocess.run([sys.executable, "-m", *arguments], env=environment).returncode:
        raise InputError(
            f"`python -m {' '.join(arguments)}` failed; mend what it says and start again, finished runs are kept"
        )
