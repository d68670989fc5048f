"""Runs img2dataset over one list until every shard of it is done, and watches it. Used by data_prep.fetch.

A shard is done when its statistics, its tar and its Parquet table are whole; img2dataset writes the statistics last and
skips shards that have them. Everything else is begun again. Where nothing moves any more (a lookup that never returns, a
worker that crashed: its pool then waits for ever), all its processes are killed and started again; a shard that twice was
under way at such a time is given up: it is written as one whose samples all failed, in img2dataset's own layout.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import fetch_environment, fetch_guard
from setclip.errors import InputError
from setclip.files import remove, replacing, write_json
from setclip.log import Meter, warn

GIVEN_UP = "timed out: given up with its shard"
"""Begins the message of samples whose shard was given up: reason "timeout"."""

SHARD_DIGITS = 5
_STRIKES = 2
_SECONDS_TO_START = 180.0  # until the first shard is begun, in which nothing moves while libraries are loaded
_END_OF_TAR = b"\0" * 1024
_LINES_OF_LOG = 6


@dataclass(frozen=True, kw_only=True)
class Download:
    """One attempt: a list, and how it is downloaded."""

    python: Path
    """Of img2dataset's environment."""
    urls: Path
    """Parquet with url, caption, row and id."""
    folder: Path
    """For tars, tables and statistics, and nothing else: img2dataset takes every *.json there for statistics."""
    log: Path
    """What img2dataset prints."""
    shard_size: int
    options: dict[str, Any]
    """Further arguments of img2dataset.download."""
    deadline: float
    """Seconds for one image, redirects included."""
    max_bytes: int
    """Of one image's file."""
    max_pixels: int
    """Of one image; larger ones are not decoded."""
    stall_after: float
    """Seconds without any change after which img2dataset is started again."""
    min_free_bytes: int
    """Of disk; below it the download stops."""
    poll: float = 1.0
    """Seconds between looks."""


@dataclass(frozen=True)
class Stats:
    """What one shard came to."""

    count: int
    successes: int


def download(job: Download) -> None:
    """Downloads the list's shards that are not done yet.

    Raises InputError where img2dataset ends without getting on (with the end of its log), and where the disk fills up.
    """
    rows = pq.read_metadata(job.urls).num_rows
    total = math.ceil(rows / job.shard_size)
    job.folder.mkdir(parents=True, exist_ok=True)
    done = sweep(job.folder, rows, job.shard_size)
    strikes: Counter[int] = Counter()
    starts_in_vain = 0
    meter = Meter(rows, f"downloading ({job.folder.name})", "pairs", initial=sum(s.count for s in done.values()))
    try:
        while len(done) < total:
            before = len(done)
            status = _run_once(job, done, meter)
            under_way = _begun(job.folder) - set(done)
            done = sweep(job.folder, rows, job.shard_size)
            _show(meter, done)
            stuck = under_way - set(done)
            if status is None:
                warn(
                    f"nothing moved for {job.stall_after:g} s or more; shards under way: {sorted(under_way)}; starting again"
                )
            elif status:
                warn(f"img2dataset ended with status {status}; see {job.log}")
            if not status:  # killed, or it ended by itself, content, and yet shards are missing
                strikes.update(stuck)
            for shard in sorted(shard for shard in stuck if strikes[shard] >= _STRIKES):
                give_up(job, shard, rows)
                done[shard] = Stats(_size(shard, rows, job.shard_size), 0)
                warn(f"shard {shard} is given up; `--retry failed --reason timeout` asks for its samples again")
            starts_in_vain = 0 if len(done) > before else starts_in_vain + 1
            if len(done) < total and starts_in_vain > _STRIKES:
                raise InputError(
                    f"expected img2dataset to finish shards, found that it did not in {starts_in_vain} starts; the end of "
                    f"{job.log}:\n{_end_of(job.log)}\nMend that, and start again: what is done stays"
                )
        _show(meter, done)
    finally:
        meter.close()
    remove(job.folder / "_tmp")


def sweep(folder: Path, rows: int, shard_size: int) -> dict[int, Stats]:
    """Returns the shards that are done, and removes what was half written of others."""
    done = {}
    for path in folder.glob(f"{'[0-9]' * SHARD_DIGITS}_stats.json"):
        shard = int(path.name[:SHARD_DIGITS])
        stats = read_stats(path)
        tar, table = folder / f"{shard:0{SHARD_DIGITS}d}.tar", folder / f"{shard:0{SHARD_DIGITS}d}.parquet"
        if stats and stats.count == _size(shard, rows, shard_size) == _rows_of(table) and _is_whole(tar):
            done[shard] = stats
        else:
            path.unlink()
    for shard in _begun(folder) - set(done):
        for suffix in (".tar", ".parquet"):
            (folder / f"{shard:0{SHARD_DIGITS}d}{suffix}").unlink(missing_ok=True)
    return done


def read_stats(path: Path) -> Stats | None:
    """Returns what img2dataset's statistics of a shard say; None while they are being written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Stats(int(content["count"]), int(content["successes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def give_up(job: Download, shard: int, rows: int) -> None:
    """Writes a shard in which every sample failed: an empty tar, the table and, last, the statistics."""
    start, count = shard * job.shard_size, _size(shard, rows, job.shard_size)
    listed = pq.read_table(job.urls).slice(start, count)
    stem = job.folder / f"{shard:0{SHARD_DIGITS}d}"
    digits = math.ceil(math.log10(job.shard_size))
    texts: dict[str, Any] = {
        "key": [f"{10**digits * shard + i:0{digits + SHARD_DIGITS}d}" for i in range(count)],
        "status": ["failed_to_download"] * count,
        "error_message": [f"{GIVEN_UP}, which twice did not end ({job.stall_after:g} s without any change)"] * count,
    }
    for name, values in texts.items():
        listed = listed.append_column(name, pa.array(values, pa.string()))
    for name in ("width", "height", "original_width", "original_height"):
        listed = listed.append_column(name, pa.nulls(count, pa.int32()))
    with replacing(stem.with_suffix(".tar")) as temporary, tarfile.open(temporary, "w"):
        pass
    with replacing(stem.with_suffix(".parquet")) as temporary:
        pq.write_table(listed.append_column("sha256", pa.nulls(count, pa.string())), temporary)
    now = time.time()
    write_json(
        stem.with_name(f"{stem.name}_stats.json"),
        {
            "count": count,
            "successes": 0,
            "failed_to_download": count,
            "failed_to_resize": 0,
            "duration": 0.0,
            "start_time": now,
            "end_time": now,
            "status_dict": {GIVEN_UP: count},
        },
    )


def _run_once(job: Download, done: dict[int, Stats], meter: Meter) -> int | None:
    """Runs img2dataset until it ends, and returns its status; None if nothing moved and it was killed."""
    arguments = {
        "url_list": str(job.urls.absolute()),
        "output_folder": str(job.folder.absolute()),
        "number_sample_per_shard": job.shard_size,
        "oom_shard_count": SHARD_DIGITS,
        **job.options,
    }
    variables = {
        **fetch_environment.variables(),
        fetch_guard.DEADLINE: str(job.deadline),
        fetch_guard.MAX_BYTES: str(job.max_bytes),
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(job.max_pixels),  # it looks at the header, before it takes memory
        "PYTHONUNBUFFERED": "1",
    }
    known = dict(done)
    with open(job.log, "ab") as log:
        process = subprocess.Popen(
            [str(job.python), fetch_guard.__file__, json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # a Ctrl-C is ours alone, and all its processes can be killed at once
        )
        try:
            moved, seen = time.monotonic(), None
            before = len(done)
            while True:
                try:
                    return process.wait(job.poll)
                except subprocess.TimeoutExpired:
                    pass
                state = _look(job.folder, known)
                _show(meter, known)
                if state != seen:
                    moved, seen = time.monotonic(), state
                is_started = len(known) > before or bool(_begun(job.folder) - set(known))
                patience = job.stall_after if is_started else max(job.stall_after, _SECONDS_TO_START)
                if time.monotonic() - moved > patience:
                    return None
                free = shutil.disk_usage(job.folder).free
                if free < job.min_free_bytes:
                    raise InputError(
                        f"expected at least {job.min_free_bytes / 1e9:.1f} GB free at {job.folder}, found "
                        f"{free / 1e9:.1f} GB, and stopped; make room and start again: what is done stays"
                    )
        finally:
            _kill_all(process)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Ends img2dataset and its workers, whatever they do; its own reaction to Ctrl-C would leave tars cut short."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _look(folder: Path, known: dict[int, Stats]) -> tuple[int, int]:
    """Adds newly finished shards to `known`; returns a pair that changes whenever a file is made or grows."""
    files = size = 0
    places: Iterable[Path] = (folder, folder / "_tmp")
    for place in places:
        try:
            entries = list(os.scandir(place))
        except FileNotFoundError:
            continue
        for entry in entries:
            try:
                size += entry.stat().st_size
            except FileNotFoundError:
                continue
            files += 1
            if entry.name.endswith("_stats.json") and int(entry.name[:SHARD_DIGITS]) not in known:
                stats = read_stats(Path(entry.path))
                if stats:
                    known[int(entry.name[:SHARD_DIGITS])] = stats
    return files, size


def _show(meter: Meter, done: dict[int, Stats]) -> None:
    count, successes = sum(s.count for s in done.values()), sum(s.successes for s in done.values())
    meter.update(count - meter.done, f"{successes / count:.1%} with an image" if count else "")


def _begun(folder: Path) -> set[int]:
    return {
        int(path.stem) for path in folder.glob(f"{'[0-9]' * SHARD_DIGITS}.*") if path.suffix in (".tar", ".parquet")
    }


def _size(shard: int, rows: int, shard_size: int) -> int:
    return max(0, min(shard_size, rows - shard * shard_size))


def _rows_of(table: Path) -> int:
    try:
        return pq.read_metadata(table).num_rows
    except (OSError, pa.ArrowException):
        return -1


def _is_whole(tar: Path) -> bool:
    """Whether a tar ends as tars do; one that was cut short does not."""
    try:
        with open(tar, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < len(_END_OF_TAR) or size % tarfile.BLOCKSIZE:
                return False
            file.seek(-len(_END_OF_TAR), os.SEEK_END)
            return file.read() == _END_OF_TAR
    except OSError:
        return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_LOG:])
