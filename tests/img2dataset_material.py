"""Output folders of img2dataset for the tests of data preparation: tar, table and counts, as its own writer lays them out.

The members come from webdataset's writer, which img2dataset uses: sorted by extension, with a pax header before each.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from material import picture

from data_prep.plan import Dropped, Record, Unit


def write_shard(folder: Path, shard: int, rows: int, failed: Sequence[int] = (), **columns: Mapping[int, Any]) -> Path:
    """Writes NNNNN.tar, NNNNN.parquet and NNNNN_stats.json of `rows` rows, of which those in `failed` did not come.

    `columns` are further columns of the list (row number in the shard to value). Returns the tar's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{shard:05d}"
    table = []
    with open(stem.with_suffix(".tar"), "wb") as file, webdataset.TarWriter(file) as tar:
        for row in range(rows):
            came = row not in failed
            size = 40 if came else None
            meta: dict[str, Any] = {
                "url": f"https://example.org/{shard}/{row}.jpg",
                "caption": f"a dog number {row} of shard {shard}",
                **{name: values[row] for name, values in columns.items()},
                "key": f"{shard:05d}{row:04d}",
                "status": "success" if came else "failed_to_download",
                "error_message": None if came else "HTTP Error 404: Not Found",
                "width": size,
                "height": size,
                "original_width": None if size is None else 2 * size,
                "original_height": None if size is None else 3 * size,
                "sha256": "0" * 64 if came else None,
            }
            table.append(meta)
            if came:
                sample = {
                    "jpg": picture(1000 * shard + row),
                    "json": json.dumps(meta, indent=4),
                    "txt": meta["caption"],
                }
                tar.write({"__key__": meta["key"], **sample})
    pq.write_table(pa.Table.from_pylist(table), stem.with_suffix(".parquet"))
    stats = {"count": rows, "successes": rows - len(failed), "failed_to_download": len(failed), "failed_to_resize": 0}
    stem.with_name(f"{stem.name}_stats.json").write_text(json.dumps({**stats, "duration": 1.5, "status_dict": {}}))
    return stem.with_suffix(".tar")


def write_members(path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """Writes a tar of any members, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def records(items: Sequence[Record | Dropped]) -> list[Record]:
    """Returns the records among what a unit yields."""
    return [item for item in items if isinstance(item, Record)]


def dropped(items: Sequence[Record | Dropped]) -> list[tuple[str, str, int, int]]:
    """Returns (reason, kind, pairs, samples) of all that was dropped."""
    return [(d.reason, d.kind, d.pairs, d.samples) for d in items if isinstance(d, Dropped)]


def count_samples(items: Sequence[Record | Dropped]) -> int:
    """Returns how many samples the items account for."""
    return sum(1 if isinstance(item, Record) else item.samples for item in items)


def read_all(units: Sequence[Unit]) -> list[Record | Dropped]:
    """Returns what all units yield."""
    return [item for unit in units for item in unit.read()]
