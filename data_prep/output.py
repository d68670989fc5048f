"""The output folder: claimed before anything is written, cleared on --overwrite of what an earlier run wrote, no more.

Used by `data_prep.run`. A journal in the folder lists what a run is going to write; it goes away when the manifest,
which lists the same, is there. So an interrupted run can be cleared as exactly as a complete one.
"""

import json
from pathlib import Path

from data_prep.plan import Plan
from setclip.errors import InputError
from setclip.files import write_json
from setclip.manifest import MANIFEST_NAME
from setclip.objects import OBJECTS_NAME

JOURNAL_NAME = ".preparing.json"

_PICTURES = "*/[0-9][0-9][0-9]*.jpg"  # of a folder of class directories


def claim(out: Path, plan: Plan, overwrite: bool) -> None:
    """Makes `out` if need be, clears it if asked to, and notes what is going to be written.

    Raises InputError if it holds anything and `overwrite` is not given, or if a file that is not ours is in the way;
    nothing is removed then.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"expected a folder at {out}, found a file; choose another --out")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            names = sorted(path.name for path in out.iterdir())
            raise InputError(
                f"expected an empty folder at {out}, found {len(names)} entries ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}); choose another --out, or give --overwrite True to replace what an "
                "earlier preparation wrote there"
            )
        files, class_folders = _written_before(out)
        strangers = [name for name in _targets(plan) if (out / name).exists() and name not in files | class_folders]
        strangers += [str(p.relative_to(out)) for name in class_folders for p in _strangers_in(out / name)]
        if strangers:
            raise InputError(
                f"expected {out} to be free for what will be written, found {strangers[0]}, which no preparation of ours "
                "lists; move it away or choose another --out"
            )
        _clear(out, files, class_folders)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JOURNAL_NAME, {"files": _targets(plan), "class_folders": list(plan.folders)})


def release(out: Path) -> None:
    """Removes the journal, once the manifest is there."""
    (out / JOURNAL_NAME).unlink()


def _targets(plan: Plan) -> list[str]:
    tars = [shard.name for shard in plan.shards]
    indices = [str(Path(name).with_suffix(".idx")) for name in tars]
    return [MANIFEST_NAME, OBJECTS_NAME, *tars, *indices, *plan.folders]


def _written_before(out: Path) -> tuple[set[str], set[str]]:
    """Returns names of files and of class folders that earlier runs list as theirs."""
    files: set[str] = set()
    class_folders: set[str] = set()
    for name in (MANIFEST_NAME, JOURNAL_NAME):
        if not (out / name).exists():
            continue
        try:
            content = json.loads((out / name).read_text(encoding="utf-8"))
            tars = [shard["name"] for shard in content.get("shards", [])]
            indices = [str(Path(tar).with_suffix(".idx")) for tar in tars]
            folders = content.get("class_folders", content.get("config", {}).get("class_folders", []))
            listed = {OBJECTS_NAME, *tars, *indices, *content.get("files", [])}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"expected the list of an earlier preparation in {out / name}, found {error}; remove the folder yourself"
            ) from error
        # Names only: a list from elsewhere must not reach outside the folder.
        files |= {Path(path).name for path in listed} | {name}
        class_folders |= {Path(path).name for path in folders}
    return files - class_folders, class_folders


def _strangers_in(folder: Path) -> list[Path]:
    """Returns what lies in a folder of class directories and is not one of our pictures."""
    ours = set(folder.glob(_PICTURES))
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours)


def _clear(out: Path, files: set[str], class_folders: set[str]) -> None:
    for name in class_folders:
        for picture in (out / name).glob(_PICTURES):
            picture.unlink()
        for path in [*(out / name).glob("*/"), out / name]:
            if path.is_dir():
                path.rmdir()
    for partial in out.glob(".*.partial.*"):  # of a run that was killed while it wrote
        partial.unlink()
    lists = {MANIFEST_NAME, JOURNAL_NAME}
    for name in [*sorted(files - lists), *sorted(files & lists)]:  # the lists last: killed here, one can start again
        (out / name).unlink(missing_ok=True)
