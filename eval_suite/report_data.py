"""What a report of evaluations is made from: results files, their galleries, and pictures. Used by eval_suite.report."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval_suite.gallery import MAX_PICTURE_BYTES, PICTURE_SIDE
from eval_suite.per_query import per_query_path
from eval_suite.results import GroupKey, Results, grouped, model_names
from setclip.decode import DecodeError
from setclip.errors import InputError
from setclip.log import warn
from setclip.manifest import open_split
from setclip.report import Picture, PictureBook, missing_picture, picture, small_jpeg


@dataclass(frozen=True)
class Entry:
    """One results file in a report."""

    path: Path
    results: Results
    name: str
    """The model, short."""
    series: int
    """1-based number of the model in the report, for its colour."""
    gallery: dict[str, Any] | None
    """Content of the gallery file that the results name; None where they name none or it is not there."""


@dataclass(frozen=True)
class Group:
    """Evaluations that may be compared: of one kind, on the same data."""

    evaluation: str
    dataset: str
    split: str
    counts: str
    entries: list[Entry]
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The models."""
        return [entry.name for entry in self.entries]


def results_files(places: Sequence[Path]) -> list[Path]:
    """Returns the results files at `places`: files as they are, of a folder all that it holds, sorted.

    A JSON file in a folder that is no results file is left out, and said. Raises InputError where nothing is found.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        inside = [path for path in sorted(place.glob("*.json")) if not path.name.endswith(".gallery.json")]
        for path in inside:
            if _looks_like_results(path):
                found.append(path)
            else:
                warn(f"leaving out {path}: no results file")
        if not any(path.parent == place for path in found):
            raise InputError(
                f"expected results files in {place}, found none among {len(inside)} JSON files; make one with "
                "`python -m eval_suite.zeroshot NAME` or `python -m eval_suite.retrieval NAME`"
            )
    unique: dict[Path, Path] = {}
    for path in found:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def newest_results_folder(runs_dir: Path) -> Path:
    """Returns the folder of the youngest results file under `runs_dir` (RUN/results/ or results/).

    Raises InputError that says what makes one.
    """
    found = [*runs_dir.glob("*/results/*.json"), *runs_dir.glob("results/*.json")]
    found = [path for path in found if not path.name.endswith(".gallery.json") and _looks_like_results(path)]
    if not found:
        raise InputError(
            f"expected results files in {runs_dir}/*/results/, found none; evaluate a model first "
            "(`python -m eval_suite.zeroshot NAME`, `python -m eval_suite.retrieval NAME`), or name results files"
        )
    return max(found, key=lambda path: (path.stat().st_mtime, str(path))).parent


def read_groups(paths: Sequence[Path]) -> list[Group]:
    """Returns the evaluations of results files, those that may be compared together, in their order."""
    results = [Results.load(path) for path in paths]
    groups_of = grouped(results)
    named = _without_steps(
        {key: model_names([results[place] for place in places]) for key, places in groups_of.items()}
    )
    series: dict[str, int] = {}
    groups = []
    for key, places in groups_of.items():
        names = named[key]
        entries, warnings = [], []
        for place, name in zip(places, names, strict=True):
            number = series.setdefault(name, len(series) + 1)
            gallery, warning = _gallery(paths[place], results[place])
            warnings += [warning] if warning else []
            entries.append(Entry(paths[place], results[place], name, number, gallery))
        groups.append(Group(*key, entries, warnings))
    return groups


def _without_steps(named: dict[GroupKey, list[str]]) -> dict[GroupKey, list[str]]:
    """Returns the names of models without their steps, unless two models of the report would then have one name."""
    full = {name for names in named.values() for name in names}
    short = {name: re.sub(r", step [\d,]+$", "", name) for name in full}
    if len(set(short.values())) < len(full):
        return named
    return {key: [short[name] for name in names] for key, names in named.items()}


def _gallery(path: Path, results: Results) -> tuple[dict[str, Any] | None, str]:
    name = results.details.get("gallery")
    if not isinstance(name, str):
        return None, ""
    place = path.with_name(name)
    if not place.is_file():
        return None, f"{path.name} names a gallery, {name}, which is not beside it; copy both"
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{place}: expected JSON, found {error}; evaluate again") from error
    if not isinstance(content, dict):
        raise InputError(f"{place}: expected a gallery file, found {type(content).__name__}; evaluate again")
    return content, ""


def per_query_of(entry: Entry) -> Path:
    """Returns the place of the file of queries that belongs to a results file, whether it is there or not."""
    named = entry.results.details.get("queries")
    return entry.path.with_name(named) if isinstance(named, str) else per_query_path(entry.path)


def _looks_like_results(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and {"evaluation", "metrics", "format_version"} <= set(content)


class Pictures:
    """Finds the small pictures of one evaluation: in its gallery file, else in its shards, else at their paths."""

    def __init__(self, entry: Entry, data: Path | None = None):
        """`data`: where shards or images lie now, if not where the evaluation found them."""
        self._gallery = entry.gallery or {}
        self._embedded: dict[str, str] = {}
        for source in (entry.results.details.get("pictures"), self._gallery.get("pictures")):
            self._embedded |= source if isinstance(source, dict) else {}
        told = (
            data,
            self._gallery.get("data"),
            entry.results.dataset.get("folder"),
            entry.results.dataset.get("place"),
        )
        self._places = [Path(str(place)) for place in told if place]
        self.place = self._places[0] if self._places else None
        self._split = self._gallery.get("split") or entry.results.dataset.get("split")
        self._book: PictureBook | None = None
        self._opened = False
        self._why_no_shards = ""
        self.missing: dict[str, str] = {}
        """Name of each picture that was asked for and not found, and why."""

    def find(self, name: str, alt: str) -> Picture:
        """Returns the picture of a key or path; a grey tile where there is none, which `missing` then holds."""
        if name in self._embedded:
            return Picture(f"data:image/jpeg;base64,{self._embedded[name]}", alt)
        try:
            data = self._read(name)
        except (OSError, KeyError) as error:
            self.missing[name] = str(error)
            return missing_picture(f"no picture here: {alt}")
        try:
            return picture(small_jpeg(data, PICTURE_SIDE, MAX_PICTURE_BYTES), "jpg", alt)
        except DecodeError as error:
            self.missing[name] = str(error)
            return missing_picture(f"no picture ({error}): {alt}", ("cannot be", "decoded"))

    def note(self) -> str:
        """Says how many pictures are missing and what would bring them; empty if none is."""
        if not self.missing:
            return ""
        number = len(self.missing)
        return (
            f"{number:,} {'picture is' if number == 1 else 'pictures are'} not shown: the results files hold no copies, "
            f"and {self.place or 'the place of the data'} does not have them on this machine"
            f"{f' ({self._why_no_shards})' if self._why_no_shards else ''}. Make the report where the data lie, or say "
            "with --data where they are."
        )

    def _read(self, name: str) -> bytes:
        for path in [*(place / name for place in self._places), Path(name)]:
            if path.is_file():
                return path.read_bytes()
        if not self._opened:
            self._opened = True
            if self.place is not None and self.place.exists():
                try:
                    self._book = PictureBook(open_split(self.place, self._split)[1])
                except InputError as error:
                    self._why_no_shards = str(error)
        if self._book is None:
            raise KeyError(name)
        return self._book.image(name)
