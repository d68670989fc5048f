"""Folders of `data_prep.fetch`: which of their tars count, and what was listed and did not come.

FOLDER/status.parquet has one row a pair of the list and names the tars; a pair that came at the second attempt is in that
one's tar only, so the counts beside single tars would count it twice. Used by the sources of tars.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.fetch_status import STATUS_NAME
from data_prep.plan import Dropped, Record, Unit
from data_prep.sources.places import InputFile, some, state_of
from data_prep.sources.untrusted import NOT_DOWNLOADED
from setclip.errors import InputError

_LEVELS = 2  # a tar lies in FOLDER/attempt-N


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """One such folder."""

    rows: int
    """Pairs of its list."""
    tars: list[InputFile]
    absent: Unit
    """Yields what did not come."""
    warnings: list[str]


def take_fetched(given: Sequence[str], files: list[InputFile]) -> tuple[list[Fetched], list[InputFile]]:
    """Returns the folders of `data_prep.fetch` that are given or hold some of the files, and the files that are in none.

    A part of such a folder cannot be counted: all tars that its table names must be among the files. Raises InputError
    where one is not, or where a download was not finished.
    """
    places = [Path(text) for text in given if Path(text).is_dir()]
    places += [folder for file in files for folder in list(file.path.parents)[:_LEVELS]]
    fetched = []
    for folder in dict.fromkeys(places):
        if not _is_fetched(folder):
            continue
        inside = [file for file in files if folder in file.path.parents]
        files = [file for file in files if folder not in file.path.parents]
        rows, tars, warnings = _fetched_tars(folder, inside)
        table = folder / STATUS_NAME
        read = partial(read_absent, str(table))
        absent = Unit(name=str(table), split=inside[0].split, read=read, state=state_of(table))
        fetched.append(Fetched(rows=rows, tars=tars, absent=absent, warnings=warnings))
    return fetched, files


def read_absent(table: str) -> Iterator[Record | Dropped]:
    """Yields what a status table does not call a success as not downloaded. Raises InputError if it is no such table."""
    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(columns=["status"]):
                absent = len(batch) - batch.column(0).to_pylist().count("success")
                if absent:
                    yield Dropped(NOT_DOWNLOADED, "absent", pairs=absent, samples=absent)
    except (OSError, pa.ArrowException) as error:
        raise _no_table(Path(table), error) from error


def _is_fetched(folder: Path) -> bool:
    """Whether a folder is one of `data_prep.fetch`. Raises InputError if it is and its first attempt is not done."""
    if (folder / STATUS_NAME).is_file():
        return True
    if any(folder.glob("attempt-*/*.tar")):
        raise InputError(
            f"expected {STATUS_NAME} beside the attempts in {folder}, found none; finish the download (`python -m "
            "data_prep.fetch` goes on where it stopped)"
        )
    return False


def _fetched_tars(folder: Path, found: list[InputFile]) -> tuple[int, list[InputFile], list[str]]:
    """Returns the rows of a fetched list, those tars that its status table names, and warnings.

    Raises InputError if one that it names is missing.
    """
    table = folder / STATUS_NAME
    named: set[str] = set()
    try:
        columns = pq.read_schema(table).names
        if not {"status", "tar"} <= set(columns):
            raise InputError(
                f"expected columns `status` and `tar` in {table}, found {', '.join(columns)}; give a folder of "
                "`data_prep.fetch`"
            )
        with pq.ParquetFile(table, read_dictionary=["tar"]) as file:
            rows = file.metadata.num_rows
            for batch in file.iter_batches(columns=["tar"]):
                named.update(batch.column(0).unique().drop_null().to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise _no_table(table, error) from error
    places = {file.path.relative_to(folder).as_posix(): file for file in found}
    if missing := sorted(named - places.keys()):
        raise InputError(
            f"expected the {len(named):,} tars that {table} names, found {len(named) - len(missing):,}; missing: "
            f"{some(missing)}; copy them back, and give the folder as a whole"
        )
    other = sorted(name for name, file in places.items() if name not in named and not _is_empty(file.path))
    warnings = []
    if other:
        warnings.append(
            f"{len(other)} tars in {folder} are of no finished attempt and are left out: {some(other)}; finish the download"
        )
    return rows, [file for name, file in places.items() if name in named], warnings


def _is_empty(tar: Path) -> bool:
    """Whether a tar has no member: the shard of a list of which nothing came."""
    with open(tar, "rb") as file:
        return not any(file.read(tarfile.BLOCKSIZE))


def _no_table(table: Path, error: Exception) -> InputError:
    return InputError(
        f"expected the table of a download at {table}, found {error}; run `python -m data_prep.fetch` again"
    )
