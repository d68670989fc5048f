"""The folder of exported embeddings: one file a part as Parquet or npy, and embeddings.json, written last.

    OUT/embeddings.json             model, source, settings, counts; its presence means complete
    OUT/bad.jsonl                   pictures that could not be used, one a line, with the reason
    OUT/images-PART.parquet         key, path, embedding
    OUT/texts-PART.parquet          key, path, caption (its number), text, embedding
    OUT/images-PART.npy, .ids.jsonl (format npy) the embeddings, and the other columns, one object a line

Written by `eval_suite.embed`, read by search. Letters: N rows, K elements of a set, D width.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from setclip.errors import InputError
from setclip.files import replacing

EMBEDDINGS_NAME = "embeddings.json"
BAD_NAME = "bad.jsonl"
FORMAT_VERSION = 1

What = Literal["images", "texts"]
Format = Literal["parquet", "npy"]
DType = Literal["float32", "float16"]

_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "path": pa.string(),
    "caption": pa.int32(),
    "text": pa.string(),
}


def write_part(
    stem: Path, columns: Mapping[str, Sequence[Any]], vectors: NDArray[Any], file_format: Format
) -> dict[str, int]:
    """Writes the rows of a part, each file beside and renamed; returns file name to bytes.

    `stem`: path without suffix. `columns`: some of key, path, caption and text, N values each. `vectors`: (N, D), or of
    sets (N, K, D), float16 or float32.
    """
    if file_format == "parquet":
        paths = [stem.with_name(f"{stem.name}.parquet")]
        arrays = [pa.array(values, _COLUMNS[name]) for name, values in columns.items()]
        table = pa.table([*arrays, _vector_column(vectors)], names=[*columns, "embedding"])
        with replacing(paths[0]) as temporary:
            # Embeddings have no repeated values: a dictionary of them would cost time and space.
            pq.write_table(table, temporary, use_dictionary=[name for name in columns if name == "path"])
    else:
        paths = [stem.with_name(f"{stem.name}.npy"), stem.with_name(f"{stem.name}.ids.jsonl")]
        with replacing(paths[0]) as temporary:
            np.save(temporary, vectors)
        with replacing(paths[1]) as temporary:
            rows = zip(*columns.values(), strict=True)
            write_lines(temporary, (dict(zip(columns, row, strict=True)) for row in rows))
    return {path.name: path.stat().st_size for path in paths}


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Embeddings:
    """A complete folder of exported embeddings."""

    folder: Path
    description: dict[str, Any]
    """The content of embeddings.json."""

    @classmethod
    def open(cls, folder: Path) -> "Embeddings":
        """Raises InputError where there is none, or an unfinished one, or a file is missing or cut."""
        path = folder / EMBEDDINGS_NAME
        if not path.exists():
            raise InputError(
                f"expected complete embeddings at {path}, found {'an unfinished export' if folder.exists() else 'no folder'}; "
                f"make them with `python -m eval_suite.embed DIR --out {folder}` (started again it goes on)"
            )
        description = json.loads(path.read_text(encoding="utf-8"))
        if description.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {description.get('format_version')!r}; embed again"
            )
        for part in description["parts"]:
            for name, size in part["files"].items():
                found = (folder / name).stat().st_size if (folder / name).exists() else None
                if found != size:
                    raise InputError(
                        f"{folder / name}: expected {size:,} bytes as {EMBEDDINGS_NAME} says, found "
                        f"{'no file' if found is None else f'{found:,}'}; copy the folder again, or embed again"
                    )
        return cls(folder, description)

    def shape(self, what: What = "images") -> tuple[int, ...]:
        """Returns (D,), or (K, D) for sets: of sets of different sizes the largest."""
        return tuple(self.description["shape"][what])

    def parts(self, what: What = "images") -> Iterator[tuple[dict[str, list[Any]], NDArray[np.float32]]]:
        """Yields (columns without the embedding, embeddings (N, …, D) float32) of each part that has rows.

        Sets that are smaller than `shape` says have zero vectors behind.
        """
        largest = self.shape(what) if what in self.description["shape"] else ()
        file_format = self.description["settings"]["format"]
        for part in self.description["parts"]:
            if not part[what]:
                continue
            stem = f"{what}-{part['name']}"
            if file_format == "parquet":
                table = pq.read_table(self.folder / f"{stem}.parquet")
                columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "embedding"}
                shape = tuple(part["shape"][what]) if "shape" in part else largest
                vectors = _vectors_of(table.column("embedding").combine_chunks(), shape)
            else:
                lines = (self.folder / f"{stem}.ids.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
                rows = [json.loads(line) for line in lines]
                columns = {name: [row[name] for row in rows] for name in rows[0]}
                vectors = np.load(self.folder / f"{stem}.npy")
            if vectors.shape[1:] != largest:
                vectors = np.pad(vectors, ((0, 0), (0, largest[0] - vectors.shape[1]), (0, 0)))
            yield columns, vectors.astype(np.float32, copy=False)


def _vector_column(vectors: NDArray[Any]) -> pa.Array:
    """Returns vectors as fixed-size lists, and sets as Arrow's fixed-shape tensors, whose storage is the same."""
    flat = pa.array(vectors.reshape(-1), pa.from_numpy_dtype(vectors.dtype))
    lists = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(vectors.shape[1:])))
    if vectors.ndim == 2:
        return lists
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1:])
    return pa.ExtensionArray.from_storage(kind, lists)


def _vectors_of(column: pa.Array, shape: tuple[int, ...]) -> NDArray[Any]:
    storage = column.storage if isinstance(column, pa.ExtensionArray) else column
    return storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)
