"""Counts the objects of shards into objects.parquet: how many captions name each, its rank, and the tail.

    python -m data_prep.statistics DIR [--split train]

Run by `data_prep.run` at its end, and again by hand after shards were parsed anew. Counts are of the training split,
because that is what a model sees; where there is no split "train", of all samples.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from setclip.config import command, parse
from setclip.errors import InputError
from setclip.log import progress, say
from setclip.manifest import Manifest, check_shards
from setclip.objects import OBJECTS_NAME, ObjectTable, num_tail_objects, write_objects
from setclip.shards import Shard, ShardInfo


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Counts the objects of a folder of shards into its objects.parquet."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""
    split: str | None = None
    """Split to count; by default "train" where there is one, otherwise all."""


@dataclass
class ObjectCounts:
    """What one parser found in a number of captions."""

    captions: int = 0
    captions_without_object: int = 0
    mentions: int = 0
    """Objects of all captions, added up."""
    counts: Counter[str] = field(default_factory=Counter)
    """Object name to the number of captions that contain it."""

    @property
    def objects_per_caption(self) -> float:
        """The mean."""
        return self.mentions / max(self.captions, 1)

    @property
    def share_without_object(self) -> float:
        """Of the captions."""
        return self.captions_without_object / max(self.captions, 1)


def count_objects(folder: Path, shards: list[ShardInfo]) -> dict[str, ObjectCounts]:
    """Returns parser name to what it found in the shards. A name that a caption lists twice counts once."""
    found: dict[str, ObjectCounts] = {}
    for info in progress(shards, description="counting objects", unit="shards"):
        for sample in Shard(folder / info.name):
            for parser, lists in sample.objects.items():
                total = found.setdefault(parser, ObjectCounts())
                for names in lists:
                    distinct = set(names)
                    total.captions += 1
                    total.captions_without_object += not distinct
                    total.mentions += len(distinct)
                    total.counts.update(distinct)
    return found


def write_statistics(folder: Path, shards: list[ShardInfo]) -> dict[str, ObjectCounts]:
    """Counts and writes `folder`/objects.parquet; returns the counts by parser. Raises InputError on equal ids."""
    found = count_objects(folder, shards)
    tables = [ObjectTable.from_counts(total.counts, parser, total.captions) for parser, total in sorted(found.items())]
    write_objects(folder / OBJECTS_NAME, tables)
    return found


def counted_shards(shards: list[ShardInfo], split: str | None = None) -> list[ShardInfo]:
    """Returns the shards that statistics are made of: those of `split`, or of "train", or else all."""
    chosen = [shard for shard in shards if shard.split == (split or "train")]
    if split is not None and not chosen:
        known = list(dict.fromkeys(shard.split for shard in shards))
        raise InputError(f"expected shards of split {split!r}, found splits {known}; choose one of these with --split")
    return chosen or shards


def describe(parser: str, total: ObjectCounts) -> str:
    """Returns one line for people."""
    tail = num_tail_objects(len(total.counts))
    return (
        f"objects ({parser}): {len(total.counts):,} distinct, tail {tail:,}; {total.objects_per_caption:.2f} a caption; "
        f"{total.captions_without_object:,} of {total.captions:,} captions without object "
        f"({total.share_without_object:.2%})"
    )


def main() -> None:
    config = parse(StatisticsConfig, description=__doc__)
    manifest = Manifest.load(config.folder)
    shards = counted_shards(manifest.shards, config.split)
    check_shards(config.folder, shards)
    for parser, total in write_statistics(config.folder, shards).items():
        say(describe(parser, total))
    say(f"written to {config.folder / OBJECTS_NAME}")


if __name__ == "__main__":
    command(main)
