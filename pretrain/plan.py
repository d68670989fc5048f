"""A run's arithmetic and data, checked in a second or so before anything is built. Used by the loop."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.blocks import Blocks
from pretrain.config import PretrainConfig, local_batch_size
from pretrain.data_order import DataOrder, automatic_block_size
from pretrain.loader import SamplePipeline
from pretrain.resume import TrainState
from pretrain.sources import Sources, open_sources
from pretrain.text_domains import TextDomains, make_text_domains
from setclip import config as configuration
from setclip import distributed
from setclip.checkpoint import checkpoints_of
from setclip.datasets import locate
from setclip.distributed import World
from setclip.errors import InputError
from setclip.images import Augment
from setclip.log import say
from setclip.manifest import Manifest
from setclip.models.clip import model_config, tokenizer_for, with_bias
from setclip.objects import ObjectTable
from setclip.remote import Patience
from setclip.shards import ShardInfo

_PARSED_BY = {"pos": "data_prep.parse", "llm": "data_prep.parse_llm"}


@dataclass(frozen=True)
class Plan:
    """A run's arithmetic and data, checked before anything is built."""

    out: Path
    sources: Sources
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
    texts: TextDomains | None
    """What draws prompts and descriptions; None where all texts are captions"""

    @property
    def folder(self) -> str:
        """Where the shards are, for messages."""
        return self.sources.name

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.total_steps * self.local_batch_size * distributed.world_size()


def make_plan(recipe: str, config: PretrainConfig, world: World, is_to_begin: bool = True) -> Plan:
    """Checks configuration, data and run folder; takes a second or so. Raises InputError.

    Not `is_to_begin`: the folder may hold anything.
    """
    sources = sources_of(config)
    folder, manifest, shards = sources.name, sources.manifest, sources.shards
    target = config.loss.find_target()
    is_parsed = config.objects in manifest.parsers
    if target.similarity is not None and not is_parsed:
        raise InputError(
            f"the loss {config.loss.full_name} needs parsed objects: expected those of {config.objects!r} in {folder}, found "
            f"{sorted(manifest.parsers) or 'none'}; make them with `python -m {_PARSED_BY[config.objects]} {folder}`, choose "
            "others with --objects, or a loss without objects: --loss.name hard"
        )
    if not config.text.is_caption_only and not is_parsed:
        raise InputError(
            f"prompts and descriptions need parsed objects: expected those of {config.objects!r} in {folder}, found "
            f"{sorted(manifest.parsers) or 'none'}; make them with `python -m {_PARSED_BY[config.objects]} {folder}`, choose "
            "others with --objects, or leave --text.prompt and --text.description at 0"
        )
    texts = make_text_domains(config.text, sources, config.objects)
    is_weighted = config.loss.weights == "frequency" and "weights" in target.uses
    object_table = sources.objects(config.objects) if is_weighted else None
    sizes = tuple(shard.samples for shard in shards)
    block_size = config.data.block_size or automatic_block_size(sum(sizes), config.data.num_lanes)
    order = DataOrder(sizes, config.seed, config.data.num_lanes, block_size, config.data.window_blocks, sources.shares)
    lanes_here = -(-order.num_lanes * ranks_on_machine(world) // world.size)
    if of_cache := sources.check_cache(lanes_here, block_size, order.window_blocks):
        say(of_cache)
    out = config.out or Path("runs") / recipe
    if is_to_begin:
        check_folder(out, config)
    return Plan(
        out,
        sources,
        manifest,
        shards,
        order,
        local_batch_size(config.global_batch_size, world.size, config.engine.accumulation, config.loss.group_size),
        config.total_steps(order.num_samples),
        with_bias(model_config(config.model.name), config.loss.name == "siglip"),
        config.objects if is_parsed else None,
        object_table,
        texts,
    )


def ranks_on_machine(world: World) -> int:
    """Returns how many ranks this machine has, as torchrun and Slurm tell it; without them all."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    number = re.match(r"\d+", told)  # "8" or "8(x2)"
    return max(1, min(world.size, int(number.group()) if number else world.size))


def check_folder(out: Path, config: PretrainConfig) -> None:
    """Raises InputError where a run cannot begin in the folder `out`, or go on in it where that is asked for."""
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


def sources_of(config: PretrainConfig) -> Sources:
    """Opens what a run is to be trained on. Raises InputError where it cannot be had."""
    data = config.data
    if not data.shards and config.dataset is None:
        raise InputError("expected shards to train on (--data.shards DIR), found none; `data_prep.run` makes them")
    return open_sources(
        data.shards or (str(locate(str(config.dataset))),),
        data.weights,
        data.split,
        data.cache,
        int(data.cache_gb * 1e9),
        Patience(tries=data.tries, stall_seconds=data.stall_seconds),
        config.objects,
    )


def open_shards(plan: Plan) -> Blocks:
    """Returns the plan's shards in the order of its data; nothing is read yet."""
    return plan.sources.open(plan.order.block_size)


def make_pipeline(config: PretrainConfig, plan: Plan, image_size: int) -> SamplePipeline:
    """Returns what makes samples of the plan's shards, with pictures of `image_size` pixels a side."""
    return SamplePipeline(
        open_shards(plan),
        Augment(config.data.augment, image_size),
        tokenizer_for(plan.model_cfg),
        plan.parser,
        config.seed,
        plan.texts,
    )


def course_of(config: PretrainConfig, plan: Plan) -> dict[str, Any]:
    """Returns the settings that fix the course of a run; the others (ranks, micro-batches, logging, …) are free."""
    tree = configuration.to_dict(config)
    ranks = config.global_batch_size // plan.local_batch_size
    return {
        "model": plan.model_cfg,
        "data": plan.manifest.identity()["digest"],
        "sources": plan.sources.course,
        "split": config.data.split,
        "objects": config.objects,
        "augment": tree["data"]["augment"],
        "num_lanes": plan.order.num_lanes,
        "block_size": plan.order.block_size,
        "window_blocks": plan.order.window_blocks,
        "text": None if plan.texts is None else plan.texts.course,
        "loss": tree["loss"],
        "optim": tree["optim"],
        "global_batch_size": config.global_batch_size,
        "total_steps": plan.total_steps,
        "ranks_of_groups": ranks if config.loss.group_size else None,  # each is of one rank's pairs
        "seed": config.seed,
        "towers": config.model.course(),
        "ema": tree["ema"],
    }


def announce(
    recipe: str, config: PretrainConfig, plan: Plan, model: torch.nn.Module, state: TrainState, world: World
) -> None:
    """Says what is going to happen, and which settings have no effect."""
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
    if (size := config.loss.group_size) is not None:
        groups = config.global_batch_size // size
        say(f"contrasted in {groups:,} group{'s' * (groups != 1)} of {size:,} pairs, each of one rank")
    say(
        f"engine DeepSpeed, ZeRO {config.engine.zero_stage}, {config.engine.precision}, {world.device}; run folder {plan.out}"
    )
    if locked := sum(p.numel() for p in model.parameters() if not p.requires_grad):
        say(f"locked: {locked / 1e6:.2f} M parameters are not trained")
    for note in (*plan.sources.notes, *(() if plan.texts is None else plan.texts.notes)):
        say(note)
    for name, value in config.text.ignored().items():
        say(f"note: --text.{name} {value} is not used with these shares of prompts and descriptions")
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
        say(f"resuming at step {state.step:,}, {state.samples_seen:,} samples seen")
