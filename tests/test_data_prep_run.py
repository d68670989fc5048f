"""`python -m data_prep.run`: from a source to shards, statistics and manifest in a folder of its own."""

import pytest

from data_prep import merge, run
from data_prep.run import prepare
from data_prep.sources.scenes import ScenesConfig
from setclip.errors import InputError
from setclip.manifest import Manifest, check_shards
from setclip.objects import read_objects
from setclip.shards import Shard


def scenes(out, **settings) -> ScenesConfig:
    small = {"samples": 40, "test_samples": 10, "nouns": 30, "zeroshot_per_noun": 1, "shard_size": 15, "processes": 1}
    return ScenesConfig(out=out, **{**small, **settings})


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_is_complete_and_its_manifest_fits(tmp_path):
    out = tmp_path / "out"
    prepare("scenes", scenes(out))
    manifest = Manifest.load(out)
    check_shards(out, manifest.shards, checksums=True)
    assert {s: t["samples"] for s, t in manifest.totals().items()} == {"train": 40, "test": 10}
    assert "Twitter" in manifest.credits[0]
    assert "en_core_web_sm" in manifest.parsers["pos"]
    assert len(list((out / "zeroshot").iterdir())) == 30
    assert not list(out.glob(".*"))  # no journal, nothing partial
    train = [s for info in manifest.of_split("train") for s in Shard(out / info.name)]
    table = read_objects(out)
    assert table.num_captions == 40
    assert table.count_of("dog") == sum("dog" in s.objects["pos"][0] for s in train)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path):
    for processes in (1, 2):
        prepare("scenes", scenes(tmp_path / str(processes), processes=processes))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(
        InputError, match=r"expected an empty folder at .*found entries \(mine.txt; 1 in all\).*--overwrite"
    ):
        prepare("scenes", scenes(tmp_path))
    assert contents(tmp_path) == {"mine.txt": b"x"}


def test_overwrite_replaces_our_files_and_leaves_others(tmp_path):
    prepare("scenes", scenes(tmp_path))
    (tmp_path / "mine.txt").write_text("x")
    prepare("scenes", scenes(tmp_path, samples=10, nouns=20, overwrite=True))
    names = set(contents(tmp_path))
    assert {"mine.txt", "train-00000.tar"} <= names
    assert "train-00001.tar" not in names
    assert "train-00001.idx" not in names
    assert len(list((tmp_path / "zeroshot").iterdir())) == 20


def test_what_an_interrupted_run_left_can_be_overwritten(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(merge.statistics, "write_statistics", killed)
    with pytest.raises(Killed):
        prepare("scenes", scenes(tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / ".train-00001.99.partial.tar").write_text("half")
    prepare("scenes", scenes(tmp_path, samples=10, overwrite=True))
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "train-00001.tar").exists()


def test_overwrite_does_not_replace_a_file_that_is_not_ours(tmp_path):
    (tmp_path / "train-00000.tar").write_text("somebody's")
    with pytest.raises(InputError, match=r"found train-00000\.tar, which no preparation of ours lists"):
        prepare("scenes", scenes(tmp_path, overwrite=True))
    assert (tmp_path / "train-00000.tar").read_text() == "somebody's"


def test_overwrite_removes_nothing_where_a_class_folder_holds_files_of_others(tmp_path):
    prepare("scenes", scenes(tmp_path))
    (tmp_path / "zeroshot" / "dog" / "notes.txt").write_text("y")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"found zeroshot/dog/notes\.txt, which no preparation of ours lists"):
        prepare("scenes", scenes(tmp_path, overwrite=True))
    assert contents(tmp_path) == before


def test_an_unknown_source_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", "scnes", "--out", "x"])
    with pytest.raises(InputError, match="unknown source 'scnes', perhaps 'scenes'; known: cc12m, cc3m, coco, cub, "):
        run.main()


def test_the_summary_says_samples_objects_and_pairs(tmp_path, capsys):
    prepare("scenes", scenes(tmp_path))
    text = capsys.readouterr().out
    assert "train: 40 samples, 40 captions" in text
    assert "captions without object" in text
    assert "50 of 50 pairs present" in text
