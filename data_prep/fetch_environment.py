"""img2dataset's own environment: makes it, and says at once whether it is there. Used by data_prep.fetch."""

import json
import os
import sys
from pathlib import Path

from data_prep import own_environment
from setclip.errors import InputError
from setclip.log import say

VARIABLE = "SETCLIP_IMG2DATASET_ENV"
DEFAULT = Path(".venv-img2dataset")
REQUIREMENTS = Path(__file__).with_name("requirements-img2dataset.txt")

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
    again = "python -m data_prep.fetch setup"
    make = f"`{again}{'' if env is None else f' --env {env}'}` (half a minute)"
    mark = own_environment.find(folder, "img2dataset", make, f"--env or {VARIABLE}")
    own_environment.check_requirements(mark, REQUIREMENTS, folder, again)
    return folder.absolute() / "bin" / "python"


def versions_of(env: Path | None) -> dict[str, str]:
    """Returns the names and versions of what is installed there."""
    return (own_environment.read_mark(place(env)) or {})["packages"]


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
    reason = " (img2dataset needs a module that later ones dropped)"
    own_environment.check_python(chosen, _OLDEST, _NEWEST, reason)
    announcement = f"making {folder} from {REQUIREMENTS.name} (half a minute, 1 GB) ..."
    inside = own_environment.start(folder, chosen, VARIABLE, variables(), announcement)
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    own_environment.install(pip, REQUIREMENTS, variables())
    said = own_environment.run(
        [inside, "-c", _TRY], "import img2dataset", "remove the folder and try again", variables()
    )
    packages = json.loads(said)
    own_environment.write_mark(folder, REQUIREMENTS, packages)
    say(f"img2dataset {packages['img2dataset']} is ready: {folder}")
    return folder


def variables() -> dict[str, str]:
    """Returns this process's variables, changed so that img2dataset's libraries are its own and do not call home."""
    # Without PYTHONSAFEPATH, data_prep/statistics.py would stand before Python's own `statistics` there.
    mine = {"PYTHONSAFEPATH": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    return {**own_environment.clean_variables(), **mine}
