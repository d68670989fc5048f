"""The run-batch runner: gives files of requests to `vllm run-batch`, one after another. Used by client.

It reads a whole file, and writes only at its end; one malformed line loses all. So files are small enough to be lost,
every line is looked at before, and what comes back is looked at before it counts: an id that was not asked, or twice, or
not at all, is no answer, and what has none is asked in the next file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.llm import environment
from data_prep.llm.environment import Environment
from data_prep.llm.job import Job
from data_prep.llm.jsonl import AnswerWriter, Request, check_completion, message_of, request_line
from data_prep.llm.offline import engine_arguments
from data_prep.llm.processes import end_of, guarded
from setclip.errors import InputError
from setclip.log import say, warn

_IN_NAME, _OUT_NAME = "batch-in.jsonl", "batch-out.jsonl"
_STARTS_IN_VAIN = 3
_ASK_AGAIN = (408, 425, 429)  # and 5xx: says nothing about the request


def run(job: Job) -> None:
    """Answers the job's requests.

    Raises InputError where there is no environment, where `vllm run-batch` fails, and where it leaves requests unanswered
    again and again.
    """
    place = environment.ready(job.config.environment)
    check_lines(job)
    left, in_vain = list(job.requests), 0
    while left:
        batch = left[: job.config.batch]
        status = _run_once(job, place, batch)
        records, faults = read_output(job.folder / _OUT_NAME, {request.custom_id for request in batch})
        if faults:
            warn(f"vllm run-batch wrote {len(faults):,} lines that are no answers; the first: {faults[0]}")
        with AnswerWriter(job.answers) as writer:
            for record in records:
                writer.append(record)
        for name in (_IN_NAME, _OUT_NAME):
            (job.folder / name).unlink(missing_ok=True)
        answered = {record["custom_id"] for record in records}
        job.progress.answered(len(records), sum(map(_tokens, records)))
        left = [request for request in left if request.custom_id not in answered]
        in_vain = 0 if records else in_vain + 1
        # A status of its own and nothing written: the model cannot be loaded, and could not the next time.
        if left and not records and (in_vain >= _STARTS_IN_VAIN or 0 < status < 128):
            raise InputError(
                f"expected vllm run-batch to answer, found that it ended with status {status}, {len(left):,} requests before "
                f"the end; the end of {job.log}:\n{end_of(job.log)}\nMend that and start again: what is answered stays"
            )


def check_lines(job: Job) -> None:
    """Raises InputError if a line would make `vllm run-batch` refuse the whole file."""
    for request in job.requests:
        line = request_line(request, job.config)
        messages = json.loads(line)["body"]["messages"]
        is_whole = messages and all(
            set(message) == {"role", "content"} and message["role"] in ("system", "user", "assistant")
            for message in messages
        )
        if not is_whole or b"\n" in line[:-1]:
            raise InputError(
                f"expected messages of a role (system, user or assistant) and content, found {messages!r:.200} in request "
                f"{request.custom_id!r}; one such line loses the whole batch"
            )


def read_output(path: Path, asked: set[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records that answer what was asked, in our layout, and what is wrong with the other lines."""
    records: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    if not path.exists():
        return [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = _record(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                faults.append(f"line {number}: no record ({type(error).__name__} {error}): {line[:80]!r}")
                continue
            if record is None:
                faults.append(f"line {number}: {line[:200]!r}")
            elif record["custom_id"] not in asked:
                faults.append(f"line {number}: {record['custom_id']!r} was not asked")
            elif record["custom_id"] in records:
                faults.append(f"line {number}: {record['custom_id']!r} a second time")
            else:
                records[record["custom_id"]] = record
    return list(records.values()), faults


def _record(said: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a line as a record of ours; None where it says nothing of its request. Raises ValueError and such."""
    response, error = said["response"] or {}, said["error"]
    status = response.get("status_code", 200)
    if error is not None or status != 200:
        if status in _ASK_AGAIN or status >= 500 or status == 200:
            return None
        said["error"] = {"code": str(status), "message": message_of(error) or message_of(response.get("body"))}
        return said
    check_completion(response["body"])
    return said


def _run_once(job: Job, place: Environment, batch: Sequence[Request]) -> int:
    job.write_requests(batch, job.folder / _IN_NAME)
    (job.folder / _OUT_NAME).unlink(missing_ok=True)
    command = [str(place.python), "-m", "vllm.entrypoints.cli.main", "run-batch"]
    command += ["-i", str(job.folder / _IN_NAME), "-o", str(job.folder / _OUT_NAME)]
    for name, value in {"generation_config": "vllm", **engine_arguments(job, place)}.items():
        command += _flag(name, value)
    say(f"starting vllm run-batch with {job.config.model}, {len(batch):,} requests (its log: {job.log})")
    job.progress.started()
    with (
        open(job.log, "ab") as log,
        guarded(command, environment.variables(place, job.config.model), log, [job.lock], output=log) as process,
    ):
        return process.wait()


def _flag(name: str, value: Any) -> list[str]:
    """Returns an engine argument as vLLM's command line takes it."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]


def _tokens(record: dict[str, Any]) -> int:
    usage = ((record["response"] or {}).get("body") or {}).get("usage") or {}
    return (usage.get("prompt_tokens") or 0) + (usage.get("completion_tokens") or 0)
