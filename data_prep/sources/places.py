"""Input files by folder, file, brace pattern or glob; the split that a name tells; numbers missing in a series of files.

Used by the sources of many files (tars, corpora, parquet) while they plan: only names are looked at, no content.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from setclip.errors import InputError

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "dev", "test": "test"}

_MOST_FILES = 1_000_000  # of one brace pattern; "{0..99999999999}" is a slip
_NAMED = 10  # missing files or ranges that a message names

_OF_TOTAL = re.compile(r"(.*?)(\d+)-of-(\d+)")  # train-00000-of-00010
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})\b")
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    path: Path
    split: str


def some(names: Sequence[str]) -> str:
    """Returns the first of them, for a message, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def state_of(path: Path) -> str:
    """Returns what tells a file from a changed one of the same name."""
    found = path.stat()
    return f"{found.st_size} bytes, changed {found.st_mtime_ns}"


def check_split(split: str | None) -> None:
    """Raises InputError unless the name can stand in the names of shards."""
    if split is not None and not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise InputError(f"expected letters, digits and _ in --split, found {split!r}; choose another name")


def find_files(given: Sequence[str], suffix: str, flag: str, split: str | None) -> tuple[list[InputFile], list[str]]:
    """Returns the files that `given` names, those of one split together, and warnings about gaps in their numbers.

    Each of `given` is a folder (searched with its subfolders for names that end with `suffix`, sorted; hidden ones are
    passed over), a file, a brace pattern or a glob. `flag` ("--tars") is for messages. Without `split` the names tell
    it, or else it is "train". Raises InputError for a place where nothing is, and for every file that a brace pattern
    names and that is missing.
    """
    if not given:
        raise InputError(f"expected a folder, file or pattern of {suffix} files, found none; give {flag}")
    found: dict[str, InputFile] = {}
    repeated = 0
    for text in given:
        root = Path(text)
        for path in _resolve(text, suffix, flag):
            real = os.path.realpath(path)
            repeated += real in found
            found.setdefault(real, InputFile(path, split or split_of(path, root) or "train"))
    files = list(found.values())
    order = list(dict.fromkeys(file.split for file in files))
    files.sort(key=lambda file: order.index(file.split))
    warnings = find_gaps(file.path for file in files)
    if repeated:
        warnings.append(f"{repeated} files were given twice; each is read once")
    return files, warnings


def split_of(path: Path, root: Path) -> str | None:
    """Returns the split that a file's name tells, or a folder's; None if they tell none.

    Counted are: the first word of the file's name and the word before its first number (train-00000-of-00010,
    cc3m-validation-0000), then the whole names of its folders, from the nearest up to and including `root`, or to its
    own folder if it was not found under a folder that the user gave. "valid" and "validation" mean "val".
    """
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    first = re.match(r"[a-z]*", words[0])
    before_number = next((a for a, b in itertools.pairwise(words) if b.isdigit()), "")
    folders = [path.parent.name]
    if root != path and root in path.parents:
        folders = [*reversed(path.parent.relative_to(root).parts), root.name]
    for word in (first[0] if first else "", before_number, *folders):
        if word.lower() in SPLIT_WORDS:
            return SPLIT_WORDS[word.lower()]
    return None


def find_gaps(paths: Iterable[Path]) -> list[str]:
    """Returns a sentence for each series of numbered files with numbers missing: 00000 … 00331, or N of "-of-00010"."""
    series: dict[tuple[Path, str, str, int | None], list[str]] = {}
    for path in paths:
        key: tuple[Path, str, str, int | None]
        if match := _OF_TOTAL.fullmatch(path.stem):
            key = (path.parent, match[1], f"-of-{match[3]}{path.suffix}", int(match[3]))
        elif match := _NUMBERED.fullmatch(path.stem):
            key = (path.parent, match[1], f"{match[3]}{path.suffix}", None)
        else:
            continue
        series.setdefault(key, []).append(match[2])
    warnings = []
    for (folder, prefix, suffix, total), digits in series.items():
        there = sorted({int(text) for text in digits})
        # A series may begin at 1; further up, its beginning is missing.
        bounds = (-1, total) if total is not None else (there[0] - 1 if there[0] <= 1 else -1, there[-1])
        missing = [(a + 1, b - 1) for a, b in itertools.pairwise([bounds[0], *there, bounds[1]]) if b - a > 1]
        if missing:
            width = max(map(len, digits))
            ranges = [f"{a:0{width}}" if a == b else f"{a:0{width}}–{b:0{width}}" for a, b in missing]
            more = f" and {len(ranges) - _NAMED} more ranges" if len(ranges) > _NAMED else ""
            warnings.append(
                f"{folder}: missing in the series {prefix}{'N' * width}{suffix}: {', '.join(ranges[:_NAMED])}{more} "
                f"({sum(b - a + 1 for a, b in missing):,} in all)"
            )
    return warnings


def _resolve(text: str, suffix: str, flag: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        files = sorted(_walk(path, suffix))
        if not files:
            packed = [file for ending in (".gz", ".zst", ".bz2", ".xz") for file in _walk(path, suffix + ending)]
            found = f"{len(packed)} compressed ones ({packed[0].name}, …)" if packed else "none"
            raise InputError(f"expected {suffix} files in {path}, found {found}; unpack them or give another {flag}")
        return files
    if path.exists():
        return [path]
    if "{" in text:
        return _expand(text, suffix, flag)
    if glob.has_magic(text):
        return _glob(text, flag)
    raise InputError(f"expected a folder, a file or a pattern of {suffix} files, found nothing at {text}; mend {flag}")


def _expand(text: str, suffix: str, flag: str) -> list[Path]:
    # braceexpand makes the list of a range before it yields from it.
    is_long = any(abs(int(b) - int(a)) >= _MOST_FILES for a, b in _RANGE.findall(text))
    try:
        names = [] if is_long else list(itertools.islice(braceexpand(text, escape=False), _MOST_FILES + 1))
    except ValueError as error:  # unbalanced braces
        raise InputError(f"expected a pattern such as DIR/{{000..331}}{suffix}, found {text} ({error})") from error
    if is_long or len(names) > _MOST_FILES:
        raise InputError(f"expected a pattern of at most {_MOST_FILES:,} files, found more in {text}; mend {flag}")
    if glob.has_magic(text):
        return [path for name in names for path in _glob(name, flag)]
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise InputError(
            f"expected {len(names):,} files of {text}, found {len(names) - len(missing):,}; missing: {some(missing)}; "
            "fetch them, or give the folder to take what is there"
        )
    return [Path(name) for name in names]


def _glob(text: str, flag: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if os.path.isfile(name)]
    if not paths:
        raise InputError(f"expected files that fit {text}, found none; mend {flag}")
    return paths


def _walk(folder: Path, suffix: str) -> Iterator[Path]:
    """Yields the files below `folder`, through linked folders too, each folder once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield from (Path(place, name) for name in names if name.endswith(suffix) and not name.startswith("."))
