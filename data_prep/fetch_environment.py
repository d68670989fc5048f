"""img2dataset's own environment: makes it, and says at once whether it is there. Used by data_prep.fetch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setclip.errors import InputError
from setclip.files import sha256_of, write_json
from setclip.log import say

VARIABLE = "SETCLIP_IMG2DATASET_ENV"
DEFAULT = Path(".venv-img2dataset")
REQUIREMENTS = Path(__file__).with_name("requirements-img2dataset.txt")

_MARK = "setclip-environment.json"  # written last, so its presence means that all of it is installed
_OLDEST, _NEWEST = (3, 11), (3, 12)  # PYTHONSAFEPATH came with 3.11; img2dataset 1.47 imports imghdr, gone in 3.13
_TRY = (
    "import json, importlib.metadata as m; import cv2; from img2dataset import downloader, resizer; "
    "downloader.download_image; print(json.dumps({d.name: d.version for d in m.distributions()}))"
)


def place(env: Path | None) -> Path:
    """Returns where the environment is: `env`, or what the variable says, or the default."""
    return env or Path(os.environ.get(VARIABLE) or DEFAULT)


def python_of(env: Path | None) -> Path:
    """Returns the environment's interpreter. Raises InputError if there is none, or if its requirements are others."""
    folder = place(env)
    mark = folder / _MARK
    if not mark.is_file():
        found = "an environment that was not finished" if folder.exists() else "none"
        raise InputError(
            f"expected img2dataset's environment at {folder}, found {found}; make it with "
            f"`python -m data_prep.fetch setup{'' if env is None else f' --env {env}'}` (half a minute), or name another "
            f"place with --env or {VARIABLE}"
        )
    if json.loads(mark.read_text(encoding="utf-8")).get("requirements") != sha256_of(REQUIREMENTS):
        raise InputError(
            f"expected an environment of {REQUIREMENTS.name} at {folder}, found one made from other requirements; run "
            "`python -m data_prep.fetch setup` again"
        )
    return folder.absolute() / "bin" / "python"


def versions_of(env: Path | None) -> dict[str, str]:
    """Returns the names and versions of what is installed there."""
    return json.loads((place(env) / _MARK).read_text(encoding="utf-8"))["packages"]


def make(env: Path | None, python: Path | None) -> Path:
    """Makes the environment unless it is there; returns its folder. pip's own variables (PIP_INDEX_URL, …) hold.

    Raises InputError if the interpreter does not fit, or if installing or importing fails; a folder that was half made is
    then left for a look, and replaced by the next try.
    """
    folder, chosen = place(env), str(python or sys.executable)
    try:
        python_of(env)
    except InputError:
        pass
    else:
        say(f"img2dataset's environment is ready: {folder}")
        return folder
    _check_python(chosen)
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise InputError(
            f"expected an environment or nothing at {folder}, found something else, which will not be removed; name "
            f"another place with --env or {VARIABLE}"
        )
    shutil.rmtree(folder, ignore_errors=True)
    say(f"making {folder} from {REQUIREMENTS.name} (half a minute, 1 GB) ...")
    _run(
        [chosen, "-m", "venv", str(folder)],
        "make a virtual environment",
        "on Debian and Ubuntu: apt install python3-venv",
    )
    inside = str(folder.absolute() / "bin" / "python")
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    _run(pip, f"install {REQUIREMENTS.name}", "is the package index reachable? PIP_INDEX_URL names another one")
    packages = json.loads(_run([inside, "-c", _TRY], "import img2dataset", "remove the folder and try again"))
    write_json(folder / _MARK, {"requirements": sha256_of(REQUIREMENTS), "packages": packages})
    say(f"img2dataset {packages['img2dataset']} is ready: {folder}")
    return folder


def variables() -> dict[str, str]:
    """Returns this process's variables, changed so that img2dataset's libraries are its own and do not call home."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # Without PYTHONSAFEPATH, data_prep/statistics.py would stand before Python's own `statistics` there.
    return {**kept, "PYTHONSAFEPATH": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}


def _check_python(python: str) -> None:
    wanted = f"Python {'.'.join(map(str, _OLDEST))} to {'.'.join(map(str, _NEWEST))}"
    ask = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
        version = tuple(map(int, answer.stdout.split()))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise InputError(
            f"expected {wanted} as {python}, found that it does not start ({error}); name one with --python"
        ) from error
    if not _OLDEST <= version <= _NEWEST:
        raise InputError(
            f"expected {wanted} (img2dataset needs a module that later ones dropped), found {'.'.join(map(str, version))} as "
            f"{python}; name another with --python"
        )


def _run(command: list[str], what: str, advice: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=variables())
    if done.returncode:
        last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise InputError(f"expected to {what}, found that it failed with status {done.returncode}:\n{last}\n{advice}")
    return done.stdout
