"""Fine-tunes a pretrained model for retrieval: frozen or learning towers, and a head that makes sets of embeddings.

    python -m finetune.run --head slot --model runs/photos --data data/photos --hold-out 1000 --out runs/ft
    python -m finetune.run photos --head dhset                    # a recipe's values are the defaults of the flags
    python -m finetune.run photos --head slot --seeds 3           # mean and standard deviation of three runs
    python -m finetune.run dhset-cub-swin224-bert                 # a paper's row: python -m finetune.recipes lists them
    torchrun --nproc-per-node 8 -m finetune.run --head slot --dataset coco --ranks 8

The checkpoint is chosen on validation data, never on test data. The run folder holds config.yaml, metrics.jsonl, checkpoints/ and
results.json; `python -m eval_suite.retrieval --checkpoint RUN` (and embed, index, diagnostics) take the chosen checkpoint.

Asked to stop (SIGTERM or SIGUSR1 on any rank), all ranks save at the same step and the command exits with status 75;
--resume True goes on. docs/finetuning.md tells the rest.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from eval_suite.results import RUN_RESULTS_NAME, Results, markdown_table
from finetune.config import FinetuneConfig
from finetune.data import Parts, open_parts
from finetune.evaluate import results_of, results_path
from finetune.features import PartInputs
from finetune.recipes import RECIPES, ROWS
from finetune.recipes.comparison import write_comparison
from finetune.towers import check_towers, towers_of
from finetune.training import Run, Start, Training, check_ended, check_ranks, course_of, start_of
from pretrain.bad_steps import NAME, RollBack
from pretrain.resume import TrainState
from pretrain.stopping import StopRequest, run_to_its_end
from pretrain.trackers import check_trackers
from setclip import config as configuration
from setclip import distributed
from setclip.checkpoint import (
    checkpoints_of,
    find_checkpoint,
    read_description,
    weights_path,
)
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import remove, write_json
from setclip.log import say, warn
from setclip.lookup import look_up
from setclip.models.backbones import make_backbone
from setclip.models.clip import load_weights
from setclip.models.heads import HEADS
from setclip.models.set_model import SetModel

_SAME = ("split", "images", "captions_sha256")  # of the data of results over which there is a mean


def finetune(recipe: str, config: FinetuneConfig, kept: dict[str, PartInputs] | None = None) -> Path:
    """Runs the fine-tuning, once or with each of several seeds; returns the run folder. All ranks call.

    `kept`: inputs of "train", "val" and "test" with features of frozen towers, to share with other runs on the same towers and
    data; what is missing is made and put in.

    Raises InputError where something does not fit, Stopped when it was asked to stop and has saved, and FloatingPointError where
    going back did not help against losses or gradients that are not finite.
    """
    look_up(HEADS, config.head, "head")
    config.head_settings()
    check_towers(config)
    check_trackers(config.log)
    check_ranks(config.ranks, distributed.read_environment()[1])
    world = distributed.start(config.device, timeout_minutes=max(10.0, 1.5 * config.guard.hang_minutes))
    out = config.out or Path("runs") / f"{recipe}-{config.head}"
    _check_folder(out, config)
    parts = open_parts(config)
    begin = towers_of(config, parts)
    source = begin.source
    # what does not fit is told before anything is done
    checked = SetModel(make_backbone(begin.backbone), config.head_settings())
    counts = {"towers": 0, "heads": 0}
    for name, parameter in checked.named_parameters():
        counts["towers" if name.startswith("backbone.") else "heads"] += parameter.numel()
    sizes = ", ".join(f"{what} {count / 1e6:.2f} M" for what, count in counts.items())
    say(f"recipe {recipe}, head {config.head} ({sizes}), on {source.identity.get('where')}")
    _announce(config, parts, world)
    if world.rank == 0 and config.overwrite:
        remove(out)
    distributed.broadcast(None)
    kept = {} if kept is None else kept
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        folder = out if config.seeds == 1 else out / f"seed-{seed}"
        own = replace(config, seed=seed, seeds=1, out=folder)
        run = Run(recipe, own, folder, parts, source, begin.backbone, begin.weights, kept)
        if config.seeds > 1 and config.resume and _is_done(run):
            say(f"seed {seed} is done: {folder / RUN_RESULTS_NAME}")
        else:
            if config.seeds > 1:
                say(f"\nseed {seed}:")
            _one(run, world)
        results.append(folder)
    if world.rank == 0 and config.seeds > 1:
        write_json(out / RUN_RESULTS_NAME, over_seeds(results))
        say(seeds_text(json.loads((out / RUN_RESULTS_NAME).read_text(encoding="utf-8"))))
        if recipe in ROWS:
            say(f"\n{write_comparison(out, recipe)}")
    distributed.broadcast(None)
    return out


def _one(run: Run, world: World) -> None:
    """Trains with one seed, and writes the results of the checkpoint that validation chose."""
    config = run.config
    start = start_of(run, world) if config.resume else _anew(run)  # raises before anything of another run is changed
    if world.rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        configuration.save(run.out / configuration.CONFIG_NAME, replace(config, resume=False, overwrite=False))
        remove(run.out / RUN_RESULTS_NAME)  # which say that it has ended
    distributed.broadcast(None)
    with StopRequest() as request:
        training = _trained(run, start, world, request)
    _report(run, training, world)


def _trained(run: Run, start: Start, world: World, request: StopRequest) -> Training:
    guard = run.config.guard
    for attempt in range(guard.rollbacks + 1):
        training = Training(run, start, world, request)
        try:
            training.run()
        except RollBack as bad:
            if attempt == guard.rollbacks:
                raise FloatingPointError(
                    f"{bad}, and --guard.rollbacks {guard.rollbacks} allows no further return to a checkpoint. Their samples are "
                    f"in {run.out / NAME}; look at them, or lower --optim.lr in a new run"
                ) from bad
            start = start_of(run, world, bad.steps)
            warn(f"{bad}; going back to {start.folder or 'the beginning'} and leaving their batches out")
        else:
            return training
    raise AssertionError("a run ends or raises")


def _is_done(run: Run) -> bool:
    """Whether the run folder has results of the data that are asked for. Raises InputError where they are of another run."""
    path = run.out / RUN_RESULTS_NAME
    if not path.exists():
        return False
    check_ended(run)
    told, part = Results.load(path).dataset, run.parts.test or run.parts.val
    return (told["split"], told["captions_sha256"]) == (part.split, part.data.captions_sha256)


def _anew(run: Run) -> Start:
    return Start(TrainState(0, 0, {}, course_of(run), applied_steps=0, left_out=()))


def _report(run: Run, training: Training, world: World) -> None:
    """Evaluates the chosen checkpoint on validation and test data, and writes the results. Collective."""
    chosen = find_checkpoint(run.out)
    model = training.model
    load_weights(model, load_file(weights_path(chosen)), str(chosen))
    identity = {"where": str(chosen), **read_description(chosen)}
    tables: list[Results] = []
    for name in ("val", "test"):
        part = getattr(run.parts, name)
        if part is None:
            continue
        inputs = training.inputs_of(name)
        for inference in model.inferences:
            found = results_of(model, inputs, run.source, world, inference, identity, configuration.to_dict(run.config))
            is_main = inference == model.inference
            if world.rank == 0:
                found.save(results_path(run.out, part.split, inference, is_main))
            if is_main:
                tables.append(found)
    if world.rank == 0:
        tables[-1].save(run.out / RUN_RESULTS_NAME)  # of the test data, where there are some; its presence means "done"
    for found in tables:
        say(f"\n{markdown_table([found])}".rstrip())
    if world.rank == 0 and run.recipe in ROWS:
        say(f"\n{write_comparison(run.out, run.recipe)}")
    validation = identity["validation"]
    say(f"\nchosen: step {validation['step']:,}, by rsum {validation['value']:.2f} on {run.parts.val.split}")
    say(f"results: {run.out / RUN_RESULTS_NAME}\ncheckpoint: {chosen}")


def _check_folder(out: Path, config: FinetuneConfig) -> None:
    """Raises InputError where a run cannot begin in the folder `out`, or go on in it where that is asked for."""
    if not config.resume and not config.overwrite and out.exists() and any(out.iterdir()):
        raise InputError(
            f"expected a new or empty run folder, found {out} with {len(checkpoints_of(out))} checkpoints; continue it with "
            "--resume True, remove it with --overwrite True, or give another --out"
        )


def _announce(config: FinetuneConfig, parts: Parts, world: World) -> None:
    for what, part in (("train", parts.train), ("validation", parts.val), ("test", parts.test)):
        if part is not None:
            say(
                f"{what}: {part.place}, {part.split}: {len(part):,} pictures, {sum(map(len, part.data.captions)):,} captions"
            )
    frozen = {
        (True, True): "both towers", (True, False): "the image tower", (False, True): "the text tower",
        (False, False): "no tower",
    }  # fmt: skip
    until = f" until epoch {config.backbone.unfreeze_epoch:g}" if config.backbone.unfreeze_epoch is not None else ""
    terms = ", ".join(f"{weighted.weight:g} {name}" for name, weighted in config.terms().items())
    say(
        f"{frozen[config.backbone.frozen_at(0.0)]} frozen{until}; loss {terms}; {world.size} rank(s), {config.batch_size} "
        f"pictures × {config.captions_per_image} captions a step, {config.epochs:g} epochs, {config.precision}, {world.device}"
    )


# --- several seeds


def over_seeds(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns mean and standard deviation (n − 1) of the results of runs that differ in the seed alone.

    Raises InputError where they are of different data.
    """
    found = [Results.load(folder / RUN_RESULTS_NAME) for folder in folders]
    first = found[0]
    for folder, result in zip(folders, found, strict=True):
        differing = [name for name in _SAME if result.dataset.get(name) != first.dataset.get(name)]
        if differing:
            told = "; ".join(
                f"{name} {first.dataset.get(name)!r} and {result.dataset.get(name)!r}" for name in differing
            )
            raise InputError(
                f"expected results of one split of the same data in {folders[0]} and {folder}, found {told}; fine-tune all seeds "
                "on the same data, in a folder of their own"
            )
    metrics = {}
    for name in first.metrics:
        values = [result.metrics[name].value for result in found]
        metrics[name] = {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values),
            "values": values,
        }
    return {
        "evaluation": "retrieval over seeds",
        "runs": [str(folder) for folder in folders],
        "head": first.checkpoint.get("head"),
        "dataset": first.dataset,
        "is_partial": any(result.is_partial for result in found),
        "config": first.config,
        "headline": first.headline,
        "metrics": metrics,
    }


def seeds_text(content: dict[str, Any]) -> str:
    """Returns a Markdown table of `over_seeds`."""
    names = content["headline"]
    cells = [f"{content['metrics'][n]['mean']:.1f} ± {content['metrics'][n]['standard_deviation']:.1f}" for n in names]
    dataset = content["dataset"]
    title = f"{dataset['name']} {dataset['split']}, {len(content['runs'])} seeds, mean ± standard deviation"
    return (
        f"**{title}**\n\n| head | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}\n"
        f"| {content['head']} | {' | '.join(cells)} |"
    )


def main() -> None:
    """The command."""
    args = sys.argv[1:]
    if args and args[0].startswith("--") and args[0] != "--help":
        args = ["plain", *args]
    head = configuration.flags_of(args[1:]).get("head")
    recipes = {name: lambda recipe=recipe: recipe(head) for name, recipe in RECIPES.items()}
    name, config = configuration.parse_recipe(recipes, args, __doc__ or "")
    run_to_its_end(lambda: finetune(name, config))


if __name__ == "__main__":
    configuration.command(main)
