"""An OpenAI-compatible chat server on this machine that answers by rule, well and badly, as a small model does.

Used by tests/test_parse_llm.py and tests/test_describe.py, and by hand where there is no model:

    python tests/llm_server.py --url-file url.txt    # writes its address, serves until Ctrl-C
"""

import argparse
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "by-rule"

Rule = Callable[[Sequence[dict[str, str]]], tuple[str, str]]
"""From the messages of a chat to (answer, finish reason)."""

_SMALL_WORDS = frozenset(("from", "other", "some", "that", "their", "they", "this", "with"))


class RuleServer:
    """with RuleServer(rule) as server: server.url is its address, server.asked the last messages of all requests."""

    def __init__(self, rule: Rule | None = None):
        self.rule = rule or by_rule
        self.asked: list[str] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                _send(self, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append(body["messages"][-1]["content"])
                text, reason = outer.rule(body["messages"])
                _send(self, completion(text, reason, body["messages"]))

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "RuleServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def completion(text: str, reason: str, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Returns what a server sends."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": sum(len(message["content"].split()) for message in messages),
            "completion_tokens": len(text.split()),
        },
    }


def by_rule(messages: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Lists the long words of a caption, or describes a class; one in seven first answers is an echo, one a loop."""
    question = messages[-1]["content"]
    if "\n" not in question:
        name = question.split("appearance of ")[1].split(" in ordinary")[0]
        return _description(name, is_first=len(messages) == 1)
    caption = question.split("\n", 1)[1]
    if len(messages) == 1 and len(caption) % 7 == 0:
        return caption, "stop"
    if len(messages) == 1 and len(caption) % 7 == 1:
        return "objects, " * 64, "length"
    names = [word.strip(".,;:!?\"'()").lower() for word in caption.split()]
    return ", ".join(dict.fromkeys(word for word in names if len(word) > 3 and word not in _SMALL_WORDS)), "stop"


def _description(name: str, is_first: bool) -> tuple[str, str]:
    if len(name) % 7 == 0:
        return ("I'm sorry, but I cannot help with that." if is_first else ""), "stop"
    if len(name) % 7 == 1 and is_first:
        return f"Nobody asked me that before, and I would rather talk of {'music ' * 40}", "length"
    if len(name) % 7 == 2:
        return f"A {name} is small and has a smooth surface. It is often", "length"
    return (
        f"Sure! Here is a description:\n\nA **{name}** is of a plain shape, with a rounded top and a dark colour.",
        "stop",
    )


def _send(handler: BaseHTTPRequestHandler, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url-file", type=Path, required=True)
    arguments = parser.parse_args()
    server = RuleServer()
    arguments.url_file.write_text(server.url)
    with server:
        threading.Event().wait()


if __name__ == "__main__":
    main()
