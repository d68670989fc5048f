"""Do Object-IoU labels help on the embedded corpus? Four arms, three seeds, 500 steps each, on a CPU in half an hour.

    python -m benchmarks.labels [--quick] [--json FILE] [--out DIR]

The arms differ in the loss alone. The goals are the means of a prototype on a corpus of the same kind. A corpus built
from topics has many false negatives, which favours soft labels, and zero-shot shows the training pictures in new places:
this measures the code, and the direction of the effect, not what it is worth on photographs (see benchmarks.photos).
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.arms import compare, markdown, mean
from data_prep.run import prepare
from data_prep.sources.scenes import ScenesConfig
from setclip.config import command, parse
from setclip.files import write_json
from setclip.log import say
from setclip.manifest import MANIFEST_NAME

ARMS = {
    "hard": ["--loss.name", "hard"],
    "label-smoothing-0.2": ["--loss.name", "label_smoothing"],
    "object-iou-0.2": ["--loss.name", "object_iou", "--loss.beta", "0.2"],
    "object-iou-0.5": ["--loss.name", "object_iou", "--loss.beta", "0.5"],
}
METRICS = {
    "top1": "zero-shot top-1",
    "top1_head": "head",
    "top1_middle": "middle",
    "top1_tail": "tail",
    "i2t_r1": "i2t R@1 of 1,000",
    "t2i_r1": "t2i R@1",
}
GOALS = {
    "hard": {"top1": 20.1, "top1_tail": 14.7, "i2t_r1": 31.0},
    "label-smoothing-0.2": {"top1": 24.1, "top1_tail": 17.4, "i2t_r1": 35.1},
    "object-iou-0.2": {"top1": 28.0, "top1_tail": 22.6, "i2t_r1": 36.1},
    "object-iou-0.5": {"top1": 30.9, "top1_tail": 24.7, "i2t_r1": 34.9},
}


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Compares the losses on the embedded corpus."""

    quick: bool = False
    """Two arms, one seed, 30 steps on 2,000 scenes: under a minute, and no evidence of anything."""
    out: Path = Path("runs/benchmarks/labels")
    """Data and runs; runs that are finished there are not run again."""
    seeds: int = 3
    """Seeds per arm."""
    steps: int = 500
    """Steps per run."""
    jobs: int = 2
    """Runs at a time; they share the cores."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """The command."""
    config = parse(LabelsConfig, description=__doc__)
    out = config.out / "quick" if config.quick else config.out
    scenes = out / "scenes"
    if not (scenes / MANIFEST_NAME).exists():
        small = {"samples": 2_000, "test_samples": 100} if config.quick else {}
        prepare("scenes", ScenesConfig(out=scenes, overwrite=True, **small))
    arms = {arm: ARMS[arm] for arm in (("hard", "object-iou-0.2") if config.quick else ARMS)}
    results = compare(
        out,
        arms,
        range(1 if config.quick else config.seeds),
        [
            "tiny",
            "--data.shards",
            str(scenes),
            "--data.workers",
            "0",
            "--steps",
            str(30 if config.quick else config.steps),
        ],
        {
            "zeroshot": ["eval_suite.zeroshot", "scenes", "--data", str(scenes)],
            "retrieval": ["eval_suite.retrieval", "--data", str(scenes)],
        },
        config.jobs,
    )
    say(f"\n{markdown(results, METRICS)}")
    for arm, goals in GOALS.items():
        for metric, goal in goals.items() if arm in results else ():
            found = mean(results, arm, metric)
            say(f"{arm} {metric}: {found:.1f}, goal {goal} {'reached' if found >= goal else 'MISSED'}")
    if config.json is not None:
        write_json(config.json, {"goals": GOALS, "results": results})


if __name__ == "__main__":
    command(main)
