"""The offline runner: starts our worker by vLLM's own Python, and again where it dies. Used by client."""

import json
from pathlib import Path
from typing import Any

from data_prep.llm import environment
from data_prep.llm.config import parsed_options
from data_prep.llm.environment import Environment
from data_prep.llm.job import Job
from data_prep.llm.jsonl import drop_torn_line
from data_prep.llm.processes import end_of, guarded
from setclip.errors import InputError
from setclip.log import say, warn

WORKER = Path(__file__).with_name("worker.py")

_MISSING_NAME = "missing.jsonl"
_STARTS_IN_VAIN = 3


def engine_arguments(job: Job, place: Environment) -> dict[str, Any]:
    """Returns what vLLM's engine is told."""
    config = job.config
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
    if place.variant == "gpu":
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:
        arguments["enforce_eager"] = True  # compiling takes 20 s a start, more than it saves a small model
        if config.dtype == "auto":
            arguments["dtype"] = (
                "float32"  # SmolLM2-135M answers four times as fast as in bfloat16, which vLLM would take
            )
    return {**arguments, **parsed_options(config.engine_options, "engine_options")}


def run(job: Job) -> None:
    """Answers the job's requests.

    Raises InputError where there is no environment, where the engine does not start, and where it dies again and again
    without a single answer between.
    """
    place = environment.ready(job.config.environment)
    missing = job.folder / _MISSING_NAME
    job.write_requests(job.requests, missing)
    wanted = {request.custom_id for request in job.requests}
    left, in_vain = len(wanted), 0
    while left:
        status, was_ready = _run_worker(job, place)
        drop_torn_line(job.answers)
        before, left = left, len(wanted - job.finished())
        in_vain = 0 if left < before else in_vain + 1
        if not left:
            break
        # A status of its own before it was ready: vLLM cannot load this model, and would not the next time.
        if in_vain >= _STARTS_IN_VAIN or (not was_ready and 0 < status < 128):
            raise InputError(
                f"expected the engine to answer, found that it ended with status {status}, {left:,} requests before the end; "
                f"the end of {job.log}:\n{end_of(job.log)}\nMend that and start again: what is answered stays"
            )
        warn(f"the engine ended with status {status}, {left:,} requests before the end; starting it again ({job.log})")
    missing.unlink()


def _run_worker(job: Job, place: Environment) -> tuple[int, bool]:
    """Runs the worker until it ends; returns its status, and whether its engine was ready."""
    task = {
        "requests": str(job.folder / _MISSING_NAME),
        "answers": str(job.answers),
        "chunk": job.config.chunk,
        "engine": engine_arguments(job, place),
    }
    command = [str(place.python), "-P", str(WORKER), json.dumps(task)]
    was_ready = False
    say(f"starting vLLM with {job.config.model} (its log: {job.log})")
    with (
        open(job.log, "ab") as log,
        guarded(command, environment.variables(place, job.config.model), log, [job.lock]) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            match event.pop("event"):
                case "ready":
                    was_ready = True
                    job.progress.started()
                case "answered":
                    job.progress.answered(event["answers"], event["prompt_tokens"] + event["completion_tokens"])
                case "failed":
                    raise InputError(
                        f"expected {job.config.model} to answer, found that {event['message']}; see {job.log}, and take a "
                        "model with a chat template"
                    )
        return process.wait(), was_ready
