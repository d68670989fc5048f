"""descriptions.parquet: what classes look like, in a language model's words. Written by data_prep, read by pretrain.

One row an object that was asked about, by name. Rows without a description stay, with the reason among their flags, so
that "asked and nothing came of it" and "never asked" are told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from setclip.errors import InputError
from setclip.files import replacing
from setclip.objects import object_id

DESCRIPTIONS_NAME = "descriptions.parquet"

_FLAGS = pa.list_(pa.field("element", pa.string(), nullable=False))
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("id", pa.int64()),
        ("description", pa.string()),
        ("flags", _FLAGS),
        ("model", pa.string()),
        ("prompt_version", pa.string()),
    ]
)


@dataclass(frozen=True)
class Description:
    """What was said of one object."""

    name: str
    text: str
    """"" where no answer was good."""
    flags: tuple[str, ...]
    """What is odd about it, or why there is none."""
    prompt_version: str
    """Of the question that it answers; "" where there is none."""


@dataclass(frozen=True, eq=False)
class DescriptionTable:
    """The descriptions of one folder's objects."""

    model: str
    parser: str
    """Whose objects were described."""
    chosen: str
    """Which of them: "tail" or "all"."""
    rows: Sequence[Description]

    @cached_property
    def texts(self) -> dict[str, str]:
        """Name to description, for the objects that have one."""
        return {row.name: row.text for row in self.rows if row.text}

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """(R,) object ids of all rows."""
        return np.array([object_id(row.name) for row in self.rows], np.int64)


def write_descriptions(path: str | Path, table: DescriptionTable) -> None:
    """Writes descriptions.parquet, sorted by name."""
    rows = sorted(table.rows, key=lambda row: row.name)
    columns = {
        "name": [row.name for row in rows],
        "id": [object_id(row.name) for row in rows],
        "description": [row.text for row in rows],
        "flags": [list(row.flags) for row in rows],
        "model": [table.model] * len(rows),
        "prompt_version": [row.prompt_version for row in rows],
    }
    metadata = {"model": table.model, "parser": table.parser, "chosen": table.chosen}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA).replace_schema_metadata(metadata), temporary)


def read_descriptions(path: str | Path) -> DescriptionTable:
    """Reads descriptions.parquet (or the one in the folder `path`). Raises InputError that names what makes it."""
    path = Path(path)
    if path.is_dir():
        path = path / DESCRIPTIONS_NAME
    advice = f"make it with `python -m data_prep.describe {path.parent} --model MODEL`"
    if not path.exists():
        raise InputError(f"expected descriptions of objects at {path}, found no such file; {advice}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"expected descriptions of objects at {path}, found {str(error).splitlines()[0]}; {advice}"
        ) from error
    if missing := [name for name in _SCHEMA.names if name not in table.column_names]:
        raise InputError(f"expected columns {_SCHEMA.names} in {path}, found none of {missing}; {advice}")
    notes = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    columns = (table.column(name).to_pylist() for name in ("name", "description", "flags", "prompt_version"))
    rows = [Description(name, text, tuple(flags), version) for name, text, flags, version in zip(*columns, strict=True)]
    return DescriptionTable(notes.get("model", ""), notes.get("parser", ""), notes.get("chosen", ""), rows)
