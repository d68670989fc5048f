"""Parses the captions of shards by part of speech again, with other settings or a newer parser.

    python -m data_prep.parse DIR --compound False

Shard by shard, in place (`data_prep.rewrite`); killed at any time, the same command goes on.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from data_prep import pos_config, rewrite
from data_prep.pack import pos_parser, with_objects
from data_prep.pos_config import STOP_WORDS, PosConfig
from data_prep.rewrite import ObjectLists, Rewrite
from setclip.config import command, parse
from setclip.manifest import Manifest
from setclip.shards import Sample


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

    Raises InputError where an unfinished parse was begun with other settings, and where another job is at work.
    """
    rewrite.load(config.folder)  # raises at once where there is nothing to parse
    pos = PosConfig(compound=config.compound, stop_words=tuple(config.stop_words))
    job = Rewrite(
        parser=pos_config.NAME,
        version=pos_parser(pos).version,
        command=_command(config),
        objects=partial(_objects, pos=pos),
        config={"compound": config.compound, "stop_words": list(config.stop_words)},
    )
    return rewrite.rewrite(config.folder, job, config.processes)


def _command(config: ParseConfig) -> str:
    """Returns what a user types to go on."""
    words = ["python", "-m", "data_prep.parse", str(config.folder)]
    words += [] if config.compound else ["--compound", "False"]
    words += [] if config.stop_words == STOP_WORDS else ["--stop-words", *config.stop_words]
    return shlex.join(words)


def _objects(samples: Sequence[Sample], pos: PosConfig) -> list[ObjectLists]:
    return [sample.objects[pos_config.NAME] for sample in with_objects(pos_parser(pos), list(samples))]


def main() -> None:
    parse_again(parse(ParseConfig, description=__doc__))


if __name__ == "__main__":
    command(main)
