"""Images and captions of one's own: what is packed, what is dropped and counted, and what stops the job."""

import io
import json
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.run import prepare
from data_prep.sources.folder import (
    DUPLICATE,
    EMPTY_CAPTION,
    EMPTY_SAMPLE,
    NO_CAPTION,
    NO_IMAGE,
    FolderConfig,
    plan,
)
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.objects import read_objects
from setclip.shards import Shard


def jpeg(value: int) -> bytes:
    return simplejpeg.encode_jpeg(np.full((10, 12, 3), value, np.uint8))


def write(tmp_path, files: dict[str, bytes], lines: list, **settings) -> FolderConfig:
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    defaults = {"out": tmp_path / "out", "images": folder, "captions": captions, "processes": 1}
    return FolderConfig(**{**defaults, **settings})


def line(name: str, *captions: str) -> dict:
    return {"file_name": name, "captions": list(captions)}


def samples_of(config: FolderConfig) -> list:
    return [sample for shard in plan(config).shards for sample in shard.make()]


def test_image_bytes_pass_through_untouched_with_all_their_captions(tmp_path):
    config = write(tmp_path, {"a.jpg": jpeg(1)}, [line("a.jpg", "a dog", "two cats on a bed")])
    manifest = prepare("folder", config)
    (sample,) = Shard(config.out / manifest.shards[0].name)
    assert sample.image == jpeg(1)
    assert sample.captions == ["a dog", "two cats on a bed"]
    assert sample.objects == {"pos": [["dog"], ["cat", "bed"]]}
    assert (sample.width, sample.height) == (12, 10)
    assert sample.key == sample.sha256[:24]
    assert read_objects(config.out).count_of("cat") == 1
    assert (manifest.pairs_present, manifest.pairs_listed) == (2, 2)


def test_png_and_webp_keep_their_bytes_and_get_their_extension_by_content(tmp_path):
    images = {}
    for kind in ("png", "webp"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), "red").save(buffer, kind)
        images[f"{kind}.jpg"] = buffer.getvalue()  # names lie
    config = write(tmp_path, images, [line(name, "a dog") for name in images])
    assert {sample.image_ext: sample.image for sample in samples_of(config)} == {
        "png": images["png.jpg"],
        "webp": images["webp.jpg"],
    }


def test_a_tar_gives_the_same_samples_as_the_folder(tmp_path):
    config = write(tmp_path, {"a.jpg": jpeg(1), "b.jpg": jpeg(200)}, [line("b.jpg", "a dog"), line("a.jpg", "a cat")])
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(config.images / "a.jpg", "./a.jpg")
        tar.add(config.images / "b.jpg", "b.jpg")
    from_tar = write(tmp_path, {}, [line("b.jpg", "a dog"), line("a.jpg", "a cat")], images=tmp_path / "images.tar")
    assert samples_of(from_tar) == samples_of(config)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w:gz"):
        pass
    with pytest.raises(InputError, match="expected an uncompressed tar"):
        plan(write(tmp_path, {}, [line("a.jpg", "x")], images=tmp_path / "images.tar"))


def test_a_single_caption_may_be_given_by_itself(tmp_path):
    config = write(tmp_path, {"a.jpg": jpeg(1)}, [{"file_name": "a.jpg", "caption": "a dog"}])
    assert samples_of(config)[0].captions == ["a dog"]


def test_every_reason_to_drop_is_counted_and_the_rest_is_kept(tmp_path):
    whole = jpeg(7)
    images = {
        "good.jpg": jpeg(1),
        "same.jpg": jpeg(1),
        "other.jpg": jpeg(1),
        "lonely.jpg": jpeg(2),
        "cut.jpg": whole[: len(whole) // 2],
        "text.jpg": b"<html>",
        "nothing.jpg": b"",
        "silent.jpg": jpeg(3),
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
    dropped = plan(config).dropped
    assert dropped.pop(EMPTY_CAPTION) == 4
    for reason in (NO_IMAGE, NO_CAPTION, EMPTY_SAMPLE, DUPLICATE, "not JPEG, PNG or WebP"):
        assert dropped.pop(reason) == 1, reason
    assert dropped.pop("unreadable image (empty file)") == 1
    assert len(dropped) == 1  # the cut JPEG
    assert next(iter(dropped)).startswith("unreadable image")
    samples = samples_of(config)
    assert [sample.captions for sample in samples] == [["a dog"], ["a cat"]]


def test_the_same_image_with_other_captions_gets_a_key_of_its_own(tmp_path):
    images = {name: jpeg(1) for name in ("a.jpg", "b.jpg", "c.jpg")}
    config = write(tmp_path, images, [line("a.jpg", "a dog"), line("b.jpg", "a cat"), line("c.jpg", "a cow")])
    first, second, third = (sample.key for sample in samples_of(config))
    assert (second, third) == (f"{first}-1", f"{first}-2")


def test_too_many_bad_samples_stop_with_the_table_and_write_nothing(tmp_path):
    lines = [line("a.jpg", "a dog"), line("b.jpg", "x"), line("c.jpg", "x")]
    config = write(tmp_path, {"a.jpg": jpeg(1)}, lines)
    with pytest.raises(
        InputError, match=r"(?s)at most 5.0% bad samples, found 2 of 3 .*2  caption without image.*--max-bad 0.67"
    ):
        prepare("folder", config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ('{"file_name": "q.jpg", "captions": ["a', "Invalid control character"),
        ('{"captions": ["a"]}', "no file_name"),
        ('{"file_name": "q.jpg", "captions": 3}', "no list of captions"),
        ("[1]", "no file_name"),
    ],
)
def test_a_broken_line_is_named_with_what_was_found(tmp_path, broken, found):
    config = write(tmp_path, {"a.jpg": jpeg(1)}, [line("a.jpg", "a dog")] * 16 + [broken])
    with pytest.raises(InputError, match=rf"captions.jsonl, line 17: expected .* found .*{found}.*mend that line"):
        plan(config)


def test_names_that_do_not_meet_are_shown_beside_each_other(tmp_path):
    config = write(tmp_path, {"a.jpg": jpeg(1)}, [line("images/a.jpg", "a dog")])
    with pytest.raises(InputError, match=r"names 'images/a.jpg', the images are 1, the first 'a.jpg'"):
        plan(config)


def test_missing_inputs_are_named_with_their_flag(tmp_path):
    config = write(tmp_path, {"a.jpg": jpeg(1)}, [line("a.jpg", "a dog")])
    with pytest.raises(InputError, match="found none; give its place with --captions"):
        plan(FolderConfig(out=config.out, images=config.images, captions=tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="found neither; give its place with --images"):
        plan(FolderConfig(out=config.out, images=tmp_path / "no", captions=config.captions))


def test_shards_hold_at_most_as_many_samples_and_bytes_as_asked_for(tmp_path):
    images = {f"{i}.jpg": jpeg(i) for i in range(7)}
    lines = [line(name, "a dog") for name in images]
    by_count = plan(write(tmp_path, images, lines, shard_size=3)).shards
    assert [shard.samples for shard in by_count] == [3, 3, 1]
    size = max(map(len, images.values()))
    by_bytes = plan(write(tmp_path, images, lines, shard_bytes=2 * size)).shards
    assert max(shard.samples for shard in by_bytes) >= 2
    assert sum(shard.samples for shard in by_bytes) == 7
    assert all(sum(len(s.image) for s in shard.make()) <= 2 * size for shard in by_bytes)


def test_an_image_that_changes_between_check_and_packing_is_an_error(tmp_path):
    config = write(tmp_path, {"a.jpg": jpeg(1)}, [line("a.jpg", "a dog")])
    made = plan(config)
    (config.images / "a.jpg").write_bytes(jpeg(1)[:-1] + b"\0")
    with pytest.raises(InputError, match=r"a\.jpg .* changed while it was read"):
        list(made.shards[0].make())


def test_the_manifest_carries_reasons_and_pairs(tmp_path):
    lines = [line("a.jpg", "a dog", ""), line("b.jpg", "a cat")]
    config = write(tmp_path, {"a.jpg": jpeg(1), "b.jpg": b"?"}, lines, max_bad=0.5)
    prepare("folder", config)
    manifest = Manifest.load(config.out)
    assert manifest.dropped == {"not JPEG, PNG or WebP": 1, EMPTY_CAPTION: 1}
    assert (manifest.pairs_present, manifest.pairs_listed) == (1, 3)
