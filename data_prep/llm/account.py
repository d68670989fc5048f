"""What became of questions to a language model: counted by reason, for people and for reports.

Used by `data_prep.parse_llm`, `data_prep.describe` and the pages about their answers.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from setclip.log import say

T = TypeVar("T")

UNSAID = "names an object that the caption does not say"


@dataclass
class Account:
    """What became of the questions."""

    asked: int = 0
    """Distinct texts."""
    first_bad: Counter[str] = field(default_factory=Counter)
    """Reason to the number of first answers that were of no use."""
    second_bad: Counter[str] = field(default_factory=Counter)
    """The same of the second question, which is put where the first answer was bad."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Repair to the number of good answers that needed it."""
    flags: Counter[str] = field(default_factory=Counter)
    """Flag to the number of good answers that carry it."""
    objects: int = 0
    """Of captions: what good answers name, each caption's once."""
    unsaid: int = 0
    """Those of them that their caption does not say."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def left(self) -> int:
        """Texts without a good answer after both questions."""
        return self.second_bad.total()

    def add(self, other: "Account") -> None:
        """Counts another part's questions as well."""
        for entry in fields(self):
            mine, others = getattr(self, entry.name), getattr(other, entry.name)
            setattr(self, entry.name, mine + others)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, the most frequent reasons first."""
        return {
            name: dict(sorted(value.items(), key=lambda item: (-item[1], item[0])))
            if isinstance(value, dict)
            else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Account":
        """The inverse of `to_dict`."""
        found: dict[str, Any] = {n: Counter(value) if isinstance(value, dict) else value for n, value in values.items()}
        return cls(**found)

    def rows(self) -> list[tuple[str, str, int]]:
        """Returns (what, reason, count) for tables."""
        groups = (
            ("first answer bad", self.first_bad),
            ("second answer bad", self.second_bad),
            ("repaired", self.repaired),
            ("flag", self.flags),
        )
        return [
            (what, reason, count)
            for what, counts in groups
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def say(self, what: str, otherwise: str) -> None:
        """Prints the account; `otherwise` is what those without a good answer get."""
        bad = self.first_bad.total()
        say(
            f"{what}: {self.asked:,} asked, {bad:,} asked again ({_share(bad, self.asked)}), {self.left:,} {otherwise} "
            f"({_share(self.left, self.asked)})"
        )
        for group, reason, count in self.rows():
            say(f"  {count:>9,}  {group}: {reason}")
        if self.objects:
            share = _share(self.unsaid, self.objects)
            say(
                f"{self.unsaid:,} of {self.objects:,} objects in good answers are not said by their caption ({share}); kept"
            )


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What was found out about one text."""

    value: T | None
    """None where both answers were bad."""
    question: int
    """Of which question the value is: 1, 2, or 0 for none."""
    reasons: tuple[str, ...]
    """Why the answers were bad: of the first question, then of the second."""
    flags: tuple[str, ...]


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"
