"""Flickr30k in Karpathy's splits: 29,000 training, 1,014 validation and 1,000 test images with five captions each.

    python -m data_prep.run flickr30k --images flickr30k-images --annotations dataset_flickr30k.json --out data/flickr30k

Images: Young et al. 2014, https://aclanthology.org/Q14-1006. Fine-tuning reads the split `train` and chooses on `val`;
`eval_suite` reports on `test`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.plan import Plan
from data_prep.sources.benchmark import BenchmarkConfig, Fact, captions_digest, check_version, make_plan
from data_prep.sources.karpathy import CREDIT, PROTOCOL_CAPTIONS, Listed, read_karpathy

SPLITS = ("train", "val", "test")

CREDITS = [
    "Flickr30k: Young et al. 2014; images belong to their owners on Flickr, for research and education only",
    CREDIT,
]

IMAGES = {"train": 29_000, "val": 1_014, "test": 1_000}

CAPTIONS = {
    "train": "f63b8b78166c0a274db87acba4c97b89c45e2f22a99d6035f375134ba3f99901",
    "val": "2940369f37cc86c84001e9d8b20025b7a0dfb1f415c5f87ea222a7964f4c4299",
    "test": "ee0aa818d6cdf07373a457de5f87c4aff9a94964c179edb6f8083c8232f7f0e9",
}
"""`captions_digest` per split. They were not taken from dataset_flickr30k.json itself but from copies of its captions:
one of all 155,070, whose splits and order of images are those of a second, independent copy. Of val and test that second
copy has the captions too, tokenised, and gives the same digests; those of train rest on one copy."""

CONFIRMED = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Flickr30kConfig(BenchmarkConfig):
    """Packs Flickr30k in Karpathy's splits (train, val, test)."""

    images: Path
    """The folder flickr30k-images, or a plain tar or zip of it; the splits name 31,014 of its images."""
    annotations: Path
    """Karpathy's dataset_flickr30k.json, or the caption_datasets.zip that holds it."""


def plan(config: Flickr30kConfig) -> Plan:
    """Checks the annotation against what is known of it, looks for the images, and returns the units."""
    listed, warnings = read_karpathy(config.annotations, "flickr30k", SPLITS)
    warnings += check_version(config.annotations, facts(listed), config.allow_other_version)
    entries = [one.entry(one.split, PROTOCOL_CAPTIONS) for one in listed]
    return make_plan(config, entries, config.images, SPLITS, CREDITS, warnings)


def facts(listed: Sequence[Listed]) -> Iterator[Fact]:
    """Yields what is known of each split beside what `listed` has."""
    for split in SPLITS:
        of_split = [one for one in listed if one.split == split]
        yield Fact(f"{split}, images", IMAGES[split], len(of_split))
        captions = sum(len(one.captions) for one in of_split)
        yield Fact(f"{split}, captions", PROTOCOL_CAPTIONS * IMAGES[split], captions)
        digest = captions_digest({one.name: one.captions for one in of_split})
        yield Fact(f"{split}, SHA-256 of the captions' letters", CAPTIONS[split], digest, split in CONFIRMED)
