"""What a run trains, chooses and reports on: pictures with captions of shards, and the order of training.

The order and every draw are functions of (seed, epoch, key), so they are the same on any number of ranks and after a resume in
the middle of an epoch. Captions of one picture never are each other's negatives, even where a picture is there twice. Letters: B
pictures of a batch over all ranks, b of this rank, T and t texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval_suite.protocols import PROTOCOLS, Protocol
from eval_suite.regions import Regions, RegionSplit, open_regions, splits_of
from eval_suite.retrieval_data import HELD_OUT_SPLIT, RetrievalData, open_retrieval
from finetune.config import FinetuneConfig
from pretrain.loader import pad_objects
from setclip.datasets import prepared_or_located
from setclip.errors import InputError
from setclip.hashing import hash_text, permutation
from setclip.hold_out import held_out
from setclip.log import say, warn
from setclip.manifest import Manifest
from setclip.shards import Shard

TRAIN_IMAGES: dict[str, tuple[int, ...]] = {"flickr30k": (29_000,), "coco": (113_287, 82_783), "cub": (7_067,)}
"""Training pictures of the data sets; COCO's with and without the images of val2014 that Karpathy left over."""

_ORDER, _CAPTIONS = 22, 23  # keep the draws apart


@dataclass(frozen=True)
class Part:
    """Pictures with their captions: a split, or what is taken of one."""

    name: str
    """Of the data set"""
    place: Path
    split: str
    data: RetrievalData
    images: list[tuple[Shard, int]]
    """Shard and row of each picture"""
    protocols: Mapping[str, Protocol]
    is_partial: bool = False
    regions: Regions | None = None
    """Features of the pictures' regions, where a run takes them in place of pictures; `images` is then empty"""

    def __len__(self) -> int:
        return len(self.data.keys)

    def of(self, rows: Sequence[int], split: str) -> "Part":
        """Returns the part that has these rows alone."""
        data = self.data
        chosen = RetrievalData(
            keys=[data.keys[i] for i in rows],
            captions=[data.captions[i] for i in rows],
            image_ids=[data.image_ids[i] for i in rows],
            caption_ids=[data.caption_ids[i] for i in rows],
            class_ids=[data.class_ids[i] for i in rows],
            left_out=data.left_out,
        )
        regions = None if self.regions is None else self.regions.take(rows)
        images = [self.images[i] for i in rows] if self.images else []
        return replace(self, split=split, data=chosen, images=images, regions=regions)


@dataclass(frozen=True)
class Parts:
    """All that a run looks at."""

    train: Part
    val: Part
    test: Part | None
    manifest: Manifest | RegionSplit
    """Of the training data; `identity()` is what a checkpoint says of them"""


def open_parts(config: FinetuneConfig) -> Parts:
    """Opens the data, within seconds. Raises InputError that names what is missing and the command that makes it."""
    manifest: Manifest | RegionSplit
    if config.regions is not None:
        place = config.regions
        manifest, train = _open_regions(config, place, config.split)
    else:
        place = _place(config)
        manifest = Manifest.load(place)
        train = _open(config, place, config.split)
    _check_counts(config, train)
    if config.hold_out:
        rows = held_out(train.data.keys, config.hold_out)
        val = train.of(sorted(rows), HELD_OUT_SPLIT)
        train = train.of([i for i in range(len(train)) if i not in rows], config.split)
    else:
        val = _open_val(config, place)
    test = _open_test(config, place, val)
    for what, part in (("validation", val), ("test", test)):
        if part is not None and (shared := _shared(train, part)):
            warn(f"{len(shared):,} pictures are both in the training and in the {what} data (first: {min(shared)})")
    if test is not None and (shared := _shared(val, test)):
        raise InputError(
            f"expected test data apart from the validation data, which chooses the checkpoint, found {len(shared):,} pictures "
            f"in both (first: {min(shared)}); give other splits, or --test-split none"
        )
    return Parts(train, val, test, manifest)


def _shared(one: Part, other: Part) -> set[str]:
    """Returns the keys, in `other`, of pictures that are in both parts.

    Those of regions without ids are told by their captions: their keys are places in a file.
    """
    keys = set(one.data.keys)
    if one.regions is None or other.regions is None:
        return keys & set(other.data.keys)
    have_ids = one.regions.has_ids and other.regions.has_ids
    captions = set(map(tuple, one.data.captions))
    return {
        key
        for key, texts in zip(other.data.keys, other.data.captions, strict=True)
        if (have_ids and key in keys) or tuple(texts) in captions
    }


def _place(config: FinetuneConfig) -> Path:
    if config.data is not None:
        return config.data
    if config.dataset is None:
        raise InputError(
            "expected shards to train on, found neither --data DIR nor --dataset NAME; `python -m data_prep.run` makes them"
        )
    return prepared_or_located(config.dataset)


def _open_regions(config: FinetuneConfig, place: Path, split: str) -> tuple[RegionSplit, Part]:
    if config.data is not None:
        raise InputError(
            f"expected shards or region features to train on, found both --data {config.data} and --regions {config.regions}; "
            "leave one out"
        )
    found = open_regions(place, split, config.dataset, config.allow_partial, config.region_captions)
    chosen = {name: PROTOCOLS[name] for name in found.protocols}
    name = config.dataset or place.name
    return found, Part(name, place, split, found.data, [], chosen, found.is_partial, found.regions)


def _open(config: FinetuneConfig, place: Path, split: str | None) -> Part:
    if config.regions is not None:
        assert split is not None
        return _open_regions(config, place, split)[1]
    split, shards, data, protocols, is_partial = open_retrieval(config.dataset, place, split, config.allow_partial)
    images = [(shard, row) for shard in shards for row in range(len(shard))]
    chosen = {name: PROTOCOLS[name] for name in protocols}
    faults = [f"{name}: {fault}" for name, protocol in chosen.items() for fault in protocol.faults(data)]
    if faults and split != config.split and not config.allow_partial:
        raise InputError(
            f"{place}, split {split}: expected the samples that its protocols ask for, found other ones: {'; '.join(faults)}; "
            "prepare the whole data set, or evaluate what is there with --allow-partial True"
        )
    is_partial |= bool(faults)
    return Part(config.dataset or place.name, place, split, data, images, chosen, is_partial)


def _open_val(config: FinetuneConfig, place: Path) -> Part:
    folder = config.val or place
    split = config.val_split or _first_of(config, folder, ("val", "dev", "val_in"), ())
    if split is None:
        raise InputError(
            f"expected validation data, on which the checkpoint is chosen, found splits {_splits(config, folder)} in "
            f"{folder}; name one with --val DIR and --val-split, or take pictures out of the training with --hold-out 1000"
        )
    if split == config.split and folder == place:
        raise InputError(
            f"expected validation data apart from the training data, found split {split!r} of {folder} for both; use "
            "--hold-out"
        )
    return _open(config, folder, split)


def _open_test(config: FinetuneConfig, place: Path, val: Part) -> Part | None:
    if config.test_split == "none":
        return None
    folder = config.test or place
    taken = [config.split] if folder == place else []
    taken += [val.split] if folder == val.place else []
    names = ("testall", "test", "dev", "val") if config.regions is not None else ("test", "dev", "val")
    split = config.test_split or _first_of(config, folder, names, taken)
    if split is None and config.test is not None:
        raise InputError(
            f"expected a split test, dev or val in {folder}, found {_splits(config, folder)}; name one with --test-split"
        )
    if split is None:
        say("note: no test data were found, and none are named by --test: the results are those of the validation data")
        return None
    return _open(config, folder, split)


def _splits(config: FinetuneConfig, folder: Path) -> list[str]:
    return splits_of(folder) if config.regions is not None else list(Manifest.load(folder).splits)


def _first_of(config: FinetuneConfig, folder: Path, names: Sequence[str], but: Sequence[str]) -> str | None:
    splits = _splits(config, folder)
    return next((name for name in names if name in splits and name not in but), None)


def _check_counts(config: FinetuneConfig, train: Part) -> None:
    """Raises InputError where a known data set has another number of pictures, or one has too few captions."""
    expected = () if config.regions is not None else TRAIN_IMAGES.get(config.dataset or "", ())
    if expected and config.split == "train" and len(train) not in expected and not config.allow_partial:
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in Manifest.load(train.place).dropped.items())
        raise InputError(
            f"{config.dataset}, split train at {train.place}: expected {' or '.join(f'{n:,}' for n in expected)} pictures, found "
            f"{len(train):,} (the preparation left out {dropped or 'nothing'}); prepare the whole data set, or train on what is "
            "there with --allow-partial True"
        )
    wanted = config.captions_per_image
    short = [(key, len(texts)) for key, texts in _usable(train.data) if len(texts) < wanted]
    if short:
        raise InputError(
            f"expected at least {wanted} captions of each picture, found fewer of {len(short):,} (first: {short[0][0]}, "
            f"{short[0][1]}); take --captions-per-image {min(count for _, count in short)}"
        )


def _usable(data: RetrievalData) -> list[tuple[str, list[str]]]:
    return [(key, [t for t in texts if t.strip()]) for key, texts in zip(data.keys, data.captions, strict=True)]


# --- training


@dataclass(frozen=True)
class Batch:
    """B pictures with their texts, all ranks' together: what is compared is everything with everything."""

    step: int
    epoch: int
    rows: np.ndarray
    """(B,) places in the training data"""
    captions: np.ndarray
    """(B, n) numbers of each picture's captions"""

    def keys(self, part: Part, own: slice) -> list[str]:
        """Returns the keys of some of its pictures."""
        return [part.data.keys[row] for row in self.rows[own]]


class TrainOrder:
    """The batches of a run, by step from 0 on. Every rank holds one. The last pictures of an epoch, which fill no batch, are left
    out.

    Raises InputError where the ranks do not share a batch alike, or there is not one batch.
    """

    def __init__(self, part: Part, batch_size: int, captions_per_image: int, seed: int, world_size: int = 1):
        if batch_size % world_size:
            near = batch_size // world_size * world_size
            raise InputError(
                f"batch_size {batch_size} is not a multiple of {world_size} ranks; nearest: {near or world_size} or "
                f"{near + world_size}"
            )
        if len(part) < batch_size:
            raise InputError(
                f"expected at least one batch of {batch_size} pictures, found {len(part):,}; use --batch-size "
                f"{max(1, len(part) // 4)} or more data"
            )
        self.part, self.batch_size, self.captions_per_image, self.seed = part, batch_size, captions_per_image, seed
        self.steps_per_epoch = len(part) // batch_size
        self._keys = np.array([hash_text(key) for key in part.data.keys], np.uint64)
        self._usable = [[i for i, text in enumerate(texts) if text.strip()] for texts in part.data.captions]
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation, self._epoch = permutation(len(self.part), _ORDER, self.seed, epoch), epoch
        rows = self._permutation[number * self.batch_size : (number + 1) * self.batch_size]
        return Batch(step, epoch, rows, np.array([self._captions(row, epoch) for row in rows]))

    def image_ids(self, batch: Batch) -> Tensor:
        """Returns (B,) int64, equal where two rows hold the same picture."""
        return torch.from_numpy(self._keys[batch.rows].view(np.int64))

    def _captions(self, row: int, epoch: int) -> list[int]:
        """Returns the numbers of the captions that a picture has in an epoch: different ones, in any order."""
        usable = self._usable[row]
        order = permutation(len(usable), _CAPTIONS, self.seed, epoch, int(self._keys[row]))
        return [usable[i] for i in order[: self.captions_per_image]]


class TrainObjects:
    """Parsed objects of training pictures, by caption. Raises InputError where the shards have none of that parser."""

    def __init__(self, part: Part, parser: str):
        self._names = []
        for shard, row in part.images:
            sample = shard.read(row)
            if parser not in sample.objects:
                raise InputError(
                    f"{shard.path}, sample {sample.key}: expected objects of parser {parser!r}, found "
                    f"{sorted(sample.objects) or 'none'}; make them with `python -m data_prep.parse {part.place}`, or choose "
                    "others with --objects"
                )
            self._names.append(sample.objects[parser])

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns object ids (B, M) of pictures, those of all their texts of the batch, and (T, M') of texts, padded with −1."""
        texts = [
            self._names[row][number]
            for row, of_row in zip(batch.rows, batch.captions, strict=True)
            for number in of_row
        ]
        count = batch.captions.shape[1]
        images = [[n for names in texts[i : i + count] for n in names] for i in range(0, len(texts), count)]
        return pad_objects(images), pad_objects(texts)


def same_class(part: Part, batch: Batch) -> Tensor | None:
    """Returns (B, T) bool, True where picture and text are of one class; None where the shards have no classes."""
    classes = [part.data.class_ids[row] for row in batch.rows]
    if any(each is None for each in classes):
        return None
    ids = torch.tensor(classes)
    return ids[:, None] == ids.repeat_interleave(batch.captions.shape[1])
