"""Perceptual hashes: near duplicates and evaluation images are found exactly, at scale's bounded cost, off by default."""

import io
import itertools
import random
from collections import defaultdict

import numpy as np
import pytest
from material import picture, write_shards
from PIL import Image
from prep_material import write_tar

from data_prep import near
from data_prep.duplicates import Decision
from data_prep.merge import merge
from data_prep.near import CONTAMINATED, NEAR_DUPLICATE, leave_out_alike, perceptual_hash
from data_prep.run import prepare
from data_prep.sources.tars import TarsConfig
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.shards import Sample, Shard, ShardWriter


def smooth_picture(number: int, side: int = 96, quality: int = 95) -> bytes:
    """Returns a JPEG of a smooth pattern that depends on `number`."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_a_smaller_and_coarser_copy_has_nearly_the_same_hash_and_other_pictures_do_not():
    for number in range(10):
        original = perceptual_hash(smooth_picture(number))
        assert 0 <= original < 2**63
        assert distance(original, perceptual_hash(smooth_picture(number, side=70, quality=60))) <= 4
    hashes = [perceptual_hash(smooth_picture(number)) for number in range(30)]
    assert min(distance(a, b) for a, b in itertools.combinations(hashes, 2)) > 8


def shards_of_hashes(folder, hashes: list[list[int]], splits: list[str]):
    paths = []
    for number, (each, split) in enumerate(zip(hashes, splits, strict=True)):
        with ShardWriter(folder / f"{split}-{number}.tar", split) as writer:
            for row, value in enumerate(each):
                sample = Sample(
                    key=f"{number:012d}{row:012d}",
                    image=b"x",
                    image_ext="jpg",
                    captions=["a"],
                    objects={},
                    width=1,
                    height=1,
                    sha256=f"{number}.{row}",
                )
                writer.add(sample, {near.FEATURE: value})
        paths.append(folder / f"{split}-{number}.idx")
    return paths


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_the_search_equals_comparing_every_pair(tmp_path, bits):
    draw = random.Random(bits)
    centres = [draw.getrandbits(63) for _ in range(30)]

    def near_one() -> int:
        value = draw.choice(centres)
        for place in draw.sample(range(63), draw.randint(0, 10)):
            value ^= 1 << place
        return value

    splits = ["train", "train", "train", "test"]
    hashes = [[near_one() for _ in range(40)] for _ in splits]
    evaluation = [near_one() for _ in range(10)]
    flat = [(n, row, splits[n], value) for n, each in enumerate(hashes) for row, value in enumerate(each)]
    contaminated = {
        (n, row)
        for n, row, split, value in flat
        if split == "train" and any(distance(value, e) <= bits for e in evaluation)
    }
    repeated = {
        (n, row)
        for place, (n, row, split, value) in enumerate(flat)
        if any(s == split and distance(value, v) <= bits for _, _, s, v in flat[:place])
    }
    decisions = defaultdict(Decision)
    leave_out_alike(
        decisions,
        shards_of_hashes(tmp_path, hashes, splits),
        splits,
        tmp_path,
        bits=bits,
        near_duplicates=True,
        evaluation=evaluation,
    )
    found = {(n, row): reason for n, decision in decisions.items() for row, reason in decision.leave_out.items()}
    assert {place for place, reason in found.items() if reason == CONTAMINATED} == contaminated
    assert found.keys() == contaminated | repeated
    assert repeated
    assert len(repeated) < len(flat)


def config(tmp_path, **settings) -> TarsConfig:
    return TarsConfig(**{"out": tmp_path / "out", "tars": (str(tmp_path / "in"),), "processes": 1, **settings})


def test_it_is_off_by_default_and_counted_when_asked_for(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [1, 2, 3], captions={0: "a dog"})
    write_tar(tmp_path / "in" / "1.tar", [1, 4])  # picture 1 again, with another caption
    assert sum(prepare("tars", config(tmp_path)).dropped.values()) == 0
    manifest = prepare("tars", config(tmp_path, out=tmp_path / "near", near_duplicates=True))
    assert manifest.dropped == {NEAR_DUPLICATE: 1}
    assert all("-" not in key for info in manifest.shards for key in Shard(tmp_path / "near" / info.name).keys)


def test_training_images_of_an_evaluation_set_are_left_out_also_by_a_merge_of_parts(tmp_path):
    write_tar(tmp_path / "in" / "train-0.tar", [1, 2, 3])
    write_tar(tmp_path / "in" / "test-0.tar", [2])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "a.jpg").write_bytes(picture(2))
    write_shards(tmp_path / "shards", sizes=(4,), split="test")  # pictures 0 to 3
    for folders, left in ((("evaluation",), {"train": 2, "test": 1}), (("shards",), {"test": 1})):
        settings = {
            "out": tmp_path / f"out-{folders[0]}",
            "decontaminate": tuple(str(tmp_path / name) for name in folders),
        }
        for part in (0, 1):
            prepare("tars", config(tmp_path, part=part, parts=2, **settings))
        manifest = merge(settings["out"], 1, 0.05)
        assert {split: total["samples"] for split, total in manifest.totals().items()} == left
        assert manifest.dropped == {CONTAMINATED: 4 - sum(left.values())}
        assert Manifest.load(settings["out"]) == manifest


def test_an_evaluation_folder_that_is_missing_empty_or_broken_is_an_error(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [1])
    with pytest.raises(InputError, match="expected a folder of shards or images"):
        prepare("tars", config(tmp_path, decontaminate=(str(tmp_path / "none"),)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected evaluation images in"):
        prepare("tars", config(tmp_path, decontaminate=(str(tmp_path / "empty"),)))
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty" / "a.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(InputError, match=r"a\.jpg, found one that cannot be used"):
        near.evaluation_hashes([str(tmp_path / "empty")])
