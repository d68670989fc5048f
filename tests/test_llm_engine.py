"""The real vLLM: the same answers from all runners, each its request's own, through kills of all that takes part.

`make test-llm` makes vLLM's environment and runs this (marker `llm`); `-m soak` runs the long version. The models are made
on the spot: tests/llm_material.py.
"""

import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from llm_material import smollm2, tiny_model
from llm_stand_ins import groups_of_guards, processes_in

from data_prep.llm import environment, object_answers
from data_prep.llm.client import Answer, Request, RunnerConfig, ask
from data_prep.llm.environment import Environment
from data_prep.llm.jsonl import read_answers
from data_prep.llm.processes import end_of, guarded
from data_prep.llm.texts import words
from setclip.errors import InputError

pytestmark = [pytest.mark.llm, pytest.mark.slow]
# Two processes share the tests, and each makes for itself what its tests need.
ANSWERS, KILLS = pytest.mark.xdist_group("answers"), pytest.mark.xdist_group("kills")

ROOT = Path(__file__).parents[1]
INSTRUCTION = "Please directly indicate the objects contained in the caption, separated by commas."
GUARD = "guard.py"
MAX_TOKENS = 16


@pytest.fixture(scope="session")
def place() -> Environment:
    """vLLM's environment."""
    try:
        return environment.ready(Path(os.environ.get(environment.VARIABLE) or ROOT / environment.DEFAULT))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(place, tmp_path_factory) -> Path:
    """A model of two layers."""
    return tiny_model(tmp_path_factory.getbasetemp() / "tiny", place.python)


@pytest.fixture(scope="session")
def smol(place, tmp_path_factory) -> Path:
    """A model that knows words."""
    return smollm2(tmp_path_factory.getbasetemp() / "smollm2", place.python)


def captions(count: int) -> list[str]:
    """Returns distinct captions, which differ at several places."""
    words = random.Random(0)
    things = ["dog", "cat", "tree", "house", "table", "boat", "car", "lamp", "horse", "cup", "bridge", "hat"]
    colours = ["red", "blue", "green", "grey", "white", "black", "brown"]
    places = ["on a hill", "in the rain", "under a roof", "at night", "by the sea", "in a street"]
    found: dict[str, None] = {}
    while len(found) < count:
        one, two = words.sample(things, 2)
        found[f"a {words.choice(colours)} {one} and {words.randrange(2, 99)} {two}s {words.choice(places)}"] = None
    return list(found)


def questions(texts: Sequence[str]) -> list[Request]:
    """Returns the prompt about each caption; ids have 16 hex digits."""
    return [
        Request(f"{number:016x}", ({"role": "user", "content": f"{INSTRUCTION} {text}"},))
        for number, text in enumerate(texts)
    ]


ODD = [
    Request("too-long", ({"role": "user", "content": "word and number " * 1000},)),
    Request("too-long-with-its-answer", ({"role": "user", "content": "€" * 340},)),
    Request("empty", ({"role": "user", "content": ""},)),
]
"""Longer than the model takes; its prompt alone is not; no words at all."""


def config_of(model: Path, place: Environment, **settings: Any) -> RunnerConfig:
    defaults: dict[str, Any] = {
        "model": str(model),
        "environment": place.folder,
        "dtype": "float32",
        "max_tokens": MAX_TOKENS,
        "max_model_len": 1024,
    }
    return RunnerConfig(**{**defaults, **settings})


def http(server: "ServedModel", place: Environment, **settings: Any) -> RunnerConfig:
    return config_of(server.model, place, runner="http", url=f"http://127.0.0.1:{server.port}/v1", **settings)


def ids_in(folder: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in (folder / "answers.jsonl").read_bytes().splitlines()]


def same(answers: dict[str, Answer]) -> dict[str, Any]:
    """Returns what must agree between runners: all but the words of an error."""
    return {
        key: None if a.error else (a.text, a.finish_reason, a.prompt_tokens, a.completion_tokens)
        for key, a in answers.items()
    }


class ServedModel:
    """`vllm serve` of a model on a free port; `kill` and `start` as often as wanted."""

    def __init__(self, model: Path, place: Environment, log: Path):
        self.model, self._place, self._log = model, place, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._stack = ExitStack()
        self._process: Any = None

    def start(self) -> None:
        """Starts it, without waiting."""
        flags = {"--port": self.port, "--host": "127.0.0.1", "--dtype": "float32", "--max-model-len": 1024}
        flags["--generation-config"] = "vllm"
        command = [
            str(self._place.python),
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(self.model),
            "--enforce-eager",
        ]
        command += [str(word) for flag in flags.items() for word in flag]
        log = self._stack.enter_context(self._log.open("ab"))
        self._process = self._stack.enter_context(
            guarded(command, environment.variables(self._place, str(self.model)), log, output=log)
        )

    def kill(self) -> None:
        """Kills server and engine."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float = 120.0) -> None:
        """Waits until it answers."""
        ends = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, end_of(self._log)
                assert time.monotonic() < ends, end_of(self._log)
                time.sleep(0.2)

    def close(self) -> None:
        """Ends it for good."""
        self._stack.close()


@pytest.fixture(scope="module")
def served(place, tiny, tmp_path_factory) -> Iterator[ServedModel]:
    """The tiny model behind a server, which starts while other tests run."""
    server = ServedModel(tiny, place, tmp_path_factory.mktemp("served") / "server.log")
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(place, tiny, tmp_path_factory) -> dict[str, Answer]:
    """What the offline runner says to 400 captions and the odd ones."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return ask([*questions(captions(400)), *ODD], folder, config_of(tiny, place), description="offline")


CALLER = """
import json, sys
from pathlib import Path
from data_prep.llm.client import Request, RunnerConfig, ask
config = json.loads(sys.argv[2])
config["environment"] = Path(config["environment"])
requests = [Request(i, tuple(m)) for i, m in json.load(open(sys.argv[3]))]
ask(requests, Path(sys.argv[1]), RunnerConfig(**config), description="kills")
"""


class Run:
    """A call of `ask` in a process of its own, which can be watched and killed, and all that it starts."""

    def __init__(self, folder: Path, config: dict[str, Any], asked: Sequence[Request], mark: str):
        self.folder, self.mark = folder, mark
        self._answers, self._log = folder / "answers.jsonl", folder / "engine.log"
        listed = folder.with_name(f"{folder.name}-asked.json")
        listed.write_text(json.dumps([[r.custom_id, r.messages] for r in asked]))
        self._log_before = self._size(self._log)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALLER, str(folder), json.dumps(config), str(listed)],
            cwd=ROOT,
            env={**os.environ, "SETCLIP_TEST_MARK": mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _size(self, path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    def until(self, holds: Callable[[], bool], seconds: float = 120.0, pause: float = 0.01) -> None:
        """Waits until something holds; an end of the call before that is a failure."""
        ends = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, f"it ended: {self.process.stderr.read()}"  # type: ignore[union-attr]
            assert time.monotonic() < ends, end_of(self._log)
            if pause:
                time.sleep(pause)

    def until_loading(self) -> None:
        """Waits until the engine prints, long before it is ready."""
        self.until(lambda: self._size(self._log) > self._log_before)

    def until_writing(self) -> None:
        """Waits, without a rest, until answers are being written."""
        before = self._size(self._answers)
        self.until(lambda: self._size(self._answers) > before, pause=0)

    def until_answers(self, count: int) -> None:
        """Waits until so many answers more are there."""
        before = self.lines()
        self.until(lambda: self.lines() >= before + count)

    def lines(self) -> int:
        """Returns the answers so far."""
        return self._answers.read_bytes().count(b"\n") if self._answers.exists() else 0

    def named(self, name: str) -> list[int]:
        """Returns the processes of what it started that have this name."""
        found = processes_in(self._groups()).items()
        return sorted(number for number, line in found if name in line and GUARD not in line)

    def kill(self, name: str) -> None:
        """Kills the processes of this name."""
        victims = self.named(name)
        assert victims, f"no {name} among {processes_in(self._groups())}"
        for number in victims:
            os.kill(number, signal.SIGKILL)

    def kill_caller(self) -> None:
        """Kills the call itself; nothing that it started stays."""
        groups = self._groups()
        self.process.kill()
        self.process.communicate()
        ends = time.monotonic() + 10
        while left := processes_in(groups):
            assert time.monotonic() < ends, f"processes outlive their caller: {left}"
            time.sleep(0.02)

    def _groups(self) -> set[int]:
        return groups_of_guards(self.mark)

    def finish(self, seconds: float = 300.0) -> str:
        """Waits for the end; returns what it said on standard error."""
        said = self.process.communicate(timeout=seconds)[1]
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    """Starts calls of `ask` in processes of their own: start(folder, config, requests)."""
    runs: list[Run] = []

    def begin(folder: Path, config: dict[str, Any], asked: Sequence[Request]) -> Run:
        runs.append(Run(folder, config, asked, f"{tmp_path}-{len(runs)}"))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.kill_caller()


# --- the same answers from everywhere


@ANSWERS
@pytest.mark.usefixtures("served")  # starts while this and the next run
def test_each_answer_is_its_caption_s_own(place, tiny, undisturbed):
    asked = questions(captions(400))
    answers = [undisturbed[r.custom_id] for r in asked]
    assert all(a.error is None for a in answers)
    assert len({a.text for a in answers}) >= 390
    reasons = Counter(a.finish_reason for a in answers)
    assert set(reasons) == {"stop", "length"}
    assert all((a.completion_tokens == MAX_TOKENS) >= (a.finish_reason == "length") for a in answers)
    # transformers, which shares no engine with vLLM, says the same
    chosen = asked[::10]
    done = subprocess.run(
        [place.python, "-c", TRANSFORMERS, str(tiny), str(MAX_TOKENS)],
        input=json.dumps([r.messages for r in chosen]),
        capture_output=True,
        text=True,
        env=environment.variables(place, str(tiny)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Half a character at the end of a cut answer: vLLM leaves it out, transformers writes U+FFFD.
    expected = [text.rstrip("\ufffd") for text in json.loads(done.stdout.splitlines()[-1])]
    assert [undisturbed[r.custom_id].text.rstrip("\ufffd") for r in chosen] == expected


TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
texts = []
for messages in json.load(sys.stdin):
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=int(sys.argv[2]))
    ends = model.generation_config.eos_token_id
    said = [token for token in made[0, ids.shape[1]:].tolist() if token not in ends]
    texts.append(tokenizer.decode(said, skip_special_tokens=True))
print(json.dumps(texts))
"""


@ANSWERS
def test_requests_too_long_for_the_model_are_errors_of_their_own(undisturbed):
    assert "that is more than the model's 1024" in (undisturbed["too-long"].error or "")
    assert "that is more than the model's 1024" in (undisturbed["too-long-with-its-answer"].error or "")
    assert undisturbed["empty"].error is None


@ANSWERS
def test_run_batch_gives_the_same_answers(place, tiny, undisturbed, tmp_path):
    config = config_of(tiny, place, runner="run-batch")
    answers = ask([*questions(captions(400)), *ODD], tmp_path, config, description="run-batch")
    assert same(answers) == same(undisturbed)
    assert Counter(ids_in(tmp_path)) == Counter(list(answers))


@ANSWERS
def test_a_server_gives_the_same_answers(place, served, undisturbed, tmp_path):
    served.wait()
    answers = ask([*questions(captions(400)), *ODD], tmp_path, http(served, place), description="http")
    assert same(answers) == same(undisturbed)
    assert Counter(ids_in(tmp_path)) == Counter(list(answers))


@ANSWERS
def test_two_parts_together_are_one(place, tiny, undisturbed, start, tmp_path):
    asked = questions(captions(400))
    config = {"model": str(tiny), "dtype": "float32", "max_tokens": MAX_TOKENS, "max_model_len": 1024}
    config["environment"] = str(place.folder)
    parts = [[r for r in asked if int(r.custom_id, 16) % 2 == part] for part in range(2)]
    runs = [start(tmp_path / str(part), config, own) for part, own in enumerate(parts)]  # as the tasks of an array
    for run in runs:
        run.finish()
    merged = {a.custom_id: a for run in runs for a in read_answers(run.folder / "answers.jsonl")}
    assert [sorted(ids_in(run.folder)) for run in runs] == [[r.custom_id for r in own] for own in parts]
    assert same(merged) == same({r.custom_id: undisturbed[r.custom_id] for r in asked})


# --- kills


def torn(folder: Path) -> bool:
    """Whether the last line of the answers is torn."""
    return not (folder / "answers.jsonl").read_bytes().endswith(b"\n")


@KILLS
def test_3000_requests_survive_kills_of_caller_worker_engine_and_server(
    place, tiny, served, undisturbed, start, tmp_path, monkeypatch
):
    moments = random.Random(11)
    asked = questions(captions(3000))
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"model": str(tiny), "dtype": "float32", "max_tokens": MAX_TOKENS, "max_model_len": 1024}
    config |= {"environment": str(place.folder), "chunk": 300}

    # The caller, while the engine loads.
    run = start(folder, config, asked)
    run.until_loading()
    time.sleep(moments.uniform(0, 2))
    run.kill_caller()

    # The worker, while it writes, which tears the file; the same call starts another one. Then the caller while it generates.
    run = start(folder, config, asked)
    run.until_writing()
    run.kill("worker.py")
    run.until_answers(1500)
    time.sleep(moments.uniform(0, 0.3))
    run.kill_caller()
    with open(folder / "answers.jsonl", "ab") as file:  # in case that no kill tore a line
        file.write(b"" if torn(folder) else b'{"id":"setclip-00')

    # An engine in a process of its own, while it generates; the same call starts another one.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    run = start(folder, config, asked)
    run.until_answers(200)
    time.sleep(moments.uniform(0, 0.3))
    workers = run.named("worker.py")
    run.kill("EngineCore")
    run.until(lambda: run.named("worker.py") not in (workers, []))
    run.kill_caller()
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    assert 1800 <= run.lines() < 2950

    # The rest from a server, which is killed in the middle and started again.
    served.wait()
    url = f"http://127.0.0.1:{served.port}/v1"
    over_http = {**config, "runner": "http", "url": url, "patience": 200.0, "concurrency": 32}
    run = start(folder, over_http, asked)
    run.until_answers(moments.randrange(30, 200))
    served.kill()
    served.start()
    said = run.finish()
    assert "error" not in said

    assert Counter(ids_in(folder)) == Counter(r.custom_id for r in asked)
    answers = ask(asked, folder, http(served, place), description="all there")
    assert all(a.error is None for a in answers.values())
    texts = {r.messages[0]["content"]: undisturbed[r.custom_id].text for r in questions(captions(400))}
    assert [answers[r.custom_id].text for r in asked[:400]] == [texts[r.messages[0]["content"]] for r in asked[:400]]


@KILLS
@pytest.mark.soak
def test_soak_12000_requests_survive_thirty_kills_of_the_caller(place, tiny, start, tmp_path):
    moments = random.Random(int(os.environ.get("SETCLIP_SOAK_SEED", "1")))
    asked = questions(captions(12000))
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"model": str(tiny), "dtype": "float32", "max_tokens": MAX_TOKENS, "max_model_len": 1024}
    config |= {"environment": str(place.folder), "chunk": 150}
    tears = 0
    for _ in range(int(os.environ.get("SETCLIP_SOAK_KILLS", "30"))):
        run = start(folder, config, asked)
        moment = moments.choice(["loading", "generating", "writing"])
        if moment == "loading":
            run.until_loading()
            time.sleep(moments.uniform(0, 8))
        else:
            run.until_answers(150)
            time.sleep(moments.uniform(0, 1.0)) if moment == "generating" else run.until_writing()
        run.kill_caller()
        tears += (folder / "answers.jsonl").exists() and torn(folder)
    start(folder, config, asked).finish(1800)
    assert Counter(ids_in(folder)) == Counter(r.custom_id for r in asked)
    print(f"{tears} torn lines")


# --- a model that knows words


@ANSWERS
def test_smollm2_answers_real_captions_and_what_is_bad_is_caught(place, smol, tmp_path, capsys):
    texts = real_captions(30)
    config = config_of(smol, place, max_tokens=48)
    answers = ask(questions(texts), tmp_path, config, description="SmolLM2")
    assert Counter(ids_in(tmp_path)) == Counter(r.custom_id for r in questions(texts))
    said = [a.text.lower() for a in answers.values()]
    # The weights were read right: most answers speak of their caption.
    named = [
        any(len(word) > 4 and word in answer for word in words(text)) for text, answer in zip(texts, said, strict=True)
    ]
    assert sum(named) >= 20
    reasons = Counter(object_answers.check(t, a).reason for t, a in zip(texts, answers.values(), strict=True))
    with capsys.disabled():
        print(f"\nSmolLM2: {dict(reasons)}")
    assert sum(count for reason, count in reasons.items() if reason) >= 5


def real_captions(count: int) -> list[str]:
    """Returns captions that people wrote."""
    data = os.environ.get("SETCLIP_REAL_DATA")
    if not data:
        pytest.skip("SETCLIP_REAL_DATA is not set")
    with gzip.open(Path(data) / "captions" / "coco_val2017.tsv.gz", "rt", encoding="utf-8") as file:
        texts = [line.rstrip("\n").split("\t")[1] for line in file]
    return texts[:: len(texts) // count][:count]
