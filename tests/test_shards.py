"""Shards: what is written is what is read, by us and by webdataset; damage is named."""

import dataclasses
import tarfile

import pytest
import webdataset
from material import sample, write_shards

from setclip.errors import InputError
from setclip.manifest import Manifest, check_shards, open_split
from setclip.shards import Sample, Shard, ShardWriter, pair_hash, tar_header


def write(path, samples):
    with ShardWriter(path) as writer:
        for each in samples:
            writer.add(each)
    return writer.info


def test_reading_gives_back_what_was_written(tmp_path):
    samples = [sample(i, captions=1 + i % 3) for i in range(9)]
    samples.append(
        Sample(
            key="f" * 24,
            image=b"not even an image",
            image_ext="webp",
            captions=["Zoë’s “café” – ☕"],
            objects={"pos": [["café"]], "llm": [[]]},
            width=0,
            height=0,
            sha256="f" * 64,
            url="https://example.org/ü",
            extra={"license": "CC0"},
        )
    )
    info = write(tmp_path / "a.tar", samples)
    shard = Shard(tmp_path / "a.tar")
    assert list(shard) == samples
    assert shard.keys == [s.key for s in samples]
    assert (info.samples, info.captions) == (10, sum(len(s.captions) for s in samples))
    assert info.bytes == (tmp_path / "a.tar").stat().st_size


# webdataset 1.0.2 leaves the tar that it has read to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_and_tarfile_read_our_tars(tmp_path):
    samples = [sample(i) for i in range(5)]
    write(tmp_path / "a.tar", samples)
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [f["__key__"] for f in found] == [s.key for s in samples]
    assert [f["jpg"] for f in found] == [s.image for s in samples]
    assert [f["txt"].decode() for f in found] == [s.captions[0] for s in samples]
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")] == [s.image for s in samples]


def test_headers_are_those_that_tarfile_writes():
    for name, size in (("a.jpg", 0), ("k" * 96 + ".jpg", 1), ("ü.txt", 511), ("b.json", 8**11 - 1)):
        member = tarfile.TarInfo(name)
        member.size = size
        assert tar_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(InputError, match="at most 100 bytes"):
        tar_header("k" * 101, 1)


def test_copied_samples_are_the_same_bytes_in_another_place(tmp_path):
    samples = [sample(i, captions=1 + i % 2) for i in range(4)]
    write(tmp_path / "a.tar", samples)
    shard = Shard(tmp_path / "a.tar")
    with ShardWriter(tmp_path / "b.tar") as writer:
        writer.copy(shard, 3)
        writer.copy(shard, 1, key="other")
    write(tmp_path / "c.tar", [samples[3], dataclasses.replace(samples[1], key="other")])
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "c.tar").read_bytes()
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "c.idx").read_bytes()
    assert writer.info.captions == 2 + 2


def test_the_index_holds_the_distinct_objects_of_each_caption(tmp_path):
    both = dataclasses.replace(sample(1, captions=1), objects={"pos": [["dog", "cat", "dog"]], "llm": [["a"]]})
    write(tmp_path / "a.tar", [dataclasses.replace(sample(0, captions=2), objects={"pos": [["ox"], []]}), both])
    lists = Shard(tmp_path / "a.tar").object_lists()
    assert {parser: lists.to_pylist() for parser, lists in lists.items()} == {
        "pos": [[["ox"], []], [["dog", "cat"]]],
        "llm": [None, [["a"]]],
    }


def test_equal_pairs_have_equal_hashes_and_others_do_not():
    assert pair_hash("f", ["a", "b"]) == pair_hash("f", ["a", "b"])
    assert (
        len({pair_hash("f", ["a", "b"]), pair_hash("f", ["ab"]), pair_hash("f", ["b", "a"]), pair_hash("e", ["a"])})
        == 4
    )


def test_extra_entries_may_not_take_the_names_of_the_format():
    with pytest.raises(InputError, match=r"names of their own, found \['captions'\]"):
        dataclasses.replace(sample(0), extra={"captions": []})


def test_equal_samples_give_equal_bytes(tmp_path):
    infos = [write(tmp_path / name, [sample(i) for i in range(4)]) for name in ("a.tar", "b.tar")]
    assert infos[0].sha256 == infos[1].sha256
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def stops():
        yield sample(0)
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write(tmp_path / "a.tar", stops())
    assert not list(tmp_path.iterdir())


def test_an_object_list_per_caption_is_demanded():
    with pytest.raises(InputError, match="one object list per caption, found 1 lists of parser 'pos' for 2 captions"):
        Sample(
            key="k",
            image=b"",
            image_ext="jpg",
            captions=["a", "b"],
            objects={"pos": [[]]},
            width=0,
            height=0,
            sha256="",
        )


def test_a_tar_cut_short_is_named_with_the_key(tmp_path):
    write(tmp_path / "a.tar", [sample(i) for i in range(4)])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"a.tar, sample {sample(3).key}: .* cut short"):
        Shard(tmp_path / "a.tar").read(3)


def test_the_manifest_comes_back_equal(tmp_path):
    manifest = Manifest.load(write_shards(tmp_path))
    (tmp_path / "again").mkdir()
    manifest.save(tmp_path / "again")
    assert Manifest.load(tmp_path / "again") == manifest
    assert manifest.totals()["train"]["samples"] == 64


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "train-00001.tar").unlink(), r"train-00001\.tar: missing"),
        (lambda f: (f / "train-00001.idx").unlink(), r"train-00001\.idx: missing"),
        (lambda f: (f / "train-00001.tar").write_bytes(b"x"), r"train-00001\.tar: 1 bytes, manifest says \d+"),
        (
            lambda f: (f / "train-00001.idx").write_bytes((f / "train-00000.idx").read_bytes()),
            r"train-00001\.tar: 20 samples in its index, manifest says 13",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_the_tars_names_the_shard(tmp_path, break_it, message):
    folder = write_shards(tmp_path)
    break_it(folder)
    with pytest.raises(InputError, match=r"manifest\.json does not fit the tars: " + message):
        open_split(folder, "train")


def test_checksums_find_one_changed_byte(tmp_path):
    folder = write_shards(tmp_path)
    data = bytearray((folder / "train-00002.tar").read_bytes())
    data[700] ^= 1
    (folder / "train-00002.tar").write_bytes(data)
    manifest = Manifest.load(folder)
    check_shards(folder, manifest.shards)
    with pytest.raises(InputError, match=r"train-00002\.tar: checksum differs"):
        check_shards(folder, manifest.shards, checksums=True)


def test_a_missing_manifest_says_what_was_found_and_what_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"found no such folder; make them with `python -m data_prep\.run"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(InputError, match="found no shards"):
        Manifest.load(tmp_path)
    write(tmp_path / "a.tar", [sample(0)])
    with pytest.raises(InputError, match="found 1 tars without a manifest"):
        Manifest.load(tmp_path)


def test_an_unknown_split_lists_those_that_are_there(tmp_path, capsys):
    folder = write_shards(tmp_path)
    with pytest.raises(InputError, match=r"split 'test', found splits \['train'\]"):
        open_split(folder, "test")
    assert open_split(folder)[0] == "train"
    assert "split 'train'" in capsys.readouterr().out
