"""Synonyms from WordNet's own database, where the user has one. Used by `data_prep.llm.names`.

We found no Python package that carries WordNet, so a folder is named: that of Debian's and Ubuntu's package `wordnet-base`
(/usr/share/wordnet), or NLTK's `corpora/wordnet`. Of its files `data.noun` is read (manual page wndb(5WN)).
"""

from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from setclip.errors import InputError

_FILE = "data.noun"


class Synonyms:
    """Nouns by the sets of synonyms that they are in: of all their senses, because a caption does not say which."""

    def __init__(self, folder: Path):
        path = folder / _FILE
        if not path.is_file():
            raise InputError(
                f"expected WordNet's {_FILE} in {folder}, found none; name the folder that has it (/usr/share/wordnet after "
                "`apt install wordnet-base`), or leave --wordnet away"
            )
        self._sets: list[tuple[str, ...]] = []
        self._of: defaultdict[str, list[int]] = defaultdict(list)
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith("  "):  # the licence
                    continue
                fields = line.split(" ")
                # Place, file, kind, number of words (hexadecimal), then each word with its number among equal ones.
                members = tuple(fields[4 + 2 * i].lower().replace("_", " ") for i in range(int(fields[3], 16)))
                for member in members:
                    self._of[member].append(len(self._sets))
                self._sets.append(members)
        self.of = lru_cache(100_000)(self._find)

    def _find(self, name: str) -> frozenset[str]:
        """Returns what is said for `name`, itself left out; words of several parts also as one word."""
        found = {member for number in self._of.get(name, ()) for member in self._sets[number]} - {name}
        return frozenset(found | {member.replace(" ", "") for member in found})
