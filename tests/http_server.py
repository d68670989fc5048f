"""A web server on this machine that behaves as the web does: real pictures, and all the ways in which a download fails.

Used by tests/test_fetch.py, and by hand:

    python tests/http_server.py --list list.tsv [--pictures 20] [--port 0]    # writes a list of its urls, serves until Ctrl-C

PAGES has one entry per behaviour. The server keeps a log of the paths that were asked for; `mend` turns failures into
pictures, as a server that was down comes back.
"""

import argparse
import contextlib
import functools
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

Handler = BaseHTTPRequestHandler


@functools.cache
def picture(number: int, width: int = 96, height: int = 64, kind: str = "JPEG") -> bytes:
    """Returns a picture whose colours depend on `number`."""
    image = Image.new("RGB", (width, height))
    for band in range(8):
        colour = tuple((37 * number + 61 * band + 101 * channel) % 256 for channel in range(3))
        image.paste(colour, (band * width // 8, 0, (band + 1) * width // 8, height))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


@functools.cache
def bomb(side: int = 60_000) -> bytes:
    """Returns a PNG of a kilobyte whose header claims `side` × `side` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100_000))), chunk(b"IEND", b"")]
    )


def send(handler: Handler, body: bytes, status: int = 200, kind: str = "image/jpeg", **headers: str) -> None:
    """Answers with a whole body."""
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def _status(status: int) -> Callable[[Handler, int], None]:
    return lambda handler, number: send(handler, b"no", status, "text/plain")


def _redirect(place: Callable[[int], str]) -> Callable[[Handler, int], None]:
    return lambda handler, number: send(handler, b"", 302, "text/plain", Location=place(number))


def _trickle(handler: Handler, number: int) -> None:
    """Sends a byte now and then, for ever: no single wait is long enough for a timeout."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b"\xff")
        time.sleep(0.2)


def _trickle_header(handler: Handler, number: int) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    while True:
        handler.wfile.write(b"a")
        time.sleep(0.2)


def _silent(handler: Handler, number: int) -> None:
    time.sleep(60)


def _truncated(handler: Handler, number: int) -> None:
    body = picture(number)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def _huge(handler: Handler, number: int) -> None:
    """Says that it is large."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 << 30))
    handler.end_headers()
    _endless(handler)


def _huge_unsaid(handler: Handler, number: int) -> None:
    """Is large without saying so."""
    handler.send_response(200)
    handler.end_headers()
    _endless(handler)


def _endless(handler: Handler) -> None:
    while True:
        handler.wfile.write(bytes(1 << 16))


def _reset(handler: Handler, number: int) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Closing the file object as well leaves no reference, so the reset goes out at once.
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


PAGES: Mapping[str, Callable[[Handler, int], None]] = {
    "good": lambda handler, number: send(handler, picture(number)),
    "large": lambda handler, number: send(handler, picture(number, 1200, 800)),
    "small": lambda handler, number: send(handler, picture(number, 12, 8)),
    "wide": lambda handler, number: send(handler, picture(number, 900, 60)),
    "png": lambda handler, number: send(handler, picture(number, kind="PNG"), kind="image/png"),
    "robots": lambda handler, number: send(handler, picture(number), X_Robots_Tag="noai"),
    "redirect": _redirect(lambda number: f"/good/{number}.jpg"),
    "loop": _redirect(lambda number: f"/loop/{number}.jpg"),
    "gone": _status(404),
    "forbidden": _status(403),
    "busy": _status(429),
    "broken": _status(500),
    "teapot": _status(418),
    "html": lambda handler, number: send(handler, b"<html><body>this picture moved</body></html>"),
    "empty": lambda handler, number: send(handler, b""),
    "trickle": _trickle,
    "trickle-header": _trickle_header,
    "silent": _silent,
    "truncated": _truncated,
    "huge": _huge,
    "huge-unsaid": _huge_unsaid,
    "bomb": lambda handler, number: send(handler, bomb(), kind="image/png"),
    "reset": _reset,
}
"""Behaviour to what answers /BEHAVIOUR/NUMBER.jpg."""


class QuietServer(ThreadingHTTPServer):
    """Says nothing of what goes wrong, since much does on purpose."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        pass

    def shutdown_request(self, request: object) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)  # type: ignore[arg-type]


class Server:
    """Serves PAGES on a free port of this machine.

    with Server() as server:
        server.url("good", 3)
        server.asked  # the paths asked for, in order
    """

    def __init__(self, port: int = 0):
        self.asked: list[str] = []
        self.is_mended = False
        """Whether everything is a picture now."""
        self.hold: threading.Event | None = None
        """If there is one, "good" waits for it."""
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                with contextlib.suppress(OSError, ValueError):  # the other side hangs up, or the socket is closed by us
                    outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = QuietServer(("127.0.0.1", port), Answer)
        self.port = self._server.server_address[1]

    def url(self, behaviour: str, number: int = 0) -> str:
        """Returns the address of a picture that behaves so."""
        assert behaviour in PAGES, behaviour
        return f"http://127.0.0.1:{self.port}/{behaviour}/{number}.jpg"

    def mend(self) -> None:
        """From now on every path is a picture."""
        self.is_mended = True

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: Handler) -> None:
        behaviour, _, name = handler.path.lstrip("/").partition("/")
        number = name.partition(".")[0]
        if behaviour == "good" and self.hold is not None:
            self.hold.wait(60)
        if behaviour not in PAGES or not number.isdigit():
            send(handler, b"no such page", 404, "text/plain")
        else:
            PAGES["good" if self.is_mended else behaviour](handler, int(number))


def rows(server: Server, pictures: int) -> Iterator[tuple[str, str]]:
    """Yields (url, caption): many good pictures, and one of each other behaviour that ends by itself."""
    for number in range(pictures):
        yield server.url("good", number), f"eight bands of colour, number {number}"
    for behaviour in PAGES:
        if behaviour not in ("good", "trickle", "trickle-header", "silent"):
            yield server.url(behaviour, 0), f"a picture that is {behaviour}"


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, required=True, help="file for the list (url TAB caption)")
    parser.add_argument("--pictures", type=int, default=20, help="number of good pictures")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    args = parser.parse_args()
    with Server(args.port) as server:
        args.list.write_text(
            "".join(f"{url}\t{caption}\n" for url, caption in rows(server, args.pictures)), encoding="utf-8"
        )
        print(f"serving on port {server.port}; the list is {args.list}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
