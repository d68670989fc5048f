"""An experiment's finished runs in one file beside its page, from which it goes on elsewhere, or its page is made anew.

PAGES/NAME.runs.jsonl.gz     gzip; first a line with the experiment's name and what preparing took, then a run a line as
                             `benchmarks.claims.units` keeps it: settings, data, all figures, commit
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.experiment import Experiment, Unit
from benchmarks.claims.identity import check_unit
from benchmarks.claims.units import Task, candidates_of, held, read_units, runs_folder, units_folder
from setclip.errors import InputError
from setclip.files import remove, replacing, write_json


def archive_of(pages: Path, name: str) -> Path:
    """Returns where the runs of an experiment lie beside its page."""
    return pages / f"{name}.runs.jsonl.gz"


def write_archive(path: Path, name: str, units: Sequence[Unit], prepared: Mapping[str, Any]) -> None:
    """Writes runs, in their order; the same runs give the same bytes."""
    lines = [{"experiment": name, "prepared": prepared}, *units]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def number_lacking(path: Path, units: Sequence[Unit]) -> int:
    """Returns how many runs of an archive are not among `units`; 0 where there is no archive."""
    if not path.exists():
        return 0
    there = {_name(unit) for unit in units}
    return sum(_name(unit) not in there for unit in _read(path)[1])


def take_runs(path: Path, name: str, experiment: Experiment, work: Path, expected: Mapping[str, Any]) -> int:
    """Puts the runs of an archive that `work` lacks among its own, but for those that another call is making; returns how many.

    `expected`: of `benchmarks.claims.identity`. Raises InputError, and takes none, where one is not of this experiment or was
    made with something else.
    """
    header, units = _read(path)
    if header["experiment"] != name:
        raise InputError(f"{path}: expected runs of {name}, found those of {header['experiment']}")
    there = read_units(work, expected)
    for unit in units:
        arm = experiment.arms.get(unit["arm"])
        if arm is None or (unit["candidate"], unit["settings"]) not in _as_json(candidates_of(arm)):
            raise InputError(
                f"{path}: expected runs of the experiment's arms, found one of {unit['arm']!r} with {unit['settings']}; it was "
                "published by an earlier version"
            )
        for other in (expected, units[0]["made_with"], *(each["made_with"] for each in there[:1])):
            check_unit(path, unit, other, "give another --out, or do without --take-runs")
    taken = 0
    for unit in units:
        task = _name(unit)
        file = units_folder(work) / f"{task}.json"
        with held(work, task) as is_ours:
            if is_ours and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, unit)
                remove(runs_folder(work) / task)
                taken += 1
    if not (work / "prepared.json").exists():
        write_json(work / "prepared.json", header["prepared"])
    return taken


def _as_json(candidates: Sequence[tuple[int | None, Mapping[str, Any]]]) -> list[tuple[int | None, Any]]:
    """Returns candidates with their settings as JSON has them."""
    return [(number, json.loads(json.dumps(settings))) for number, settings in candidates]


def _name(unit: Unit) -> str:
    return Task(unit["arm"], unit["candidate"], unit["seed"], unit["settings"]).name


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the first line, and the runs. Raises InputError where it is no archive."""
    try:
        header, *units = (json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1])
        header["experiment"], header["prepared"]
        for unit in units:
            unit["values"], unit["held_out"], unit["provenance"]["commit"], int(unit["seed"]), _name(unit)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected runs as NAME.runs.jsonl.gz has them, found {error!r}") from error
    return header, units
