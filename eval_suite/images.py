"""Images for evaluation in batches: from folders named by class and from shards. Nothing is skipped in silence.

Used by the commands of zero-shot classification and retrieval. Letter: B images of a batch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from setclip.decode import IMAGE_EXTENSIONS, DecodeError
from setclip.errors import InputError
from setclip.images import Transform, decode_tensor
from setclip.shards import Shard


@dataclass(frozen=True)
class ClassFolders:
    """Images found in folders that are named by class."""

    folder: Path
    classes: tuple[str, ...]
    """Folder names, in the order of the labels."""
    paths: tuple[Path, ...]
    labels: Tensor
    """(N,) int64, index into `classes`."""


def find_class_folders(folder: Path, classes: Sequence[str] | None = None) -> ClassFolders:
    """Returns the images below `folder`, by class and then by name.

    Without `classes` all folders, sorted by name, are classes. A class without a folder has no images here; whether that
    is right is the caller's to check. Raises InputError if there is no image at all.
    """
    if not folder.is_dir():
        raise InputError(f"expected class folders at {folder}, found no such folder; give the place with --data")
    if classes is None:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if _is_image(path))
        paths += found
        labels += [label] * len(found)
    if not paths:
        flat = sum(_is_image(path) for path in folder.iterdir())
        others = sorted(path.name for path in folder.iterdir() if path.is_dir())
        found_text = f"{flat:,} images outside of class folders" if flat else "no images"
        found_text += f" and other folders ({', '.join(others[:3])}, …)" if others else ""
        raise InputError(
            f"expected images ({', '.join(IMAGE_EXTENSIONS)}) in class folders at {folder}, found {found_text}; "
            f"put each class's images into a folder of its name ({', '.join(list(classes[:2]) or ['dog', 'cat'])}, …)"
        )
    return ClassFolders(folder, tuple(classes), tuple(paths), torch.tensor(labels))


class FolderImages(Dataset[Tensor]):
    """The images of some paths, transformed. Raises InputError, naming the file, on one that cannot be decoded."""

    def __init__(self, paths: Sequence[Path], transform: Transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        return _decoded(path.read_bytes(), self.transform, str(path))


class ShardImages(Dataset[Tensor]):
    """The images of some shards in their order, transformed. Errors as FolderImages, with shard and key."""

    def __init__(self, shards: Sequence[Shard], transform: Transform):
        self.shards, self.transform = shards, transform
        self.rows = [(shard, row) for shard in range(len(shards)) for row in range(len(shards[shard]))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        shard, row = self.rows[index]
        sample = self.shards[shard].read(row)
        return _decoded(sample.image, self.transform, f"{self.shards[shard].path}, sample {sample.key}")


class ImageBatches(Sequence[Tensor]):
    """Images in batches, (B, 3, height, width) uint8, in their order; the last batch may be smaller.

    A slice has the same batches and decodes no others: ranks share them so.
    """

    def __init__(self, images: Dataset[Tensor], rows: Sequence[range], workers: int):
        self.images, self.rows, self.workers = images, rows, workers

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageBatches": ...
    def __getitem__(self, index: int | slice) -> "Tensor | ImageBatches":
        if isinstance(index, slice):
            return ImageBatches(self.images, self.rows[index], self.workers)
        return default_collate([self.images[row] for row in self.rows[index]])

    def __iter__(self) -> Iterator[Tensor]:
        if not self.rows:
            return iter(())
        return iter(DataLoader(self.images, batch_sampler=list(map(list, self.rows)), num_workers=self.workers))


def image_batches(images: Dataset[Tensor], batch_size: int, workers: int | None = None) -> ImageBatches:
    """Returns `images` in batches of `batch_size`.

    `workers`: processes that decode; 0 decodes here, None takes one per core but one, at most 8, where that pays.
    """
    num_images = len(images)  # type: ignore[arg-type]
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        # Starting processes costs seconds, and on two cores they only take turns with the model.
        workers = 0 if cores <= 2 or num_images < 2000 else min(8, cores - 1)
    rows = [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]
    return ImageBatches(images, rows, workers)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and path.is_file()


def _decoded(data: bytes, transform: Transform, where: str) -> Tensor:
    try:
        return transform(decode_tensor(data))
    except DecodeError as error:
        raise InputError(
            f"{where}: expected an image, found one that cannot be decoded ({error}); an evaluation leaves nothing "
            "out: replace the file"
        ) from error
