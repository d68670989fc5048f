"""Pretrains a CLIP model on shards.

    python -m pretrain.run tiny --data.shards data/scenes --out runs/tiny
    torchrun --nproc-per-node 8 -m pretrain.run cc12m --loss.beta 0.3
    srun python -m pretrain.run cc12m --resume True

The first argument names a recipe; its values are the defaults of the flags (RECIPE --help). --config FILE.yaml gives
values between the two. The run folder holds config.yaml, metrics.jsonl and checkpoints/.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.config import RECIPES, PretrainConfig, local_batch_size
from pretrain.data_order import DataOrder, automatic_block_size
from pretrain.engine import Engine
from pretrain.evaluate import Evaluator
from pretrain.loader import Loader, SamplePipeline, automatic_workers, to_device
from pretrain.losses import BatchSets, Moment, ObjectWeights, contrastive_loss, prepare_targets
from pretrain.optim import learning_rate
from pretrain.progress import RunLog
from pretrain.resume import TrainState, read_state, write_state
from pretrain.side_stream import SideStream
from pretrain.state import gather_moments, gather_weights, restore
from setclip import config as configuration
from setclip import distributed
from setclip.checkpoint import checkpoint_name, checkpoints_of, load_initial_weights, save_checkpoint
from setclip.datasets import locate
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import remove
from setclip.hashing import hash_u64
from setclip.images import MEAN, STD, Augment, normalize
from setclip.log import duration, say
from setclip.manifest import Manifest, check_shards
from setclip.models.clip import (
    build_clip,
    fit_bias,
    image_size_of,
    load_weights,
    model_config,
    tokenizer_for,
    with_bias,
)
from setclip.objects import ObjectTable, read_objects
from setclip.provenance import describe
from setclip.shards import Shard, ShardInfo

_DROPOUT, _TARGETS = 3, 4  # keep the draws of a step apart from each other and from those of the data
_PARSED_BY = {"pos": "data_prep.parse", "llm": "data_prep.parse_llm"}


@dataclass(frozen=True)
class Plan:
    """A run's arithmetic and data, checked before anything is built."""

    out: Path
    folder: Path
    manifest: Manifest
    shards: list[ShardInfo]
    order: DataOrder
    local_batch_size: int
    total_steps: int
    model_cfg: dict[str, Any]
    parser: str | None
    """Whose objects are read; None where the shards have none and the loss needs none"""
    object_table: ObjectTable | None
    """What object weights are made from; None where the loss uses none"""
    resume_from: Path | None

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.total_steps * self.local_batch_size * distributed.world_size()


def make_plan(recipe: str, config: PretrainConfig, world: World) -> Plan:
    """Checks configuration, data and run folder; takes a second or so. Raises InputError."""
    if config.data.shards is None and config.dataset is None:
        raise InputError("expected shards to train on (--data.shards DIR), found none; `data_prep.run` makes them")
    folder = config.data.shards or locate(str(config.dataset))
    manifest = Manifest.load(folder)
    shards = manifest.of_split(config.data.split)
    check_shards(folder, shards)
    target = config.loss.find_target()
    is_parsed = config.objects in manifest.parsers
    if target.similarity is not None and not is_parsed:
        raise InputError(
            f"the loss {config.loss.full_name} needs parsed objects: expected those of {config.objects!r} in {folder}, found "
            f"{sorted(manifest.parsers) or 'none'}; make them with `python -m {_PARSED_BY[config.objects]} {folder}`, choose "
            "others with --objects, or a loss without objects: --loss.name hard"
        )
    is_weighted = config.loss.weights == "frequency" and "weights" in target.uses
    object_table = read_objects(folder, config.objects) if is_weighted else None
    sizes = tuple(shard.samples for shard in shards)
    block_size = config.data.block_size or automatic_block_size(sum(sizes), config.data.num_lanes)
    order = DataOrder(sizes, config.seed, config.data.num_lanes, block_size, config.data.window_blocks)
    out = config.out or Path("runs") / recipe
    found = checkpoints_of(out)
    if config.resume and not found:
        raise InputError(
            f"expected a checkpoint to resume from under {out}/checkpoints, found none; leave out --resume"
        )
    if not config.resume and not config.overwrite and out.exists() and any(out.iterdir()):
        raise InputError(
            f"expected a new or empty run folder, found {out} with {len(found)} checkpoints; continue it with "
            "--resume True, remove it with --overwrite True, or give another --out"
        )
    return Plan(
        out,
        folder,
        manifest,
        shards,
        order,
        local_batch_size(config.global_batch_size, world.size, config.engine.accumulation),
        config.total_steps(order.num_samples),
        with_bias(model_config(config.model.name), config.loss.name == "siglip"),
        config.objects if is_parsed else None,
        object_table,
        found[-1] if config.resume else None,
    )


def train(recipe: str, config: PretrainConfig) -> Path:
    """Runs the training; returns the last checkpoint's folder. All ranks call."""
    world = distributed.start(config.engine.device)
    plan = make_plan(recipe, config, world)
    course = _course(config, plan)
    if plan.resume_from:
        state, weights, moments = read_state(plan.resume_from, course)
    else:
        state, weights, moments = TrainState(0, 0, {}, course), None, {}

    torch.manual_seed(config.seed)  # the same first weights on every rank
    model = build_clip(plan.model_cfg)
    if weights is not None:
        load_weights(model, weights, str(plan.resume_from))
    elif (start := config.model.pretrained) is not None:
        initial, remark = fit_bias(load_initial_weights(start, config.model.name), model, start)
        load_weights(model, initial, start)
        if remark:
            say(f"note: {remark}")
        scale, cap = float(initial["logit_scale"].exp()), config.optim.max_logit_scale
        if scale > 1.0001 * cap:
            say(f"note: the scale {scale:g} of {start} is capped at {cap:g} (--optim.max-logit-scale)")
    _announce(recipe, config, plan, model, state, world)
    engine = Engine(model, config.engine, config.optim, plan.local_batch_size, world)
    if weights is not None:
        restore(engine, weights, moments, state.step)

    pipeline = SamplePipeline(
        [Shard(plan.folder / shard.name) for shard in plan.shards],
        Augment(config.data.augment, image_size_of(model)),
        tokenizer_for(plan.model_cfg),
        plan.parser,
        config.seed,
    )
    workers = automatic_workers(world.size) if config.data.workers is None else config.data.workers
    loader = Loader(
        plan.order,
        pipeline,
        plan.local_batch_size,
        world.rank,
        world.size,
        workers,
        state.samples_seen,
        state.skipped,
        config.data.max_bad,
    )
    evaluator = Evaluator(config.eval, plan.model_cfg, world.device)
    if world.rank == 0:
        _prepare_folder(plan, config)
    log = RunLog(plan.out / "metrics.jsonl", plan.total_samples, state.samples_seen, state.step)
    distributed.broadcast(None)  # the other ranks wait for the folder

    table = plan.object_table
    object_weights = None if table is None else ObjectWeights.of(table).to(world.device)
    beside = SideStream(world.device)
    logged = ["loss", "kl", "true_pair_mass", *(["similar_pairs", "equal_pairs"] if plan.parser else [])]

    # The loop.
    step, samples_seen = state.step, state.samples_seen
    checkpoint = plan.resume_from
    batches = iter(loader)
    engine.train()
    while step < plan.total_steps:
        with log.timed("data"):
            batch = next(batches)
        with log.timed("step"):
            torch.manual_seed(_draw(_DROPOUT, config.seed, step, world.rank))  # dropout resumes exactly
            data = to_device(batch, world.device)
            images = normalize(data["images"], MEAN, STD)
            sets = BatchSets(data["image_objects"], data["text_objects"], data["text_ids"])
            beside.begin()
            features = engine.forward(images, data["tokens"])
            prepared = beside.run(partial(prepare_targets, sets, config.loss, object_weights))
            output = contrastive_loss(
                features.images,
                features.texts,
                features.logit_scale,
                sets,
                config.loss,
                logit_bias=features.logit_bias,
                moment=Moment(samples_seen / plan.total_samples, _draw(_TARGETS, config.seed, step)),
                prepared=prepared,
            )
            lr = learning_rate(config.optim, samples_seen, plan.total_samples)
            grad_norm = engine.step(output.loss, lr)
            step += 1
            samples_seen += config.global_batch_size
            means = distributed.mean_over_ranks(torch.stack([getattr(output, name) for name in logged])).tolist()
        figures = dict(zip(logged, means, strict=True))
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"loss {figures['loss']} at step {step}, samples {batch.keys[:3]}…; lower --optim.lr and resume"
            )
        if batch.skips:
            log.skipped(world.rank, step, batch.skips)
        log.add(config.global_batch_size, **figures, grad_norm=grad_norm)

        last = step == plan.total_steps
        if step % config.log_every_steps == 0 or last:
            bad = sum(distributed.gather_objects(sum(loader.skipped.values())))
            log.line(
                step=step,
                samples_seen=samples_seen,
                epoch=samples_seen / plan.order.num_samples,
                lr=lr,
                logit_scale=float(features.logit_scale.detach()),
                **({} if features.logit_bias is None else {"logit_bias": float(features.logit_bias.detach())}),
                bad_samples=bad,
            )
        if evaluator.wanted(step, last):
            found = evaluator(gather_weights(engine), world)
            log.write({"step": step, "samples_seen": samples_seen, **found})
            if found:
                log.meter.print_above("  ".join([f"step {step:>7,}", *(f"{k} {v:.3f}" for k, v in found.items())]))
        if step % config.save_every_steps == 0 or last:
            state = TrainState(step, samples_seen, _all_skips(loader), course)
            checkpoint = _save(plan, config, engine, state, recipe, world)
    log.close()
    engine.close()
    say(f"checkpoint: {checkpoint}")
    assert checkpoint is not None
    return checkpoint


def _draw(*words: int) -> int:
    """Returns a seed, 63 bits, that depends on the words only."""
    return int(hash_u64(*words) >> 1)


def _course(config: PretrainConfig, plan: Plan) -> dict[str, Any]:
    """Returns the settings that fix the course of a run; the others (ranks, micro-batches, logging, …) are free."""
    tree = configuration.to_dict(config)
    return {
        "model": plan.model_cfg,
        "data": plan.manifest.identity()["digest"],
        "split": config.data.split,
        "objects": config.objects,
        "augment": tree["data"]["augment"],
        "num_lanes": plan.order.num_lanes,
        "block_size": plan.order.block_size,
        "window_blocks": plan.order.window_blocks,
        "loss": tree["loss"],
        "optim": tree["optim"],
        "global_batch_size": config.global_batch_size,
        "total_steps": plan.total_steps,
        "seed": config.seed,
    }


def _announce(
    recipe: str, config: PretrainConfig, plan: Plan, model: torch.nn.Module, state: TrainState, world: World
) -> None:
    counts = {"image tower": 0, "text tower": 0}
    for name, parameter in model.named_parameters():
        counts["image tower" if name.startswith("visual.") else "text tower"] += parameter.numel()
    present, listed = plan.manifest.pairs_present, plan.manifest.pairs_listed
    number = config.engine.accumulation
    cut = f"{plan.local_batch_size}" if number == 1 else f"{number} × {plan.local_batch_size // number}"
    say(f"recipe {recipe}, model {config.model.name} ({', '.join(f'{k} {v / 1e6:.2f} M' for k, v in counts.items())})")
    say(
        f"data {plan.folder}, split {config.data.split!r}: {plan.order.num_samples:,} samples in {len(plan.shards)} shards; "
        f"{present:,} of {listed:,} pairs present"
    )
    say(
        f"loss {config.loss.full_name}, {world.size} rank(s) × {cut} = {config.global_batch_size} pairs a step, "
        f"{plan.total_steps:,} steps = "
        f"{plan.total_samples:,} samples = {plan.total_samples / plan.order.num_samples:.2f} epochs"
    )
    say(
        f"engine DeepSpeed, ZeRO {config.engine.zero_stage}, {config.engine.precision}, {world.device}; run folder {plan.out}"
    )
    for name, value in config.loss.ignored().items():
        say(f"note: --loss.{name.replace('_', '-')} {value} is not used by {config.loss.full_name}")
    if plan.parser is None:
        say(f"note: the shards have no objects of {config.objects!r}: similar_pairs and equal_pairs are not logged")
    has_bias = model_config(config.model.name).get("init_logit_bias") is not None
    if has_bias and "init_logit_bias" not in plan.model_cfg:
        say(f"note: {config.model.name} is built without its logit_bias: only siglip has a use for it")
    has_batch_norm = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if has_batch_norm and world.size * number > 1:
        say(
            f"note: the model has batch norm, whose statistics are those of {plan.local_batch_size // number} pairs at a time: "
            "results depend on the number of ranks and on --engine.accumulation"
        )
    if state.step:
        say(f"resuming {plan.resume_from} at step {state.step:,}, {state.samples_seen:,} samples seen")


def _prepare_folder(plan: Plan, config: PretrainConfig) -> None:
    if config.overwrite:
        remove(plan.out)
    plan.out.mkdir(parents=True, exist_ok=True)
    # What a resume would be given: the same settings, without the word that removes the run.
    configuration.save(plan.out / "config.yaml", replace(config, out=plan.out, overwrite=False, resume=False))


def _all_skips(loader: Loader) -> dict[int, int]:
    """Returns lane → skips over all ranks (each lane belongs to one rank)."""
    return {lane: n for part in distributed.gather_objects(dict(loader.skipped)) for lane, n in part.items() if n}


def _save(plan: Plan, config: PretrainConfig, engine: Engine, state: TrainState, recipe: str, world: World) -> Path:
    """Writes a checkpoint and removes old ones; returns its folder. Collective."""
    weights, moments = gather_weights(engine), gather_moments(engine, state.step)
    folder = plan.out / "checkpoints" / checkpoint_name(state.step)
    if world.rank == 0:
        description = {
            "recipe": recipe,
            "model": config.model.name,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "epoch": state.samples_seen / plan.order.num_samples,
            "loss": configuration.to_dict(config.loss),
            "data": plan.manifest.identity(),
            "provenance": describe(),
        }
        save_checkpoint(folder, weights, plan.model_cfg, description, lambda place: write_state(place, state, moments))
        for old in checkpoints_of(plan.out)[: -config.keep_checkpoints]:
            remove(old)
    distributed.broadcast(None)  # the others wait until it is there
    return folder


def main() -> None:
    """The command."""
    name, config = configuration.parse_recipe(RECIPES, description=__doc__ or "")
    start = time.monotonic()
    try:
        train(name, config)
    finally:
        distributed.stop()
    say(f"done in {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    configuration.command(main)
