"""Counting objects of shards into objects.parquet."""

import json

import pytest

from data_prep import statistics
from data_prep.statistics import count_objects, counted_shards, describe, write_statistics
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.objects import read_objects
from setclip.shards import Sample, ShardInfo, ShardWriter


def shard(folder, name: str, split: str, lists: list[list[str]]) -> ShardInfo:
    with ShardWriter(folder / name, split=split) as writer:
        for number, names in enumerate(lists):
            writer.add(
                Sample(
                    key=f"{split}{number}",
                    image=b"x",
                    image_ext="jpg",
                    captions=["a", "b"],
                    objects={"pos": [names, []]},
                    width=1,
                    height=1,
                    sha256="",
                )
            )
    return writer.info


def test_an_object_counts_once_per_caption_and_empty_captions_are_counted(tmp_path):
    info = shard(tmp_path, "train-00000.tar", "train", [["dog", "cat"], ["dog", "dog"]])
    counts = count_objects(tmp_path, [info])["pos"]
    assert counts.counts == {"dog": 2, "cat": 1}
    assert (counts.captions, counts.captions_without_object) == (4, 2)
    assert counts.objects_per_caption == pytest.approx(3 / 4)
    assert "2 distinct, tail 0; 0.75 a caption; 2 of 4 captions without object (50.00%)" in describe("pos", counts)


def test_the_table_ranks_by_count_and_marks_the_tail_by_count_then_name(tmp_path):
    info = shard(tmp_path, "train-00000.tar", "train", [["a", "b", "c", "d"], ["d"]])
    write_statistics(tmp_path, [info])
    table = read_objects(tmp_path)
    assert table.names == ["d", "a", "b", "c"]
    assert table.num_captions == 4
    assert [table.group_of(name) for name in "abcd"] == ["tail", "middle", "middle", "middle"]


def test_only_the_training_split_is_counted_where_there_is_one(tmp_path):
    train = shard(tmp_path, "train-00000.tar", "train", [["dog"]])
    test = shard(tmp_path, "test-00000.tar", "test", [["cat"]])
    assert counted_shards([train, test]) == [train]
    assert counted_shards([test]) == [test]
    assert counted_shards([train, test], "test") == [test]
    with pytest.raises(InputError, match=r"expected shards of split 'dev', found splits \['train', 'test'\]"):
        counted_shards([train, test], "dev")


def test_the_command_writes_the_table_again(tmp_path, monkeypatch, capsys):
    info = shard(tmp_path, "train-00000.tar", "train", [["dog"]])
    Manifest(source="test", shards=[info], pairs_listed=2, pairs_present=2).save(tmp_path)
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path)])
    statistics.main()
    assert "objects (pos): 1 distinct" in capsys.readouterr().out
    assert read_objects(tmp_path).names == ["dog"]
    assert json.loads((tmp_path / "manifest.json").read_text())["source"] == "test"
