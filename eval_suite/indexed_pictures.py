"""Finds the pictures of a search index again, and says where one is gone or has changed. Used by search."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from setclip.shards import Shard, key_of


@dataclass(frozen=True)
class FoundPicture:
    """What lies where a picture was when it was indexed."""

    data: bytes | None
    problem: str = ""
    """"missing", "changed", or "" where all is well; a changed picture has its new bytes."""
    captions: Sequence[str] = ()


class IndexedPictures:
    """Reads pictures below `place`, files of a folder or samples of shards (`kind` "folder" or "shards")."""

    def __init__(self, kind: str, place: Path):
        self.kind, self.place = kind, place
        self._shards: dict[str, _OpenShard] = {}

    def read(self, path: str, key: str) -> FoundPicture:
        """Returns the picture that had this path (of shards the shard's name) and key."""
        where = self.place / path
        if not where.is_file():
            return FoundPicture(None, "missing")
        if self.kind == "folder":
            data = where.read_bytes()
            return FoundPicture(data, "" if key_of(data)[0] == key else "changed")
        if path not in self._shards:
            self._shards[path] = _OpenShard(Shard(where))
        shard = self._shards[path]
        if key not in shard.row_of_key:
            return FoundPicture(None, "missing")
        sample = shard.shard.read(shard.row_of_key[key])
        return FoundPicture(sample.image, captions=sample.captions)


@dataclass
class _OpenShard:
    shard: Shard

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.shard.keys)}
