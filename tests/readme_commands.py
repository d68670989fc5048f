"""Runs the commands of the documents, so that they cannot rot: blocks marked `bash run` or `python run`, in order.

    python tests/readme_commands.py README.md docs/*.md

A scratch folder is the working directory and $SETCLIP_DATA lies in it; `make` runs in the repository. Commands that
train are shortened by flags put behind them (SHORTER). Each command is printed with its seconds; the first that fails
ends it all. A block that names $SETCLIP_REAL_DATA is left out, said so, where that is not set.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SHORTER = {
    "make demo": 'DEMO_FLAGS="--fast True"',
    "python -m data_prep.run scenes": "--samples 3000",
    "python -m pretrain.run": "--steps 3",
    "torchrun": "--steps 3",
}
"""How a command begins, and the flags behind it that keep it short; the last of equal flags wins."""

_BLOCK = re.compile(r"^```(bash|python) run\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[tuple[str, str]]:
    """Returns (language, text) of each block of a document that is marked to be run."""
    return _BLOCK.findall(document.read_text(encoding="utf-8"))


def commands(language: str, block: str) -> list[str]:
    """Returns the commands of a block: a Python block is one; lines of bash that end in a backslash go on."""
    if language == "python":
        return [block]
    lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    return [re.sub(r"\s+#.*$", "", line).strip() for line in lines if line.strip() and not line.startswith("#")]


def shortened(command: str) -> str:
    """Returns a command with the flags that keep it short, run in the repository if it is `make`."""
    flags = next((f" {flags}" for start, flags in SHORTER.items() if command.startswith(start)), "")
    return re.sub(r"^make ", f"make -C '{ROOT}' ", command) + flags


def run(language: str, command: str, folder: Path) -> None:
    """Runs one command; ends the program with its status if that is not 0."""
    arguments = [sys.executable, "-c", command] if language == "python" else ["bash", "-c", shortened(command)]
    say(f"$ {shortened(command)}" if language == "bash" else "$ python <<EOF\n" + command.rstrip() + "\nEOF")
    environment = {**os.environ, "SETCLIP_DATA": str(folder / "data")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    start = time.monotonic()
    status = subprocess.run(arguments, cwd=folder, env=environment).returncode
    say(f"({time.monotonic() - start:.1f} s)\n")
    if status:
        sys.exit(f"error: status {status} of a command in the documents: {command}")


def say(text: str) -> None:
    """Prints at once, in step with what the commands print."""
    print(text, flush=True)


def main() -> None:
    """Runs the documents given."""
    count, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for document in map(Path, sys.argv[1:]):
            for language, block in blocks(document):
                if "$SETCLIP_REAL_DATA" in block and "SETCLIP_REAL_DATA" not in os.environ:
                    say(f"left out, because SETCLIP_REAL_DATA is not set:\n{block}")
                    continue
                for command in commands(language, block):
                    run(language, command, Path(scratch))
                    count += 1
    if not count:
        sys.exit(f"error: expected blocks marked `bash run` in {sys.argv[1:]}, found none")
    say(f"{count} commands of {', '.join(sys.argv[1:])} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
