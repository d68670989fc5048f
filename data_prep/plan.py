"""What a source hands to `data_prep.run`: the shards to be made, as functions that any process can call.

A source checks its input and drops what is bad while it plans, before anything is written; making a shard then depends
on nothing but its own arguments, so shards are made by any number of processes, in any order, with the same bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.parse_pos import STOP_WORDS
from setclip.errors import InputError
from setclip.shards import Sample


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What every source can be told."""

    out: Path
    """Folder for the shards, the manifest and the statistics; made if it is not there, and empty if it is."""
    overwrite: bool = False
    """Whether to replace what an earlier preparation wrote to that folder. Other files in it are left alone."""
    processes: int = 0
    """Processes that draw, read and parse; 0 takes the CPUs of this job. The output does not depend on it."""
    shard_size: int = 10_000
    """Most samples in one shard."""
    max_bad: float = 0.05
    """Share of samples that may be left out as bad; more than that stops the job before anything is written."""
    compound: bool = True
    """Whether adjacent nouns are one object ("teddy bear")."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Nouns that are no objects."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to be made."""

    name: str
    split: str
    samples: int
    """How many samples `make` yields."""
    make: Callable[[], Iterator[Sample]]
    """Yields the samples, without parsed objects. A top-level function or a partial of one: it goes to other processes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that one run of a source makes."""

    shards: list[ShardPlan]
    folders: dict[str, Callable[[Path], int]]
    """Name of a folder of class directories to the function that fills it and returns its number of pictures."""
    dropped: dict[str, int]
    """Reason to count."""
    pairs_listed: int
    credits: list[str]


def check_share_of_bad(bad: dict[str, int], total: int, max_bad: float) -> None:
    """Raises InputError with the table of reasons if more than `max_bad` of `total` samples are bad."""
    count = sum(bad.values())
    if count > max_bad * total:
        table = "\n".join(f"  {n:>9,}  {reason}" for reason, n in sorted(bad.items(), key=lambda item: -item[1]))
        raise InputError(
            f"expected at most {max_bad:.1%} bad samples, found {count:,} of {total:,} ({count / total:.1%}):\n{table}\n"
            f"Nothing was written. Mend the input, or allow more with --max-bad {_ceiling(count / total)}"
        )


def _ceiling(share: float) -> float:
    return min(1.0, int(share * 100 + 1) / 100)
