"""Makes shards with parsed objects, statistics and a manifest from a source of images and captions.

    python -m data_prep.run scenes --out data/scenes
    python -m data_prep.run folder --images DIR_OR_TAR --captions FILE.jsonl --out data/mine
    python -m data_prep.run cc12m --tars DIR --out data/cc12m

`python -m data_prep.run SOURCE --help` lists the flags of a source. Killed at any time, the same command goes on where
it was. Several jobs share the work with `--part I --parts N` (a Slurm array sets both); afterwards
`python -m data_prep.merge OUT` makes one folder of it, with the same bytes as one job.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_prep import near, output
from data_prep.merge import merge_units
from data_prep.pack import PackRules, UnitReport, pack_unit
from data_prep.parallel import run_tasks
from data_prep.parts import part_of
from data_prep.plan import Plan, PrepareConfig
from data_prep.sources import coco, corpora, cub, flickr30k, folder, parquet, scenes, tars
from data_prep.tally import Tally
from setclip.config import command, parse_recipe, to_dict
from setclip.errors import InputError
from setclip.files import replacing
from setclip.log import say, warn
from setclip.lookup import look_up
from setclip.manifest import FORMAT_VERSION, WORK_NAME, Manifest

_SAMPLES_BEFORE_CEILING = 2_000  # seen before a share of bad samples stops a job that is not at its end

# Flags without influence on the samples: they stay out of the manifest, so that equal data has equal manifests.
_NOT_DATA = ("out", "overwrite", "processes", "part", "parts", "max_bad")


@dataclass(frozen=True)
class Source:
    """One entry of SOURCES."""

    config: type[Any]
    """A dataclass derived from PrepareConfig."""
    plan: Callable[[Any], Plan]


SOURCES: Mapping[str, Source] = {
    "scenes": Source(scenes.ScenesConfig, scenes.plan),
    "folder": Source(folder.FolderConfig, folder.plan),
    "tars": Source(tars.TarsConfig, tars.plan),
    "parquet": Source(parquet.ParquetConfig, parquet.plan),
    "cc3m": Source(corpora.CorpusConfig, corpora.plan_cc3m),
    "cc12m": Source(corpora.CorpusConfig, corpora.plan_cc12m),
    "yfcc15m-clip": Source(corpora.YfccConfig, corpora.plan_yfcc15m_clip),
    "yfcc15m-declip": Source(corpora.YfccConfig, corpora.plan_yfcc15m_declip),
    "flickr30k": Source(flickr30k.Flickr30kConfig, flickr30k.plan),
    "coco": Source(coco.CocoConfig, coco.plan),
    "cub": Source(cub.CubConfig, cub.plan),
}


def prepare(source: str, config: PrepareConfig) -> Manifest | None:
    """Carries out a source's plan, or this job's part of it, in `config.out`.

    Returns the manifest, or None where this is one of several parts: their merge is another command.
    """
    part, parts = part_of(config.part, config.parts)
    near.check_folders(config.decontaminate)
    plan = look_up(SOURCES, source, "source").plan(config)
    if len({unit.name for unit in plan.units}) != len(plan.units):
        raise ValueError(f"source {source!r} plans units with equal names")
    if not plan.units:
        raise InputError(f"expected at least one input of source {source!r}, found none; check its paths")
    if config.overwrite and parts > 1:
        raise InputError(
            f"expected --overwrite True from one job alone, found {parts} parts, which would remove each other's work; "
            f"remove {config.out} first, or choose another --out"
        )
    settings = {name: value for name, value in to_dict(config).items() if name not in _NOT_DATA}
    described = {
        "source": source,
        "config": settings,
        "units": [unit.name for unit in plan.units],
        "splits": [unit.split for unit in plan.units],
        "class_folders": list(plan.folders),
        "pairs_listed": plan.pairs_listed,
        "credits": plan.credits,
        "warnings": plan.warnings,
        "format_version": FORMAT_VERSION,
    }
    state = output.claim(config.out, described, config.overwrite)
    if state == "complete":
        say(f"{config.out} is complete already, with these settings and inputs")
        if (config.out / WORK_NAME).exists():  # a merge was killed behind its manifest
            with output.locked(config.out):
                output.release(config.out)
        return Manifest.load(config.out)
    for text in plan.warnings:
        warn(text)
    with output.locked(config.out, part, parts):
        _pack(plan, config, part, parts, output.digest(described), is_resumed=state == "unfinished")
        if parts == 1:
            return merge_units(config.out, config.processes, config.max_bad)
    say(f"part {part} of {parts} is done; after the last one: python -m data_prep.merge {config.out}")
    return None


def _pack(plan: Plan, config: PrepareConfig, part: int, parts: int, digest: str, is_resumed: bool) -> None:
    """Packs the units of this part that are not done."""
    mine = range(part, len(plan.units), parts)
    done: list[UnitReport] = []
    left: list[int] = []
    changed: list[str] = []
    for number in mine:
        report = output.unit_report(config.out, number, digest)
        if report is not None and report.state == plan.units[number].state:
            done.append(report)
        else:
            left.append(number)
            changed += [plan.units[number].name] if report is not None else []
            output.clear_unfinished(config.out, number)
    if parts > 1:
        say(f"part {part} of {parts}: {len(mine):,} of {len(plan.units):,} inputs")
    if changed:
        say(f"{len(changed):,} inputs changed since they were packed and are packed again: {', '.join(changed[:10])}")
    if is_resumed and done:
        say(f"going on: {len(done):,} of {len(mine):,} inputs were done before")
    rules = PackRules.from_config(config)
    tally = Tally()
    for report in done:
        tally.add(report)

    def seen(report: UnitReport) -> str:
        tally.add(report)
        if tally.listed >= _SAMPLES_BEFORE_CEILING:
            tally.check(config.max_bad)
        return f"{tally.packed:,} samples, {tally.listed - tally.packed:,} left out"

    run_tasks(
        [partial(pack_unit, plan.units[n], output.unit_folder(config.out, n), rules, digest) for n in left],
        config.processes,
        description="packing",
        sizes=[1] * len(left),
        unit="inputs",
        seen=seen,
    )
    tally.check(config.max_bad)
    for name, fill in plan.folders.items() if part == 0 else ():
        folder = output.class_folder(config.out, name)
        if not folder.exists():
            with replacing(folder) as temporary:
                pictures = fill(temporary)
            say(f"{name}: {pictures:,} held-out pictures in class folders")


def main() -> None:
    """The command."""
    configs = {name: source.config for name, source in SOURCES.items()}
    prepare(*parse_recipe(configs, description=__doc__ or "", what="source"))


if __name__ == "__main__":
    command(main)
