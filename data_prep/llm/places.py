"""Where questions and answers lie beside shards, whose they are, and whether those of all parts fit together.

DIR/llm/MODEL/KIND/part-00000-of-00004/first/    of one task: requests.jsonl, answers.jsonl; second/ likewise

Used by the commands that ask, and by the report.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setclip.errors import InputError

FOLDER = "llm"  # in a folder of shards
OBJECT_RESULTS_NAME = "objects.arrow"
OBJECT_ACCOUNT_NAME = "objects.json"
DESCRIPTION_ACCOUNT_NAME = "descriptions.json"


def part_folder(base: Path, part: int, parts: int) -> Path:
    """Returns the folder of one task's questions and answers."""
    return base / f"part-{part:05d}-of-{parts:05d}"


def check_parts(base: Path, parts: int) -> None:
    """Raises InputError where the answers were begun with another number of parts: their ids are dealt out otherwise."""
    if found := sorted(_begun(base) - {parts}):
        raise InputError(
            f"expected the answers of {parts} part{'s' * (parts > 1)} in {base}, found those of {found[0]}; go on with --parts "
            f"{found[0]}, or remove that folder to ask all anew"
        )


def begun_parts(base: Path, model: str) -> int:
    """Returns the number of parts that the answers in `base` were begun with. Raises InputError where there are none."""
    if not (found := _begun(base)):
        raise InputError(
            f"expected answers of {model} in {base}, found none; ask first: the same command without --merge"
        )
    return min(found)


def _begun(base: Path) -> set[int]:
    """Returns the numbers of parts by which answers or results were made; a start that failed leaves neither."""
    made = (file for pattern in ("*/answers.jsonl", "*.parquet") for file in base.glob(f"part-*-of-*/{pattern}"))
    folders = {file.relative_to(base).parts[0] for file in made if file.stat().st_size > 0}
    return {int(name.rsplit("-", 1)[1]) for name in folders}


def finished_parts(base: Path, parts: int, name: str) -> list[Path]:
    """Returns the file `name`, which is written last, of each part. Raises InputError where some have none."""
    paths = [part_folder(base, part, parts) / name for part in range(parts)]
    missing = [str(part) for part, path in enumerate(paths) if not path.exists()]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise InputError(
            f"expected the answers of all {parts} parts in {base}, found none of part {', '.join(missing[:10])}{more}; start "
            f"these again with --part and --parts {parts}, then merge"
        )
    return paths


def check_alike(base: Path, notes: Sequence[Mapping[str, Any]], version: str) -> None:
    """Raises InputError where a part was checked as another `version`, or asked with other settings than part 0."""
    for part, note in enumerate(notes):
        if note["version"] != version:
            raise InputError(
                f"expected answers that were checked as {version}, found those of part {part} checked as "
                f"{note['version']}; start each part again with the same flags (what is answered is not asked again), then "
                "merge"
            )
        different = [name for name in note if note[name] != notes[0][name]]
        if different:
            raise InputError(
                f"expected all parts to be asked with the same settings, found in part {part} "
                + ", ".join(f"{name} {note[name]} (part 0: {notes[0][name]})" for name in different)
                + f"; start that part again with those of part 0 (where its answers are others, remove "
                f"{part_folder(base, part, len(notes))} first), then merge"
            )


def is_mine(identity: str, part: int, parts: int) -> bool:
    """Whether a request id is of this part."""
    return int(identity, 16) % parts == part


def model_name(model: str) -> str:
    """Returns how a model is called in versions and tables: a folder by its own name, as it may lie anywhere."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def folder_of(shards: Path, model: str, kind: str) -> Path:
    """Returns where questions of one kind to one model are kept."""
    return shards / FOLDER / re.sub(r"[^A-Za-z0-9._-]+", "--", model_name(model)) / kind
