"""Which text a picture is paired with: its caption, a prompt that names one of its objects, or how one of them looks.

AlignCLIP (Zhang, Yan, Ding, ACM MM 2024) trains on these three domains so that classes can be told by prompts and by
descriptions alike. How it draws them is not known to us: the shares, the choice of the object and the sets of the text's
side are settings. By default every text is the caption. Used by the loader, which draws, and by the plan, which checks.

A draw depends on three whole numbers, which the loader makes of (seed, epoch, key). What the workers look up is kept in a
few arrays, which forked processes share.
"""

import dataclasses
import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_suite.datasets import TEMPLATES
from pretrain.sources import Sources
from setclip.descriptions import DESCRIPTIONS_NAME, DescriptionTable, read_descriptions
from setclip.errors import InputError
from setclip.objects import ObjectTable, object_id, read_objects

Domain = Literal["caption", "prompt", "description", "fallback"]
"""Of a text; "fallback" is the caption where the domain that was drawn has no text for it."""

_WAYS = {"tail": "rarer ones preferred, by 1/captions", "uniform": "all alike"}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text domains: what a picture is paired with. The caption takes what prompt and description leave."""

    prompt: float = 0.0
    """Share of texts that are a prompt with an object of the caption; AlignCLIP as reconstructed: 0.25."""
    description: float = 0.0
    """Share of texts that describe an object of the caption; AlignCLIP as reconstructed: 0.25."""
    choose: Literal["tail", "uniform"] = "tail"
    """Which of the caption's objects: one by 1/captions that name it, or any."""
    objects: Literal["caption", "own"] = "caption"
    """The set of the text's side in the loss: the caption's, or only the object that prompt or description name."""
    templates: Literal["imagenet", "simple"] = "imagenet"
    """Of prompts: the 80 that CLIP has for ImageNet, or 7 of them."""
    descriptions: Path | None = None
    """descriptions.parquet; None: the one in the folder of the shards. Those with flags are not used."""

    def __post_init__(self) -> None:
        for name in ("prompt", "description"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"text.{name} must be a share from 0 to 1, found {getattr(self, name)}")
        if self.prompt + self.description > 1 + 1e-9:
            raise ValueError(
                "text.prompt and text.description must be at most 1 together (captions take the rest), found "
                f"{self.prompt} + {self.description} = {self.prompt + self.description:g}"
            )

    @property
    def caption(self) -> float:
        """Share of texts that are captions, without those that others fall back to."""
        return max(0.0, 1 - self.prompt - self.description)

    @property
    def is_caption_only(self) -> bool:
        """Whether no other domain is drawn."""
        return not (self.prompt or self.description)

    def used(self) -> dict[str, Any]:
        """Returns the settings that decide what is drawn."""
        names = {"prompt", "description"}
        if not self.is_caption_only:
            names |= {"choose", "objects"}
        if self.prompt:
            names.add("templates")
        if self.description:
            names.add("descriptions")
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name in names}

    def ignored(self) -> dict[str, object]:
        """Returns the settings that differ from their defaults though they decide nothing."""
        values = {entry.name: (getattr(self, entry.name), entry.default) for entry in dataclasses.fields(self)}
        used = self.used()
        return {name: value for name, (value, default) in values.items() if name not in used and value != default}


@dataclass(frozen=True)
class DrawnText:
    """What one picture is paired with."""

    text: str
    objects: Sequence[str]
    """Of the text's side."""
    domain: Domain


@dataclass(frozen=True, eq=False)
class Counts:
    """How many captions name each object."""

    ids: NDArray[np.int64]
    """(V,) ascending"""
    counts: NDArray[np.int64]
    """(V,) ≥ 1"""

    @classmethod
    def of(cls, table: ObjectTable) -> "Counts":
        """Returns the counts of a corpus."""
        order = np.argsort(table.ids)
        return cls(table.ids[order], np.maximum(table.counts[order], 1))

    def __getitem__(self, name: str) -> int:
        """Returns the captions that name an object; 1 for one that the statistics do not hold."""
        row = _find(self.ids, name)
        return 1 if row is None else int(self.counts[row])

    @property
    def digest(self) -> str:
        """16 hex digits of all of them."""
        return hashlib.blake2b(self.ids.tobytes() + self.counts.tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Descriptions:
    """The descriptions that are drawn from: those that there are, without flags."""

    ids: NDArray[np.int64]
    """(R,) ascending"""
    texts: pa.Array
    """(R,) strings"""
    digest: str
    """16 hex digits of all names and texts."""

    @classmethod
    def of(cls, table: DescriptionTable) -> "Descriptions":
        """Returns the usable ones of a table."""
        rows = sorted((object_id(row.name), row.name, row.text) for row in table.rows if row.text and not row.flags)
        hashed = hashlib.blake2b(digest_size=8)
        for _, name, text in rows:
            hashed.update(f"{name}\0{text}\0".encode())
        texts = pa.array([text for _, _, text in rows], pa.large_string())
        return cls(np.array([identity for identity, _, _ in rows], np.int64), texts, hashed.hexdigest())

    def __contains__(self, name: str) -> bool:
        return _find(self.ids, name) is not None

    def __getitem__(self, name: str) -> str:
        """Returns the description of an object that has one."""
        row = _find(self.ids, name)
        if row is None:
            raise KeyError(name)
        return self.texts[row].as_py()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class TextDomains:
    """Draws texts. Handed to the loader's workers as it is."""

    config: TextConfig
    counts: Counts | None = None
    """Needed where the choice prefers the tail"""
    descriptions: Descriptions | None = None
    """Needed where descriptions are drawn"""
    notes: tuple[str, ...] = ()
    """What is told of them before the first step"""

    def draw(self, caption: str, objects: Sequence[str], numbers: Sequence[int]) -> DrawnText:
        """Returns the text of a pair. `objects`: the caption's; `numbers`: three independent ones of 64 bits."""
        domain = self._domain(_unit(numbers[0]))
        if domain == "caption":
            return DrawnText(caption, objects, "caption")
        names = sorted(set(objects))
        if domain == "description":
            assert self.descriptions is not None
            names = [name for name in names if name in self.descriptions]
        if not names:
            return DrawnText(caption, objects, "fallback")
        name = self._choose(names, _unit(numbers[1]))
        if domain == "prompt":
            templates = TEMPLATES[self.config.templates]
            text = templates[int(_unit(numbers[2]) * len(templates))].replace("{}", name)
        else:
            text = f"{name}. {self.descriptions[name]}"  # type: ignore[index]
        return DrawnText(text, [name] if self.config.objects == "own" else objects, domain)

    @property
    def course(self) -> dict[str, Any]:
        """What fixes the texts of a run: settings, and digests of what is drawn from."""
        course = self.config.used()
        if self.descriptions is not None:
            course["descriptions"] = self.descriptions.digest  # rather than where they lie
        if self.config.choose == "tail" and self.counts is not None:
            course["counts"] = self.counts.digest
        return course

    def _domain(self, share: float) -> Domain:
        if share < self.config.prompt:
            return "prompt"
        return "description" if share < self.config.prompt + self.config.description else "caption"

    def _choose(self, names: Sequence[str], share: float) -> str:
        if len(names) == 1:
            return names[0]
        if self.config.choose == "uniform":
            return names[int(share * len(names))]
        assert self.counts is not None
        bounds = list(accumulate(1 / self.counts[name] for name in names))
        return names[min(bisect_right(bounds, share * bounds[-1]), len(names) - 1)]


def make_text_domains(config: TextConfig, folder: Path | Sources, parser: str) -> TextDomains | None:
    """Returns what draws the texts of a run on the shards of a folder or sources; None where all of them are captions.

    `parser`: whose objects the run uses. Raises InputError where descriptions or counts are missing or do not fit.
    """
    if config.is_caption_only:
        return None
    path = config.descriptions or Path(DESCRIPTIONS_NAME)
    if config.description and config.descriptions is None:
        path = folder / DESCRIPTIONS_NAME if isinstance(folder, Path) else folder.file(DESCRIPTIONS_NAME)
    described = read_descriptions(path) if config.description else None  # first: it is what may not have been made
    table = None
    if config.choose == "tail" or config.description:
        table = read_objects(folder, parser) if isinstance(folder, Path) else folder.objects(parser)
    parts = [f"{100 * config.caption:g}% captions"]
    if config.prompt:
        parts.append(f"{100 * config.prompt:g}% prompts ({len(TEMPLATES[config.templates])} templates)")
    descriptions: Descriptions | None = None
    remarks: list[str] = []
    if described is not None and table is not None:
        descriptions, remarks = _usable(described, path, table)
        parts.append(f"{100 * config.description:g}% descriptions (of {len(descriptions):,} objects)")
    sets = "the caption's object set" if config.objects == "caption" else "a set of their one object"
    head = f"texts: {', '.join(parts)}; objects: {_WAYS[config.choose]}; prompts and descriptions have {sets}"
    counts = Counts.of(table) if config.choose == "tail" and table is not None else None
    return TextDomains(config, counts, descriptions, (head, *remarks))


def text_shares(domains: Sequence[Domain]) -> dict[str, float]:
    """Returns the shares of a batch's texts: captions, prompts and descriptions, and captions that others fell back to.

    The first three make 1 together; the last is a part of the captions.
    """
    found = Counter(domains)
    found["caption"] += found["fallback"]
    return {f"text_{name}": found[name] / max(1, len(domains)) for name in get_args(Domain)}


def _usable(table: DescriptionTable, path: Path, objects: ObjectTable) -> tuple[Descriptions, list[str]]:
    """Returns the descriptions that can be drawn, and notes on the others."""
    usable = Descriptions.of(table)
    flags = Counter(flag for row in table.rows if row.text for flag in row.flags)
    empty = sum(not row.text for row in table.rows)
    told = ", ".join(f"{flag}: {number:,}" for flag, number in flags.most_common())
    fit = int(np.isin(objects.ids, usable.ids).sum())
    if not fit:
        raise InputError(
            f"expected descriptions of objects of parser {objects.parser!r} in {path}, found {len(usable):,} that can be used "
            f"of {len(table.rows):,} (parser {table.parser!r}; {empty:,} empty; flags: {told or 'none'}), none of them of one of "
            f"the {len(objects.names):,} objects of the shards; make them with `python -m data_prep.describe DIR --model MODEL "
            f"--objects {objects.parser}`, or leave --text.description at 0"
        )
    notes = []
    if left := len(table.rows) - len(usable):
        notes.append(
            f"note: {left:,} of {len(table.rows):,} descriptions are not used: {empty:,} are empty, {left - empty:,} have a flag"
            + (f" ({told})" if told else "")
        )
    if table.parser and table.parser != objects.parser:
        notes.append(
            f"note: the descriptions are of objects of {table.parser!r}; {fit:,} of them are objects of {objects.parser!r} too"
        )
    return usable, notes


def _find(ids: NDArray[np.int64], name: str) -> int | None:
    """Returns the row of an object among ascending ids, or None."""
    identity = object_id(name)
    row = bisect_left(ids, identity)
    return row if row < len(ids) and ids[row] == identity else None


def _unit(number: int) -> float:
    """Returns a number of 64 bits as one in [0, 1), of its upper 53 bits."""
    return (number >> 11) * 2.0**-53
