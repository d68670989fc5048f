"""Answers a file of requests with an engine of vLLM, in chunks, each flushed to disk. Started by data_prep.llm.offline.

Run in vLLM's environment, so nothing of Setclip is imported; the file can be read alone, and run by hand:

    python -P worker.py '{"requests": "requests.jsonl", "answers": "answers.jsonl", "chunk": 1024,
                          "engine": {"model": "MODEL", "max_model_len": 2048}}'

`requests` are lines of OpenAI's batch layout, `answers` are appended to in the layout of its output. What has an answer is
skipped, so a worker that was killed, at any moment, is simply started again. A request that the engine refuses (its prompt
is too long) gets an answer with `error` and costs no other its own.

Standard output carries one JSON object a line: {"event": "ready"}, then {"event": "answered", …} after each chunk, or
{"event": "failed", "message"} where starting again would not help. Everything else goes to standard error.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

_FIRST_CHUNK = 200  # the forecast waits for it
_NO_USE = 20  # so many refusals, and no answer before them: the model or its template is at fault, not the requests
_STATUS_FAILED = 3
_STATUS_DEAD = 70
_SECONDS_TO_NOTICE = 5.0  # in which vLLM may raise by itself when a process of its engine is gone


class Failed(Exception):
    """What no other start would mend."""


def read_lines(path: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def drop_torn_line(path: str) -> None:
    """Cuts off what follows the last newline."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
            end = start
        if end < size:
            file.truncate(end)


class Engine:
    """vLLM's engine and the settings of its answers."""

    def __init__(self, arguments: dict[str, Any]):
        from vllm import LLM  # type: ignore[import-not-found]  # of another environment

        # "vllm": a model's own sampling settings (a repetition penalty, say) are left alone, as greedy answers want it.
        self.llm = LLM(**{"generation_config": "vllm", **arguments})
        self.max_model_len: int = self.llm.model_config.max_model_len
        self.has_answered = False

    def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns a record for each request, in order. Raises Failed if none of many can be asked."""
        records: list[dict[str, Any] | None] = [self._refusal(request) for request in requests]
        asked = [place for place, record in enumerate(records) if record is None]
        try:
            outputs: list[Any] = self._chat([requests[place] for place in asked])
        except Exception:  # one request was refused, and took the chunk with it; or the engine broke
            self._raise_if_broken()
            traceback.print_exc()
            outputs = [self._chat_one(requests[place]) for place in asked]
            if not self.has_answered and len(asked) >= _NO_USE and all(isinstance(o, Exception) for o in outputs):
                raise Failed(f"all of the first {len(asked)} requests were refused: {outputs[0]}") from outputs[0]
        for place, output in zip(asked, outputs, strict=True):
            if isinstance(output, Exception):
                records[place] = error_record(requests[place], str(output) or type(output).__name__)
            else:
                records[place] = answer_record(requests[place], output)
                self.has_answered = True
        return [record for record in records if record is not None]

    def _chat(self, requests: list[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        if not requests:
            return []
        bodies = [request["body"] for request in requests]
        return self.llm.chat(
            [body["messages"] for body in bodies],
            [SamplingParams(temperature=0.0, max_tokens=b["max_tokens"], seed=b.get("seed")) for b in bodies],
            use_tqdm=False,
            chat_template_kwargs=bodies[0].get("chat_template_kwargs"),  # one file has one value of it
        )

    def _chat_one(self, request: dict[str, Any]) -> Any:
        """Returns the output, or the exception that this request causes."""
        try:
            return self._chat([request])[0]
        except Exception as error:
            self._raise_if_broken()
            return error

    def _raise_if_broken(self) -> None:
        """Raises the exception that is being handled, unless it only refused a request.

        A request is refused before it is given to the engine, which then has nothing to do: vLLM takes back what was given
        before it. An engine that broke has work left, or is dead.
        """
        from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found]

        if isinstance(sys.exception(), EngineDeadError) or self.llm.llm_engine.has_unfinished_requests():
            raise

    def _refusal(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the record of a request that is too long, as a server refuses it; None for one that fits.

        A tokenizer gives at most one token a byte (and some for the template), so most requests need not be counted.
        """
        body = request["body"]
        room = self.max_model_len - body["max_tokens"]
        if sum(len(message["content"].encode()) for message in body["messages"]) + _TEMPLATE_TOKENS <= room:
            return None
        options = body.get("chat_template_kwargs") or {}
        try:
            text = self.llm.get_tokenizer().apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True, **options
            )
            tokens = len(self.llm.get_tokenizer().encode(text, add_special_tokens=False))
        except Exception:  # the engine says what is wrong with it
            return None
        if tokens <= room:
            return None
        return error_record(
            request,
            f"the prompt has {tokens} tokens; with {body['max_tokens']} of the answer that is more than the model's "
            f"{self.max_model_len}",
        )


_TEMPLATE_TOKENS = 256


def answer_record(request: dict[str, Any], output: Any) -> dict[str, Any]:
    """Returns vLLM's output as the server of vLLM would write it into a batch file."""
    said = output.outputs[0]
    prompt, completion = len(output.prompt_token_ids or ()), len(said.token_ids)
    body = {
        "id": f"chatcmpl-{request['custom_id']}",
        "object": "chat.completion",
        "model": request["body"]["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said.text},
                "finish_reason": said.finish_reason,
                "stop_reason": said.stop_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
    return _record(request["custom_id"], 200, body, None)


def error_record(request: dict[str, Any], message: str) -> dict[str, Any]:
    """Returns the record of a request that was refused."""
    return _record(request["custom_id"], 400, None, {"code": "400", "message": message})


def _record(custom_id: str, status: int, body: Any, error: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"setclip-{custom_id}", "body": body}
    return {"id": f"setclip-{custom_id}", "custom_id": custom_id, "response": response, "error": error}


def work(job: dict[str, Any], events: Any) -> None:
    """Answers what has no answer yet."""
    with open(job["answers"], "ab"):
        pass
    drop_torn_line(job["answers"])
    finished = {record["custom_id"] for record in read_lines(job["answers"])}
    waiting = [request for request in read_lines(job["requests"]) if request["custom_id"] not in finished]
    engine = Engine(job["engine"])
    threading.Thread(target=_end_with_engine, args=(multiprocessing.active_children(),), daemon=True).start()
    _tell(events, event="ready", waiting=len(waiting))
    start, size = 0, min(_FIRST_CHUNK, job["chunk"])
    with open(job["answers"], "ab", buffering=0) as file:
        while start < len(waiting):
            records = engine.answer(waiting[start : start + size])
            for record in records:
                line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                file.write(line.encode("utf-8", "replace") + b"\n")
            os.fsync(file.fileno())
            start, size = start + size, job["chunk"]
            usages = [(record["response"]["body"] or {}).get("usage", {}) for record in records]
            _tell(
                events,
                event="answered",
                answers=len(records),
                prompt_tokens=sum(usage.get("prompt_tokens", 0) for usage in usages),
                completion_tokens=sum(usage.get("completion_tokens", 0) for usage in usages),
            )


def _end_with_engine(children: list[multiprocessing.process.BaseProcess]) -> None:
    """Ends the worker when a process of its engine does: vLLM (0.32) at times waits for ever for one that was killed."""
    if children:
        multiprocessing.connection.wait([child.sentinel for child in children])
        time.sleep(_SECONDS_TO_NOTICE)
        print("a process of the engine has ended, and vLLM has not noticed", file=sys.stderr, flush=True)
        os._exit(_STATUS_DEAD)


def _tell(events: Any, **fields: Any) -> None:
    events.write(json.dumps(fields) + "\n")
    events.flush()


def main() -> None:
    """Does the job of the first argument."""
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)  # vLLM logs to standard output as well
        try:
            work(json.loads(sys.argv[1]), events)
        except Failed as failed:
            _tell(events, event="failed", message=str(failed))
            sys.exit(_STATUS_FAILED)


match __name__:
    case "__main__":  # not where multiprocessing imports this file again
        main()
