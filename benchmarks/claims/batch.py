"""The experiment "batch": does the advantage of soft labels grow with the number of pairs that are contrasted?

A larger batch has more false negatives, but in an afternoon it also has far fewer steps: from random weights, 12 steps of
4,096 pairs hardly learn. So all arms go on from the same start, with the same steps of the same pairs, and differ in how
many of them are contrasted with each other (--loss.group-size).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims.corpus import (
    ABOUT,
    LIMITS,
    MEASURES,
    RSUM_MARGIN,
    Corpus,
    config_of,
    in_common,
    measured,
    more,
    prepare,
)
from benchmarks.claims.experiment import Arm, Experiment, Found, Options, Plot, Row, Table, Unit
from benchmarks.claims.pretraining import pretrained, with_settings
from benchmarks.claims.units import locked
from pretrain.config import PretrainConfig
from setclip import config as configuration
from setclip.checkpoint import find_checkpoint, weights_path
from setclip.files import sha256_of

PAIRS, STEPS_FROM_START = 4096, 12
LEARNING_RATE = 1e-3
OTHER_SEED = 1000
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
                settings={"loss": {**loss, "group_size": size}},
                comes_last=True,  # of each seed the start comes before it
            )
        rows |= {hard: Row(arm=hard), soft: Row(arm=soft), gain: Row(arm=soft, minus=hard)}
    ends = [gains[size] for size in (sizes[-1], sizes[0])]
    config = config_of(options)
    pairs, steps = _pairs_and_steps(options)
    return Experiment(
        title="Soft labels against the number of pairs contrasted",
        question="A larger batch has more pairs that share objects: more false negatives for hard labels. Does what Object-IoU "
        "brings grow with it?",
        about={
            **ABOUT,
            "Choice": f"{ABOUT['Choice']} The learning rate of what goes on, of 4e-3 (the recipe's) and 1e-3, is that with which "
            "hard labels and all pairs contrasted had the higher held-out top-1 after a start with another seed (100): 4.4 "
            "and 5.9; the start had 4.5.",
            "Model": ABOUT["Model"].replace("from random weights", "from the weights that Training names"),
            "Training": f"each seed begins with {config.steps} steps of {config.global_batch_size} pairs and hard labels, from "
            f"random weights. All other arms go on from there with {steps} steps of {pairs:,} pairs, the same pairs in the same "
            f"order, other than the start's, with a whole schedule of its own up to {LEARNING_RATE:g}. They differ in the "
            f"loss, and in how many pairs are contrasted with each other (`--loss.group-size`): "
            f"{sizes[0]:,} as {pairs // sizes[0]} ranks would that gather nothing, or all.",
        },
        limits=(
            LIMITS[0],
            "Where Object-IoU brings nothing in these few steps at any size (the rows *less hard*), that it brings no more "
            "with more pairs says little of longer training.",
            "All sizes take the same steps. A run with smaller batches would take more of them, and noisier ones: that is "
            "not asked here.",
            "The learning rate is one for all sizes and losses, and it rises again after the start's has fallen.",
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
        plot=_gain_by_size,
        tables=_different_starts,
        **in_common(options)
        | {
            "settings": {
                **configuration.to_dict(_continuation(config, options)),
                "start": configuration.to_dict(config),
            }
        },
    )


def run(corpus: Corpus, settings: Mapping[str, Any], seed: int, out: Path) -> Found:
    """Trains the start of a seed where it is not there, goes on from it unless it is what is asked for, and evaluates."""
    start, digest = _trained_start(corpus, seed)
    config, run_folder = corpus.base, start
    if "group_size" in settings["loss"]:
        config = _continuation(config, corpus.options)
        config = replace(config, model=replace(config.model, pretrained=str(start)))
        # Another seed: with that of the start its very batches would come again, as groups of 256.
        run_folder = pretrained("tiny", with_settings(config, settings, seed + OTHER_SEED, out))
    found = measured(corpus, config.steps, run_folder, "templates")
    return replace(found, more={**found.more, "start": digest})


def _trained_start(corpus: Corpus, seed: int) -> tuple[Path, str]:
    """Returns the run that others of a seed go on from, and its weights' SHA-256. All may ask for it at once: one trains it.

    A run that is there is checked as at any resume, so one of other data or settings is refused.
    """
    folder = corpus.work / "starts" / f"seed{seed}"
    with locked(folder.with_suffix(".lock"), waits=True):
        pretrained("tiny", with_settings(corpus.base, {"loss": _LOSSES["hard"]}, seed, folder))
    return folder, sha256_of(weights_path(find_checkpoint(folder)))


def _different_starts(units: Sequence[Unit]) -> Sequence[Table]:
    """Returns a table of the seeds whose arms went on from different starts, as if one had been trained elsewhere."""
    starts: dict[int, set[str]] = {}
    for unit in units:
        starts.setdefault(unit["seed"], set()).add(unit["more"]["start"])
    rows = [[str(seed), str(len(found))] for seed, found in sorted(starts.items()) if len(found) > 1]
    if not rows:
        return ()
    text = "Starts of one seed that differ in their weights: differences of these seeds are not of the loss alone."
    return (Table(title="Different starts", text=text, header=("seed", "starts"), rows=rows),)


def _continuation(config: PretrainConfig, options: Options) -> PretrainConfig:
    """Returns the settings of what goes on from a start."""
    pairs, steps = _pairs_and_steps(options)
    optim = replace(config.optim, lr=LEARNING_RATE)
    return replace(config, global_batch_size=pairs, steps=steps, optim=optim, log_every_steps=3)


def _pairs_and_steps(options: Options) -> tuple[int, int]:
    return (64, 2) if options.quick else (PAIRS, STEPS_FROM_START)


def _gain_by_size(units: Sequence[Unit]) -> Plot | None:
    """Returns what Object-IoU has more than hard labels, seed by seed, which differ more than losses do."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for unit in units:
        loss = unit["settings"]["loss"]
        if "group_size" in loss:
            of_loss = found.setdefault(loss["group_size"], {}).setdefault(loss["name"], {})
            of_loss[unit["seed"]] = unit["values"]["top1"]
    hard, soft = (loss["name"] for loss in _LOSSES.values())
    points = []
    for size, by_loss in sorted(found.items()):
        of_hard, of_soft = by_loss.get(hard, {}), by_loss.get(soft, {})
        gains = [of_soft[seed] - of_hard[seed] for seed in of_hard if seed in of_soft]
        if gains:
            points.append([size, statistics.fmean(gains), statistics.stdev(gains) if len(gains) > 1 else 0.0])
    if not points:
        return None
    return Plot(
        title="Zero-shot top-1 of Object-IoU less that of hard labels, mean ± standard deviation over seeds",
        x_label="pairs contrasted with each other",
        y_label="points",
        series={"Object-IoU less hard": points},
        log_x=True,
    )
