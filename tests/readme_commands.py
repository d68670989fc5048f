"""Runs the commands of the documents, so that they cannot rot: blocks marked `bash run` or `python run`, in order.

    python tests/readme_commands.py README.md docs/*.md --jobs 2

A scratch folder is the working directory and $SETCLIP_DATA lies in it; `make` runs in the repository. The first document
goes first; each other one goes on from what the first has made, in a folder of its own (a copy), so that none needs another,
unless a line of it says so: <!-- commands run after docs/data.md -->. So many run at a time as --jobs says.

Commands that a test runs are left out (ELSEWHERE). Those that train are shortened by flags put behind them (SHORTER). Each
command is printed with its seconds; one that fails, or takes longer than _LONGEST, ends it all. A block that names
$SETCLIP_REAL_DATA, or what is made of it (photos), is left out, said so, where that is not set.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {"make demo": "tests/test_demo.py"}
"""Commands that a test has run, so that they are left out here."""

SHORTER = {
    "python -m data_prep.run scenes": "--samples 3000",
    "python -m pretrain.run": "--steps 3",
    "torchrun": "--steps 3",
    "python -m finetune.run photos": "--data data/photos-dev --split dev --hold-out 200 --test-split none --epochs 0.5",
}
"""How a command begins, and the flags behind it that keep it short; the last of equal flags wins."""

_STARTED: list[int] = []
_AFTER = re.compile(r"^<!-- commands run after (\S+) -->$", re.MULTILINE)
_LONGEST = 1200  # seconds of a command
_OF_PHOTOS = re.compile(r"\$SETCLIP_REAL_DATA|\bphotos\b")
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


def chains(documents: list[Path]) -> list[list[Path]]:
    """Returns the documents with commands, those that need another one's results behind it."""
    found = {document: [document] for document in documents if blocks(document)}
    for document in list(found):
        after = _AFTER.search(document.read_text(encoding="utf-8"))
        if after is not None:
            before = next((chain for chain in found.values() if str(chain[0]).endswith(after[1])), None)
            if before is None:
                sys.exit(
                    f"error: {document} is to run after {after[1]}, which is not among {', '.join(map(str, found))}"
                )
            before += found.pop(document)
    return list(found.values())


def run(language: str, command: str, folder: Path, environment: dict[str, str]) -> tuple[str, int]:
    """Runs one command; returns what it and we have to say, and its status."""
    arguments = [sys.executable, "-c", command] if language == "python" else ["bash", "-c", shortened(command)]
    typed = f"$ {shortened(command)}" if language == "bash" else "$ python <<EOF\n" + command.rstrip() + "\nEOF"
    environment = {**environment, "SETCLIP_DATA": str(folder / "data")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would wait for servers in the background
        process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        _STARTED.append(process.pid)
        try:
            status = process.wait(_LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        output.seek(0)
        said = output.read()
    return f"{typed}\n{said}({time.monotonic() - start:.1f} s)\n", status


def run_documents(documents: list[Path], folder: Path, environment: dict[str, str]) -> int:
    """Runs the commands of documents one after the other; returns how many. Ends the program if one fails."""
    count = 0
    for document in documents:
        for language, block in blocks(document):
            if _OF_PHOTOS.search(block) and "SETCLIP_REAL_DATA" not in environment:
                say(f"{document}: left out, because SETCLIP_REAL_DATA is not set:\n{block}")
                continue
            for command in commands(language, block):
                if command in ELSEWHERE:
                    say(f"{document}: $ {command}\n(run by {ELSEWHERE[command]})\n")
                    continue
                said, status = run(language, command, folder, environment)
                say(f"{document}: {said}")
                if status:
                    say(f"error: status {status} of a command in {document}: {command}")
                    end_all(folder.parent)
                count += 1
    return count


def end_all(scratch: Path) -> NoReturn:
    """Ends the program, with all that runs, servers in the background included, and removes the scratch folder."""
    for group in _STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def say(text: str) -> None:
    """Prints at once, in one piece."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Runs the documents given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    start = time.monotonic()
    first, *others = chains(given.documents) or [[]]
    environment = dict(os.environ)
    if given.jobs > 1:  # programs side by side do not each want all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // given.jobs)))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:

        def run_chain(chain: list[Path]) -> int:
            own = Path(scratch, chain[0].stem)
            shutil.copytree(Path(scratch, "first"), own, symlinks=True)
            return run_documents(chain, own, environment)

        Path(scratch, "first").mkdir()
        try:
            count = run_documents(first, Path(scratch, "first"), dict(os.environ))
            count += sum(pool.map(run_chain, others))
        except KeyboardInterrupt:  # what runs has a session of its own
            end_all(Path(scratch))
    if not count:
        sys.exit(f"error: expected blocks marked `bash run` in {given.documents}, found none")
    say(f"{count} commands of {', '.join(map(str, given.documents))} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
