"""One unit becomes shards of its own: checked, resized where need be, captions parsed, everything left out accounted for.

Used by `data_prep.run`, one call a unit, in any process. What comes out depends on the unit and the rules only.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import near, pos_config
from data_prep.images import ImageRules, prepare_image
from data_prep.plan import Dropped, Kind, PrepareConfig, Record, Unit
from data_prep.pos_config import PosConfig
from setclip.decode import DecodeError
from setclip.errors import InputError
from setclip.files import replacing, write_json
from setclip.shards import Sample, ShardInfo, ShardWriter, key_of

if TYPE_CHECKING:
    from data_prep.parse_pos import PosParser

EMPTY_CAPTION = "empty caption (captions, not samples)"
SHORT_CAPTION = "caption too short (captions, not samples)"
LONG_CAPTION = "caption too long (captions, not samples)"
NOT_UNICODE = "caption that is not Unicode (captions, not samples)"
NO_CAPTION_LEFT = "no caption that is not empty"
NO_CAPTION_FITS = "no caption of a wanted length"
BAD_EXTRA = "metadata that JSON cannot hold"

REPORT_NAME = "unit.json"

_MAX_DEPTH = 32  # of nested metadata
_PARSED_AT_ONCE = 512  # samples held in memory while their captions are parsed
_BYTES_AT_ONCE = 64_000_000  # of their images


@dataclass(frozen=True, kw_only=True)
class PackRules:
    """All settings that decide what a unit becomes."""

    images: ImageRules
    pos: PosConfig | None
    """None leaves captions unparsed (a benchmark measures the rest with it)."""
    perceptual_hash: bool
    """Whether the index gets each image's perceptual hash."""
    shard_size: int
    shard_bytes: int
    min_caption_chars: int
    max_caption_chars: int

    @classmethod
    def from_config(cls, config: PrepareConfig) -> "PackRules":
        """Takes them from a preparation's config."""
        return cls(
            images=ImageRules.from_config(config),
            pos=PosConfig(compound=config.compound, stop_words=tuple(config.stop_words)),
            perceptual_hash=config.near_duplicates or bool(config.decontaminate),
            shard_size=config.shard_size,
            shard_bytes=config.shard_bytes,
            min_caption_chars=config.min_caption_chars,
            max_caption_chars=config.max_caption_chars,
        )


@dataclass(frozen=True, kw_only=True)
class Left:
    """How often samples (or captions, or images) were left out for one reason."""

    reason: str
    kind: Kind
    samples: int
    """Samples among them; 0 where the reason is about single captions or lonely images."""
    count: int


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """What became of one unit."""

    name: str
    split: str
    samples_listed: int
    samples_present: int
    pairs_listed: int
    pairs_present: int
    resized: int
    """Images that were made smaller; the others keep their bytes."""
    left_out: list[Left]
    shards: list[ShardInfo]
    parser: str
    """Version of the caption parser."""
    state: str
    """That of the unit when it was packed."""
    plan: str = ""
    """Digest of the plan it was packed for."""

    def dropped(self) -> dict[str, int]:
        """Returns reason to count."""
        return {left.reason: left.count for left in self.left_out}

    def bad(self) -> dict[str, int]:
        """Returns reason to count of what --max-bad is about: everything broken but single captions."""
        return {left.reason: left.count for left in self.left_out if left.kind == "bad"}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UnitReport":
        """The inverse of `to_dict`."""
        return cls(
            **{
                **values,
                "left_out": [Left(**each) for each in values["left_out"]],
                "shards": [ShardInfo(**each) for each in values["shards"]],
            }
        )


def pack_unit(unit: Unit, folder: Path, rules: PackRules, plan: str = "") -> UnitReport:
    """Writes a unit's shards and its report into the new folder `folder`, which appears whole or not at all.

    `plan` is the digest of the preparation's plan: the report of another preparation is none of this one's.
    Raises InputError that names the unit where the input cannot be read or the output not be written.
    """
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            report = dataclasses.replace(_Packer(unit, temporary, rules).run(), plan=plan)
            write_json(temporary / REPORT_NAME, report.to_dict())
    except OSError as error:
        raise InputError(
            f"{unit.name}: could not read it or write its shards to {folder.parent}: {error}; mend that (free space, "
            "permissions) and start again: inputs that are done are kept"
        ) from error
    return report


@lru_cache(maxsize=1)
def pos_parser(config: PosConfig) -> "PosParser":
    """Returns this process's parser: loading the language model takes a second."""
    from data_prep.parse_pos import PosParser  # with spaCy, which takes seconds that a wrong path need not wait for

    return PosParser(config)


class _Packer:
    """The work on one unit."""

    def __init__(self, unit: Unit, folder: Path, rules: PackRules):
        self.unit, self.folder, self.rules = unit, folder, rules
        self.left_out: Counter[tuple[str, Kind, bool]] = Counter()
        self.shards: list[ShardInfo] = []
        self.samples_listed = self.pairs_listed = self.resized = 0
        self._copies: Counter[str] = Counter()
        self._features: dict[str, dict[str, int]] = {}  # of samples that are not written yet

    def run(self) -> UnitReport:
        parser = None if self.rules.pos is None else pos_parser(self.rules.pos)
        samples = self._samples()
        with ExitStack() as open_shard:
            writer: ShardWriter | None = None
            while block := _next_block(samples):
                for sample in block if parser is None else with_objects(parser, block):
                    if writer is not None and self._is_full(writer, sample):
                        self._close(open_shard, writer)
                        writer = None
                    if writer is None:
                        name = f"{self.unit.split}-{len(self.shards):05d}.tar"
                        writer = open_shard.enter_context(ShardWriter(self.folder / name, self.unit.split))
                    writer.add(sample, self._features.pop(sample.key, None))
            if writer is not None:
                self._close(open_shard, writer)
        return UnitReport(
            name=self.unit.name,
            split=self.unit.split,
            samples_listed=self.samples_listed,
            samples_present=sum(shard.samples for shard in self.shards),
            pairs_listed=self.pairs_listed,
            pairs_present=sum(shard.captions for shard in self.shards),
            resized=self.resized,
            left_out=[
                Left(reason=reason, kind=kind, samples=count if is_sample else 0, count=count)
                for (reason, kind, is_sample), count in sorted(self.left_out.items())
            ],
            shards=self.shards,
            parser="" if parser is None else parser.version,
            state=self.unit.state,
        )

    def _is_full(self, writer: ShardWriter, following: Sample) -> bool:
        rules = self.rules
        return writer.samples == rules.shard_size or writer.bytes + len(following.image) > rules.shard_bytes

    def _close(self, open_shard: ExitStack, writer: ShardWriter) -> None:
        open_shard.close()
        self.shards.append(writer.info)

    def _samples(self) -> Iterator[Sample]:
        """Yields what is fit to be packed, and counts everything else."""
        for item in self.unit.read():
            if isinstance(item, Dropped):
                self.samples_listed += item.samples
                self.pairs_listed += item.pairs
                self._leave_out(item)
                continue
            self.samples_listed += 1
            self.pairs_listed += max(1, len(item.captions))
            sample = self._check(item)
            if isinstance(sample, Dropped):
                self._leave_out(sample)
            else:
                yield sample

    def _leave_out(self, dropped: Dropped) -> None:
        self.left_out[dropped.reason, dropped.kind, dropped.samples > 0] += max(1, dropped.samples)

    def _check(self, record: Record) -> Sample | Dropped:
        captions = self._wanted(record.captions)
        if not captions:
            only_filtered = any(caption.strip() for caption in record.captions)
            return Dropped(NO_CAPTION_FITS, "filtered") if only_filtered else Dropped(NO_CAPTION_LEFT)
        image = prepare_image(record.image, self.rules.images)
        if isinstance(image, Dropped):
            return image
        if not _fits_json(record.extra) or not _fits_json(record.url):
            return Dropped(BAD_EXTRA)
        features = {}
        if self.rules.perceptual_hash:
            try:
                features = {near.FEATURE: near.perceptual_hash(image.data)}
            except DecodeError as error:
                return Dropped(f"unreadable image ({error})")
        self.resized += image.resized
        key, sha256 = key_of(record.image)
        self._copies[key] += 1
        if self._copies[key] > 1:  # names in a tar are unique; the merge gives the final suffix
            key = f"{key}-{self._copies[key] - 1}"
        if features:
            self._features[key] = features
        return Sample(
            key=key,
            image=image.data,
            image_ext=image.ext,
            captions=captions,
            objects={},
            width=image.width,
            height=image.height,
            sha256=sha256,
            url=record.url,
            extra=record.extra,
        )

    def _wanted(self, captions: list[str]) -> list[str]:
        return [caption for caption in captions if self._is_wanted(caption)]

    def _is_wanted(self, caption: str) -> bool:
        length = len(caption.strip())
        if length == 0:
            fault = EMPTY_CAPTION
        elif length < self.rules.min_caption_chars:
            fault = SHORT_CAPTION
        elif self.rules.max_caption_chars and length > self.rules.max_caption_chars:
            fault = LONG_CAPTION
        elif not _is_unicode(caption):
            fault = NOT_UNICODE
        else:
            return True
        self.left_out[fault, "filtered", False] += 1
        return False


def _next_block(samples: Iterator[Sample]) -> list[Sample]:
    """Returns the samples that are parsed at once; where images are large, fewer."""
    block: list[Sample] = []
    size = 0
    while len(block) < _PARSED_AT_ONCE and size < _BYTES_AT_ONCE and (sample := next(samples, None)) is not None:
        block.append(sample)
        size += len(sample.image)
    return block


def with_objects(parser: "PosParser", block: list[Sample]) -> Iterator[Sample]:
    """Yields the samples with newly parsed objects beside those of other parsers."""
    parsed = iter(parser.parse([caption for sample in block for caption in sample.captions]))
    for sample in block:
        objects = {pos_config.NAME: list(itertools.islice(parsed, len(sample.captions)))}
        yield dataclasses.replace(sample, objects={**sample.objects, **objects})


def _fits_json(value: Any, depth: int = 0) -> bool:
    """Whether a value can be written as JSON and read back equal; much cheaper than to write it."""
    if isinstance(value, str):
        return value.isascii() or _is_unicode(value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        names = all(isinstance(name, str) and _fits_json(name) for name in value)
        return names and depth < _MAX_DEPTH and all(_fits_json(each, depth + 1) for each in value.values())
    if isinstance(value, list):
        return depth < _MAX_DEPTH and all(_fits_json(each, depth + 1) for each in value)
    return value is None or isinstance(value, int)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return False
    return True
