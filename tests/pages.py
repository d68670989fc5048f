"""A page of HTML as tests read it, and the browser that shows it."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def dumped(path: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Opens a page in the browser; stdout is what it has become, stderr has what it wrote to its console ("CONSOLE").

    `scratch`: where the browser's profile goes.
    """
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage"
    flags += " --disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr --v=0"
    arguments = [CHROMIUM, *flags.split(), f"--user-data-dir={scratch / 'profile'}", "--dump-dom", path.as_uri()]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)


class Page(HTMLParser):
    """The tags of a page and its text; fails where tags are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).replace("\N{NO-BREAK SPACE}", " ").split())

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]
