"""The experiment "batch": does the advantage of soft labels grow with the number of pairs that are contrasted?

A larger batch has more false negatives, but in an afternoon it also has far fewer steps: from random weights, 12 steps of
4,096 pairs learn nothing. So all arms go on from the same start, with the same steps of the same pairs, and differ in how
many of them are contrasted with each other (--loss.group-size).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims.corpus import (
    ABOUT,
    BATCH,
    LIMITS,
    MEASURES,
    RSUM_MARGIN,
    STEPS,
    Corpus,
    config_of,
    in_common,
    measured,
    more,
    prepare,
)
from benchmarks.claims.experiment import Arm, Experiment, Found, Options, Plot, Row, Unit
from benchmarks.claims.pretraining import pretrained, with_settings
from benchmarks.claims.units import locked
from pretrain.config import PretrainConfig
from setclip import config as configuration

PAIRS, STEPS_FROM_START = 4096, 12
_LOSSES = {"hard": {"name": "hard"}, "Object-IoU": {"name": "object_iou", "beta": 0.2}}


def batch(options: Options) -> Experiment:
    """Does the advantage of soft labels grow with the batch, which has more false negatives?"""
    sizes = (32, 64) if options.quick else (256, 1024, 4096)
    arms = {
        "start": Arm(what="hard labels from random weights: where all others begin", settings={"loss": _LOSSES["hard"]})
    }
    rows = {"start": Row(arm="start")}
    gains = {size: f"{size:,}, Object-IoU less hard" for size in sizes}
    for size, gain in gains.items():
        hard, soft = (f"{size:,}, {words}" for words in _LOSSES)
        for (words, loss), arm in zip(_LOSSES.items(), (hard, soft), strict=True):
            arms[arm] = Arm(
                what=f"each pair contrasted with {size - 1:,} others, {words}",
                settings={"loss": {**loss, "group_size": size}, "is_from_start": True},
                comes_last=True,  # of each seed the start comes before it
            )
        rows |= {hard: Row(arm=hard), soft: Row(arm=soft), gain: Row(arm=soft, minus=hard)}
    ends = [gains[size] for size in (sizes[-1], sizes[0])]
    config = config_of(options)
    return Experiment(
        title="Soft labels against the number of pairs contrasted",
        question="A larger batch has more pairs that share objects: more false negatives for hard labels. Does what Object-IoU "
        "brings grow with it?",
        about={
            **ABOUT,
            "Training": f"each seed begins with {STEPS} steps of {BATCH} pairs and hard labels. All other arms go on from there "
            f"with {STEPS_FROM_START} steps of {PAIRS:,} pairs, the same pairs in the same order at the recipe's learning rate. "
            "They differ in the loss, and in how many pairs are contrasted with each other (`--loss.group-size`): a quarter "
            "of a batch each, say, as four ranks do that gather nothing.",
        },
        limits=(
            *LIMITS,
            "All sizes take the same steps. A run with smaller batches would take more of them, and noisier ones: that is "
            "not asked here.",
            "Few steps, from a start that hard labels made: what soft labels do from the first step on is in "
            "[labels](labels.md).",
        ),
        arms=arms,
        rows=rows,
        measures={name: MEASURES[name] for name in ("top1", "top1_tail", "i2t_r1", "t2i_r1", "rsum")},
        claims=[
            more("the gain in top-1 grows from the fewest to the most pairs", "asked here", *ends),
            more(
                "the gain in retrieval grows from the fewest to the most pairs",
                "asked here",
                *ends,
                "rsum",
                RSUM_MARGIN,
            ),
        ],
        chosen_by="top1",
        seeds=1 if options.quick else 5,  # quick: under a minute
        prepare=prepare,
        run=run,
        plot=_by_size,
        **in_common(options)
        | {"settings": {**configuration.to_dict(_from_start(config, options)), "start": configuration.to_dict(config)}},
    )


def run(corpus: Corpus, settings: Mapping[str, Any], seed: int, out: Path) -> Found:
    """Trains the start of a seed where it is not there, goes on from it unless it is what is asked for, and evaluates."""
    start = _start(corpus, seed)
    if "is_from_start" not in settings:
        return measured(corpus, corpus.base.steps, start, "templates")
    config = _from_start(corpus.base, corpus.options)
    config = replace(config, model=replace(config.model, pretrained=str(start)))
    return measured(corpus, config.steps, pretrained("tiny", with_settings(config, settings, seed, out)), "templates")


def _start(corpus: Corpus, seed: int) -> Path:
    """Returns the run that others of a seed go on from. They may all ask for it at once: one trains it."""
    folder = corpus.work / "starts" / f"seed{seed}"
    done = folder.with_suffix(".done")
    with locked(folder.with_suffix(".lock"), waits=True):
        if not done.exists():
            pretrained("tiny", with_settings(corpus.base, {"loss": _LOSSES["hard"]}, seed, folder))
            done.touch()
    return folder


def _from_start(config: PretrainConfig, options: Options) -> PretrainConfig:
    """Returns the settings of what goes on from a start."""
    pairs, steps = (64, 2) if options.quick else (PAIRS, STEPS_FROM_START)
    return replace(config, global_batch_size=pairs, steps=steps, log_every_steps=3)


def _by_size(units: Sequence[Unit]) -> Plot | None:
    series: dict[str, list[list[float]]] = {}
    for words, loss in _LOSSES.items():
        found: dict[int, list[float]] = {}
        for unit in units:
            of_unit = unit["settings"]["loss"]
            if of_unit["name"] == loss["name"] and "group_size" in of_unit:
                found.setdefault(of_unit["group_size"], []).append(unit["values"]["top1"])
        for size, values in sorted(found.items()):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            series.setdefault(words, []).append([size, statistics.fmean(values), deviation])
    if not series:
        return None
    return Plot(
        title="Zero-shot top-1 by pairs contrasted, mean ± standard deviation over seeds",
        x_label="pairs contrasted with each other",
        y_label="zero-shot top-1, %",
        series=series,
        log_x=True,
    )
