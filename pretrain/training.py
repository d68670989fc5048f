"""The loop: batches in, steps, lines, checkpoints, and what to do when something goes wrong. Used by pretrain.run."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.bad_steps import BadSteps, CollapseWatch
from pretrain.checkpoints import Checkpoints, check_space, checkpoint_to_resume
from pretrain.config import PretrainConfig
from pretrain.ema import Ema
from pretrain.engine import Engine, StepOutcome
from pretrain.evaluate import Evaluator
from pretrain.feature_cache import Features
from pretrain.loader import Batch, Loader, automatic_workers, to_device
from pretrain.losses import BatchSets, LossOutput, Moment, ObjectWeights, contrastive_loss, prepare_targets
from pretrain.machine import share_of_machine
from pretrain.model_options import build_for_training, with_pretrained_towers
from pretrain.optim import OptimConfig, learning_rate
from pretrain.plan import Plan, announce, course_of, make_pipeline
from pretrain.progress import METRICS_NAME, RunLog, evaluation_text
from pretrain.resume import TrainState, read_average, read_state
from pretrain.retrieved import write_retrieved
from pretrain.self_check import SelfCheck
from pretrain.sessions import SessionLog
from pretrain.side_stream import SideStream
from pretrain.state import gather_weights, restore
from pretrain.stopping import Stopped, StopRequest
from pretrain.text_domains import text_shares
from pretrain.throughput import Utilisation, utilisation_of
from pretrain.trackers import check_trackers, open_trackers
from pretrain.watchdog import Watchdog
from setclip import config as configuration
from setclip import distributed
from setclip.checkpoint import load_initial_weights
from setclip.distributed import World
from setclip.files import remove
from setclip.hashing import hash_text, hash_u64
from setclip.images import MEAN, STD, normalize
from setclip.log import say, warn
from setclip.models.clip import fit_bias, image_size_of, load_weights
from setclip.provenance import describe

REPORT_AFTER_SECONDS = 20.0  # of a run; shorter ones are looked at by `python -m pretrain.report`
_DROPOUT, _TARGETS, _PATCHES = 3, 4, 5  # keep the draws of a step apart from each other and from those of the data


@dataclass(frozen=True)
class Start:
    """Where a run begins: anew, or at a checkpoint."""

    state: TrainState
    folder: Path | None = None
    """The checkpoint."""
    weights: dict[str, Tensor] | None = None
    moments: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    """Moving average of the weights."""

    @classmethod
    def anew(cls, plan: Plan, config: PretrainConfig, left_out: tuple[int, ...] = ()) -> "Start":
        """Returns the first step, without the batches of some steps."""
        return cls(TrainState(0, 0, {}, course_of(config, plan), applied_steps=0, left_out=left_out))


def start_of(plan: Plan, config: PretrainConfig, world: World, left_out: tuple[int, ...] = ()) -> Start:
    """Returns the newest whole checkpoint of the run folder, or a start anew where there is none. Collective.

    `left_out`: steps whose batches are not to be trained on, beside those that the checkpoint names.
    """
    course = course_of(config, plan)
    folder = checkpoint_to_resume(plan.out, world)
    if folder is None:
        return Start.anew(plan, config, left_out)
    state, weights, moments = read_state(folder, course, config.change)
    _announce_changes(state, course)
    left_out = tuple(sorted({*left_out, *state.left_out}))
    return Start(replace(state, course=course, left_out=left_out), folder, weights, moments, read_average(folder))


def _announce_changes(state: TrainState, course: dict[str, Any]) -> None:
    if state.course["optim"] == course["optim"] and state.course["total_steps"] == course["total_steps"]:
        return
    rates = []
    for of_run in (state.course, course):
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in of_run["optim"].items()}
        total = of_run["total_steps"] * of_run["global_batch_size"]
        rates.append(learning_rate(OptimConfig(**values), state.samples_seen, total))
    say(
        f"note: the schedule is changed: the learning rate at step {state.step:,} was {rates[0]:.3e}, is {rates[1]:.3e}"
    )


class Training:
    """A run from one start on. All ranks make one and call `run`."""

    def __init__(
        self, recipe: str, config: PretrainConfig, plan: Plan, start: Start, world: World, request: StopRequest
    ):
        check_trackers(config.log)
        self.recipe = recipe
        self.config, self.plan, self.world, self.request = config, plan, world, request
        state = start.state
        self.step, self.samples_seen, self.applied_steps = state.step, state.samples_seen, state.applied_steps
        self.left_out, self.course, self.checkpoint = state.left_out, state.course, start.folder

        torch.manual_seed(config.seed)  # the same first weights on every rank
        model = build_for_training(plan.model_cfg, config.model)
        check_space(plan.out, model, config.save, bool(config.ema.decay))
        self._fill(model, start)
        utilisation = utilisation_of(model, config.engine.precision, world.device, config.log.peak_tflops)
        announce(recipe, config, plan, model, state, world)
        self.engine = Engine(model, config.engine, config.optim, plan.local_batch_size, world)
        if start.weights is not None:
            restore(self.engine, start.weights, start.moments or {}, state.applied_steps)
            self.engine.set_step(state.step)
        self.ema = self._make_ema(start)
        self.loader = self._make_loader(model, state)
        self.evaluator = Evaluator(config.eval, plan.model_cfg, world, config.objects)
        if world.rank == 0:
            _prepare_folder(plan, config, start)
        distributed.broadcast(None)  # the other ranks wait for the folder
        self.log = RunLog(
            plan.out / METRICS_NAME,
            plan.total_samples,
            state.samples_seen,
            state.step,
            world.device,
            world.size,
            utilisation if isinstance(utilisation, Utilisation) else None,
            open_trackers(config.log, plan.out, state.step, configuration.to_dict(config)) if world.rank == 0 else (),
        )
        if isinstance(utilisation, str):
            say(f"MFU is not logged {utilisation}")
        self.session = SessionLog(plan.out)
        self.checkpoints = Checkpoints(
            config.save, plan.out, world, plan.model_cfg, partial(_description, recipe, config, plan), self.ema
        )
        self.bad_steps = BadSteps(config.guard, plan.out)
        self.collapse = CollapseWatch(config.guard, config.loss.group_size or config.global_batch_size)
        self.self_check = SelfCheck(self.engine)
        self.watchdog = Watchdog(plan.out, world, 60 * config.guard.hang_minutes)
        table = plan.object_table
        self.object_weights = None if table is None else ObjectWeights.of(table).to(world.device)
        self.beside = SideStream(world.device)
        self.meters = ["kl", "true_pair_mass", *(["similar_pairs", "equal_pairs"] if plan.parser else [])]

    def run(self) -> Path:
        """Trains to the end; returns the last checkpoint's folder.

        Raises Stopped when asked to stop, and RollBack, on all ranks at the same step.
        """
        try:
            self._run_and_close()
        except Stopped:
            self._report()
            raise
        self._report()
        assert self.checkpoint is not None
        say(f"checkpoint: {self.checkpoint}")
        return self.checkpoint

    def _run_and_close(self) -> None:
        try:
            with self.session.recorded(lambda: self.step, self._facts()):
                self._run()
        finally:
            self.checkpoints.wait()
            self.log.close()
            self.engine.close()
            self.loader.close()
            self.watchdog.close()

    def _run(self) -> None:
        batches = iter(self.loader)
        self.engine.train()
        while self.step < self.plan.total_steps:
            self.watchdog.at(self.step + 1, "reading data")
            with self.log.timed("data"):
                batch = next(batches)
            if self.step + 1 in self.left_out:
                self._count(batch)
                self.engine.set_step(self.step)
                say(f"step {self.step:,} is left out: its loss or gradient was not finite before")
                continue
            with self.log.timed("step"):
                figures, features, outcome, lr = self._train_on(batch)
                # One collective a step tells all ranks what any of them wants.
                wants = [self.request.signal is not None, self.checkpoints.is_time, self.checkpoints.has_failed]
                shares = {} if self.plan.texts is None else text_shares(batch.domains)
                means = distributed.mean_over_ranks(
                    torch.stack([*figures, *map(figures[0].new_tensor, map(float, (*shares.values(), *wants)))])
                )
                loss, *values = means.tolist()
            self._count(batch)
            if not outcome.is_applied:
                self.bad_steps.add(self.step, float(figures[0]), outcome.grad_norm, batch.keys)
            else:
                self.applied_steps += 1
                if self.ema is not None:
                    self.ema.update(self.applied_steps)
                self.self_check.after_step(self.step, lr)
                measured = dict(zip((*self.meters, *shares), values, strict=False))
                self.log.add(self.config.global_batch_size, loss=loss, **measured, grad_norm=outcome.grad_norm)
                if remark := self.collapse.add(loss):
                    warn(remark)
            self._look_around(features, lr, *(value > 0 for value in values[-3:]))
        if self.step in self.left_out:  # the last one, so that nothing was saved there
            self.checkpoint = self.checkpoints.save(self.engine, self._state())
        self.checkpoints.finish()

    def _train_on(self, batch: Batch) -> tuple[list[Tensor], Features, StepOutcome, float]:
        """Takes a step; returns this rank's loss and meters, and what became of it."""
        self.watchdog.at(self.step + 1, "encoding")
        config, plan, seed = self.config, self.plan, self.config.seed
        torch.manual_seed(_draw(_DROPOUT, seed, self.step, self.world.rank))  # dropout resumes exactly
        data = to_device(batch, self.world.device)
        images = normalize(data["images"], MEAN, STD)
        sets = BatchSets(data["image_objects"], data["text_objects"], data["text_ids"])
        self.beside.begin()
        # A picture keeps the same patches on whatever rank it is.
        draws = hash_u64(_PATCHES, seed, self.step, np.array([hash_text(key) for key in batch.keys], np.uint64))
        features = self.engine.forward(
            images, data["tokens"], torch.from_numpy(draws.view(np.int64)).to(self.world.device)
        )
        prepared = self.beside.run(partial(prepare_targets, sets, config.loss, self.object_weights))
        self.watchdog.at(self.step + 1, "stepping")
        output: LossOutput = contrastive_loss(
            features.images,
            features.texts,
            features.logit_scale,
            sets,
            config.loss,
            logit_bias=features.logit_bias,
            moment=Moment(self.samples_seen / plan.total_samples, _draw(_TARGETS, seed, self.step)),
            prepared=prepared,
        )
        lr = learning_rate(config.optim, self.samples_seen, plan.total_samples)
        outcome = self.engine.step(output.loss, lr)
        return [output.loss.detach(), *(getattr(output, name) for name in self.meters)], features, outcome, lr

    def _count(self, batch: Batch) -> None:
        self.step += 1
        self.samples_seen += self.config.global_batch_size
        if batch.skips:
            self.log.skipped(self.world.rank, self.step, batch.skips)

    def _look_around(self, features: Features, lr: float, is_asked: bool, is_time: bool, has_failed: bool) -> None:
        """Logs, evaluates and saves where it is time; ends the run where it is asked to. Collective."""
        step, config = self.step, self.config
        last = step == self.plan.total_steps
        if step % config.log_every_steps == 0 or last or is_asked:
            self.watchdog.at(step, "logging")
            self.log.line(
                distributed.gather_objects(self.log.of_this_rank(sum(self.loader.skipped.values()))),
                step=step,
                samples_seen=self.samples_seen,
                epoch=self.samples_seen / self.plan.order.num_samples,
                lr=lr,
                logit_scale=float(features.logit_scale.detach()),
                **({} if features.logit_bias is None else {"logit_bias": float(features.logit_bias.detach())}),
            )
        is_best = False
        if self.evaluator.wanted(step, last) and not is_asked:
            self.watchdog.at(step, "evaluating")
            of_average = self.ema is not None and config.eval.weights == "ema"
            found = self.evaluator(self.ema.weights() if self.ema and of_average else gather_weights(self.engine))
            self.log.write({"step": step, "samples_seen": self.samples_seen, **found})
            if found:
                self.log.meter.print_above(evaluation_text(step, found))
            if self.evaluator.retrieved is not None:
                write_retrieved(self.plan.out, step, self.evaluator.retrieved)
            is_best = self.checkpoints.improves(step, found)
        if last or is_asked or is_time or is_best or self.checkpoints.is_due(step):
            self.watchdog.at(step, "saving")
            self.checkpoint = self.checkpoints.save(self.engine, self._state())
        if has_failed or (is_asked and not last):
            self.checkpoints.finish()  # raises where checkpoints could not be written
            if is_asked:
                name = next(filter(None, distributed.gather_objects(self.request.signal)))
                raise Stopped(f"{name}: saved at step {step:,} ({self.checkpoint}); --resume True goes on")

    def _facts(self) -> dict[str, Any]:
        """Returns what sessions.jsonl says of this start."""
        plan, config, world = self.plan, self.config, self.world
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        return {
            "recipe": self.recipe,
            "model": config.model.name,
            "loss": config.loss.full_name,
            "ranks": world.size,
            "device": device,
            "total_steps": plan.total_steps,
            "samples_per_epoch": plan.order.num_samples,
            "left_out": list(self.left_out),
            "data": plan.manifest.identity(),
            "provenance": describe(),
        }

    def _report(self) -> None:
        """Writes the report where the run was long enough to be worth it; a failure is said and ends nothing."""
        is_worth_it = self.session.seconds >= REPORT_AFTER_SECONDS or (self.plan.out / "report.html").exists()
        if self.world.rank != 0 or not self.config.log.report or not is_worth_it:
            return
        from pretrain.report import write_report  # draws: half a second that no rank should pay at its start

        try:
            say(f"report: {write_report([self.plan.out])}")
        except Exception as error:
            warn(
                f"report.html could not be written ({error}); the run is whole, `python -m pretrain.report` makes it later"
            )

    def _state(self) -> TrainState:
        return TrainState(
            self.step, self.samples_seen, _all_skips(self.loader), self.course, self.applied_steps, self.left_out
        )

    def _fill(self, model: torch.nn.Module, start: Start) -> None:
        """Loads the weights from which the run starts."""
        where = self.config.model.pretrained
        if start.weights is not None:
            load_weights(model, start.weights, str(start.folder))
        elif self.config.model.pretrained_image or self.config.model.pretrained_text:
            load_weights(model, with_pretrained_towers(self.plan.model_cfg, self.config.model), "the pretrained towers")
        elif where is not None:
            initial, remark = fit_bias(load_initial_weights(where, self.config.model.name), model, where)
            load_weights(model, initial, where)
            if remark:
                say(f"note: {remark}")
            scale, cap = float(initial["logit_scale"].exp()), self.config.optim.max_logit_scale
            if scale > 1.0001 * cap:
                say(f"note: the scale {scale:g} of {where} is capped at {cap:g} (--optim.max-logit-scale)")

    def _make_ema(self, start: Start) -> Ema | None:
        """Returns the moving average of the weights, as the checkpoint has it; None where none is asked for."""
        config = self.config
        if not config.ema.decay:
            return None
        say(config.ema.in_words(config.global_batch_size, self.plan.order.num_samples))
        ema = Ema(config.ema, self.engine, start.state.applied_steps)
        if start.average is not None:
            ema.restore(start.average)
        elif start.folder is not None:
            say(f"note: {start.folder} has no moving average: it begins with the weights of step {start.state.step:,}")
        return ema

    def _make_loader(self, model: torch.nn.Module, state: TrainState) -> Loader:
        plan, config, world = self.plan, self.config, self.world
        pipeline = make_pipeline(config, plan, image_size_of(model))
        cores = share_of_machine().cores
        workers = automatic_workers(cores) if config.data.workers is None else config.data.workers
        return Loader(
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


def _draw(*words: int) -> int:
    """Returns a seed, 63 bits, that depends on the words only."""
    return int(hash_u64(*words) >> 1)


def _description(recipe: str, config: PretrainConfig, plan: Plan, state: TrainState) -> dict[str, Any]:
    """Returns setclip_config.json of a checkpoint."""
    return {
        "recipe": recipe,
        "model": config.model.name,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "epoch": state.samples_seen / plan.order.num_samples,
        "loss": configuration.to_dict(config.loss),
        **({"ema": configuration.to_dict(config.ema)} if config.ema.decay else {}),
        "data": plan.manifest.identity(),
        "provenance": describe(),
    }


def _prepare_folder(plan: Plan, config: PretrainConfig, start: Start) -> None:
    if config.overwrite and start.folder is None and not start.state.left_out:
        remove(plan.out)
    plan.out.mkdir(parents=True, exist_ok=True)
    # What a resume would be given: the same settings, without the words that remove or change the run.
    settings = replace(config, out=plan.out, overwrite=False, resume=False, change=False)
    configuration.save(plan.out / configuration.CONFIG_NAME, settings)


def _all_skips(loader: Loader) -> dict[int, int]:
    """Returns lane → skips over all ranks (each lane belongs to one rank)."""
    return {lane: n for part in distributed.gather_objects(dict(loader.skipped)) for lane, n in part.items() if n}
