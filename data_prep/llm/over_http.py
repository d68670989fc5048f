"""The http runner: asks an OpenAI-compatible server, many requests at a time, through its failures and restarts.

What a failure means:

    connection refused, 408, 425, 429, 503    the server is away or busy: asked again, until `patience` seconds passed
                                              without an answer to any request
    other 5xx, a broken connection, no JSON   asked again, at most `retries` times while the server answers others; then
                                              given up: the run ends with an error after the others, and asks it next time
    3xx, 401, 402, 403, 404                   the address or the key is wrong: the run stops
    any other 4xx                             the request is at fault: the error is its answer

Waits double up to 15 s, by chance shortened up to half so that requests do not come back together; Retry-After is heeded.
Used by client.
"""

import asyncio
import contextlib
import email.utils
import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from data_prep.llm.config import RunnerConfig
from data_prep.llm.job import Job
from data_prep.llm.jsonl import AnswerWriter, Request, answer_record, body_of, check_completion, message_of
from setclip.errors import InputError
from setclip.log import warn

_AWAY = (408, 425, 429, 503)
_WRONG_ADDRESS = (*range(300, 400), 401, 402, 403, 404)
_WRONG_KEY = (401, 402, 403)
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 15.0
_SECONDS_TO_CONNECT = 10.0
_SECONDS_BETWEEN_FLUSHES = 1.0
_NO_USE = 20  # so many errors, and no answer before them: the server is at fault, not the requests


@dataclass(frozen=True)
class Failure:
    """Why one try brought no answer."""

    message: str
    is_away: bool
    """Whether it says nothing about this request."""
    wait: float = 0.0
    """Seconds that the server asks for."""


def run(job: Job) -> None:
    """Answers the job's requests.

    Raises InputError where the server cannot be reached for too long, refuses the key, does not know the model, refuses
    whatever it is asked, or fails at some requests again and again; these then have no answer.
    """
    try:
        asyncio.run(_run(job))
    except BaseExceptionGroup as group:
        raise _first(group) from None


def check(config: RunnerConfig) -> None:
    """Looks at the server once: warns if it does not answer, raises InputError if it refuses the key or has not the model."""
    asyncio.run(_check(config))


async def _check(config: RunnerConfig) -> None:
    async with _client(config) as client:
        client.timeout = httpx.Timeout(_SECONDS_TO_CONNECT)
        await Server(client, config).check_model(wait=False)


def _client(config: RunnerConfig) -> httpx.AsyncClient:
    assert config.url is not None
    is_here = (urlsplit(config.url).hostname or "") in ("localhost", "127.0.0.1", "::1")
    key = os.environ.get("OPENAI_API_KEY")
    return httpx.AsyncClient(
        base_url=config.url.rstrip("/") + "/",
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(config.timeout, connect=_SECONDS_TO_CONNECT, pool=None),
        limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        trust_env=not is_here,  # no proxy between us and ourselves
    )


async def _run(job: Job) -> None:
    config = job.config
    async with _client(config) as client:
        server = Server(client, config)
        await server.check_model(wait=True)
        job.progress.started()
        with AnswerWriter(job.answers) as writer:
            answers = _Answers(job, writer)
            waiting = iter(job.requests)  # shared: each task takes the next
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(config.concurrency, len(job.requests))):
                    tasks.create_task(_ask_in_turn(waiting, server, answers))
            answers.release()
    if server.given_up:
        raise InputError(
            f"expected answers to {len(job.requests):,} requests, found {len(server.given_up):,} of them given up (first: "
            f"{server.given_up[0]}); start the same command again: what is answered stays"
        )


async def _ask_in_turn(waiting: Iterator[Request], server: "Server", answers: "_Answers") -> None:
    for request in waiting:
        record = await server.answer(request)
        if record is not None:
            answers.take(record)


class Server:
    """One server, and what its answers to all requests together say of its health."""

    def __init__(self, client: httpx.AsyncClient, config: RunnerConfig):
        self._client, self._config = client, config
        self._answers = 0
        self._silent_since: float | None = None
        """When the first try failed after the last answer."""
        self._has_warned = False
        self.given_up: list[str] = []
        """Ids of requests that failed too often, with the last failure."""

    async def check_model(self, *, wait: bool) -> None:
        """Waits until the server is there, or only warns. Raises InputError if it stays away, or has not the model."""
        for tries in itertools.count():
            failure, body = await self._send("GET", "models", None)
            if failure is None:
                break
            if not self._has_warned:
                self._warn(failure)
            if not wait:
                return
            await self._wait(failure, tries)
        self._heard()
        try:
            names = [model["id"] for model in body["data"]]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"expected an OpenAI-compatible server at {self._config.url}, found that its /models answers {body!r:.200}; "
                "give the address that ends in /v1"
            ) from error
        if self._config.model not in names:
            raise InputError(
                f"expected a server of {self._config.model} at {self._config.url}, found {', '.join(names) or 'no model'}; "
                "give --model as the server names it"
            )

    async def answer(self, request: Request) -> dict[str, Any] | None:
        """Returns the record of a request's answer, or of the error that is its own; None where it is given up."""
        body = body_of(request, self._config)
        strikes = 0
        for tries in itertools.count():
            answers_before = self._answers
            failure, said = await self._send("POST", "chat/completions", body)
            if failure is None:
                self._heard()
                return self._record(request, said)
            strikes += not failure.is_away and self._answers > answers_before  # otherwise it may fail at all requests
            if strikes > self._config.retries:
                self.given_up.append(f"{request.custom_id}, {failure.message}")
                return None
            await self._wait(failure, tries)
        raise AssertionError("the loop has no end")

    def _record(self, request: Request, said: Any) -> dict[str, Any]:
        if isinstance(said, httpx.Response):  # refused
            return answer_record(request.custom_id, said.status_code, None, _words(said))
        return answer_record(request.custom_id, 200, said)

    async def _send(self, method: str, path: str, body: Any) -> tuple[Failure | None, Any]:
        """Returns (failure, None) or (None, JSON of a good answer, or the response that refuses the request)."""
        try:
            response = await self._client.request(method, path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return Failure(f"no connection ({_named(error)})", is_away=True), None
        except httpx.TransportError as error:
            return Failure(f"the connection broke ({_named(error)})", is_away=False), None
        status = response.status_code
        if status in _WRONG_ADDRESS:
            raise InputError(
                f"expected the server at {self._config.url} to answer, found status {status} of {response.url} "
                f"({_words(response):.300}); "
                + (
                    "set OPENAI_API_KEY to its key"
                    if status in _WRONG_KEY
                    else "see to the address (it ends in /v1) and the model"
                )
            )
        if status in _AWAY or status >= 500:
            return Failure(f"status {status} ({_words(response):.200})", status in _AWAY, _retry_after(response)), None
        if status >= 400:
            return None, response
        try:
            said = response.json()
            if method == "POST":
                check_completion(said)
        except ValueError as error:
            return Failure(f"no answer that can be read ({error}): {response.text[:100]!r}", is_away=False), None
        return None, said

    async def _wait(self, failure: Failure, tries: int) -> None:
        """Waits before the next try. Raises InputError if the server was silent for too long."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since > self._config.patience:
            raise InputError(
                f"expected answers from the server at {self._config.url}, found none in {now - self._silent_since:.0f} s; "
                f"the last try: {failure.message}. See whether it runs, and start again: what is answered stays"
            )
        elif now - self._silent_since > _LONGEST_WAIT and not self._has_warned:
            self._warn(failure)
        pause = min(_FIRST_WAIT * 2 ** min(tries, 16), _LONGEST_WAIT) * random.uniform(0.5, 1)
        await asyncio.sleep(max(pause, min(failure.wait, max(self._config.patience, _LONGEST_WAIT))))

    def _warn(self, failure: Failure) -> None:
        self._has_warned = True
        warn(
            f"the server at {self._config.url} does not answer ({failure.message}); waiting up to "
            f"{self._config.patience:.0f} s for it (--patience)"
        )

    def _heard(self) -> None:
        self._answers += 1
        self._silent_since, self._has_warned = None, False


class _Answers:
    """Writes records; errors wait until something was answered, so that a broken server does not spoil a run."""

    def __init__(self, job: Job, writer: AnswerWriter):
        self._job, self._writer = job, writer
        self._held: list[dict[str, Any]] = []
        self._has_answered = False
        self._flushed = time.monotonic()

    def take(self, record: dict[str, Any]) -> None:
        """Writes a record, or keeps an error back. Raises InputError if errors are all that comes."""
        if record["error"] is not None and not self._has_answered:
            self._held.append(record)
            if len(self._held) >= _NO_USE:
                said = self._held[0]["error"]["message"]
                raise InputError(
                    f"expected answers from the server at {self._job.config.url}, found its first {_NO_USE} to be errors: "
                    f"{said}; see to the model (it needs a chat template) and its settings"
                )
            return
        self._has_answered = True
        self._write(record)

    def release(self) -> None:
        """Writes what was kept back; for the end of a run in which nothing stopped it."""
        held, self._held = self._held, []
        for record in held:
            self._writer.append(record)
            self._job.progress.answered()

    def _write(self, record: dict[str, Any]) -> None:
        self.release()
        self._writer.append(record)
        usage = (record["response"]["body"] or {}).get("usage") or {}
        tokens = (usage.get("prompt_tokens") or 0) + (usage.get("completion_tokens") or 0)
        self._job.progress.answered(1, tokens)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._writer.flush()
            self._flushed = time.monotonic()


def _retry_after(response: httpx.Response) -> float:
    """Returns the seconds that the server asks for, by a number or a date; 0 where it does not."""
    value = response.headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _words(response: httpx.Response) -> str:
    """Returns what an error response says."""
    try:
        return message_of(response.json())
    except ValueError:
        return response.text.strip()[:300] or response.reason_phrase


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the exception that ended a task group."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
