"""The building blocks of HTML reports: pictures, figures, galleries, tables and the page. Used by every report.

A report is one file without network: pictures are data URIs, figures inline SVG (setclip.plots), styles stand in the
page, and its content-security policy forbids the rest. Markup lies in setclip/templates; everything is escaped there.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jinja2
import numpy as np
import simplejpeg
from markupsafe import Markup, escape
from PIL import Image

from setclip.decode import DecodeError, decode_rgb
from setclip.files import replacing
from setclip.shards import Shard

_MEDIA_TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_TILE = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 160"><path fill="#8a8f98" d="M0 0h160v160H0z"/>'
    b'<text x="80" y="76" fill="#fff" font-family="sans-serif" font-size="15" text-anchor="middle">%s'
    b'<tspan x="80" dy="20">%s</tspan></text></svg>'
)


@dataclass(frozen=True)
class Picture:
    """An embedded image."""

    src: str
    """A data URI."""
    alt: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class Pill:
    """A short label; `kind` colours it ("head", "middle", "tail", "unseen", or "")."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class SampleCard:
    """A picture with its caption and the objects parsed from it."""

    picture: Picture
    caption: str
    pills: Sequence[Pill]
    further: Sequence[str] = ()
    """Its other captions."""
    note: str = ""
    """A small line below, such as its key."""


@dataclass(frozen=True)
class CardGroup:
    """Cards that belong together, with a headline such as a pair's similarity."""

    title: str
    text: str
    cards: Sequence[SampleCard]


@dataclass(frozen=True)
class Answer:
    """One answer of a retrieval query: a picture, or a caption."""

    is_right: bool
    score: float
    picture: Picture | None = None
    text: str = ""


@dataclass(frozen=True)
class Query:
    """A retrieval query (a caption, or a picture with its caption) and its best answers."""

    text: str
    note: str
    """Such as the rank of the right answer."""
    answers: Sequence[Answer]
    picture: Picture | None = None
    wanted: Answer | None = None
    """The right answer, shown apart; for queries whose best answers do not have it."""


@dataclass(frozen=True)
class PictureGroup:
    """A few pictures under a title, such as those that a classifier confuses."""

    title: str
    text: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Value:
    """One value of a key figure."""

    name: str
    text: str
    share: float
    """Length of its bar, 0 to 1."""
    kind: str
    """"series-1", "series-2", … or "chance"."""
    detail: str = ""


@dataclass(frozen=True)
class KeyFigure:
    """A headline number: what it measures, and its values beside each other."""

    title: str
    values: Sequence[Value]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    kind: Literal["numbers", "words", "wide-words"] = "numbers"
    """"numbers" are aligned to the right; "wide-words" have room for several columns of text, and scroll."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    anchor: str
    title: str
    blocks: Sequence[Markup]
    intro: str = ""
    menu: str = ""
    """Its name in the menu; by default the title."""
    parts: Sequence[tuple[str, str]] = ()
    """(anchor, name) of its subtitles for the menu."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report."""

    title: str
    lead: str
    kicker: str = ""
    """A short line above the title."""
    opening: Sequence[Markup] = ()
    """Blocks before the first section."""
    sections: Sequence[Section]
    credits: Sequence[Markup | str] = field(default_factory=list)


def picture(data: bytes, extension: str, alt: str) -> Picture:
    """Returns image bytes as they are, embedded."""
    return Picture(f"data:{_MEDIA_TYPES[extension.lower()]};base64,{base64.b64encode(data).decode()}", alt)


def thumbnail(data: bytes, alt: str, side: int = 160) -> Picture:
    """Returns an image made small, as a JPEG of at most `side` pixels in either direction.

    One that cannot be decoded becomes a grey tile that says so, in words as well.
    """
    try:
        return picture(small_jpeg(data, side), "jpg", alt)
    except DecodeError as error:
        return missing_picture(f"no picture ({error}): {alt}", ("cannot be", "decoded"))


def missing_picture(alt: str, words: tuple[str, str] = ("not here", "")) -> Picture:
    """Returns a grey tile with two lines of a few words, for a picture that cannot be shown."""
    tile = _TILE % tuple(escape(line).encode() for line in words)
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(tile).decode()}", alt)


def small_jpeg(data: bytes, side: int = 160, max_bytes: int | None = None) -> bytes:
    """Returns an image as a JPEG of at most `side` pixels in either direction.

    With `max_bytes` its quality is lowered from 80 until it fits, to 10 at worst. Raises DecodeError.
    """
    pixels = decode_rgb(data, min_size=side)
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))
    pixels = np.ascontiguousarray(pixels)
    for quality in (80, 60, 40, 20, 10):
        jpeg = simplejpeg.encode_jpeg(pixels, quality=quality)
        if max_bytes is None or len(jpeg) <= max_bytes:
            break
    return jpeg


class PictureBook:
    """Finds pictures by key in shards. The indices are read once; a picture when it is asked for."""

    def __init__(self, shards: Sequence[Shard]):
        self._places = {key: (shard, row) for shard in shards for row, key in enumerate(shard.keys)}

    def picture(self, key: str, alt: str) -> Picture:
        """Returns the picture of a key. Raises KeyError for one that no shard has."""
        shard, row = self._places[key]
        _, extension, image, _ = shard.read_raw(row)
        return picture(image, extension, alt)

    def image(self, key: str) -> bytes:
        """Returns the bytes of the picture of a key. Raises KeyError for one that no shard has."""
        shard, row = self._places[key]
        return shard.read_raw(row)[2]

    def caption(self, key: str) -> str:
        """Returns the first caption of a key."""
        shard, row = self._places[key]
        return shard.read(row).captions[0]


def figure(svg: Markup, title: str, text: str = "", widths: tuple[int, int] | None = None) -> Markup:
    """A drawing with its title and a sentence below.

    `widths`: the smallest and the largest width in pixels that it can be read at; where the page is narrower, it
    scrolls in its own box. By default it takes the width that there is.
    """
    return _blocks().figure(svg, title, text, widths)


def row(*blocks: Markup) -> Markup:
    """Blocks side by side where there is room."""
    return _blocks().row(blocks)


def key_figures(figures: Sequence[KeyFigure]) -> Markup:
    """Headline numbers, each with its bars."""
    return _blocks().key_figures(figures)


def sample_cards(cards: Sequence[SampleCard]) -> Markup:
    """Pictures with captions and pills."""
    return _blocks().sample_cards(cards)


def card_groups(groups: Sequence[CardGroup]) -> Markup:
    """Groups of cards with a headline each."""
    return _blocks().card_groups(groups)


def pill_legend(pills: Sequence[Pill]) -> Markup:
    """What the colours of pills mean."""
    return _blocks().pill_legend(pills)


def gallery(queries: Sequence[Query]) -> Markup:
    """Queries with their best answers, right ones marked by a frame, a sign and a word for screen readers."""
    return _blocks().gallery(queries)


def table(content: Table) -> Markup:
    """A table that scrolls sideways where it is too wide."""
    return _blocks().table(content)


def bar(share: float) -> Markup:
    """A bar for a table's cell, `share` (0 to 1) of its width; the number itself belongs into a cell beside it."""
    return _blocks().bar(min(1.0, max(0.0, share)))


def timings(steps: Sequence[tuple[str, float, str]]) -> Markup:
    """Bars of time: (title, seconds, text)."""
    longest = max((seconds for _, seconds, _ in steps), default=1.0)
    return _blocks().timings([(title, seconds / max(longest, 1e-9), text) for title, seconds, text in steps])


def commands(lines: Sequence[str]) -> Markup:
    """Command lines as they are typed."""
    return _blocks().commands(lines)


def subtitle(text: str, anchor: str = "") -> Markup:
    """A heading inside a section, with an anchor where the menu leads to it."""
    return _blocks().subtitle(text, anchor)


def paragraph(text: str) -> Markup:
    """A paragraph inside a section."""
    return _blocks().paragraph(text)


def picture_groups(groups: Sequence[PictureGroup]) -> Markup:
    """Small groups of pictures beside each other."""
    return _blocks().picture_groups(groups)


def unfolding(title: str, *blocks: Markup) -> Markup:
    """Blocks behind a title, shown when it is clicked, and in print."""
    return _blocks().unfolding(title, blocks)


def caveats(title: str, items: Sequence[str | Markup]) -> Markup:
    """A box of what to keep in mind."""
    return _blocks().caveats(title, items)


def link(url: str, text: str) -> Markup:
    """A link, for credits and licences only: a report loads nothing."""
    return Markup('<a href="{}" rel="noreferrer">{}</a>').format(url, text)


def write_page(path: Path, page: Page) -> None:
    """Writes the report, beside and renamed."""
    html = _environment().get_template("page.html").render(page=page)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("setclip"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _blocks() -> Any:
    module: ModuleType = _environment().get_template("blocks.html").module  # type: ignore[assignment]
    return module
