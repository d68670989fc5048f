"""What strangers' files may hold: limits, the reasons for refusing more, and fields that are looked at before use.

Files from the web hold anything: JSON nested a million deep, a caption of 2 GB, bytes that are no text. Whatever is
refused becomes a `Dropped` with one of the reasons below, so it is counted. Used by the sources of files.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.plan import Dropped, Record

MAX_TEXT_BYTES = 1_000_000  # of a JSON or text of one sample, or of one line

NO_IMAGE = "caption without image"
NO_CAPTION = "image without caption"
LARGE_IMAGE = "image over 50 MB"
LARGE_JSON = "JSON over 1 MB"
LARGE_TEXT = "text over 1 MB"
BAD_JSON = "JSON that cannot be read"
BAD_TEXT = "text that is not UTF-8"
NOT_TEXT = "caption that is not text"
NUL = "caption with a NUL character"
NOT_DOWNLOADED = "not downloaded"

CAPTIONS = " (captions, not samples)"  # ends a reason where other captions of the sample stay

_KEPT = ("row", "id", "uid", "original_width", "original_height")
_MAX_URL = 8_000  # characters
_MAX_ENTRY = 200


class RefusedError(ValueError):
    """A field that is not taken; the message is a reason to be counted."""


def parse_json(data: bytes) -> Any:
    """Returns the value that `data` spells. Raises RefusedError."""
    if len(data) > MAX_TEXT_BYTES:
        raise RefusedError(LARGE_JSON)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of 5,000 digits; nested too deep
        raise RefusedError(BAD_JSON) from error


def parse_text(data: bytes) -> str:
    """Returns a text without a byte-order mark. Raises RefusedError."""
    if len(data) > MAX_TEXT_BYTES:
        raise RefusedError(LARGE_TEXT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError(BAD_TEXT) from error


def as_captions(value: Any) -> list[Any]:
    """Returns a caption, or a list of them, as a list; None is none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def is_blank(captions: list[Any]) -> bool:
    """Whether there is no text among them but white space."""
    return not any(isinstance(caption, str) and caption.strip() for caption in captions)


def deliver(
    *, image: bytes, captions: list[Any], name: str, url: Any = None, extra: Mapping[str, Any] | None = None
) -> Iterator[Record | Dropped]:
    """Yields the sample with those captions that are text, and what is refused: single captions, or all of it."""
    kept = []
    refused = []
    for caption in captions:
        if not isinstance(caption, str):
            refused.append(NOT_TEXT)
        elif "\0" in caption:
            refused.append(NUL)
        else:
            kept.append(caption)
    if refused and not kept:
        yield Dropped(refused[0], pairs=len(captions))
        return
    for reason in refused:
        yield Dropped(reason + CAPTIONS, "filtered", samples=0)
    is_url = isinstance(url, str) and 0 < len(url) <= _MAX_URL
    yield Record(image=image, captions=kept, name=name, url=url if is_url else None, extra=dict(extra or {}))


def kept_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is kept of a sample's metadata: its place in the list it came from, and its size at the origin.

    Width, height and hashes that the metadata claims are measured, not believed.
    """
    return {name: entries[name] for name in _KEPT if _is_plain(entries.get(name))}


def printable(name: str) -> str:
    """Returns a name that can be written as UTF-8; bytes that are no text are spelled \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, str) and len(value) <= _MAX_ENTRY
