"""Checks a language model's list of the objects of a caption, and sets right what a rule can. Used by data_prep.parse_llm.

What comes out are names as the model wrote them; `data_prep.llm.names` normalises them. Refuses rather than guesses: a bad
answer is asked for again.
"""

import json
import re
from collections.abc import Sequence

from data_prep.llm.jsonl import Answer
from data_prep.llm.prompts import OBJECTS
from data_prep.llm.texts import (
    EMPTY,
    ERROR,
    FINISH,
    LENGTH,
    LOOP,
    PROMPT_ECHO,
    REFUSAL,
    Checked,
    has_loop,
    is_refusal,
    longest_common_run,
    without_markdown,
    without_special_tokens,
    words,
)

RULES_VERSION = 3  # raise it when the same answer would give other names

ECHO = "echo of the caption"
SENTENCE = "sentences instead of a list"
TOO_MANY = "more objects than the caption has words"
NO_OBJECT = "no object left after normalising"

_MOST_WORDS = 6  # of one object; more are a sentence
_ECHO_WORDS = 5  # of the caption on end in one object
_PROMPT_WORDS = 6
_LISTED_WORDS = 3  # of each name in a list that has all words of its caption
_SPARE_OBJECTS = 3  # more than the caption has words: a compound may be named with its parts

_NUMBERING = re.compile(r"(?:^|(?<=[\s,;]))\(?(?i:(?:object|item)\s)?\d{1,2}\s?[.):]\s*(?=[^\W\d])")
_BULLET = re.compile(r"(?:^|(?<=\n))\s*[-–—*•·▪◦+]\s+")
_LEAD_IN = re.compile(
    r"""^\s*
    (?:(?:sure|certainly|of\ course|okay|ok|yes)\b[^:\n]{0,40}?[!,.:]\s*)?  # Sure!
    (?:(?:based\ on|according\ to|from|in)\ (?:the|this)\ (?:(?:given|provided)\ )?\w+,?\s+)?  # In the image,
    (?:(?:here(?:\ (?:are|is)|['’]s)|the|all|main|visible|key|following|list\ of|some\ of|these)\b\s*)*
    (?:
        (?:objects?|items?|things|elements|answer|output|list|response|following)\b  # The objects in the caption are:
        (?:\s*\n|[^:,;\n]{0,70}?(?::|\b(?:are|is|includes?|would\ be)\b(?:[^:,;\n]{0,60}:)?))
      | (?:image|picture|photo|caption|scene)\b[^:,;\n]{0,30}?  # The caption contains the following objects:
        \b(?:shows?|contains?|includes?|depicts?|features?|describes?|mentions?)\b(?:[^:,;\n]{0,60}:)?
      | there\ (?:is|are)\b | (?:we|you|i)\ (?:can\ )?see\b
      | (?<=[!,.:])[^:,;\n]{0,60}:
    )\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_OPENING = re.compile(
    r"""^\s*(?:sure|certainly|of\ course|okay|ok
    |(?:based\ on|according\ to|from|in)\ (?:the|this)\ (?:(?:given|provided)\ )?(?:image|picture|photo|caption|scene)
    )[!,.:]\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_NOTHING = re.compile(
    r"""(?:there\ (?:are|is)\ )?
    (?:n\ a|null|unknown|nothing|none|no(?:\ \w+){0,2}\ (?:objects?|items?|things?))
    (?:\ (?:are|is|were|mentioned|specified|described|contained|listed|found|present|visible|directly|explicitly|in|of|the
      |this|caption|image|it))*
    | (?:\w+\ ){0,3}(?:does\ not|doesn['’]t)\ (?:contain|mention|describe|have|include|name)\b.*""",
    re.VERBOSE,
)
_MORE = re.compile(
    r"""(?:\s*[,\n]\s*(?:(?:and|&)\s+)?|\s+(?:and|&)\s+|\s+(?=etc))
    (?:etc(?:etera)?|(?:many\ )?(?:more|others)|(?:many\ )?other\ (?:things|objects|items)|so\ (?:on|forth))[\s.…!]*$""",
    re.IGNORECASE | re.VERBOSE,
)
_STOP = r"(?<!\b[A-Z])(?<!\b(?:St|Mt|Mr|Ms|Dr|Ft|Jr|Sr))(?<!\bMrs)[.]"  # "St. Bernard" goes on
_SENTENCE_END = re.compile(rf"(?:{_STOP}|[!?])\s+(?=[A-Z\"“])|[.!?]\s*\n")
_LISTING_STOP = re.compile(rf"{_STOP}\s+")
_SEPARATOR = re.compile(r"\s*(?:[;|\t，、；،]|\s[•·]\s)\s*")
_TABLE_RULE = re.compile(r":?-+:?")
_EXPLANATION = re.compile(r"(?:\s*:\s|\s+[-–—]\s)[^\n]*$", re.MULTILINE)
_WHOLE_BRACKETS = re.compile(r"\[([^\[\]]*)\]\.?|\(([^()]*)\)\.?|\{([^{}]*)\}\.?")
_EACH_IN_BRACKETS = re.compile(r"\[[^\[\],]+\](?:(?:\s*,)?\s*(?:(?:and|&)\s+)?\[[^\[\],]+\])+\.?")  # [dog], [cat]
# Not those after a colon, which may hold the list.
_BRACKETS = re.compile(r"(?<![: ])(?<!:\n)[^\S\n]*[(\[][^()\[\]]*[)\]]")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_QUOTES = "\"'“”‘’"


def check(caption: str, answer: Answer) -> Checked[list[str]]:
    """Returns the names of an answer, or why it is bad."""
    if answer.error is not None:
        return Checked(None, ERROR)
    text = without_special_tokens(answer.text)
    said, told = words(text), words(caption)
    if not said or _NOTHING.fullmatch(" ".join(said)):
        return Checked(None, EMPTY)
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
    text, repairs = repaired(answer.text)
    names = [name for name in _split(text) if not _NOTHING.fullmatch(" ".join(words(name)))]
    if not names:
        return Checked(None, EMPTY)
    if any(_is_from(words(name), told) for name in names):
        return Checked(None, ECHO)
    if _SENTENCE_END.search(text) or any(len(words(name)) > _MOST_WORDS or ": " in f"{name} " for name in names):
        return Checked(None, SENTENCE)
    by_words: dict[str, str] = {}
    for name in names:
        by_words.setdefault(" ".join(words(name)), name)
    distinct = list(by_words.values())
    if len(distinct) > len(told) + len(_UNSPACED.findall(caption)) + _SPARE_OBJECTS:
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
    apply("special tokens", without_special_tokens(text))
    apply("markdown", without_markdown(text).strip())
    apply("table", _from_table(text))
    apply("lead-in", _OPENING.sub("", _LEAD_IN.sub("", text, count=1), count=1).strip())
    apply("json", _from_json(text))
    apply("numbering", _NUMBERING.sub("\n", text).strip())
    apply("bullets", _BULLET.sub("\n", text).strip())
    if "numbering" in repairs or "bullets" in repairs:
        apply("explanations", _EXPLANATION.sub("", text))
    if _EACH_IN_BRACKETS.fullmatch(text):
        apply("brackets", ", ".join(re.findall(r"\[([^\[\]]+)\]", text)))
    if whole := _WHOLE_BRACKETS.fullmatch(text):
        apply("brackets", whole[whole.lastindex or 0].strip())
    apply("brackets", _BRACKETS.sub("", text))
    apply("separators", _SEPARATOR.sub(", ", text).strip())
    apply("quotes", _without_quotes(text))
    apply("and more", _MORE.sub("", text))
    apply("one a line", re.sub(r"\s*,?\s*\n\s*", ", ", text))
    apply("full stop", text.rstrip(" .!。…").strip())
    apply("full stops", _from_full_stops(text))
    apply("and", re.sub(r",\s*(?:and|&)\s+", ", ", text) if "," in text else text)
    if "," in text:
        head, _, last = text.rpartition(",")
        apply("and", ",".join([head, re.sub(r"^(.{1,40}?) (?:and|&) ", r"\1, ", last)]))
    return text, list(dict.fromkeys(repairs))


def _from_table(text: str) -> str:
    """Returns the column of names of a markdown table that has a header; other texts as they are."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    rule = next((at for at, row in enumerate(rows) if all(map(_TABLE_RULE.fullmatch, row))), 0)
    if not rule:
        return text
    headers = [header.lower().rstrip("s") for header in rows[rule - 1]]
    column = next((at for at, header in enumerate(headers) if header in ("object", "item", "name")), 0)
    return ", ".join(row[column] for row in rows[rule + 1 :] if column < len(row))


def _from_json(text: str) -> str:
    """Returns the names of a JSON list, or of the one list in a JSON object; other texts as they are."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # a model in a loop opens a thousand brackets
        return text
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else None
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return ", ".join(found)
    return text


def _from_full_stops(text: str) -> str:
    """Returns "Dog. Frisbee" with commas; longer pieces between full stops are sentences and stay."""
    names = _LISTING_STOP.split(text)
    return text if "," in text or any(len(words(name)) > 2 for name in names) else ", ".join(names)


def _split(text: str) -> list[str]:
    names = (name.strip(f" \t.[]{{}}{_QUOTES}") for name in text.split(","))
    return [name for name in names if words(name)]


def _without_quotes(text: str) -> str:
    return ",".join(_unquoted(name) for name in text.split(","))


def _unquoted(name: str) -> str:
    bare = name.strip()
    if len(bare) > 1 and bare[0] in _QUOTES and bare.rstrip(".")[-1] in _QUOTES:
        return name.replace(bare, bare.strip(f"{_QUOTES}."))
    return name


def _is_echo(text: str, caption: str) -> bool:
    """Whether the answer is the caption. One that is a list ("cat, sofa"), or of which it made one, is a right answer."""
    told = words(caption)
    if len(told) < 3 or words(text) != told:
        return False
    names, before = (_split(_SEPARATOR.sub(",", each).replace("\n", ",")) for each in (text, caption))
    is_list = len(names) > 1 and all(len(words(name)) <= _LISTED_WORDS for name in names)
    return not is_list and len(names) <= len(before)


def _is_from(name: Sequence[str], told: Sequence[str]) -> bool:
    """Whether one name is a long piece of the caption, word by word."""
    return len(name) >= _ECHO_WORDS and longest_common_run(name, told) >= _ECHO_WORDS
