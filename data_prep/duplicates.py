"""Which samples of all units are there already: exact duplicates, found by hashes on disk.

Used by `data_prep.merge`. The hashes lie in the shards' indices; DuckDB goes over them with a bounded memory and spills
to disk. What is decided about single samples (those left out or renamed, not the others) is held in memory: some 140 MB a
million.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from setclip.errors import InputError
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
        found = database.execute(_QUERY, [as_patterns(indices)])
        while batch := found.fetchmany(10_000):
            for number, row, key in batch:
                if key is None:
                    decisions[number].leave_out[row] = DUPLICATE
                else:
                    decisions[number].rename[row] = key
    return decisions


def as_patterns(paths: Sequence[Path]) -> list[str]:
    """Returns patterns for DuckDB that mean these files and no others, whatever characters their names have."""
    return [re.sub(r"([*?\[])", r"[\1]", str(path.resolve())) for path in paths]


@contextlib.contextmanager
def connect(indices: Sequence[Path], splits: Sequence[str], scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Gives a database with the table `shards` (name, number, split); larger work than its memory goes to `scratch`.

    Raises InputError for what goes wrong in it, and if it does not see each of the indices.
    """
    with bounded_database(scratch) as database:
        _register(database, indices, splits)
        yield database


@contextlib.contextmanager
def bounded_database(scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Gives a database that holds at most MEMORY_LIMIT in memory; the rest goes to `scratch`. Raises InputError for what
    goes wrong in it.
    """
    try:
        with duckdb.connect() as database:
            database.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
            database.execute("SET temp_directory = ?", [str(scratch)])
            database.execute("SET preserve_insertion_order = false")
            database.execute("SET threads = 2")  # a thread holds buffers of its own
            yield database
    except duckdb.Error as error:
        raise InputError(
            f"expected to search indices with {MEMORY_LIMIT} of memory and files in {scratch}, found {error}; make room on "
            "the disk and start again"
        ) from error


def _register(database: duckdb.DuckDBPyConnection, indices: Sequence[Path], splits: Sequence[str]) -> None:
    names = [str(path.resolve()) for path in indices]
    columns = {"name": names, "number": range(len(names)), "split": list(splits)}
    database.register("given", pa.table({name: pa.array(values) for name, values in columns.items()}))
    database.execute("CREATE TABLE shards AS SELECT * FROM given")
    ((seen,),) = database.execute(_SEEN_QUERY, [as_patterns(indices)]).fetchall()
    if seen != len(indices):
        raise InputError(
            f"expected to search {len(indices):,} indices, found {seen:,}; choose an --out with plain characters"
        )


_SEEN_QUERY = """
SELECT count(DISTINCT filename) FROM read_parquet(?, filename = true, hive_partitioning = false) AS rows
SEMI JOIN shards ON rows.filename = shards.name
"""

# Only images that occur more than once go through the windows, which is what bounds the work.
_QUERY = f"""
WITH samples AS (
    SELECT shards.number, shards.split, file_row_number AS row, key, left(key, {KEY_LENGTH}) AS image, pair_hash
    FROM read_parquet(?, filename = true, file_row_number = true, hive_partitioning = false) AS rows
    JOIN shards ON rows.filename = shards.name
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
