"""A web server on this machine that gives a folder of shards, part by part, and fails in the ways in which servers fail."""

import contextlib
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TROUBLES = ("503", "cut", "still", "short", "long", "damaged", "refused")


@dataclass
class ShardServer:
    """What was asked for, and what goes wrong."""

    folder: Path
    address: str = ""
    trouble: Callable[[str, int], str | None] = lambda name, number: None
    """File name and number of the request for it (from 0) to one of TROUBLES, "slow", "404", "whole", or None"""
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, start, end) of each request"""

    def __post_init__(self) -> None:
        self.lock, self.counts = threading.Lock(), Counter()

    @property
    def bytes_asked(self) -> int:
        return sum(end - start for _, start, end in self.requests)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    """Serves a folder until the `with` block ends."""
    state = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _answer(state, self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _answer(state: ShardServer, handler: BaseHTTPRequestHandler) -> None:
    name = handler.path.lstrip("/")
    path = state.folder / name
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    size = path.stat().st_size if path.is_file() else 0
    start, end = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
    with state.lock:
        trouble = state.trouble(name, state.counts[name])
        state.counts[name] += 1
        state.requests.append((name, start, end))
    if trouble == "404" or not path.is_file():
        handler.send_error(404)
        return
    if asked and start >= size:
        handler.send_error(416)
        return
    if trouble == "503":
        handler.send_error(503)
        return
    if trouble == "refused":
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    if trouble == "whole":
        asked, data = None, path.read_bytes()
    if trouble == "short":
        data = data[: len(data) // 2]
    if trouble == "long":
        data += b"x" * 10
    if trouble == "damaged":  # a different byte each time, in what is likely an image
        place = (len(data) // 2 + state.counts[name]) % max(1, len(data))
        data = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
    handler.send_response(206 if asked else 200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if trouble == "cut":
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
    elif trouble == "still":
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        time.sleep(3)
        handler.close_connection = True
    elif trouble == "slow":
        for begin in range(0, len(data), 4096):
            handler.wfile.write(data[begin : begin + 4096])
            handler.wfile.flush()
            time.sleep(0.002)
    else:
        handler.wfile.write(data)
