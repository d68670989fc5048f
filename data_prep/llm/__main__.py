"""Makes the environment in which vLLM answers the questions of data_prep, once a machine.

    python -m data_prep.llm setup                   # gpu where there is one, otherwise cpu
    python -m data_prep.llm setup --variant cpu

It is a folder of its own (.venv-vllm, or what SETCLIP_VLLM_ENV says) because vLLM pins another torch than Setclip.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.llm import environment
from setclip.config import command, parse_recipe


@dataclass(frozen=True, kw_only=True)
class SetupConfig:
    """Makes vLLM's own environment, or says that it is there."""

    variant: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes gpu where this machine has one, or keeps what is there."""
    env: Path | None = None
    """Folder of the environment; SETCLIP_VLLM_ENV where that is set, otherwise .venv-vllm here."""
    python: Path | None = None
    """Interpreter that makes it, Python 3.11 to 3.13; by default the one that runs this."""


def main() -> None:
    """The command."""
    _, config = parse_recipe({"setup": SetupConfig}, description=__doc__ or "", what="command")
    environment.make(config.env, None if config.variant == "auto" else config.variant, config.python)


command(main)
