"""What makes a finished run one of this experiment: full or quick, common settings, device, data. Used by the runner.

The same words in `Task.settings` are another run with other steps or other photographs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.experiment import Experiment, Options, Unit
from setclip.errors import InputError
from setclip.manifest import Manifest

_NOT_THE_RESULT = {
    *("change", "check_memory", "device", "out", "overwrite", "ranks", "resume", "workers"),
    *("guard", "keep", "log", "log_every_steps", "save", "save_every_minutes"),
}
"""Settings of how a run is made, kept and told, which do not decide what it measures"""


def common_settings(experiment: Experiment, options: Options) -> dict[str, Any]:
    """Returns what is known without data: quick or not, and the settings of all runs by dotted names."""
    found: dict[str, Any] = json.loads(json.dumps({"quick": options.quick, **flat(experiment.settings)}))
    return found


def device_of(options: Options) -> str:
    """Returns the device on which runs are made here."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device


def made_with(experiment: Experiment, options: Options, prepared: Any) -> dict[str, Any]:
    """Returns all that a unit keeps of what it was made with."""
    made_of = json.loads(json.dumps(experiment.made_of(prepared)))
    return {**common_settings(experiment, options), "device": device_of(options), **made_of}


def shards_of(*folders: str | Path) -> dict[str, Any]:
    """Returns the name of each folder of shards to its manifest's digest and its samples by split."""
    found = {}
    for folder in map(Path, folders):
        identity = Manifest.load(folder).identity()
        samples = {split: totals["samples"] for split, totals in identity["totals"].items()}
        found[folder.name] = {"digest": identity["digest"], "samples": samples}
    return found


def check_unit(
    path: Path, unit: Unit, expected: Mapping[str, Any], what_to_do: str = "remove that file, or give another --out"
) -> None:
    """Raises InputError where a unit was made with something else than `expected`.

    Names that only one of them has are settings that came or went with a version, and are not compared.
    """
    found = unit.get("made_with")
    if found is None:
        raise InputError(
            f'{path}: expected a run with "made_with" (quick, settings, device, data), found none, so of an earlier '
            f"version; {what_to_do}"
        )
    for name in expected:
        if name in found and found[name] != expected[name]:
            raise InputError(
                f"{path}: expected a run made with {name} {expected[name]}, found one with {found[name]}; {what_to_do}"
            )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted names, without those that do not decide what a run measures."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _NOT_THE_RESULT:
            continue
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
