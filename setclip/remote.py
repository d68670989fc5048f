"""Files on a web server or in object storage, read whole or by range, with patience for servers that are slow or fail.

http and https go through httpx, all other addresses (s3://, gs://, az://, hdfs://, …) through fsspec and the driver that it
names. Each read has time limits and is tried again, except where trying again cannot help. Used by the training loader.
"""

import importlib.util
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import httpx
from fsspec.registry import known_implementations, registry

from setclip.errors import InputError, Unavailable
from setclip.forks import at_end, this_process

T = TypeVar("T")

_TRANSIENT = (408, 425, 429)  # beside 5xx: what a server that is there says when it wants to be asked again
_LONGEST_PAUSE = 60.0
_SLOWEST = 50_000  # bytes a second; a transfer that is slower is taken for one that stands still


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a read is waited for, and how often it is tried."""

    tries: int = 8
    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
    """Without a byte, after which a connection is given up."""
    pause_seconds: float = 0.5
    """Before the second try; doubled for each further one, up to a minute."""


AT_START = Patience(tries=2, connect_seconds=5.0, stall_seconds=10.0, pause_seconds=0.25)
"""For what is asked while a user waits at the terminal: a mistyped address is said within a second or so."""


class Absent(Exception):
    """There is no such file, or it may not be read: asking again would not help."""


class _Fault(Exception):
    """A read that failed and is worth trying again."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait  # that the server asked for, in seconds


def is_address(place: str) -> bool:
    """Whether a place is an address (https://…, s3://…) rather than a folder."""
    return "://" in place


class RemoteFolder:
    """A folder under an address. Safe to use from threads, and in forked processes."""

    def __init__(self, address: str, patience: Patience | None = None):
        self.address = address.rstrip("/")
        self.patience = patience or Patience()
        self._owner = -1
        if not self._is_web:
            _check_driver(self.address)

    def read(
        self, name: str, start: int | None = None, end: int | None = None, patience: Patience | None = None
    ) -> bytes:
        """Returns a file, or its bytes from `start` to `end` (exclusive).

        Raises Absent where there is no such file, and Unavailable, which names the file, once all tries have failed.
        """
        expected = None if start is None or end is None else end - start
        return self.read_checked(name, start, end, lambda data: _check_length(data, expected), patience)

    def read_checked(
        self,
        name: str,
        start: int | None,
        end: int | None,
        check: Callable[[bytes], T],
        patience: Patience | None = None,
    ) -> T:
        """Returns `check(bytes)`; where that raises ValueError, the bytes arrived damaged, and the read is tried again."""
        patience = patience or self.patience
        faults: list[str] = []
        for number in range(patience.tries):
            wait = 0.0
            try:
                return check(self._read_once(name, start, end, patience))
            except _Fault as fault:
                faults.append(str(fault))
                wait = fault.wait
            except InputError:  # what asking again would not mend
                raise
            except ValueError as error:
                faults.append(str(error))
            if number + 1 < patience.tries:
                pause = min(_LONGEST_PAUSE, patience.pause_seconds * 2**number)
                # Not all at once: a server that fails has many such readers.
                time.sleep(max(min(wait, _LONGEST_PAUSE), pause * random.uniform(0.5, 1.0)))
        told = "; ".join(dict.fromkeys(faults))
        raise Unavailable(
            f"expected to read {self.address}/{name}{_range(start, end)}, found in {patience.tries} tries: {told}. Look at the "
            "server and the connection; the same command (with --resume True) goes on"
        )

    def _read_once(self, name: str, start: int | None, end: int | None, patience: Patience) -> bytes:
        if self._is_web:
            return self._read_web(name, start, end, patience)
        return self._read_storage(name, start, end, patience)

    def _read_web(self, name: str, start: int | None, end: int | None, patience: Patience) -> bytes:
        headers = {"Accept-Encoding": "identity"}
        if start is not None and end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        limits = httpx.Timeout(patience.stall_seconds, connect=patience.connect_seconds)
        data, begin = bytearray(), time.monotonic()
        try:
            with self._client().stream("GET", f"{self.address}/{name}", headers=headers, timeout=limits) as answer:
                self._check_status(answer, name, start is not None)
                for chunk in answer.iter_bytes():
                    data += chunk
                    if start is not None and end is not None and len(data) > end - start:
                        raise _Fault(f"more than the {end - start} bytes that were asked for")
                    if time.monotonic() - begin > patience.stall_seconds + len(data) / _SLOWEST:
                        raise _Fault(f"{len(data)} bytes in {time.monotonic() - begin:.0f} s")
        except httpx.TimeoutException as error:
            raise _Fault(_timeout(error, patience)) from error
        except httpx.RequestError as error:
            raise _Fault(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        except httpx.InvalidURL as error:
            raise InputError(f"expected an address, found {self.address} ({error}); correct it") from error
        return bytes(data)

    def _check_status(self, answer: httpx.Response, name: str, is_range: bool) -> None:
        status = answer.status_code
        if status in _TRANSIENT or status >= 500:
            after = answer.headers.get("Retry-After", "")
            raise _Fault(f"status {status} {answer.reason_phrase}".rstrip(), float(after) if after.isdigit() else 0.0)
        if status == 416:
            raise InputError(
                f"{self.address}/{name}: expected a file as long as the manifest says, found one that ends before; copy it "
                "to the server again"
            )
        if status >= 400:
            raise Absent(f"status {status} {answer.reason_phrase}".rstrip())
        if status != (206 if is_range else 200):
            raise InputError(
                f"{self.address}: expected a server that answers requests for a part of a file (status 206), found status "
                f"{status}; nginx, Apache and all object storage do, Python's http.server does not"
            )

    def _read_storage(self, name: str, start: int | None, end: int | None, patience: Patience) -> bytes:
        system, root = self._system()
        limit = patience.connect_seconds + patience.stall_seconds + ((end or 0) - (start or 0)) / _SLOWEST
        try:
            return _within(limit, lambda: system.cat_file(f"{root}/{name}", start=start, end=end))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise Absent("no such file") from error
        except PermissionError as error:
            raise Absent(f"no permission ({error})") from error
        except TimeoutError as error:
            raise _Fault(f"no answer in {limit:.0f} s") from error
        except Exception as error:  # each driver has errors of its own
            raise _Fault(f"{type(error).__name__}: {error}") from error

    @property
    def _is_web(self) -> bool:
        return self.address.startswith(("http://", "https://"))

    def _client(self) -> httpx.Client:
        self._connect()
        return self._web

    def _system(self) -> tuple[Any, str]:
        self._connect()
        return self._storage

    def _connect(self) -> None:
        """Connections do not survive a fork, so each process has its own."""
        with this_process():
            if self._owner != os.getpid():
                if self._is_web:
                    self._web = httpx.Client(follow_redirects=True, limits=httpx.Limits(max_connections=None))
                    at_end(self, self._web.close)
                else:
                    self._storage = fsspec.core.url_to_fs(self.address)
                self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "patience": self.patience, "_owner": -1}


def _check_driver(address: str) -> None:
    """Raises InputError where the address's kind is unknown or its driver is not installed."""
    kind = address.partition("://")[0].split("::")[0]
    known = known_implementations.get(kind)
    if known is None and kind not in registry:
        raise InputError(
            f"expected a folder, or an address that starts with https://, s3://, gs:// or another of fsspec's, found {address}"
        )
    try:
        fsspec.core.url_to_fs(address)
    except ImportError as error:
        told = (known or {}).get("err", str(error))
        package = (known or {}).get("class", "").split(".")[0]
        install = f"; pip install {package}" if package and importlib.util.find_spec(package) is None else ""
        raise InputError(f"{address}: expected fsspec's driver for {kind}://, found none ({told}){install}") from error
    except ValueError as error:
        raise InputError(f"expected an address that fsspec can read, found {address} ({error})") from error


def _check_length(data: bytes, expected: int | None) -> bytes:
    if expected is not None and len(data) != expected:
        raise ValueError(f"{len(data)} bytes instead of {expected}")
    return data


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """Returns what `call` returns; raises TimeoutError after so many seconds (its thread is then left to itself)."""
    results: list[bytes] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _timeout(error: httpx.TimeoutException, patience: Patience) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection in {patience.connect_seconds:g} s"
    return f"no byte in {patience.stall_seconds:g} s"


def _range(start: int | None, end: int | None) -> str:
    return "" if start is None else f", bytes {start} to {end}"
