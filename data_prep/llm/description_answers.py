"""Checks what a language model says of the appearance of a class, and sets right what a rule can. Used by data_prep.describe."""

import re

from data_prep.llm.jsonl import Answer
from data_prep.llm.prompts import DESCRIPTION_SECOND
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
    without_markdown,
    words,
)

RULES_VERSION = 1  # raise it when the same answer would give another description

EXAMPLE = "speaks of an example"
OFF_TOPIC = "neither names the class nor says how it looks"
SHORT = "fewer than four words"
LONG = "a hundred and fifty words or more"
FINISH = "ended otherwise than by itself"

UNNAMED = "does not name the class"
NO_LOOKS = "no word of appearance"
CUT = "cut at the last full sentence"

_FEWEST_WORDS = 4
_MOST_WORDS = 150
_LEAD_IN = re.compile(
    r"^\s*(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^:.!\n]{0,60}?[!,.:]\s*)?"
    r"(?:(?:here(?:['’]s| is| are)|this is|below is)\b[^.\n]{0,90}?:\s*)?(?:(?:description|appearance|answer)\s*:\s*)?",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\s*(?:let me know|would you like|is there anything|do you want|i hope|feel free|if you (?:have|need|want|would like))\b"
    r"[^\n]*$",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"^\s*(?:[-–—*•·+]|\(?\d{1,2}[.):])\s+", re.MULTILINE)
_SENTENCE = re.compile(r"[.!?][\"”’')]?(?=\s|$)")
_ECHO = re.compile(r"introduce the appearance of|in ordinary language", re.IGNORECASE)
_LOOKS = frozenset(
    words("""
    appearance appear appears look looks looking shape shaped size sized colour color coloured colored colours colors
    colorful colourful red orange yellow green blue purple violet pink brown black white grey gray golden gold silver silvery
    cream beige tan dark pale bright light transparent clear shiny glossy matte dull spotted striped patterned mottled round
    oval square rectangular circular cylindrical triangular flat curved straight pointed sharp blunt hollow long short tall
    small large big tiny huge wide narrow thick thin slender slim heavy broad deep high low smooth rough soft hard fluffy
    furry hairy feathered scaly wrinkled textured texture surface pattern design metal metallic wooden wood plastic glass
    leather fabric cloth stone brick paper rubber ceramic porcelain steel iron brass cotton wool silk leaf leaves petal petals
    stem branches fur feathers skin hair wings wing tail beak legs leg arms arm head face eyes eye ears ear nose mouth teeth
    horn horns handle lid base top bottom side sides edge edges corner corners wheel wheels windows window roof walls wall
    door doors body made built wears wearing dressed clothes uniform hat resembles like
    """)
)


def check(name: str, answer: Answer) -> Checked[str]:
    """Returns the description, or why the answer is bad."""
    if answer.error is not None:
        return Checked(None, ERROR)
    if not answer.text.strip():
        return Checked(None, EMPTY)
    if has_loop(words(answer.text)):
        return Checked(None, LOOP)
    if answer.finish_reason not in ("stop", "length"):
        return Checked(None, FINISH)
    if is_refusal(answer.text):
        return Checked(None, REFUSAL)
    if _ECHO.search(answer.text):
        return Checked(None, PROMPT_ECHO)
    text, repairs = repaired(answer.text)
    flags: list[str] = []
    if answer.finish_reason == "length":
        ends = [match.end() for match in _SENTENCE.finditer(text)]
        if not ends:
            return Checked(None, LENGTH)
        text = text[: ends[-1]]
        flags.append(CUT)
    said = words(text)
    if not said:
        return Checked(None, EMPTY)
    if len(said) < _FEWEST_WORDS:
        return Checked(None, SHORT)
    if len(said) >= _MOST_WORDS:
        return Checked(None, LONG)
    if any(example in said and example not in words(name) for example, _ in DESCRIPTION_SECOND.examples):
        return Checked(None, EXAMPLE)
    is_named, has_looks = names(said, name), not _LOOKS.isdisjoint(said)
    if not is_named and not has_looks:
        return Checked(None, OFF_TOPIC)
    flags += [UNNAMED] * (not is_named) + [NO_LOOKS] * (not has_looks)
    return Checked(text, repairs=tuple(repairs), flags=tuple(flags))


def repaired(text: str) -> tuple[str, list[str]]:
    """Returns the answer as one paragraph, and what was done to it."""
    repairs: list[str] = []

    def apply(name: str, changed: str) -> None:
        nonlocal text
        if changed != text:
            repairs.append(name)
            text = changed

    text = text.strip()
    apply("markdown", without_markdown(text).strip())
    apply("lead-in", _LEAD_IN.sub("", text, count=1).strip())
    apply("list", _as_sentences(text))
    apply("closing words", _CLOSING.sub("", text).strip())
    if len(text) > 1 and text[0] in '"“' and text[-1] in '"”' and not {'"', "“"} & set(text[1:-1]):
        apply("quotes", text[1:-1].strip())
    text = " ".join(text.split())
    return text, repairs


def _as_sentences(text: str) -> str:
    """Returns the text with the entries of a list as parts of one sentence."""
    if not _LIST_MARK.search(text):
        return text
    entries = [_LIST_MARK.sub("", line).strip() for line in text.splitlines() if line.strip()]
    return " ".join(entry if entry[-1:] in ".!?:;," else f"{entry};" for entry in entries).rstrip(";")


def names(said: list[str], name: str) -> bool:
    """Whether one of the words of the name, in the singular or plural, is said; of a compound its last word counts."""
    parts = words(name)
    if not parts:
        return True
    head = parts[-1]
    stem = head[:-1] if head.endswith(("y", "f", "e")) and len(head) > 3 else head
    return any(word == head or (word.startswith(stem) and len(word) <= len(head) + 3) for word in said) or (
        "".join(parts) in said
    )
