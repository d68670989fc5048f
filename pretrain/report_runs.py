"""What a run report is made from: everything that a run folder says, read once. Used by pretrain.report and its parts.

Files that older runs do not have, and figures that their metrics lack, are left out.
"""

import difflib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pretrain.bad_steps import NAME as BAD_STEPS_NAME
from pretrain.config import RECIPES, PretrainConfig
from pretrain.progress import METRICS_NAME, read_lines, read_metrics
from pretrain.retrieved import Retrieved, read_retrieved
from pretrain.sessions import SESSIONS_NAME, Session, read_sessions
from pretrain.watchdog import FOLDER as HANG_FOLDER
from setclip import config as configuration
from setclip.checkpoint import checkpoints_of, read_description
from setclip.errors import InputError

RUNS_DIR = Path("runs")
_SILENT_SECONDS = 600.0  # a run that says nothing for so long, and for five of its intervals, is not going on
_MOST_NAMES = 20
_NOT_SETTINGS = ("out", "overwrite", "resume", "change")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    name: str
    training: list[Entry]
    """Lines of metrics.jsonl with a loss."""
    evaluations: list[Entry]
    """Those of evaluations along the way."""
    skips: list[Entry]
    """Samples that could not be used, of all ranks, by step."""
    bad_steps: list[Entry]
    sessions: list[Session]
    settings: dict[str, Any]
    """Flag ("optim.lr") to value, from config.yaml; empty where there is none."""
    description: dict[str, Any]
    """setclip_config.json of the newest checkpoint."""
    files: list[Path] = field(default_factory=list)
    """Stacks of ranks that hung."""
    retrieved: list[Retrieved] = field(default_factory=list)
    """What queries found at the first evaluation along the way, and at the newest."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the last start says of the run; what its checkpoint says where no start is recorded."""
        return {**self.description, **(self.sessions[-1].facts if self.sessions else {})}

    @property
    def last(self) -> Entry:
        """The last line with a loss; empty where there is none."""
        return self.training[-1] if self.training else {}

    @property
    def step(self) -> int:
        """The last step that is known of."""
        steps = [self.last.get("step", 0), self.description.get("step", 0)]
        if self.sessions:
            steps.append(self.sessions[-1].end_step or self.sessions[-1].step)
        return max(steps)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        found = self.facts.get("total_steps") or self._course.get("total_steps") or self.settings.get("steps")
        return int(found) if found else None

    @property
    def recipe(self) -> str | None:
        """The recipe's name, where it is known and there is such a recipe."""
        name = self.facts.get("recipe")
        return name if name in RECIPES else None

    @cached_property
    def state(self) -> str:
        """How it ended: "finished", "stopped", "failed", "interrupted", "running", "ended without a word", or
        "unfinished" where only the steps tell.
        """
        if self.sessions:
            last = self.sessions[-1]
            if last.how is not None:
                return "failed" if last.how == "rolled back" else last.how  # as the last word, it was once too often
            return "running" if self._is_alive else "ended without a word"
        if self.total_steps and self.step >= self.total_steps:
            return "finished"
        return "running" if self._is_alive else "unfinished"

    @property
    def seconds(self) -> float | None:
        """Time of all starts together, as far as they tell; None where they do not."""
        found = [self.seconds_of(number) for number in range(len(self.sessions))]
        known = [seconds for seconds in found if seconds is not None]
        if known:
            return sum(known)
        return self.last.get("elapsed_seconds")

    def seconds_of(self, number: int) -> float | None:
        """Returns how long a start lasted, to its last line where its end is not recorded; None where nothing tells."""
        session = self.sessions[number]
        if session.ended is not None:
            return session.ended - session.started
        following = self.sessions[number + 1].started if number + 1 < len(self.sessions) else float("inf")
        times = [e["time"] for e in self.training if session.started <= e.get("time", -1) < following]
        return max(times) - session.started if times else None

    def values(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a figure over all lines that have it and where it is finite."""
        if name not in self._values:
            entries = self.training if any(name in entry for entry in self.training) else self.evaluations
            found = ((e["step"], e[name]) for e in entries if isinstance(e.get(name), int | float))
            self._values[name] = [(step, float(value)) for step, value in found if math.isfinite(value)]
        return self._values[name]

    @cached_property
    def _values(self) -> dict[str, list[tuple[int, float]]]:
        return {}

    @property
    def _course(self) -> dict[str, Any]:
        found = checkpoints_of(self.folder)
        path = found[-1] / "training_state.json" if found else None
        return json.loads(path.read_text(encoding="utf-8"))["course"] if path is not None and path.exists() else {}

    @property
    def _is_alive(self) -> bool:
        path = self.folder / METRICS_NAME
        if not path.exists():
            return bool(self.sessions) and time.time() - self.sessions[-1].started < _SILENT_SECONDS
        every = self.last.get("seconds_per_step", 0.0) * self.settings.get("log_every_steps", 1)
        touched = max(path.stat().st_mtime, self.sessions[-1].started if self.sessions else 0.0)
        return time.time() - touched < max(_SILENT_SECONDS, 5 * every)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Returns what a run folder says. Raises InputError where it is none or a file of it cannot be read."""
    metrics = folder / METRICS_NAME
    sessions = read_sessions(folder)
    if not metrics.exists() and not sessions:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise InputError(
            f"expected a run folder with {METRICS_NAME} at {folder}, found {inside or 'an empty folder'}; "
            f"`python -m pretrain.run RECIPE` makes runs under {RUNS_DIR}/"
        )
    entries = read_metrics(metrics) if metrics.exists() else []
    skips = [entry for path in sorted(folder.glob("skipped-*.jsonl")) for entry in read_lines(path)]
    bad = folder / BAD_STEPS_NAME
    checkpoints = checkpoints_of(folder)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        training=[entry for entry in entries if "loss" in entry],
        evaluations=[entry for entry in entries if "loss" not in entry],
        skips=sorted(skips, key=lambda entry: entry["step"]),
        bad_steps=read_lines(bad) if bad.exists() else [],
        sessions=sessions,
        settings=_settings_of(folder / configuration.CONFIG_NAME),
        description=read_description(checkpoints[-1]) if checkpoints else {},
        files=sorted((folder / HANG_FOLDER).glob("rank-*.txt")),
        retrieved=read_retrieved(folder),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns several runs, with names that differ. Raises InputError where a folder is named twice."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise InputError(f"expected different runs, found {', '.join(map(str, folders))}; name each once")
    names = [place.name for place in places]
    # A common name gets the folders above it, as many as it takes.
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place.parts[-depth:]) for place in places]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def find_run(where: Path, runs_dir: Path = RUNS_DIR) -> Path:
    """Returns a run folder by its path or by its name under `runs_dir`. Raises InputError that lists those there are."""
    for place in (where, runs_dir / where):
        if place.is_dir():
            return place
    known = sorted(path.name for path in runs_dir.glob("*") if _is_run(path))
    near = difflib.get_close_matches(where.name, known, n=2, cutoff=0.5)
    perhaps = f", perhaps {' or '.join(map(repr, near))}" if near else ""
    listed = ", ".join(known[:_MOST_NAMES]) + (
        f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    )
    raise InputError(
        f"expected a run folder at {where} or {runs_dir / where}, found none{perhaps}; runs in {runs_dir}/: "
        f"{listed or 'none'}"
    )


def newest_run_folder(runs_dir: Path = RUNS_DIR) -> Path:
    """Returns the run folder under `runs_dir` that has told something last. Raises InputError where there is none."""
    found = [path for name in (METRICS_NAME, SESSIONS_NAME) for path in runs_dir.glob(f"*/{name}")]
    if not found:
        raise InputError(
            f"expected runs under {runs_dir}/, found none; name a run folder, or make one with "
            "`python -m pretrain.run RECIPE`"
        )
    return max(found, key=lambda path: (path.stat().st_mtime, str(path))).parent


def recipe_settings(name: str | None) -> dict[str, Any]:
    """Returns flag to value of a recipe; of a configuration without one for None."""
    config = RECIPES[name]() if name is not None else PretrainConfig()
    return flat(configuration.to_dict(config))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns flag ("optim.lr") to value of a tree of sections, without what is no setting of training (out, resume)."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif prefix or name not in _NOT_SETTINGS:
            found[f"{prefix}{name}"] = value
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS_NAME, SESSIONS_NAME))


def _settings_of(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, found {error}; restore the file or remove it") from error
    return flat(tree) if isinstance(tree, dict) else {}
