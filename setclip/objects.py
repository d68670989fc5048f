"""Object names, their ids, and objects.parquet: how often each object occurs, its rank, and the tail.

An object's id is a hash of its normalised name, so independent jobs need no common vocabulary. Written by data_prep,
read by pretrain (ids, weights), eval_suite (head, middle, tail) and reports.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from setclip.errors import InputError
from setclip.files import replacing
from setclip.hashing import hash_text

OBJECTS_NAME = "objects.parquet"
TAIL_SHARE = 0.3  # AlignCLIP (Zhang et al., ACM MM 2024): in its three corpora the tail is floor(0.3 N) objects
HEAD_SHARE = 0.2
GROUPS = ("head", "middle", "tail")

_SCHEMA = pa.schema(
    [
        ("parser", pa.string()),
        ("name", pa.string()),
        ("id", pa.int64()),
        ("count", pa.int64()),
        ("rank", pa.int64()),
        ("is_tail", pa.bool_()),
    ]
)


def object_id(name: str) -> int:
    """Returns the 63-bit id of a normalised object name (never negative: -1 pads)."""
    return hash_text(name) >> 1


@dataclass(frozen=True, eq=False)
class ObjectTable:
    """The objects that one parser found in a corpus, most frequent first (ties by name, ascending)."""

    parser: str
    num_captions: int
    """Captions that were parsed, those without an object included."""
    names: list[str]
    counts: NDArray[np.int64]
    """(M,) captions that contain the object."""

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], parser: str, num_captions: int) -> "ObjectTable":
        """Builds the table; raises InputError if two names share an id."""
        order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        table = cls(parser, num_captions, [name for name, _ in order], np.array([n for _, n in order], np.int64))
        owners: dict[int, str] = {}
        for name, identity in zip(table.names, table.ids.tolist(), strict=True):
            if owners.setdefault(identity, name) != name:
                raise InputError(
                    f"objects {owners[identity]!r} and {name!r} share the id {identity}; rename one of them"
                )
        return table

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """(M,) object ids."""
        return np.array([object_id(name) for name in self.names], np.int64)

    @property
    def ranks(self) -> NDArray[np.int64]:
        """(M,) 1 for the most frequent object."""
        return np.arange(1, len(self.names) + 1)

    @cached_property
    def is_tail(self) -> NDArray[np.bool_]:
        """(M,) the first floor(0.3 M) objects by (count ascending, name ascending)."""
        by_rarity = sorted(range(len(self.names)), key=lambda i: (self.counts[i], self.names[i]))
        tail = np.zeros(len(self.names), bool)
        tail[by_rarity[: num_tail_objects(len(self.names))]] = True
        return tail

    def group_of(self, name: str) -> str:
        """Returns "head" (the most frequent 20 % of objects), "tail" (the rarest 30 %), "middle" or "unseen"."""
        row = self._rows.get(name)
        if row is None:
            return "unseen"
        if self.is_tail[row]:
            return "tail"
        return "head" if row < int(HEAD_SHARE * len(self.names)) else "middle"

    def count_of(self, name: str) -> int:
        """Returns the number of captions that contain the object; 0 if none does."""
        row = self._rows.get(name)
        return 0 if row is None else int(self.counts[row])

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}


def num_tail_objects(num_objects: int) -> int:
    """Returns floor(0.3 · num_objects), in whole numbers."""
    return 3 * num_objects // 10


def write_objects(path: str | Path, tables: Iterable[ObjectTable]) -> None:
    """Writes objects.parquet: one row per parser and object."""
    tables = list(tables)
    parts = [
        pa.table(
            [pa.array([t.parser] * len(t.names), pa.string()), t.names, t.ids, t.counts, t.ranks, t.is_tail],
            schema=_SCHEMA,
        )
        for t in tables
    ]
    table = pa.concat_tables(parts) if parts else _SCHEMA.empty_table()
    metadata = {f"num_captions.{t.parser}": str(t.num_captions) for t in tables}
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary)


def read_objects(path: str | Path, parser: str = "pos") -> ObjectTable:
    """Reads one parser's table from objects.parquet (or from the one in the folder `path`)."""
    path = Path(path)
    if path.is_dir():
        path = path / OBJECTS_NAME
    if not path.exists():
        raise InputError(
            f"expected {path}, found no such file; make it with `python -m data_prep.statistics {path.parent}`"
        )
    table = pq.read_table(path)
    known: Sequence[str] = pc.unique(table.column("parser")).to_pylist()
    if parser not in known:
        raise InputError(f"{path}: expected objects of parser {parser!r}, found those of {known}; choose one of these")
    rows = table.filter(pc.equal(table.column("parser"), parser))
    num_captions = int((table.schema.metadata or {}).get(f"num_captions.{parser}".encode(), b"0"))
    return ObjectTable(parser, num_captions, rows.column("name").to_pylist(), rows.column("count").to_numpy())
