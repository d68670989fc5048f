"""When a run saves, how, and what it keeps: written beside the training, whole or not at all. Used by the loop.

Gathering the state is collective and done at once; rank 0 then writes it in a thread while training goes on, one checkpoint at a
time. A checkpoint that cannot be written (a full disk) is said and tried again at the next time; the third failure in a row ends
the run.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.resume import TrainState, write_state
from pretrain.state import gather_moments, gather_weights
from setclip import distributed
from setclip.checkpoint import CHECKPOINTS_FOLDER, checkpoint_name, checkpoints_of, damage_of, save_checkpoint
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import remove, remove_partial, write_json
from setclip.log import say, warn

BEST_NAME = "best.json"
_MOST_FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When checkpoints are written and which stay. The last step is always saved."""

    every_steps: int = 1000
    """Steps between checkpoints."""
    every_minutes: float = 20.0
    """Minutes between checkpoints, where that comes first; 0: by steps alone."""
    keep: int = 2
    """Newest checkpoints that stay."""
    best: str | None = None
    """Figure of the evaluation along the way (zeroshot_top1, rsum, …) whose best checkpoint stays too; saved right after it."""
    in_background: bool = True
    """Whether training goes on while a checkpoint is written."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.every_minutes < 0:
            raise ValueError(f"every_minutes must not be negative, found {self.every_minutes}")


def checkpoint_to_resume(out: Path, world: World) -> Path | None:
    """Returns the newest checkpoint of a run whose checksums are right; None if it has no checkpoint. Collective.

    Each damaged one is said. Raises InputError where all are damaged.
    """
    found = checkpoints_of(out)
    if not found:
        return None
    chosen: Path | None = None
    if world.rank == 0:
        for folder in reversed(found):
            damage = damage_of(folder)
            if damage is None:
                chosen = folder
                break
            warn(f"{folder} is damaged ({damage}) and is not used; remove it")
    chosen = distributed.broadcast(chosen)
    if chosen is None:
        raise InputError(
            f"expected a whole checkpoint under {out / CHECKPOINTS_FOLDER}, found {len(found)}, all damaged; start anew with "
            "--overwrite True"
        )
    return chosen


def best_of(out: Path) -> dict[str, Any] | None:
    """Returns step, metric and value of a run's best checkpoint, if one is kept."""
    path = out / BEST_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Checkpoints:
    """The checkpoints of a run in training. All ranks hold one; rank 0 writes."""

    def __init__(
        self,
        config: SaveConfig,
        out: Path,
        world: World,
        model_cfg: dict[str, Any],
        describe: Callable[[TrainState], dict[str, Any]],
        ema: Ema | None = None,
    ):
        """`describe` returns what setclip_config.json says of a checkpoint; `ema` is saved with each."""
        self._ema = ema
        self._config, self._out, self._world = config, out, world
        self._model_cfg, self._describe = model_cfg, describe
        self._folder = out / CHECKPOINTS_FOLDER
        self._last_time = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._error: BaseException | None = None
        best = best_of(out) if world.rank == 0 else None
        self._best = best if best is not None and best["metric"] == config.best else None
        if world.rank == 0:
            remove_partial(self._folder)

    @property
    def is_time(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint (the other ranks' never does)."""
        minutes = self._config.every_minutes
        return self._world.rank == 0 and minutes > 0 and time.monotonic() - self._last_time >= 60 * minutes

    @property
    def has_failed(self) -> bool:
        """Whether writing failed too often for the run to go on; on rank 0 alone."""
        return self._failures >= _MOST_FAILURES

    def is_due(self, step: int) -> bool:
        """Whether the steps ask for a checkpoint."""
        return step % self._config.every_steps == 0

    def improves(self, step: int, found: dict[str, float]) -> bool:
        """Notes the result of an evaluation; returns, on all ranks, whether it is the best so far and so to be kept."""
        metric = self._config.best
        if metric is None or not found:
            return False
        if metric not in found:
            raise InputError(
                f"expected --save.best to name a figure of the evaluation along the way, found {metric!r}; there are: "
                f"{', '.join(sorted(found))}"
            )
        better = self._world.rank == 0 and (self._best is None or found[metric] > self._best["value"])
        if better:
            self._best = {"metric": metric, "value": found[metric], "step": step}
        return distributed.broadcast(better)

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Gathers the state and begins to write it; returns the folder that it will be. Collective.

        Raises FloatingPointError on all ranks where a weight is not finite: such a checkpoint would be of no use.
        """
        self.wait()
        self._last_time = time.monotonic()
        weights, moments = gather_weights(engine), gather_moments(engine, state.applied_steps)
        average = None if self._ema is None else self._ema.weights()
        bad = [
            name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())
        ]
        if bad:
            raise FloatingPointError(
                f"weights at step {state.step:,} are not finite: {', '.join(bad[:3])} …; nothing was saved"
            )
        folder = self._folder / checkpoint_name(state.step)
        if self._world.rank == 0:
            best = dict(self._best) if self._best else None
            arguments = (folder, weights, moments, average, state, best)
            if self._config.in_background:
                self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
                self._thread.start()
            else:
                self._write(*arguments)
        return folder

    def wait(self) -> None:
        """Waits until what is being written is there (rank 0; the others go on)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits until the last checkpoint is there. Collective. Raises on all ranks what made writing it fail."""
        self.wait()
        error = distributed.broadcast(None if self._error is None else str(self._error))
        if error is not None:
            raise InputError(
                f"expected to write a checkpoint under {self._folder}, found {error}; make room or mend the disk, then go "
                "on with --resume True"
            )

    def _write(
        self,
        folder: Path,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        average: dict[str, Tensor] | None,
        state: TrainState,
        best: dict[str, Any] | None,
    ) -> None:
        try:
            save_checkpoint(
                folder,
                weights,
                self._model_cfg,
                self._describe(state),
                lambda place: write_state(place, state, moments, average),
            )
            if best is not None and best["step"] == state.step:
                write_json(self._out / BEST_NAME, best)
            self._remove_old()
        except Exception as error:
            self._failures += 1
            self._error = error
            warn(f"the checkpoint of step {state.step:,} could not be written ({error}); training goes on without it")
        else:
            self._failures, self._error = 0, None

    def _remove_old(self) -> None:
        best = best_of(self._out)
        for old in checkpoints_of(self._out)[: -self._config.keep]:
            if best is None or old.name != checkpoint_name(best["step"]):
                remove(old)


def check_space(out: Path, model: torch.nn.Module, config: SaveConfig, has_average: bool = False) -> None:
    """Raises InputError where the disk cannot hold the checkpoints: weights and two moments in fp32 each (and their moving
    average), and one more while it is written."""
    parameters = sum(p.numel() for p in model.parameters())
    needed = (16 if has_average else 12) * parameters * (config.keep + 1 + (config.best is not None))
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"expected {needed / 1e9:.1f} GB free at {place} for {config.keep + 1} checkpoints of {parameters / 1e6:.0f} M "
            f"parameters, found {free / 1e9:.1f} GB; make room, or give another --out or a smaller --save.keep"
        )
    if free < 1.5 * needed:
        say(f"note: {free / 1e9:.1f} GB are free at {place}; the checkpoints take {needed / 1e9:.1f} GB")
