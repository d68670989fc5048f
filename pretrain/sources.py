"""Where the samples of a run come from: one folder of shards or several with weights, on disk or on a server.

Opens them, sees that they fit each other, and makes one of them: one list of shards, one manifest, one table of objects.
Used by pretrain.plan.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.blocks import Blocks, ShardPlace
from pretrain.data_order import Share
from setclip.disk_cache import DiskCache
from setclip.errors import InputError
from setclip.files import replacing
from setclip.manifest import MANIFEST_NAME, Manifest, check_shards
from setclip.objects import OBJECTS_NAME, ObjectTable, read_objects
from setclip.remote import AT_START, Absent, Patience, RemoteFolder, is_address
from setclip.shards import ShardInfo

_MARGIN = 1.25  # blocks are larger or smaller than their mean


@dataclass(frozen=True)
class Source:
    """A folder of shards, and how often an epoch has each of its samples."""

    place: str
    """As it was given"""
    weight: float
    manifest: Manifest
    shards: list[ShardInfo]
    """Of the split"""
    folder: Path
    """Where its small files are: the folder itself, or the copy of those of a server"""
    remote: RemoteFolder | None

    def file(self, name: str) -> Path:
        """Returns the place of a small file beside the manifest, fetched where it is on a server; it may not be there."""
        path = self.folder / name
        if self.remote is not None:  # at each start: it may have been made again, which the manifest does not tell
            try:
                data = self.remote.read(name)
            except Absent:
                path.unlink(missing_ok=True)
                return path
            if not path.exists() or path.read_bytes() != data:
                with replacing(path) as temporary:
                    temporary.write_bytes(data)
        return path

    def objects(self, parser: str) -> ObjectTable:
        """Returns the source's objects. Raises InputError where they were not counted."""
        path = self.file(OBJECTS_NAME)
        if self.remote is not None and not path.exists():
            raise InputError(
                f"expected {self.place}/{OBJECTS_NAME}, found no such file; make it with `python -m data_prep.statistics DIR` "
                "where the shards are prepared, and copy it beside them"
            )
        return read_objects(path, parser)


@dataclass(frozen=True)
class Sources:
    """All sources of a run."""

    each: list[Source]
    cache: DiskCache | None
    """None where all are on disk"""

    @property
    def name(self) -> str:
        """For messages."""
        return " + ".join(source.place for source in self.each)

    @cached_property
    def manifest(self) -> Manifest:
        """One manifest of all: shards in order, counts added up, parsers that all have."""
        first, *others = [source.manifest for source in self.each]
        if not others:
            return first
        manifests = [first, *others]
        return replace(
            first,
            source=" + ".join(m.source for m in manifests),
            shards=[shard for m in manifests for shard in m.shards],
            dropped=dict(sum((Counter(m.dropped) for m in manifests), Counter())),
            samples_listed=sum(m.samples_listed for m in manifests),
            pairs_listed=sum(m.pairs_listed for m in manifests),
            pairs_present=sum(m.pairs_present for m in manifests),
            parsers={name: v for name, v in first.parsers.items() if all(name in m.parsers for m in others)},
            credits=list(dict.fromkeys(line for m in manifests for line in m.credits)),
        )

    @property
    def shards(self) -> list[ShardInfo]:
        """The shards of the split, source by source."""
        return [shard for source in self.each for shard in source.shards]

    @property
    def shares(self) -> tuple[Share, ...]:
        """For the data order; empty where there is one source without a weight."""
        if self._is_plain:
            return ()
        return tuple(Share(len(source.shards), source.weight) for source in self.each)

    @property
    def course(self) -> list[Any] | None:
        """What fixes the course of a run, beside the digest of all shards: None where there is one source without a weight."""
        if self._is_plain:
            return None
        return [[source.manifest.identity()["digest"], source.weight] for source in self.each]

    @property
    def _is_plain(self) -> bool:
        return len(self.each) == 1 and self.each[0].weight == 1

    @property
    def notes(self) -> list[str]:
        """What is said of several sources at the start."""
        if self._is_plain:
            return []
        told = []
        for source in self.each:
            samples = sum(shard.samples for shard in source.shards)
            seen = int(source.weight) * samples + int((source.weight % 1) * samples + 0.5)
            told.append(f"source {source.place}, weight {source.weight:g}: {samples:,} samples, {seen:,} an epoch")
        return told

    def file(self, name: str) -> Path:
        """Returns the place of a small file beside the manifest. Raises InputError where there are several sources."""
        if len(self.each) > 1:
            raise InputError(
                f"expected one place for {name}, found {len(self.each)} sources; give the file by its flag (for descriptions "
                "--text.descriptions FILE)"
            )
        return self.each[0].file(name)

    def objects(self, parser: str) -> ObjectTable:
        """Returns the objects of all sources: captions that contain each, as often as an epoch has them."""
        tables = [source.objects(parser) for source in self.each]
        if self._is_plain:
            return tables[0]
        counts: dict[str, float] = {}
        for source, table in zip(self.each, tables, strict=True):
            for name, count in zip(table.names, table.counts.tolist(), strict=True):
                counts[name] = counts.get(name, 0.0) + source.weight * count
        captions = sum(source.weight * table.num_captions for source, table in zip(self.each, tables, strict=True))
        return ObjectTable.from_counts(
            {name: max(1, round(count)) for name, count in counts.items()}, parser, round(captions)
        )

    def places(self) -> list[ShardPlace]:
        """Returns where each shard is."""
        several = len(self.each) > 1
        return [
            ShardPlace(shard, source.remote or source.folder, source.place if several else "")
            for source in self.each
            for shard in source.shards
        ]

    def open(self, block_size: int) -> Blocks:
        """Returns the shards, to be read by blocks of so many samples."""
        return Blocks(self.places(), block_size, self.cache)

    def check_cache(self, num_lanes: int, block_size: int, window_blocks: int) -> str:
        """Sees that the cache has room for what some lanes of this machine read at a time; returns what to say of it.

        Raises InputError where there is too little.
        """
        remote = [source for source in self.each if source.remote is not None and source.shards]
        shards = [shard for source in remote for shard in source.shards]
        if self.cache is None or not shards:
            return ""
        samples, total = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
        # Sources are read as often as their weights say.
        seen = sum(source.weight * shard.samples for source in remote for shard in source.shards)
        block = sum(source.weight * shard.bytes for source in remote for shard in source.shards) / seen
        block *= min(block_size, samples)
        # A window may begin and end within a block; more than all blocks there cannot be.
        needed = int(min(num_lanes * (window_blocks + 1) * block, total) * _MARGIN)
        used = self.cache.clean()
        if self.cache.limit < needed:
            raise InputError(
                f"expected a cache of at least {needed / 1e9:.3g} GB ({num_lanes} lanes on this machine read {window_blocks} "
                f"blocks of {block / 1e6:.3g} MB at a time), found --data.cache-gb {self.cache.limit / 1e9:g}; raise it or lower "
                "--data.window-blocks or --data.block-size (for a new run)"
            )
        free = _free(self.cache.folder) + used
        if free < needed:
            raise InputError(
                f"expected {needed / 1e9:.3g} GB for the cache in {self.cache.folder}, found {free / 1e9:.3g} GB free; make room "
                "or name another place with --data.cache"
            )
        ahead = (
            ""
            if self.cache.limit >= min(2 * needed, total)
            else (
                f"; it holds one window of each lane, and little is read ahead: --data.cache-gb {2 * needed / 1e9:.3g} holds two"
            )
        )
        return f"cache {self.cache.folder}: {used / 1e9:.3g} of {self.cache.limit / 1e9:g} GB in use{ahead}"


def open_sources(
    places: Sequence[str],
    weights: Sequence[float],
    split: str,
    cache: Path | None = None,
    cache_bytes: int = 0,
    patience: Patience | None = None,
    parser: str | None = None,
) -> Sources:
    """Opens the sources, and sees that shards on disk are there. Raises InputError within seconds where one cannot be had.

    `parser`: whose objects must mean the same in all of them.
    """
    if weights and len(weights) != len(places):
        raise InputError(
            f"expected a weight for each of {len(places)} sources, found {len(weights)}; give as many with --data.weights"
        )
    if len(set(places)) < len(places):
        raise InputError(f"expected each source once, found {', '.join(places)}; use --data.weights for more of one")
    caches = DiskCache(cache or default_cache(), cache_bytes) if any(map(is_address, places)) else None
    each = [
        _open(place, weight, split, caches, patience)
        for place, weight in zip(places, weights or [1.0] * len(places), strict=True)
    ]
    _check_together(each, parser)
    return Sources(each, caches)


def default_cache() -> Path:
    """Returns where blocks from servers are kept unless told otherwise: `setclip-blocks` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setclip-blocks"


def _open(place: str, weight: float, split: str, cache: DiskCache | None, patience: Patience | None) -> Source:
    if not is_address(place):
        manifest = Manifest.load(place)
        shards = manifest.of_split(split)
        check_shards(place, shards)
        return Source(place, weight, manifest, shards, Path(place), None)
    assert cache is not None
    remote = RemoteFolder(place, patience)
    try:
        data = remote.read(MANIFEST_NAME, patience=AT_START)
    except Absent as error:
        raise InputError(
            f"expected shards with a manifest at {place}/{MANIFEST_NAME}, found {error}; give the address of the folder that "
            "`python -m data_prep.run` wrote"
        ) from error
    try:
        manifest = Manifest.from_json(json.loads(data), f"{place}/{MANIFEST_NAME}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{place}/{MANIFEST_NAME}: expected a Setclip manifest, found {error}") from error
    # One folder for each state of a source.
    folder = cache.folder / f"source-{hashlib.sha256(place.encode() + data).hexdigest()[:24]}"
    folder.mkdir(exist_ok=True)
    shards = manifest.of_split(split)
    _probe(remote, shards[0])
    return Source(place, weight, manifest, shards, folder, remote)


def _probe(remote: RemoteFolder, shard: ShardInfo) -> None:
    """Reads the last bytes of a shard: the server gives parts of files, and the file is as long as the manifest says."""
    try:
        remote.read(shard.name, shard.bytes - 1, shard.bytes, patience=AT_START)
    except Absent as error:
        raise InputError(
            f"expected the shard {remote.address}/{shard.name} that the manifest names, found {error}; copy the folder again"
        ) from error


def _check_together(sources: Sequence[Source], parser: str | None) -> None:
    versions = {source.place: source.manifest.parsers.get(parser or "") for source in sources}
    if len(set(versions.values())) > 1:
        told = "; ".join(f"{place}: {version or 'not parsed'}" for place, version in versions.items())
        raise InputError(
            f"expected sources parsed alike, found for {parser!r}: {told}. Their objects would not mean the same; parse them "
            "with the same version (`python -m data_prep.parse DIR`)"
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
