"""Runs what an experiment lacks, one restartable unit at a time; each leaves one small JSON file, beside-and-renamed.

    WORK/units/ARM-seed0.json          a run: what it was, what it measured, what it took
    WORK/units/ARM-try1-seed0.json     one of several candidates
    WORK/runs/…                        of units that are not done

Killed at any time, the same call goes on: a unit is done when its file is there, and a run goes on from its own checkpoints.
Several calls at once, on cores or machines that share the folder, share the units: each takes those that no other holds.
"""

import contextlib
import fcntl
import json
import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims.experiment import Arm, Experiment, Options
from benchmarks.claims.identity import check_unit, common_settings, made_with
from setclip.errors import InputError
from setclip.files import remove, remove_partial, write_json
from setclip.log import duration, say
from setclip.provenance import describe


@dataclass(frozen=True)
class Task:
    """A unit, done or not."""

    arm: str
    candidate: int | None
    """Of several; None where the arm has one setting"""
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """That of its file."""
        tried = "" if self.candidate is None else f"-try{self.candidate}"
        return f"{re.sub(r'[^a-z0-9.]+', '-', self.arm.lower())}{tried}-seed{self.seed}"


def units_folder(work: Path) -> Path:
    """Returns where the units of an experiment lie."""
    return work / "units"


def runs_folder(work: Path) -> Path:
    """Returns where the runs of units that are not done lie."""
    return work / "runs"


def read_units(work: Path, expected: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the content of all finished units, by name.

    `expected`: of `benchmarks.claims.identity`. Raises InputError where a unit was made with something else, or two units
    not with the same.
    """
    paths = sorted(units_folder(work).glob("[!.]*.json"))
    units = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, unit in zip(paths, units, strict=True):
        check_unit(path, unit, expected)
        check_unit(path, unit, units[0]["made_with"])
    return units


def read_unit(work: Path, task: Task) -> dict[str, Any] | None:
    """Returns a unit's content; None where it is not done. Raises InputError where it is of other settings."""
    path = units_folder(work) / f"{task.name}.json"
    if not path.exists():
        return None
    unit = json.loads(path.read_text(encoding="utf-8"))
    if unit["settings"] != json.loads(json.dumps(task.settings)):
        raise InputError(
            f"{path}: expected a run with settings {dict(task.settings)}, found one with {unit['settings']}; remove that file, "
            "or give another --out"
        )
    return unit


def candidates_of(arm: Arm) -> list[tuple[int | None, dict[str, Any]]]:
    """Returns (number, settings) of what is tried of an arm."""
    if not arm.candidates:
        return [(None, dict(arm.settings))]
    return [(number, {**arm.settings, **extra}) for number, extra in enumerate(arm.candidates)]


def chosen_task(experiment: Experiment, work: Path, arm_name: str, seed: int) -> Task | None:
    """Returns the unit of an arm with a seed, by the candidate that held-out data chose; None: not all were tried yet."""
    arm = experiment.arms[arm_name]
    tried = [Task(arm_name, number, 0, settings) for number, settings in candidates_of(arm)]
    if len(tried) > 1:
        found = [read_unit(work, task) for task in tried]
        if any(unit is None for unit in found):
            return None
        scores = [unit["held_out"][experiment.chosen_by] for unit in found if unit is not None]
        best = tried[scores.index(max(scores))]
    else:
        best = tried[0]
    return Task(arm_name, best.candidate, 0 if arm.is_fixed else seed, best.settings)


def tasks_of(experiment: Experiment, work: Path, seeds: int) -> Iterator[Task]:
    """Yields what there is to do, done or not: the first seed of everything, then seed by seed what was chosen.

    An experiment that is broken off then is a fair one with fewer seeds. Arms that come last follow in the same way.
    What waits for candidates that another call is trying is left out.
    """
    for is_last in (False, True):
        arms = {name: arm for name, arm in experiment.arms.items() if arm.comes_last == is_last}
        for name, arm in arms.items():
            for number, settings in candidates_of(arm):
                yield Task(name, number, 0, settings)
        for seed in range(1, seeds):
            for name, arm in arms.items():
                if not arm.is_fixed:
                    task = chosen_task(experiment, work, name, seed)
                    if task is not None:
                        yield task


def run_missing(
    experiment: Experiment, work: Path, shared: Path, options: Options, seeds: int, max_hours: float | None = None
) -> int:
    """Runs the units that are not done; returns how many it ran.

    `shared`: where data lie that several experiments take. With `max_hours` no unit is begun that would, as far as those
    before tell, not end within it.
    """
    begun = time.monotonic()
    units_folder(work).mkdir(parents=True, exist_ok=True)
    read_units(work, common_settings(experiment, options))
    prepared: Any = None
    common: dict[str, Any] = {}
    done, longest = 0, 0.0
    while True:
        before, others = done, 0
        for task in tasks_of(experiment, work, seeds):
            if read_unit(work, task) is not None:
                continue
            with held(work, task.name) as is_ours:
                if not is_ours:
                    others += 1
                    continue
                if read_unit(work, task) is not None:
                    continue
                if prepared is None:
                    prepared = _prepared(experiment, work, shared, options)
                    common = made_with(experiment, options, prepared)
                    read_units(work, common)
                if max_hours is not None and time.monotonic() - begun + longest > 3600 * max_hours:
                    say(f"--max-hours {max_hours:g} is used up; the same command goes on with {task.name}")
                    return done
                longest = max(longest, _run(experiment, prepared, task, common, work))
                done += 1
        if done == before:
            if others:
                say(f"{others} runs are being made by other calls, which go on with what waits for them")
            return done


def _run(experiment: Experiment, prepared: Any, task: Task, common: Mapping[str, Any], work: Path) -> float:
    """Makes a unit; returns its seconds."""
    place = runs_folder(work) / task.name
    say(f"\n{task.name}: {dict(task.settings)}")
    start, cpu = time.monotonic(), _cpu_seconds()
    found = experiment.run(prepared, task.settings, task.seed, place)
    seconds = time.monotonic() - start
    remove_partial(units_folder(work), task.name)
    write_json(
        units_folder(work) / f"{task.name}.json",
        {
            "arm": task.arm,
            "candidate": task.candidate,
            "seed": task.seed,
            "settings": dict(task.settings),
            "made_with": common,
            **asdict(found),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(_cpu_seconds() - cpu, 2),
            "provenance": describe(),
        },
    )
    remove(place)
    say(f"{task.name}: done in {duration(seconds)}")
    return seconds


@contextlib.contextmanager
def held(work: Path, name: str) -> Iterator[bool]:
    """Holds a unit while within; yields whether it is ours."""
    with locked(work / "locks" / name) as is_ours:
        yield is_ours


@contextlib.contextmanager
def locked(path: Path, *, waits: bool = False) -> Iterator[bool]:
    """Holds the lock of a file while within; yields whether it is ours. It ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _prepared(experiment: Experiment, work: Path, shared: Path, options: Options) -> Any:
    with contextlib.ExitStack() as stack:  # experiments share the data
        if not stack.enter_context(locked(shared / ".lock")):
            say(f"waiting for another call that prepares data in {shared}")
            stack.enter_context(locked(shared / ".lock", waits=True))
        start, cpu = time.monotonic(), _cpu_seconds()
        prepared = experiment.prepare(work, shared, options)
        path = work / "prepared.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cpu_seconds": 0.0, "sittings": 0}
        write_json(
            path,
            {
                **before,
                "cpu_seconds": round(before["cpu_seconds"] + _cpu_seconds() - cpu, 2),
                "sittings": before["sittings"] + 1,
                "last_seconds": round(time.monotonic() - start, 2),
            },
        )
        return prepared


def _cpu_seconds() -> float:
    """Returns CPU time of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def seeds_done(units: Sequence[Mapping[str, Any]], arm: str, candidate: int | None) -> list[int]:
    """Returns the seeds that an arm has with a candidate, in order."""
    return sorted(unit["seed"] for unit in units if unit["arm"] == arm and unit["candidate"] == candidate)
