"""Names that a language model gave become objects, as captions do by part of speech; and whether a caption says them.

Used by `data_prep.parse_llm`. The names go through `PosParser` itself, so "two teddy bears", "A teddy bear" and a caption's
teddy bear are one object, and "red car" is "car" in both parsers.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.llm.synonyms import Synonyms
from data_prep.llm.texts import words
from data_prep.parse_pos import Noun, PosParser
from data_prep.pos_config import PosConfig
from data_prep.spacy_alone import Doc

RULES_VERSION = 1  # raise it when the same names would give other objects

_MOST_KEPT = 200_000  # names whose objects are remembered; "man" is answered a hundred thousand times
_AROUND_A_HEAD = ("NN", "NNS", "NNP", "NNPS", "DT", "JJ", "CD", "PRP$", "HYPH")
_TAKEN_FOR_NOUNS = {"VBZ": "NNS", **dict.fromkeys(("JJ", "VB", "VBP", "FW", "RB", "UH", "IN"), "NN")}
_SHORTEST_PART = 4  # letters of a word that is found inside another ("flower" in "sunflower")


class NameParser(PosParser):
    """Makes objects of names. The last word of a name is a noun even where the tagger, without a sentence, doubts it."""

    def __init__(self, config: PosConfig | None = None, synonyms: Synonyms | None = None):
        super().__init__(config)
        self._synonyms = synonyms
        self._kept: dict[str, list[str]] = {}

    def objects(self, answers: Sequence[Sequence[str]]) -> list[list[str]]:
        """Returns the distinct objects of each list of names, in the order of their first mention."""
        if len(self._kept) > _MOST_KEPT:
            self._kept.clear()
        new = [name for name in dict.fromkeys(name for names in answers for name in names) if name not in self._kept]
        # With an article the tagger takes "train" for a thing and not for what one does.
        self._kept.update(zip(new, self.parse([_with_article(name) for name in new]), strict=True))
        return [list(dict.fromkeys(item for name in names for item in self._kept[name])) for names in answers]

    def unmentioned(self, caption: str, objects: Sequence[str]) -> list[str]:
        """Returns the objects that the caption does not say, in the singular or plural, as compound or by a synonym."""
        told = words(caption)
        forms = set(told) | {self._singular(word) for word in told}
        # Words of two or three parts may stand as one ("snow board") and the other way round.
        forms |= {"".join(told[at : at + length]) for length in (2, 3) for at in range(len(told) - length + 1)}
        return [name for name in objects if not self._is_said(name, forms)]

    def _is_said(self, name: str, forms: set[str]) -> bool:
        parts = words(name)
        if "".join(parts) in forms or all(_is_in(part, forms) for part in parts):
            return True
        return self._synonyms is not None and not self._synonyms.of(name).isdisjoint(forms)

    def _singular(self, word: str) -> str:
        return self._noun(word, "NNS")[1] or word

    def _nouns(self, doc: Doc, tags: np.ndarray) -> Iterator[Noun]:
        labels = self._tagger.labels
        last = len(doc) - 1
        if (
            last >= 0
            and labels[tags[last]] in _TAKEN_FOR_NOUNS
            and all(labels[tag] in _AROUND_A_HEAD for tag in tags[:last])
        ):
            tags = tags.copy()
            tags[last] = labels.index(_TAKEN_FOR_NOUNS[labels[tags[last]]])
        return super()._nouns(doc, tags)


@lru_cache(maxsize=1)
def name_parser(config: PosConfig, wordnet: Path | None) -> NameParser:
    """Returns this process's parser of names: loading the language model takes a second. `wordnet` is WordNet's folder."""
    return NameParser(config, None if wordnet is None else Synonyms(wordnet))


def _with_article(name: str) -> str:
    first = name.split(" ", 1)[0].lower()
    return name if first in ("a", "an", "the") else f"the {name}"


def _is_in(part: str, forms: set[str]) -> bool:
    if part in forms:
        return True
    return len(part) >= _SHORTEST_PART and any(form.endswith(part) for form in forms)
