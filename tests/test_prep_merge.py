"""Jobs, kills and merges: whatever the way, the same folder comes out, each sample once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from material import write_shards
from prep_material import contents, write_tar

from data_prep import merge as merge_module
from data_prep import output
from data_prep.duplicates import DUPLICATE
from data_prep.merge import merge
from data_prep.parallel import run_tasks
from data_prep.run import prepare
from data_prep.sources.tars import TarsConfig
from setclip.errors import InputError
from setclip.manifest import Manifest, check_shards
from setclip.objects import read_objects
from setclip.shards import Shard


@pytest.fixture
def tars(tmp_path):
    """Four tars: number 3 repeats some of 0 and has one image of 1 with another caption."""
    for tar, numbers in enumerate(([0, 1, 2, 3, 4], [10, 11, 12], [20, 21, 22, 23], [1, 30, 3, 10])):
        write_tar(tmp_path / "in" / f"{tar:05d}.tar", numbers, captions={3: "a very other car"} if tar == 3 else {})
    return tmp_path / "in"


def config(tars: Path, out: Path, **settings) -> TarsConfig:
    return TarsConfig(**{"out": out, "tars": (str(tars),), "processes": 1, "shard_size": 4, **settings})


def samples_of(out: Path, split: str = "train") -> list:
    return [sample for info in Manifest.load(out).of_split(split) for sample in Shard(out / info.name)]


def test_each_sample_is_there_once_and_the_rest_is_accounted_for(tars, tmp_path):
    manifest = prepare("tars", config(tars, tmp_path / "out"))
    samples = samples_of(tmp_path / "out")
    assert manifest.samples_listed == 16
    assert manifest.dropped == {DUPLICATE: 2}
    assert len(samples) == 14 == len({sample.key for sample in samples})
    assert [sample.url.rpartition("/")[2] for sample in samples][-2:] == ["30", "10"]
    check_shards(tmp_path / "out", manifest.shards, checksums=True)
    assert [info.name for info in manifest.shards] == [f"train-{i:05d}.tar" for i in range(5)]


def test_the_same_image_with_another_caption_gets_a_key_with_a_suffix(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out"))
    samples = samples_of(tmp_path / "out")
    first, second = (sample for sample in samples if sample.url.endswith("/10"))
    assert second.key == f"{first.key}-1"
    assert (second.image, second.sha256) == (first.image, first.sha256)
    assert second.captions == ["a very other car"]
    assert second.objects == {"pos": [["car"]]}


def test_duplicates_within_one_input_keep_the_first_and_its_key(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [5, 5, 5, 6], captions={1: "a boat"})
    manifest = prepare("tars", config(tmp_path / "in", tmp_path / "out"))
    assert manifest.dropped == {DUPLICATE: 1}
    keys = [sample.key for sample in samples_of(tmp_path / "out")]
    assert keys[1] == f"{keys[0]}-1"
    assert "-" not in keys[2]


def test_the_same_sample_in_two_splits_stays_in_both(tmp_path):
    write_tar(tmp_path / "in" / "train-0.tar", [1, 2])
    write_tar(tmp_path / "in" / "test-0.tar", [2, 3])
    manifest = prepare("tars", config(tmp_path / "in", tmp_path / "out"))
    assert manifest.dropped == {}
    assert {split: total["samples"] for split, total in manifest.totals().items()} == {"train": 2, "test": 2}


def test_a_shard_of_which_nothing_is_left_leaves_no_gap_in_the_numbers(tmp_path):
    for name in ("0", "1"):
        write_tar(tmp_path / "in" / f"{name}.tar", [1, 2])
    write_tar(tmp_path / "in" / "2.tar", [3])
    manifest = prepare("tars", config(tmp_path / "in", tmp_path / "out"))
    assert [info.name for info in manifest.shards] == ["train-00000.tar", "train-00001.tar"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["train-00000.tar", "train-00001.tar"]


def test_objects_are_counted_without_the_duplicates(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [1, 1, 2], captions={0: "a dog", 1: "a dog", 2: "a dog and a cat"})
    prepare("tars", config(tmp_path / "in", tmp_path / "out"))
    table = read_objects(tmp_path / "out")
    assert (table.num_captions, table.count_of("dog"), table.count_of("cat")) == (2, 2, 1)


@pytest.mark.parametrize("parts", [2, 3])
def test_several_parts_in_any_order_give_the_bytes_of_one_job(tars, tmp_path, parts):
    prepare("tars", config(tars, tmp_path / "one"))
    for part in reversed(range(parts)):
        assert prepare("tars", config(tars, tmp_path / "parts", part=part, parts=parts)) is None
    merge(tmp_path / "parts", processes=1, max_bad=0.05)
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


def test_slurm_array_variables_make_the_part(tars, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
    for number in ("4", "6"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", number)
        prepare("tars", config(tars, tmp_path / "out"))
    assert "part 1 of 2, from Slurm's job array" in capsys.readouterr().out
    assert len(merge(tmp_path / "out", 1, 0.05).inputs) == 4
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "9")
    with pytest.raises(InputError, match=r"evenly spaced, found element 9 of 2 from 4 in steps of 2"):
        prepare("tars", config(tars, tmp_path / "other"))


def test_half_a_part_is_an_error(tars, tmp_path):
    with pytest.raises(InputError, match="--part I and --parts N together"):
        prepare("tars", config(tars, tmp_path / "out", part=1))


def test_a_merge_before_all_parts_are_done_names_what_is_missing(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=1, parts=2))
    with pytest.raises(
        InputError, match=r"all 4 inputs to be packed .* found 2 that are not: .*00000\.tar, .*00002\.tar"
    ):
        merge(tmp_path / "out", 1, 0.05)
    with pytest.raises(InputError, match="expected shards with a manifest"):
        Manifest.load(tmp_path / "out")


def test_a_single_job_finishes_what_parts_have_begun(tars, tmp_path, capsys):
    prepare("tars", config(tars, tmp_path / "one"))
    prepare("tars", config(tars, tmp_path / "out", part=1, parts=2))
    prepare("tars", config(tars, tmp_path / "out"))
    assert "going on: 2 of 4 inputs were done before" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_complete_preparation_started_again_says_so_and_changes_nothing(tars, tmp_path, capsys):
    first = prepare("tars", config(tars, tmp_path / "out"))
    before = contents(tmp_path / "out")
    assert prepare("tars", config(tars, tmp_path / "out", processes=2)) == first
    assert "is complete already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_other_settings_or_inputs_are_refused_with_the_difference(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    with pytest.raises(InputError, match=r"begun with shard_size 4, now 9\. Start it with the same settings"):
        prepare("tars", config(tars, tmp_path / "out", shard_size=9))
    (tars / "00003.tar").unlink()
    with pytest.raises(InputError, match="4 units, now 3"):
        prepare("tars", config(tars, tmp_path / "out"))
    prepare("tars", config(tars, tmp_path / "out", overwrite=True))
    with pytest.raises(InputError, match="a complete preparation of other data or settings"):
        prepare("tars", config(tars, tmp_path / "out", shard_size=9))


def test_overwrite_by_one_of_several_parts_is_refused(tars, tmp_path):
    with pytest.raises(InputError, match="remove each other's work"):
        prepare("tars", config(tars, tmp_path / "out", part=0, parts=2, overwrite=True))


def test_too_many_bad_samples_stop_the_job_and_a_higher_ceiling_goes_on(tmp_path, capsys):
    write_tar(tmp_path / "in" / "0.tar", [1, 2, 3, 4], bad=2)
    write_tar(tmp_path / "in" / "1.tar", [5, 6, 7, 8])
    with pytest.raises(InputError, match=r"at most 5\.0% bad samples, found 2 of 8 \(25\.0%\):\n +2  not JPEG"):
        prepare("tars", config(tmp_path / "in", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tar"))
    manifest = prepare("tars", config(tmp_path / "in", tmp_path / "out", max_bad=0.25))
    assert "going on: 2 of 2 inputs were done before" in capsys.readouterr().out
    assert manifest.inputs[str(tmp_path / "in" / "0.tar")]["dropped"] == manifest.dropped
    assert sum(manifest.dropped.values()) == 2


def test_an_unreadable_input_names_itself_and_leaves_what_is_done(tars, tmp_path):
    (tars / "00002.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"00002\.tar"):
        prepare("tars", config(tars, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tar"))
    assert sorted(p.name for p in (tmp_path / "out" / ".parts").glob("0*")) == ["000000", "000001"]
    write_tar(tars / "00002.tar", [20])
    assert len(prepare("tars", config(tars, tmp_path / "out")).inputs) == 4


def test_what_is_odd_about_the_inputs_is_said_and_kept(tars, tmp_path, capsys):
    (tars / "00001.tar").unlink()
    manifest = prepare("tars", config(tars, tmp_path / "out"))
    assert "00001" in manifest.warnings[0]
    assert "warning: " + manifest.warnings[0] in capsys.readouterr().err


def test_a_file_system_without_hard_links_gives_the_same_bytes(tars, tmp_path, monkeypatch):
    prepare("tars", config(tars, tmp_path / "linked"))

    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(merge_module.os, "link", refused)
    prepare("tars", config(tars, tmp_path / "copied"))
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")


def test_inputs_that_different_parsers_have_parsed_are_refused(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    report = tmp_path / "out" / ".parts" / "000000" / "unit.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "parser": "another"}))
    with pytest.raises(InputError, match="one version of the parser"):
        prepare("tars", config(tars, tmp_path / "out"))


@pytest.mark.slow
def test_a_disk_that_is_full_is_named_and_the_next_start_goes_on(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "expected"))
    out = tmp_path / "out"
    code = f"""
import resource
from data_prep.run import main
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))  # files end there, as on a full disk
import sys
sys.argv[1:] = ["tars", "--tars", {str(tars)!r}, "--out", {str(out)!r}, "--processes", "1", "--shard-size", "4"]
from setclip.config import command
command(main)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert re.search(
        r"error: .*00000\.tar: could not read it or write its shards .* File too large.*start again", run.stderr
    )
    assert not list(out.glob("*.tar"))
    assert not list((out / ".parts").glob("0*"))
    prepare("tars", config(tars, out))
    assert contents(out) == contents(tmp_path / "expected")


def test_an_input_that_changed_since_it_was_packed_is_packed_again(tars, tmp_path, capsys):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    write_tar(tars / "00000.tar", [50, 51])
    manifest = prepare("tars", config(tars, tmp_path / "out"))
    assert re.search(r"1 inputs changed since .* packed again: .*00000\.tar", capsys.readouterr().out)
    assert manifest.inputs[str(tars / "00000.tar")]["packed"] == 2


def test_two_jobs_at_the_same_part_or_a_merge_beside_a_job_are_refused(tars, tmp_path):
    out = tmp_path / "out"
    prepare("tars", config(tars, out, part=0, parts=2))
    with output.locked(out, 1, 2):
        prepare("tars", config(tars, out, part=0, parts=2))
        with pytest.raises(InputError, match="expected no other job at this part"):
            prepare("tars", config(tars, out, part=1, parts=2))
        with pytest.raises(InputError, match="need the folder for themselves"):
            prepare("tars", config(tars, out))
        with pytest.raises(InputError, match="need the folder for themselves"):
            merge(out, 1, 0.05)
    assert prepare("tars", config(tars, out)) is not None


def test_a_preparation_of_which_nothing_is_left_is_an_error(tars, tmp_path):
    with pytest.raises(InputError, match=r"at least one good sample, found none; .*min-side"):
        prepare("tars", config(tars, tmp_path / "a", min_side=1000))
    write_shards(tmp_path / "evaluation", sizes=(31,), split="test")
    settings = {"decontaminate": (str(tmp_path / "evaluation"),)}
    with pytest.raises(InputError, match="expected at least one sample to be left, found all left out"):
        prepare("tars", config(tars, tmp_path / "b", **settings))
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_an_unfinished_preparation_says_how_to_go_on(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    with pytest.raises(InputError, match=r"unfinished preparation; .* `python -m data_prep\.merge .*out`"):
        Manifest.load(tmp_path / "out")


def test_an_overwrite_killed_half_way_leaves_nothing_that_counts_as_done(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    (tmp_path / "out" / ".parts" / "plan.json").unlink()  # as if the removal had been stopped behind it
    with pytest.raises(InputError, match="expected an empty folder"):
        prepare("tars", config(tars, tmp_path / "out", shard_size=2))
    manifest = prepare("tars", config(tars, tmp_path / "out", shard_size=2, overwrite=True))
    assert max(info.samples for info in manifest.shards) == 2


def test_what_was_packed_for_another_plan_is_not_done_for_this_one(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "a", part=0, parts=2))
    prepare("tars", config(tars, tmp_path / "b", part=1, parts=2, shard_size=2))
    shutil.copytree(tmp_path / "a" / ".parts" / "000000", tmp_path / "b" / ".parts" / "000000")
    with pytest.raises(InputError, match=r"found 2 that are not: .*00000\.tar, .*00002\.tar"):
        merge(tmp_path / "b", 1, 0.05)


def test_overwriting_under_a_running_job_is_refused(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    with output.locked(tmp_path / "out"), pytest.raises(InputError, match="expected no other job"):
        prepare("tars", config(tars, tmp_path / "out", overwrite=True))
    assert output.read_plan(tmp_path / "out")["source"] == "tars"


def test_jobs_that_deal_the_inputs_out_otherwise_do_not_run_together(tars, tmp_path):
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=2))
    with output.locked(tmp_path / "out", 1, 2), pytest.raises(InputError, match="expected no other job"):
        prepare("tars", config(tars, tmp_path / "out", part=0, parts=3))
    prepare("tars", config(tars, tmp_path / "out", part=0, parts=3))


@pytest.mark.parametrize("left", ["everything", "no plan"])
def test_a_merge_killed_behind_its_manifest_is_finished_by_either_command(tars, tmp_path, monkeypatch, capsys, left):
    expected = prepare("tars", config(tars, tmp_path / "expected"))
    for command in ("merge", "run"):
        out = tmp_path / f"{left}-{command}"
        with monkeypatch.context() as patch:
            patch.setattr(output, "release", lambda _: None)
            assert prepare("tars", config(tars, out)) == expected
        if left == "no plan":
            (out / ".parts" / "plan.json").unlink()
        if command == "merge":
            monkeypatch.setattr("sys.argv", ["merge", str(out)])
            merge_module.main()
            assert "is complete already" in capsys.readouterr().out
        else:
            prepare("tars", config(tars, out))
        assert contents(out) == contents(tmp_path / "expected")


def test_a_merge_started_again_after_an_input_shrank_leaves_no_shard_of_the_first(tars, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(merge_module.statistics, "write_statistics", killed)
        with pytest.raises(Killed):
            prepare("tars", config(tars, out))
    write_tar(tars / "00000.tar", [50])
    prepare("tars", config(tars, out))
    prepare("tars", config(tars, tmp_path / "expected"))
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("name", ["d[1]", "a*b?", "key=5", "{x}", "~home"])
def test_any_name_of_the_folder_finds_the_same_duplicates(tars, tmp_path, monkeypatch, name):
    prepare("tars", config(tars, tmp_path / "d1", part=0, parts=2))  # what "d[1]" would match as a pattern
    monkeypatch.chdir(tmp_path)
    assert prepare("tars", config(tars, Path(name) / "out")).dropped == {DUPLICATE: 2}


def test_a_worker_that_the_system_kills_is_an_error_that_says_so():
    with pytest.raises(InputError, match=r"found one of them killed, most often because memory was short"):
        run_tasks([die, die, die], 2, "dying", [1, 1, 1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
