"""Flickr30k and COCO as Karpathy lists them: splits, the five captions, ids, order, and what is not the published file."""

import gzip
import hashlib
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from material import picture

from data_prep.pack import PackRules, pack_unit
from data_prep.plan import Dropped, Record
from data_prep.sources import benchmark, coco, flickr30k
from data_prep.sources.benchmark import BEYOND, DAMAGED, NOT_FOUND, caption_letters
from data_prep.sources.karpathy import read_karpathy
from setclip.errors import InputError
from setclip.shards import Shard

REAL_DATA = os.environ.get("SETCLIP_REAL_DATA")


def image(number: int, split: str, captions: list[str], name: str = "", **others) -> dict:
    """Returns an image as Karpathy writes it; its sentids are 10 · number, 10 · number + 1, …"""
    sentences = [
        {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 10 * number + i}
        for i, text in enumerate(captions)
    ]
    return {
        "sentids": [sentence["sentid"] for sentence in sentences],
        "imgid": number,
        "sentences": sentences,
        "split": split,
        "filename": name or f"{1000 - number}.jpg",
        **others,
    }


def five(number: int) -> list[str]:
    return [f"caption {i} of image {number}" for i in range(5)]


def coco_image(number: int, split: str, captions: list[str] | None = None) -> dict:
    year = "train2014" if split == "train" else "val2014"
    name = f"COCO_{year}_{number:012d}.jpg"
    return image(number, split, captions or five(number), name, filepath=year, cocoid=number)


def write(path: Path, dataset: str, images: list[dict]) -> Path:
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    return path


def flickr(tmp_path: Path, listed: list[dict], pictures: list[str] | None = None, **settings):
    """Writes annotation and pictures as the owners lay them out; returns the config."""
    folder = tmp_path / "flickr30k-images"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([each["filename"] for each in listed] if pictures is None else pictures):
        (folder / name).write_bytes(picture(number))
    values = {
        "out": tmp_path / "out",
        "images": folder,
        "annotations": write(tmp_path / "dataset_flickr30k.json", "flickr30k", listed),
        "allow_other_version": True,
        "processes": 1,
    }
    return flickr30k.Flickr30kConfig(**{**values, **settings})


def coco_config(tmp_path: Path, listed: list[dict], **settings) -> coco.CocoConfig:
    for number, each in enumerate(listed):
        folder = tmp_path / "coco" / each["filepath"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / each["filename"]).write_bytes(picture(number))
    values = {
        "out": tmp_path / "out",
        "images": tmp_path / "coco",
        "annotations": write(tmp_path / "dataset_coco.json", "coco", listed),
        "allow_other_version": True,
    }
    return coco.CocoConfig(**{**values, **settings})


def items(plan, split: str | None = None) -> list[Record | Dropped]:
    return [item for unit in plan.units if split in (None, unit.split) for item in unit.read()]


def records(plan, split: str | None = None) -> list[Record]:
    return [item for item in items(plan, split) if isinstance(item, Record)]


SMALL = [
    image(0, "train", five(0)),
    image(1, "val", five(1)),
    image(2, "test", five(2)),
    image(3, "train", five(3)),
    image(4, "test", five(4)),
]


def test_samples_stand_in_the_order_of_the_annotation_split_by_split(tmp_path):
    plan = flickr30k.plan(flickr(tmp_path, SMALL))
    assert [unit.split for unit in plan.units] == ["train", "val", "test"]
    names = [record.name for record in records(plan)]
    assert names == ["1000.jpg", "997.jpg", "999.jpg", "998.jpg", "996.jpg"]  # not sorted


def test_image_bytes_five_captions_and_ids_are_handed_on_as_they_are(tmp_path):
    config = flickr(tmp_path, SMALL)
    record = records(flickr30k.plan(config), "val")[0]
    assert record.image == (config.images / "999.jpg").read_bytes()
    assert record.captions == five(1)
    assert record.extra == {
        "file_name": "999.jpg",
        "image_id": 1,
        "sentids": [10, 11, 12, 13, 14],
        "karpathy_split": "val",
    }
    assert (config.short_side, config.check, config.max_bad) == (0, "decode", 0.0)


def test_units_hold_a_bounded_number_of_images_and_go_to_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "IMAGES_PER_UNIT", 2)
    images = [image(i, "test" if i < 5 else "train", five(i)) for i in range(8)]
    plan = flickr30k.plan(flickr(tmp_path, images))
    assert [unit.name for unit in plan.units] == [
        "train images 0 to 1",
        "train images 2 to 2",
        "test images 0 to 1",
        "test images 2 to 3",
        "test images 4 to 4",
    ]
    again = pickle.loads(pickle.dumps(plan.units[2].read))
    assert list(again()) == list(plan.units[2].read())
    assert [record.name for record in records(plan, "test")] == [each["filename"] for each in images[:5]]


def test_white_space_in_captions_becomes_single_spaces(tmp_path):
    odd = ["A dog \n on  grass. ", "\tTwo cats", "x", "y\u00a0z", "w"]
    plan = flickr30k.plan(flickr(tmp_path, [image(0, "train", odd)]))
    assert records(plan)[0].captions == ["A dog on grass.", "Two cats", "x", "y z", "w"]


def test_a_caption_without_text_goes_with_its_id_and_is_announced(tmp_path):
    plan = flickr30k.plan(flickr(tmp_path, [image(0, "train", ["a", " \n", "c", "d", "e"])]))
    assert records(plan)[0].captions == ["a", "c", "d", "e"]
    assert records(plan)[0].extra["sentids"] == [0, 2, 3, 4]
    assert "dataset_flickr30k.json: 1 captions without text are left out" in plan.warnings


def test_missing_training_images_are_counted_as_absent_with_their_pairs(tmp_path):
    config = flickr(tmp_path, SMALL, pictures=["997.jpg", "999.jpg", "998.jpg", "996.jpg"])
    plan = flickr30k.plan(config)
    assert items(plan, "train")[0] == Dropped(NOT_FOUND, "absent", pairs=5)
    assert [record.name for record in records(plan, "train")] == ["997.jpg"]
    assert "images not found in train: 1 of 2 (1000.jpg, …)" in plan.warnings


def test_a_missing_evaluation_image_is_an_error_unless_it_is_allowed(tmp_path):
    pictures = ["1000.jpg", "997.jpg", "999.jpg", "996.jpg"]
    with pytest.raises(InputError, match=r"did not find test: 1 of 2 \(998.jpg, …\).* --allow-missing True"):
        flickr30k.plan(flickr(tmp_path, SMALL, pictures))
    plan = flickr30k.plan(flickr(tmp_path, SMALL, pictures, allow_missing=True))
    assert items(plan, "test")[0] == Dropped(NOT_FOUND, "absent", pairs=5)
    assert any("test: 1 of 2" in text for text in plan.warnings)


def test_images_that_are_all_elsewhere_are_an_error_that_names_one(tmp_path):
    config = flickr(tmp_path, SMALL, pictures=["other.jpg"], allow_missing=True)
    with pytest.raises(InputError, match=r"expected 5 images in .*, found none of them, not even 1000.jpg.*--images"):
        flickr30k.plan(config)
    with pytest.raises(InputError, match="expected a folder, plain tar or zip of images"):
        flickr30k.plan(flickr(tmp_path, SMALL, images=tmp_path / "nowhere"))


def test_tar_and_zip_give_the_same_records_as_the_folder(tmp_path):
    config = flickr(tmp_path, SMALL)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(config.images, "flickr30k-images")
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in config.images.iterdir():
            archive.write(path, f"flickr30k-images/{path.name}")
            archive.writestr(f"__MACOSX/flickr30k-images/._{path.name}", b"junk")
    expected = records(flickr30k.plan(config))
    for name in ("images.tar", "images.zip"):
        assert records(flickr30k.plan(flickr(tmp_path, SMALL, images=tmp_path / name))) == expected


def test_an_archive_that_is_compressed_or_has_an_image_twice_is_refused(tmp_path):
    config = flickr(tmp_path, SMALL)
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.add(config.images, "flickr30k-images")
    with pytest.raises(InputError, match="expected an uncompressed tar or a zip"):
        flickr30k.plan(flickr(tmp_path, SMALL, images=tmp_path / "images.tar.gz"))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.write(config.images / "999.jpg", "a/999.jpg")
        archive.write(config.images / "999.jpg", "b/999.jpg")
    with pytest.raises(InputError, match=r"expected each image once in .*twice.zip, found 999.jpg twice"):
        flickr30k.plan(flickr(tmp_path, SMALL, images=tmp_path / "twice.zip"))


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_image_that_is_damaged_in_its_zip_is_counted_as_bad(tmp_path, packing):
    config = flickr(tmp_path, SMALL)
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        for image_path in config.images.iterdir():
            archive.write(image_path, image_path.name)
        damaged = archive.getinfo("999.jpg")
    content = bytearray(path.read_bytes())
    middle = damaged.header_offset + 60 + damaged.compress_size // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    found = items(flickr30k.plan(flickr(tmp_path, SMALL, images=path)))
    assert [item for item in found if isinstance(item, Dropped)] == [Dropped(DAMAGED, pairs=5)]


def test_the_published_zip_of_annotations_is_read_as_it_is(tmp_path):
    config = flickr(tmp_path, SMALL)
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w") as archive:
        archive.writestr("dataset_coco.json", "{}")
        archive.write(config.annotations, "dataset_flickr30k.json")
    zipped = flickr(tmp_path, SMALL, annotations=tmp_path / "caption_datasets.zip")
    assert records(flickr30k.plan(zipped)) == records(flickr30k.plan(config))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("dataset_flickr8k.json", "{}")
    with pytest.raises(
        InputError, match=r"expected one member dataset_flickr30k.json, found 0 in dataset_flickr8k.json"
    ):
        flickr30k.plan(flickr(tmp_path, SMALL, annotations=tmp_path / "other.zip"))


def test_wrong_counts_and_captions_are_named_split_by_split(tmp_path):
    with pytest.raises(InputError) as caught:
        flickr30k.plan(flickr(tmp_path, SMALL, allow_other_version=False))
    message = str(caught.value)
    assert "train, images: expected 29,000, found 2" in message
    assert "test, captions: expected 5,000, found 10" in message
    assert re.search(r"val, SHA-256 of the captions' letters: expected 2940369f37cc86c8, found [0-9a-f]{16}", message)
    assert "--allow-other-version True" in message


def test_another_version_that_is_allowed_is_kept_in_the_warnings(tmp_path):
    plan = flickr30k.plan(flickr(tmp_path, SMALL))
    assert any(re.search(r"differs .* train, images: expected 29,000, found 2$", text) for text in plan.warnings)


def as_published(monkeypatch, module, images: list[dict]) -> None:
    """Makes `images` the published version, with digests worked out by themselves."""
    for split in module.IMAGES:
        of_split = [each for each in images if each["split"] == split]
        monkeypatch.setitem(module.IMAGES, split, len(of_split))
        lines = [
            f"{each['filename']}\t{caption_letters(sentence['raw'])}\n"
            for each in sorted(of_split, key=lambda each: each["filename"])
            for sentence in each["sentences"][:5]
        ]
        captions = hashlib.sha256("".join(lines).encode()).hexdigest()
        if module is flickr30k:
            monkeypatch.setitem(flickr30k.CAPTIONS, split, captions)
            continue
        ids = "".join(f"{number}\n" for number in sorted(each["cocoid"] for each in of_split))
        if split in coco.IMAGE_IDS:
            monkeypatch.setitem(coco.IMAGE_IDS, split, hashlib.sha256(ids.encode()).hexdigest())
        if split == "test":
            sentids = "".join(f"{sentence['sentid']}\n" for each in of_split for sentence in each["sentences"][:5])
            monkeypatch.setattr(coco, "TEST_CAPTION_IDS", hashlib.sha256(sentids.encode()).hexdigest())
            monkeypatch.setattr(coco, "TEST_CAPTIONS", captions)


def test_the_published_version_passes_without_a_word_however_spaces_and_quotes_are_written(tmp_path, monkeypatch):
    as_published(monkeypatch, flickr30k, [*SMALL[:-1], image(4, "test", ['a "sign" & dog .', "b", "c", "d", "e"])])
    other_spelling = [*SMALL[:-1], image(4, "test", ["A  ''sign'' &amp; dog.", "b", "c", "d", "e"])]
    plan = flickr30k.plan(flickr(tmp_path, other_spelling, allow_other_version=False))
    assert plan.warnings == []


def test_other_words_stop_evaluation_splits_and_are_announced_for_training(tmp_path, monkeypatch):
    as_published(monkeypatch, flickr30k, SMALL)
    in_train = [image(0, "train", [*five(0)[:4], "another"]), *SMALL[1:]]
    plan = flickr30k.plan(flickr(tmp_path, in_train, allow_other_version=False))
    assert len(plan.warnings) == 1
    assert "train, SHA-256 of the captions' letters" in plan.warnings[0]
    in_test = [*SMALL[:-1], image(4, "test", [*five(4)[:4], "another"])]
    with pytest.raises(InputError, match="test, SHA-256 of the captions' letters"):
        flickr30k.plan(flickr(tmp_path, in_test, allow_other_version=False))


def test_equal_sentids_and_equal_images_are_errors_in_any_version(tmp_path):
    twice = [SMALL[0], {**SMALL[3], "sentences": [*SMALL[3]["sentences"][:4], SMALL[0]["sentences"][2]]}]
    with pytest.raises(InputError, match=r"found 1 repeated, the first 2 at 1000.jpg"):
        flickr30k.plan(flickr(tmp_path, twice))
    with pytest.raises(InputError, match=r"expected each image once in the annotation, found 1 repeated.*1000.jpg"):
        flickr30k.plan(flickr(tmp_path, [SMALL[0], image(7, "test", five(7), "1000.jpg")]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, found"),
        ("[1, 2]", "found no list of images"),
        ('{"images": []}', "expected a list of images, found an empty one"),
        (
            '{"images": [{"filename": "a.jpg", "imgid": 0, "split": "train"}]}',
            "image 0: expected filename, imgid.*'sentences'",
        ),
        ('{"images": [{"filename": 3, "imgid": 0, "split": "train", "sentences": []}]}', "image 0: .*filename 3"),
        (
            '{"images": [{"filename": "a.jpg", "imgid": 0, "split": "dev", "sentences": []}]}',
            "expected a split of train, val, test, found 'dev'",
        ),
        ('{"images": [], "dataset": "flickr8k"}', "expected annotations of 'flickr30k', found those of 'flickr8k'"),
        (
            '{"images": [{"filename": "../a.jpg", "imgid": 0, "split": "train", "sentences": []}]}',
            r"expected names of images inside a folder, found '../a.jpg'",
        ),
    ],
)
def test_a_damaged_or_foreign_annotation_is_named_with_what_was_found(tmp_path, text, message):
    config = flickr(tmp_path, SMALL)
    config.annotations.write_text(text)
    with pytest.raises(InputError, match=message):
        flickr30k.plan(config)
    with pytest.raises(InputError, match=r"found no file; give it.*--annotations"):
        flickr30k.plan(flickr(tmp_path, SMALL, annotations=tmp_path / "no.json"))


@pytest.mark.parametrize("setting", [{"min_side": 10}, {"max_aspect": 3.0}, {"min_caption_chars": 5}])
def test_filters_are_refused_because_they_would_change_the_protocol(tmp_path, setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(InputError, match=f"expected no filter on a retrieval benchmark .*found {name} {value}"):
        flickr(tmp_path, SMALL, **setting)


COCO = [
    coco_image(391895, "test"),
    coco_image(522418, "restval"),
    coco_image(184613, "val"),
    coco_image(57870, "train"),
    coco_image(60623, "test", [*five(60623), "a sixth", "a seventh"]),
]


def test_restval_trains_too_and_keeps_the_name_of_its_split(tmp_path):
    plan = coco.plan(coco_config(tmp_path, COCO))
    found = {
        record.extra["coco_id"]: (record.name, record.extra["karpathy_split"]) for record in records(plan, "train")
    }
    assert found == {
        522418: ("val2014/COCO_val2014_000000522418.jpg", "restval"),
        57870: ("train2014/COCO_train2014_000000057870.jpg", "train"),
    }
    assert [unit.split for unit in plan.units] == ["train", "val", "test"]


def test_restval_can_be_left_out(tmp_path):
    plan = coco.plan(coco_config(tmp_path, COCO, restval=False))
    assert [record.extra["coco_id"] for record in records(plan)] == [57870, 184613, 391895, 60623]


def test_the_first_five_captions_are_taken_and_the_others_counted_as_no_loss_of_the_protocol(tmp_path):
    plan = coco.plan(coco_config(tmp_path, COCO))
    assert [record.captions for record in records(plan, "test")] == [five(391895), five(60623)]
    assert records(plan, "test")[1].extra["sentids"] == [10 * 60623 + i for i in range(5)]
    assert items(plan, "test")[2:] == [Dropped(BEYOND, "filtered", pairs=0, samples=0)] * 2


def test_all_captions_are_taken_where_that_is_asked_for_and_said_to_be_another_protocol(tmp_path):
    plan = coco.plan(coco_config(tmp_path, COCO, captions_per_image=0))
    assert records(plan, "test")[1].captions == [*five(60623), "a sixth", "a seventh"]
    assert len(records(plan, "test")[1].extra["sentids"]) == 7
    assert "captions_per_image is 0: the protocols of COCO take 5" in plan.warnings
    with pytest.raises(InputError, match="found -1"):
        coco_config(tmp_path, COCO, captions_per_image=-1)


def test_image_folders_of_coco_may_be_the_zips_that_its_owners_publish(tmp_path):
    config = coco_config(tmp_path, COCO)
    expected = records(coco.plan(config))
    with zipfile.ZipFile(config.images / "val2014.zip", "w") as archive:
        for path in sorted((config.images / "val2014").iterdir()):
            archive.write(path, f"val2014/{path.name}")
            path.unlink()
    (config.images / "val2014").rmdir()
    assert records(coco.plan(config)) == expected


def test_coco_as_published_passes_and_its_test_images_must_keep_their_order(tmp_path, monkeypatch):
    as_published(monkeypatch, coco, COCO)
    assert coco.plan(coco_config(tmp_path, COCO, allow_other_version=False)).warnings == []
    with pytest.raises(InputError, match="caption ids in their order") as caught:
        coco.plan(coco_config(tmp_path, COCO[::-1], allow_other_version=False))
    assert "image ids" not in str(caught.value)  # the sets are the same


def test_an_image_of_coco_in_another_split_is_found_by_its_id(tmp_path, monkeypatch):
    as_published(monkeypatch, coco, COCO)
    swapped = [
        {**each, "split": {"restval": "val", "val": "restval"}.get(each["split"], each["split"])} for each in COCO
    ]
    with pytest.raises(InputError, match="restval, SHA-256 of the image ids"):
        coco.plan(coco_config(tmp_path, swapped, allow_other_version=False))


def test_an_image_of_coco_without_its_id_is_an_error(tmp_path):
    config = coco_config(tmp_path, COCO)
    without = [{name: value for name, value in each.items() if name != "cocoid"} for each in COCO]
    write(config.annotations, "coco", without)
    with pytest.raises(InputError, match="expected every image to have a cocoid"):
        coco.plan(config)


def test_packed_samples_keep_order_bytes_captions_and_ids(tmp_path):
    config = coco_config(tmp_path, COCO)
    unit = coco.plan(config).units[-1]
    report = pack_unit(unit, tmp_path / "unit", PackRules.from_config(config))
    (info,) = report.shards
    samples = list(Shard(tmp_path / "unit" / info.name))
    expected = [item for item in unit.read() if isinstance(item, Record)]
    assert [sample.image for sample in samples] == [record.image for record in expected]
    assert [sample.captions for sample in samples] == [record.captions for record in expected]
    assert [sample.extra["sentids"] for sample in samples] == [record.extra["sentids"] for record in expected]
    assert (report.pairs_listed, report.pairs_present, report.dropped()) == (10, 10, {BEYOND: 2})


@pytest.mark.slow
@pytest.mark.skipif(REAL_DATA is None, reason="SETCLIP_REAL_DATA is not set")
def test_all_captions_of_flickr30k_have_the_published_counts_and_digests(tmp_path):
    images: dict[str, dict] = {}
    with gzip.open(Path(REAL_DATA or "") / "captions" / "flickr30k.tsv.gz", "rt", encoding="utf-8") as file:
        for line in file:
            place, caption = line.rstrip("\n").split("\t")
            split, name = place.split("/")
            images.setdefault(name, image(len(images), split, [], name))["sentences"].append({"raw": caption})
    for one in images.values():
        for position, sentence in enumerate(one["sentences"]):
            sentence["sentid"] = 5 * one["imgid"] + position
    path = write(tmp_path / "dataset_flickr30k.json", "flickr30k", list(images.values()))
    listed, warnings = read_karpathy(path, "flickr30k", flickr30k.SPLITS)
    facts = list(flickr30k.facts(listed))
    assert len(facts) == 9
    assert [fact.what for fact in facts if fact.found != fact.expected] == []
    assert benchmark.check_version(path, facts, allow_other_version=False) == []
    assert warnings == []
    assert sum(len(one.captions) for one in listed) == 155_070
