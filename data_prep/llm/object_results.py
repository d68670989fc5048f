"""What was found out about captions: written by each task of `data_prep.parse_llm`, joined by its merge, read by both.

One row a distinct caption, found by the id of its first request. A part writes Parquet with its account; the merge joins
them to one Arrow file, sorted by id, which the processes that rewrite shards map into memory.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.llm.account import Account, Outcome
from data_prep.llm.prompts import OBJECTS_FIRST, cut, request_id
from setclip.files import replacing

_NAMES = pa.list_(pa.field("element", pa.string(), nullable=False))
_SCHEMA = pa.schema(
    [
        ("id", pa.uint64()),  # of the first request
        ("objects", _NAMES),  # null where both answers were bad: the objects are then those of the parser pos
        ("question", pa.int8()),  # of which the objects are: 1, 2, or 0 for none
        ("reasons", _NAMES),  # why answers were bad
        ("unmentioned", _NAMES),  # objects that the caption does not say
    ]
)
_ROWS_AT_ONCE = 65_536


def write_part(
    path: Path,
    outcomes: Mapping[str, Outcome[list[str]]],
    unmentioned: Mapping[str, Sequence[str]],
    account: Account,
    settings: Mapping[str, Any],
) -> None:
    """Writes one part's results; all parts of a folder must have the same `settings`."""
    identities = sorted(outcomes, key=lambda identity: int(identity, 16))
    columns = [
        pa.array([int(identity, 16) for identity in identities], pa.uint64()),
        pa.array([outcomes[identity].value for identity in identities], _NAMES),
        pa.array([outcomes[identity].question for identity in identities], pa.int8()),
        pa.array([list(outcomes[identity].reasons) for identity in identities], _NAMES),
        pa.array([list(unmentioned.get(identity, ())) for identity in identities], _NAMES),
    ]
    metadata = {"account": json.dumps(account.to_dict()), "settings": json.dumps(settings, sort_keys=True)}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA).replace_schema_metadata(metadata), temporary)


def read_notes(path: Path) -> tuple[Account, dict[str, Any]]:
    """Returns the account and the settings of one part's results."""
    metadata = pq.read_schema(path).metadata
    return Account.from_dict(json.loads(metadata[b"account"])), json.loads(metadata[b"settings"])


def join(parts: Iterable[Path], path: Path) -> None:
    """Writes the results of all parts to one file, sorted by id."""
    table = pa.concat_tables(pq.read_table(part).replace_schema_metadata() for part in parts)
    table = table.take(pa.array(np.argsort(table.column("id").to_numpy(), kind="stable")))
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        writer.write_table(table, max_chunksize=_ROWS_AT_ONCE)


class Results:
    """The joined results, found by caption. Costs memory only for what is read."""

    def __init__(self, path: Path, room: int):
        self.path, self.room = path, room
        """Bytes to which captions were cut for the first question."""

    def of(self, captions: Sequence[str]) -> list[dict[str, Any] | None]:
        """Returns the row of each caption; None for one that was never asked about."""
        wanted = np.array([int(identity, 16) for identity in self._identities(captions)], np.uint64)
        places = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        found = self._ids[places] == wanted if len(self._ids) else np.zeros(len(wanted), bool)
        rows = iter(self._table.take(pa.array(places[found])).to_pylist())
        return [next(rows) if is_there else None for is_there in found]

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Returns the request ids of those captions that were never asked about."""
        identities = self._identities(captions)
        wanted = np.array([int(identity, 16) for identity in identities], np.uint64)
        return [each for each, is_there in zip(identities, np.isin(wanted, self._ids), strict=True) if not is_there]

    def _identities(self, captions: Sequence[str]) -> list[str]:
        return [identity_of(caption, self.room) for caption in captions]

    @cached_property
    def _table(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()

    @cached_property
    def _ids(self) -> np.ndarray:
        return self._table.column("id").to_numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "room": self.room}  # the file is mapped again in another process


def identity_of(caption: str, room: int) -> str:
    """Returns the id of the first request about a caption."""
    return request_id(OBJECTS_FIRST, cut(caption, room))
