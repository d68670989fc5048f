"""Asks a language model many questions, once each, through any of three runners; a call that was killed goes on.

`ask` keeps in its folder

    settings.json     what decides the answers; another model in the same folder is refused
    requests.jsonl    the questions, in the layout of OpenAI's batch files
    answers.jsonl     what came back, raw, keyed by custom_id
    engine.log        what vLLM printed (runners offline and run-batch)

Used by the commands that parse captions and describe objects.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.llm import environment, offline, over_http, run_batch
from data_prep.llm.config import RunnerConfig, answer_settings
from data_prep.llm.job import ANSWERS_NAME, REQUESTS_NAME, Job
from data_prep.llm.jsonl import Answer, Request, body_of, drop_torn_line, read_answers, read_records, request_line
from data_prep.llm.progress import Progress
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import warn

__all__ = ["Answer", "Request", "RunnerConfig", "ask", "check"]

RUNNERS: Mapping[str, Callable[[Job], None]] = {
    "offline": offline.run,
    "http": over_http.run,
    "run-batch": run_batch.run,
}
"""Name to what answers a job's requests."""

SETTINGS_NAME = "settings.json"

_LOCK_NAME = ".lock"
_SECONDS_FOR_THE_KILLED = 20.0  # in which the processes of a call that was killed end


def check(config: RunnerConfig) -> None:
    """Looks, before work that takes long, whether questions could be asked; `ask` looks again.

    Warns where a server does not answer yet. Raises InputError where vLLM's environment is missing, or the server refuses the
    key or has not this model.
    """
    if config.runner == "http":
        over_http.check(config)
    else:
        environment.ready(config.environment)


def ask(requests: Sequence[Request], folder: Path, config: RunnerConfig, *, description: str) -> dict[str, Answer]:
    """Returns the answer to each request by its id, and asks what `folder` has no answer to yet.

    Killed at any moment, the same call goes on; later calls may bring more requests. Errors that a server gives to one
    request alone are answers with `error`. Raises InputError where vLLM's environment is missing, the server cannot be
    reached or has not this model or fails at some requests again and again, the engine does not start, the folder has
    answers of other settings, another call is at work in it, or one id has two questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        _check_settings(folder, config)
        _keep_requests(requests, folder / REQUESTS_NAME, config)
        drop_torn_line(folder / ANSWERS_NAME)
        wanted = {request.custom_id for request in requests}
        answers = _answers(folder, wanted)
        missing = list({r.custom_id: r for r in requests if r.custom_id not in answers}.values())
        if missing:
            progress = Progress(description, len(wanted), len(answers), config.price_per_hour)
            try:
                RUNNERS[config.runner](Job(missing, folder, config, progress, lock))
            finally:
                progress.close()
            answers = _answers(folder, wanted)
    assert len(answers) == len(wanted), "a runner ended before all was answered"
    _say_errors(answers, description)
    return {request.custom_id: answers[request.custom_id] for request in requests}


def has_answers(folder: Path) -> bool:
    """Whether a folder of `ask` holds any answer."""
    answers = folder / ANSWERS_NAME
    return answers.exists() and answers.stat().st_size > 0


def _answers(folder: Path, wanted: set[str]) -> dict[str, Answer]:
    """Returns the answers to `wanted`. Raises InputError where one has two: no runner of ours writes that."""
    answers: dict[str, Answer] = {}
    for answer in read_answers(folder / ANSWERS_NAME):
        if answer.custom_id in answers:
            raise InputError(
                f"expected one answer an id in {folder / ANSWERS_NAME}, found two for {answer.custom_id!r}; remove one of them"
            )
        if answer.custom_id in wanted:
            answers[answer.custom_id] = answer
    return answers


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Yields a file descriptor that holds the folder's lock, which ends with the last process that has it open."""
    with open(folder / _LOCK_NAME, "w") as file:
        ends = time.monotonic() + _SECONDS_FOR_THE_KILLED
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise InputError(
                        f"expected {folder} for this job alone, found another one at work there; wait for it, or give each "
                        "job a part of its own"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                warn(f"{folder} cannot be locked ({error}): see to it that no two jobs ask into it")
                break
            else:
                break
        yield file.fileno()


def _check_settings(folder: Path, config: RunnerConfig) -> None:
    given = answer_settings(config)
    path = folder / SETTINGS_NAME
    if not has_answers(folder):  # what was begun and never answered binds nobody
        (folder / REQUESTS_NAME).unlink(missing_ok=True)
        write_json(path, given)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name in given if given[name] != found.get(name)]
    if different:
        raise InputError(
            f"expected {folder} to go on as it was begun, found "
            + ", ".join(f"{name} {given[name]} in place of {found.get(name)}" for name in different)
            + "; give what it was begun with, or remove it to ask anew"
        )


def _keep_requests(requests: Sequence[Request], path: Path, config: RunnerConfig) -> None:
    """Appends the requests that the file does not hold yet."""
    drop_torn_line(path)
    known = {record["custom_id"]: _digest(record["body"]["messages"]) for record in read_records(path)}
    with open(path, "ab") as file:
        for request in requests:
            digest = _digest(body_of(request, config)["messages"])
            if request.custom_id not in known:
                known[request.custom_id] = digest
                file.write(request_line(request, config))
            elif known[request.custom_id] != digest:
                raise InputError(
                    f"expected one question an id in {path}, found two for {request.custom_id!r}; the second is "
                    f"{request.messages[-1]['content'][:80]!r}; give each question an id of its own"
                )
        file.flush()
        os.fsync(file.fileno())


def _digest(messages: object) -> bytes:
    return hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest()


def _say_errors(answers: Mapping[str, Answer], description: str) -> None:
    errors = Counter(answer.error for answer in answers.values() if answer.error is not None)
    if errors:
        ((most_often, _),) = errors.most_common(1)
        warn(
            f"{description}: {errors.total():,} of {len(answers):,} requests got an error in place of an answer, which is "
            f"kept as theirs; most often: {most_often}"
        )
