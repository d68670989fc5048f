"""What a source hands to `data_prep.run`: units that can be read by themselves, in any order, by any process.

A unit is an input tar, a Parquet file, a range of lines. Its samples make shards of their own, so that a thousand jobs
give the same bytes as one. A source yields what it finds, good or bad; `data_prep.pack` checks, parses and writes it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.pos_config import STOP_WORDS
from setclip.errors import InputError

Kind = Literal["bad", "absent", "filtered", "duplicate"]
"""Why a sample is not in the shards: broken (the ceiling --max-bad counts these), listed but not there (a dead link),
left out by a filter of the user's, or there already."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """An image with its captions as a source found them, unchecked."""

    image: bytes
    """The file's bytes; any format."""
    captions: list[str]
    name: str
    """What the source calls the sample, for messages."""
    url: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Goes into the sample's JSON as it is."""


@dataclass(frozen=True)
class Dropped:
    """A sample that a source lists and cannot give."""

    reason: str
    """Short and free of values, because equal reasons are counted together."""
    kind: Kind = "bad"
    pairs: int = 1
    """Image–caption pairs that are lost with it."""
    samples: int = 1
    """0 where single captions of a sample are lost, or an image that no caption names."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One input, read by itself."""

    name: str
    """Of the input, for messages and the manifest: a file, or a file and a range of it."""
    split: str
    read: Callable[[], Iterator[Record | Dropped]]
    """A top-level function or a partial of one: it goes to other processes. The order of what it yields is fixed.
    Raises InputError where the input cannot be read at all."""
    state: str = ""
    """What tells this input from a changed one of the same name (size and time): a changed one is packed again when a
    preparation goes on. "" where the source checks that by itself."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that one preparation makes."""

    units: list[Unit]
    """In the order of the output; units of one split stand together."""
    pairs_listed: int | None = None
    """Pairs of the published list, where that is longer than what the units hold; None: what the units list."""
    folders: Mapping[str, Callable[[Path], int]] = field(default_factory=dict)
    """Name of a folder of class directories to the function that fills it and returns its number of pictures."""
    credits: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What is odd about the input as a whole (gaps in shard numbers); said, and kept in the manifest."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What every source can be told."""

    out: Path
    """Folder for the shards, the manifest and the statistics; made if it is not there. A preparation that was stopped
    goes on from the inputs that are done."""
    overwrite: bool = False
    """Whether to replace what an earlier preparation wrote to that folder. Other files in it are left alone."""
    part: int | None = None
    """Number of this job, from 0; SLURM_ARRAY_TASK_ID where that is set. Jobs of several parts only write their inputs'
    shards; `python -m data_prep.merge OUT` then makes one folder of them."""
    parts: int | None = None
    """Number of jobs that share the work; SLURM_ARRAY_TASK_COUNT where that is set."""
    processes: int = 0
    """Processes that draw, read and parse; 0 takes the CPUs of this job. The output does not depend on it."""
    max_bad: float = 0.05
    """Share of samples that may be left out as bad; more than that stops the job."""

    shard_size: int = 10_000
    """Most samples in one shard."""
    shard_bytes: int = 256_000_000
    """Most bytes in one shard."""
    short_side: int = 256
    """Images with a longer short side are resized to it, in pixels; others keep their bytes. 0 keeps all as they are."""
    jpeg_quality: int = 95
    """Quality of images that are resized."""
    check: Literal["structure", "decode"] = "structure"
    """Of images that keep their bytes: headers and the marks of a complete file, or every pixel (several times slower;
    finds damage inside)."""
    min_side: int = 0
    """Leave out images with a shorter side than this, in pixels."""
    max_aspect: float = 0.0
    """Leave out images whose sides have a larger ratio; 0 keeps all."""
    min_caption_chars: int = 1
    """Leave out shorter captions."""
    max_caption_chars: int = 0
    """Leave out longer captions; 0 keeps all."""
    near_duplicates: bool = False
    """Leave out images that look like an earlier one of their split (perceptual hash)."""
    decontaminate: tuple[str, ...] = ()
    """Folders of evaluation images (shards, or loose images with their subfolders): leave out what looks like one of them
    from the split "train"."""
    alike_bits: int = 4
    """Bits, of 63, in which the perceptual hashes of alike images may differ."""
    compound: bool = True
    """Whether adjacent nouns are one object ("teddy bear")."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Nouns that are no objects."""

    def __post_init__(self) -> None:
        limits = {
            "processes": (self.processes >= 0, "0 or more"),
            "max_bad": (0 <= self.max_bad <= 1, "a share from 0 to 1"),
            "shard_size": (self.shard_size >= 1, "at least 1"),
            "shard_bytes": (self.shard_bytes >= 1, "at least 1"),
            "short_side": (self.short_side >= 0, "0 or more"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 100, "1 to 100"),
            "min_side": (self.min_side >= 0, "0 or more"),
            "max_aspect": (self.max_aspect == 0 or self.max_aspect >= 1, "0 or at least 1"),
            "min_caption_chars": (self.min_caption_chars >= 1, "at least 1"),
            "alike_bits": (0 <= self.alike_bits <= 8, "0 to 8"),
            "max_caption_chars": (
                self.max_caption_chars == 0 or self.max_caption_chars >= self.min_caption_chars,
                "0, or at least min_caption_chars",
            ),
        }
        wrong = [
            f"--{name.replace('_', '-')} of {expected}, found {getattr(self, name)}"
            for name, (fits, expected) in limits.items()
            if not fits
        ]
        if wrong:
            raise InputError(f"expected {'; '.join(wrong)}; choose another value")


def check_share_of_bad(bad: Mapping[str, int], total: int, max_bad: float) -> None:
    """Raises InputError with the table of reasons if more than `max_bad` of `total` samples are bad."""
    count = sum(bad.values())
    if count > max_bad * total:
        table = "\n".join(f"  {n:>9,}  {reason}" for reason, n in sorted(bad.items(), key=lambda item: -item[1]))
        raise InputError(
            f"expected at most {max_bad:.1%} bad samples, found {count:,} of {total:,} ({count / total:.1%}):\n{table}\n"
            f"No shard has its final name yet. Mend the input, or allow more with --max-bad {_ceiling(count / total)}"
        )


def _ceiling(share: float) -> float:
    return min(1.0, int(share * 100 + 1) / 100)
