"""Images and captions of one's own: what is packed, what is dropped and counted, and what stops the job."""

import gzip
import io
import itertools
import json
import os
import pickle
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from img2dataset_material import count_samples, dropped, read_all, records
from material import picture
from PIL import Image

from data_prep.duplicates import DUPLICATE
from data_prep.pack import EMPTY_CAPTION, NO_CAPTION_LEFT
from data_prep.run import prepare
from data_prep.sources import folder, untrusted
from data_prep.sources.folder import UNNAMED, FolderConfig, plan
from data_prep.sources.untrusted import NO_IMAGE
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.objects import read_objects
from setclip.shards import Shard

REAL = os.environ.get("SETCLIP_REAL_DATA")


def write(tmp_path, files: dict[str, bytes], lines: list, name: str = "captions.jsonl", **settings) -> FolderConfig:
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for file, data in files.items():
        (images / file).parent.mkdir(exist_ok=True)
        (images / file).write_bytes(data)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    captions = tmp_path / name
    captions.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    defaults = {"out": tmp_path / "out", "images": images, "captions": captions, "processes": 1}
    return FolderConfig(**{**defaults, **settings})


def line(name: str, *captions: str) -> dict:
    return {"file_name": name, "captions": list(captions)}


def read(config: FolderConfig) -> list:
    return read_all(plan(config).units)


def tsv(*rows: str) -> list[str]:
    return [row.replace(" ", "\t", 1) for row in rows]


# --- end to end


def test_image_bytes_pass_through_untouched_with_all_their_captions(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1)}, [line("a.jpg", "a dog", "two cats on a bed")])
    manifest = prepare("folder", config)
    (sample,) = Shard(config.out / manifest.shards[0].name)
    assert sample.image == picture(1)
    assert sample.captions == ["a dog", "two cats on a bed"]
    assert sample.objects == {"pos": [["dog"], ["cat", "bed"]]}
    assert (sample.width, sample.height) == (40, 40)
    assert sample.key == sample.sha256[:24]
    assert sample.extra == {"file_name": "a.jpg"}
    assert read_objects(config.out).count_of("cat") == 1
    assert (manifest.pairs_present, manifest.pairs_listed) == (2, 2)


def test_png_and_webp_keep_their_bytes_and_get_their_extension_by_content(tmp_path):
    images = {}
    for kind in ("png", "webp"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), "red").save(buffer, kind)
        images[f"{kind}.jpg"] = buffer.getvalue()  # names lie
    config = write(tmp_path, images, [line(name, "a dog") for name in images])
    manifest = prepare("folder", config)
    (shard,) = manifest.shards
    assert {sample.image_ext: sample.image for sample in Shard(config.out / shard.name)} == {
        "png": images["png.jpg"],
        "webp": images["webp.jpg"],
    }


def test_every_reason_to_drop_is_counted_and_the_rest_is_kept(tmp_path):
    whole = picture(7)
    images = {
        "good.jpg": picture(1),
        "same.jpg": picture(1),
        "other.jpg": picture(1),
        "lonely.jpg": picture(2),
        "cut.jpg": whole[: len(whole) // 2],
        "text.jpg": b"<html>",
        "nothing.jpg": b"",
        "silent.jpg": picture(3),
    }
    lines = [
        line("good.jpg", "a dog", "  ", ""),
        line("same.jpg", "a dog"),
        line("other.jpg", "a cat"),
        line("cut.jpg", "a dog"),
        line("text.jpg", "a dog"),
        line("nothing.jpg", "a dog"),
        line("silent.jpg", "", " "),
        line("missing.jpg", "a dog"),
    ]
    config = write(tmp_path, images, lines, max_bad=1.0)
    manifest = prepare("folder", config)
    left_out = dict(manifest.dropped)
    assert left_out.pop(EMPTY_CAPTION) == 4
    for reason in (NO_IMAGE, UNNAMED, NO_CAPTION_LEFT, DUPLICATE, "not JPEG, PNG or WebP"):
        assert left_out.pop(reason) == 1, reason
    assert sum(left_out.values()) == 2  # the cut JPEG and the empty file
    samples = [sample for shard in manifest.shards for sample in Shard(config.out / shard.name)]
    assert [sample.captions for sample in samples] == [["a dog"], ["a cat"]]
    assert samples[1].key == f"{samples[0].key}-1"  # the same image with other captions
    assert (manifest.pairs_present, manifest.pairs_listed) == (2, 11)


def test_too_many_bad_samples_stop_with_the_table_and_write_no_shard(tmp_path):
    lines = [line("a.jpg", "a dog"), line("b.jpg", "x"), line("c.jpg", "x")]
    config = write(tmp_path, {"a.jpg": picture(1)}, lines)
    with pytest.raises(
        InputError, match=r"(?s)at most 5.0% bad samples, found 2 of 3 .*2  caption without image.*--max-bad 0.67"
    ):
        prepare("folder", config)
    assert not list(config.out.glob("*.tar"))


def test_the_manifest_carries_reasons_and_pairs(tmp_path):
    lines = [line("a.jpg", "a dog", ""), line("b.jpg", "a cat")]
    config = write(tmp_path, {"a.jpg": picture(1), "b.jpg": b"?"}, lines, max_bad=0.5)
    prepare("folder", config)
    manifest = Manifest.load(config.out)
    assert manifest.dropped == {"not JPEG, PNG or WebP": 1, EMPTY_CAPTION: 1}
    assert (manifest.pairs_present, manifest.pairs_listed) == (1, 3)


def test_every_pixel_is_looked_at_unless_asked_otherwise(tmp_path):
    assert write(tmp_path, {}, []).check == "decode"


# --- what is read


def test_a_tar_gives_the_same_samples_as_the_folder(tmp_path):
    images = {"a.jpg": picture(1), "b.jpg": picture(200), "lonely.jpg": picture(3)}
    lines = [line("b.jpg", "a dog"), line("./a.jpg", "a cat"), line("no.jpg", "x")]
    config = write(tmp_path, images, lines)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(config.images / "a.jpg", "./a.jpg")
        tar.add(config.images / "b.jpg", "b.jpg")
        tar.add(config.images / "lonely.jpg", "in/lonely.jpg")
    from_tar = write(tmp_path, {}, lines, images=tmp_path / "images.tar")
    assert read(from_tar) == read(config)
    assert dropped(read(from_tar)) == [(NO_IMAGE, "bad", 1, 1), (UNNAMED, "bad", 0, 0)]


@pytest.mark.parametrize("content", [gzip.compress(picture(1)), b"no tar" * 200])
def test_what_is_no_plain_tar_is_refused(tmp_path, content):
    (tmp_path / "images.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"expected a whole tar at .*images\.tar, found no tar header"):
        plan(write(tmp_path, {}, [line("a.jpg", "x")], images=tmp_path / "images.tar"))


def test_a_tar_that_is_cut_is_refused_as_a_whole(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1), "b.jpg": picture(2)}, [line("a.jpg", "x")])
    tar = tmp_path / "images.tar"
    with tarfile.open(tar, "w") as file:
        file.add(config.images / "a.jpg", "a.jpg")
        file.add(config.images / "b.jpg", "b.jpg")
    tar.write_bytes(tar.read_bytes()[:1500])
    with pytest.raises(InputError, match=r"expected a whole tar at .*images\.tar"):
        plan(write(tmp_path, {}, [line("a.jpg", "x")], images=tar))


def test_a_single_caption_may_be_given_by_itself_and_a_url_goes_along(tmp_path):
    entry = {"file_name": "a.jpg", "caption": "a dog", "url": "https://example.org/a.jpg", "width": 3}
    (record,) = read(write(tmp_path, {"a.jpg": picture(1)}, ["", entry, "  "]))
    assert (record.captions, record.url, record.extra) == (["a dog"], entry["url"], {"file_name": "a.jpg"})


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
@pytest.mark.parametrize("header", [[], ["image\tcaption"], ["\ufefffile_name\tcaption"]])
def test_all_lines_of_one_image_in_a_tsv_are_one_sample_wherever_they_stand(tmp_path, name, header):
    rows = tsv("b.jpg a dog", "a.jpg a cat", "b.jpg two dogs", "", "b.jpg three dogs", "a.jpg two cats")
    config = write(tmp_path, {"a.jpg": picture(1), "b.jpg": picture(2)}, [*header, *rows], name=name)
    assert [(record.name, record.captions) for record in read(config)] == [
        ("b.jpg", ["a dog", "two dogs", "three dogs"]),
        ("a.jpg", ["a cat", "two cats"]),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.tsv", "a.tsv.gz"])
@pytest.mark.parametrize("is_scattered", [False, True])
def test_any_division_into_units_gives_the_same_samples(tmp_path, monkeypatch, name, is_scattered):
    images = {f"{n}.jpg": picture(n) for n in range(7)}
    pairs = [(f"{n}.jpg", f"caption {c} of {n}") for n in range(7) for c in range(3)]
    if is_scattered:
        random.Random(1).shuffle(pairs)
    lines = [f"{image}\t{text}" if "tsv" in name else line(image, text) for image, text in pairs]
    config = write(tmp_path, images, [*lines[:5], "", *lines[5:]], name=name)
    (one, lonely) = plan(config).units
    expected = list(one.read())
    assert len(expected) == (7 if "tsv" in name else 21)
    for most in (1, 2, 5):
        monkeypatch.setattr(folder, "_SAMPLES_PER_UNIT", most)
        units = plan(config).units
        assert len(units) == -(-len(expected) // most) + 1
        parts = [list(pickle.loads(pickle.dumps(unit)).read()) for unit in units]
        assert all(len(part) <= most for part in parts)
        assert list(itertools.chain(*parts)) == expected
    assert lonely.name.endswith("images without caption")


def test_names_in_subfolders_and_images_without_caption_are_found(tmp_path):
    images = {"in/a.jpg": picture(1), "in/b.png": picture(2), "c.JPG": picture(3), "notes.txt": b"x"}
    items = read(write(tmp_path, images, [line("in/a.jpg", "a dog")]))
    assert [record.name for record in records(items)] == ["in/a.jpg"]
    assert dropped(items) == [(UNNAMED, "bad", 0, 0)] * 2


OUTSIDE = ["/etc/hostname.jpg", "../secret.jpg", "in/../../secret.jpg"]
NO_IMAGES = ["folder.jpg", "pipe.jpg", "notes.txt", "", "\ud800.jpg", "a\0.jpg", "x" * 300 + ".jpg"]


@pytest.mark.parametrize("name", [*OUTSIDE, *NO_IMAGES])
def test_a_name_that_is_no_image_of_the_folder_is_a_caption_without_image(tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    config = write(tmp_path, {"a.jpg": picture(1), "notes.txt": b"x"}, [line("a.jpg", "a dog"), line(name, "x", "y")])
    (config.images / "folder.jpg").mkdir()
    os.mkfifo(config.images / "pipe.jpg")
    items = read(config)
    assert len(records(items)) == 1
    assert dropped(items) == [(NO_IMAGE, "bad", 2, 1)]


def test_an_image_over_the_limit_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MAX_IMAGE_BYTES", len(picture(1)))
    images = {"a.jpg": picture(1), "b.jpg": picture(1) + b"x"}
    items = read(write(tmp_path, images, [line("a.jpg", "x"), line("b.jpg", "y", "z")]))
    assert dropped(items) == [(untrusted.LARGE_IMAGE, "bad", 2, 1)]


def test_a_caption_with_a_nul_is_counted_and_the_others_stay(tmp_path):
    items = read(write(tmp_path, {"a.jpg": picture(1)}, [line("a.jpg", "a dog", "a\0cat")]))
    assert records(items)[0].captions == ["a dog"]
    assert dropped(items) == [(untrusted.NUL + untrusted.CAPTIONS, "filtered", 1, 0)]


# --- what stops the job


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ('{"file_name": "q.jpg", "captions": ["a', "Invalid control character"),
        ('{"captions": ["a"]}', "no file_name"),
        ('{"file_name": "q.jpg", "captions": 3}', "no list of captions"),
        ('{"file_name": "q.jpg", "captions": ["a", null]}', "no list of captions"),
        ("[1]", "no file_name"),
        ("[" * 100_000, "maximum recursion depth"),
        ('{"file_name": ' + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_a_broken_line_is_named_with_what_was_found(tmp_path, broken, found):
    config = write(tmp_path, {"a.jpg": picture(1)}, [line("a.jpg", "a dog")] * 16 + [broken])
    with pytest.raises(InputError, match=rf"captions.jsonl, line 17: expected .* found .*{found}.*mend that line"):
        plan(config)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("a.jpg a dog", "expected a name, a tab and a caption, found 1 columns: 'a.jpg a dog'"),
        ("a.jpg\ta dog\t3", "found 3 columns"),
        ("\ta dog", "found 2 columns"),
        ("x" * 1_000_001, "expected at most 1 MB, found more"),
    ],
)
def test_a_broken_row_of_a_tsv_is_named(tmp_path, broken, found):
    config = write(tmp_path, {"a.jpg": picture(1)}, ["a.jpg\ta dog", broken], name="a.tsv")
    with pytest.raises(InputError, match=f"a.tsv, line 2: .*{found}"):
        plan(config)


def test_text_of_another_encoding_is_named_with_its_line(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1)}, ["a.jpg\ta dog"], name="a.tsv")
    config.captions.write_bytes(b"a.jpg\ta dog\na.jpg\tcaf\xe9\n")
    with pytest.raises(InputError, match=r"a\.tsv, line 2: expected UTF-8"):
        plan(config)


def test_names_that_do_not_meet_are_shown_beside_each_other(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1)}, [line("images/a.jpg", "a dog")])
    with pytest.raises(InputError, match=r"names 'images/a.jpg', the images are 1, the first 'a.jpg'"):
        plan(config)


def test_missing_inputs_are_named_with_their_flag(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1)}, [line("a.jpg", "a dog")])
    with pytest.raises(InputError, match="found none; give its place with --captions"):
        plan(FolderConfig(out=config.out, images=config.images, captions=tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="found neither; give its place with --images"):
        plan(FolderConfig(out=config.out, images=tmp_path / "no", captions=config.captions))
    config.captions.write_text("\n\n")
    with pytest.raises(InputError, match=r"expected captions in .*captions\.jsonl, found no line"):
        plan(config)


def test_a_packed_file_that_is_cut_is_named(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1)}, [line("a.jpg", "a dog")], name="a.jsonl.gz")
    config.captions.write_bytes(config.captions.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"expected a whole file at .*a\.jsonl\.gz"):
        plan(config)


def test_a_captions_file_that_changes_after_planning_is_an_error(tmp_path):
    config = write(tmp_path, {"a.jpg": picture(1)}, [line("a.jpg", "a dog")])
    units = plan(config).units
    config.captions.write_text(json.dumps(line("a.jpg", "another")))
    for unit in units:
        with pytest.raises(InputError, match=r"captions\.jsonl as it was when the work was planned, found it changed"):
            list(unit.read())


def test_two_hundred_damaged_caption_files_end_normally_or_with_a_clear_error(tmp_path):
    draw = random.Random(4)
    images = {f"{n}.jpg": picture(n) for n in range(6)}
    config = write(tmp_path, images, [line(name, "a dog", "a cät") for name in images])
    content = config.captions.read_bytes()
    results: Counter[str] = Counter()
    for _ in range(200):
        data = bytearray(content)
        kind = draw.randrange(4)
        if kind == 0:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[draw.randrange(len(data)) :]
        elif kind == 2:
            start = draw.randrange(len(data))
            data[start:start] = data[start : start + draw.randrange(200)]
        else:
            data[draw.randrange(len(data))] = draw.choice(b'\0\n\t"{}[]\\\xff')
        config.captions.write_bytes(data)
        try:
            items = read(config)
        except InputError as error:
            results["error" if str(config.captions) in str(error) else str(error)] += 1
            continue
        assert count_samples(items) == sum(bool(line.strip()) for line in data.split(b"\n"))
        results["read"] += 1
    assert results.keys() == {"error", "read"}
    assert min(results.values()) > 20, results


# --- photographs


@pytest.mark.skipif(REAL is None, reason="SETCLIP_REAL_DATA is not set")
@pytest.mark.parametrize(("name", "samples", "pairs"), [("coco/photos", 2_431, None), ("flickr8k/dev", 1_000, 5_000)])
def test_real_photographs_are_all_read(tmp_path, name, samples, pairs):
    place = Path(str(REAL)) / name
    config = FolderConfig(out=tmp_path / "out", images=place.with_suffix(".tar"), captions=place.with_suffix(".jsonl"))
    items = read(config)
    assert len(items) == len(records(items)) == samples
    assert all(item.image[:2] == b"\xff\xd8" and item.captions for item in items)
    assert pairs is None or sum(len(item.captions) for item in items) == pairs
