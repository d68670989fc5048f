"""Counts the objects of shards into objects.parquet: how many captions name each, its rank, and the tail.

    python -m data_prep.statistics DIR [--split train] [--objects pos]

Run by `data_prep.run` at its end, and again by hand after shards were parsed anew. Counts are of the training split,
because that is what a model sees; where there is no split "train", of all samples.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from setclip.config import command, parse
from setclip.errors import InputError
from setclip.log import progress, say
from setclip.manifest import Manifest, check_shards
from setclip.objects import OBJECTS_NAME, ObjectTable, num_tail_objects, read_objects, write_objects
from setclip.shards import Shard, ShardInfo


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Counts the objects of a folder of shards into its objects.parquet."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""
    split: str | None = None
    """Split to count; by default "train" where there is one, otherwise all."""
    objects: Literal["pos", "llm"] | None = None
    """Count those of this parser only; the rows of others stay as they are. By default all are counted."""


_COUNTS = pa.schema([("name", pa.string()), ("count", pa.int64())])
_TABLES_AT_ONCE = 100  # counted shards before their tables become one


@dataclass
class ObjectCounts:
    """What one parser found in a number of captions."""

    captions: int = 0
    captions_without_object: int = 0
    mentions: int = 0
    """Objects of all captions, added up."""
    _tables: list[pa.Table] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Object name to the number of captions that contain it."""
        self._condense()
        table = self._tables[0] if self._tables else _COUNTS.empty_table()
        return dict(zip(table.column("name").to_pylist(), table.column("count").to_pylist(), strict=True))

    def add(self, objects: pa.ChunkedArray) -> None:
        """Counts one shard's lists (one a sample) of lists (one a caption) of distinct names; null samples are passed over."""
        captions = pc.list_flatten(objects)
        names = pc.list_flatten(captions)
        self.captions += len(captions)
        self.captions_without_object += pc.sum(pc.equal(pc.list_value_length(captions), 0)).as_py() or 0
        self.mentions += len(names)
        encoded = names.combine_chunks()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        counts = np.bincount(codes, minlength=len(encoded.dictionary))
        self._tables.append(pa.table([encoded.dictionary, counts], schema=_COUNTS))
        if len(self._tables) > _TABLES_AT_ONCE:
            self._condense()

    def _condense(self) -> None:
        if len(self._tables) > 1:
            summed = pa.concat_tables(self._tables).group_by("name").aggregate([("count", "sum")])
            self._tables = [summed.rename_columns({"count_sum": "count"}).select(["name", "count"])]

    @property
    def objects_per_caption(self) -> float:
        """The mean."""
        return self.mentions / max(self.captions, 1)

    @property
    def share_without_object(self) -> float:
        """Of the captions."""
        return self.captions_without_object / max(self.captions, 1)


def count_objects(folder: Path, shards: list[ShardInfo]) -> dict[str, ObjectCounts]:
    """Returns parser name to what it found in the shards, read from their indices.

    Memory is that of a hundred shards' vocabularies, however many shards there are.
    """
    found: dict[str, ObjectCounts] = {}
    for info in progress(shards, description="counting objects", unit="shards"):
        for parser, objects in Shard(folder / info.name).object_lists().items():
            found.setdefault(parser, ObjectCounts()).add(objects)
    return found


def write_statistics(folder: Path, shards: list[ShardInfo], parser: str | None = None) -> dict[str, ObjectCounts]:
    """Counts and writes `folder`/objects.parquet; returns the counts by parser.

    With `parser` only its objects are counted, and what the file has of others stays. Raises InputError on equal ids, and
    where the shards have no objects of `parser`.
    """
    found = count_objects(folder, shards)
    kept: dict[str, ObjectTable] = {}
    if parser is not None:
        if parser not in found:
            by = "parse_llm" if parser == "llm" else "parse"
            raise InputError(
                f"expected objects of parser {parser!r} in {folder}, found those of {sorted(found) or 'none'}; parse its "
                f"captions with `python -m data_prep.{by} {folder}`, or count those that are there"
            )
        others = known_parsers(folder) - {parser}
        kept = {other: read_objects(folder, other) for other in others}
        found = {parser: found[parser]}
    counted = {name: ObjectTable.from_counts(total.counts, name, total.captions) for name, total in found.items()}
    write_objects(folder / OBJECTS_NAME, [table for _, table in sorted({**kept, **counted}.items())])
    return found


def known_parsers(folder: Path) -> set[str]:
    """Returns the parsers whose objects `folder`/objects.parquet holds."""
    path = folder / OBJECTS_NAME
    return (
        set(pq.read_table(path, columns=["parser"]).column("parser").unique().to_pylist()) if path.exists() else set()
    )


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
    from data_prep import report  # with matplotlib, which takes a second that a wrong path need not wait for

    config = parse(StatisticsConfig, description=__doc__)
    manifest = Manifest.load(config.folder)
    shards = counted_shards(manifest.shards, config.split)
    check_shards(config.folder, shards)
    for parser, total in write_statistics(config.folder, shards, config.objects).items():
        say(describe(parser, total))
    report.write_report(config.folder, manifest)
    say(f"written: {config.folder / OBJECTS_NAME} and {config.folder / report.REPORT_PAGE}")


if __name__ == "__main__":
    command(main)
