"""The environment of open_clip's own trainer: makes it, and says at once whether it is there.

    python -m benchmarks.open_clip_environment        # .venv-open-clip, a few seconds

The trainer comes with open_clip_torch, but its reader of tars needs an older webdataset than Setclip's tests. So this
environment has that one package of its own and sees all others in Setclip's: both trainers run the same torch and the same
open_clip. Used by benchmarks.train and benchmarks.train_gpu.
"""

import importlib.metadata
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from data_prep import own_environment
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.log import say

VARIABLE = "SETCLIP_OPEN_CLIP_ENV"
DEFAULT = Path(".venv-open-clip")
REQUIREMENTS = Path(__file__).with_name("requirements-open-clip.txt")

_AGAIN = "python -m benchmarks.open_clip_environment"
_TRY = "import setclip; from open_clip_train import data, main; import webdataset; print(webdataset.__version__)"


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Makes the environment of open_clip's trainer, unless it is there."""

    env: Path | None = None
    """Its folder; SETCLIP_OPEN_CLIP_ENV where that is set, otherwise .venv-open-clip here."""


def place(env: Path | None = None) -> Path:
    """Returns where the environment is: `env`, or what the variable says, or the default."""
    return env or Path(os.environ.get(VARIABLE) or DEFAULT)


def python_of(env: Path | None = None) -> Path:
    """Returns the environment's interpreter, or this one where it has the packages as they are required.

    Raises InputError if there is none, or if it was made from other requirements.
    """
    if _is_in_this_one():
        return Path(sys.executable)
    folder = place(env)
    mark = own_environment.find(folder, "open_clip's trainer", f"`{_AGAIN}` (a few seconds)", VARIABLE)
    own_environment.check_requirements(mark, REQUIREMENTS, folder, _AGAIN)
    return folder.absolute() / "bin" / "python"


def _is_in_this_one() -> bool:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    for name, version in (line.split("==") for line in lines if line and not line.startswith("#")):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        if found != version:
            return False
    return True


def make(env: Path | None = None) -> Path:
    """Makes the environment unless it is there; returns its folder. pip's own variables (PIP_INDEX_URL, …) hold."""
    folder, variables = place(env), own_environment.clean_variables()
    try:
        python_of(env)
    except InputError:
        pass
    else:
        say(f"the environment of open_clip's trainer is ready: {folder}")
        return folder
    announcement = f"making {folder} from {REQUIREMENTS.name} (a few seconds) ..."
    inside = own_environment.start(folder, sys.executable, VARIABLE, variables, announcement)
    ours = sysconfig.get_path("purelib")
    (own,) = folder.glob("lib/python*/site-packages")
    # As a line of code and not as a bare path: then editable installations there are seen as well.
    (own / "setclip.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    own_environment.install(pip, REQUIREMENTS, variables)
    found = own_environment.run(
        [inside, "-c", _TRY], "import open_clip's trainer", "remove the folder and try again", variables
    ).split()[-1]
    own_environment.write_mark(folder, REQUIREMENTS, {"webdataset": found})
    say(f"open_clip's trainer is ready, with webdataset {found}: {folder}")
    return folder


def main() -> None:
    """The command."""
    make(parse(EnvironmentConfig, description=__doc__).env)


if __name__ == "__main__":
    command(main)
