"""Files that are fetched once and kept on local disk, within a bound; several processes of a machine share the folder.

A file is fetched by one process while the others that want it wait. It appears whole or not at all: it is written beside and
renamed, so a killed process leaves nothing under a final name. What is held is never removed; of the rest, what was used
longest ago goes first. All agreement is by locks that the system drops when a process ends (flock), so a kill leaves nothing
to clean up. The folder should be on a local disk. Used by the training loader.
"""

import contextlib
import fcntl
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from setclip.errors import InputError
from setclip.forks import at_end, this_process

_LOCK, _USAGE, _LEASE = ".lock", ".usage", ".held-"
_PARTIAL = ".partial"
_SLACK = 0.02  # of the bound that is freed beyond what is needed: the files are looked through less often
KEPT_LONGER = ".idx"
"""Small files that many reads need: they are removed after all others."""


class DiskCache:
    """At most `limit` bytes of files in `folder`. Safe to use from threads, and in forked processes."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        self._owner = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"expected a folder for the cache at {folder}, found {error}; name one with --data.cache"
            ) from error

    def hold(self, name: str, fetch: Callable[[], bytes]) -> Path:
        """Returns the file, after `fetch` where it is not there. It stays until it was released as often as it was held.

        Raises InputError where what is held leaves no room for it, and whatever `fetch` raises.
        """
        path = self._get(name, fetch, is_needed=True)
        assert path is not None
        return path

    def release(self, name: str) -> None:
        """Gives up one hold."""
        with self._state_lock():
            if name in self._held:
                self._held[name] -= 1
                if self._held[name] <= 0:
                    del self._held[name]
        # The lease is written anew when the next file is held or made: until then this one stays, which does no harm.

    def prepare(self, name: str, fetch: Callable[[], bytes]) -> bool:
        """Fetches a file ahead, without holding it. Returns whether it is there; False where there was no room."""
        return self._get(name, fetch, is_needed=False) is not None

    def clean(self) -> int:
        """Removes what killed processes left half-written; returns the bytes in the cache."""
        with self._lock():
            usage = sum(size for _, _, size, _ in self._files())
            self._write_usage(usage)
            return usage

    def _get(self, name: str, fetch: Callable[[], bytes], is_needed: bool) -> Path | None:
        path = self.folder / name
        while True:
            if self._take(path, is_needed):
                return path
            with self._writing(path) as file:
                if file is None or path.exists():  # another has just written it, or given up
                    continue
                data = fetch()
                try:
                    if not self._make_room(file, len(data), is_needed):
                        return None
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # its length is there already: a power cut would leave zeros
                    with self._lock():  # or one that counts the files may see neither name
                        os.rename(file.name, path)
                except OSError as error:
                    raise InputError(
                        f"expected to write {len(data)} bytes to the cache {self.folder}, found {error}; make room, or lower "
                        "--data.cache-gb"
                    ) from error
                if not is_needed:
                    return path

    def _take(self, path: Path, is_needed: bool) -> bool:
        """Holds a file that is there. Under the lock, so that it is not removed in between."""
        with self._lock():
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
            if is_needed:
                with self._state_lock():
                    self._held[path.name] += 1
                    self._write_lease()
            return True

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[Any]:
        """Yields the file in which `path` is being made, once this process alone makes it; None where it went meanwhile."""
        beside = path.with_name(f".{path.name}{_PARTIAL}")
        with open(beside, "r+b", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT, 0o644)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same(file.fileno(), beside):
                yield None
                return
            file.truncate(0)
            try:
                yield file
            finally:
                if _is_same(file.fileno(), beside):  # not renamed: the fetch failed, or there was nothing to do
                    os.unlink(beside)

    def _make_room(self, file: Any, size: int, is_needed: bool) -> bool:
        """Removes files until `size` bytes fit, and takes them for `file`; returns whether they fit."""
        with self._lock():
            with self._state_lock():
                self._write_lease()  # else others would count what this process released and what it now makes
            usage = self._read_usage()
            if usage is None or usage + size > self.limit:
                usage = self._remove(size, is_needed)
                if usage is None:
                    return False
            if size:  # its room is taken on the disk before others look how much is left
                os.posix_fallocate(file.fileno(), 0, size)
            self._write_usage(usage + size)
            return True

    def _remove(self, size: int, is_needed: bool) -> int | None:
        """Removes files until `size` bytes fit; returns the bytes that are left, None where they cannot be made to fit."""
        files = sorted(self._files())
        usage = sum(entry[2] for entry in files)
        wanted = self.limit - size - int(_SLACK * self.limit)
        if usage > wanted:
            held = self._leases()
            for _, _, bytes_, path in files:
                if usage <= wanted:
                    break
                if path.name not in held and not path.name.endswith(_PARTIAL):
                    path.unlink(missing_ok=True)
                    usage -= bytes_
        if usage + size > self.limit:
            self._write_usage(usage)
            if is_needed:
                raise InputError(
                    f"expected room for {size:,} bytes in the cache {self.folder}, found {usage:,} of {self.limit:,} bytes in "
                    "use by what the lanes of this machine are reading; raise --data.cache-gb (or lower --data.window-blocks or "
                    "--data.block-size, for a new run)"
                )
            return None
        return usage

    def _files(self) -> Iterator[tuple[bool, float, int, Path]]:
        """Yields (is kept longer, time of the last use, bytes, path) of each file; removes what is half-written and left."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.name.endswith(_PARTIAL):
                    if _is_left(path):
                        continue
                elif entry.name.startswith(".") or not entry.is_file():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    yield entry.name.endswith(KEPT_LONGER), found.st_mtime, found.st_size, path

    def _leases(self) -> set[str]:
        """Returns the names that any process holds; removes the leases of processes that have ended."""
        with self._state_lock():
            held = set(self._held)
            mine = Path(self._lease.name).name
        for path in self.folder.glob(f"{_LEASE}*"):
            if path.name != mine and not _is_left(path):
                with contextlib.suppress(FileNotFoundError):  # it has just ended
                    held.update(json.loads(path.read_text() or "[]"))
        return held

    def _write_lease(self) -> None:
        self._lease.seek(0)
        self._lease.truncate()
        json.dump(list(self._held), self._lease)
        self._lease.flush()

    @contextlib.contextmanager
    def _state_lock(self) -> Iterator[None]:
        """Around what this process holds; a forked one begins with nothing."""
        with this_process():
            if self._owner != os.getpid():
                self._held: Counter[str] = Counter()
                lease = self.folder / f"{_LEASE}{os.getpid()}-{secrets.token_hex(4)}"
                self._lease = open(lease, "w")  # noqa: SIM115
                fcntl.flock(self._lease, fcntl.LOCK_EX)
                at_end(self, self._lease.close)
                at_end(self, partial(lease.unlink, missing_ok=True))
                self._owner = os.getpid()
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Around what all processes of the machine share."""
        with open(self.folder / _LOCK, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_usage(self) -> int | None:
        try:
            return int((self.folder / _USAGE).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _write_usage(self, usage: int) -> None:
        (self.folder / _USAGE).write_text(str(usage))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit, "_owner": -1}


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_left(path: Path) -> bool:
    """Removes a file whose process has ended; returns whether it is gone."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
