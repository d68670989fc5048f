"""Which model a command evaluates: the one that --checkpoint names, or the newest run under runs/.

Used by the commands of this package.
"""

import difflib
from pathlib import Path

import open_clip
import torch

from setclip.checkpoint import LoadedModel, load_model, newest_run
from setclip.errors import InputError
from setclip.log import say

RUNS_DIR = Path("runs")


def model_to_evaluate(checkpoint: str | None, device: str = "auto", runs_dir: Path = RUNS_DIR) -> LoadedModel:
    """Loads the model and says which it is.

    `checkpoint`: what `load_model` takes, or the name of a run under `runs_dir`; None takes the newest run there.
    `device`: "auto" takes CUDA where there is one. Raises InputError, with the nearest name where there is one near.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if checkpoint is None:
        run = newest_run(runs_dir)
        if run is None:
            raise InputError(
                f"expected a run under {runs_dir}/, found none; make one with `python -m pretrain.run RECIPE`, or name "
                "a model with --checkpoint (a run, a checkpoint folder or an open_clip NAME:TAG)"
            )
        say(f"no --checkpoint given: taking the newest run, {run}")
        checkpoint = str(run)
    loaded = load_model(_resolved(checkpoint, runs_dir), device)
    step = loaded.identity.get("step")
    say(f"model: {loaded.identity.get('where', checkpoint)}" + (f", step {step:,}" if isinstance(step, int) else ""))
    return loaded


def _resolved(checkpoint: str, runs_dir: Path) -> str:
    """Returns the name or place for `load_model`; a bare name may be that of a run."""
    if Path(checkpoint).exists() or checkpoint.startswith("local-dir:"):
        return checkpoint
    if "/" not in checkpoint and (runs_dir / checkpoint).is_dir():
        return str(runs_dir / checkpoint)
    models = open_clip.list_models()
    if checkpoint.partition(":")[0] in models:
        return checkpoint
    runs = [str(path) for path in runs_dir.glob("*") if path.is_dir()]
    by_name = {Path(run).name: run for run in runs} | {name: name for name in (*runs, *models)}
    nearest = difflib.get_close_matches(checkpoint, by_name, n=1)
    perhaps = f", perhaps {by_name[nearest[0]]!r}" if nearest else ""
    raise InputError(
        f"unknown checkpoint {checkpoint!r}{perhaps}; expected a run or checkpoint folder, a run's name under "
        f"{runs_dir}/, or an open_clip model (NAME or NAME:TAG)"
    )
