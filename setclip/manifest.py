"""manifest.json: what a folder of shards holds and how it came about. Written last, so its presence means "complete".

Data is addressed by the manifest, never by globbing or brace ranges. Used by every stage.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setclip.errors import InputError
from setclip.files import sha256_of, write_json
from setclip.log import say
from setclip.provenance import describe
from setclip.shards import Shard, ShardInfo

MANIFEST_NAME = "manifest.json"
WORK_NAME = ".parts"  # of the folder where a preparation keeps what is done until its merge
PARSING_NAME = ".parsing"  # of the folder that stands in for the manifest while data_prep.rewrite is at work
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    source: str
    shards: list[ShardInfo]
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason to the number of samples (or captions, where the reason says so) that were left out."""
    samples_listed: int = 0
    """Samples that the inputs hold or list: those in the shards and those that were dropped."""
    pairs_listed: int
    """Image–caption pairs that the source lists."""
    pairs_present: int
    """Pairs of these that are in the shards."""
    resized: int = 0
    """Images that were made smaller; the others have the bytes of the source."""
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an input to its numbers of samples listed and packed, and what was dropped there by reason; duplicates
    are found later, over all inputs, and are in `dropped` alone."""
    warnings: list[str] = field(default_factory=list)
    """What is odd about the inputs as a whole."""
    config: dict[str, Any] = field(default_factory=dict)
    parsers: dict[str, str] = field(default_factory=dict)
    """Parser name to its version, that of the normaliser included."""
    credits: list[str] = field(default_factory=list)
    plan: str = ""
    """Digest of the settings and inputs: the same preparation started again finds itself complete."""
    provenance: dict[str, Any] = field(default_factory=describe)
    format_version: int = FORMAT_VERSION

    @property
    def splits(self) -> list[str]:
        """The splits, in the order in which they first occur."""
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def of_split(self, split: str) -> list[ShardInfo]:
        """Returns the shards of one split. Raises InputError if there are none."""
        found = [shard for shard in self.shards if shard.split == split]
        if not found:
            raise InputError(f"expected shards of split {split!r}, found splits {self.splits}; choose one with --split")
        return found

    def totals(self) -> dict[str, dict[str, int]]:
        """Returns split to its number of shards, samples, captions and bytes."""
        return {
            split: {
                "shards": len(self.of_split(split)),
                **{
                    name: sum(getattr(s, name) for s in self.of_split(split))
                    for name in ("samples", "captions", "bytes")
                },
            }
            for split in self.splits
        }

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/manifest.json."""
        write_json(Path(folder) / MANIFEST_NAME, {**dataclasses.asdict(self), "totals": self.totals()})

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Reads `folder`/manifest.json. Raises InputError that says what to do where it is missing or not ours."""
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not path.exists():
            if not folder.exists():
                found = "no such folder"
            elif (folder / PARSING_NAME).exists():
                raise InputError(
                    f"expected shards with a manifest at {path}, found an unfinished parse; start it again: "
                    f"`{_parsing_command(folder)}`"
                )
            elif (folder / WORK_NAME).exists():
                raise InputError(
                    f"expected shards with a manifest at {path}, found an unfinished preparation; start its "
                    f"`python -m data_prep.run` again, or after all parts `python -m data_prep.merge {folder}`"
                )
            elif tars := sorted(folder.glob("*.tar")):
                found = f"{len(tars)} tars without a manifest (an interrupted or foreign preparation)"
            else:
                found = "no shards"
            raise InputError(
                f"expected shards with a manifest at {path}, found {found}; make them with "
                f"`python -m data_prep.run SOURCE --out {folder}`"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: expected a Setclip manifest, found {error}; prepare the shards again") from error
        return cls.from_json(content, path)

    @classmethod
    def from_json(cls, content: Any, path: Path | str) -> "Manifest":
        """Returns the manifest of its JSON. `path` is for the message of the InputError where it is not ours."""
        try:
            if content.get("format_version") != FORMAT_VERSION:
                raise InputError(
                    f"{path}: expected format_version {FORMAT_VERSION}, found {content.get('format_version')!r}; "
                    "prepare the shards again with this version"
                )
            content = {name: value for name, value in content.items() if name != "totals"}
            content["shards"] = [ShardInfo(**shard) for shard in content["shards"]]
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: expected a Setclip manifest, found {error}; prepare the shards again") from error

    def identity(self) -> dict[str, Any]:
        """Returns what checkpoints and reports carry of the data: source, counts, and a digest over the shards."""
        digest = hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()[:16]
        return {
            "source": self.source,
            "digest": digest,
            "pairs_listed": self.pairs_listed,
            "pairs_present": self.pairs_present,
            "totals": self.totals(),
            "parsers": self.parsers,
            "credits": self.credits,
        }


def check_shards(folder: str | Path, shards: list[ShardInfo], checksums: bool = False) -> None:
    """Checks that the tars and indices that a manifest names are there, as large as it says and with as many samples.

    Takes milliseconds a shard; with `checksums` it reads all bytes. Raises InputError that names every shard at fault
    (the first ten).
    """
    faults = []
    for shard in shards:
        path = Path(folder) / shard.name
        if not path.exists():
            faults.append(f"{shard.name}: missing")
        elif path.stat().st_size != shard.bytes:
            faults.append(f"{shard.name}: {path.stat().st_size} bytes, manifest says {shard.bytes}")
        elif not path.with_suffix(".idx").exists():
            faults.append(f"{path.with_suffix('.idx').name}: missing")
        elif len(Shard(path)) != shard.samples:
            faults.append(f"{shard.name}: {len(Shard(path))} samples in its index, manifest says {shard.samples}")
        elif checksums and sha256_of(path) != shard.sha256:
            faults.append(f"{shard.name}: checksum differs from the manifest's")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(
            f"{Path(folder) / MANIFEST_NAME} does not fit the tars: {'; '.join(faults[:10])}{more}. "
            "Copy the folder again, or prepare it again"
        )


def open_split(
    folder: str | Path, split: str | None = None, prefer: tuple[str, ...] = ("test", "dev", "val")
) -> tuple[str, list[Shard]]:
    """Returns (split, its shards), after checking that they fit the manifest.

    Without `split` the first of `prefer` that is there is taken, or else the only one; which one is said.
    """
    manifest = Manifest.load(folder)
    if split is None:
        split = next((name for name in prefer if name in manifest.splits), None)
        if split is None and len(manifest.splits) == 1:
            split = manifest.splits[0]
        if split is None:
            raise InputError(f"{folder} has splits {manifest.splits}; choose one with --split")
        say(f"split {split!r} of {folder} (it has {', '.join(manifest.splits)})")
    infos = manifest.of_split(split)
    check_shards(folder, infos)
    return split, [Shard(Path(folder) / info.name) for info in infos]


def _parsing_command(folder: Path) -> str:
    """Returns what goes on with an unfinished parse, as it wrote that down (`data_prep.rewrite`)."""
    path = folder / PARSING_NAME / "begun.json"
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return begun.get("command", f"python -m data_prep.parse {folder}")
