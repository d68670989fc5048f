"""Checks a language model's list of the objects of a caption, and sets right what a rule can. Used by data_prep.parse_llm.

What comes out are names as the model wrote them; `data_prep.llm.names` normalises them. Refuses rather than guesses: a bad
answer is asked for again.
"""

import re
from collections.abc import Sequence

from data_prep.llm.jsonl import Answer
from data_prep.llm.prompts import OBJECTS
from data_prep.llm.texts import (
    EMPTY,
    ERROR,
    LENGTH,
    LOOP,
    PROMPT_ECHO,
    REFUSAL,
    Checked,
    has_loop,
    is_refusal,
    longest_common_run,
    without_markdown,
    words,
)

RULES_VERSION = 1  # raise it when the same answer would give other names

ECHO = "echo of the caption"
SENTENCE = "sentences instead of a list"
TOO_MANY = "more objects than the caption has words"
NO_OBJECT = "no object left after normalising"
FINISH = "ended otherwise than by itself"

_MOST_WORDS = 6  # of one object; more are a sentence
_ECHO_WORDS = 5  # of the caption on end in one object
_PROMPT_WORDS = 6
_SPARE_OBJECTS = 3  # more than the caption has words: a compound may be named with its parts

_NUMBERING = re.compile(r"(?:^|(?<=[\s,;]))\(?\d{1,2}\s?[.):]\s*(?=[^\W\d])")
_BULLET = re.compile(r"(?:^|(?<=\n))\s*[-–—*•·▪◦+]\s+")
_LEAD_IN = re.compile(
    r"""^\s*
    (?:(?:sure|certainly|of\ course|okay|ok|yes)\b[^:\n]{0,40}?[!,.:]\s*)?  # Sure!
    (?:(?:here\ (?:are|is)|the|all|main|visible|key|following|list\ of|some\ of|these|in\ (?:the|this)\ \w+,?)\b\s*)*
    (?:
        (?:objects?|items?|things|elements|answer|output|list|response)\b[^:,;\n]{0,70}?  # The objects in the caption are:
        (?::|\b(?:are|is|includes?|would\ be)\b:?)
      | (?:image|picture|photo|caption|scene)\b[^:,;\n]{0,30}?\b(?:shows?|contains?|includes?|depicts?|features?)\b:?
      | (?<=[!,.:])[^:,;\n]{0,60}:
    )\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_OKAY = re.compile(r"^\s*(?:sure|certainly|of course|okay|ok)\b[!,.:]\s*", re.IGNORECASE)
_NOTHING = frozenset(("none", "n a", "no objects", "no object", "nothing", "there are no objects", "unknown", "null"))
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z\"“])|[.!?]\s*\n")
_EXPLANATION = re.compile(r"(?:\s*:\s|\s+[-–—]\s)[^\n]*$", re.MULTILINE)
_BRACKETS = re.compile(r"\s*[(\[][^()\[\]]*[)\]]")
_QUOTES = "\"'“”‘’"


def check(caption: str, answer: Answer) -> Checked[list[str]]:
    """Returns the names of an answer, or why it is bad."""
    if answer.error is not None:
        return Checked(None, ERROR)
    text = answer.text.strip()
    if not text:
        return Checked(None, EMPTY)
    said, told = words(text), words(caption)
    if has_loop(said):
        return Checked(None, LOOP)
    if answer.finish_reason == "length":
        return Checked(None, LENGTH)
    if answer.finish_reason != "stop":
        return Checked(None, FINISH)
    if is_refusal(text):
        return Checked(None, REFUSAL)
    if longest_common_run(said, words(OBJECTS)) >= _PROMPT_WORDS:
        return Checked(None, PROMPT_ECHO)
    if _is_echo(text, caption):
        return Checked(None, ECHO)
    text, repairs = repaired(text)
    names = _split(text)
    if not names or " ".join(words(text)) in _NOTHING:
        return Checked(None, EMPTY)
    if any(_is_from(words(name), told) for name in names):
        return Checked(None, ECHO)
    if _SENTENCE_END.search(text) or any(len(words(name)) > _MOST_WORDS or ": " in name for name in names):
        return Checked(None, SENTENCE)
    by_words: dict[str, str] = {}
    for name in names:
        by_words.setdefault(" ".join(words(name)), name)
    distinct = list(by_words.values())
    if len(distinct) > len(told) + _SPARE_OBJECTS:
        return Checked(None, TOO_MANY)
    if len(distinct) < len(names):
        repairs.append("duplicates")
    return Checked(distinct, repairs=tuple(repairs))


def repaired(text: str) -> tuple[str, list[str]]:
    """Returns the answer as names separated by commas, and what was done to it."""
    repairs: list[str] = []

    def apply(name: str, changed: str) -> None:
        nonlocal text
        if changed != text:
            repairs.append(name)
            text = changed

    text = text.strip()
    apply("markdown", without_markdown(text).strip())
    apply("lead-in", _OKAY.sub("", _LEAD_IN.sub("", text, count=1), count=1).strip())
    apply("numbering", _NUMBERING.sub("\n", text).strip())
    apply("bullets", _BULLET.sub("\n", text).strip())
    if "numbering" in repairs or "bullets" in repairs:
        apply("explanations", _EXPLANATION.sub("", text))
    apply("brackets", _BRACKETS.sub("", text))
    apply("quotes", _without_quotes(text))
    apply("one a line", re.sub(r"\s*,?\s*\n\s*", ", ", text))
    apply("semicolons", text.replace(";", ","))
    apply("full stop", text.rstrip(" .!").strip())
    apply("and", re.sub(r",\s*(?:and|&)\s+", ", ", text) if "," in text else text)
    if "," in text:
        head, _, last = text.rpartition(",")
        apply("and", ",".join([head, re.sub(r"^(.{1,40}?) (?:and|&) ", r"\1, ", last)]))
    return text, list(dict.fromkeys(repairs))


def _split(text: str) -> list[str]:
    names = (name.strip(f" \t.{_QUOTES}") for name in text.split(","))
    return [name for name in names if words(name)]


def _without_quotes(text: str) -> str:
    return ",".join(_unquoted(name) for name in text.split(","))


def _unquoted(name: str) -> str:
    bare = name.strip()
    if len(bare) > 1 and bare[0] in _QUOTES and bare.rstrip(".")[-1] in _QUOTES:
        return name.replace(bare, bare.strip(f"{_QUOTES}."))
    return name


def _is_echo(text: str, caption: str) -> bool:
    """Whether the answer is the caption. A caption that is a list of names itself ("cat, sofa") is its own right answer."""
    told = words(caption)
    if len(told) < 3 or words(text) != told:
        return False
    return any(len(words(name)) > 2 for name in caption.split(","))


def _is_from(name: Sequence[str], told: Sequence[str]) -> bool:
    """Whether one name is a long piece of the caption, word by word."""
    return len(name) >= _ECHO_WORDS and longest_common_run(name, told) >= _ECHO_WORDS
