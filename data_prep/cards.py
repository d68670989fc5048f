"""Samples to look at: which ones of a folder, and each as a card of a page. Used by `data_prep.report` and `.show`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from setclip import report
from setclip.errors import InputError
from setclip.hashing import hash_u64
from setclip.objects import OBJECTS_NAME, ObjectTable, read_objects
from setclip.shards import Sample, Shard, ShardInfo

_MOST_CHARACTERS = 300  # of a caption on a card
_MOST_PILLS = 12
_MOST_CAPTIONS = 5


@dataclass(frozen=True)
class Place:
    """Where a sample lies."""

    shard: ShardInfo
    row: int


def spread(total: int, number: int) -> list[int]:
    """Returns `number` of the numbers below `total`, evenly spaced, ascending; all of them where there are no more."""
    number = min(total, number)
    return [(2 * step + 1) * total // (2 * number) for step in range(number)]


def spread_shards(shards: Sequence[ShardInfo], number: int) -> list[ShardInfo]:
    """Returns at most `number` of the shards that are not empty, evenly spaced."""
    filled = [shard for shard in shards if shard.samples]
    return [filled[place] for place in spread(len(filled), number)]


def spread_places(shards: Sequence[ShardInfo], number: int) -> list[Place]:
    """Returns at most `number` samples, evenly spaced over all samples of the shards, in their order."""
    return _located(shards, spread(sum(shard.samples for shard in shards), number))


def drawn_places(shards: Sequence[ShardInfo], number: int, seed: int) -> list[Place]:
    """Returns at most `number` different samples, drawn from all with equal chances, in the order of the shards."""
    total = sum(shard.samples for shard in shards)
    drawn: dict[int, None] = {}
    start = 0
    while len(drawn) < min(number, total):
        numbers = hash_u64(seed, np.arange(start, start + 4 * number)) % np.uint64(total)
        drawn.update(dict.fromkeys(numbers.tolist()))
        start += 4 * number
    return _located(shards, sorted(list(drawn)[:number]))


def places_with_objects(
    folder: Path, shards: Iterable[ShardInfo], parser: str | None, names: Sequence[str]
) -> Iterator[tuple[str, Place]]:
    """Yields (object, where a sample lies of which a caption names it) for the objects `names`, shard by shard.

    Each sample once an object. Read from the indices alone; without `parser` the objects of all parsers count.
    """
    wanted = pa.array(names, pa.string())
    for shard in shards:
        seen: set[tuple[str, int]] = set()
        for found_by, lists in Shard(folder / shard.name).object_lists().items():
            if parser is not None and found_by != parser:
                continue
            for name, row in _matches(lists, wanted):
                if (name, row) not in seen:
                    seen.add((name, row))
                    yield name, Place(shard, row)


def read(folder: Path, places: Iterable[Place]) -> Iterator[tuple[Place, Sample | None]]:
    """Yields the samples with their places; None for one that cannot be read. One shard is open at a time."""
    shard: Shard | None = None
    for place in places:
        if shard is None or shard.path.name != place.shard.name:
            shard = Shard(folder / place.shard.name)
        try:
            yield place, shard.read(place.row)
        except InputError:
            yield place, None


def object_tables(folder: Path, parsers: Iterable[str]) -> dict[str, ObjectTable]:
    """Returns the objects of those of the parsers that found any; none where there is no objects.parquet."""
    path = folder / OBJECTS_NAME
    known = (
        set(pc.unique(pq.read_table(path, columns=["parser"]).column("parser")).to_pylist()) if path.exists() else ()
    )
    return {parser: read_objects(folder, parser) for parser in parsers if parser in known}


def card(place: Place, sample: Sample | None, tables: Mapping[str, ObjectTable], note: str = "") -> report.SampleCard:
    """Returns a small picture with captions and objects, these coloured by the group that `tables` give them.

    With several parsers each object is named with its parser.
    """
    if sample is None:
        where = f"sample {place.row} of {place.shard.name}"
        return report.SampleCard(report.thumbnail(b"", where), f"{where} cannot be read", [], note=note)
    captions = [_cut(caption) for caption in sample.captions] or ["no caption"]
    names = [
        (parser, name)
        for parser, lists in sample.objects.items()
        for name in dict.fromkeys(name for names in lists for name in names)
    ]
    pills = [
        report.Pill(
            f"{parser}: {name}" if len(sample.objects) > 1 else name,
            tables[parser].group_of(name) if parser in tables else "",
        )
        for parser, name in names[:_MOST_PILLS]
    ]
    if len(names) > _MOST_PILLS:
        pills.append(report.Pill(f"and {len(names) - _MOST_PILLS} more"))
    further = captions[1:_MOST_CAPTIONS]
    if len(captions) > _MOST_CAPTIONS:
        further.append(f"and {len(captions) - _MOST_CAPTIONS} more captions")
    picture = report.thumbnail(sample.image, f"captioned: {captions[0]}")
    if picture.alt.startswith("no picture"):
        note = f"{note} – {picture.alt.partition(':')[0]}".removeprefix(" – ")
    return report.SampleCard(picture, captions[0], pills, further, note)


def _located(shards: Sequence[ShardInfo], numbers: Sequence[int]) -> list[Place]:
    """Returns the places of samples that are numbered over all shards; `numbers` ascend."""
    places, first, position = [], 0, 0
    for shard in shards:
        while position < len(numbers) and numbers[position] < first + shard.samples:
            places.append(Place(shard, numbers[position] - first))
            position += 1
        first += shard.samples
    return places


def _matches(lists: pa.ChunkedArray, wanted: pa.Array) -> Iterator[tuple[str, int]]:
    """Yields (name, row) wherever one of the wanted names is in the lists (samples) of lists (captions) of names."""
    first = 0
    for chunk in lists.chunks:
        captions = pc.list_flatten(chunk)
        names = pc.list_flatten(captions)
        found = pc.indices_nonzero(pc.is_in(names.cast(pa.string()), value_set=wanted))
        rows = pc.list_parent_indices(chunk).take(pc.list_parent_indices(captions).take(found))
        matched = names.take(found).cast(pa.string())
        yield from zip(matched.to_pylist(), (first + row for row in rows.to_pylist()), strict=True)
        first += len(chunk)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
