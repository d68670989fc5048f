"""status.parquet: one row per row of the published list, with what became of it. Used by data_prep.fetch.

`row`, `id`, `url`, `status` (success, failed, not tried), `reason` (a name of REASONS, or why the list's row could not be
asked for), `message` (img2dataset's own), `attempts`, `tar` (relative to the folder) and `key` of the image. Gathered by
duckdb from img2dataset's tables, out of core, and written beside and renamed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from data_prep.duplicates import as_patterns
from data_prep.fetch_run import SHARD_DIGITS
from setclip.errors import InputError
from setclip.files import remove, replacing

STATUS_NAME = "status.parquet"

REASONS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for name, pattern in {
        "http_404": r"HTTP Error 404\b",
        "http_403": r"HTTP Error 403\b",
        "http_429": r"HTTP Error 429\b",
        "http_5xx": r"HTTP Error 5\d\d\b",
        "http_other": r"HTTP Error \d+",
        "disallowed": r"X-Robots-Tag",
        "too_large": r"larger than \d+ bytes|image area too large|CV_IO_MAX_IMAGE",
        "too_small": r"image too small",
        "aspect": r"aspect ratio too large",
        "not_an_image": r"Image decoding error|OpenCV",
        "tls": r"\bSSL|certificate|TLS",
        "timeout": r"timed out",
        "dns": r"Name or service not known|Temporary failure in name resolution|No address associated|getaddrinfo"
        r"|nodename nor servname|Name does not resolve|label (?:empty|too long)|No data record",
        "connection": r"Connection (?:refused|reset|aborted)|Remote end closed|IncompleteRead|No route to host"
        r"|Network is unreachable|Broken pipe|EOF occurred|BadStatusLine|urlopen error \[Errno",
        "other": r"",
    }.items()
}
"""Reason to what img2dataset's message holds; the first that fits counts."""

_SUCCESS, _FAILED, _NOT_TRIED = "success", "failed", "not tried"


@dataclass(frozen=True)
class Count:
    """Rows with one status and reason."""

    status: str
    reason: str | None
    rows: int


def reason_of(message: str | None) -> str:
    """Returns the reason that a message of img2dataset stands for."""
    return next(name for name, pattern in REASONS.items() if pattern.search(message or ""))


def check_reasons(names: list[str]) -> None:
    """Raises InputError unless each is a name of REASONS."""
    unknown = [name for name in names if name not in REASONS]
    if unknown:
        raise InputError(
            f"expected reasons among {', '.join(REASONS)}, found {', '.join(unknown)}; separate several by commas"
        )


def write_status(out: Path, attempts: list[Path], memory_gb: float) -> None:
    """Gathers `out`/status.parquet from urls.parquet, dropped.parquet and the attempts' folders, the first one first."""
    with _connect(out, memory_gb) as connection:
        connection.execute(
            "CREATE TABLE results (row BIGINT, attempt INTEGER, status VARCHAR, message VARCHAR, key VARCHAR, tar VARCHAR)"
        )
        for number, folder in enumerate(attempts, start=1):
            tables = as_patterns(sorted(folder.glob(f"{'[0-9]' * SHARD_DIGITS}.parquet")))
            if tables:
                connection.execute(
                    "INSERT INTO results SELECT row, $1, status, error_message, key, "
                    "$2 || regexp_replace(parse_filename(filename), 'parquet$', 'tar') "
                    "FROM read_parquet($3, filename = true, hive_partitioning = false)",
                    [number, f"{folder.name}/", tables],
                )
        messages = connection.execute("SELECT DISTINCT message FROM results WHERE status <> 'success'").fetchall()
        connection.execute("CREATE TABLE reasons (message VARCHAR, reason VARCHAR)")
        if messages:
            connection.executemany("INSERT INTO reasons VALUES ($1, $2)", [(m, reason_of(m)) for (m,) in messages])
        with replacing(out / STATUS_NAME) as temporary:
            tables = as_patterns([out / "urls.parquet", out / "dropped.parquet"])
            connection.execute(_GATHER, [*tables, str(temporary)])
    remove(out / _WORK)


_GATHER = f"""
COPY (
    WITH last AS (
        SELECT row, count(*) AS attempts,
               max_by(struct_pack(status := status, message := message, key := key, tar := tar), attempt) AS result
        FROM results GROUP BY row
    )
    SELECT urls.row, urls.id, urls.url,
           CASE WHEN last.row IS NULL THEN '{_NOT_TRIED}' WHEN result.status = 'success' THEN '{_SUCCESS}'
                ELSE '{_FAILED}' END AS status,
           CASE WHEN result.status = 'success' THEN NULL ELSE reasons.reason END AS reason,
           result.message AS message,
           coalesce(last.attempts, 0)::INTEGER AS attempts,
           CASE WHEN result.status = 'success' THEN result.tar END AS tar,
           CASE WHEN result.status = 'success' THEN result.key END AS key
    FROM read_parquet($1, hive_partitioning = false) AS urls LEFT JOIN last ON last.row = urls.row
    LEFT JOIN reasons ON reasons.message IS NOT DISTINCT FROM result.message AND result.status <> 'success'
    UNION ALL
    SELECT row, NULL, url, '{_NOT_TRIED}', reason, NULL, 0, NULL, NULL
    FROM read_parquet($2, hive_partitioning = false)
    ORDER BY row
) TO $3 (FORMAT parquet, COMPRESSION zstd)
"""


def count_status(out: Path) -> list[Count]:
    """Returns the numbers of rows by status and reason; successes first, then the most frequent."""
    rows = duckdb.execute(
        "SELECT status, reason, count(*) AS n FROM read_parquet($1, hive_partitioning = false) GROUP BY status, reason "
        "ORDER BY CASE status WHEN 'success' THEN 0 ELSE 1 END, status, n DESC, reason",
        as_patterns([out / STATUS_NAME]),
    ).fetchall()
    return [Count(*row) for row in rows]


def write_failed(out: Path, reasons: list[str], target: Path, memory_gb: float) -> int:
    """Writes the rows of urls.parquet that failed (with one of `reasons`, if any are named); returns their number."""
    with _connect(out, memory_gb) as connection, replacing(target) as temporary:
        connection.execute(
            "COPY (SELECT urls.* FROM read_parquet($1, hive_partitioning = false) AS urls "
            "SEMI JOIN (SELECT row FROM read_parquet($2, hive_partitioning = false) "
            "WHERE status = 'failed' AND (len($3::VARCHAR[]) = 0 OR list_contains($3::VARCHAR[], reason))) AS failed "
            "ON failed.row = urls.row ORDER BY urls.row) TO $4 (FORMAT parquet, COMPRESSION zstd)",
            [*as_patterns([out / "urls.parquet", out / STATUS_NAME]), reasons, str(temporary)],
        )
        count = pq.read_metadata(temporary).num_rows
    remove(out / _WORK)
    return count


_WORK = ".status"  # folder of duckdb's intermediate files


def _connect(out: Path, memory_gb: float) -> duckdb.DuckDBPyConnection:
    remove(out / _WORK)
    (out / _WORK).mkdir()
    return duckdb.connect(
        str(out / _WORK / "status.duckdb"),
        config={"memory_limit": f"{memory_gb}GB", "temp_directory": str(out / _WORK / "spilled")},
    )
