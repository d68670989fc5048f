"""What is embedded, in parts: the pictures of a folder in any nesting, or the samples of a folder of shards.

Used by bulk export (`eval_suite.embed`) and by search, which shows the pictures again.
"""

import bisect
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from setclip.decode import IMAGE_EXTENSIONS
from setclip.errors import InputError
from setclip.manifest import MANIFEST_NAME, Manifest, check_shards
from setclip.shards import Shard, is_image_extension, key_of


@dataclass(frozen=True)
class SourcePart:
    """Samples that are written together."""

    name: str
    rows: range
    """Into the source."""
    sha256: str
    """Digest of its inputs, from the manifest or from the files' names, sizes and times."""


class Source(Protocol):
    """Pictures by row, in an order that depends on the inputs alone."""

    @property
    def kind(self) -> str:
        """ "folder" or "shards"."""
        ...

    @property
    def place(self) -> Path: ...

    @property
    def parts(self) -> Sequence[SourcePart]: ...

    @property
    def other_files(self) -> Counter[str]:
        """Extension to the number of files that are no pictures."""
        ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[str, bytes]:
        """Returns (key, image bytes). The key is the one that shards know a picture by. Raises OSError, InputError."""
        ...

    def path(self, row: int) -> str:
        """Returns where the picture lies below `place`: "cats/1.jpg", or "test-00000.tar"."""
        ...

    def captions(self, row: int) -> list[str]:
        """Returns the captions; a folder has none."""
        ...


class FolderSource:
    """All pictures below a folder, by path; hidden files and folders do not count."""

    kind = "folder"

    def __init__(self, place: Path, part_size: int):
        self.place = place
        self.other_files: Counter[str] = Counter()
        entries: list[tuple[str, int, int]] = []
        for path in _files_below(place):
            if is_image_extension(path.suffix.removeprefix(".")):
                status = path.stat()
                entries.append((path.relative_to(place).as_posix(), status.st_size, status.st_mtime_ns))
            else:
                self.other_files[path.suffix or path.name] += 1
        if not entries:
            others = ", ".join(f"{count:,} {name}" for name, count in self.other_files.most_common(3))
            raise InputError(
                f"expected images ({', '.join(IMAGE_EXTENSIONS)}) below {place}, or shards with their {MANIFEST_NAME}, "
                f"found {f'only other files ({others})' if others else 'no files'}; give the folder that holds them"
            )
        entries.sort()
        self._paths = [path for path, _, _ in entries]
        self.parts = [
            SourcePart(
                f"{number:05d}", range(start, min(start + part_size, len(entries))), _digest(entries, start, part_size)
            )
            for number, start in enumerate(range(0, len(entries), part_size))
        ]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, row: int) -> tuple[str, bytes]:
        """Returns (key, image bytes)."""
        data = (self.place / self._paths[row]).read_bytes()
        return key_of(data)[0], data

    def path(self, row: int) -> str:
        """Returns the path below `place`, with slashes."""
        return self._paths[row]

    def captions(self, row: int) -> list[str]:
        """Returns no captions."""
        return []


class ShardSource:
    """The samples of shards, in the order of their manifest; a part is a shard."""

    kind = "shards"

    def __init__(self, place: Path, split: str | None = None):
        self.place = place
        self.other_files: Counter[str] = Counter()
        manifest = Manifest.load(place)
        infos = manifest.shards if split is None else manifest.of_split(split)
        check_shards(place, infos)
        self._shards = [Shard(place / info.name) for info in infos]
        self._starts = [0, *accumulate(info.samples for info in infos)]
        self.parts = [
            SourcePart(Path(info.name).stem, range(start, start + info.samples), info.sha256)
            for info, start in zip(infos, self._starts, strict=False)
        ]
        if not len(self):
            raise InputError(f"expected samples in the shards at {place}, found none; prepare the shards again")

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, row: int) -> tuple[str, bytes]:
        """Returns (key, image bytes)."""
        shard, inside = self._at(row)
        key, _, image, _ = shard.read_raw(inside)
        return key, image

    def path(self, row: int) -> str:
        """Returns the name of the shard."""
        return self._at(row)[0].path.name

    def captions(self, row: int) -> list[str]:
        """Returns the captions."""
        shard, inside = self._at(row)
        return shard.read(inside).captions

    def _at(self, row: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._starts, row) - 1
        return self._shards[number], row - self._starts[number]


def open_source(place: Path, split: str | None = None, part_size: int = 10_000) -> FolderSource | ShardSource:
    """Returns the shards where `place` has a manifest, else the pictures below it. Raises InputError.

    `split`: only these shards; None: all. `part_size`: pictures a part, of a folder.
    """
    if not place.is_dir():
        raise InputError(f"expected a folder of pictures or shards at {place}, found no such folder; give its place")
    if (place / MANIFEST_NAME).exists():
        return ShardSource(place, split)
    if split is not None:
        raise InputError(
            f"expected shards with a {MANIFEST_NAME} at {place} for --split {split}, found none; leave --split out for "
            "a folder of pictures"
        )
    if part_size < 1:
        raise InputError(f"expected at least one picture a part, found --part-size {part_size}; give 1 or more")
    return FolderSource(place, part_size)


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link in a circle; other links are followed, as data sets are often linked together
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, above | {real})
        elif path.is_file():
            yield path


def _digest(entries: Sequence[tuple[str, int, int]], start: int, size: int) -> str:
    return hashlib.sha256(json.dumps(entries[start : start + size]).encode()).hexdigest()
