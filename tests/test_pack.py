"""One unit becomes shards: what is kept, what is left out and why, and how shards are filled."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from material import picture

from data_prep.images import ImageRules
from data_prep.pack import (
    BAD_EXTRA,
    EMPTY_CAPTION,
    LONG_CAPTION,
    NO_CAPTION_FITS,
    NO_CAPTION_LEFT,
    NOT_UNICODE,
    SHORT_CAPTION,
    PackRules,
    UnitReport,
    pack_unit,
)
from data_prep.plan import Dropped, Record, Unit
from data_prep.pos_config import PosConfig
from setclip.errors import InputError
from setclip.shards import Sample, Shard


def rules(**settings) -> PackRules:
    images = {"short_side": 0, "jpeg_quality": 95, "check": "decode", "min_side": 0, "max_aspect": 0.0}
    images |= {name: settings.pop(name) for name in list(settings) if name in images}
    defaults = {
        "images": ImageRules(**images),
        "pos": None,
        "perceptual_hash": False,
        "shard_size": 100,
        "shard_bytes": 10_000_000,
        "min_caption_chars": 1,
        "max_caption_chars": 0,
    }
    return PackRules(**{**defaults, **settings})


def record(number: int, *captions: str, **settings) -> Record:
    return Record(image=picture(number), captions=list(captions or ("a dog",)), name=str(number), **settings)


def pack(tmp_path: Path, *items: Record | Dropped, **settings) -> tuple[UnitReport, list[Sample]]:
    unit = Unit(name="the unit", split="train", read=partial(iter, items))
    report = pack_unit(unit, tmp_path / "unit", rules(**settings))
    return report, [sample for info in report.shards for sample in Shard(tmp_path / "unit" / info.name)]


def test_what_a_source_cannot_give_is_counted_by_reason_samples_and_pairs(tmp_path):
    report, samples = pack(
        tmp_path,
        record(1, "a dog", "a cat"),
        Dropped("gone", "absent", pairs=3),
        Dropped("gone", "absent", pairs=7, samples=2),
        Dropped("an image alone", "bad", pairs=0, samples=0),
    )
    assert len(samples) == 1
    assert (report.samples_listed, report.samples_present) == (4, 1)
    assert (report.pairs_listed, report.pairs_present) == (12, 2)
    assert report.dropped() == {"gone": 3, "an image alone": 1}
    assert report.bad() == {"an image alone": 1}
    assert UnitReport.from_dict(report.to_dict()) == report


def test_captions_are_filtered_one_by_one_and_a_sample_goes_with_its_last(tmp_path):
    report, samples = pack(
        tmp_path,
        record(1, "ok", "abc", "x" * 11, " ", "a\ud800b"),
        record(2, "", "  "),
        record(3, "ab", "x" * 12),
        min_caption_chars=3,
        max_caption_chars=10,
    )
    assert [sample.captions for sample in samples] == [["abc"]]
    assert report.dropped() == {
        SHORT_CAPTION: 2,
        LONG_CAPTION: 2,
        EMPTY_CAPTION: 3,
        NOT_UNICODE: 1,
        NO_CAPTION_LEFT: 1,
        NO_CAPTION_FITS: 1,
    }
    assert report.bad() == {NO_CAPTION_LEFT: 1}
    assert report.samples_listed == 3


@pytest.mark.parametrize("extra", [{"a": "\ud800"}, {"a": float("nan")}, {"a": b"bytes"}, {"a": {1: 2}}])
def test_metadata_that_json_cannot_hold_is_left_out_with_its_sample(tmp_path, extra):
    report, samples = pack(tmp_path, record(1, extra=extra), record(2, extra={"a": [1, "ü", None, {"b": 0.5}]}))
    assert report.dropped() == {BAD_EXTRA: 1}
    assert samples[0].extra == {"a": [1, "ü", None, {"b": 0.5}]}


def test_metadata_nested_without_end_is_left_out(tmp_path):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert pack(tmp_path, record(1, extra={"a": nested}))[0].dropped() == {BAD_EXTRA: 1}


def test_shards_are_filled_by_number_and_by_bytes(tmp_path):
    report, samples = pack(tmp_path, *(record(i) for i in range(7)), shard_size=3)
    assert [info.samples for info in report.shards] == [3, 3, 1]
    assert [sample.image for sample in samples] == [picture(i) for i in range(7)]
    (tmp_path / "b").mkdir()
    report, _ = pack(tmp_path / "b", *(record(i) for i in range(7)), shard_bytes=12_000)
    assert len(report.shards) > 1
    assert all(info.samples == 1 or info.bytes < 12_000 + 4_096 for info in report.shards)


def test_large_images_are_resized_and_keep_the_key_of_the_source(tmp_path):
    report, (sample,) = pack(tmp_path, record(1), short_side=20)
    assert (sample.width, sample.height) == (20, 20)
    assert report.resized == 1
    (tmp_path / "b").mkdir()
    _, (whole,) = pack(tmp_path / "b", record(1))
    assert (sample.key, sample.sha256) == (whole.key, whole.sha256)
    assert whole.image == picture(1)


def test_images_left_out_by_a_filter_are_not_bad(tmp_path):
    report, samples = pack(tmp_path, record(1), min_side=41)
    assert samples == []
    assert report.bad() == {}
    assert sum(report.dropped().values()) == 1


def test_captions_are_parsed_in_the_order_of_samples_beyond_one_block(tmp_path):
    items = [record(i, f"a dog and {'cat' if i % 2 else 'two cars'}", "nothing") for i in range(520)]
    _, samples = pack(tmp_path, *items, pos=PosConfig(), shard_size=1000, check="structure")
    assert [s.objects["pos"][0] for s in samples] == [["dog", "cat"] if i % 2 else ["dog", "car"] for i in range(520)]
    assert all(len(s.objects["pos"]) == 2 for s in samples)


def test_a_unit_that_breaks_leaves_nothing_behind(tmp_path):
    def breaks() -> Iterator[Record]:
        yield record(1)
        raise OSError("the disk is gone")

    unit = Unit(name="the unit", split="train", read=breaks)
    with pytest.raises(InputError, match=r"the unit: could not read it .* the disk is gone; mend that"):
        pack_unit(unit, tmp_path / "unit", rules())
    assert not list(tmp_path.iterdir())
