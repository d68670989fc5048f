"""How fast the embedded corpus is drawn and its captions are parsed, in CPU time of one process.

    python -m benchmarks.scenes [--quick] [--json FILE]

CPU time, because the machine may be shared; several repeats, of which the median counts.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.parse_pos import PosParser
from data_prep.sources.scenes import ScenesConfig, encode, scene_maker
from setclip.config import command, parse
from setclip.files import write_json
from setclip.log import say

GOAL_SCENES_PER_SECOND = 1_000  # drawn, captioned and encoded, a core


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures drawing and parsing of the embedded corpus."""

    quick: bool = False
    """Fewer scenes, for a look."""
    repeats: int = 5
    """Measurements of each kind."""
    json: Path | None = None
    """File for the figures."""


def rates(work: Callable[[int], int], repeats: int) -> list[float]:
    """Returns items per CPU second of `work`, which takes the number of the repeat and returns how many it did."""
    result = []
    for repeat in range(repeats):
        start = time.process_time()
        done = work(repeat)
        result.append(done / (time.process_time() - start))
    return result


def main() -> None:
    config = parse(BenchmarkConfig, description=__doc__)
    scenes, captions = (500, 500) if config.quick else (3_000, 3_000)
    defaults = ScenesConfig(out=Path())
    maker = scene_maker(defaults.nouns, defaults.size, defaults.seed)
    parser = PosParser()

    def draw(repeat: int) -> int:
        for number in range(repeat * scenes, (repeat + 1) * scenes):
            encode(maker.scene("train", number).pixels)
        return scenes

    texts = [maker.scene("train", number).caption for number in range(captions)]
    draw(0)
    parser.parse(texts[:200])
    figures = {
        "scenes_per_cpu_second": rates(draw, config.repeats),
        "captions_parsed_per_cpu_second": rates(lambda _: len(parser.parse(texts)), config.repeats),
    }
    goals = {"scenes_per_cpu_second": GOAL_SCENES_PER_SECOND}
    for name, values in figures.items():
        goal = f"   goal {goals[name]:,}" if name in goals else ""
        say(f"{name:32} {statistics.median(values):8,.0f}  ({min(values):,.0f} to {max(values):,.0f}){goal}")
    if config.json is not None:
        write_json(config.json, {"goals": goals, "repeats": figures})


if __name__ == "__main__":
    command(main)
