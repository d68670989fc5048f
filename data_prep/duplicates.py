"""Which samples of all units are there already: exact duplicates, found by hashes on disk.

Used by `data_prep.merge`. The hashes lie in the shards' indices; DuckDB goes over them with a bounded memory and spills
to disk, so a hundred million samples need no more memory than a million.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from setclip.shards import KEY_LENGTH

DUPLICATE = "duplicate (same image, same captions)"
MEMORY_LIMIT = "1GB"


@dataclass
class Decision:
    """What the merge does to one shard: rows to leave out, with the reason, and rows to give another key."""

    leave_out: dict[int, str] = field(default_factory=dict)
    rename: dict[int, str] = field(default_factory=dict)


def find_duplicates(indices: Sequence[Path], splits: Sequence[str], scratch: Path) -> dict[int, Decision]:
    """Returns the number of a shard (its place in `indices`) to what is to be done there.

    Of samples with the same image and the same captions in one split, the first in the order of `indices` and rows is
    kept. The same image with other captions, or in another split, is kept as KEY-1, KEY-2, … in that order. `scratch`
    is a folder for what does not fit in memory.
    """
    decisions: dict[int, Decision] = defaultdict(Decision)
    with connect(indices, splits, scratch) as database:
        found = database.execute(_QUERY, [[str(path) for path in indices]])
        while batch := found.fetchmany(10_000):
            for number, row, key in batch:
                if key is None:
                    decisions[number].leave_out[row] = DUPLICATE
                else:
                    decisions[number].rename[row] = key
    return decisions


def connect(indices: Sequence[Path], splits: Sequence[str], scratch: Path) -> duckdb.DuckDBPyConnection:
    """Returns a database with the table `shards` (name, number, split); larger work than its memory goes to `scratch`."""
    database = duckdb.connect()
    database.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
    database.execute("SET temp_directory = ?", [str(scratch)])
    database.execute("SET preserve_insertion_order = false")
    database.execute("SET threads = 2")  # a thread holds buffers of its own
    names = [str(path) for path in indices]
    columns = {"name": names, "number": range(len(names)), "split": list(splits)}
    database.register("given", pa.table({name: pa.array(values) for name, values in columns.items()}))
    database.execute("CREATE TABLE shards AS SELECT * FROM given")
    return database


# Only images that occur more than once go through the windows, which is what bounds the work.
_QUERY = f"""
WITH samples AS (
    SELECT shards.number, shards.split, file_row_number AS row, key, left(key, {KEY_LENGTH}) AS image, pair_hash
    FROM read_parquet(?, filename = true, file_row_number = true) AS rows JOIN shards ON rows.filename = shards.name
), repeated AS (
    SELECT * FROM samples SEMI JOIN (SELECT image FROM samples GROUP BY image HAVING count(*) > 1) USING (image)
), copies AS (
    SELECT *, row_number() OVER (PARTITION BY split, pair_hash ORDER BY number, row) AS copy FROM repeated
), kept AS (
    SELECT *, row_number() OVER (PARTITION BY image ORDER BY number, row) - 1 AS place FROM copies WHERE copy = 1
), named AS (
    SELECT *, CASE WHEN place = 0 THEN image ELSE image || '-' || place END AS final FROM kept
)
SELECT number, row, NULL AS key FROM copies WHERE copy > 1
UNION ALL
SELECT number, row, final FROM named WHERE key <> final
ORDER BY number, row
"""
