"""The published lists of image–text pairs that are downloaded by url, and readers that stream their rows.

A row that cannot be used becomes a BadRow with its reason; nothing is lost in silence, and no list is held in memory.
Used by data_prep.fetch. Layouts and numbers of pairs: see each entry of LISTS for where they are published.
"""

import bz2
import contextlib
import gzip
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from setclip.errors import InputError

TOO_FEW_COLUMNS = "list_too_few_columns"
EMPTY_URL = "list_empty_url"
NOT_A_URL = "list_not_a_url"
EMPTY_CAPTION = "list_empty_caption"
NOT_UTF8 = "list_not_utf8"

_ROWS_LOOKED_AT = 100  # to find out whether the columns are what they are said to be


@dataclass(frozen=True, slots=True)
class ListRow:
    """One pair (or one image with several captions) that can be asked for."""

    row: int
    """Number in the published list, from 0; a header line is not counted."""
    url: str
    captions: tuple[str, ...]
    """At least one, none of them empty."""
    id: str | None = None
    """What the list calls the sample, where it has such a name."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of the list that cannot be asked for."""

    row: int
    reason: str
    """One of this module's constants or of data_prep.yfcc's; all begin with "list_"."""
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedList:
    """One entry of LISTS."""

    what: str
    pairs: int | None
    """Pairs of the list as it was published; None for lists of one's own."""
    published_at: str
    """Where it is, for people; nothing here downloads it."""
    url_column: str | None = None
    """Of lists that are tab-separated: number (from 1) or name of a column."""
    caption_column: str | None = None


LISTS: Mapping[str, PublishedList] = {
    "cc3m": PublishedList(
        what="Conceptual Captions, training split (Train_GCC-training.tsv: caption, url)",
        pairs=3_318_333,
        published_at="https://ai.google.com/research/ConceptualCaptions/download",
        caption_column="1",
        url_column="2",
    ),
    "cc12m": PublishedList(
        what="Conceptual 12M (cc12m.tsv: url, caption)",
        pairs=12_423_374,
        published_at="https://github.com/google-research-datasets/conceptual-12m",
        url_column="1",
        caption_column="2",
    ),
    "yfcc15m-clip": PublishedList(
        what="CLIP's subset of YFCC100M (line number, photo id, photo hash), joined with YFCC100M's metadata",
        pairs=14_829_396,
        published_at="https://github.com/openai/CLIP/blob/main/data/yfcc100m.md",
    ),
    "yfcc15m-declip": PublishedList(
        what="DeCLIP's subset of YFCC100M (JSON lines: filename, caption, url)",
        pairs=15_388_848,
        published_at="https://github.com/Sense-GVT/DeCLIP/blob/main/docs/dataset_prepare.md",
    ),
    "tsv": PublishedList(
        what="any tab-separated list with a column of urls and one of captions",
        pairs=None,
        published_at="of your own",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a tab-separated list has its two columns."""

    url: int
    """From 0."""
    caption: int
    has_header: bool


def read_tsv(path: Path, url_column: str, caption_column: str) -> Iterator[ListRow | BadRow]:
    """Yields a tab-separated list's rows (plain, .gz or .bz2). There is no quoting: a quotation mark is a character.

    Columns are numbers from 1, or names, which the first line then holds. A first line that names both columns ("url"
    and "caption") is taken for a header in any case, because guides tell people to add one. Raises InputError as
    `tsv_columns` does.
    """
    columns = tsv_columns(path, url_column, caption_column)
    with open_list(path) as file:
        for number, line in enumerate(_after_header(file, columns)):
            yield _parse(line, number, columns)


def tsv_columns(path: Path, url_column: str, caption_column: str) -> Columns:
    """Returns where the columns are, looking at the first 100 rows.

    Raises InputError where there is no such column, where the column of urls holds none (saying so if the other one
    does: the order is mistaken), and where the file is empty or damaged.
    """
    with open_list(path) as file:
        lines = list(itertools.islice(file, _ROWS_LOOKED_AT + 1))
    if not lines:
        raise InputError(f"expected a tab-separated list in {path}, found an empty file; fetch the list again")
    columns = _columns(path, lines[0], url_column, caption_column)
    rows = [_parse(line, number, columns) for number, line in enumerate(lines[columns.has_header :])]
    if rows and not any(isinstance(row, ListRow) or row.reason == EMPTY_CAPTION for row in rows):
        swapped = Columns(url=columns.caption, caption=columns.url, has_header=columns.has_header)
        others = [_parse(line, 0, swapped) for line in lines[columns.has_header :]]
        first = lines[columns.has_header][:120].decode("utf-8", "replace").rstrip("\n")
        if any(isinstance(row, ListRow) for row in others):
            raise InputError(
                f"expected urls in column {columns.url + 1} of {path}, found them in column {columns.caption + 1}, where "
                f"captions should be; the first row is {first!r}. This is another list than the one named, or its "
                f"columns are in another order: read it as `tsv --url-column {columns.caption + 1} --caption-column "
                f"{columns.url + 1}`"
            )
        raise InputError(
            f"expected urls (http://… or https://…) in column {columns.url + 1} of {path}, found none in the first "
            f"{len(rows)} rows; the first is {first!r}. Name the columns of another list with `tsv --url-column N "
            "--caption-column M`"
        )
    return columns


@contextlib.contextmanager
def open_list(path: Path) -> Iterator[IO[bytes]]:
    """Yields a list as a file of bytes, decompressed where its first bytes say gzip or bzip2 (whatever its name).

    Raises InputError where there is no such file, or where its compressed data ends early or is damaged.
    """
    if not path.is_file():
        raise InputError(f"expected a list at {path}, found no such file; give its place with --list")
    with open(path, "rb") as file:
        start = file.read(3)
    try:
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path, "rb") as compressed:
                yield compressed  # type: ignore[misc]
        elif start == b"BZh":
            with bz2.open(path, "rb") as compressed:
                yield compressed
        else:
            with open(path, "rb") as file:
                yield file
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise InputError(f"{path}: expected a whole compressed file, found {error}; fetch it again") from error


def is_url(text: str) -> bool:
    """Whether img2dataset can be asked for it. Other schemes are refused: it would read "file:" from this machine."""
    return text[:8].lower().startswith(("http://", "https://"))


def _columns(path: Path, first: bytes, url_column: str, caption_column: str) -> Columns:
    header = [field.strip().lower() for field in first.decode("utf-8", "replace").rstrip("\r\n").split("\t")]
    if {"url", "caption"} <= set(header):
        url, caption = header.index("url"), header.index("caption")
        if url_column.isdigit() or caption_column.isdigit():
            return Columns(url=url, caption=caption, has_header=True)
    if url_column.isdigit() != caption_column.isdigit():
        raise InputError(
            f"expected two numbers or two names of columns, found {url_column!r} and {caption_column!r}; names need a "
            "first line with names, so a list has them for both or for neither"
        )
    if url_column.isdigit():
        numbers = {"url": int(url_column) - 1, "caption": int(caption_column) - 1}
        if min(numbers.values()) < 0 or numbers["url"] == numbers["caption"]:
            raise InputError(
                f"expected two different columns, counted from 1, found {url_column} and {caption_column}; give them with "
                "--url-column and --caption-column"
            )
        return Columns(**numbers, has_header=False)
    missing = [name for name in (url_column, caption_column) if name.lower() not in header]
    if missing:
        raise InputError(
            f"expected a first line with columns {url_column!r} and {caption_column!r} in {path}, found {header}; a list "
            "without such a line has numbers: --url-column 1 --caption-column 2"
        )
    return Columns(url=header.index(url_column.lower()), caption=header.index(caption_column.lower()), has_header=True)


def _after_header(file: IO[bytes], columns: Columns) -> Iterator[bytes]:
    return itertools.islice(file, int(columns.has_header), None)


def _parse(line: bytes, number: int, columns: Columns) -> ListRow | BadRow:
    try:
        fields = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return BadRow(number, NOT_UTF8)
    if len(fields) <= max(columns.url, columns.caption):
        return BadRow(number, TOO_FEW_COLUMNS)
    url, caption = fields[columns.url].strip(), fields[columns.caption].strip()
    if not url:
        return BadRow(number, EMPTY_URL)
    if not is_url(url):
        return BadRow(number, NOT_A_URL, url)
    if not caption:
        return BadRow(number, EMPTY_CAPTION, url)
    return ListRow(number, url, (caption,))
