"""Input tars for the tests of data preparation, made on the spot, and a command of it killed at one moment."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from material import NOUNS, picture


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds one member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def caption_of(number: int) -> str:
    """Returns the caption of sample `number`, with one or two objects."""
    return f"a {NOUNS[number % 8]} and a {NOUNS[(number * 3 + 1) % 8]} in picture {number}"


def write_tar(path: Path, numbers: list[int], bad: int = 0, captions: dict[int, str] | None = None) -> Path:
    """Writes a tar as img2dataset lays it out; the last `bad` samples have an image that is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row, number in enumerate(numbers):
            caption = (captions or {}).get(row, caption_of(number))
            image = picture(number) if row < len(numbers) - bad else b"<html>not found</html>"
            key = f"{row:09d}"
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.json", json.dumps({"caption": caption, "url": f"https://example.org/{number}"}).encode())
            add(tar, f"{key}.txt", caption.encode())
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the name and bytes of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_killed_at(module: str, arguments: Sequence[object], number: int) -> int:
    """Returns the exit status of a command of data_prep, killed right before its `number`-th renaming if it gets there."""
    code = f"""
import os, signal, sys
from data_prep import {module}
from setclip import files
rename, seen = os.replace, 0
def counted(*args):
    global seen
    seen += 1
    if seen == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
files.os.replace = counted
sys.argv[1:] = {list(map(str, arguments))!r}
{module}.main()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL).returncode
