"""Parquet files with image bytes and captions in their rows: Hugging Face's, and those that img2dataset can write.

The image is a struct with `bytes` (Hugging Face's image type) or plain binary, the caption a text or a list of texts.
Files are read page by page (a page of most writers is up to 1,024 rows), not whole row groups at once. A unit is a range
of row groups of at most 10,000 rows together (or one larger row group), found in the file's footer while planning.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images import MAX_BYTES as MAX_IMAGE_BYTES
from data_prep.plan import Dropped, Plan, PrepareConfig, Record, Unit
from data_prep.sources.places import check_split, find_files, state_of
from data_prep.sources.untrusted import (
    BAD_TEXT,
    LARGE_IMAGE,
    LARGE_TEXT,
    MAX_TEXT_BYTES,
    NO_CAPTION,
    NO_IMAGE,
    NOT_DOWNLOADED,
    deliver,
    kept_entries,
)
from setclip.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "TEXT", "txt")
URL_COLUMNS = ("url", "URL", "image_url")

DAMAGED = "rows of a damaged Parquet file"

_ROWS_PER_UNIT = 10_000
_ROWS_AT_ONCE = 32  # images in memory
_READ_AT_ONCE = 1 << 20
_METADATA = ("key", "__key__", "row", "id", "uid", "original_width", "original_height", "status")


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(PrepareConfig):
    """Packs Parquet files with image bytes and captions, such as data sets of the Hugging Face Hub."""

    parquet: tuple[str, ...]
    """Folders (with their subfolders), files, brace patterns or globs of .parquet files."""
    image_column: str | None = None
    """Column of the images; without it the first there is of image, jpg, jpeg, png, webp, image_bytes, bytes."""
    caption_column: str | None = None
    """Column of the captions; without it the first there is of captions, caption, text, TEXT, txt."""
    url_column: str | None = None
    """Column of the addresses; without it url, URL or image_url if there is one."""
    split: str | None = None
    """Split of all files. Without it: what their names tell (train-00000-of-00010.parquet; "validation" is val), else
    train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_split(self.split)


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are what."""

    image: str
    caption: str
    url: str | None
    metadata: tuple[str, ...]

    def names(self) -> list[str]:
        """Returns those to be read, each once."""
        return list(dict.fromkeys([self.image, self.caption, *([self.url] if self.url else []), *self.metadata]))


def plan(config: ParquetConfig) -> Plan:
    """Returns the units of all files, after checking their columns. Raises InputError for columns that do not fit."""
    files, warnings = find_files(config.parquet, ".parquet", "--parquet", config.split)
    units = []
    for file in files:
        with _open(file.path) as table:
            columns = find_columns(file.path, table.schema_arrow, config)
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        for first, last, start, rows in _ranges(sizes):
            name = f"{file.path}" + (f", rows {start:,} to {start + rows - 1:,}" if rows < sum(sizes) else "")
            read = partial(read_rows, str(file.path), columns, first, last, start)
            units.append(Unit(name=name, split=file.split, read=read, state=state_of(file.path)))
    if not units:
        raise InputError(f"expected rows in {len(files)} Parquet files, found none (the first is {files[0].path})")
    return Plan(units=units, warnings=warnings)


def read_rows(path: str, columns: Columns, first: int, last: int, start: int) -> Iterator[Record | Dropped]:
    """Yields the rows of the row groups `first` to `last` - 1, whose first row is row `start` of the file.

    Where the file is damaged inside, the rest of these rows is counted as lost. Raises InputError if it cannot be opened.
    """
    with _open(Path(path)) as table:
        groups = list(range(first, last))
        try:
            expected = sum(table.metadata.row_group(group).num_rows for group in groups)
        except (IndexError, OSError, pa.ArrowException) as error:
            raise InputError(
                f"expected {last} row groups in {path}, found {error}; the file changed: start again"
            ) from error
        row = 0
        try:
            for batch in table.iter_batches(
                _ROWS_AT_ONCE, row_groups=groups, columns=columns.names(), use_threads=False
            ):
                for place in range(len(batch)):
                    # Counted before it is read: a row that fails is among the lost ones only if nothing came of it.
                    items = list(_row(batch, place, columns, f"{Path(path).stem}:{start + row}"))
                    row += 1
                    yield from items
        except (OSError, pa.ArrowException):
            if row < expected:
                yield Dropped(DAMAGED, pairs=expected - row, samples=expected - row)


def find_columns(path: Path, schema: pa.Schema, config: ParquetConfig) -> Columns:
    """Returns the columns that are to be read. Raises InputError that lists the file's columns and the nearest."""
    image = _choose(path, schema, config.image_column, IMAGE_COLUMNS, "image")
    caption = _choose(path, schema, config.caption_column, CAPTION_COLUMNS, "caption")
    url = None
    if config.url_column is not None or any(name in schema.names for name in URL_COLUMNS):
        url = _choose(path, schema, config.url_column, URL_COLUMNS, "url")
    for name, fits, wanted in (
        (image, _is_image(schema.field(image).type), "binary, or a struct with a binary `bytes`"),
        (caption, _is_captions(schema.field(caption).type), "text, or a list of texts"),
    ):
        if not fits:
            raise InputError(
                f"expected {wanted} in column {name!r} of {path}, found {schema.field(name).type}; choose another with "
                f"--{'image' if name == image else 'caption'}-column; columns: {_listed(schema)}"
            )
    return Columns(image, caption, url, tuple(name for name in _METADATA if name in schema.names))


def _choose(path: Path, schema: pa.Schema, asked: str | None, usual: tuple[str, ...], what: str) -> str:
    found = [name for name in ([asked] if asked is not None else usual) if name in schema.names]
    if found:
        return found[0]
    nearest = difflib.get_close_matches(asked or usual[0], schema.names, n=1, cutoff=0.5)
    perhaps = f", perhaps {nearest[0]!r}" if nearest else ""
    wanted = f"column {asked!r}" if asked is not None else f"a column {usual[0]!r} (or {', '.join(usual[1:])})"
    raise InputError(f"expected {wanted} in {path}, found {_listed(schema)}{perhaps}; name it with --{what}-column")


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_binary(kind.field(place).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_captions(kind: pa.DataType) -> bool:
    return _is_text(kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _ranges(sizes: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yields (first row group, the one after the last, first row, rows) for each unit of a file."""
    first = start = rows = 0
    for number, size in enumerate(sizes):
        if rows and rows + size > _ROWS_PER_UNIT:
            yield first, number, start, rows
            first, start, rows = number, start + rows, 0
        rows += size
    if rows:
        yield first, len(sizes), start, rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Buffered, a row group is read page by page; otherwise all its images would be in memory at once.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AT_ONCE, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"expected a Parquet file at {path}, found {error}; fetch it again or leave it out") from error


def _row(batch: pa.RecordBatch, place: int, columns: Columns, name: str) -> Iterator[Record | Dropped]:
    entries = {column: _plain(batch, column, place) for column in columns.metadata}
    image = _image(batch.column(columns.image), place)
    if image is None:
        if entries.get("status") not in (None, "success"):  # img2dataset's rows of what did not come
            yield Dropped(NOT_DOWNLOADED, "absent")
        else:
            yield Dropped(NO_IMAGE)
        return
    if len(image) > MAX_IMAGE_BYTES:
        yield Dropped(LARGE_IMAGE)
        return
    captions = _captions(batch.column(columns.caption), place)
    if not captions:
        yield Dropped(NO_CAPTION)
        return
    if sum(len(caption) for caption in captions if caption is not None) > MAX_TEXT_BYTES:
        yield Dropped(LARGE_TEXT, pairs=len(captions))
        return
    try:
        texts = [None if caption is None else caption.decode() for caption in captions]
    except UnicodeDecodeError:
        yield Dropped(BAD_TEXT, pairs=len(captions))
        return
    key = next((entries[column] for column in ("key", "__key__") if isinstance(entries.get(column), str)), name)
    url = None if columns.url is None else _plain(batch, columns.url, place)
    yield from deliver(
        image=image, captions=texts, name=name, url=url, extra={"source_key": key, **kept_entries(entries)}
    )


def _image(column: pa.Array, place: int) -> bytes | None:
    if not column[place].is_valid:
        return None
    return (column.field("bytes") if pa.types.is_struct(column.type) else column)[place].as_py()


def _captions(column: pa.Array, place: int) -> list[bytes | None]:
    """Returns the captions as bytes: Arrow believes a file that its texts are UTF-8, and fails where they are not."""
    if not column[place].is_valid:
        return []
    if _is_text(column.type):
        return [_bytes(column.slice(place, 1))[0].as_py()]
    return _bytes(column[place].values).to_pylist()


def _bytes(texts: pa.Array) -> pa.Array:
    return texts.cast(pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary())


def _plain(batch: pa.RecordBatch, column: str, place: int) -> Any:
    try:
        return batch.column(column)[place].as_py()
    except UnicodeDecodeError:
        return None
