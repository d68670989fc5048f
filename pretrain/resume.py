"""What a resume needs beside the weights, in the checkpoint folder: written here, checked here. Used by the loop.

training_state.json      step, samples seen, skips of each lane, and what fixes the run's course
optimizer.safetensors    AdamW's moments by parameter name
ema.safetensors          the moving average of the weights, where there is one
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from setclip.checkpoint import EMA_NAME, WEIGHTS_NAME, save_weights
from setclip.errors import InputError
from setclip.files import write_json

STATE_NAME = "training_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Free of ranks (but in groups: `course`), workers and ZeRO stages."""

    step: int
    samples_seen: int
    skipped: dict[int, int]
    """Lane to the number of samples that it skipped."""
    course: dict[str, Any]
    """Settings that fix data order, schedule and model; a resume with others would not be the same run."""
    applied_steps: int
    """Steps at which the optimizer stepped: all but the skipped ones."""
    left_out: tuple[int, ...]
    """Steps whose batches are not trained on (counted from 1), because a run went back behind them."""


def write_state(
    folder: Path, state: TrainState, moments: Mapping[str, Tensor], average: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the files into a checkpoint folder that is being written."""
    if average is not None:
        save_weights(folder / EMA_NAME, average)
    save_file({name: tensor.contiguous() for name, tensor in moments.items()}, folder / OPTIMIZER_NAME)
    write_json(folder / STATE_NAME, asdict(state))


CHANGEABLE = ("loss", "ranks_of_groups", "optim", "total_steps", "ema")
"""Of the course: what --change may change. The rest decides which samples come, and to what model."""


_UNTIL_NOW = {
    "towers": {
        "lock_image": False,
        "lock_image_unlocked": 0,
        "lock_text": False,
        "lock_text_unlocked": 0,
        "patch_dropout": None,
    },
    "ema": {"decay": 0.0, "warmup": True},
    "ranks_of_groups": None,
}
"""Of the course: what runs had whose checkpoints do not say it, because it could not be set."""
_LOSS_UNTIL_NOW = {"group_size": None}
"""The same of the loss of pretraining ("loss") and fine-tuning ("contrastive")."""


def _with_what_was(course: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the course of a checkpoint with what could not be set when it was written."""
    losses = {name: {**_LOSS_UNTIL_NOW, **course[name]} for name in ("loss", "contrastive") if name in course}
    return {**_UNTIL_NOW, **course, **losses}


def read_average(folder: Path) -> dict[str, Tensor] | None:
    """Returns the moving average of the weights in a checkpoint folder; None if it has none."""
    path = folder / EMA_NAME
    return load_file(path) if path.exists() else None


def read_state(
    folder: Path, course: Mapping[str, Any], may_change: bool = False
) -> tuple[TrainState, dict[str, Tensor], dict[str, Tensor]]:
    """Returns (state, weights, moments); the state is that of `read_train_state`, which also says what is raised."""
    state = read_train_state(folder, course, may_change)
    return state, load_file(folder / WEIGHTS_NAME), load_file(folder / OPTIMIZER_NAME)


def read_train_state(folder: Path, course: Mapping[str, Any], may_change: bool = False) -> TrainState:
    """Returns where a run stands, with the course with which it was going until then.

    Raises InputError where the run was another one, naming each difference; with `may_change` those in CHANGEABLE are let pass.
    """
    path = folder / STATE_NAME
    if not path.exists():
        raise InputError(
            f"expected {path} to resume from, found only {sorted(p.name for p in folder.glob('*'))}; such a checkpoint gives "
            f"weights to a new run: --model.pretrained {folder}"
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    state = TrainState(
        content["step"],
        content["samples_seen"],
        {int(lane): count for lane, count in content["skipped"].items()},
        _with_what_was(content["course"]),
        content["applied_steps"],
        tuple(content["left_out"]),
    )
    wanted = json.loads(json.dumps(dict(course)))  # tuples become lists, as in the file
    differing = [name for name, value in wanted.items() if state.course.get(name) != value]
    if differing and not (may_change and set(differing) <= set(CHANGEABLE)):
        run = folder.parents[1]
        told = "; ".join(f"{name} was {state.course.get(name)!r}, is {wanted[name]!r}" for name in differing)
        fixed = [name for name in differing if name not in CHANGEABLE]
        how = "" if fixed else ", go on with these with --change True"
        raise InputError(
            f"the run in {run} was started with other settings: {told}. Resume it with its own (--config "
            f"{run / 'config.yaml'}){how}, or start a new run in another --out"
        )
    return state
