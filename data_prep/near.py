"""Images that look alike: near duplicates, and training images that are also in an evaluation set. Optional.

Two images are alike where their perceptual hashes (imagehash's `phash`, the signs of low frequencies) differ in few
bits. The hashes are made while samples are packed and lie in the indices; the merge searches them here. The search is
exact: hashes within r bits agree wholly in one of r + 1 bands, so DuckDB joins on bands and then counts bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.duplicates import Decision, as_patterns, connect
from setclip.decode import DecodeError, decode_rgb
from setclip.errors import InputError
from setclip.log import progress, say
from setclip.manifest import MANIFEST_NAME, Manifest, check_shards
from setclip.shards import FEATURES_PREFIX, Shard, is_image_extension

NEAR_DUPLICATE = "near duplicate (perceptual hash)"
CONTAMINATED = "alike an evaluation image (perceptual hash)"
FEATURE = "phash"  # its column in the index
MAX_BITS = 8  # bands of less than seven bits would compare nearly everything with everything

_BITS = 63
_SIDE = 64  # pixels that are enough for a hash of 8×8 frequencies


def perceptual_hash(image: bytes) -> int:
    """Returns 63 bits (never negative) of an image in any format that `setclip.decode` reads. Raises DecodeError.

    The first of imagehash's 64 bits is left out: it says whether the mean is above the median frequency, which it
    nearly always is, and the rest fits a signed integer.
    """
    import imagehash  # with scipy, which every command would wait for; few use it

    pixels = Image.fromarray(decode_rgb(image, min_size=_SIDE))
    bits = np.ravel(imagehash.phash(pixels).hash)[1:]
    return int(sum(1 << place for place, bit in enumerate(bits.tolist()) if bit))


def check_folders(folders: Sequence[str]) -> None:
    """Raises InputError where an evaluation folder is not there or holds no image."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(
                f"expected a folder of shards or images at {folder}, found none; --decontaminate takes the folders of "
                "evaluation images"
            )
        if next(_images(Path(folder)), None) is None:
            raise InputError(f"expected evaluation images in {folder}, found none; give another --decontaminate")


def evaluation_hashes(folders: Sequence[str]) -> list[int]:
    """Returns the distinct hashes of all evaluation images: shards of other splits than "train", or loose images.

    An image that cannot be decoded is an error here: it would be missed silently.
    """
    found: set[int] = set()
    for folder in folders:
        number = 0
        for name, image in progress(_images(Path(folder)), description=f"hashing {folder}", unit="images"):
            try:
                found.add(perceptual_hash(image))
            except DecodeError as error:
                raise InputError(
                    f"expected an image in {name}, found one that cannot be used ({error}); remove it"
                ) from error
            number += 1
        say(f"decontamination against {number:,} images of {folder}")
    return sorted(found)


def leave_out_alike(
    decisions: Mapping[int, Decision],
    indices: Sequence[Path],
    splits: Sequence[str],
    scratch: Path,
    *,
    bits: int,
    near_duplicates: bool,
    evaluation: Sequence[int],
) -> None:
    """Adds to `decisions` (a defaultdict) the rows whose image is alike an evaluation image or an earlier one.

    Evaluation images count against the split "train" alone. A near duplicate is a sample of the same split that comes
    after an image within `bits` bits of its own; of a chain the first stays. `indices` and `splits` are the shards.
    """
    with connect(indices, splits, scratch) as database:
        if evaluation:
            database.register("evaluation", pa.table({"hash": pa.array(evaluation, pa.int64())}))
            _leave_out(decisions, database, _CONTAMINATED_QUERY, indices, bits, CONTAMINATED)
        # What is left out already is no image that others could be duplicates of.
        decided = [(number, row) for number, decision in decisions.items() for row in decision.leave_out]
        columns = {"number": [n for n, _ in decided], "row": [row for _, row in decided]}
        database.register("decided", pa.table({name: pa.array(v, pa.int64()) for name, v in columns.items()}))
        if near_duplicates:
            _leave_out(decisions, database, _NEAR_QUERY, indices, bits, NEAR_DUPLICATE)


def _leave_out(
    decisions: Mapping[int, Decision],
    database: duckdb.DuckDBPyConnection,
    query: str,
    indices: Sequence[Path],
    bits: int,
    reason: str,
) -> None:
    width = _BITS // (bits + 1)
    values: dict[str, Any] = {
        "indices": as_patterns(indices),
        "bits": bits,
        "width": width,
        "mask": (1 << width) - 1,
    }
    found = database.execute(query, values)
    while batch := found.fetchmany(10_000):
        for number, row in batch:
            decisions[number].leave_out.setdefault(row, reason)
            decisions[number].rename.pop(row, None)


def _images(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of the evaluation images of a folder."""
    if (folder / MANIFEST_NAME).exists():
        shards = [info for info in Manifest.load(folder).shards if info.split != "train"]
        check_shards(folder, shards)
        for info in shards:
            for sample in Shard(folder / info.name):
                yield f"{folder / info.name}, sample {sample.key}", sample.image
        return
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_image_extension(path.suffix[1:]):
            yield str(path), path.read_bytes()


_HASHES = f"""
samples AS (
    SELECT shards.number, file_row_number AS row, shards.split, "{FEATURES_PREFIX}{FEATURE}" AS hash
    FROM read_parquet($indices, filename = true, file_row_number = true, hive_partitioning = false) AS rows
    JOIN shards ON rows.filename = shards.name
)
"""

_BANDS = """
    SELECT *, unnest(range($bits + 1)) AS band FROM {table}
"""

# The last band takes the bits that are left over: `hash >> shift` keeps everything above.
_VALUE = "CASE WHEN band = $bits THEN hash >> (band * $width) ELSE (hash >> (band * $width)) & $mask END"

_CONTAMINATED_QUERY = f"""
WITH {_HASHES}, distinct_hashes AS (SELECT DISTINCT hash FROM samples WHERE split = 'train'),
ours AS (SELECT *, {_VALUE} AS value FROM ({_BANDS.format(table="distinct_hashes")})),
theirs AS (SELECT *, {_VALUE} AS value FROM ({_BANDS.format(table="evaluation")})),
alike AS (
    SELECT DISTINCT ours.hash FROM ours JOIN theirs ON ours.band = theirs.band AND ours.value = theirs.value
    WHERE bit_count(xor(ours.hash, theirs.hash)) <= $bits
)
SELECT number, row FROM samples SEMI JOIN alike USING (hash) WHERE split = 'train' ORDER BY number, row
"""

# Hashes stand for all images that have them: the first one may have an alike one before it, the others have the first.
_NEAR_QUERY = f"""
WITH {_HASHES}, ordered AS (
    SELECT *, row_number() OVER (ORDER BY number, row) AS place FROM samples ANTI JOIN decided USING (number, row)
), firsts AS (
    SELECT split, hash, min(place) AS place FROM ordered GROUP BY split, hash
), banded AS (
    SELECT *, {_VALUE} AS value FROM ({_BANDS.format(table="firsts")})
), alike AS (
    SELECT DISTINCT later.split, later.hash FROM banded AS later JOIN banded AS earlier
    ON later.split = earlier.split AND later.band = earlier.band AND later.value = earlier.value
    WHERE earlier.place < later.place AND bit_count(xor(later.hash, earlier.hash)) <= $bits
)
SELECT ordered.number, ordered.row FROM ordered JOIN firsts USING (split, hash)
LEFT JOIN alike ON alike.split = ordered.split AND alike.hash = ordered.hash
WHERE alike.hash IS NOT NULL OR ordered.place > firsts.place
ORDER BY 1, 2
"""
