"""What can be wrong with any answer of a language model: loops, refusals, markup. Used by the checks of answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

ERROR = "error of the server"
EMPTY = "empty"
LENGTH = "cut off at the limit of tokens"
FINISH = "ended otherwise than by itself"
LOOP = "loop"
REFUSAL = "refusal"
PROMPT_ECHO = "echo of the question"


@dataclass(frozen=True)
class Checked(Generic[T]):
    """An answer after its check."""

    value: T | None
    """None where the answer is bad."""
    reason: str = ""
    """Why it is bad; short and free of values, because equal reasons are counted together."""
    repairs: tuple[str, ...] = ()
    """What was set right by rule."""
    flags: tuple[str, ...] = ()
    """What is odd about a good answer."""


_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_REFUSAL = re.compile(
    r"""^sorry\b
      | \bi['’]?\s?a?m\ (?:very\ |so\ )?sorry
      | \bi\ (?:apologi[sz]e|cannot|can['’]?t|can\ not|could\ not|couldn['’]t|do\ not|don['’]t)\ (?:
            have\ (?:any\ |enough\ )?(?:access|information|context|a\ caption)
          | see|view|access|provide|assist|help|fulfil|identify|process|know|directly)
      | \b(?:i\ am|i['’]m)\ (?:\w+\ )?(?:unable|not\ able|just\ an\ ai)\b
      | ^unable\ to\b
      | (?<!\bsuch\ )(?<!\bknown\ )\bas\ an?\ (?:(?:large\ )?language\ model|text-?\w*\ (?:ai|assistant|model)
          | artificial\ intelligence|ai)\b
      | \b(?:no|any)\ (?:image|caption|picture)\ (?:(?:was|is|has\ been)\ )?(?:provided|given|attached)
      | \bplease\ (?:provide|share|upload|give)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_SPECIAL_TOKEN = re.compile(r"<\|(?:im_start|start_header_id)\|>\s*(?:assistant|user|system)|<\|[^|<>]*\|>|</?s>")
_LONGEST_LOOP = 12  # words of what is said again and again
_MOST_REPEATS = 4


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def is_refusal(text: str) -> bool:
    """Whether the model says that it cannot or will not answer."""
    return _REFUSAL.search(text) is not None


def has_loop(said: Sequence[str]) -> bool:
    """Whether a run of words is said four times on end, or a long text says most of its runs of four words again."""
    for length in range(1, _LONGEST_LOOP + 1):
        same = 0
        for place in range(length, len(said)):
            same = same + 1 if said[place] == said[place - length] else 0
            if same >= (_MOST_REPEATS - 1) * length and same + length >= 6:
                return True
    if len(said) < 24:
        return False
    runs = [tuple(said[place : place + 4]) for place in range(len(said) - 3)]
    return len(set(runs)) < 0.6 * len(runs)


def longest_common_run(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns the length of the longest run of words that both have."""
    best, before = 0, [0] * (len(other) + 1)
    for word in one:
        now = [0] * (len(other) + 1)
        for place, against in enumerate(other, start=1):
            if word == against:
                now[place] = before[place - 1] + 1
                best = max(best, now[place])
        before = now
    return best


def without_special_tokens(text: str) -> str:
    """Returns the text without the tokens of a chat template that came through, such as "<|im_end|>"."""
    return _SPECIAL_TOKEN.sub("", text).strip()


def without_markdown(text: str) -> str:
    """Returns the text without fences, headings, emphasis and code marks; bullets and numbers stay."""
    text = re.sub(r"^\s*```\w*\s*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s{0,3}#{1,6}\s+", "", text, flags=re.MULTILINE)
    text = re.sub(r"(\*\*|__|`)(.*?)\1", r"\2", text, flags=re.DOTALL)
    return re.sub(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", text)
