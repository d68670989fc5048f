"""Files that appear whole or not at all: written beside, flushed to disk, then renamed. Used by every writer."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed and renamed to `path`, on an error removed.

    The temporary name keeps the suffix (some writers look at it) and has random digits, so that two processes, on any
    machines, never write the same temporary file. A folder can be made at the temporary path instead of a file; it then
    replaces an existing folder of the final name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            remove(path)
        else:
            _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        remove(temporary)


def remove_partial(folder: Path, stem: str = "*") -> None:
    """Removes what killed processes left of files and folders (named `stem`, without suffix) that they were writing.

    Only for a folder, or a name in it, that no other process is writing.
    """
    for path in folder.glob(f".{stem}.*.partial*"):
        remove(path)


def remove(path: Path) -> None:
    """Removes the file or folder at `path`, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON with a newline at its end, beside and renamed. NaN is refused (not JSON)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
