"""Makes one folder of shards from the units that a preparation's jobs have packed.

    python -m data_prep.merge OUT

`data_prep.run` does this by itself unless it is one of several parts. It may be killed and started again at any time:
every shard appears whole or not at all, the manifest comes last, and what comes out depends on the units only.
"""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from data_prep import near, output, pos_config, statistics
from data_prep.duplicates import Decision, find_duplicates
from data_prep.pack import UnitReport
from data_prep.parallel import run_tasks
from data_prep.tally import Tally
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import remove, replacing
from setclip.log import say
from setclip.manifest import MANIFEST_NAME, Manifest
from setclip.objects import OBJECTS_NAME
from setclip.shards import Shard, ShardInfo, ShardWriter


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Makes one folder of shards from what the jobs of a preparation have packed."""

    out: tyro.conf.Positional[Path]
    """The preparation's --out."""
    processes: int = 0
    """Processes that write; 0 takes the CPUs of this job. The output does not depend on it."""
    max_bad: float = 0.05
    """Share of samples that may be left out as bad; more than that stops the merge."""


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """A unit's shard on its way into the folder."""

    path: Path
    split: str
    info: ShardInfo
    name: str = ""
    """Its final one; "" where nothing is left of it."""


def merge(out: Path, processes: int, max_bad: float) -> Manifest:
    """Merges the finished units of `out` into its shards, statistics and manifest, which is written last.

    Raises InputError that names the inputs that are not done, and where another job is at work.
    """
    output.read_plan(out)
    with output.locked(out):
        return merge_units(out, processes, max_bad)


def merge_units(out: Path, processes: int, max_bad: float) -> Manifest:
    """Does `merge`'s work, for a job that has the folder for itself."""
    from data_prep import report  # with matplotlib, which takes a second that a wrong path need not wait for

    plan = output.read_plan(out)
    units = _reports(out, plan)
    tally = Tally()
    for unit in units:
        tally.add(unit)
    tally.check(max_bad)
    packed = [
        _Packed(path=output.unit_folder(out, number) / info.name, split=unit.split, info=info)
        for number, unit in enumerate(units)
        for info in unit.shards
    ]
    if not packed:
        raise InputError(f"expected at least one good sample, found none; {_dropped(units)} were left out")
    scratch = out / output.WORK_NAME / "scratch"
    remove(scratch)
    scratch.mkdir()
    indices = [shard.path.with_suffix(".idx") for shard in packed]
    splits = [shard.split for shard in packed]
    decisions = find_duplicates(indices, splits, scratch)
    settings = plan["config"]
    if settings["near_duplicates"] or settings["decontaminate"]:
        near.leave_out_alike(
            decisions,
            indices,
            splits,
            scratch,
            bits=settings["alike_bits"],
            near_duplicates=settings["near_duplicates"],
            evaluation=near.evaluation_hashes(settings["decontaminate"]),
        )
    packed = _named(packed, decisions)
    final = [shard.name for shard in packed if shard.name]
    duplicates = Counter(reason for decision in decisions.values() for reason in decision.leave_out.values())
    if not final:
        raise InputError(
            f"expected at least one sample to be left, found all left out: {dict(_dropped(units) + duplicates)}; change the "
            "settings that leave them out, with --overwrite True"
        )
    folders = plan["class_folders"]
    output.announce(out, [*final, *(str(Path(name).with_suffix(".idx")) for name in final)], folders)
    tasks = [
        (partial(place_shard, shard.path, shard.info, out / shard.name, decisions.get(number)), shard.info.samples)
        for number, shard in enumerate(packed)
        if shard.name
    ]
    infos = run_tasks(
        [task for task, _ in tasks], processes, description="merging shards", sizes=[size for _, size in tasks]
    )
    for name in folders:
        with replacing(out / name) as temporary:
            shutil.copytree(output.class_folder(out, name), temporary, copy_function=_link)
    counts = statistics.write_statistics(out, statistics.counted_shards(infos))
    manifest = _manifest(plan, units, infos, _dropped(units) + duplicates, duplicates.total(), list(folders))
    report.write_report(out, manifest)
    manifest.save(out)
    output.release(out)
    _say_summary(out, manifest, counts)
    return manifest


def place_shard(packed: Path, info: ShardInfo, target: Path, decision: Decision | None) -> ShardInfo:
    """Puts a unit's shard under its final name, without the rows that are left out; returns its entry."""
    if decision is None:
        for source, final in ((packed, target), (packed.with_suffix(".idx"), target.with_suffix(".idx"))):
            with replacing(final) as temporary:
                _link(source, temporary)
        return dataclasses.replace(info, name=target.name)
    shard = Shard(packed)
    with ShardWriter(target, info.split) as writer:
        for row in range(len(shard)):
            if row in decision.rename:
                writer.copy(shard, row, key=decision.rename[row])
            elif row not in decision.leave_out:
                writer.copy(shard, row)
    return writer.info


def _link(source: str | Path, target: str | Path) -> None:
    """Gives the bytes of a file a second name."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _reports(out: Path, plan: dict[str, Any]) -> list[UnitReport]:
    names = plan["units"]
    digest = output.digest(plan)
    reports = [output.unit_report(out, number, digest) for number in range(len(names))]
    missing = [str(name) for name, report in zip(names, reports, strict=True) if report is None]
    missing += [name for name in plan["class_folders"] if not output.class_folder(out, name).exists()]
    if missing:
        more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
        raise InputError(
            f"expected all {len(names):,} inputs to be packed in {out}, found {len(missing):,} that are not: "
            f"{', '.join(missing[:10])}{more}; start the jobs of these parts again (or one job without --part, which does "
            "what is left), then merge"
        )
    return [report for report in reports if report is not None]


def _named(packed: list[_Packed], decisions: Mapping[int, Decision]) -> list[_Packed]:
    """Gives the shards that are not empty their final names, numbered within each split."""
    numbers: Counter[str] = Counter()
    named = []
    for place, shard in enumerate(packed):
        if place in decisions and len(decisions[place].leave_out) == shard.info.samples:
            named.append(shard)
            continue
        named.append(dataclasses.replace(shard, name=f"{shard.split}-{numbers[shard.split]:05d}.tar"))
        numbers[shard.split] += 1
    return named


def _dropped(units: Iterable[UnitReport]) -> Counter[str]:
    total: Counter[str] = Counter()
    for unit in units:
        total.update(unit.dropped())
    return total


def _manifest(
    plan: dict[str, Any],
    units: list[UnitReport],
    infos: list[ShardInfo],
    dropped: Mapping[str, int],
    duplicates: int,
    class_folders: list[str],
) -> Manifest:
    versions = {unit.parser for unit in units}
    if len(versions) != 1:
        raise InputError(
            f"expected inputs that one version of the parser has parsed, found {sorted(versions)}; the jobs ran in "
            "different environments: begin anew in one of them with --overwrite True"
        )
    listed = sum(unit.pairs_listed for unit in units)
    samples = sum(info.samples for info in infos)
    lost = sum(left.samples for unit in units for left in unit.left_out) + duplicates
    if samples + lost != sum(unit.samples_listed for unit in units):
        raise RuntimeError(f"{samples} samples in the shards and {lost} left out do not make those listed")
    return Manifest(
        source=plan["source"],
        shards=infos,
        dropped=dict(dropped),
        samples_listed=sum(unit.samples_listed for unit in units),
        pairs_listed=max(listed, plan["pairs_listed"] or 0),
        pairs_present=sum(info.captions for info in infos),
        resized=sum(unit.resized for unit in units),
        inputs={
            unit.name: {"listed": unit.samples_listed, "packed": unit.samples_present, "dropped": unit.dropped()}
            for unit in units
        },
        config={**plan["config"], "class_folders": class_folders},
        parsers={pos_config.NAME: versions.pop()},
        credits=plan["credits"],
        warnings=plan["warnings"],
        plan=output.digest(plan),
    )


def _say_summary(out: Path, manifest: Manifest, counts: Mapping[str, statistics.ObjectCounts]) -> None:
    for split, total in manifest.totals().items():
        say(
            f"{split}: {total['samples']:,} samples, {total['captions']:,} captions, {total['bytes'] / 1e6:,.1f} MB "
            f"in {total['shards']:,} shards"
        )
    for reason, number in sorted(manifest.dropped.items(), key=lambda item: -item[1]):
        say(f"dropped: {number:,} {reason}")
    for parser, total in counts.items():
        say(statistics.describe(parser, total))
    say(f"{manifest.pairs_present:,} of {manifest.pairs_listed:,} pairs present")
    say(f"shards, manifest, statistics and {output.REPORT_PAGE}: {out}")


def main() -> None:
    config = parse(MergeConfig, description=__doc__)
    if output.is_complete(config.out):
        output.release(config.out)  # where a merge was killed behind its manifest
        say(f"{config.out} is complete already: {MANIFEST_NAME} and {OBJECTS_NAME} are there")
        return
    merge(config.out, config.processes, config.max_bad)


if __name__ == "__main__":
    command(main)
