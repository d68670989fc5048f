"""Makes damaged shards whole again by leaving out the samples that are broken. Used by `data_prep.verify --repair True`.

A shard is written anew beside the old one and renamed, shards without one whole sample are removed, then statistics,
report and, last of all, the manifest are written. Killed at any moment, the same command finishes: until then the
manifest is the old one, and a shard that differs from it but is whole in itself is taken as it is.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep import report, statistics
from data_prep.parallel import run_tasks
from data_prep.shard_check import CheckRules, ShardCheck, ShardReport
from setclip.errors import InputError
from setclip.files import remove
from setclip.manifest import Manifest
from setclip.shards import ShardInfo, ShardWriter

DAMAGED = "dropped by repair (damaged sample)"
LOST = "dropped by repair (lost shard)"


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a repair did."""

    rewritten: list[str]
    lost: list[str]
    """Shards without a whole sample, which are gone."""
    dropped: int
    """Samples."""
    unproven: int
    """Samples that were kept because they decode to the right size, though nothing vouches for every byte."""


def repair(
    folder: Path,
    manifest: Manifest,
    reports: Sequence[ShardReport],
    repeated: Mapping[str, frozenset[str]],
    rules: CheckRules,
    processes: int,
) -> Repaired:
    """Mends `folder`, whose check found `reports` (one a shard of the manifest, in its order).

    `repeated` names keys by shard that an earlier shard has, too. Raises InputError, before anything is changed, where
    a shard cannot be read for reasons that lie outside of it, or where no sample would be left.
    """
    _check_possible(folder, manifest, reports)
    for partial_file in folder.glob(".*.partial*"):  # of a repair that was killed while it wrote
        remove(partial_file)
    pairs = list(zip(manifest.shards, reports, strict=True))
    broken = [i for i, r in pairs if r.whole and (r.must_be_rewritten or repeated.get(i.name))]
    tasks = [partial(rewrite_shard, folder, i, rules, repeated.get(i.name, frozenset())) for i in broken]
    try:
        written = run_tasks(tasks, processes, description="rewriting shards", sizes=[info.samples for info in broken])
        anew = {info.name: info for info in written}
        entries = [anew.get(info.name) or _as_found(info, found) for info, found in pairs]
        kept = [entry for entry in entries if entry.samples]
        for entry in entries:
            if not entry.samples:
                (folder / entry.name).unlink(missing_ok=True)
                (folder / entry.name).with_suffix(".idx").unlink(missing_ok=True)
        dropped = _dropped(pairs, entries)
        statistics.write_statistics(folder, statistics.counted_shards(kept))
        mended = _manifest(manifest, kept, dropped)
        report.write_report(folder, mended)
        mended.save(folder)
    except OSError as error:
        raise InputError(
            f"expected to write to {folder}, found {error}; mend that (free space, permissions) and start the repair again: "
            "it goes on where it was"
        ) from error
    return Repaired(
        rewritten=[info.name for info in written if info.samples],
        lost=[entry.name for entry in entries if not entry.samples],
        dropped=sum(dropped.values()),
        unproven=sum(found.unproven for found in reports),
    )


def rewrite_shard(folder: Path, info: ShardInfo, rules: CheckRules, without: frozenset[str]) -> ShardInfo:
    """Replaces a shard and its index by ones with its whole samples but those of the keys `without`."""
    check = ShardCheck(folder, info, rules)
    check.run()
    with ShardWriter(folder / info.name, info.split) as writer:
        for sample, features in check.samples():
            if sample.key not in without:
                writer.add(sample, features)
    return writer.info


def _check_possible(folder: Path, manifest: Manifest, reports: Sequence[ShardReport]) -> None:
    unreadable = [found for found in reports if not found.is_readable]
    if unreadable:
        raise InputError(
            f"expected to read all shards of {folder}, found {len(unreadable):,} that cannot be read, which says nothing "
            f"about what they hold: {unreadable[0].name}: {unreadable[0].faults[0].what}; mend that, then repair"
        )
    names = [info.name for info in manifest.shards]
    if len(set(names)) < len(names):
        raise InputError(
            f"{folder}: expected each shard once in the manifest, found one twice; prepare the shards again"
        )
    if not any(found.whole for found in reports):
        raise InputError(
            f"expected whole samples in {folder}, found none in any of {len(reports):,} shards; nothing was changed: copy "
            "or prepare the folder again"
        )


def _as_found(info: ShardInfo, found: ShardReport) -> ShardInfo:
    return ShardInfo(
        name=info.name,
        split=info.split,
        samples=found.whole,
        captions=found.captions,
        bytes=found.bytes,
        sha256=found.sha256,
    )


def _dropped(pairs: Sequence[tuple[ShardInfo, ShardReport]], entries: Sequence[ShardInfo]) -> Counter[str]:
    """Returns reason to number of samples.

    From numbers that a repair which was killed and started again finds too: of a tar that is as it was written its own
    number of samples, else that of the manifest.
    """
    dropped: Counter[str] = Counter()
    for (info, found), entry in zip(pairs, entries, strict=True):
        before = found.found if found.is_as_written else info.samples
        if before > entry.samples:
            dropped[DAMAGED if entry.samples else LOST] += before - entry.samples
    return dropped


def _manifest(manifest: Manifest, shards: list[ShardInfo], dropped: Counter[str]) -> Manifest:
    lost = sum(dropped.values())
    return dataclasses.replace(
        manifest,
        shards=shards,
        dropped=dict(Counter(manifest.dropped) + dropped),
        pairs_present=sum(info.captions for info in shards),
        warnings=[*manifest.warnings, *([f"repaired: {lost:,} damaged samples were left out"] if lost else [])],
        # Of the preparation: started again it must not take what is left for all that it makes.
        plan="" if lost else manifest.plan,
    )
