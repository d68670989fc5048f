"""The output folder: claimed before anything is written, gone on with after a kill, cleared of what is ours and no more.

Used by `data_prep.run` and `data_prep.merge`. While a preparation runs, `OUT/.parts` holds its plan and one folder per
unit that is done; the merge makes the shards of `OUT` from them, writes the manifest last and removes `.parts`. So a
manifest means "complete", and `.parts` means "go on".
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from data_prep.pack import REPORT_NAME, UnitReport
from setclip.errors import InputError
from setclip.files import remove_partial, write_json
from setclip.log import warn
from setclip.manifest import MANIFEST_NAME, WORK_NAME
from setclip.objects import OBJECTS_NAME

REPORT_PAGE = "report.html"

_PLAN_NAME = "plan.json"
_TARGETS_NAME = "targets.json"
_SHARD = re.compile(r"[A-Za-z0-9_]+-\d{5}\.(tar|idx)")
_PICTURES = "*/[0-9][0-9][0-9]*.jpg"  # of a folder of class directories

State = Literal["new", "unfinished", "complete"]


def claim(out: Path, plan: dict[str, Any], overwrite: bool) -> State:
    """Makes `out` if need be, clears it if asked to, and keeps `plan` (plain JSON values) in it.

    Returns whether the folder was free, holds the same preparation unfinished, or holds it complete. Raises InputError
    if it holds anything else and `overwrite` is not given, or if a file that is not ours is in the way; nothing is
    removed then.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"expected a folder at {out}, found a file; choose another --out")
    found = sorted(path.name for path in out.iterdir() if ".partial" not in path.name) if out.exists() else []
    # Other jobs of the same preparation may be claiming at this moment: a work folder without work is no stranger.
    is_free = not found or (found == [WORK_NAME] and not any(p.name[0] != "." for p in (out / WORK_NAME).iterdir()))
    if not overwrite:
        if MANIFEST_NAME in found and _planned(out) == digest(plan):
            return "complete"
        if MANIFEST_NAME not in found and (out / WORK_NAME / _PLAN_NAME).exists():
            _check_same(out, plan)
            return "unfinished"
        if not is_free:
            what = "a complete preparation of other data or settings" if MANIFEST_NAME in found else "entries"
            raise InputError(
                f"expected an empty folder at {out}, found {what} ({', '.join(found[:3])}"
                f"{', …' if len(found) > 3 else ''}; {len(found)} in all); choose another --out, or give --overwrite True to "
                "replace what an earlier preparation wrote there"
            )
    elif (out / WORK_NAME).exists():
        with locked(out):
            _clear_for(out, plan["class_folders"])
    elif not is_free:
        _clear_for(out, plan["class_folders"])
    (out / WORK_NAME).mkdir(parents=True, exist_ok=True)
    write_json(out / WORK_NAME / _PLAN_NAME, plan)
    return "new"


@contextlib.contextmanager
def locked(out: Path, part: int = 0, parts: int = 1) -> Iterator[None]:
    """Keeps other jobs from this part of the work; where it is the only part, or a merge, from all of it.

    Raises InputError where another job is at it. Where the file system knows no locks, that is said.
    """
    work = out / WORK_NAME
    wanted = [(work / ".all.lock", fcntl.LOCK_SH if parts > 1 else fcntl.LOCK_EX)]
    if parts > 1:
        wanted.append((work / f".of-{parts}.lock", fcntl.LOCK_SH))
        wanted.append((work / f".part-{part}-of-{parts}.lock", fcntl.LOCK_EX))
        # Jobs that deal the inputs out otherwise would do some of ours.
        wanted += [(path, fcntl.LOCK_EX) for path in work.glob(".of-*.lock") if path.name != f".of-{parts}.lock"]
    with contextlib.ExitStack() as descriptors:  # closing them unlocks, and so does the end of the process
        for path, kind in wanted:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            descriptors.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"expected no other job at this part of {out}, found one at work; wait for it, or give each job a "
                    "--part of its own (a job without --part, and a merge, need the folder for themselves)"
                ) from error
            except OSError as error:
                warn(f"{path} cannot be locked ({error}): see to it that no two jobs do the same part")
        yield


def read_plan(out: Path) -> dict[str, Any]:
    """Returns the plan of an unfinished preparation. Raises InputError if there is none in `out`."""
    path = out / WORK_NAME / _PLAN_NAME
    if not path.exists():
        raise InputError(
            f"expected an unfinished preparation in {out}, found no {path}; start one with "
            f"`python -m data_prep.run SOURCE --out {out}`"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def unit_folder(out: Path, number: int) -> Path:
    """Returns the folder of one unit's shards while the preparation runs."""
    return out / WORK_NAME / f"{number:06d}"


def unit_report(out: Path, number: int, plan: str) -> UnitReport | None:
    """Returns the report of a unit, or None where it is not done for the preparation with this digest."""
    path = unit_folder(out, number) / REPORT_NAME
    if not path.exists():
        return None
    report = UnitReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return report if report.plan == plan else None


def clear_unfinished(out: Path, number: int) -> None:
    """Removes what a killed process left of a unit."""
    remove_partial(out / WORK_NAME, f"{number:06d}")


def class_folder(out: Path, name: str) -> Path:
    """Returns where a folder of class directories lies while the preparation runs."""
    return out / WORK_NAME / name


def digest(plan: dict[str, Any]) -> str:
    """Returns a short hash of a plan, by which a complete folder is known again."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def announce(out: Path, files: Iterable[str], class_folders: Iterable[str]) -> None:
    """Keeps the names that the merge is going to write into `out`, so that --overwrite knows them as ours.

    Removes what an earlier merge wrote that was stopped, where this one does not write it.
    """
    path = out / WORK_NAME / _TARGETS_NAME
    names = list(files)
    if path.exists():
        for name in set(json.loads(path.read_text(encoding="utf-8"))["files"]) - set(names):
            (out / Path(name).name).unlink(missing_ok=True)
    write_json(path, {"files": names, "class_folders": list(class_folders)})


def release(out: Path) -> None:
    """Removes the work folder, once the manifest is there, and what killed processes left."""
    if (out / WORK_NAME).exists():
        # As one: half a work folder would look like one with other inputs done.
        os.replace(out / WORK_NAME, out / f"{WORK_NAME}.{secrets.token_hex(6)}.partial")
    remove_partial(out)


def is_complete(out: Path) -> bool:
    """Whether the manifest is there and no other preparation was begun since; then nothing but `release` is left."""
    if not (out / MANIFEST_NAME).exists():
        return False
    return not (out / WORK_NAME / _PLAN_NAME).exists() or _planned(out) == digest(read_plan(out))


def _planned(out: Path) -> Any:
    """Returns the digest of the plan that the manifest carries, or None where it is not one of ours."""
    try:
        return json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8")).get("plan")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        return None


def _check_same(out: Path, plan: dict[str, Any]) -> None:
    begun = read_plan(out)
    if begun == plan:
        return
    differences = [name for name in plan.keys() | begun.keys() if plan.get(name) != begun.get(name)]
    details = []
    for name in sorted(differences):
        old, new = begun.get(name), plan.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            details += [f"{key} {old.get(key)!r}, now {new.get(key)!r}" for key in changed]
        elif isinstance(old, list) and isinstance(new, list):
            details.append(f"{len(old)} {name}, now {len(new)}" + (" (others)" if len(old) == len(new) else ""))
        else:
            details.append(f"{name} {old!r}, now {new!r}")
    raise InputError(
        f"expected to go on with the preparation in {out}, which was begun with {'; '.join(details[:5])}. Start it with "
        "the same settings and inputs, choose another --out, or give --overwrite True to begin anew"
    )


def _clear_for(out: Path, class_folders: list[str]) -> None:
    files, folders = _written_before(out)
    targets = {MANIFEST_NAME, OBJECTS_NAME, REPORT_PAGE, *class_folders}
    strangers = [
        path.name
        for path in sorted(out.iterdir())
        if (path.name in targets or _SHARD.fullmatch(path.name)) and path.name not in files | folders
    ]
    strangers += [str(p.relative_to(out)) for name in sorted(folders) for p in _strangers_in(out / name)]
    if strangers:
        raise InputError(
            f"expected {out} to be free for what will be written, found {strangers[0]}, which no preparation of ours "
            "lists; move it away or choose another --out"
        )
    _clear(out, files, folders)


def _written_before(out: Path) -> tuple[set[str], set[str]]:
    """Returns names of files and of class folders that earlier runs list as theirs."""
    files: set[str] = set()
    class_folders: set[str] = set()
    for path in (out / MANIFEST_NAME, out / WORK_NAME / _TARGETS_NAME):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tars = [shard["name"] for shard in content.get("shards", [])]
            indices = [str(Path(tar).with_suffix(".idx")) for tar in tars]
            folders = content.get("class_folders", content.get("config", {}).get("class_folders", []))
            listed = {OBJECTS_NAME, REPORT_PAGE, *tars, *indices, *content.get("files", [])}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"expected the list of an earlier preparation in {path}, found {error}; remove the folder yourself"
            ) from error
        # Names only: a list from elsewhere must not reach outside the folder.
        files |= {Path(name).name for name in listed} | ({MANIFEST_NAME} if path.name == MANIFEST_NAME else set())
        class_folders |= {Path(name).name for name in folders}
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
    for name in [*sorted(files - {MANIFEST_NAME}), MANIFEST_NAME]:  # the list last: killed here, one can start again
        (out / name).unlink(missing_ok=True)
    release(out)
