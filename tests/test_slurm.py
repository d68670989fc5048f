"""The job scripts on a real Slurm of two virtual nodes: the chain, what disturbs it, and what is refused.

`make test-slurm` runs these; they need root and Debian's packages (tests/slurm_cluster.py).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import troubled_run
from material import write_model, write_shards
from safetensors.torch import load_file
from slurm_cluster import Cluster, why_not
from slurm_material import write_raw

from pretrain.progress import read_metrics
from pretrain.sessions import read_sessions
from setclip.checkpoint import checkpoints_of
from setclip.manifest import Manifest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SCRIPTS = Path(__file__).parents[1] / "slurm"
STEPS = 200  # enough for the signal of a time limit, which Slurm looks at twice a minute


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


class Site:
    """A checkout on the cluster with the job scripts, and how the tests use it."""

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        self.home, self.run, self.data = folder / "home", folder / "runs/cc12m", folder / "data/cc12m"
        shutil.copytree(
            SCRIPTS, self.home / "slurm", ignore=lambda _, names: [n for n in names if n.startswith("chain-")]
        )
        for path in (self.home / "slurm/logs").iterdir():
            if path.name != ".gitignore":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._git("init", "-q")
        self._git("add", ".")
        self._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "scripts")
        self.commit = self._git("rev-parse", "--short", "HEAD").strip()
        write_raw(folder / "raw/cc12m")
        model = write_model(folder)
        self.training = [
            "--model.name", model, "--data.workers", 0, "--data.num-lanes", 8, "--data.augment.kind", "none",
            "--global-batch-size", 16, "--steps", STEPS, "--log-every-steps", 1, "--save.every-steps", 5, "--save.keep", 9,
        ]  # fmt: skip
        self.environment = {
            "PYTHON": sys.executable, "SETCLIP_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MIN_FREE_GB": "0.1",
            "SETCLIP_DATA": str(folder / "data"), "RAW": str(folder / "raw"), "RUNS": str(folder / "runs"),
            "EVALUATIONS": "retrieval cc12m",
            "PREPARE_SBATCH": "--array=0-3 --cpus-per-task=1", "PREPARE_ARGS": "--processes 1",
            "MERGE_SBATCH": "--cpus-per-task=1", "MERGE_ARGS": "--processes 1",
            "PRETRAIN_SBATCH": "--nodes=2 --ntasks-per-node=2 --time=2 --signal=B:USR1@120",
            "PRETRAIN_ARGS": " ".join(map(str, self.training)),
            "EVALUATE_SBATCH": "--cpus-per-task=2", "EVALUATE_ARGS": "--workers 0 --resamples 10",
        }  # fmt: skip

    def call(self, *command: str, check: bool = True, **more: str) -> str:
        return self.cluster.run(*command, env={**self.environment, **more}, cwd=self.home, check=check)

    def submit(self, *words: object, **more: str) -> str:
        return self.call("sbatch", "--parsable", *map(str, words), **more).strip()

    def log(self, job: str) -> str:
        found = list((self.home / "slurm/logs").glob(f"*-{job}.log"))
        assert len(found) == 1, self.cluster.run("scontrol", "show", "job", job)
        return found[0].read_text()

    def step(self) -> int:
        path = self.run / "metrics.jsonl"
        return max((e["step"] for e in read_metrics(path)), default=0) if path.exists() else 0

    def wait(self, condition, what, job=None, seconds=400.0):
        """Waits; a job that ends otherwise shows its log."""
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, f"waited in vain for {what}\n{self._shown(job)}"
            state = self.cluster.state(job) if job else ""
            assert state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") or condition(), (
                f"{what}: {state}\n{self._shown(job)}"
            )
            time.sleep(0.1)

    def _shown(self, job: str | None) -> str:
        return self.log(job)[-4000:] if job else self.call("squeue", check=False)

    def _git(self, *words: str) -> str:
        return subprocess.run(["git", "-C", self.home, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"), cluster)


def ended(site, job, seconds=400.0):
    """Returns the state in which a job ended."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    site.wait(lambda: site.cluster.state(job) in over, f"the end of job {job}", seconds=seconds)
    return site.cluster.state(job)


def test_slurm_accepts_every_script_as_it_is(site):
    scripts = [*sorted(SCRIPTS.glob("*_*.sh")), SCRIPTS / "finetune.sh", SCRIPTS / "evaluate.sh"]
    assert len(scripts) == 17
    for script in scripts:
        # The nodes here have two GPUs and eight CPUs.
        few = ["--cpus-per-task=4"] if "--cpus-per-task" in script.read_text() else []
        few += ["--gpus-per-node=2"] if "--gpus-per-node=8" in script.read_text() else []
        said = site.call("sbatch", "--test-only", *few, f"slurm/{script.name}")
        assert re.search(r"Job \d+ to start at", said), script.name


def test_what_does_not_fit_fails_in_seconds_with_the_reason(site):
    """Four jobs beside each other."""
    small = ["--nodes=1", "--ntasks-per-node=1"]
    shards = site.folder / "broken"
    killer = site.folder / "killer"
    killer.write_text(f'#!/bin/bash\n[[ "$*" == *preflight* ]] && exec {sys.executable} "$@"\nkill -9 $$\n')
    killer.chmod(0o755)
    write_shards(shards)
    (shards / "train-00001.tar").unlink()
    loop = site.submit(
        "--gpus-per-node=0", "--cpus-per-task=1", "slurm/evaluate.sh", "retrieval", PYTHON=str(site.folder / "killer")
    )
    jobs = {
        "missing": site.submit(*small, "--gpus-per-node=0", "slurm/pretrain_cc12m.sh", "--data.shards", shards),
        "gpus": site.submit("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "slurm/pretrain_cc12m.sh",
                            "--data.shards", shards, SETCLIP_DEVICE=""),
        "recipe": site.submit(*small, "--gpus-per-node=0", "slurm/pretrain_cc12m.sh", "cc12m-b61", "--data.shards",
                              write_shards(site.folder / "whole")),
    }  # fmt: skip
    # Killed again and again without progress, it is queued again once, and that is all.
    site.wait(lambda: site.cluster.field(loop, "Restarts") == "1", "a requeue", loop)
    site.cluster.start_now(loop)
    states = {name: ended(site, job) for name, job in {**jobs, "loop": loop}.items()}
    assert states == dict.fromkeys(states, "FAILED")
    logs = {name: site.log(job) for name, job in {**jobs, "loop": loop}.items()}
    assert "expected the 3 shards of" in logs["missing"]
    assert "train-00001.tar: missing" in logs["missing"]
    assert re.search(r"node\d: expected 2 GPUs, as Slurm gave this job, found 0 that CUDA can use", logs["gpus"])
    assert re.search(r"node1: .*\n.*node2: ", logs["gpus"]), "both nodes are named"
    assert "error: unknown recipe 'cc12m-b61', perhaps 'cc12m-b16'" in logs["recipe"]
    assert "expected progress, found two attempts that began and ended at" in logs["loop"]
    assert site.cluster.field(loop, "Restarts") == "1"
    assert all("the preflight failed" in logs[name] for name in ("missing", "gpus"))
    assert not site.run.exists(), "nothing was started"


def test_the_whole_chain_survives_what_happens_on_a_cluster(site):
    """From tars to results.json; on the way, pretraining is stopped in five ways and ends as if undisturbed."""
    cluster = site.cluster
    said = site.call("slurm/pipeline.sh", "cc12m")
    jobs = dict(re.findall(r"^(\S+) +job (\d+)", said, re.MULTILINE))
    assert re.search(rf"^pretrain +job {jobs['pretrain']} +after {jobs['merge']}$", said, re.MULTILINE)
    assert re.search(r"^fetch +done$", said, re.MULTILINE)
    again = site.call("slurm/pipeline.sh", "cc12m")
    assert re.search(rf"^pretrain +job {jobs['pretrain']} +waiting already$", again, re.MULTILINE)
    shown = site.call(sys.executable, "-m", "setclip.jobs", "cc12m")
    assert re.search(rf"^pretrain +waiting +{jobs['pretrain']} +Dependency", shown, re.MULTILINE)
    job = jobs["pretrain"]

    def queued_again(what, times):
        site.wait(lambda: cluster.field(job, "Restarts") == str(times), f"a requeue after {what}", job)

    def disturb(what, act):
        """Lets the queued run go on for some steps, disturbs it, and sees it queued again."""
        step, times = site.step(), int(cluster.field(job, "Restarts"))
        cluster.start_now(job, "TimeLimit=60")
        site.wait(lambda: site.step() >= step + 6, f"six steps before {what}", job)
        act()
        queued_again(what, times + 1)

    def kill_a_rank():
        os.kill(cluster.processes("node2", f"{sys.executable} -m pretrain.run")[-1], signal.SIGKILL)

    # It was submitted with two minutes, and with a signal two minutes before their end: that may come during imports.
    queued_again("the time limit", 1)
    stopped = site.step()
    assert checkpoints_of(site.run)[-1].name == f"step-{stopped:08d}", "saved where it was stopped"
    shown = site.call(sys.executable, "-m", "setclip.jobs", "cc12m")
    assert re.search(
        rf"^pretrain +(waiting|running) +{job} +.*step {stopped} of {STEPS} .*samples/s", shown, re.MULTILINE
    )
    disturb("scancel with the signal", lambda: cluster.run("scancel", "--signal=USR1", job))
    disturb("scontrol requeue", lambda: cluster.run("scontrol", "requeue", job))
    disturb("a rank killed", kill_a_rank)
    disturb("the loss of a node", lambda: cluster.crash("node2"))
    cluster.boot("node2")
    cluster.start_now(job, "TimeLimit=60")
    assert ended(site, job) == "COMPLETED"

    undisturbed = site.folder / "undisturbed"
    words = ["cc12m", "--data.shards", site.data, "--out", undisturbed, "--engine.device", "cpu", *site.training]
    ranks = troubled_run.start(None, words, 4, site.folder / "said")
    assert troubled_run.ended(ranks, seconds=600) == [0] * 4, (site.folder / "said.0").read_text()[-2000:]
    assert_same_end(site.run, undisturbed)

    # The logs tell it.
    log = site.log(job)
    heads = re.findall(
        rf"^=== pretrain_cc12m, job {job}, attempt (\d+), on node\[1-2\], commit {site.commit},", log, re.MULTILINE
    )
    assert heads == [str(number) for number in range(1, 7)]
    assert log.startswith("=== pretrain_cc12m, job")
    assert "a rank was ended by signal 9; the job is queued again" in log
    assert "asked to stop (time limit, preemption, or by hand)" in log
    assert log.count("preflight: 2 nodes alike") == 6
    logs = site.home / f"slurm/logs/pretrain_cc12m-{job}"
    for rank in range(4):
        text = (logs / f"rank-{rank:05d}.log").read_text()
        assert (
            len(
                re.findall(
                    rf"^=== pretrain_cc12m, job {job}, attempt \d, .*; rank {rank} of 4 on node\d,", text, re.MULTILINE
                )
            )
            == 6
        )
    assert [s.how for s in read_sessions(site.run)][-1] == "finished"

    # The chain ends in results, and nothing is left to submit.
    assert ended(site, jobs["evaluate:retrieval-cc12m"]) == "COMPLETED"
    results = json.loads((site.run / "results/retrieval-cc12m.json").read_text())
    assert results["metrics"]["rsum"]["samples"] == 48  # queries of both directions
    assert site.call("slurm/pipeline.sh", "cc12m").count(" done") == 5
    assert Manifest.load(site.data).totals()["train"]["samples"] == 168


def test_it_goes_on_with_the_same_ranks_on_another_number_of_nodes(site):
    if not (site.folder / "undisturbed").exists():
        pytest.skip("the chain has failed, and is the test before")
    out = site.folder / "runs/one-node"
    shutil.copytree(site.run, out)
    for checkpoint in checkpoints_of(out):
        if checkpoint.name > f"step-{STEPS - 10:08d}":
            shutil.rmtree(checkpoint)
    job = site.submit(
        "--nodes=1", "--ntasks-per-node=4", "--gpus-per-node=0", "slurm/pretrain_cc12m.sh", "--out", out, *site.training
    )
    assert ended(site, job) == "COMPLETED", site.log(job)[-3000:]
    assert f"resuming at step {STEPS - 10}" in site.log(job)
    assert_same_end(out, site.folder / "undisturbed")

    # Had the shards changed before a requeue, nothing would have been trained on them.
    manifest = json.loads((site.data / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (site.data / "manifest.json").write_text(json.dumps(manifest))
    site.cluster.run("scontrol", "requeue", job)
    site.cluster.start_now(job)
    assert ended(site, job) == "FAILED"
    assert re.search(rf"expected the data that {out} was trained on .*: it has changed since", site.log(job))


def assert_same_end(out, expected):
    """Weights and moments of two runs are equal to the last bit, and each step was trained and logged once."""
    last, wanted = checkpoints_of(out)[-1], checkpoints_of(expected)[-1]
    assert last.name == wanted.name == f"step-{STEPS:08d}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(wanted / name), load_file(last / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    curves = [
        [(e["step"], e["samples_seen"], e["loss"]) for e in read_metrics(run / "metrics.jsonl")]
        for run in (expected, out)
    ]
    assert [step for step, _, _ in curves[1]] == list(range(1, STEPS + 1))
    assert curves[0] == curves[1]
