"""What made a file: version, commit, library versions. Written into manifests, checkpoints and results."""

import importlib.metadata
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import setclip


@cache
def git_commit() -> str | None:
    """Returns the commit of the source tree this package runs from, with "+changes" if it has any outside its documents
    (which commands write pages into); None outside git.
    """
    root = Path(setclip.__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", ".", ":!docs", ":!*.md") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(further: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the versions that decide a result: Setclip, its commit, and the main libraries that are installed.

    `further`: names of other packages that had a part in it.
    """
    versions = {}
    for package in ("torch", "open_clip_torch", "deepspeed", "spacy", *further):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"setclip": setclip.__version__, "commit": git_commit(), "versions": versions}
