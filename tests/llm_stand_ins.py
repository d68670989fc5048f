"""Stand-ins for what answers questions, which fail on demand: a real HTTP server, and an environment with a small `vllm`.

Used by tests/test_llm_runners.py. Both answer "answer to QUESTION"; tests/test_llm_engine.py asks the real engine.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from http_server import QuietServer

from data_prep.llm import environment
from setclip.files import sha256_of, write_json

MODEL = "stand-in"


def completion(question: str, **changes: Any) -> dict[str, Any]:
    """Returns what a server says to a question."""
    return {
        "id": "chatcmpl-the-same-for-all",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": f"answer to {question}"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": len(question), "completion_tokens": 3},
        **changes,
    }


class ChatServer:
    """An OpenAI-compatible server on this machine; `failures` makes tries of chosen questions fail.

    with ChatServer() as server:
        server.failures["dog"] = [busy, reset]    # what the first two who ask about "dog" get
        server.asked                              # Counter of questions
    """

    def __init__(self, port: int = 0, pause: float = 0.0):
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.failures: dict[str, list[Callable[[BaseHTTPRequestHandler], None]]] = {}
        self.models: Callable[[BaseHTTPRequestHandler], None] = lambda handler: send(handler, {"data": [{"id": MODEL}]})
        self.headers: list[Mapping[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self.on_question: Callable[[int], None] = lambda number: None
        """Called with the number of questions so far, before one is answered; ConnectionError breaks the connection."""
        self._pause, self._lock = pause, threading.Lock()
        outer = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    outer.models(self)
                else:
                    send(self, {"detail": "Not Found"}, 404)

            def do_POST(self) -> None:
                try:
                    outer._answer(self)
                except (OSError, ValueError):  # the other side hung up, or this one is to go away
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = QuietServer(("127.0.0.1", port), Answer)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self._lock:
            self.asked[question] += 1
            self.times.setdefault(question, []).append(time.monotonic())
            self.headers.append(dict(handler.headers))
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            number = self.asked.total()
            failures = self.failures.get(question)
            fail = failures.pop(0) if failures else None
        try:
            self.on_question(number)
            time.sleep(self._pause)
        finally:
            with self._lock:  # before the answer, after which the same client may be here again
                self._at_once -= 1
        if fail is not None:
            fail(handler)
        else:
            send(handler, completion(question))


def send(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    """Answers with JSON, or with bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def status(code: int, message: str = "no", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Returns a failure with a status, worded as vLLM words it."""
    return lambda handler: send(handler, {"error": {"message": message, "code": code}}, code, **headers)


def answer(body: Any) -> Callable[[BaseHTTPRequestHandler], None]:
    """Returns a status of 200 with any content."""
    return lambda handler: send(handler, body)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Breaks the connection before a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def truncated(handler: BaseHTTPRequestHandler) -> None:
    """Breaks the connection in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def slow(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """Returns an answer that comes too late."""

    def late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        send(handler, completion("late"))

    return late


def stand_in_environment(folder: Path) -> Path:
    """Makes an environment whose `vllm` fails as the questions say; returns its folder.

    "refuse …" cannot be asked; "die N …" kills the engine where it comes, N times in all; "dead N …" raises vLLM's error of a
    dead engine; "hang N …" kills the engine's own process, and nobody notices. `vllm run-batch` spoils its output likewise:
    "wrong id N …", "twice N …", "broken N …", "busy N …".
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, text in _VLLM.items():
        path = site / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(site).parents:
            if parent != Path("."):
                (site / parent / "__init__.py").touch()
    mark = {"variant": "gpu", "requirements": sha256_of(environment.requirements("gpu")), "packages": {"vllm": "0"}}
    write_json(folder / "setclip-environment.json", mark)
    return folder


_VLLM = {
    "__init__.py": '''
import multiprocessing, os, signal, sys, time
from types import SimpleNamespace as Some
from vllm.v1.engine.exceptions import EngineDeadError

def times(question, word):
    """Whether "WORD N …" has happened fewer than N times; it happens now."""
    if not question.startswith(word + " "):
        return False
    path = os.path.join(os.environ["STAND_IN_MEMORY"], question.replace("/", "_"))
    seen = os.path.getsize(path) if os.path.exists(path) else 0
    with open(path, "a") as file:
        file.write(".")
    return seen < int(question.split()[len(word.split())])

class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings

class LLM:
    def __init__(self, model, max_model_len, **others):
        print("loading", model, others, flush=True)
        if model == "org/unloadable":
            raise RuntimeError("this model has no weights")
        self.model_config = Some(max_model_len=max_model_len)
        self.llm_engine = Some(has_unfinished_requests=lambda: False)
        self._engine = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        self._engine.start()

    def get_tokenizer(self):
        def template(messages, tokenize, add_generation_prompt, **options):
            return "".join(message["content"] for message in messages)
        return Some(apply_chat_template=template, encode=lambda text, add_special_tokens: text.split())

    def chat(self, conversations, params, use_tqdm, chat_template_kwargs):
        questions = [messages[-1]["content"] for messages in conversations]
        for question in questions:
            if question.startswith("refuse"):
                raise ValueError("cannot render " + question)
            if times(question, "die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if times(question, "hang"):
                self._engine.kill()
                time.sleep(600)
            if times(question, "dead"):
                raise EngineDeadError("the engine is dead")
        return [self._output(q, p.settings["max_tokens"]) for q, p in zip(questions, params)]

    def _output(self, question, max_tokens):
        text = f"answer to {question}".split(" ")
        reason = "length" if len(text) > max_tokens else "stop"
        said = Some(text=" ".join(text[:max_tokens]), token_ids=text[:max_tokens], finish_reason=reason, stop_reason=None)
        return Some(outputs=[said], prompt_token_ids=question.split())
''',
    "v1/engine/exceptions.py": "class EngineDeadError(Exception):\n    pass\n",
    "entrypoints/cli/main.py": """
import json, sys
from vllm import times
arguments = sys.argv[1:]
place = {name: arguments[arguments.index(name) + 1] for name in ("-i", "-o", "--model", "--dtype")}
print("run-batch", arguments, flush=True)
with open(place["-i"]) as source:
    requests = [json.loads(line) for line in source]
lines = []
for request in requests:
    question = request["body"]["messages"][-1]["content"]
    choice = {"index": 0, "message": {"content": "answer to " + question}, "finish_reason": "stop"}
    record = {"id": "vllm-1", "custom_id": request["custom_id"], "error": None,
              "response": {"status_code": 200, "request_id": "r", "body": {"choices": [choice], "usage": None}}}
    if question.startswith("refuse"):
        record["response"], record["error"] = {"status_code": 400, "body": None}, {"error": {"message": "too long"}}
    if times(question, "wrong id"):
        record["custom_id"] = "nobody"
    if times(question, "busy"):
        record["response"], record["error"] = {"status_code": 503, "body": None}, {"error": {"message": "busy"}}
    lines.append(json.dumps(record))
    if times(question, "twice"):
        lines.append(json.dumps(record))
    if times(question, "broken"):
        lines[-1] = lines[-1][:30]
    if question.startswith("exit"):
        sys.exit("this model has no weights")
with open(place["-o"], "w") as target:
    target.write("\\n".join(lines) + "\\n")
""",
}


def processes_with(text: str) -> list[int]:
    """Returns the ids of the processes, zombies left out, whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


def groups_of_guards(mark: str) -> set[int]:
    """Returns the process groups of the guards whose variables hold `mark`."""
    return {number for number in processes_with("guard.py") if mark in _read(number, "environ")}


def processes_in(groups: set[int]) -> dict[int, str]:
    """Returns command lines of the processes in process groups, by id; zombies left out.

    Engines write their names over their variables and arguments ("VLLM::EngineCore"), so only the group tells whose they are.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            state, _, group = _read(int(entry.name), "stat").rpartition(")")[2].split()[:3] or ("Z", "", "0")
            if state != "Z" and int(group) in groups:
                found[int(entry.name)] = _read(int(entry.name), "cmdline")
    return found


def _read(number: int, name: str) -> str:
    """Returns a file of a process; one that has ended has none."""
    try:
        return Path(f"/proc/{number}/{name}").read_text(errors="replace")
    except OSError:
        return ""
