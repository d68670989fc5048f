"""How fast objects are counted and how much memory data preparation takes, whatever the number of samples.

    python -m benchmarks.counting [--quick] [--json FILE]

Counting: the indices of 1,000 shards with 10,000 captions each (40 different ones, each read 25 times) are counted by the
function that makes objects.parquet; one thread, CPU time. Names are drawn from a Zipf law that is fitted to 4,000
captions of Conceptual Captions: 2,700 distinct nouns among 14,000.

Memory: the commands run (with its merge), parse and statistics over few and many tars of the same size, each in a process
of its own, by its peak resident memory. The captions have some 2,000 different words: the parser keeps words that it
meets, up to a limit, and would else be what is measured.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg

from data_prep.statistics import count_objects
from setclip.config import command, parse
from setclip.files import write_json
from setclip.log import say
from setclip.shards import Sample, ShardInfo, ShardWriter, key_of

GOAL_SECONDS = 2.0  # for ten million captions
GOAL_MEMORY_MB = 2_000
GOAL_GROWTH = 1.1  # of peak memory, from ten tars to a hundred

_VOCABULARY, _EXPONENT = 330_000, 1.22
_CAPTIONS_PER_SHARD = 10_000


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures counting, and memory over the number of shards."""

    quick: bool = False
    """A tenth of the captions, and two and ten tars."""
    repeats: int = 3
    """Measurements of counting."""
    json: Path | None = None
    """File for the figures."""


def write_indices(folder: Path, shards: int, different: int) -> list[ShardInfo]:
    """Writes the indices of shards with one caption a sample and objects by a Zipf law; all but `different` are links."""
    random = np.random.default_rng(0)
    names = np.array([f"noun {number:x}" for number in range(_VOCABULARY)])
    cumulative = np.cumsum(1 / np.arange(1, _VOCABULARY + 1) ** _EXPONENT)
    infos = []
    for shard in range(shards):
        path = folder / f"train-{shard:05d}.tar"
        if shard >= different:
            os.link(folder / f"train-{shard % different:05d}.idx", path.with_suffix(".idx"))
        else:
            lengths = random.integers(1, 6, _CAPTIONS_PER_SHARD)
            drawn = np.searchsorted(cumulative, random.random(lengths.sum()) * cumulative[-1])
            with ShardWriter(path) as writer:
                for row, chosen in enumerate(np.split(names[drawn], np.cumsum(lengths)[:-1])):
                    writer.add(
                        Sample(
                            key=f"{shard:012d}{row:012d}",
                            image=b"",
                            image_ext="jpg",
                            captions=[""],
                            objects={"pos": [chosen.tolist()]},
                            width=1,
                            height=1,
                            sha256="",
                        )
                    )
            path.unlink()
        size = _CAPTIONS_PER_SHARD
        infos.append(ShardInfo(name=path.name, split="train", samples=size, captions=size, bytes=0, sha256=""))
    return infos


def write_tars(folder: Path, first: int, last: int, samples: int) -> None:
    """Writes tars `first` to `last` of small pictures that are all different, as our own shards."""
    random = np.random.default_rng(first)
    for tar in range(first, last):
        with ShardWriter(folder / f"train-{tar:05d}.tar") as writer:
            for _ in range(samples):
                pixels = np.kron(random.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
                image = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90)
                key, sha256 = key_of(image)
                noun = random.integers(0, 2_000)
                writer.add(
                    Sample(
                        key=key,
                        image=image,
                        image_ext="jpg",
                        captions=[f"a dog and the gadget{noun} on the table"],
                        objects={},
                        width=32,
                        height=32,
                        sha256=sha256,
                    )
                )


def peak_memory_mb(arguments: list[str]) -> float:
    """Runs `python -m ARGUMENTS` and returns its peak resident memory, in MB (10⁶ bytes)."""
    with subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{arguments} ended with status {process.returncode}")
    return usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    config = parse(BenchmarkConfig, description=__doc__)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    shards, few, many, samples = (100, 2, 10, 300) if config.quick else (1_000, 10, 100, 1_000)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        infos = write_indices(folder, shards, min(40, shards))
        seconds = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(config.repeats):
            start = time.process_time()
            counted = count_objects(folder, infos)["pos"]
            distinct = len(counted.counts)
            seconds.append(time.process_time() - start)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    say(
        f"{counted.captions:,} captions, {counted.mentions:,} objects ({distinct:,} distinct): median "
        f"{statistics.median(seconds):.2f} CPU s ({min(seconds):.2f} to {max(seconds):.2f}), peak memory {memory:,.0f} MB "
        f"({before * 1024 / 1e6:,.0f} MB before); goal {GOAL_SECONDS * shards / 1000:g} s, {GOAL_MEMORY_MB:,} MB"
    )
    growth = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        peaks: dict[str, list[float]] = {}
        for first, last in ((0, few), (few, many)):
            write_tars(folder / "in", first, last, samples)
            out = str(folder / f"out-{last}")
            for name, arguments in {
                "run": ["data_prep.run", "tars", "--tars", str(folder / "in"), "--out", out, "--processes", "1"],
                "parse": ["data_prep.parse", out, "--compound", "False", "--processes", "1"],
                "statistics": ["data_prep.statistics", out],
            }.items():
                peaks.setdefault(name, []).append(peak_memory_mb(arguments))
        for name, (low, high) in peaks.items():
            growth[name] = high / low
            say(
                f"{name:10} peak memory {low:,.0f} MB over {few} tars, {high:,.0f} MB over {many} ({samples:,} samples each): "
                f"{high / low:.3f} times; goal {GOAL_GROWTH}"
            )
    if config.json is not None:
        write_json(
            config.json,
            {
                "goals": {"cpu_seconds": GOAL_SECONDS, "memory_mb": GOAL_MEMORY_MB, "memory_growth": GOAL_GROWTH},
                "captions": counted.captions,
                "objects": counted.mentions,
                "cpu_seconds": seconds,
                "memory_mb": memory,
                "peak_memory_mb": {name: {str(few): low, str(many): high} for name, (low, high) in peaks.items()},
                "memory_growth": growth,
            },
        )


if __name__ == "__main__":
    command(main)
