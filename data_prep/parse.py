"""Parses the captions of shards again, with other settings or a newer parser.

    python -m data_prep.parse DIR --compound False

Shard by shard: a new tar and index are written beside and swapped in, so that space for one shard a process is enough.
Meanwhile `DIR/.parsing` stands in for the manifest, and nothing reads the folder; killed at any time, the same command
goes on. Images, captions and the objects of other parsers stay as they are.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from data_prep import pos_config, statistics
from data_prep.pack import pos_parser, with_objects
from data_prep.parallel import run_tasks
from data_prep.pos_config import STOP_WORDS, PosConfig
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import remove, remove_partial, write_json
from setclip.log import say
from setclip.manifest import MANIFEST_NAME, PARSING_NAME, Manifest, check_shards
from setclip.shards import Shard, ShardInfo, ShardWriter

_BEGUN_NAME = "begun.json"
_SAMPLES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class ParseConfig:
    """Parses the captions of a folder of shards again."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""
    compound: bool = True
    """Whether adjacent nouns are one object ("teddy bear")."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Nouns that are no objects."""
    processes: int = 0
    """Processes that parse; 0 takes the CPUs of this job. The output does not depend on it."""


def parse_again(config: ParseConfig) -> Manifest:
    """Rewrites the shards' objects, statistics, report and manifest; returns the manifest.

    Raises InputError where an unfinished parse was begun with other settings.
    """
    from data_prep import report  # with matplotlib, which takes a second that a wrong path need not wait for

    work = config.folder / PARSING_NAME
    if not (work / _BEGUN_NAME).exists():
        Manifest.load(config.folder)  # raises at once where there is nothing to parse
    pos = PosConfig(compound=config.compound, stop_words=tuple(config.stop_words))
    version = pos_parser(pos).version
    if (config.folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(config.folder)
        if manifest.parsers.get(pos_config.NAME) == version:
            remove(work)  # all that a kill behind the manifest leaves
            remove_partial(config.folder)
            say(f"{config.folder} is parsed already by {version}")
            return manifest
        check_shards(config.folder, manifest.shards)
        remove(work)
        work.mkdir()
        content = json.loads((config.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        write_json(work / _BEGUN_NAME, {"version": version, "manifest": content})
        (config.folder / MANIFEST_NAME).unlink()
    manifest = _begun(config.folder, version)
    tasks = [partial(parse_shard, config.folder, info, pos) for info in manifest.shards]
    sizes = [info.samples for info in manifest.shards]
    infos = run_tasks(tasks, config.processes, description="parsing captions", sizes=sizes)
    counts = statistics.write_statistics(config.folder, statistics.counted_shards(infos))
    settings = {"compound": config.compound, "stop_words": list(config.stop_words)}
    manifest = dataclasses.replace(
        manifest,
        shards=infos,
        parsers={**manifest.parsers, pos_config.NAME: version},
        config={**manifest.config, **settings},
        plan="",  # of the preparation, whose settings are no longer these
    )
    report.write_report(config.folder, manifest)
    manifest.save(config.folder)
    remove(work)
    remove_partial(config.folder)
    for parser, total in counts.items():
        say(statistics.describe(parser, total))
    return manifest


def parse_shard(folder: Path, info: ShardInfo, pos: PosConfig) -> ShardInfo:
    """Replaces a shard by one with newly parsed objects; returns its entry. Does nothing twice."""
    work = folder / PARSING_NAME
    done = (work / info.name).with_suffix(".json")
    if not done.exists():
        shard = Shard(folder / info.name)
        with ShardWriter(work / info.name, info.split) as writer:
            for row, objects in _parsed(shard, pos):
                writer.copy(shard, row, objects=objects)
        write_json(done, dataclasses.asdict(writer.info))
    for name in (info.name, str(Path(info.name).with_suffix(".idx"))):
        if (work / name).exists():  # it is not, where a kill came between the two
            os.replace(work / name, folder / name)
    return ShardInfo(**json.loads(done.read_text(encoding="utf-8")))


def _parsed(shard: Shard, pos: PosConfig) -> Iterator[tuple[int, dict[str, list[list[str]]]]]:
    """Yields (row, objects of all parsers)."""
    rows = iter(range(len(shard)))
    while block := list(itertools.islice(rows, _SAMPLES_AT_ONCE)):
        samples = with_objects(pos_parser(pos), [shard.read(row) for row in block])
        yield from ((row, sample.objects) for row, sample in zip(block, samples, strict=True))


def _begun(folder: Path, version: str) -> Manifest:
    path = folder / PARSING_NAME / _BEGUN_NAME
    if not path.exists():
        return Manifest.load(folder)  # raises: there is neither
    begun: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if begun["version"] != version:
        raise InputError(
            f"expected to go on with the parse of {folder} by {begun['version']}, found settings of {version}; start it with "
            "the settings it was begun with, then parse again with others"
        )
    return Manifest.from_json(begun["manifest"], path)


def main() -> None:
    parse_again(parse(ParseConfig, description=__doc__))


if __name__ == "__main__":
    command(main)
