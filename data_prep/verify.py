"""Checks a folder of shards byte by byte, names each fault with shard and key, and repairs on request.

    python -m data_prep.verify DIR [--decode all] [--json FILE] [--repair True]

Every tar is there with its size, checksum and number of samples; its members stand in order under unique keys; JSON,
index and picture of each sample agree; the pictures of some are decoded. The result is JSON, on standard output or in
a file, and lines for people on standard error. Exit status 0: whole; 1: faults; 2: wrong usage.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.duplicates import as_patterns, bounded_database
from data_prep.output import REPORT_PAGE, WORK_NAME
from data_prep.parallel import run_tasks
from data_prep.repair import Repaired, repair
from data_prep.shard_check import CheckRules, Fault, ShardReport, check_shard
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.manifest import MANIFEST_NAME, PARSING_NAME, Manifest
from setclip.objects import OBJECTS_NAME
from setclip.shards import ShardInfo

_SHOWN_FAULTS = 50
_MOST_REPEATED = 1_000  # keys that are named


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Checks a folder of shards."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""
    decode: float | Literal["all"] = 0.01
    """Share of pictures that are decoded (chosen by key, the same every time), or "all". Of a shard whose checksum is
    wrong all pictures are checked."""
    processes: int = 0
    """Processes that check; 0 takes the CPUs of this job."""
    json: Path | None = None
    """File for the result; by default it goes to standard output."""
    repair: bool = False
    """Whether to write shards at fault anew without their broken samples, and the manifest with what is left."""

    def __post_init__(self) -> None:
        if self.decode != "all" and not 0 <= self.decode <= 1:
            raise InputError(f'expected --decode from 0 to 1 or "all", found {self.decode}; give a share such as 0.01')
        if self.processes < 0:
            raise InputError(f"expected --processes 0 or more, found {self.processes}; 0 takes the CPUs of this job")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of a folder."""

    reports: list[ShardReport]
    """One a shard, in the manifest's order."""
    repeated: dict[str, frozenset[str]]
    """Shard to keys that an earlier shard has, too."""
    faults: list[Fault]
    """All of them, those of the manifest as a whole first."""
    unnamed_faults: int
    """More than these."""
    beyond_repair: int
    """Faults that leaving out samples does not mend."""
    notes: list[str]
    """What lies in the folder and is no fault of the shards."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "ok": not self.faults,
            "shards": len(self.reports),
            "samples": sum(found.found for found in self.reports),
            "decoded": sum(found.decoded for found in self.reports),
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
            "unnamed_faults": self.unnamed_faults,
            "notes": self.notes,
        }


def verify(folder: Path, manifest: Manifest, rules: CheckRules, processes: int) -> Verdict:
    """Checks every shard of the manifest. Raises InputError where the manifest names a place outside the folder."""
    outside = [info.name for info in manifest.shards if Path(info.name).name != info.name]
    if outside:
        raise InputError(
            f"{folder / MANIFEST_NAME}: expected names of shards in the folder, found {outside[0]!r}; this is no manifest of "
            "ours: prepare the shards again"
        )
    with tempfile.TemporaryDirectory(prefix="setclip-verify-") as scratch:
        keys = [Path(scratch) / f"{number}.parquet" for number in range(len(manifest.shards))]
        reports = run_tasks(
            [partial(check_shard, folder, info, rules, path) for info, path in zip(manifest.shards, keys, strict=True)],
            processes,
            description="checking shards",
            sizes=[info.samples for info in manifest.shards],
            seen=_note_of(),
        )
        own = [path if path.exists() else (folder / info.name).with_suffix(".idx")
               for path, info in zip(keys, manifest.shards, strict=True)]  # fmt: skip
        repeated, repetitions, more = _repeated(own, manifest.shards, Path(scratch))
    of_folder = _faults_of_class_folders(folder, manifest)
    faults = [
        *_faults_of_manifest(folder, manifest),
        *of_folder,
        *(fault for found in reports for fault in found.faults),
        *repetitions,
    ]
    return Verdict(
        reports=reports,
        repeated=repeated,
        faults=faults,
        unnamed_faults=more + sum(found.unnamed_faults for found in reports),
        beyond_repair=len(of_folder),
        notes=_notes(folder, manifest),
    )


def _note_of():
    faults = 0

    def seen(found: ShardReport) -> str:
        nonlocal faults
        faults += len(found.faults) + found.unnamed_faults
        return f"{faults:,} faults" if faults else ""

    return seen


def _repeated(
    files: Sequence[Path], shards: Sequence[ShardInfo], scratch: Path
) -> tuple[dict[str, frozenset[str]], list[Fault], int]:
    """Returns keys that an earlier shard has, too: by shard, as faults (the first ones), and how many more.

    `files` have a column "key": the indices, or what was found instead of one. DuckDB keeps what does not fit into
    memory on disk.
    """
    repeated: dict[str, set[str]] = defaultdict(set)
    faults: list[Fault] = []
    more = 0
    if not files:
        return {}, [], 0
    with bounded_database(scratch) as database:
        database.register(
            "shards", pa.table({"file": [str(path.resolve()) for path in files], "number": range(len(files))})
        )
        found = database.execute(_REPEATED, [as_patterns(files)])
        first: tuple[str, int] = ("", 0)
        while batch := found.fetchmany(10_000):
            for key, number in batch:
                if key != first[0]:
                    first = (key, number)
                    continue
                repeated[shards[number].name].add(key)
                if len(faults) < _MOST_REPEATED:
                    faults.append(Fault(shards[number].name, key, f"{shards[first[1]].name} has the key, too"))
                else:
                    more += 1
    return {name: frozenset(keys) for name, keys in repeated.items()}, faults, more


_REPEATED = """
WITH samples AS (
    SELECT shards.number, key FROM read_parquet(?, filename = true, hive_partitioning = false) AS rows
    JOIN shards ON rows.filename = shards.file
)
SELECT key, number FROM samples SEMI JOIN (SELECT key FROM samples GROUP BY key HAVING count(*) > 1) USING (key)
ORDER BY key, number
"""


def _faults_of_manifest(folder: Path, manifest: Manifest) -> list[Fault]:
    """What the manifest says of all shards together, against what it says of each."""
    content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    wrong = []
    names = [info.name for info in manifest.shards]
    wrong += [f"names {name} twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if content.get("totals") != manifest.totals():
        wrong.append("its totals are not the sums over its shards")
    captions = sum(info.captions for info in manifest.shards)
    if manifest.pairs_present != captions:
        wrong.append(f"says {manifest.pairs_present:,} pairs are present, its shards have {captions:,} captions")
    if manifest.pairs_present > manifest.pairs_listed:
        wrong.append(f"lists {manifest.pairs_listed:,} pairs, fewer than are present ({manifest.pairs_present:,})")
    return [Fault(MANIFEST_NAME, None, what) for what in wrong]


def _faults_of_class_folders(folder: Path, manifest: Manifest) -> list[Fault]:
    names = manifest.config.get("class_folders") or []
    return [
        Fault(name, None, "the folder of class directories is missing") for name in names if not _is_in(folder, name)
    ]


def _is_in(folder: Path, name: str) -> bool:
    return (folder / Path(name).name).is_dir()


def _notes(folder: Path, manifest: Manifest) -> list[str]:
    """Returns what else lies in the folder, or does not."""
    ours = {name for info in manifest.shards for name in (info.name, str(Path(info.name).with_suffix(".idx")))}
    strangers = sorted(p.name for p in folder.iterdir() if p.suffix in (".tar", ".idx") and p.name not in ours)
    partials = [name for name in strangers if name.startswith(".")]
    partials += sorted(p.name for p in folder.glob(".*.partial*") if p.suffix not in (".tar", ".idx"))
    notes = [f"{name} is not in the manifest" for name in strangers if not name.startswith(".")]
    notes += [f"{name} is left over from a job that was killed" for name in partials]
    notes += [
        f"{name} is left over from an unfinished command"
        for name in (WORK_NAME, PARSING_NAME)
        if (folder / name).exists()
    ]
    for name, module in ((OBJECTS_NAME, "statistics"), (REPORT_PAGE, "report")):
        if not (folder / name).exists():
            notes.append(f"{name} is missing; `python -m data_prep.{module} {folder}` writes it")
    return notes


def _show(folder: Path, verdict: Verdict, result: dict[str, Any]) -> None:
    """Says the result to people, on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    shown = verdict.faults[:_SHOWN_FAULTS]
    if shown and console.is_terminal:
        table = Table("shard", "key", "fault", title=f"Faults of {folder}", title_justify="left")
        for fault in shown:
            table.add_row(*(Text(text) for text in (fault.shard, fault.key or "", fault.what)))
        console.print(table, soft_wrap=False)
    else:
        for fault in shown:
            console.print(Text(": ".join(filter(None, (fault.shard, fault.key, fault.what)))))
    more = len(verdict.faults) - len(shown) + verdict.unnamed_faults
    if more:
        console.print(f"and {more:,} more faults")
    for note in verdict.notes:
        console.print(Text(f"note: {note}"))
    counts = f"{result['shards']:,} shards, {result['samples']:,} samples, {result['decoded']:,} pictures decoded"
    total = len(verdict.faults) + verdict.unnamed_faults
    console.print(Text(f"{folder}: {counts}: {f'{total:,} faults' if total else 'whole'}"))


def _show_repair(folder: Path, done: Repaired) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    text = (
        f"{folder}: repaired; {len(done.rewritten):,} shards written anew, {len(done.lost):,} lost, "
        f"{done.dropped:,} samples dropped"
    )
    if done.unproven:
        text += f"; {done.unproven:,} samples of damaged shards decode, but nothing vouches for every byte of them"
    console.print(Text(text))


def main() -> None:
    config = parse(VerifyConfig, description=__doc__)
    manifest = Manifest.load(config.folder)
    rules = CheckRules.of_manifest(manifest, 1.0 if config.decode == "all" else config.decode)
    with contextlib.redirect_stdout(sys.stderr):  # progress; standard output is for the result
        verdict = verify(config.folder, manifest, rules, config.processes)
        result = verdict.to_dict()
        _show(config.folder, verdict, result)
        missing = [name for name in (OBJECTS_NAME, REPORT_PAGE) if not (config.folder / name).exists()]
        if config.repair and (verdict.faults or missing):
            done = repair(config.folder, manifest, verdict.reports, verdict.repeated, rules, config.processes)
            _show_repair(config.folder, done)
            result["ok"] = verdict.beyond_repair == 0
            result["repaired"] = dataclasses.asdict(done)
    if config.json is not None:
        write_json(config.json, result)
    else:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    raise SystemExit(0 if result["ok"] else 1)


if __name__ == "__main__":
    command(main)
