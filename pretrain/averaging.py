"""Which checkpoints an export takes, and their mean where there are several. Used by pretrain.export.

The mean is taken value by value in float64 (Izmailov et al. 2018, arXiv 1803.05407, average along one run), so it makes sense
for checkpoints of one run only; those of others are refused.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoints import BEST_NAME, best_of
from pretrain.resume import STATE_NAME
from setclip.checkpoint import (
    CHECKPOINTS_FOLDER,
    EMA_NAME,
    OPEN_CLIP_CONFIG_NAME,
    checkpoint_name,
    checkpoints_of,
    find_checkpoint,
    read_description,
    weights_path,
)
from setclip.errors import InputError

BEST = "best"
_SAME_DESCRIPTION = ("recipe", "model")
_SAME_COURSE = ("split", "seed", "global_batch_size")
BATCH_NORM = (".running_mean", ".running_var")
"""Ends of the names of statistics that are no parameters."""


def chosen_checkpoints(where: Path, average: Sequence[str] = ()) -> list[Path]:
    """Returns the checkpoint folders that `average` names, by step; without it the one that `where` names.

    `where`: a run (its newest checkpoint) or a checkpoint folder. `average`: one whole number (so many newest checkpoints of
    the run), or names of its checkpoints, `best` among them, or folders. Raises InputError where one is not there or named twice.
    """
    if not average:
        return [find_checkpoint(where)]
    if len(average) == 1 and average[0].isdecimal():
        return _newest(run_of(where), int(average[0]))
    chosen = [_named(where, name) for name in average]
    resolved = [folder.resolve() for folder in chosen]
    twice = [folder for folder in chosen if resolved.count(folder.resolve()) > 1]
    if twice:
        raise InputError(
            f"expected each checkpoint of --average once, found {twice[0]} {len(twice)} times (`best` may be one of the others); "
            "name each once"
        )
    return sorted(chosen, key=lambda folder: read_description(folder).get("step", 0))


def run_of(where: Path) -> Path:
    """Returns the run folder that `where` is, or whose checkpoint it is; `where` itself if neither."""
    place = where if where.parent.name == CHECKPOINTS_FOLDER else where.absolute()
    return place.parents[1] if place.parent.name == CHECKPOINTS_FOLDER else where


def _newest(run: Path, number: int) -> list[Path]:
    found = checkpoints_of(run)
    if number < 1 or len(found) < number:
        raise InputError(
            f"expected {number} checkpoints in {run}, found {len(found)} ({', '.join(p.name for p in found) or 'none'}); give "
            f"--average a number from 1 to {max(1, len(found))}, or keep more while training (--save.keep {max(2, number)})"
        )
    return found[-number:]


def _named(where: Path, name: str) -> Path:
    run = run_of(where)
    if name == BEST:
        best = best_of(run)
        if best is None:
            raise InputError(
                f"expected {run / BEST_NAME} for the best checkpoint, found none; train with --save.best METRIC, or name the "
                "checkpoints"
            )
        return find_checkpoint(run / CHECKPOINTS_FOLDER / checkpoint_name(best["step"]))
    own = run / CHECKPOINTS_FOLDER / name
    if not own.exists() and not Path(name).exists():
        have = [folder.name for folder in checkpoints_of(run)]
        raise InputError(
            f"expected --average K, or checkpoints of {run}, folders or `best`, found {name!r}; the run has "
            f"{', '.join(have) or 'no checkpoints'}"
        )
    return find_checkpoint(own if own.exists() else name)


def check_same_run(folders: Sequence[Path]) -> None:
    """Raises InputError, naming what differs, where checkpoints are of different models or runs."""
    first = folders[0]
    for folder in folders[1:]:
        ours, theirs = _marks(first), _marks(folder)
        runs = _run_folder(first), _run_folder(folder)
        if None not in runs:
            ours["run"], theirs["run"] = runs
        if None in runs or runs[0] != runs[1]:  # in one run --change may have changed the loss
            ours["loss"], theirs["loss"] = (read_description(place).get("loss") for place in (first, folder))
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            told = "; ".join(f"{name}: {_short(ours[name])} and {_short(theirs[name])}" for name in differing[:3])
            raise InputError(
                f"expected checkpoints of one run to average, found {first} and {folder} with different {told}; the mean of "
                "different runs is no model: give checkpoints of one run"
            )


def _marks(folder: Path) -> dict[str, Any]:
    """Returns what checkpoints of one run have in common wherever they lie."""
    config = json.loads((folder / OPEN_CLIP_CONFIG_NAME).read_text(encoding="utf-8"))
    description = read_description(folder)
    state = folder / STATE_NAME
    course = json.loads(state.read_text(encoding="utf-8"))["course"] if state.exists() else {}
    return {
        "model_cfg": config["model_cfg"],
        "preprocess_cfg": config.get("preprocess_cfg"),
        **{name: description.get(name) for name in _SAME_DESCRIPTION},
        "data": description.get("data", {}).get("digest"),
        **{name: course.get(name) for name in _SAME_COURSE},
    }


def _run_folder(folder: Path) -> str | None:
    """Returns the run in whose checkpoints/ a checkpoint lies; None for a copy elsewhere."""
    place = folder.resolve()
    return str(place.parents[1]) if place.parent.name == CHECKPOINTS_FOLDER else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def mean_weights(folders: Sequence[Path], of_average: bool = False) -> dict[str, Tensor]:
    """Returns the mean of the checkpoints' weights, in fp32; whole numbers (counts of batches) are those of the last one.

    `of_average`: of their moving averages (ema.safetensors). Sums are in float64, one weight of all checkpoints at a time, so
    that memory holds one model. Raises InputError where names or shapes differ or a weight is not finite.
    """
    paths = [folder / EMA_NAME if of_average else weights_path(folder) for folder in folders]
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"expected {path}, found none: the run kept no moving average of its weights; export the weights themselves "
                "(--weights model), or train with --ema.decay"
            )
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        names = set(files[0].keys())
        for folder, file in zip(folders[1:], files[1:], strict=True):
            if names != set(file.keys()):
                odd = sorted(names ^ set(file.keys()))
                raise InputError(
                    f"expected the same weights in {folders[0]} and {folder}, found {odd[0]!r} in one of them only; give "
                    "checkpoints of one run"
                )
        return {name: _mean(name, [file.get_tensor(name) for file in files], folders) for name in sorted(names)}


def _mean(name: str, tensors: Sequence[Tensor], folders: Sequence[Path]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for folder, tensor in zip(folders, tensors, strict=True):
        if tensor.shape != total.shape:
            raise InputError(
                f"expected {name} of shape {tuple(total.shape)}, as in {folders[0]}, found {tuple(tensor.shape)} in {folder}; "
                "give checkpoints of one run"
            )
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"expected finite weights in {folder}, found NaN or infinity in {name}; take an earlier one"
            )
        total += tensor
    return (total / len(tensors)).float()


def describe_average(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the description of the mean: that of the newest checkpoint, and which ones it is of."""
    description = read_description(folders[-1])
    if len(folders) == 1:
        return description
    steps = [read_description(folder).get("step") for folder in folders]
    return {
        **description,
        "averaged": {
            "checkpoints": [folder.name for folder in folders],
            "steps": steps,
            "how": "arithmetic mean of each weight, in float64",
        },
    }


def has_batch_norm(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold batch norm's statistics."""
    return any(name.endswith(BATCH_NORM) for name in weights)
