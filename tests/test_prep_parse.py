"""`python -m data_prep.parse`: objects by other settings, shard by shard, with everything else untouched."""

import signal
from pathlib import Path

import pytest
from prep_material import contents, run_killed_at, write_tar

from data_prep.parse import ParseConfig, parse_again
from data_prep.run import prepare
from data_prep.sources.tars import TarsConfig
from setclip.errors import InputError
from setclip.manifest import Manifest, check_shards
from setclip.objects import read_objects
from setclip.shards import Shard

CAPTIONS = {0: "a teddy bear on a sports car", 1: "a photo of two teddy bears"}


def prepared(folder: Path, out: str = "out", **settings) -> Path:
    if not (folder / "in").exists():
        write_tar(folder / "in" / "0.tar", list(range(6)), captions=CAPTIONS)
        write_tar(folder / "in" / "1.tar", list(range(10, 14)))
    prepare(
        "tars",
        TarsConfig(out=folder / out, tars=(str(folder / "in"),), processes=1, shard_size=4, **settings),
    )
    return folder / out


def again(folder: Path, **settings) -> Manifest:
    return parse_again(ParseConfig(folder=folder, processes=1, **settings))


def samples_of(folder: Path) -> list:
    return [sample for info in Manifest.load(folder).shards for sample in Shard(folder / info.name)]


def test_only_objects_change_and_they_are_those_of_a_preparation_with_these_settings(tmp_path):
    folder = prepared(tmp_path)
    before = samples_of(folder)
    assert before[0].objects == {"pos": [["teddy bear", "sports car"]]}
    manifest = again(folder, compound=False, stop_words=("picture",))
    expected = prepared(tmp_path, "expected", compound=False, stop_words=("picture",))
    assert samples_of(folder) == samples_of(expected)
    assert samples_of(folder)[1].objects == {"pos": [["photo", "teddy", "bear"]]}
    for name in ("train-00000.tar", "train-00000.idx", "objects.parquet"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert [sample.image for sample in samples_of(folder)] == [sample.image for sample in before]
    check_shards(folder, manifest.shards, checksums=True)
    assert manifest.parsers == Manifest.load(expected).parsers
    assert manifest.config["compound"] is False
    assert read_objects(folder).count_of("teddy bear") == 0
    assert not list(folder.glob(".*"))


def test_the_same_settings_again_change_nothing(tmp_path, capsys):
    folder = prepared(tmp_path)
    before = contents(folder)
    again(folder)
    assert "is parsed already by" in capsys.readouterr().out
    assert contents(folder) == before


def test_a_folder_without_shards_says_what_makes_them(tmp_path):
    with pytest.raises(InputError, match=r"make them with `python -m data_prep\.run"):
        again(tmp_path)


@pytest.mark.slow
def test_killed_at_each_renaming_it_goes_on_and_meanwhile_nothing_reads_the_folder(tmp_path):
    expected = contents(again_in(prepared(tmp_path, "expected")))
    folder = prepared(tmp_path)
    moments = 0
    while True:
        status = killed_at(folder, number=6)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        moments += 1
        if not (folder / "manifest.json").exists():
            with pytest.raises(InputError, match=r"start it again: `python -m data_prep\.parse \S+ --compound False`"):
                Manifest.load(folder)
            with pytest.raises(InputError, match="expected to go on with the parse of"):
                again(folder, compound=True, stop_words=("dog",))
    assert moments >= 3
    assert contents(folder) == expected


def again_in(folder: Path) -> Path:
    again(folder, compound=False)
    return folder


def killed_at(folder: Path, number: int) -> int:
    """Returns the exit status of the command, killed right before its `number`-th renaming if it gets there."""
    return run_killed_at("parse", [folder, "--compound", False, "--processes", 1], number)
