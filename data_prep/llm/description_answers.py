"""Checks what a language model says of the appearance of a class, and sets right what a rule can. Used by data_prep.describe."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from data_prep.llm.jsonl import Answer
from data_prep.llm.prompts import DESCRIPTION_SECOND, request_id
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

RULES_VERSION = 2  # raise it when the same answer would give another description

EXAMPLE = "speaks of an example"
OFF_TOPIC = "neither names the class nor says how it looks"
SHORT = "fewer than four words"
LONG = "a hundred and fifty words or more"

UNNAMED = "does not name the class"
NO_LOOKS = "no word of appearance"
CUT = "cut at the last full sentence"

_FEWEST_WORDS = 4
_MOST_WORDS = 150
_EXAMPLE_WORDS = 5  # of an example on end
_ARTICLES = ("a", "an", "the")
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
    text = without_special_tokens(answer.text)
    if not text:
        return Checked(None, EMPTY)
    if has_loop(words(text)):
        return Checked(None, LOOP)
    if answer.finish_reason not in ("stop", "length"):
        return Checked(None, FINISH)
    if is_refusal(text):
        return Checked(None, REFUSAL)
    if _ECHO.search(text):
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
    is_named, has_looks = names(said, name), not _LOOKS.isdisjoint(said)
    if answer.custom_id == request_id(DESCRIPTION_SECOND, name) and _is_of_example(said, name, is_named):
        return Checked(None, EXAMPLE)
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
    apply("special tokens", without_special_tokens(text))
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


def names(said: Sequence[str], name: str) -> bool:
    """Whether the name is said, in the singular or plural; of a compound its last word counts."""
    parts = words(name)
    if not parts:
        return True
    wanted = {parts[-1], "".join(parts)}
    bare = {word.split("'")[0].split("’")[0] for word in said}  # "the dog's tail"
    if not wanted.isdisjoint(bare):
        return True
    singular = _singular()
    return any(singular(word) in wanted for word in bare)


def _is_of_example(said: Sequence[str], name: str, is_named: bool) -> bool:
    """Whether the answer is about one of the examples that were shown, or repeats a piece of it."""
    subject = said[1] if said[0] in _ARTICLES else said[0]
    for example, good in DESCRIPTION_SECOND.examples:
        if example in words(name):
            continue
        about = names([subject], example) or (not is_named and names(said, example))
        if about or longest_common_run(said, words(good)) >= _EXAMPLE_WORDS:
            return True
    return False


@lru_cache(maxsize=1)
def _singular() -> Callable[[str], str]:
    """Returns what makes a plural singular, by the rules of the parser by part of speech."""
    from data_prep.parse_pos import NounRules, find_pipeline  # here: loading takes seconds, and is seldom needed
    from data_prep.spacy_alone import spacy

    rules = NounRules(spacy.load(find_pipeline(), exclude=["parser", "ner", "senter"]), ())
    return lru_cache(100_000)(lambda word: rules.lemma(word, "NNS"))
