"""Where the pictures of a classification data set lie, by row: files, tars, or one array. Nothing is skipped in silence.

A source gives keys and decoded pictures; `TransformedImages` makes a model's pictures from them; `FoundImages` adds labels and
classes. Used by zero-shot classification.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from eval_suite.preprocess import Resizer
from setclip.decode import DecodeError
from setclip.errors import InputError
from setclip.images import decode_tensor

_SMALL = 256 * 256  # pixels; a batch of photographs would take gigabytes


class ImageSource(Protocol):
    """Pictures by row."""

    keys: list[str]
    """(N,) distinct names of the pictures, the same each time; of files the path below the data set's folder."""

    def decoded(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields pictures, (3, H, W) uint8 each. Raises InputError, naming the picture, on one that cannot be had."""
        ...

    def encoded(self, row: int) -> bytes:
        """Returns a picture's file content."""
        ...


class FileSource:
    """Pictures in files."""

    def __init__(self, paths: Sequence[Path], place: Path):
        self.paths = list(paths)
        self.keys = [path.relative_to(place).as_posix() for path in self.paths]

    def decoded(self, rows: Sequence[int]) -> Iterator[Tensor]:
        return (_decoded(self.encoded(row), str(self.paths[row])) for row in rows)

    def encoded(self, row: int) -> bytes:
        try:
            return self.paths[row].read_bytes()
        except OSError as error:
            raise InputError(
                f"expected an image at {self.paths[row]}, found {error.strerror}; mend the folder"
            ) from error


class TarPlace(NamedTuple):
    """Where a picture lies in a tar."""

    path: Path
    key: str
    offset: int
    size: int


class TarSource:
    """Pictures in tars."""

    def __init__(self, places: Sequence[TarPlace]):
        self.places = list(places)
        self.keys = [f"{place.path.name}/{place.key}" for place in self.places]

    def decoded(self, rows: Sequence[int]) -> Iterator[Tensor]:
        for path, of_tar in itertools.groupby((self.places[row] for row in rows), lambda place: place.path):
            with path.open("rb", buffering=1 << 18) as file:  # small neighbours come with one read
                for place in of_tar:
                    file.seek(place.offset)
                    yield _decoded(file.read(place.size), f"{path}, sample {place.key}")

    def encoded(self, row: int) -> bytes:
        place = self.places[row]
        with place.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)


class ArraySource:
    """Pictures in memory."""

    def __init__(self, pictures: NDArray[np.uint8]):
        """`pictures`: (N, H, W, 3)."""
        self.pictures = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
        self.keys = [f"{row:06d}" for row in range(len(pictures))]

    def decoded(self, rows: Sequence[int]) -> Iterator[Tensor]:
        return (self.pictures[row] for row in rows)

    def encoded(self, row: int) -> bytes:
        return simplejpeg.encode_jpeg(self.pictures[row].permute(1, 2, 0).contiguous().numpy(), 95, "RGB")


class TransformedImages(Dataset[Tensor]):
    """The pictures of a source as a model takes them. DataLoader asks for whole batches at once.

    Where the resizer takes batches, small pictures of one size are resized together: the same values in a seventh of the
    time.
    """

    def __init__(self, source: ImageSource, resizer: Resizer, image_size: int):
        self.source, self.transform = source, resizer.make(image_size)
        self.most_together = _SMALL if resizer.takes_batches else -1

    def __len__(self) -> int:
        return len(self.source.keys)

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(next(iter(self.source.decoded([row]))))

    def __getitems__(self, rows: Sequence[int]) -> list[Tensor]:
        """Returns the pictures of these rows: the same values as one by one."""
        pictures: list[Tensor] = []
        of_size: dict[torch.Size, list[int]] = defaultdict(list)
        for place, picture in enumerate(self.source.decoded(rows)):
            if picture.shape[1] * picture.shape[2] > self.most_together:
                pictures.append(self.transform(picture))
            else:
                pictures.append(picture)
                of_size[picture.shape].append(place)
        for places in of_size.values():
            together = self.transform(torch.stack([pictures[place] for place in places]))
            for place, picture in zip(places, together, strict=True):
                pictures[place] = picture
        return pictures


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """The images of a data set as one layout holds them."""

    layout: str
    """"folders", "torchvision", "tars", …"""
    place: Path
    """The folder below which they lie; keys of files are paths below it."""
    folder: Path
    """Where in it the layout begins."""
    classes: tuple[str, ...]
    """What the layout calls the classes, in the order of the labels."""
    labels: Tensor
    """(N,) int64, index into `classes`."""
    source: ImageSource
    names: tuple[str, ...] | None = None
    """Names for the prompts where the layout brings its own."""
    templates: tuple[str, ...] | None = None
    """Prompts where the layout brings its own; `{}` stands for the class name."""
    faults: tuple[str, ...] = ()
    """What the layout's own lists promise and is not there."""

    @property
    def paths(self) -> list[Path]:
        """The files of the images. Raises InputError where they lie in tars or arrays."""
        if isinstance(self.source, FileSource):
            return self.source.paths
        raise InputError(
            f"expected images in files of their own at {self.folder}, found the layout {self.layout!r}; give class folders"
        )


def _decoded(data: bytes, where: str) -> Tensor:
    try:
        return decode_tensor(data)
    except DecodeError as error:
        raise InputError(
            f"{where}: expected an image, found one that cannot be decoded ({error}); an evaluation leaves nothing "
            "out: replace the file"
        ) from error
