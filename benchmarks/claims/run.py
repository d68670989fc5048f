"""Runs one of the papers' claims as an experiment: data, training of all arms, evaluation, table, paired test, figure.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.claims sets --jobs 2    # two runs at a time
    python -m benchmarks.claims labels --max-hours 0.5      # one sitting; the same command goes on
    python -m benchmarks.claims labels --arms "smoothing 0.5" "budget 0.5" --seeds 3 --jobs 2    # the smallest
    python -m benchmarks.claims sets --table-only True      # the page of what is there
    python -m benchmarks.claims domains --take-runs docs/claims/domains.runs.jsonl.gz --seeds 7    # from published runs

Every run is a file of its own under --out, so an experiment goes on at any point, and the same command started twice,
on machines with one folder, shares the runs. At the end of each sitting the page is written anew: PAGES/NAME.md, .json,
.svg and, of a whole experiment, .runs.jsonl.gz. `NAME --help` lists the flags.
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.claims import page
from benchmarks.claims.archive import archive_of, number_lacking, take_runs, write_archive
from benchmarks.claims.experiment import Arm, Experiment, Options
from benchmarks.claims.figure import write_figure
from benchmarks.claims.identity import common_settings, device_of
from benchmarks.claims.jobs import in_processes
from benchmarks.claims.registry import EXPERIMENTS
from benchmarks.claims.units import read_units, run_missing
from pretrain.stopping import run_to_its_end
from setclip import config as configuration
from setclip.errors import InputError
from setclip.files import replacing, write_json
from setclip.log import say
from setclip.lookup import look_up

ROOT = Path("runs/claims")


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """Runs what an experiment lacks, and writes its page."""

    quick: bool = False
    """Tiny data and models, under a minute: shows that it runs, and is no evidence. Its page stays in its folder."""
    out: Path | None = None
    """Folder of data, runs and results; None: runs/claims/NAME. Runs that are done there are not run again."""
    pages: Path | None = None
    """Folder of the page; None: docs/claims, of a part (--arms, fewer --seeds) and with --quick the folder of the runs."""
    json: Path | None = None
    """Another file for the page's figures."""
    seeds: int | None = None
    """Seeds of each arm; None: the experiment's own."""
    arms: tuple[str, ...] = ()
    """Run these arms alone, by name; (): all. The page has what is there of every arm."""
    jobs: int = 1
    """Processes that share the runs, each with its part of the cores."""
    max_hours: float | None = None
    """Begin no run that would end after so many hours of this sitting."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    take_runs: Path | None = None
    """A NAME.runs.jsonl.gz, of which the runs that --out lacks are taken: to go on from, or for --table-only."""
    table_only: bool = False
    """Run nothing; write the page of what is there."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, found {self.seeds}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, found {self.jobs}")
        if self.max_hours is not None and self.max_hours <= 0:
            raise ValueError(f"max_hours must be above 0, found {self.max_hours}")


def claims(name: str, config: ClaimsConfig) -> Path:
    """Runs what is missing of an experiment and writes its page; returns the page."""
    experiment = EXPERIMENTS[name](_options(config))
    look_up_arms(experiment, config)
    if config.take_runs is not None:
        expected = common_settings(experiment, _options(config))
        if not config.table_only:
            expected |= {"device": device_of(_options(config))}
        number = take_runs(config.take_runs, experiment.units_of or name, experiment, _work(name, config), expected)
        say(f"{number} runs taken from {config.take_runs}")
    failures: list[str] = []
    if not config.table_only:
        ends = None if config.max_hours is None else time.time() + 3600 * config.max_hours
        if config.jobs > 1:
            failures = in_processes(partial(share, name, config, ends), config.jobs, _work(name, config) / "jobs")
        if not failures:  # what waited for what another process made, too
            share(name, config, ends)
    path = write_page(name, experiment, config)
    if failures:
        raise InputError(
            f"expected {config.jobs} processes to end well; the same command goes on: " + "\n".join(failures)
        )
    return path


def share(name: str, config: ClaimsConfig, ends: float | None) -> int:
    """Runs what no other process holds of what is missing, until a time of the clock; returns how many runs that were."""
    experiment = EXPERIMENTS[name](_options(config))
    wanted = replace(experiment, arms=look_up_arms(experiment, config))
    data = _out(name, config).parent / "data"
    hours = None if ends is None else (ends - time.time()) / 3600
    return run_missing(wanted, _work(name, config), data, _options(config), config.seeds or experiment.seeds, hours)


def look_up_arms(experiment: Experiment, config: ClaimsConfig) -> dict[str, Arm]:
    """Returns the arms that were asked for; raises InputError where one is unknown."""
    return {arm: look_up(experiment.arms, arm, "arm") for arm in config.arms or experiment.arms}


def _options(config: ClaimsConfig) -> Options:
    return Options(quick=config.quick, device=config.device)


def _out(name: str, config: ClaimsConfig) -> Path:
    return config.out or ROOT / (f"{name}-quick" if config.quick else name)


def _work(name: str, config: ClaimsConfig) -> Path:
    """Returns the folder of the runs, which may be another experiment's."""
    units_of = EXPERIMENTS[name](_options(config)).units_of
    out = _out(name, config)
    return out if units_of is None or config.out else ROOT / (units_of + out.name[len(name) :])


def write_page(name: str, experiment: Experiment, config: ClaimsConfig) -> Path:
    """Writes the page of the runs that are there and were asked for; returns its place."""
    work = _work(name, config)
    path = work / "prepared.json"
    prepared = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seeds = config.seeds or experiment.seeds
    is_part = bool(config.arms) or seeds < experiment.seeds
    command = f"python -m benchmarks.claims {name}" + (" --quick True" if config.quick else "")
    command += f" --arms {shlex.join(config.arms)}" if config.arms else ""
    command += f" --seeds {config.seeds}" if config.seeds else ""
    units = read_units(work, common_settings(experiment, _options(config)))
    if is_part:
        units = [unit for unit in units if unit["arm"] in (config.arms or experiment.arms) and unit["seed"] < seeds]
    content = page.gather(name, experiment, units, prepared, command)
    pages = config.pages or (work if is_part or config.quick else Path("docs/claims"))
    content["runs_file"] = None
    if not is_part and not config.quick and experiment.units_of is None:
        own = [unit for unit in units if unit["arm"] in experiment.arms]
        archive = archive_of(pages, name)
        lacking = number_lacking(archive, own)
        if lacking:
            say(
                f"note: {archive} has {lacking} run{'s' if lacking > 1 else ''} not in {work}, so it and its page stay, and this "
                f"page lies beside the runs; --take-runs {archive} adds those to these, and without that file these are published"
            )
            pages = work
        else:
            pages.mkdir(parents=True, exist_ok=True)
            write_archive(archive, name, own, prepared)
            content["runs_file"] = archive.name
    pages.mkdir(parents=True, exist_ok=True)
    write_json(pages / f"{name}.json", content)
    content = json.loads((pages / f"{name}.json").read_text(encoding="utf-8"))
    figure = None
    if content["plot"] is not None:
        figure = f"{name}.svg"
        write_figure(pages / figure, content["plot"])
    with replacing(pages / f"{name}.md") as temporary:
        temporary.write_text(page.markdown(content, figure), encoding="utf-8")
    if config.json is not None:
        write_json(config.json, content)
    for claim in content["claims"]:
        say(f"{claim['verdict']:37} {claim['text']} ({claim['seeds']} seeds)")
    say(f"page: {pages / f'{name}.md'}")
    return pages / f"{name}.md"


def main() -> None:
    """The command."""
    configs = dict.fromkeys(EXPERIMENTS, ClaimsConfig)
    name, config = configuration.parse_recipe(configs, sys.argv[1:], __doc__ or "", what="experiment")
    run_to_its_end(lambda: claims(name, config))
