"""Input tars for the tests of data preparation, made on the spot."""

import io
import json
import tarfile
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
