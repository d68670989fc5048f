"""The data sets of retrieval by name, as data: where their shards lie, how many samples they have, what is reported.

A new data set is one entry. Used by the command of retrieval; `read_captions` also by training, which evaluates on its way.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from eval_suite.judgements import judgements
from setclip.datasets import data_root, locate
from setclip.errors import InputError
from setclip.log import say
from setclip.lookup import look_up
from setclip.manifest import MANIFEST_NAME, Manifest, open_split
from setclip.shards import Shard

HELD_OUT_SPLIT = "held-out"
"""What fine-tuning calls the pictures that it takes out of a split to choose by."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one split of a benchmark holds."""

    images: int
    classes: int | None = None
    protocols: tuple[str, ...] | None = None
    """Where they are not those of the data set."""


@dataclass(frozen=True, kw_only=True)
class RetrievalDataset:
    """Shards with captions held out for retrieval. They lie where `setclip.datasets` says."""

    splits: dict[str, Split] = field(default_factory=dict)
    """Those whose numbers are fixed; others are evaluated as they are."""
    protocols: tuple[str, ...] = ("full",)
    """What is reported, by name in `eval_suite.protocols.PROTOCOLS`; the first gives the headline."""
    captions_per_image: int | None = None
    """The first so many captions of each image are taken, and fewer are a fault. None: all that there are."""


RETRIEVAL_DATASETS: dict[str, RetrievalDataset] = {
    "scenes": RetrievalDataset(),
    "flickr30k": RetrievalDataset(
        splits={"val": Split(images=1_014), "test": Split(images=1_000)},
        captions_per_image=5,
    ),
    "coco": RetrievalDataset(
        # Karpathy's lists have 25,010 captions of the test images; every protocol takes the first five of each.
        splits={
            "val": Split(images=5_000, protocols=("5k", "1k-5fold")),
            "test": Split(images=5_000, protocols=("5k", "1k-5fold", "eccv", "cxc")),
        },
        captions_per_image=5,
    ),
    "cub": RetrievalDataset(
        splits={"test": Split(images=2_967, classes=50)},
        protocols=("class",),
        captions_per_image=10,
    ),
}

IDS_OF_COCO = "coco test"
"""The data set and split whose missing images can be told by their ids."""


@dataclass(frozen=True, kw_only=True)
class RetrievalData:
    """What is ranked: images in the order of the shards, each with its captions."""

    keys: list[str]
    captions: list[list[str]]
    image_ids: list[int | None]
    """COCO's ids (`coco_id`), where the samples have them."""
    caption_ids: list[list[int] | None]
    """COCO's ids of the captions (`sentids`), one list an image."""
    class_ids: list[int | None]
    """`class_id`, where the samples have it (CUB)."""
    left_out: int = 0
    """Captions beyond those that the protocol takes."""

    @property
    def image_of_text(self) -> Tensor:
        """(number of captions,) int64, the image that each caption belongs to."""
        counts = torch.tensor([len(texts) for texts in self.captions], dtype=torch.int64)
        return torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def captions_sha256(self) -> str:
        """A digest over keys and captions in their order: two runs that agree in it ranked the same."""
        digest = sha256()
        for key, texts in zip(self.keys, self.captions, strict=True):
            digest.update("\0".join((key, *texts, "\n")).encode())
        return digest.hexdigest()


def retrieval_place(name: str | None, data: Path | None) -> tuple[str, Path]:
    """Returns (name, folder of shards): of a known name, of any folder of shards under the data root, or of `data`."""
    if data is not None:
        return name or data.resolve().name, data
    if name is None:
        raise InputError(
            f"expected the name of a data set ({', '.join(RETRIEVAL_DATASETS)}) or a folder of shards given by --data, "
            "found neither"
        )
    root = data_root()
    prepared = [path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}")]
    look_up(dict.fromkeys((*RETRIEVAL_DATASETS, *prepared)), name, "dataset")
    return name, root / name if name in prepared else locate(name)


def open_retrieval(
    name: str | None, place: Path, split: str | None = None, allow_partial: bool = False
) -> tuple[str, list[Shard], RetrievalData, tuple[str, ...], bool]:
    """Returns (split, its shards, their data, the protocols that are reported, whether samples are missing).

    `name`: one of RETRIEVAL_DATASETS, whose numbers are then checked, or any other or none, whose are not. Raises
    InputError that names what is missing, unless `allow_partial`.
    """
    dataset = RETRIEVAL_DATASETS.get(name or "", RetrievalDataset())
    split, shards = open_split(place, split)
    data = read_samples(shards, dataset.captions_per_image)
    if data.left_out:
        say(f"{data.left_out:,} captions beyond the first {dataset.captions_per_image} of an image are not taken")
    expected = dataset.splits.get(split)
    if expected is None:
        return split, shards, data, dataset.protocols, False
    faults = count_faults(data, expected, dataset.captions_per_image, f"{name} {split}" == IDS_OF_COCO)
    if faults and not allow_partial:
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in Manifest.load(place).dropped.items())
        each = f" with {dataset.captions_per_image} captions each" if dataset.captions_per_image else ""
        classes = f" of {expected.classes} classes" if expected.classes else ""
        raise InputError(
            f"{name}, split {split} at {place}: expected {expected.images:,} images{classes}{each}, found "
            f"{len(data.keys):,} images and {sum(map(len, data.captions)):,} captions: {'; '.join(faults)}. The "
            f"preparation left out {dropped or 'nothing'}. Prepare the whole data set, or evaluate what is there with "
            "--allow-partial True (the result is then marked partial)"
        )
    return split, shards, data, expected.protocols or dataset.protocols, bool(faults)


def count_faults(
    data: RetrievalData, expected: Split, captions_per_image: int | None, has_coco_ids: bool = False
) -> list[str]:
    """Returns what is wrong with the numbers of images, captions and classes."""
    faults = []
    difference = len(data.keys) - expected.images
    if difference:
        faults.append(f"{abs(difference):,} images {'missing' if difference < 0 else 'too many'}")
    if has_coco_ids and all(each is not None for each in data.image_ids):
        lacking = sorted(judgements("original", "i2t").keys() - set(data.image_ids))
        if lacking:
            more = ", …" if len(lacking) > 5 else ""
            faults.append(f"no image of COCO id {', '.join(map(str, lacking[:5]))}{more}")
    if captions_per_image is not None:
        other = [(key, len(texts)) for key, texts in zip(data.keys, data.captions, strict=True)]
        other = [(key, count) for key, count in other if count != captions_per_image]
        if other:
            key, count = other[0]
            faults.append(f"{len(other):,} images without {captions_per_image} captions (first: {key}, {count})")
    if expected.classes is not None:
        found = len(Counter(each for each in data.class_ids if each is not None))
        if found != expected.classes:
            faults.append(f"{found} of {expected.classes} classes")
    return faults


def read_samples(shards: Sequence[Shard], captions_per_image: int | None = None) -> RetrievalData:
    """Returns what is ranked, in the order of the shards. Raises InputError on a sample without caption."""
    data = RetrievalData(keys=[], captions=[], image_ids=[], caption_ids=[], class_ids=[])
    left_out = 0
    for shard in shards:
        for sample in shard:
            if not any(text.strip() for text in sample.captions):
                raise InputError(
                    f"{shard.path}, sample {sample.key}: expected a caption, found none; prepare the shards again"
                )
            number = captions_per_image or len(sample.captions)
            left_out += max(0, len(sample.captions) - number)
            sentids = sample.extra.get("sentids")
            data.keys.append(sample.key)
            data.captions.append(sample.captions[:number])
            data.image_ids.append(sample.extra.get("coco_id"))
            data.caption_ids.append(None if sentids is None else list(sentids[:number]))
            data.class_ids.append(sample.extra.get("class_id"))
    if not data.keys:
        raise InputError(f"expected samples in {[str(s.path) for s in shards]}, found none; prepare the shards again")
    return RetrievalData(
        keys=data.keys,
        captions=data.captions,
        image_ids=data.image_ids,
        caption_ids=data.caption_ids,
        class_ids=data.class_ids,
        left_out=left_out,
    )


def read_captions(shards: Sequence[Shard]) -> tuple[list[str], list[list[str]]]:
    """Returns (keys, captions of each sample) in the order of the shards. Raises InputError on one without caption."""
    data = read_samples(shards)
    return data.keys, data.captions
