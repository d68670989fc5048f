"""The two YFCC15M recipes: what CLIP's and DeCLIP's lists hold, and how YFCC100M's titles and descriptions become captions.

**YFCC100M's metadata** (yfcc100m_dataset.bz2) has one photo or video a line, 25 columns between tabs, no header: line
number, photo id, photo hash, user id, nickname, date taken, date uploaded, device, title, description, user tags, machine
tags, longitude, latitude, accuracy, page url, download url, licence name, licence url, server, farm, secret, original
secret, extension, marker (0 photo, 1 video). Texts are url-encoded.

**CLIP's list** (yfcc100m_subset_data.tsv.bz2) has the first three of these columns. It is joined with the metadata by photo
id; the hash must agree. The join streams the metadata once (its 100 million lines are mostly the time that bzip2 takes)
and keeps the rest in duckdb on disk, with a memory limit.

**DeCLIP's list** is JSON lines with `filename`, `caption` (a text or a list of texts) and `url`. Its captions are cleaned
by its authors, so only white space is collapsed; undoing an url-encoding that is not there would turn "+" into spaces.

Both layouts, and that of the metadata, are from their descriptions; they were not checked on the originals.

**Text rules** for titles and descriptions, in this order:

1. url-decoding, with "+" as space;
2. HTML tags and comments are removed; those that break a line (br, p, div, li, blockquote) leave a space. "<3" stays,
   because no tag begins with a digit;
3. HTML entities become characters, once, after the tags: an escaped "&lt;b&gt;" is what somebody wanted to be read;
4. white space of any kind is collapsed to single spaces, and stripped;
5. `title+description` joins the two with a space; equal ones stand once, an empty one leaves the other; `title` and
   `description` take one of them. Samples whose caption is then empty are dropped and counted.
"""

import html
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote_plus

import duckdb
import pyarrow as pa

from data_prep.lists import (
    EMPTY_CAPTION,
    EMPTY_URL,
    NOT_A_URL,
    NOT_UTF8,
    TOO_FEW_COLUMNS,
    BadRow,
    ListRow,
    is_url,
    open_list,
)
from setclip.errors import InputError
from setclip.log import Meter, say

Texts = Literal["title+description", "title", "description"]

NOT_IN_METADATA = "list_not_in_metadata"
OTHER_HASH = "list_other_hash"
VIDEO = "list_video"
NOT_JSON = "list_not_json"

METADATA_COLUMNS = 25
_PHOTO_ID, _HASH, _TITLE, _DESCRIPTION, _URL, _MARKER = 1, 2, 8, 9, 16, 24
_METADATA_SCHEMA = pa.schema(
    [
        ("photo_id", pa.int64()),
        ("hash", pa.string()),
        ("title", pa.binary()),  # decoded after the join, which keeps a sixth of them
        ("description", pa.binary()),
        ("url", pa.string()),
        ("is_video", pa.bool_()),
    ]
)

_ROWS_AT_ONCE = 50_000

_BREAKING_TAGS = re.compile(r"</?(?:br|p|div|li|blockquote)\b[^<>]*>", re.IGNORECASE)
_TAGS = re.compile(r"<!--.*?-->|</?[a-z][^<>]*>", re.IGNORECASE | re.DOTALL)


def clean_text(raw: str) -> str:
    """Returns a title or description of the metadata as people read it: rules 1 to 4 above."""
    text = unquote_plus(raw)
    text = _TAGS.sub("", _BREAKING_TAGS.sub(" ", text))
    return " ".join(html.unescape(text).split())


def caption_of(title: str, description: str, texts: Texts = "title+description") -> str:
    """Returns the caption of a photo from its raw title and description (rule 5); may be empty."""
    wanted = {"title": [title], "description": [description], "title+description": [title, description]}[texts]
    return " ".join(dict.fromkeys(text for text in map(clean_text, wanted) if text))


# --- CLIP's list


@dataclass(frozen=True, kw_only=True)
class Join:
    """How CLIP's list is joined with the metadata."""

    metadata: tuple[Path, ...]
    """Files of YFCC100M's metadata (plain, .gz or .bz2), together all of it."""
    texts: Texts
    min_match: float
    """Least share of the list's photos that the metadata must hold."""
    memory_gb: float
    """Most memory that duckdb takes; the rest goes to `folder`."""
    folder: Path
    """For intermediate files; made, and removed at the end."""


def read_clip(path: Path, join: Join) -> Iterator[ListRow | BadRow]:
    """Yields the rows of CLIP's list, in its order, with url and caption from the metadata.

    Raises InputError where list or metadata have another layout, or where fewer photos than `min_match` are found.
    """
    shutil.rmtree(join.folder, ignore_errors=True)
    join.folder.mkdir(parents=True)
    try:
        settings: dict[str, Any] = {
            "memory_limit": f"{join.memory_gb}GB",
            "temp_directory": str(join.folder / "spilled"),
        }
        with duckdb.connect(str(join.folder / "join.duckdb"), config=settings) as connection:
            # The metadata streams past a hash table of the list; the optimiser knows the size of neither.
            connection.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
            yield from _joined(connection, path, join)
    finally:
        shutil.rmtree(join.folder, ignore_errors=True)


def check_clip(path: Path, metadata: Iterable[Path]) -> None:
    """Raises InputError unless the list and the metadata are there and begin with the layout described above."""
    with open_list(path) as file:
        first = file.readline()
    row = _clip_row(first, 0)
    if isinstance(row, BadRow):
        raise InputError(
            f"expected lines of (line number, photo id, photo hash) in {path}, found {first[:80]!r}; take the list that "
            "CLIP's data/yfcc100m.md names"
        )
    for part in metadata:
        if not part.is_file():
            raise InputError(
                f"expected YFCC100M's metadata at {part}, found no such file; give its place with --metadata"
            )
        with open_list(part) as file:
            line = file.readline()
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != METADATA_COLUMNS or not fields[_PHOTO_ID].isdigit() or not fields[_URL].startswith(b"http"):
            raise InputError(
                f"expected {METADATA_COLUMNS} columns (photo id in the second, download url in the 17th) in {part}, found "
                f"{len(fields)}: {line[:120]!r}; take yfcc100m_dataset.bz2"
            )


def _joined(connection: duckdb.DuckDBPyConnection, path: Path, join: Join) -> Iterator[ListRow | BadRow]:
    schema = pa.schema([("row", pa.int64()), ("photo_id", pa.int64()), ("hash", pa.string()), ("reason", pa.string())])
    connection.register("list_stream", pa.RecordBatchReader.from_batches(schema, _clip_batches(path, schema)))
    connection.execute("CREATE TABLE list AS SELECT * FROM list_stream")
    connection.unregister("list_stream")
    invalid = [0]
    batches = _metadata_batches(join.metadata, _METADATA_SCHEMA, invalid)
    connection.register("metadata", pa.RecordBatchReader.from_batches(_METADATA_SCHEMA, batches))
    connection.execute(
        "CREATE TABLE found AS SELECT list.row, list.hash = metadata.hash AS same_hash, metadata.title, "
        "metadata.description, metadata.url, metadata.is_video FROM metadata JOIN list "
        "ON metadata.photo_id = list.photo_id"
    )
    connection.unregister("metadata")
    listed, readable, matched = connection.execute(
        "SELECT count(*), count(photo_id), (SELECT count(DISTINCT row) FROM found WHERE same_hash) FROM list"
    ).fetchall()[0]
    share = matched / max(listed, 1)
    say(f"{matched:,} of {listed:,} photos of the list are in the metadata ({share:.2%})")
    if invalid[0]:
        say(f"{invalid[0]:,} lines of the metadata do not have {METADATA_COLUMNS} columns and were passed over")
    if share < join.min_match:
        raise InputError(
            f"expected at least {join.min_match:.1%} of the list's photos in the metadata (with equal hashes), found "
            f"{matched:,} of {listed:,} ({share:.1%}; {listed - readable:,} lines of the list are unreadable); give all "
            f"parts of the metadata with --metadata, or allow less with --min-match {int(share * 100) / 100}"
        )
    connection.execute(
        "SELECT list.row, photo_id, reason, same_hash, title, description, url, is_video FROM list LEFT JOIN "
        "(SELECT row, max(same_hash) AS same_hash, arg_max(title, same_hash) AS title, "
        "arg_max(description, same_hash) AS description, arg_max(url, same_hash) AS url, "
        "arg_max(is_video, same_hash) AS is_video FROM found GROUP BY row) AS best ON best.row = list.row ORDER BY list.row"
    )
    while rows := connection.fetchmany(_ROWS_AT_ONCE):
        for row in rows:
            yield _clip_result(join.texts, *row)


def _clip_result(
    texts: Texts,
    row: int,
    photo_id: int | None,
    reason: str | None,
    same_hash: bool | None,
    title: bytes | None,
    description: bytes | None,
    url: str | None,
    is_video: bool | None,
) -> ListRow | BadRow:
    if reason:
        return BadRow(row, reason)
    if same_hash is None:
        return BadRow(row, NOT_IN_METADATA)
    if not same_hash:
        return BadRow(row, OTHER_HASH, url)
    if is_video:
        return BadRow(row, VIDEO, url)
    if not url or not is_url(url):
        return BadRow(row, NOT_A_URL if url else EMPTY_URL, url)
    caption = caption_of(
        (title or b"").decode("utf-8", "replace"), (description or b"").decode("utf-8", "replace"), texts
    )
    if not caption:
        return BadRow(row, EMPTY_CAPTION, url)
    return ListRow(row, url, (caption,), str(photo_id))


def _clip_row(line: bytes, number: int) -> tuple[int, str] | BadRow:
    """Returns (photo id, hash)."""
    fields = line.split()
    if len(fields) < 3 or not fields[1].isdigit():
        return BadRow(number, TOO_FEW_COLUMNS)
    return int(fields[1]), fields[2].decode("ascii", "replace")


def _clip_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    columns: tuple[list[Any], ...] = ([], [], [], [])
    with open_list(path) as file:
        for number, line in enumerate(file):
            row = _clip_row(line, number)
            values = (number, None, None, row.reason) if isinstance(row, BadRow) else (number, *row, None)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            if len(columns[0]) == _ROWS_AT_ONCE:
                yield pa.record_batch([*columns], schema=schema)
                for column in columns:
                    column.clear()
    yield pa.record_batch([*columns], schema=schema)


def _metadata_batches(parts: tuple[Path, ...], schema: pa.Schema, invalid: list[int]) -> Iterator[pa.RecordBatch]:
    """Yields the wanted columns of all parts; lines with other numbers of columns are counted in `invalid`."""
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [])
    meter = Meter(None, "reading YFCC100M's metadata", "lines")
    for part in parts:
        with open_list(part) as file:
            for line in file:
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != METADATA_COLUMNS or not fields[_PHOTO_ID].isdigit():
                    invalid[0] += 1
                    continue
                values = (
                    int(fields[_PHOTO_ID]),
                    fields[_HASH].decode("ascii", "replace"),
                    fields[_TITLE],
                    fields[_DESCRIPTION],
                    fields[_URL].decode("utf-8", "replace"),
                    fields[_MARKER] == b"1",
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
                if len(columns[0]) == _ROWS_AT_ONCE:
                    yield pa.record_batch([*columns], schema=schema)
                    meter.update(_ROWS_AT_ONCE)
                    for column in columns:
                        column.clear()
    yield pa.record_batch([*columns], schema=schema)
    meter.close()


# --- DeCLIP's list


def read_declip(path: Path) -> Iterator[ListRow | BadRow]:
    """Yields the rows of DeCLIP's list; `id` is the file name. Raises InputError if the first line is not of its layout."""
    check_declip(path)
    with open_list(path) as file:
        for number, line in enumerate(file):
            yield _declip_row(line, number)


def check_declip(path: Path) -> None:
    """Raises InputError unless the first line is JSON with a caption and a url."""
    with open_list(path) as file:
        first = file.readline()
    row = _declip_row(first, 0)
    if isinstance(row, BadRow) and row.reason in (NOT_JSON, TOO_FEW_COLUMNS, NOT_UTF8):
        raise InputError(
            f'expected JSON lines such as {{"filename": …, "caption": …, "url": …}} in {path}, found {first[:120]!r}; take '
            "the label file that DeCLIP's docs/dataset_prepare.md names"
        )


def _declip_row(line: bytes, number: int) -> ListRow | BadRow:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRow(number, NOT_UTF8)
    except json.JSONDecodeError:
        return BadRow(number, NOT_JSON)
    if not isinstance(record, dict) or "url" not in record or "caption" not in record:
        return BadRow(number, TOO_FEW_COLUMNS)
    url, given = str(record["url"] or "").strip(), record["caption"]
    captions = tuple(" ".join(str(text).split()) for text in (given if isinstance(given, list) else [given]) if text)
    captions = tuple(caption for caption in captions if caption)
    if not url or not is_url(url):
        return BadRow(number, NOT_A_URL if url else EMPTY_URL, url or None)
    if not captions:
        return BadRow(number, EMPTY_CAPTION, url)
    filename = record.get("filename")
    return ListRow(number, url, captions, None if filename is None else str(filename))
