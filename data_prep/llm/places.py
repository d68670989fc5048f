"""Where questions and answers lie beside shards, and whose they are. Used by the commands that ask, and by the report.

DIR/llm/MODEL/KIND/part-00000-of-00004/first/    of one task: requests.jsonl, answers.jsonl; second/ likewise
"""

import re
from pathlib import Path

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
    found = sorted({int(path.name.rsplit("-", 1)[1]) for path in base.glob("part-*-of-*")} - {parts})
    if found:
        raise InputError(
            f"expected the answers of {parts} part{'s' * (parts > 1)} in {base}, found those of {found[0]}; go on with --parts "
            f"{found[0]}, or remove that folder to ask all anew"
        )


def begun_parts(base: Path) -> int | None:
    """Returns the number of parts that the answers in `base` were begun with; None where there are none."""
    return next((int(path.name.rsplit("-", 1)[1]) for path in sorted(base.glob("part-*-of-*"))), None)


def is_mine(identity: str, part: int, parts: int) -> bool:
    """Whether a request id is of this part."""
    return int(identity, 16) % parts == part


def model_name(model: str) -> str:
    """Returns how a model is called in versions and tables: a folder by its own name, as it may lie anywhere."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def folder_of(shards: Path, model: str, kind: str) -> Path:
    """Returns where questions of one kind to one model are kept."""
    return shards / FOLDER / re.sub(r"[^A-Za-z0-9._-]+", "--", model_name(model)) / kind
