"""Starts img2dataset with limits that it has not got: a time and a size for each download, and no life without its parent.

img2dataset's timeout is per socket operation, so a server that sends a byte now and then holds a thread for hours; it reads
answers of any size into memory; and its workers outlive a parent that was killed, and write on. Run by data_prep.fetch_run
in img2dataset's own environment, so nothing of Setclip is imported here:

    python fetch_guard.py '{"url_list": …}'    # the arguments of img2dataset.download as JSON

The limits are SETCLIP_FETCH_DEADLINE (seconds) and SETCLIP_FETCH_MAX_BYTES, of one download with its redirects. They bind
where Python reads from a socket (img2dataset 1.47, urllib): looking a name up and TLS handshakes are not covered.
"""

import ctypes
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.parse
from typing import Any

DEADLINE = "SETCLIP_FETCH_DEADLINE"
MAX_BYTES = "SETCLIP_FETCH_MAX_BYTES"

_PR_SET_PDEATHSIG = 1


class Budget(threading.local):
    """What the download that this thread is making may still take; `ends` is None outside downloads."""

    ends: float | None = None
    """time.monotonic() at which it must be complete."""
    bytes_left: int = 0
    timeout: float = 0.0
    """Seconds of a single socket operation."""


def install() -> None:
    """Puts the limits around img2dataset's downloads, in this process."""
    _die_with_parent()
    from img2dataset import downloader  # type: ignore[import-not-found]  # of another environment

    seconds, max_bytes = float(os.environ[DEADLINE]), int(os.environ[MAX_BYTES])
    budget = Budget()
    plain_readinto, plain_begin, plain_download = (
        socket.SocketIO.readinto,
        http.client.HTTPResponse.begin,
        downloader.download_image,
    )

    def readinto(stream: Any, buffer: Any) -> int | None:
        if budget.ends is None:
            return plain_readinto(stream, buffer)
        left = budget.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"timed out: not complete after {seconds:g} s")
        stream._sock.settimeout(min(budget.timeout, left))
        count = plain_readinto(stream, buffer)
        budget.bytes_left -= count or 0
        if budget.bytes_left < 0:
            raise ValueError(_too_large(max_bytes))
        return count

    def begin(response: Any) -> None:
        plain_begin(response)
        if budget.ends is not None and (response.length or 0) > max_bytes:
            raise ValueError(_too_large(max_bytes))  # before memory of that size is asked for

    def download_image(row: tuple[Any, str], timeout: float, *args: Any, **kwargs: Any) -> Any:
        budget.ends, budget.bytes_left, budget.timeout = time.monotonic() + seconds, max_bytes, timeout
        try:
            key, url = row
            return plain_download((key, ascii_url(url)), timeout, *args, **kwargs)
        finally:
            budget.ends = None

    socket.SocketIO.readinto = readinto  # type: ignore[method-assign,assignment]
    http.client.HTTPResponse.begin = begin  # type: ignore[method-assign,assignment]
    downloader.download_image = download_image


def ascii_url(url: str) -> str:
    """Returns the url as it goes over the wire: urllib refuses spaces and letters outside ASCII, which lists hold."""
    if url.isascii() and not any(character <= " " or character == "\x7f" for character in url):
        return url
    try:
        parts = urllib.parse.urlsplit(url)
        netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
        rest = (urllib.parse.quote(part, safe="!#$%&'()*+,/:;=?@[]~") for part in (parts.path, parts.query))
        return urllib.parse.urlunsplit((parts.scheme, netloc, *rest, ""))
    except ValueError:
        return url  # img2dataset reports what is wrong with it


def main() -> None:
    """Downloads."""
    import img2dataset

    img2dataset.download(**json.loads(sys.argv[1]))


def _too_large(max_bytes: int) -> str:
    return f"larger than {max_bytes} bytes"


def _die_with_parent() -> None:
    """On Linux the kernel kills this process when its parent dies; a worker left behind would write into a later run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


match __name__:
    case "__main__":
        install()
        main()
    case "__mp_main__":  # multiprocessing imports this file again in each worker
        install()
