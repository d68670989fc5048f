"""COCO captions in Karpathy's splits: 113,287 training, 5,000 validation and 5,000 test images with five captions each.

    python -m data_prep.run coco --images DIR --annotations dataset_coco.json --out data/coco

DIR holds `train2014` and `val2014`, as folders or as the zips of that name. Training is all of train2014 and the 30,504
images of val2014 that Karpathy left over ("restval"). Protocols take the first five captions of an image. The test
images keep their order, because the "5-fold 1K" protocol cuts them into five runs of 1,000.

A sample's JSON has `coco_id` (the image's id) and `sentids` (the ids of its captions in the official annotations): ECCV
Caption and CxC join on these. Lin et al. 2014, https://arxiv.org/abs/1405.0312; Chen et al. 2015,
https://arxiv.org/abs/1504.00325.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.plan import Plan
from data_prep.sources.benchmark import BenchmarkConfig, Fact, captions_digest, check_version, digest_of, make_plan
from data_prep.sources.karpathy import CREDIT, PROTOCOL_CAPTIONS, Listed, read_karpathy
from setclip.errors import InputError

SPLITS = ("train", "val", "test")
PUBLISHED_SPLITS = ("train", "restval", "val", "test")

CREDITS = [
    "COCO captions: Chen et al. 2015, CC BY 4.0; the images under their owners' Flickr licences",
    CREDIT,
]

IMAGES = {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}

IMAGE_IDS = {
    "train": "060d6772c576b769c4a9cba01e5ee4dd93939548640bbbcc300066e468fc2b53",
    "restval": "8be80a00993f2a954842ebc5e9f9bca24aeb5d745fd462560d02ecf60dbefcae",
}
"""`digest_of` the sorted image ids, from a published list of the training ids. The official captions of val2014 and
val2017 that we have (31,309 images) agree: none of their images is in train. Of val only the number is checked."""

TEST_CAPTION_IDS = "f80641277519ca01c71720575a015c3c71453da1125e2f6e09409d1b82fb7284"
"""`digest_of` the 25,000 caption ids of test in their order, from the package eccv-caption (0.1.0, coco_test_ids.npy). The
order of its images is that of a second, independent copy of the split."""

TEST_CAPTIONS = "4675231b33568fbd4c61701cd439b5df6f45c10442e9ce1848c6534be9d9fb32"
"""`captions_digest` of test (names without their folder), from one copy of the captions, tokenised; all official captions
of its images that we have agree with it."""


@dataclass(frozen=True, kw_only=True)
class CocoConfig(BenchmarkConfig):
    """Packs COCO's captions in Karpathy's splits (train, val, test)."""

    images: Path
    """Folder with train2014 and val2014 in it, as folders or zips."""
    annotations: Path
    """Karpathy's dataset_coco.json, or the caption_datasets.zip that holds it."""
    captions_per_image: int = PROTOCOL_CAPTIONS
    """The first so many captions of each image; 0 keeps the sixth and seventh of some, which is another protocol."""
    restval: bool = True
    """Whether the 30,504 images of val2014 that are neither val nor test are for training, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.captions_per_image < 0:
            raise InputError(
                f"expected captions_per_image of 0 (all) or more, found {self.captions_per_image}; the protocols take 5"
            )


def plan(config: CocoConfig) -> Plan:
    """Checks the annotation against what is known of it, looks for the images, and returns the units."""
    listed, warnings = read_karpathy(config.annotations, "coco", PUBLISHED_SPLITS)
    if unknown := next((one for one in listed if one.coco_id is None), None):
        raise InputError(
            f"{config.annotations}: expected every image to have a cocoid, found none at {unknown.name}; take the file as "
            "it was published"
        )
    warnings += check_version(config.annotations, facts(listed), config.allow_other_version)
    if config.captions_per_image != PROTOCOL_CAPTIONS:
        warnings.append(
            f"captions_per_image is {config.captions_per_image}: the protocols of COCO take {PROTOCOL_CAPTIONS}"
        )
    if not config.restval:
        listed = [one for one in listed if one.split != "restval"]
    split_of = {"restval": "train"}
    entries = [one.entry(split_of.get(one.split, one.split), config.captions_per_image) for one in listed]
    return make_plan(config, entries, config.images, SPLITS, CREDITS, warnings)


def facts(listed: Sequence[Listed]) -> Iterator[Fact]:
    """Yields what is known of each published split beside what `listed` has."""
    for split in PUBLISHED_SPLITS:
        of_split = [one for one in listed if one.split == split]
        yield Fact(f"{split}, images", IMAGES[split], len(of_split))
        captions = sum(min(len(one.captions), PROTOCOL_CAPTIONS) for one in of_split)
        # Of val and test published files say that every image has five; of the training images we have no such file.
        is_confirmed = split in ("val", "test")
        expected = PROTOCOL_CAPTIONS * IMAGES[split]
        yield Fact(f"{split}, captions (first five of each image)", expected, captions, is_confirmed)
        if split in IMAGE_IDS:
            found = digest_of(sorted(one.coco_id for one in of_split if one.coco_id is not None))
            yield Fact(f"{split}, SHA-256 of the image ids", IMAGE_IDS[split], found)
        if split == "test":
            ids = digest_of(sentid for one in of_split for sentid in one.sentids[:PROTOCOL_CAPTIONS])
            yield Fact("test, SHA-256 of the caption ids in their order", TEST_CAPTION_IDS, ids)
            texts = {one.name.rpartition("/")[2]: one.captions[:PROTOCOL_CAPTIONS] for one in of_split}
            digest = captions_digest(texts)
            yield Fact("test, SHA-256 of the captions' letters", TEST_CAPTIONS, digest, is_confirmed=False)
