"""Requests and answers as JSON lines in the layout of OpenAI's batch files, keyed by custom_id. Used by all runners.

requests.jsonl    {"custom_id", "method", "url", "body": {"model", "messages", "max_tokens", "temperature", "seed", …}}
answers.jsonl     {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

Both only grow. Lines end with a newline, so one without is a line that a killed process did not finish; it is dropped.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.llm.config import RunnerConfig, parsed_options
from setclip.errors import InputError

ENDPOINT = "/v1/chat/completions"
_TAIL = 1 << 16


@dataclass(frozen=True)
class Request:
    """One question. Equal ids mean equal questions."""

    custom_id: str
    messages: tuple[dict[str, str], ...]
    """Of the chat: {"role": …, "content": …}."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one question."""

    custom_id: str
    text: str
    finish_reason: str
    """"stop" where the model ended it, "length" where max_tokens did; "error" with an error."""
    prompt_tokens: int
    """0 where a server does not count."""
    completion_tokens: int
    error: str | None
    """Why there is no answer: what the engine or server said of this request; the text is then ""."""


def body_of(request: Request, config: RunnerConfig) -> dict[str, Any]:
    """Returns what is sent of a request. Lone surrogates, which no encoding takes, become "?"."""
    messages = [
        {key: value.encode("utf-8", "replace").decode("utf-8") for key, value in message.items()}
        for message in request.messages
    ]
    options = parsed_options(config.chat_options, "chat_options")
    return {
        "model": config.model,
        "messages": messages,
        "max_tokens": config.max_tokens,
        "temperature": 0,
        "seed": config.seed,
        **({"chat_template_kwargs": options} if options else {}),
    }


def request_line(request: Request, config: RunnerConfig) -> bytes:
    """Returns a line of requests.jsonl."""
    record = {"custom_id": request.custom_id, "method": "POST", "url": ENDPOINT, "body": body_of(request, config)}
    return to_line(record)


def to_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record as one line."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def answer_record(custom_id: str, status: int, body: Any, error: str | None = None) -> dict[str, Any]:
    """Returns a record of answers.jsonl. `body` is what the server sent."""
    return {
        "id": f"setclip-{custom_id}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"setclip-{custom_id}", "body": body},
        "error": None if error is None else {"code": str(status), "message": error},
    }


def parse_answer(record: Mapping[str, Any]) -> Answer:
    """Returns the answer in a record. Raises ValueError if the record is none."""
    try:
        custom_id, response, error = record["custom_id"], record["response"], record["error"]
        status = response["status_code"] if response is not None else 0
        if error is not None or status != 200:
            said = error if error is not None else (response or {}).get("body")
            return Answer(custom_id, "", "error", 0, 0, message_of(said) or f"status {status}")
        return Answer(custom_id, *_parts(response["body"]), error=None)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"no answer in OpenAI's batch layout ({type(error).__name__} {error})") from error


def check_completion(body: Any) -> None:
    """Raises ValueError if a server's body is no chat completion."""
    try:
        _parts(body)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"no chat completion ({type(error).__name__} {error})") from error


def message_of(said: Any) -> str:
    """Returns the words in an error, however a server wraps them."""
    while isinstance(said, dict):
        said = said.get("error") or said.get("message") or said.get("detail") or json.dumps(said)
    return str(said or "")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file, in order; none if there is no file. Raises InputError with the line of a bad one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                record["custom_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"expected a JSON object with custom_id in line {number} of {path}, found {line[:60]!r} ({error}); "
                    "remove the line: what it answered is asked again"
                ) from error
            yield record


def read_answers(path: Path) -> Iterator[Answer]:
    """Yields the answers of a file, in order. Raises InputError with the line of a bad one."""
    for number, record in enumerate(read_records(path), 1):
        try:
            yield parse_answer(record)
        except ValueError as error:
            raise InputError(
                f"expected an answer in line {number} of {path}, found {error}; remove the line: its request is asked again"
            ) from error


def drop_torn_line(path: Path) -> int:
    """Cuts a last line that was not finished (or is no JSON, after a power failure) off; returns its bytes."""
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _start_of_last_line(file, size)
        file.seek(start)
        last = file.read()
        if last.endswith(b"\n") or not last:
            try:
                json.loads(last or b"{}")
                return 0
            except ValueError:
                pass
        file.truncate(start)
        os.fsync(file.fileno())
    return size - start


class AnswerWriter:
    """Appends records; each is with the system at once and on disk after `flush`, which also the end calls."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record whole: a kill leaves it there or torn, never two mixed."""
        self._file.write(to_line(record))

    def flush(self) -> None:
        """Waits until the disk has what was appended."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "AnswerWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _parts(body: Any) -> tuple[str, str, int, int]:
    """Returns (text, finish reason, prompt tokens, completion tokens) of a chat completion."""
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = choice["message"].get("content") or ""  # None where a model only thought, or called a tool
    if not isinstance(text, str):
        raise TypeError(f"content of type {type(text).__name__}")
    return text, choice.get("finish_reason") or "", usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


def _start_of_last_line(file: Any, size: int) -> int:
    """Returns where the last line starts; a newline at the very end belongs to it."""
    end = max(size - 1, 0)
    while end > 0:
        start = max(end - _TAIL, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
