"""Words of captions as numbers: a vocabulary of the training captions alone, and the tokenizer of recurrent text towers.

A vocabulary depends on the captions and the least count only: five special words, then the others by count, equal ones by
alphabet. Made by finetune, kept in checkpoints by `setclip.models.backbones.recurrent`. Letters: B texts, L words of the longest.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.word_noise import DROP, Draw, changed_to, changes, random_numbers

PAD, UNKNOWN, START, END, MASKED = range(5)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>", "<mask>")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")


def words_of(text: str) -> list[str]:
    """Returns the words and signs of a text, in lower case: "A man's dog." → ["a", "man's", "dog", "."]."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words by number."""

    words: tuple[str, ...]
    """All, SPECIAL first"""

    def __post_init__(self) -> None:
        if self.words[: len(SPECIAL)] != SPECIAL or len(set(self.words)) != len(self.words):
            raise InputError(
                f"expected a vocabulary that begins with {' '.join(SPECIAL)} and has no word twice, found "
                f"{' '.join(self.words[:5]) or 'an empty one'} … of {len(self.words):,}; take the checkpoint's own file"
            )

    @classmethod
    def of_captions(cls, captions: Iterable[str], min_count: int = 4) -> "Vocabulary":
        """Returns the words that stand in the captions at least `min_count` times (VSE++'s code: 4). Raises InputError where no
        word does.
        """
        counts = Counter(word for text in captions for word in words_of(text))
        found = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        if not found:
            raise InputError(
                f"expected words that stand in the training captions at least {min_count} times, found none among "
                f"{len(counts):,} different ones; lower --backbone.min-count"
            )
        return cls((*SPECIAL, *(word for _, word in found)))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def number(self, word: str) -> int:
        """Returns the number of a word; UNKNOWN of one that is not there."""
        number = self._numbers.get(word, UNKNOWN)
        return number if number >= len(SPECIAL) else UNKNOWN


class WordTokenizer:
    """B texts to (B, L) int64: <start>, the words, <end>, then <pad> up to the longest text of the batch."""

    def __init__(self, vocabulary: Vocabulary, length: int = 128):
        """`length`: most tokens of a text, <start> and <end> included; words beyond are left out."""
        self.vocabulary, self.length = vocabulary, length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return padded([self._numbers(text) for text in texts], PAD)

    def noisy(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        """Returns the same with words changed (`setclip.word_noise`), each text by its own draw."""
        rows = [self._numbers(text)[1:-1] for text in texts]
        length = max((len(row) for row in rows), default=0)
        others = random_numbers(draws, length, len(SPECIAL), len(self.vocabulary))
        changed = [
            [changed_to(*each, MASKED) for each in zip(*words, strict=False) if each[1] != DROP]
            for words in zip(rows, changes(draws, length, rate), others, strict=True)
        ]
        return padded([[START, *row, END] for row in changed], PAD)

    def words_of(self, texts: Sequence[str]) -> list[list[str]]:
        """Returns what the tokens of each text stand for, <start> and <end> among them."""
        return [[self.vocabulary.words[number] for number in self._numbers(text)] for text in texts]

    def _numbers(self, text: str) -> list[int]:
        return [START, *(self.vocabulary.number(word) for word in words_of(text)[: self.length - 2]), END]


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Returns (B, L) int64 of rows of numbers of any lengths."""
    length = max((len(row) for row in rows), default=0)
    found = [[*row, *[pad] * (length - len(row))] for row in rows]
    return torch.tensor(found, dtype=torch.int64).view(len(rows), length)
