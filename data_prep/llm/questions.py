"""Asks a language model about many texts: once, and again with examples where the answer is bad.

Used by `data_prep.parse_llm` and `data_prep.describe`. Both are shared by the tasks of an array: each asks the texts whose
request ids are its own, in a folder of its own, and no task needs another. Raw requests and answers stay in `first` and
`second` of that folder, so that checking again asks nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from data_prep.llm.account import Account, Outcome
from data_prep.llm.client import ask
from data_prep.llm.config import RunnerConfig
from data_prep.llm.jsonl import Answer, Request
from data_prep.llm.prompts import Question, cut, request_id
from data_prep.llm.texts import Checked

T = TypeVar("T")

FIRST, SECOND = "first", "second"

_CHECKED_AT_ONCE = 8_192

Check = Callable[[Sequence[tuple[str, Answer]]], list[Checked[T]]]
"""From (text, its answer) to the checked answers."""


def ask_twice(
    texts: Mapping[str, str],
    questions: tuple[Question, Question],
    folder: Path,
    config: RunnerConfig,
    check: Check[T],
    description: str,
) -> tuple[dict[str, Outcome[T]], Account]:
    """Asks about `texts` (id to text) and returns (id to what was found out, the account).

    Killed at any moment, the same call goes on; where all answers are there it starts no engine.
    """
    folder.mkdir(parents=True, exist_ok=True)  # for the results, also of a part without a text
    account = Account(asked=len(texts))
    first = _ask(texts, questions[0], folder / FIRST, config, check, account, description)
    outcomes: dict[str, Outcome[T]] = {}
    again: dict[str, str] = {}
    for identity, checked in first.items():
        if checked.value is None:
            again[identity] = texts[identity]
            account.first_bad[checked.reason] += 1
        else:
            outcomes[identity] = Outcome(checked.value, 1, (), checked.flags)
            _count(account, checked)
    reasons = {identity: first[identity].reason for identity in again}
    del first
    second = _ask(again, questions[1], folder / SECOND, config, check, account, f"{description}, with examples")
    for identity, checked in second.items():
        if checked.value is None:
            account.second_bad[checked.reason] += 1
            outcomes[identity] = Outcome(None, 0, (reasons[identity], checked.reason), ())
        else:
            outcomes[identity] = Outcome(checked.value, 2, (reasons[identity],), checked.flags)
            _count(account, checked)
    return outcomes, account


def runner_of(config: RunnerConfig) -> RunnerConfig:
    """Returns the settings of the runner alone, of a command's config that has more."""
    return RunnerConfig(**{entry.name: getattr(config, entry.name) for entry in fields(RunnerConfig)})


def _ask(
    texts: Mapping[str, str],
    question: Question,
    folder: Path,
    config: RunnerConfig,
    check: Check[T],
    account: Account,
    description: str,
) -> dict[str, Checked[T]]:
    """Returns id to checked answer. Texts that are equal once cut are asked once."""
    if not texts:
        return {}
    room = question.room(config.max_model_len, config.max_tokens)
    asked = {identity: request_id(question, cut(text, room)) for identity, text in texts.items()}
    distinct = {asked[identity]: cut(text, room) for identity, text in texts.items()}
    requests = [Request(custom_id=each, messages=question.messages(text)) for each, text in distinct.items()]
    answers = ask(requests, folder, config, description=description)
    del requests
    account.prompt_tokens += sum(answers[each].prompt_tokens for each in distinct)
    account.completion_tokens += sum(answers[each].completion_tokens for each in distinct)
    checked: dict[str, Checked[T]] = {}
    for block in _blocks(list(texts), _CHECKED_AT_ONCE):
        good = check([(texts[identity], answers[asked[identity]]) for identity in block])
        checked.update(zip(block, good, strict=True))
    return checked


def _count(account: Account, checked: Checked[Any]) -> None:
    account.repaired.update(checked.repairs)
    account.flags.update(checked.flags)


def _blocks(items: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
