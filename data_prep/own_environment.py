"""A virtual environment for a tool that cannot share ours. Used by fetch_environment (img2dataset) and llm.environment (vLLM).

A mark in its folder, written last, says that all of it is installed, from which requirements, and which packages it has.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setclip.errors import InputError
from setclip.files import sha256_of, write_json
from setclip.log import say

_MARK = "setclip-environment.json"

Version = tuple[int, int]


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Returns what the mark says; None where there is none."""
    path = folder / _MARK
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_mark(folder: Path, requirements: Path, packages: dict[str, str], **more: str) -> None:
    """Says that the environment is complete."""
    write_json(folder / _MARK, {**more, "requirements": sha256_of(requirements), "packages": packages})


def find(folder: Path, tool: str, make: str, elsewhere: str) -> dict[str, Any]:
    """Returns the mark. Raises InputError if there is none; `make` and `elsewhere` say what to do."""
    mark = read_mark(folder)
    if mark is None:
        found = "an environment that was not finished" if folder.exists() else "none"
        raise InputError(
            f"expected {tool}'s environment at {folder}, found {found}; make it with {make}, or name another place with "
            f"{elsewhere}"
        )
    return mark


def check_requirements(mark: dict[str, Any], requirements: Path, folder: Path, again: str) -> None:
    """Raises InputError if the environment was made from other requirements."""
    if mark.get("requirements") != sha256_of(requirements):
        raise InputError(
            f"expected an environment of {requirements.name} at {folder}, found one made from other requirements; run "
            f"`{again}` again"
        )


def start(folder: Path, python: str, variable: str, env: dict[str, str], announcement: str) -> str:
    """Makes an empty environment in place of a half made one; returns its interpreter. Removes nothing else.

    `variable` may name another place. `announcement` is said before what takes long.
    """
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise InputError(
            f"expected an environment or nothing at {folder}, found something else, which will not be removed; name "
            f"another place with --env or {variable}"
        )
    shutil.rmtree(folder, ignore_errors=True)
    say(announcement)
    run(
        [python, "-m", "venv", str(folder)],
        "make a virtual environment",
        "on Debian and Ubuntu: apt install python3-venv",
        env,
    )
    return str(folder.absolute() / "bin" / "python")


def install(pip: list[str], requirements: Path, env: dict[str, str]) -> None:
    """Installs a file of requirements. `pip`: the command, up to its options for `install`."""
    advice = "is the package index reachable? PIP_INDEX_URL names another one"
    run([*pip, "-r", str(requirements)], f"install {requirements.name}", advice, env)


def check_python(python: str, oldest: Version, newest: Version, reason: str = "") -> None:
    """Raises InputError if an interpreter does not start or has another version; `reason` is said of the latter."""
    wanted = f"Python {'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))}"
    ask = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
        version = tuple(map(int, answer.stdout.split()))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise InputError(
            f"expected {wanted} as {python}, found that it does not start ({error}); name one with --python"
        ) from error
    if not oldest <= version <= newest:
        raise InputError(
            f"expected {wanted}{reason}, found {'.'.join(map(str, version))} as {python}; name another with --python"
        )


def clean_variables() -> dict[str, str]:
    """Returns this process's variables without those that would lead another Python to our modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(command: list[str], what: str, advice: str, env: dict[str, str]) -> str:
    """Returns what a command printed. Raises InputError with the last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise InputError(f"expected to {what}, found that it failed with status {done.returncode}:\n{last}\n{advice}")
    return done.stdout
