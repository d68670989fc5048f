"""How fast data and model are on this machine, measured without training: what pretrain.doctor tells.

Stages of the loader are measured one by one on one core, in CPU time, so that other work on the machine does not count;
reading also in elapsed time, for it waits. The loader as a whole, and steps, are measured in elapsed time.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch

from pretrain.config import PretrainConfig
from pretrain.data_order import DataOrder, Place
from pretrain.engine import Engine
from pretrain.loader import Batch, Loader, SamplePipeline, ids_of_texts, pad_objects, to_device
from pretrain.losses import BatchSets, LossConfig, Moment, ObjectWeights, contrastive_loss, prepare_targets
from pretrain.memory import ModelCost, estimate_memory
from pretrain.model_options import build_for_training
from pretrain.plan import Plan
from setclip import distributed
from setclip.decode import DecodeError
from setclip.distributed import World
from setclip.errors import InputError
from setclip.hashing import hash_text
from setclip.images import MEAN, STD, decode_tensor, normalize

STAGES = ("read", "decode", "augment", "tokenise and collate")

_SCHEDULED = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, times

_GROUP = 64  # samples that are collated at once, as a worker does
_STEP_SECONDS = 3.0  # a step that is measured takes no longer, or a smaller batch stands for it
_STEPS, _SECONDS = 3, 1.0  # that are measured at least, after what warms up
_MOST_STEPS = 20
_FIRST_PAIRS = 4  # of the first step, from which the time of larger ones is foreseen
_OF_MEMORY = 0.8  # that a step which is measured may need


@dataclass(frozen=True)
class StageRates:
    """The stages of loading a sample, on one core."""

    samples: int
    """That were measured"""
    bad: int
    """Further samples that could not be used"""
    seconds: dict[str, float]
    """Stage to CPU seconds a sample"""
    bytes_per_sample: float
    """That are read"""
    read_elapsed: float
    """Seconds a sample that reading took by the clock, one after the other, without waiting for a core"""


@dataclass(frozen=True)
class StepRate:
    """Steps of the real model and loss."""

    pairs: int
    """On this rank, in a step that was measured"""
    seconds: float
    """Of a step by the clock, the median"""
    core_seconds: float
    """Of a step, over all threads of this process"""
    is_whole: bool
    """Whether `pairs` is what a rank has in the run; else a smaller batch stands for it"""

    @property
    def rate(self) -> float:
        """Pairs a second on this rank."""
        return self.pairs / self.seconds


def places_of(order: DataOrder, rank: int, world_size: int) -> Iterator[Place]:
    """Yields the places of one rank's samples, in data order, without end."""
    readers = [order.lane(lane) for lane in range(rank, order.num_lanes, world_size)]
    for reader in cycle(readers):
        yield next(reader)


def measure_stages(pipeline: SamplePipeline, places: Iterator[Place], seconds: float, most: int = 1024) -> StageRates:
    """Measures each stage on the next samples, up to `most`, in about `seconds` seconds of CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's process
    try:
        return _measure_stages(pipeline, places, seconds, most)
    finally:
        torch.set_num_threads(threads)


def _measure_stages(pipeline: SamplePipeline, places: Iterator[Place], seconds: float, most: int) -> StageRates:
    clock = time.process_time
    spent = dict.fromkeys(STAGES, 0.0)
    elapsed, size, done, bad = 0.0, 0, 0, 0
    images, texts, objects = [], [], []
    ends = clock() + seconds
    for place in places:
        queued, begin, by_clock = _queued(), clock(), time.monotonic()
        key, _, image_bytes, encoded = pipeline.shards[place.shard].read_raw(place.row)
        spent["read"] += clock() - begin
        elapsed += time.monotonic() - by_clock - (_queued() - queued)
        size += len(image_bytes) + len(encoded)
        try:
            begin = clock()
            picture = decode_tensor(image_bytes, min_size=pipeline.augment.image_size)
            spent["decode"] += clock() - begin
            record = json.loads(encoded)
            caption = record["captions"][0]
        except (DecodeError, ValueError, KeyError, IndexError):
            bad += 1
            if bad > max(_GROUP, done):
                raise InputError(f"expected samples that can be used, found {bad} bad ones of {bad + done}") from None
            continue
        begin = clock()
        images.append(pipeline.augment(picture, pipeline.seed, place.epoch, hash_text(key)))
        spent["augment"] += clock() - begin
        texts.append(caption)
        objects.append(record["objects"][pipeline.parser][0] if pipeline.parser else [])
        done += 1
        if len(images) == _GROUP or done == most or clock() > ends:
            begin = clock()
            torch.stack(images)
            ids_of_texts(pipeline.tokenizer(texts))
            pad_objects(objects)
            spent["tokenise and collate"] += clock() - begin
            images, texts, objects = [], [], []
            if done >= most or clock() > ends:
                break
    read = done + bad
    return StageRates(
        done,
        bad,
        {name: value / (read if name == "read" else done) for name, value in spent.items()},
        size / read,
        elapsed / read,
    )


def _queued() -> float:
    """Returns the seconds that this thread has waited for a core, because others had them; 0 where the system does not say."""
    try:
        return int(_SCHEDULED.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def measure_loader(
    order: DataOrder, pipeline: SamplePipeline, world: World, workers: int, seconds: float
) -> tuple[float, float]:
    """Returns (samples a second by the clock, CPU seconds a sample in this process) of the whole loader on this rank.

    Of no worker the CPU time is all that loading takes, on one core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loader = Loader(order, pipeline, _GROUP, world.rank, world.size, workers)
    try:
        batches = iter(loader)
        _take(batches, min(1.0, seconds / 2) if workers else 0.0)  # until processes run and what was prefetched is gone
        begin, of_cpu = time.monotonic(), time.process_time()
        count = _take(batches, seconds)
        return count / (time.monotonic() - begin), (time.process_time() - of_cpu) / count
    finally:
        loader.close(is_to_wait=True)  # processes may be started next
        torch.set_num_threads(threads)


def _take(batches: Iterator[Batch], seconds: float) -> int:
    """Takes batches for some seconds, one at least; returns their samples."""
    begin, count = time.monotonic(), 0
    while not count or time.monotonic() - begin < seconds:
        count += len(next(batches))
    return count


def measure_steps(
    config: PretrainConfig,
    plan: Plan,
    pipeline: SamplePipeline,
    cost: ModelCost | None,
    available: int,
    world: World,
    local_batch_size: int,
) -> StepRate | None:
    """Takes real steps on real samples and measures them; None where not even a small one fits into memory. Collective.

    `local_batch_size`: of the run. Where its steps would take too long or too much memory, smaller ones stand for them; of a
    step in more than two micro-batches, one in two. A run of several ranks is measured on those that there are.
    """
    number = min(2, config.engine.accumulation)
    micro = local_batch_size // config.engine.accumulation
    engine_config = replace(config.engine, accumulation=number)

    def fits(size: int) -> bool:
        if cost is None:
            return True
        needed = estimate_memory(cost, engine_config, size * number, world.size, world.device.type).total
        return distributed.broadcast(needed <= _OF_MEMORY * available)

    group = config.loss.group_size or 1
    whole_groups = group // math.gcd(group, number)  # pairs a micro-batch, of which a step is cut into groups
    size = min(_FIRST_PAIRS, micro)
    if not fits(size):
        return None
    torch.manual_seed(config.seed)
    engine = Engine(
        build_for_training(plan.model_cfg, config.model), engine_config, config.optim, micro * number, world
    )
    engine.train()
    table = plan.object_table
    weights = None if table is None else ObjectWeights.of(table).to(world.device)
    source = iter(Loader(plan.order, pipeline, _FIRST_PAIRS, world.rank, world.size))
    batch = next(source)

    def step(size: int) -> tuple[float, float]:
        nonlocal batch
        while len(batch) < size * number:
            parts = list(islice(source, max(1, size * number // _FIRST_PAIRS)))
            batch = Batch.concatenate([batch, *parts])
        begin, of_cores = _now(world), time.process_time()
        loss = in_groups(config.loss, size * number, number)
        _step(engine, config, loss, batch.split(size * number)[0], weights, world)
        return distributed.broadcast((_now(world) - begin, time.process_time() - of_cores))

    try:
        step(size)
        taken, _ = step(size)
        while size < micro:
            grown = min(micro, 4 * size, int(size * _STEP_SECONDS / taken))
            while grown > size and not fits(grown):
                grown = (grown + size) // 2
            is_last = grown < min(micro, 4 * size)
            if grown > whole_groups:
                grown -= grown % whole_groups
            if grown <= size:
                break
            size = grown
            taken, _ = step(size)
            if is_last:
                break
        times: list[tuple[float, float]] = []
        while len(times) < _STEPS or (sum(seconds for seconds, _ in times) < _SECONDS and len(times) < _MOST_STEPS):
            times.append(step(size))
    finally:
        engine.close()
    seconds, of_cores = (median(of_kind) for of_kind in zip(*times, strict=True))
    return StepRate(size * number, seconds, of_cores, size * number == local_batch_size)


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.monotonic()


def in_groups(loss: LossConfig, pairs: int, number: int) -> LossConfig:
    """Returns the loss of a step of `pairs` in `number` micro-batches, which may be too few for the run's groups."""
    size = loss.group_size
    if size is None or pairs % size == 0:
        return loss
    return replace(loss, group_size=pairs if pairs < size else pairs // number)


def _step(
    engine: Engine,
    config: PretrainConfig,
    loss: LossConfig,
    batch: Batch,
    weights: ObjectWeights | None,
    world: World,
) -> None:
    """Takes a step as the training loop does."""
    data = to_device(batch, world.device)
    sets = BatchSets(data["image_objects"], data["text_objects"], data["text_ids"])
    features = engine.forward(normalize(data["images"], MEAN, STD), data["tokens"])
    output = contrastive_loss(
        features.images,
        features.texts,
        features.logit_scale,
        sets,
        loss,
        logit_bias=features.logit_bias,
        moment=Moment(0.5, 0),
        prepared=prepare_targets(sets, loss, weights),
    )
    engine.step(output.loss, config.optim.lr / 1000)
