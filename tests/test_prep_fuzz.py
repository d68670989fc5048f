"""A thousand mutated tars, caption files and JPEGs: no crash, and samples in = samples out + dropped by reason, exactly."""

import dataclasses
import io
import json
import random
import tarfile
from functools import partial
from pathlib import Path

import pytest
from material import picture
from prep_material import add, caption_of, write_tar

from data_prep.images import ImageRules
from data_prep.pack import PackRules, UnitReport, pack_unit
from data_prep.plan import Dropped, Unit
from data_prep.sources import folder
from data_prep.sources.tars import read_tar
from setclip.errors import InputError
from setclip.shards import Shard

RULES = PackRules(
    images=ImageRules(short_side=24, jpeg_quality=90, check="decode", min_side=8, max_aspect=4.0),
    pos=None,
    perceptual_hash=False,
    shard_size=4,
    shard_bytes=1_000_000,
    min_caption_chars=1,
    max_caption_chars=200,
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Returns `data` after one to four changes of the kinds that disks, networks and attackers make."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        kind = draw.choice(("flip", "flip", "set", "cut", "insert", "repeat", "zero", "drop"))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "set" and place < len(changed):
            changed[place] = draw.choice((0, 0xFF, 0x20, 0x30, 0x80))
        elif kind == "cut" and draw.random() < 0.3:
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = draw.randbytes(draw.choice((1, 3, 512)))
        elif kind == "repeat":
            changed[place:place] = changed[place : place + draw.choice((2, 512, 1536))]
        elif kind == "zero":
            size = draw.choice((1, 16, 512))
            changed[place : place + size] = bytes(min(size, len(changed) - place))
        elif kind == "drop":
            del changed[place : place + draw.choice((1, 7, 512))]
    return bytes(changed)


def packed(unit: Unit, out: Path) -> UnitReport:
    """Packs a unit and checks the account against what the source yields and what the shards hold."""
    out.parent.mkdir(exist_ok=True)
    report = pack_unit(unit, out, RULES)
    items = list(unit.read())
    listed = sum(item.samples if isinstance(item, Dropped) else 1 for item in items)
    read_back = [sample for info in report.shards for sample in Shard(out / info.name)]
    assert report.samples_listed == listed == report.samples_present + sum(left.samples for left in report.left_out)
    assert report.samples_present == len(read_back)
    assert report.pairs_present == sum(len(sample.captions) for sample in read_back)
    for info in report.shards:
        with tarfile.open(out / info.name, "r:") as tar:
            assert len(tar.getmembers()) == 3 * info.samples
    return report


def test_mutated_tars(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", list(range(5))).read_bytes()
    refusals: list[tuple[str, str]] = []
    kept = lost = left_behind = 0
    for seed in range(400):
        path = tmp_path / f"{seed}.tar"
        path.write_bytes(mutated(whole, random.Random(seed)))
        unit = Unit(name=str(path), split="train", read=partial(read_tar, str(path)))
        try:
            report = packed(unit, tmp_path / "out" / str(seed))
        except InputError as error:
            refusals.append((path.name, str(error)))
            left_behind += (tmp_path / "out" / str(seed)).exists()
        else:
            kept += report.samples_present
            lost += sum(left.samples for left in report.left_out)
    assert left_behind == 0
    assert len(refusals) < 100
    assert all(name in text and "could not" not in text for name, text in refusals)
    assert kept > 400
    assert lost > 100


def test_mutated_caption_files(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(picture(number))
        lines.append(json.dumps({"file_name": f"{number}.jpg", "captions": [caption_of(number), "ünïcode ☕"]}))
    whole = ("\n".join(lines) + "\n").encode()
    refusals: list[tuple[str, str]] = []
    kept = 0
    for seed in range(300):
        captions = tmp_path / f"{seed}.jsonl"
        captions.write_bytes(mutated(whole, random.Random(1_000 + seed)))
        try:
            plan = folder.plan(folder.FolderConfig(out=tmp_path / "x", images=images, captions=captions))
            for number, unit in enumerate(plan.units):
                kept += packed(unit, tmp_path / "out" / f"{seed}-{number}").samples_present
        except InputError as error:
            refusals.append((captions.name, str(error)))
    assert len(refusals) < 290
    assert all(name in text for name, text in refusals)
    assert kept > 60


@pytest.mark.parametrize("check", ["structure", "decode"])
def test_mutated_jpegs(tmp_path, check):
    draw = random.Random(7)
    reasons: set[str] = set()
    present = 0
    for number in range(10):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for row in range(15):
                add(tar, f"{row:03d}.jpg", mutated(picture(number * 15 + row, side=20 + 12 * (row % 2)), draw))
                add(tar, f"{row:03d}.txt", b"a dog")
        path = tmp_path / f"{number}.tar"
        path.write_bytes(buffer.getvalue())
        images = dataclasses.replace(RULES.images, check=check)
        rules = dataclasses.replace(RULES, images=images, perceptual_hash=True)
        unit = Unit(name=str(path), split="train", read=partial(read_tar, str(path)))
        (tmp_path / "out").mkdir(exist_ok=True)
        report = pack_unit(unit, tmp_path / "out" / str(number), rules)
        assert report.samples_listed == 15 == report.samples_present + sum(left.samples for left in report.left_out)
        reasons |= report.dropped().keys()
        present += report.samples_present
    assert 0 < present < 150
    assert len(reasons) >= 3
