"""Before a job builds anything, each node is checked, and all against the first; a fault is told with its node."""

import dataclasses
import json
import socket
import threading
import time

import pytest
from material import write_shards

from pretrain.sources import open_sources
from setclip import preflight as module
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.preflight import NodeFacts, PreflightConfig, judge, look_at_node, preflight, with_command

FACTS = NodeFacts(node="a", commit="c1", code="k1", python="3.11.2", versions={"torch": "2.13.0"}, manifest="m1")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_two_nodes(first, second, seconds=20.0, second_runs=True, token="7.0"):
    """Returns what each of two nodes ends with, None where it is content; both are this machine, which has two names."""
    ends, port = {}, free_port()
    nodes = ["localhost", "ip6-other"]

    def run(node, config, its_token):
        try:
            preflight(dataclasses.replace(config, seconds=seconds), node, nodes, [port], its_token)
            ends[node] = None
        except (InputError, SystemExit) as error:
            ends[node] = error

    threads = [threading.Thread(target=run, args=(nodes[0], first, "7.0"))]
    threads += [threading.Thread(target=run, args=(nodes[1], second, token))] if second_runs else []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("preflight") / "shards")


def test_nodes_that_are_alike_are_content(shards, tmp_path):
    config = PreflightConfig(shards=(str(shards),), out=tmp_path / "runs/a", min_free_gb=0.001)
    assert on_two_nodes(config, config) == {"localhost": None, "ip6-other": None}


def test_a_fault_of_one_node_is_told_by_the_first_and_ends_both(shards, tmp_path):
    other = write_shards(tmp_path / "other")
    (other / "train-00001.tar").unlink()
    ends = on_two_nodes(PreflightConfig(shards=(str(shards),)), PreflightConfig(shards=(str(other),)))
    said = str(ends["localhost"])
    assert "ip6-other: expected the 3 shards of" in said
    assert "train-00001.tar: missing" in said
    assert isinstance(ends["ip6-other"], SystemExit)


def test_a_node_that_is_not_heard_of_is_named_in_time():
    start = time.monotonic()
    ends = on_two_nodes(PreflightConfig(), PreflightConfig(), seconds=2.0, second_runs=False)
    assert "ip6-other: expected to hear of it within 2 s at localhost" in str(ends["localhost"])
    assert time.monotonic() - start < 10


def test_a_node_that_cannot_reach_the_first_one_says_so():
    config = PreflightConfig(seconds=8.0)
    with pytest.raises(
        InputError, match=r"b: expected to reach the first node, localhost, at port \d+, found .*refused"
    ):
        preflight(config, "b", ["localhost", "b"], [free_port()], "7.0")


def test_the_nodes_of_another_job_are_not_taken_for_ours():
    ends = on_two_nodes(PreflightConfig(), PreflightConfig(), seconds=1.5, token="8.0")
    assert "ip6-other: expected to hear of it" in str(ends["localhost"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"commit": "c2"}, "b: expected commit c1 as on a, found c2"),
        ({"code": "k2"}, "b: expected source files with the hash k1 as on a, found k2"),
        ({"python": "3.12.1"}, "b: expected Python 3.11.2 as on a, found 3.12.1"),
        ({"manifest": ""}, "b: expected a manifest with the hash m1 as on a, found none"),
        ({"versions": {"torch": "2.12.0"}}, "b: expected the libraries of a: torch 2.13.0 (here 2.12.0)"),
        ({"versions": {}}, "torch 2.13.0 (here absent)"),
        ({"faults": ["no disk"]}, "b: no disk"),
    ],
)
def test_a_difference_between_nodes_is_named_with_both_values(change, said):
    other = dataclasses.replace(FACTS, node="b", **change)
    (line,) = judge([FACTS, other], ["a", "b"], 25)
    assert said in line
    assert judge([FACTS, dataclasses.replace(FACTS, node="b")], ["a", "b"], 25) == []


def test_too_few_gpus_and_too_little_disk_are_told_with_both_numbers(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = PreflightConfig(gpus=8, out=tmp_path / "runs" / "a", min_free_gb=1e9)
    gpus, disk = look_at_node(config, "a").faults
    assert "expected 8 GPUs, as Slurm gave this job, found 0 that CUDA can use" in gpus
    assert f"expected 1e+09 GB free at {tmp_path}, found" in disk
    (none,) = look_at_node(PreflightConfig(gpus=0), "a").faults
    assert "SETCLIP_DEVICE=cpu" in none


def test_a_cut_shard_and_a_damaged_one_are_found(tmp_path):
    folder = write_shards(tmp_path / "shards")
    with open(folder / "train-00000.tar", "r+b") as file:
        file.truncate(1000)
    (folder / "train-00002.idx").write_bytes(b"nothing")
    (fault,) = look_at_node(PreflightConfig(shards=(str(folder),)), "a").faults
    assert "train-00000.tar: 1000 bytes, manifest says" in fault
    assert "train-00002.idx" in fault or "train-00002.tar: " in fault


def test_a_run_that_was_trained_on_other_data_does_not_go_on(shards, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    path = checkpoint / "setclip_config.json"
    path.write_text(json.dumps({"data": Manifest.load(shards).identity()}))
    config = PreflightConfig(shards=(str(shards),), out=run)
    assert look_at_node(config, "a").faults == []
    path.write_text(json.dumps({"data": {"digest": "ffff"}}))
    (fault,) = look_at_node(config, "a").faults
    assert f"expected the data that {run} was trained on (digest ffff)" in fault
    anew = with_command(config, ["--overwrite", "True"])
    assert look_at_node(anew, "a").faults == []


def test_of_several_sources_all_are_checked_and_an_address_is_left_to_the_command(shards, tmp_path):
    other, run = write_shards(tmp_path / "other", first=100), tmp_path / "run"
    config = PreflightConfig(shards=(str(shards), str(other)), out=run)
    both = open_sources(config.shards, (1.0, 2.0), "train").manifest
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "setclip_config.json").write_text(json.dumps({"data": both.identity()}))
    assert look_at_node(config, "a").faults == []
    (fault,) = look_at_node(dataclasses.replace(config, shards=config.shards[:1]), "a").faults
    assert "was trained on" in fault
    assert look_at_node(dataclasses.replace(config, shards=(str(shards), "https://host/x")), "a").faults == []
    (other / "train-00001.tar").unlink()
    (fault, *_) = look_at_node(config, "a").faults
    assert "train-00001.tar: missing" in fault


def test_shards_and_run_folder_are_taken_from_the_commands_own_flags(tmp_path):
    (tmp_path / "a.yaml").write_text("out: runs/b\ndata:\n  shards: there\n")
    config = PreflightConfig(dataset="cc12m")
    assert with_command(config, []) == config
    assert with_command(config, ["--data.shards", "here", "there", "--steps", "3"]).shards == ("here", "there")
    assert with_command(config, ["--data.shards", "None", "--dataset", "None"]) == config, (
        "as a saved config.yaml has it"
    )
    read = with_command(
        config, ["--config", str(tmp_path / "a.yaml"), "--out=runs/c", "--resume", "--data.split", "val"]
    )
    assert (read.shards, read.out, read.split, read.is_anew) == (
        ("there",),
        module.Path("runs/c"),
        "val",
        False,
    )


def test_a_fine_tuning_has_its_data_by_folder_or_name_and_reads_validation_and_test_data_too(
    shards, tmp_path, monkeypatch
):
    other = write_shards(tmp_path / "other", first=100)
    run = tmp_path / "run"
    words = ["--data", str(shards), "--val", str(other), "--test", str(shards), "--out", str(run), "--model", "x"]
    config = with_command(PreflightConfig(), words)
    assert (config.shards, config.others) == ((str(shards),), (str(other), str(shards)))
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "setclip_config.json").write_text(json.dumps({"data": Manifest.load(shards).identity()}))
    facts = look_at_node(config, "a")
    assert facts.faults == [], "the run was trained on --data alone"
    assert len(facts.manifest) == 2 * 64, "a folder that is given twice is read once"
    (other / "train-00001.tar").unlink()
    (fault,) = look_at_node(config, "a").faults
    assert f"of {other}" in fault

    monkeypatch.setenv("SETCLIP_DATA", str(shards.parent))
    named = with_command(PreflightConfig(), ["--dataset", shards.name])
    assert look_at_node(named, "a").faults == [], "any folder under $SETCLIP_DATA"
    nothing = with_command(PreflightConfig(), ["--data", "None", "--val", "None"])
    assert (nothing.shards, nothing.others) == ((), ())


def test_a_fine_tuning_on_region_features_needs_their_folder_and_no_shards(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_DATA", str(tmp_path))
    regions, run = tmp_path / "regions", tmp_path / "run"
    checkpoint = run / "seed-1" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "setclip_config.json").write_text(json.dumps({"data": {"digest": "of features"}}))
    words = ["--regions", str(regions), "--dataset", "flickr30k", "--val", str(regions), "--out", str(run)]
    config = with_command(PreflightConfig(), words)
    assert (config.dataset, config.shards, config.others) == (None, (), ())
    assert f"expected a folder at {regions}, found none" in look_at_node(config, "a").faults[0]
    regions.mkdir()
    assert look_at_node(config, "a").faults == []
    # of shards the seeds' data are compared
    (fault,) = look_at_node(with_command(PreflightConfig(), ["--data", str(shards), "--out", str(run)]), "a").faults
    assert f"expected the data that {run} was trained on (digest of features)" in fault


def test_a_dataset_that_is_not_there_is_a_fault_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_DATA", str(tmp_path))
    (fault,) = look_at_node(PreflightConfig(dataset="cc12m"), "a").faults
    assert "expected cc12m at" in fault
