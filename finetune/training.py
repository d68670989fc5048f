"""The loop of fine-tuning: batches in, steps, lines, validation, checkpoints, and what to do when something goes wrong.

accelerate wraps the model (DDP, bf16); signals, bad steps and the files of a resume are pretraining's. Used by finetune.run.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from finetune.average import Average
from finetune.config import FinetuneConfig
from finetune.data import Batch, Parts, TrainObjects, TrainOrder, same_class
from finetune.evaluate import validate
from finetune.features import (
    Inputs,
    PartInputs,
    make_inputs,
    own_places,
    own_share,
    picture_batches,
    pixels_of,
    train_pictures,
)
from finetune.losses import BatchObjects, Pairs, share_objects
from finetune.micro_batches import check_micro_batches, divided_backward
from finetune.noise import DroppedPixels, Dropping, noisy_tokens, without_some, word_draws
from finetune.optim import parameter_groups
from finetune.state import moments_of, preprocess_of, restore_moments, write_set_model
from finetune.step import StepBatch, StepModule, loss_numbers, terms_of
from pretrain.bad_steps import BadSteps
from pretrain.checkpoints import checkpoint_to_resume
from pretrain.losses import Moment
from pretrain.resume import TrainState, read_average, read_state, read_train_state, write_state
from pretrain.stopping import Stopped, StopRequest
from pretrain.trackers import Tracker, open_trackers
from pretrain.watchdog import Watchdog
from setclip import config as configuration
from setclip import distributed
from setclip.checkpoint import (
    CHECKPOINTS_FOLDER,
    CHECKSUMS_NAME,
    CHOSEN_NAME,
    LoadedModel,
    checkpoint_name,
    checkpoints_of,
    read_description,
    save_checkpoint,
    weights_path,
)
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import remove, remove_partial
from setclip.hashing import hash_u64
from setclip.log import Meter, is_speaker, say, warn
from setclip.models.backbones import make_backbone
from setclip.models.clip import load_weights
from setclip.models.set_model import HeadSettings, SetModel
from setclip.models.subspaces import COLLAPSED
from setclip.provenance import describe

METRICS_NAME = "metrics.jsonl"
_DROPOUT, _TARGETS = 25, 26  # keep the draws of a step apart from those of the data


@dataclass
class Run:
    """What a run is made of, before it begins; the same for all seeds but for `out` and `config.seed`."""

    recipe: str
    config: FinetuneConfig
    out: Path
    parts: Parts
    source: LoadedModel
    """The pretrained model, whose towers the run takes, and how its pictures are prepared"""
    backbone: dict[str, Any]
    """Its description as a backbone"""
    weights: dict[str, Tensor]
    """Those of the backbone's that all seeds begin with (`finetune.towers`)"""
    kept: dict[str, PartInputs]
    """Inputs of the parts with towers as they begin, "train", "val" and "test"; made where they are first needed"""
    source_sha256: str | None = field(init=False)
    """Checksum of the pretrained model's weights as the run begins; None of what is no checkpoint folder of ours"""

    def __post_init__(self) -> None:
        path = Path(str(self.source.identity.get("where"))) / CHECKSUMS_NAME
        self.source_sha256 = None
        if path.exists():
            self.source_sha256 = json.loads(path.read_text(encoding="utf-8")).get(weights_path(path.parent).name)

    @property
    def settings(self) -> HeadSettings:
        """Of the heads."""
        return self.config.head_settings()

    def build(self) -> SetModel:
        """Returns the model as the run begins: the towers' weights, and new heads, which the seed decides."""
        torch.manual_seed(self.config.seed)
        backbone = make_backbone(self.backbone)
        load_weights(backbone, {**backbone.state_dict(), **self.weights}, "the pretrained model")
        return SetModel(backbone, self.settings)


@dataclass(frozen=True)
class Start:
    """Where a run begins: anew, or at a checkpoint."""

    state: TrainState
    folder: Path | None = None
    weights: dict[str, Tensor] | None = None
    moments: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None


def course_of(run: Run) -> dict[str, Any]:
    """Returns the settings that fix the course of a run; others (ranks, logging, caches of what does not vary) are free."""
    tree = configuration.to_dict(run.config)
    names = (
        *("split", "hold_out", "width", "batch_size", "captions_per_image", "epochs", "augment", "seed", "precision"),
        *("match", "shared_objects", "objects", "weights", "optim", "ema", "eval_every", "eval_weights"),
        *("triplet", "triplet_hybrid", "contrastive", "pcme", "mmd", "uniformity", "dhset_diversity"),
    )
    own = tree["backbone"]
    backbone = {name: own[name] for name in ("freeze", "unfreeze_epoch", "lr_factor")}
    for name in ("image_lr_factor", "text_lr_factor", "image_weights", "text_weights", "glove", "resize"):
        if own[name] not in (None, "pretrained", "own"):
            backbone[name] = own[name]
    if run.config.augment.kind != "none" and run.config.backbone.frozen_at(0.0)[0]:
        backbone["cache_gb"] = own["cache_gb"]  # pictures whose features are kept are not varied
    return {
        **{name: tree[name] for name in names},
        "model": {"backbone": _shortened(run.backbone), "head": asdict(run.settings)},
        **({"noise": tree["noise"]} if any(tree["noise"].values()) else {}),
        "towers": backbone,
        "from": run.source.identity.get("where"),
        "data": run.parts.manifest.identity()["digest"],
        "val": run.parts.val.data.captions_sha256,
    }


def _shortened(value: Any) -> Any:
    """Returns a description with digests in place of long texts: vocabularies and tokenizers."""
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in value.items()}
    if isinstance(value, str) and len(value) > 200:
        return hashlib.sha256(value.encode()).hexdigest()
    return value


def start_of(run: Run, world: World, left_out: tuple[int, ...] = ()) -> Start:
    """Returns the newest whole checkpoint of the run folder, or a start anew where there is none. Collective."""
    course = course_of(run)
    folder = checkpoint_to_resume(run.out, world)
    if folder is None:
        return Start(TrainState(0, 0, {}, course, applied_steps=0, left_out=left_out))
    _check_source(run, folder)
    state, weights, moments = read_state(folder, course)
    left_out = tuple(sorted({*left_out, *state.left_out}))
    return Start(replace(state, course=course, left_out=left_out), folder, weights, moments, read_average(folder))


def check_ended(run: Run) -> None:
    """Raises InputError where the run in the run folder, which has ended, was another one than this, naming each difference."""
    found = checkpoints_of(run.out)
    if not found:
        raise InputError(
            f"expected the last checkpoint of the run that has ended in {run.out}, which tells its settings, found none; put it "
            "back, or remove the folder"
        )
    _check_source(run, found[-1])
    read_train_state(found[-1], course_of(run))


def _check_source(run: Run, folder: Path) -> None:
    """Raises InputError where the pretrained model has other weights by now than those that a checkpoint's run began with."""
    began, now = read_description(folder).get("from", {}).get("sha256"), run.source_sha256
    if began is not None and now is not None and began != now:
        raise InputError(
            f"the run in {run.out} began with weights of {run.source.identity['where']} (SHA-256 {began[:16]}) that are others "
            f"by now ({now[:16]}): it was trained anew. Fine-tune it anew too, with --overwrite True or in another --out"
        )


def make_accelerator(config: FinetuneConfig, world: World) -> Accelerator:
    """Returns accelerate's engine. Raises InputError where it sees another number of processes than there are."""
    # A run before this one in the same process may have had another precision, or set LOCAL_RANK for DeepSpeed, which accelerate
    # takes for a launcher's (it would then set RANK).
    AcceleratorState._reset_state(True)
    if "RANK" not in os.environ:
        os.environ.pop("LOCAL_RANK", None)
    accelerator = Accelerator(
        cpu=world.device.type == "cpu",
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )
    check_ranks(config.ranks, accelerator.num_processes)
    check_ranks(world.size, accelerator.num_processes)
    return accelerator


def check_ranks(expected: int | None, found: int) -> None:
    """Raises InputError where there is another number of processes than expected."""
    if expected is not None and expected != found:
        raise InputError(
            f"expected {expected} processes, found {found}; start them with `torchrun --nproc-per-node {expected} -m "
            "finetune.run …` (`accelerate launch --cpu` starts one whatever it is told), or correct --ranks"
        )


class Training:
    """A run from one start on. All ranks make one and call `run`."""

    def __init__(self, run: Run, start: Start, world: World, request: StopRequest):
        config, self.source = run.config, run.source
        self.spec, self.config, self.world, self.request = run, config, world, request
        self.accelerator = make_accelerator(config, world)
        state = start.state
        self.step, self.applied_steps, self.left_out, self.course = (
            state.step,
            state.applied_steps,
            state.left_out,
            state.course,
        )
        self.order = TrainOrder(run.parts.train, config.batch_size, config.captions_per_image, config.seed, world.size)
        self.total_steps = max(1, round(config.epochs * self.order.steps_per_epoch))
        self.eval_steps = max(1, round(config.eval_every * self.order.steps_per_epoch))
        self.objects = self._objects()
        self.terms = terms_of(config)
        self.model = run.build().to(world.device)
        check_micro_batches(config.accumulate, config.batch_size // world.size, self.model)
        self.numbers = loss_numbers(self.terms).to(world.device)
        self.others = dict(self.numbers.items())
        if start.weights is not None:
            load_weights(self.model, start.weights, str(start.folder))
        self.names = {**dict(self.model.named_parameters()), **self.others}
        self._learned = {name for name, p in self.names.items() if p.requires_grad}
        groups = parameter_groups(self.model, self.others, config.optim, config.backbone.lr_factors())
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True
        )
        if start.moments is not None:
            restore_moments(self.optimizer, self.names, self.others, start.moments)
        self.frozen = (False, False)
        self._enter_stage()
        self.average = Average(config.ema, self.model) if config.ema.decay else None
        if self.average is not None and start.average is not None:
            self.average.restore(start.average)
        self.inputs: dict[str, PartInputs] = {}
        self.metrics = run.out / METRICS_NAME
        self.bad_steps = BadSteps(config.guard, run.out)
        self.best = self._best_so_far()
        self._told_of_collapse = False
        self._sums: dict[str, float] = {}
        self._count = 0
        self._last_save = time.monotonic()
        self._begun = time.monotonic()
        if world.rank == 0:
            remove_partial(run.out / CHECKPOINTS_FOLDER)
            _keep_until(self.metrics, self.step)
        self.validations: list[float] = distributed.broadcast(_validations_in(self.metrics) if world.rank == 0 else [])
        self.watchdog: Watchdog | None = None
        self.trackers: list[Tracker] = []

    # --- the loop

    def run(self) -> Path:
        """Trains to the end; returns the folder of the chosen checkpoint.

        Raises Stopped when asked to stop and saved, and RollBack, on all ranks at the same step.
        """
        self._prepare_inputs()
        meter = Meter(
            self.total_steps * self.config.batch_size, "fine-tuning", "pictures", self.step * self.config.batch_size
        )
        if self.world.rank == 0:
            self.trackers = open_trackers(self.config.log, self.spec.out, self.step, configuration.to_dict(self.config))
        self.watchdog = Watchdog(self.spec.out, self.world, 60 * self.config.guard.hang_minutes)
        try:
            pictures = self._pictures()
            while self.step < self.total_steps:
                self._at("reading data")
                if self._stage_ends():
                    self._enter_stage()
                    self._prepare_inputs()
                    pictures = self._pictures()
                batch = self.order.batch(self.step)
                inputs = self._inputs_of(batch, pictures)
                if self.step + 1 in self.left_out:
                    self.step += 1
                    say(f"step {self.step:,} is left out: its loss or gradient was not finite before")
                    continue
                asked, is_time = self._train_on(batch, inputs)
                meter.update(self.config.batch_size)
                self._look_around(meter, asked, is_time)
        finally:
            meter.close()
            self.watchdog.close()
            for tracker in self.trackers:
                tracker.close()
        return self.spec.out / CHECKPOINTS_FOLDER / CHOSEN_NAME

    def _at(self, work: str) -> None:
        """Tells the watchdog what begins."""
        if self.watchdog is not None:
            self.watchdog.at(self.step + 1, work)

    def _train_on(self, batch: Batch, inputs: tuple[Inputs | DroppedPixels, Inputs]) -> tuple[bool, bool]:
        """Takes a step; returns whether a rank was asked to stop, and whether it is time for a checkpoint."""
        config, epoch = self.config, self.step / self.order.steps_per_epoch
        self._at("stepping")
        torch.manual_seed(
            int(hash_u64(_DROPOUT, config.seed, self.step, self.world.rank) >> 1)
        )  # dropout resumes exactly
        self._set_mode()
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        rate = config.optim.rate(
            self.step * config.batch_size, self.total_steps * config.batch_size, epoch, self.validations
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        known = self._known(batch, epoch)
        if config.accumulate > 1:
            loss, parts = divided_backward(
                self.module, self.wrapped, self.accelerator, *inputs, known, config.accumulate
            )
        else:
            loss, parts = self.wrapped(*inputs, known)
            # an infinite loss may have a finite gradient; as NaN it reaches every rank
            self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        learning = [p for p in self.names.values() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(learning, config.optim.clip_grad_norm or math.inf))
        is_finite = math.isfinite(norm)
        if is_finite:
            self.optimizer.step()
        else:
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        minutes = config.save_every_minutes
        is_time = self.world.rank == 0 and bool(minutes) and time.monotonic() - self._last_save >= 60 * minutes
        wants = torch.tensor([float(self.request.signal is not None), float(is_time)], device=self.world.device)
        asked, is_time = (bool(value > 0) for value in distributed.mean_over_ranks(wants).tolist())
        if is_finite:
            self.applied_steps += 1
            if self.average is not None:
                self.average.update(self.applied_steps)
            self._add(loss=float(loss.detach()), grad_norm=norm, **{f"loss_{k}": float(v) for k, v in parts.items()})
        else:
            keys = batch.keys(self.spec.parts.train, own_share(batch, self.world))
            self.bad_steps.add(self.step, float(loss.detach()), norm, keys)
        self._rate = rate
        return asked, is_time

    def _look_around(self, meter: Meter, asked: bool, is_time: bool) -> None:
        """Logs, validates and saves where it is time; ends the run where it is asked to. Collective."""
        is_last = self.step == self.total_steps
        self._at("logging")
        if self.step % self.config.log_every_steps == 0 or is_last or asked:
            self._line(meter)
        is_evaluated = self.step % self.eval_steps == 0 or is_last
        if is_evaluated:
            self._at("evaluating")
            self._validate(meter)
        if is_evaluated or is_time or asked:
            self._at("saving")
            folder = self._save()
            if asked and not is_last:
                name = next(filter(None, distributed.gather_objects(self.request.signal)))
                raise Stopped(f"{name}: saved at step {self.step:,} ({folder}); --resume True goes on")

    # --- what a step is given

    def _known(self, batch: Batch, epoch: float) -> StepBatch:
        """Returns what is known of a batch of all ranks."""
        config, device = self.config, self.world.device
        excluded = None
        if config.match != "instance":
            excluded = same_class(self.spec.parts.train, batch)
            if excluded is None and config.match == "class":
                raise InputError(
                    "expected pictures with classes (class_id, as CUB's have) for --match class, found some without; take "
                    "instance"
                )
        objects = None
        if self.objects is not None:
            of_images, of_texts = (ids.to(device) for ids in self.objects.of(batch))
            if "contrastive" in self.terms:
                objects = BatchObjects(of_images, of_texts)
            if config.shared_objects is not None:
                sharing = share_objects(of_images, of_texts, config.shared_objects)
                excluded = sharing if excluded is None else excluded.to(sharing) | sharing
        texts = torch.arange(len(batch.rows)).repeat_interleave(config.captions_per_image)
        pairs = Pairs(
            texts.to(device),
            self.order.image_ids(batch).to(device),
            None if excluded is None else excluded.to(device),
        )
        progress = self.step / self.total_steps
        return StepBatch(pairs, epoch, objects, Moment(progress, int(hash_u64(_TARGETS, config.seed, self.step) >> 1)))

    def _objects(self) -> TrainObjects | None:
        config = self.config
        return TrainObjects(self.spec.parts.train, config.objects) if config.needs_objects() else None

    def _inputs_of(self, batch: Batch, pictures: Iterator[Tensor] | None) -> tuple[Inputs | DroppedPixels, Inputs]:
        """Returns the inputs of this rank's share: features, or pictures and tokens; --noise takes something out of them."""
        of_train, device, noise, seed = self.inputs["train"], self.world.device, self.config.noise, self.config.seed
        backbone = self.model.backbone
        own = own_share(batch, self.world)
        rows = torch.from_numpy(batch.rows[own])
        numbers = torch.from_numpy(batch.captions[own])
        texts = (of_train.text_starts[rows][:, None] + numbers).flatten()
        keys = self.order.image_ids(batch)[own]
        dropping = Dropping(noise.regions, seed, batch.epoch, keys)
        images: Inputs | DroppedPixels
        if of_train.images is not None:
            images = of_train.images.of(rows, device)
            if noise.regions:
                is_raw = isinstance(images, Tensor)
                images = DroppedPixels(images, dropping) if is_raw else without_some(images, dropping)
        else:
            assert pictures is not None
            pixels = pixels_of(next(pictures), self.source, device)
            images = DroppedPixels(pixels, dropping) if noise.regions else pixels
        if of_train.texts is not None and not noise.words:
            return images, of_train.texts.of(texts, device)
        words = [of_train.all_texts[i] for i in texts.tolist()]
        draws = word_draws(seed, batch.epoch, keys, batch.captions[own])
        return images, noisy_tokens(backbone, words, noise.words, draws).to(device)

    def _pictures(self) -> Iterator[Tensor] | None:
        """Returns the pictures of the steps from now on; None where their features are kept."""
        if self.inputs["train"].images is not None:
            return None
        pictures = train_pictures(self.spec.parts.train, self.source, self.config.augment, self.config.seed)
        places = own_places(self.order, self.step, self.total_steps, self.world)
        return picture_batches(pictures, places, self.config.workers)

    # --- stages

    def _stage_ends(self) -> bool:
        return self.config.backbone.frozen_at(self.step / self.order.steps_per_epoch) != self.frozen

    def _enter_stage(self) -> None:
        """Freezes the towers that are to be frozen now, and wraps the model anew."""
        self.frozen = self.config.backbone.frozen_at(self.step / self.order.steps_per_epoch)
        for name, parameter in self.model.named_parameters():
            if name.startswith("backbone."):
                side = self.model.backbone.side_of(name.removeprefix("backbone."))
                is_frozen = self.frozen[0] if side == "image" else self.frozen[1]
                parameter.requires_grad = name in self._learned and not is_frozen
        if not any(parameter.requires_grad for parameter in self.names.values()):
            raise InputError(
                f"expected something to learn, found none: head {self.config.head} has no weights at --width "
                f"{self.config.width}, and the towers are frozen; take --backbone.freeze none or another width"
            )
        # accelerate changes what it wraps: each stage has a module of its own
        self.module = module = StepModule(self.model, self.terms, self.numbers, self.config.optim.max_logit_scale)
        # of towers that learn, what a head has no use for (a global feature) gets no gradient
        self.accelerator.ddp_handler.find_unused_parameters = self.frozen != (True, True)
        self.wrapped = self.accelerator.prepare_model(module)

    def _prepare_inputs(self) -> None:
        """Makes the inputs of training and validation: features of frozen towers once, for all seeds."""
        for name in ("train", "val"):
            self.inputs[name] = self.inputs_of(name)

    def inputs_of(self, name: str) -> PartInputs:
        """Returns the inputs of "train", "val" or "test". Collective."""
        run, part = self.spec, getattr(self.spec.parts, name)
        # towers that learn give no features that stay; those of a tower that is frozen for good do
        if self.frozen == (False, False):
            return PartInputs(part, None, None)
        if name not in run.kept:
            self.model.eval()
            room = self.config.backbone.cache_gb - sum(
                store.gigabytes
                for kept in run.kept.values()
                for store in (kept.images, kept.texts)
                if store is not None
            )
            # words change anew at each epoch, so features of training texts would not stay
            stays = (self.frozen[0], self.frozen[1] and not (name == "train" and self.config.noise.words))
            run.kept[name] = make_inputs(part, self.model.backbone, run.source, stays, room, self.world)
        return run.kept[name]

    def _set_mode(self) -> None:
        """Heads train; so do towers that learn, but for batch norm, whose statistics stay."""
        self.wrapped.train()
        backbone = self.model.backbone
        for name, module in backbone.named_modules():
            is_frozen = self.frozen[0] if backbone.side_of(name + ".") == "image" else self.frozen[1]
            if is_frozen or isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.training = False

    # --- what is told and kept

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def _line(self, meter: Meter) -> None:
        if not self._count:
            return
        entry: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step / self.order.steps_per_epoch,
            "lr": self._rate,
            **{name: total / self._count for name, total in self._sums.items()},
        }
        subspaces = getattr(self.model.pair.text, "subspaces", None)
        if subspaces is not None:
            entry |= (found := subspaces.statistics())
            # new ones are alike, so the first half of a run tells nothing
            is_late = 2 * self.step >= self.total_steps
            if is_late and found["profile_cosine"] >= COLLAPSED and not self._told_of_collapse:
                self._told_of_collapse = True
                warn(
                    f"step {self.step:,} of {self.total_steps:,}: the sub-spaces have nearly one profile (mean cosine "
                    f"{found['profile_cosine']:.2f}, {COLLAPSED:g} or more), as new ones have, and are worth little more than a "
                    "single one. They come apart with a higher --optim.lr, more --epochs or a higher --weights.dhset-diversity"
                )
        self._sums, self._count = {}, 0
        meter.print_above(
            f"step {self.step:>6,}  epoch {entry['epoch']:6.2f}  loss {entry['loss']:8.4f}  lr {self._rate:.2e}  "
            f"grad {entry['grad_norm']:6.2f}"
        )
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        if is_speaker():
            entry = {**entry, "elapsed_seconds": round(time.monotonic() - self._begun, 3)}
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            for tracker in self.trackers:
                tracker.write({**entry, "time": time.time()})

    def _validate(self, meter: Meter) -> None:
        """Validates, and keeps the weights where they are the best so far. Collective."""
        for buffer in self.model.buffers():  # ranks have statistics of their own; rank 0's are what is saved
            if self.world.size > 1:
                dist.broadcast(buffer, 0)
        own: dict[str, Tensor] | None = None
        if self.average is not None and self.config.eval_weights == "ema":
            own = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.weights())
        found = validate(self.model, self.inputs["val"], self.source, self.world)
        self.validations.append(distributed.broadcast(found["rsum"]))
        meter.print_above(
            f"step {self.step:>6,}  validation  rsum {found['rsum']:.2f}  i2t R@1 {found['i2t_r1']:.2f}  "
            f"t2i R@1 {found['t2i_r1']:.2f}"
        )
        self._write({"step": self.step, **{f"val_{name}": value for name, value in found.items()}})
        is_better = distributed.broadcast(self.best is None or found["rsum"] > self.best["value"])
        if is_better:
            self.best = {"metric": "rsum", "value": found["rsum"], "step": self.step}
            if self.world.rank == 0:
                self._save_to(CHOSEN_NAME, {"validation": {**self.best, "metrics": found}})
        if own is not None:
            self.model.load_state_dict(own)

    def _best_so_far(self) -> dict[str, Any] | None:
        """Returns what the chosen checkpoint says of itself, of a run that goes on."""
        folder = self.spec.out / CHECKPOINTS_FOLDER / CHOSEN_NAME
        if not self.step or not weights_path(folder).exists():
            return None
        return {name: read_description(folder)["validation"][name] for name in ("metric", "value", "step")}

    def _save(self) -> Path:
        """Writes a checkpoint to go on from; returns its folder. Collective.

        Raises FloatingPointError on all ranks where a weight is not finite.
        """
        self._last_save = time.monotonic()
        bad = [n for n, v in self.model.state_dict().items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if bad:
            raise FloatingPointError(
                f"weights at step {self.step:,} are not finite: {', '.join(bad[:3])} …; nothing was saved"
            )
        folder = checkpoint_name(self.step)
        if self.world.rank == 0:
            state = TrainState(
                self.step, self.step * self.config.batch_size, {}, self.course, self.applied_steps, self.left_out
            )
            moments = moments_of(self.optimizer, self.names, self.others)
            average = None if self.average is None else self.average.weights()
            self._save_to(folder, {}, lambda place: write_state(place, state, moments, average))
            for old in checkpoints_of(self.spec.out)[: -self.config.keep]:
                remove(old)
        distributed.broadcast(None)
        return self.spec.out / CHECKPOINTS_FOLDER / folder

    def _save_to(self, name: str, more: dict[str, Any], write: Any = lambda place: None) -> None:
        """Writes the model as it is under checkpoints/; rank 0."""

        def extras(place: Path) -> None:
            write_set_model(place, self.model)
            write(place)

        source = self.source
        save_checkpoint(
            self.spec.out / CHECKPOINTS_FOLDER / name,
            self.model.state_dict(),
            self.model.backbone.description.get("model", {}),
            {**describe_checkpoint(self.spec, self.model), "step": self.step, **more},
            extras,
            preprocess_of(source.mean, source.std, source.interpolation, source.resize_mode),
        )


def describe_checkpoint(run: Run, model: SetModel) -> dict[str, Any]:
    """Returns what setclip_config.json says of a checkpoint, "step" aside."""
    config, sha256 = run.config, run.source_sha256
    source = {name: run.source.identity[name] for name in ("where", "model", "step") if name in run.source.identity}
    return {
        "recipe": run.recipe,
        "model": f"{run.source.identity.get('model', 'a model')}, head {config.head}",
        "head": config.head,
        "inference": model.inference,
        "similarity": model.similarity_of_features(),
        "from": source | ({"sha256": sha256} if sha256 else {}),
        "seed": config.seed,
        "data": run.parts.manifest.identity(),
        "chosen_on": {
            "place": str(run.parts.val.place),
            "split": run.parts.val.split,
            "images": len(run.parts.val),
        },
        "provenance": describe(),
    }


def _keep_until(path: Path, step: int) -> None:
    """Drops what a run wrote after the checkpoint that it goes on from, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    path.write_text("".join(kept), encoding="utf-8")


def _validations_in(path: Path) -> list[float]:
    """Returns what validation has found so far, by metrics.jsonl."""
    if not path.exists():
        return []
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [entry["val_rsum"] for entry in entries if "val_rsum" in entry]
