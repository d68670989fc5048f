"""Which model answers, and how it is run: the flags that every command with questions to a language model shares."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from setclip.errors import InputError

Runner = Literal["offline", "http", "run-batch"]


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """A language model and its runner. All three runners send the same requests, at temperature 0."""

    model: str
    """Folder of a model with a chat template, or its name on the Hugging Face hub; with --runner http the name by which
    the server knows it."""
    runner: Runner = "offline"
    """offline starts an engine here and asks it directly; http asks a server that runs; run-batch gives files to
    `vllm run-batch`."""

    max_tokens: int = 128
    """Tokens of an answer at most; longer ones are cut (finish_reason "length")."""
    max_model_len: int = 2048
    """Tokens of prompt and answer together; the engine's memory is planned for it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of the weights; auto takes the model's own (float32 without a GPU). A server behind --runner http has its
    own."""
    seed: int = 0
    """Seed of the engine; at temperature 0 it decides nothing in most models."""
    chat_options: str = "{}"
    """JSON object for the model's chat template, e.g. '{"enable_thinking": false}'."""

    engine_options: str = "{}"
    """offline, run-batch: JSON object of further engine arguments of vLLM, e.g. '{"quantization": "fp8"}'."""
    tensor_parallel_size: int = 1
    """offline, run-batch: GPUs that hold one engine."""
    gpu_memory_utilization: float = 0.9
    """offline, run-batch: share of each GPU's memory that the engine takes."""
    environment: Path | None = None
    """offline, run-batch: folder of vLLM's environment; SETCLIP_VLLM_ENV where that is set, otherwise .venv-vllm here."""
    chunk: int = 1024
    """offline: requests between two flushes to disk. What a kill can cost; larger ones keep a fast GPU busier."""
    batch: int = 20_000
    """run-batch: requests of one file. What a kill can cost; the engine is started anew for each."""

    url: str | None = None
    """http: base address of the server, e.g. http://127.0.0.1:8000/v1. A key is taken from OPENAI_API_KEY."""
    concurrency: int = 64
    """http: requests in flight."""
    timeout: float = 600.0
    """http: seconds that one answer may take."""
    patience: float = 600.0
    """http: seconds without a single answer after which an unreachable or overloaded server is given up."""
    retries: int = 8
    """http: times that one request may fail (status 5xx, connection broken) while the server answers others; then it is
    given up, and the same command asks it again."""

    price_per_hour: float = 0.0
    """What an hour of this runner costs, in any currency; the forecast then names the cost."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)}"
            for name, fits in {
                "max_tokens": 1 <= self.max_tokens < self.max_model_len,
                "tensor_parallel_size": self.tensor_parallel_size >= 1,
                "gpu_memory_utilization": 0 < self.gpu_memory_utilization <= 1,
                "chunk": self.chunk >= 1,
                "batch": self.batch >= 1,
                "concurrency": self.concurrency >= 1,
                "timeout": self.timeout > 0,
                "patience": self.patience >= 0,
                "retries": self.retries >= 0,
                "price_per_hour": self.price_per_hour >= 0,
            }.items()
            if not fits
        ]
        if wrong:
            raise InputError(
                "expected max_tokens below max_model_len, a gpu_memory_utilization of at most 1, nothing negative, and at "
                f"least 1 where a count is asked for; found {', '.join(wrong)}; choose other values"
            )
        parsed_options(self.chat_options, "chat_options")
        parsed_options(self.engine_options, "engine_options")
        self._check_place()

    def _check_place(self) -> None:
        if self.runner == "http":
            parts = urlsplit(self.url or "")
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise InputError(
                    f"expected an address such as http://127.0.0.1:8000/v1 as url with runner http, found {self.url!r}; "
                    "give the server's"
                )
            return
        if self.url is not None:
            raise InputError(
                f"expected url with runner http only, found {self.url!r} with runner {self.runner}; add --runner http or "
                "leave it out"
            )
        folder = Path(self.model)
        looks_like_a_path = self.model.startswith(("/", ".", "~")) or folder.exists()
        if looks_like_a_path and not (folder / "config.json").is_file():
            found = "a folder without it" if folder.is_dir() else "a file" if folder.exists() else "nothing"
            raise InputError(
                f"expected a model's folder with config.json at {self.model}, found {found}; name another folder, or a "
                "model of the Hugging Face hub"
            )


def parsed_options(text: str, name: str) -> dict[str, Any]:
    """Returns the JSON object in `text`; raises InputError, which names the setting, if it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"expected a JSON object as {name}, found {text!r} ({error}); quote it for the shell"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object as {name}, found {text!r}; write it as '{{\"name\": value}}'")
    return value


def answer_settings(config: RunnerConfig) -> dict[str, Any]:
    """Returns the settings that decide what an answer is: one folder of answers has one value of each."""
    folder = Path(config.model)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else config.model,
        "max_tokens": config.max_tokens,
        "max_model_len": config.max_model_len,
        "dtype": config.dtype,
        "seed": config.seed,
        "chat_options": parsed_options(config.chat_options, "chat_options"),
        "engine_options": parsed_options(config.engine_options, "engine_options"),
    }


def settings_line(model: str, settings: Mapping[str, Any]) -> str:
    """Returns `answer_settings` for people and versions; `model` is how they call it."""
    others = ", ".join(
        f"{name.replace('_', ' ')} {json.dumps(settings[name], sort_keys=True) if name.endswith('options') else settings[name]}"
        for name in ("dtype", "seed", "chat_options", "engine_options")
    )
    return f"{model}, max {settings['max_tokens']} of {settings['max_model_len']} tokens, {others}"


def merge_command(module: str, folder: Path, config: RunnerConfig) -> str:
    """Returns what a user types to merge the parts of the command in `module`: all flags that are not the default."""
    flags = [
        word
        for entry in fields(config)
        if entry.name not in ("folder", "part", "parts", "merge")
        and (value := getattr(config, entry.name)) != entry.default
        for word in (f"--{entry.name.replace('_', '-')}", str(value))
    ]
    return shlex.join(["python", "-m", module, str(folder), *flags, "--merge", "True"])
