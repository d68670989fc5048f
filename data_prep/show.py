"""Shows some samples of a folder of shards: captions and objects in the terminal, pictures on a page.

    python -m data_prep.show DIR [--split test] [--number 24] [--object dog] [--seed 1] [--html FILE]

The samples are spread evenly over the shards; with a seed they are drawn; with an object they are the first (or drawn)
ones of which a caption names it.
"""

import difflib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.text import Text

from data_prep import cards
from data_prep.cards import Place
from setclip import report
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.hashing import permutation
from setclip.log import progress
from setclip.manifest import Manifest, check_shards
from setclip.objects import OBJECTS_NAME, ObjectTable
from setclip.shards import Sample, ShardInfo

_PAGE_NAME = "show.html"
_MOST_SUGGESTED_FROM = 20_000  # objects among which the nearest to a mistyped one is sought


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Shows some samples of a folder of shards."""

    folder: tyro.conf.Positional[Path]
    """Folder with shards and manifest.json."""
    split: str | None = None
    """Split to look at; by default all."""
    number: int = 12
    """Most samples to show."""
    object: str | None = None
    """Show samples of which a caption names this object ("teddy bear")."""
    seed: int | None = None
    """Draw the samples, other ones for each seed; by default they are spread evenly over the shards, or with --object
    the first."""
    html: Path | None = None
    """File for the page; by default show.html in the working directory (never in DIR)."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= 1_000:
            raise InputError(f"expected --number from 1 to 1,000, found {self.number}; choose fewer samples")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"expected --seed 0 or more, found {self.seed}; choose another")
        if self.html is not None and self.html.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"expected --html FILE.html, found {self.html}; choose a name that ends in .html")


def choose(folder: Path, shards: Sequence[ShardInfo], config: ShowConfig) -> list[Place]:
    """Returns the places of the samples that `config` asks for, in the order of the shards, at most `config.number`."""
    if config.object is not None:
        return _with_object(folder, shards, config.object, config.number, config.seed)
    if config.seed is not None:
        return cards.drawn_places(shards, config.number, config.seed)
    return cards.spread_places(shards, config.number)


def write_page(
    path: Path, title: str, chosen: Sequence[tuple[Place, Sample | None]], tables: dict[str, ObjectTable]
) -> None:
    """Writes the contact sheet."""
    sheet = [cards.card(place, sample, tables, note=_name(place, sample)) for place, sample in chosen]
    blocks = [report.sample_cards(sheet)]
    section = report.Section("samples", f"{len(sheet):,} samples", blocks)
    lead = "Pictures are made smaller here; captions and objects are those of the shards."
    report.write_page(path, report.Page(title=title, kicker="Setclip", lead=lead, sections=[section]))


def print_samples(chosen: Sequence[tuple[Place, Sample | None]], console: Console) -> None:
    """Prints keys, captions and objects; colours and emphasis only in a terminal."""
    for place, sample in chosen:
        if sample is None:
            console.print(Text(f"{_name(place, None)}: cannot be read; see python -m data_prep.verify", style="red"))
            continue
        console.print(Text(_name(place, sample), style="bold"))
        for number, caption in enumerate(sample.captions):
            console.print(Text(f"  {_one_line(caption)}"))
            for parser, lists in sample.objects.items():
                names = ", ".join(_one_line(name) for name in lists[number]) or "no object"
                console.print(Text(f"    {parser}: {names}", style="dim"))


def _with_object(folder: Path, shards: Sequence[ShardInfo], name: str, number: int, seed: int | None) -> list[Place]:
    ordered = list(shards)
    if seed is not None:
        ordered = [shards[place] for place in permutation(len(shards), seed)]
    found = []
    # Only as many shards are looked into as are needed.
    for shard in progress(ordered, description=f"looking for {name!r}", unit="shards"):
        places = [place for _, place in cards.places_with_objects(folder, [shard], None, [name])]
        places = list(dict.fromkeys(places))  # several parsers may have found it
        if seed is not None:
            places = [places[which] for which in permutation(len(places), seed, 1)]
        found += list(islice(places, number - len(found)))
        if len(found) >= number:
            break
    if not found:
        near = difflib.get_close_matches(name, _known_objects(folder), n=1)
        perhaps = f", perhaps {near[0]!r}" if near else ""
        raise InputError(
            f"expected samples with the object {name!r}, found none in {len(shards):,} shards{perhaps}; choose "
            f"a name as the parser writes it ({OBJECTS_NAME} has all of the counted split)"
        )
    position = {shard.name: place for place, shard in enumerate(shards)}
    return sorted(found, key=lambda place: (position[place.shard.name], place.row))


def _known_objects(folder: Path) -> list[str]:
    path = folder / OBJECTS_NAME
    if not path.exists():
        return []
    return pq.read_table(path, columns=["name"]).column("name").slice(0, _MOST_SUGGESTED_FROM).to_pylist()


def _page_path(folder: Path) -> Path:
    """Returns where the page goes if nothing is said: not among the data."""
    here = Path.cwd()
    if here.resolve().is_relative_to(folder.resolve()):
        here = Path(tempfile.mkdtemp(prefix="setclip-"))
    return here / _PAGE_NAME


def _name(place: Place, sample: Sample | None) -> str:
    where = f"{place.shard.name} row {place.row}"
    if sample is None:
        return where
    return f"{_one_line(sample.key)}  {sample.width} × {sample.height} {sample.image_ext}  {where}"


def _one_line(text: str) -> str:
    """Returns the text in one line, without what a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in
                   " ".join(text.split()))  # fmt: skip


def main() -> None:
    config = parse(ShowConfig, description=__doc__)
    manifest = Manifest.load(config.folder)
    shards = manifest.shards if config.split is None else manifest.of_split(config.split)
    places = choose(config.folder, shards, config)
    if not places:
        raise InputError(f"expected samples in {config.folder}, found none; prepare the shards again")
    check_shards(config.folder, list(dict.fromkeys(place.shard for place in places)))
    chosen = list(cards.read(config.folder, places))
    print_samples(chosen, Console(highlight=False, soft_wrap=True))
    parsers = sorted({parser for _, sample in chosen if sample is not None for parser in sample.objects})
    path = config.html or _page_path(config.folder)
    title = f"Samples: {manifest.source}" + (f" with “{config.object}”" if config.object else "")
    write_page(path, title, chosen, cards.object_tables(config.folder, parsers))
    print(f"pictures: {path.resolve()}")


if __name__ == "__main__":
    command(main)
