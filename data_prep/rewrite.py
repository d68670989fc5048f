"""Gives the samples of a folder of shards the objects of one parser, shard by shard, and lets all else follow.

Used by `data_prep.parse` and `data_prep.parse_llm`. A new tar and index are written beside and swapped in, so that space for
one shard a process is enough. Meanwhile `DIR/.parsing` stands in for the manifest, and nothing reads the folder; killed at
any time, the same command goes on. Images, captions and the objects of other parsers stay as they are.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import statistics
from data_prep.parallel import run_tasks
from setclip.errors import InputError
from setclip.files import remove, remove_partial, write_json
from setclip.log import say, warn
from setclip.manifest import MANIFEST_NAME, PARSING_NAME, Manifest, check_shards
from setclip.shards import Sample, Shard, ShardInfo, ShardWriter

_BEGUN_NAME = "begun.json"
_LOCK_NAME = ".parsing.lock"
_SAMPLES_AT_ONCE = 512

ObjectLists = list[list[str]]
"""One list of names per caption of a sample."""


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Which objects the samples get."""

    parser: str
    """Name in the samples, objects.parquet and the manifest. Objects that it found before are replaced."""
    version: str
    """Equal versions give equal objects: a folder that has this one is left as it is."""
    command: str
    """What a user types to go on."""
    objects: Callable[[Sequence[Sample]], list[ObjectLists]]
    """Returns the objects of each sample's captions. A top-level function or a partial of one: it goes to other processes."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the manifest's config that are others afterwards. A preparation with the settings of before is then no
    longer what the folder holds."""
    finish: Callable[[list[ShardInfo]], None] | None = None
    """Called with the new shards before report and manifest are written."""


def load(folder: Path) -> Manifest:
    """Returns the manifest of a folder whose shards may be half rewritten. Raises InputError where there are no shards."""
    return Manifest.load(folder) if unfinished(folder) is None else _begun(folder)[1]


def unfinished(folder: Path) -> dict[str, Any] | None:
    """Returns what began an unfinished rewriting: `parser`, `version` and the `command` that goes on; None without one.

    Shards cannot be read then: one may be new and its index old.
    """
    if (folder / MANIFEST_NAME).exists() or not (folder / PARSING_NAME / _BEGUN_NAME).exists():
        return None
    return _begun(folder)[0]


def rewrite(folder: Path, job: Rewrite, processes: int) -> Manifest:
    """Rewrites the shards' objects, statistics, report and manifest; returns the manifest.

    Raises InputError where an unfinished parse was begun with other settings, and where another job is at work.
    """
    load(folder)  # raises at once where there is nothing to parse
    with _alone(folder):
        return _rewrite(folder, job, processes)


def rewrite_shard(folder: Path, info: ShardInfo, job: Rewrite) -> ShardInfo:
    """Replaces a shard by one with new objects; returns its entry. Does nothing twice."""
    work = folder / PARSING_NAME
    done = (work / info.name).with_suffix(".json")
    if not done.exists():
        shard = Shard(folder / info.name)
        with ShardWriter(work / info.name, info.split) as writer:
            for row, objects in _parsed(shard, job):
                writer.copy(shard, row, objects=objects)
        write_json(done, dataclasses.asdict(writer.info))
    for name in (info.name, str(Path(info.name).with_suffix(".idx"))):
        if (work / name).exists():  # it is not, where a kill came between the two
            os.replace(work / name, folder / name)
    return ShardInfo(**json.loads(done.read_text(encoding="utf-8")))


def _rewrite(folder: Path, job: Rewrite, processes: int) -> Manifest:
    from data_prep import report  # with matplotlib, which takes a second that a wrong path need not wait for

    work = folder / PARSING_NAME
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        if manifest.parsers.get(job.parser) == job.version:
            remove(work)  # all that a kill behind the manifest leaves
            remove_partial(folder)
            say(f"{folder} is parsed already by {job.version}")
            return manifest
        check_shards(folder, manifest.shards)
        remove(work)
        work.mkdir()
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        begun = {"parser": job.parser, "version": job.version, "command": job.command, "manifest": content}
        write_json(work / _BEGUN_NAME, begun)
        (folder / MANIFEST_NAME).unlink()
    entry, manifest = _begun(folder)
    if entry["version"] != job.version:
        raise InputError(
            f"expected to go on with the parse of {folder} by {entry['version']}, found settings of {job.version}; start it "
            f"with the settings it was begun with (`{entry['command']}`), then parse again with others"
        )
    tasks = [partial(rewrite_shard, folder, info, dataclasses.replace(job, finish=None)) for info in manifest.shards]
    sizes = [info.samples for info in manifest.shards]
    infos = run_tasks(tasks, processes, description="rewriting shards", sizes=sizes)
    counts = statistics.write_statistics(folder, statistics.counted_shards(infos))
    if job.finish is not None:
        job.finish(infos)
    manifest = dataclasses.replace(
        manifest,
        shards=infos,
        parsers={**manifest.parsers, job.parser: job.version},
        config={**manifest.config, **job.config},
        plan="" if job.config else manifest.plan,
    )
    report.write_report(folder, manifest)
    manifest.save(folder)
    remove(work)
    remove_partial(folder)
    for parser, total in counts.items():
        say(statistics.describe(parser, total))
    return manifest


def _parsed(shard: Shard, job: Rewrite) -> Iterator[tuple[int, dict[str, ObjectLists]]]:
    """Yields (row, objects of all parsers)."""
    rows = iter(range(len(shard)))
    while block := list(itertools.islice(rows, _SAMPLES_AT_ONCE)):
        samples = [shard.read(row) for row in block]
        for row, sample, objects in zip(block, samples, job.objects(samples), strict=True):
            yield row, {**sample.objects, job.parser: objects}


def _begun(folder: Path) -> tuple[dict[str, Any], Manifest]:
    path = folder / PARSING_NAME / _BEGUN_NAME
    if not path.exists():
        Manifest.load(folder)  # raises: there is neither
    entry = json.loads(path.read_text(encoding="utf-8"))
    return entry, Manifest.from_json(entry["manifest"], path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second parse from the folder. The lock file is removed at the end; the end of the process unlocks."""
    path = folder / _LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(
                f"expected no other parse of {folder} to be running, found one at work; wait for it, and start again if need be"
            ) from error
        except OSError as error:
            warn(f"{path} cannot be locked ({error}): see to it that no two jobs parse {folder}")
            break
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # one that the job before us has removed meanwhile
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
