"""An experiment's finished runs in one file beside its page, from which it goes on elsewhere, or its page is made anew.

PAGES/NAME.runs.jsonl.gz     gzip; a line is a run, as `benchmarks.claims.units` keeps it: settings, data, all figures, commit
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.experiment import Unit
from benchmarks.claims.units import Task, units_folder
from setclip.errors import InputError
from setclip.files import replacing, write_json


def write_archive(path: Path, units: Sequence[Unit]) -> None:
    """Writes runs, in their order; the same runs give the same bytes."""
    text = "".join(json.dumps(unit, ensure_ascii=False, allow_nan=False) + "\n" for unit in units)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def take_runs(path: Path, work: Path) -> int:
    """Puts the runs of an archive that `work` lacks among its own; returns how many. Raises InputError where it is none."""
    try:
        units = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        named = {Task(unit["arm"], unit["candidate"], unit["seed"], unit["settings"]).name: unit for unit in units}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected runs as NAME.runs.jsonl.gz has them, found {error!r}") from error
    folder = units_folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: unit for name, unit in named.items() if not (folder / f"{name}.json").exists()}
    for name, unit in missing.items():
        write_json(folder / f"{name}.json", unit)
    return len(missing)
