"""The job scripts on a real Slurm of four virtual nodes: the chain, what disturbs it, and what is refused.

`make test-slurm` runs these; they need root and Debian's packages (tests/slurm_cluster.py). Nodes 1 and 2 train; what is short
runs on nodes 3 and 4 at the same time, and its tests, which come last, find it done.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import troubled_run
from material import write_model, write_shards
from safetensors.torch import load_file
from slurm_cluster import Cluster, why_not
from slurm_material import write_raw

from data_prep import fetch_environment
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.shards import Shard

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "slurm"
STEPS = 44  # the five disturbances come within the first forty, each after six further steps or a few more
TUNING_STEPS = 60
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster():
    with Cluster(nodes=4) as cluster:
        yield cluster


class Site:
    """A checkout on the cluster with the job scripts, and how the tests use it."""

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        self.home, self.run, self.data = folder / "home", folder / "runs/cc12m", folder / "data/cc12m"
        self.tuned = folder / "runs/cc12m-cc12m"
        self.logs = self.home / "slurm/logs"
        shutil.copytree(SCRIPTS, self.home / "slurm", ignore=lambda at, names: names if Path(at).name == "logs" else [])
        self._git("init", "-q")
        self._git("add", ".")
        self._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "scripts")
        self.commit = self._git("rev-parse", "--short", "HEAD").strip()
        write_raw(folder / "raw/cc12m")
        model = write_model(folder)
        self.training = [
            "--model.name", model, "--data.workers", 0, "--data.num-lanes", 8, "--data.augment.kind", "none",
            "--global-batch-size", 8, "--steps", STEPS, "--log-every-steps", 1, "--save.every-steps", 5, "--save.keep", 9,
        ]  # fmt: skip
        self.tuning = [
            "--head", "slot", "--width", 32, "--options", "num_elements=2", "blocks=1", "heads=2", "head_width=16",
            "--backbone.freeze", "none", "--workers", 0, "--batch-size", 16, "--epochs", 6, "--eval-every", 3,
            "--log-every-steps", 1,
        ]  # fmt: skip
        self.environment = {
            "PYTHON": sys.executable, "SETCLIP_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MIN_FREE_GB": "0.1",
            "SETCLIP_DATA": str(folder / "data"), "RAW": str(folder / "raw"), "RUNS": str(folder / "runs"),
            "LISTS": str(folder / "lists"), "EVALUATIONS": "retrieval cc12m", "FINETUNE_DATA": "cc12m absent",
            "PREPARE_SBATCH": "--array=0-3 --cpus-per-task=1", "PREPARE_ARGS": "--processes 1",
            "MERGE_SBATCH": "--cpus-per-task=1", "MERGE_ARGS": "--processes 1",
            # Four ranks, on whatever number of nodes there is; with four minutes left the signal is due at once.
            "PRETRAIN_SBATCH": "--nodes=1-2 --ntasks=4 --exclude=node3,node4 --time=60 --signal=B:USR1@240",
            "PRETRAIN_ARGS": " ".join(map(str, self.training)),
            "FINETUNE_SBATCH": "--nodes=2 --ntasks-per-node=1 --exclude=node3,node4",
            "FINETUNE_ARGS": " ".join(map(str, self.tuning)),
            "EVALUATE_SBATCH": "--cpus-per-task=2", "EVALUATE_ARGS": "--workers 0 --resamples 10",
        }  # fmt: skip

    def call(self, *command: str, check: bool = True, **more: str) -> str:
        return self.cluster.run(*command, env={**self.environment, **more}, cwd=self.home, check=check)

    def submit(self, *words: object, **more: str) -> str:
        """Submits a job for nodes 3 and 4."""
        return self.call("sbatch", "--parsable", "--exclude=node1,node2", *map(str, words), **more).strip()

    def shown(self) -> str:
        return self.call(sys.executable, "-m", "setclip.jobs", "cc12m")

    def log(self, job: str) -> str:
        found = sorted([*self.logs.glob(f"*-{job}.log"), *self.logs.glob(f"*-{job}_*.log")])
        assert found, self.cluster.run("scontrol", "show", "job", job)
        return "".join(path.read_text() for path in found)

    def wait(self, condition, what, job=None, seconds=400.0, every=0.05):
        """Waits; a job that ends otherwise shows its log."""
        ends, asks = time.monotonic() + seconds, time.monotonic() + 2
        while not condition():
            assert time.monotonic() < ends, f"waited in vain for {what}\n{self._tail(job)}"
            if job and time.monotonic() > asks:
                state, asks = self.cluster.state(job), time.monotonic() + 2
                assert state not in OVER or condition(), f"{what}: {state}\n{self._tail(job)}"
            time.sleep(every)

    def ended(self, job: str, seconds=400.0) -> str:
        """Returns the state in which a job (or all tasks of an array) ended."""
        found: set[str] = set()

        def is_over() -> bool:
            shown = self.cluster.run("scontrol", "show", "job", "-o", job, check=False)
            found.clear()
            found.update(re.findall(r"JobState=(\w+)", shown))
            return bool(found) and found <= set(OVER)

        self.wait(is_over, f"the end of job {job}", seconds=seconds, every=0.5)
        return " ".join(sorted(found))

    def restarts(self, job: str) -> int:
        return int(self.cluster.field(job, "Restarts"))

    def queued_again(self, job: str, times: int, what: str) -> None:
        self.wait(lambda: self.restarts(job) == times, f"a requeue after {what}", job, every=0.3)

    def _tail(self, job: str | None) -> str:
        return self.log(job)[-4000:] if job else self.call("squeue", check=False)

    def _git(self, *words: str) -> str:
        return subprocess.run(["git", "-C", self.home, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"), cluster)


def send(number: signal.Signals, processes: list[int]) -> None:
    """Sends a signal to those that are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


@contextlib.contextmanager
def standing(cluster: Cluster, module: str) -> Iterator[None]:
    """The ranks on nodes 1 and 2 stand still, so that a run does not end before it is disturbed, however fast the machine."""
    ranks = [rank for node in ("node1", "node2") for rank in cluster.processes(node, f"{sys.executable} -m {module}")]
    send(signal.SIGSTOP, ranks)
    yield
    send(signal.SIGCONT, ranks)


def lines_of(path: Path) -> list[dict]:
    """Returns the entries of a file of JSON lines, without one that is being written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def steps_of(run: Path) -> list[int]:
    return [entry["step"] for entry in lines_of(run / "metrics.jsonl") if "loss" in entry]


def checkpoints_of(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*"))


@pytest.fixture(scope="module")
def refused(site):
    """Jobs that do not fit, which are submitted now and looked at later."""
    broken, whole, killer = site.folder / "broken", site.folder / "whole", site.folder / "killer"
    write_shards(whole)
    write_shards(broken)
    (broken / "train-00001.tar").unlink()
    killer.write_text(f'#!/bin/bash\n[[ "$*" == *preflight* ]] && exec {sys.executable} "$@"\nkill -9 $$\n')
    killer.chmod(0o755)
    one, pretrain = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"), "slurm/pretrain_cc12m.sh"
    two = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    evaluate = ("--gpus-per-node=0", "--cpus-per-task=1", "slurm/evaluate.sh")
    return {
        "loop": site.submit(*evaluate, "retrieval", PYTHON=str(killer)),
        "missing": site.submit(*one, pretrain, "--data.shards", broken),
        "gpus": site.submit(*two, pretrain, "--data.shards", whole, SETCLIP_DEVICE=""),
        "none": site.submit(*evaluate, "retrieval", "cc12m", SETCLIP_DEVICE=""),
        "recipe": site.submit(*one, pretrain, "cc12m-b61", "--data.shards", whole),
        "tuning": site.submit(*one, "slurm/finetune.sh", "--data", broken, "--model", "ViT-B-32"),
    }


@pytest.fixture(scope="module")
def asked(site):
    """Jobs that ask a language model for the objects of a small corpus, and in two parts, then merged, for descriptions."""
    write_shards(site.folder / "data/cc3m")
    told = site.folder / "llm.url"
    server = site.cluster.start("node3", sys.executable, str(HERE / "llm_server.py"), "--url-file", str(told))
    site.wait(lambda: told.exists() and told.read_text(), "the server's address", seconds=60)
    flags = ("--runner", "http", "--url", told.read_text())
    small = ("--nodelist=node3", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G")
    after: tuple[str, ...] = ()
    jobs = {}
    for array, *words in (("0", "parse_llm"), ("0-1", "describe"), ("0", "describe", "merge")):
        script = (f"--array={array}", f"slurm/{words[0]}_cc3m.sh", *words[1:])
        job = jobs[" ".join(words)] = site.submit(*small, *after, *script, *flags, LLM_MODEL="by-rule")
        after = (f"--dependency=afterok:{job}",)
    yield jobs
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def fetched(site):
    """A job that downloads a list; None where img2dataset is not installed."""
    environment = os.environ.get(fetch_environment.VARIABLE) or HERE.parent / fetch_environment.DEFAULT
    try:
        fetch_environment.python_of(Path(environment))
    except InputError as error:
        yield str(error)
        return
    listed = site.folder / "lists/cc12m.tsv"
    listed.parent.mkdir()
    server = site.cluster.start(
        "node3", sys.executable, str(HERE / "http_server.py"), "--list", str(listed), "--pictures", "8"
    )
    site.wait(listed.exists, "the list", seconds=60)
    more = {"RAW": str(site.folder / "fetched"), fetch_environment.VARIABLE: str(environment)}
    flags = ("--processes", 1, "--threads", 8, "--timeout", 2, "--deadline", 4, "--min-free-gb", 0)
    yield site.submit("--nodelist=node3", "--cpus-per-task=1", "--mem=1G", "slurm/fetch_cc12m.sh", *flags, **more)
    server.kill()
    server.wait()


def test_slurm_accepts_every_script_as_it_is(site):
    scripts = [*sorted(SCRIPTS.glob("*_*.sh")), SCRIPTS / "finetune.sh", SCRIPTS / "evaluate.sh"]
    assert len(scripts) == 17
    for script in scripts:
        # The nodes here have two GPUs and eight CPUs.
        few = ["--cpus-per-task=4"] if "--cpus-per-task" in script.read_text() else []
        few += ["--gpus-per-node=2"] if "--gpus-per-node=8" in script.read_text() else []
        said = site.call("sbatch", "--test-only", *few, f"slurm/{script.name}")
        assert re.search(r"Job \d+ to start at", said), script.name


@pytest.fixture(scope="module")
def chain(site, refused, asked, fetched):
    """The chain as pipeline.sh submits it: stage to job."""
    said = site.call("slurm/pipeline.sh", "cc12m")
    jobs = dict(re.findall(r"^(\S+) +job (\d+)", said, re.MULTILINE))
    assert re.search(rf"^pretrain +job {jobs['pretrain']} +after {jobs['merge']}$", said, re.MULTILINE)
    assert re.search(rf"^finetune:cc12m +job {jobs['finetune:cc12m']} +after {jobs['pretrain']}$", said, re.MULTILINE)
    tuned = jobs["evaluate:finetuned-cc12m"]
    assert re.search(rf"^evaluate:finetuned-cc12m +job {tuned} +after {jobs['finetune:cc12m']}$", said, re.MULTILINE)
    assert re.search(r"^finetune:absent +left out: no manifest.json in \S+/data/absent ", said, re.MULTILINE)
    assert re.search(r"^fetch +done$", said, re.MULTILINE)
    return jobs


def test_pretraining_survives_what_happens_on_a_cluster(site, chain):
    """From tars on; stopped in five ways, it ends as if undisturbed."""
    cluster, job = site.cluster, chain["pretrain"]
    again = site.call("slurm/pipeline.sh", "cc12m")
    assert re.search(rf"^pretrain +job {job} +(waiting|running) already$", again, re.MULTILINE)
    assert re.search(rf"^pretrain +(waiting +{job} +Dependency|running +{job} )", site.shown(), re.MULTILINE)

    def step() -> int:
        return max(steps_of(site.run), default=0)

    def disturb(what, act):
        """Lets the queued run go on for some steps, disturbs it, and sees it queued again."""
        before, times = step(), site.restarts(job)
        cluster.start_now(job, "TimeLimit=60")
        site.wait(lambda: step() >= before + 6, f"six steps before {what}", job)
        with standing(cluster, "pretrain.run"):
            act()
        site.queued_again(job, times + 1, what)

    def kill_a_rank():
        os.kill(cluster.processes("node2", f"{sys.executable} -m pretrain.run")[-1], signal.SIGKILL)

    def is_asked() -> bool:
        return "asked to stop" in site.log(job)

    site.wait(lambda: cluster.state(job) == "RUNNING", "pretraining", every=0.3)
    site.wait(lambda: list(site.logs.glob(f"*-{job}.log")), "its log")
    site.wait(lambda: step() >= 3, "three steps", job)
    hours, minutes, _ = map(int, cluster.field(job, "RunTime").split(":"))
    cluster.run(
        "scontrol", "update", f"jobid={job}", f"TimeLimit={60 * hours + minutes + 4}"
    )  # looked at twice a minute
    with standing(cluster, "pretrain.run"):
        # Meanwhile, the same training in the same number of ranks, with nothing in between.
        undisturbed = site.folder / "undisturbed"
        words = ["cc12m", "--data.shards", site.data, "--out", undisturbed, "--engine.device", "cpu", *site.training]
        reference = troubled_run.start(None, words, 4, site.folder / "said")
        site.wait(is_asked, "the signal before the time limit", job)
    site.queued_again(job, 1, "the time limit")
    stopped = step()
    assert checkpoints_of(site.run)[-1].name == f"step-{stopped:08d}", "saved where it was stopped"
    row = rf"^pretrain +(waiting|running) +{job} +.*step {stopped} of {STEPS} .*samples/s"
    assert re.search(row, site.shown(), re.MULTILINE)

    disturb("scancel with the signal", lambda: cluster.run("scancel", "--signal=USR1", job))
    disturb("scontrol requeue", lambda: cluster.run("scontrol", "requeue", job))
    disturb("a rank killed", kill_a_rank)
    disturb("the loss of a node", lambda: cluster.crash("node2"))
    # The same ranks go on on the node that is left.
    cluster.start_now(job, "TimeLimit=60")
    site.wait(lambda: cluster.state(job) == "RUNNING", "the last attempt", every=0.3)
    cluster.boot("node2", wait=False)
    assert site.ended(job) == "COMPLETED", site.log(job)[-3000:]
    assert troubled_run.ended(reference, seconds=300) == [0] * 4, (site.folder / "said.0").read_text()[-2000:]
    assert_same_end(site.run, undisturbed, STEPS)

    # The logs tell it.
    log = site.log(job)
    heads = re.findall(
        rf"^=== pretrain_cc12m, job {job}, attempt (\d), on (\S+), commit {site.commit},", log, re.MULTILINE
    )
    assert heads == [*((str(number), "node[1-2]") for number in range(1, 6)), ("6", "node1")]
    assert log.startswith("=== pretrain_cc12m, job")
    assert "a rank was ended by signal 9; the job is queued again" in log
    assert "asked to stop (time limit, preemption, or by hand)" in log
    assert log.count("preflight: 2 nodes alike") == 5
    for rank in range(4):
        text = (site.logs / f"pretrain_cc12m-{job}" / f"rank-{rank:05d}.log").read_text()
        head = rf"^=== pretrain_cc12m, job {job}, attempt \d, .*; rank {rank} of 4 on node\d,"
        assert len(re.findall(head, text, re.MULTILINE)) == 6
    assert lines_of(site.run / "sessions.jsonl")[-1]["how"] == "finished"


def test_the_chain_ends_in_a_fine_tuned_model_and_results(site, chain, request):
    if site.ended(chain["pretrain"]) != "COMPLETED":
        pytest.skip("pretraining has failed, and is the test before")
    cluster, job = site.cluster, chain["finetune:cc12m"]
    site.wait(lambda: max(steps_of(site.tuned), default=0) >= 5, "five steps of the fine-tuning", job)
    with standing(cluster, "finetune.run"):
        # Meanwhile, the same in as many ranks, with nothing in between.
        undisturbed = site.folder / "undisturbed-tuning"
        words = [
            "plain",
            "--model",
            site.run,
            "--data",
            site.data,
            "--out",
            undisturbed,
            "--ranks",
            2,
            "--device",
            "cpu",
        ]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "finetune.run",
        ]
        with open(site.folder / "said.tuning", "w") as said:
            reference = subprocess.Popen(
                [*command, *map(str, [*words, *site.tuning])], stdout=said, stderr=said, cwd=HERE.parent
            )
            request.addfinalizer(reference.terminate)  # torchrun ends its ranks
        cluster.run("scancel", "--signal=USR1", job)
    site.queued_again(job, 1, "a signal")
    stopped = steps_of(site.tuned)[-1]
    assert checkpoints_of(site.tuned)[-1].name == f"step-{stopped:08d}", "saved where it was stopped"
    row = rf"^finetune:cc12m +(waiting|running) +{job} +.*step {stopped} of {TUNING_STEPS} .* pictures/s"
    assert re.search(row, site.shown(), re.MULTILINE)
    cluster.start_now(job)
    assert site.ended(job) == "COMPLETED", site.log(job)[-3000:]
    assert reference.wait(300) == 0, (site.folder / "said.tuning").read_text()[-3000:]
    assert_same_end(site.tuned, undisturbed, TUNING_STEPS)
    log = site.log(job)
    heads = re.findall(rf"^=== finetune_cc12m, job {job}, attempt (\d), on node\[1-2\]", log, re.MULTILINE)
    assert heads == ["1", "2"]
    assert log.count("preflight: 2 nodes alike") == 2
    assert "it was asked to stop, and has saved; the job is queued again" in log
    assert "2 rank(s)" in log
    assert json.loads((site.tuned / "results.json").read_text())["checkpoint"]["head"] == "slot"

    for stage, results in (
        ("evaluate:retrieval-cc12m", site.run / "results/retrieval-cc12m.json"),
        ("evaluate:finetuned-cc12m", site.tuned / "results/retrieval.json"),
    ):
        assert site.ended(chain[stage]) == "COMPLETED", site.log(chain[stage])[-3000:]
        found = json.loads(results.read_text())
        assert found["metrics"]["rsum"]["samples"] == 48  # queries of both directions
    assert site.call("slurm/pipeline.sh", "cc12m").count(" done") == 7, "nothing is left to submit"
    assert Manifest.load(site.data).totals()["train"]["samples"] == 168

    # Had the shards changed before a requeue, nothing would be trained on them.
    manifest = json.loads((site.data / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (site.data / "manifest.json").write_text(json.dumps(manifest))
    for name, run in (("pretrain", site.run), ("finetune:cc12m", site.tuned)):
        cluster.run("scontrol", "requeue", chain[name])
        cluster.start_now(chain[name])
        assert site.ended(chain[name]) == "FAILED"
        assert re.search(
            rf"expected the data that {run} was trained on .*: it has changed since", site.log(chain[name])
        )


def test_what_does_not_fit_fails_in_seconds_with_the_reason(site, refused):
    states = {name: site.ended(job) for name, job in refused.items()}
    assert states == dict.fromkeys(states, "FAILED")
    logs = {name: site.log(job) for name, job in refused.items()}
    for name in ("missing", "tuning"):
        assert "expected the 3 shards of" in logs[name]
        assert "train-00001.tar: missing" in logs[name]
    assert re.search(r"node\d: expected 2 GPUs, as Slurm gave this job, found 0 that CUDA can use", logs["gpus"])
    assert re.search(r"node3: .*\n.*node4: ", logs["gpus"]), "both nodes are named"
    assert "expected GPUs, found that this job was given none" in logs["none"]
    assert "error: unknown recipe 'cc12m-b61', perhaps 'cc12m-b16'" in logs["recipe"]
    for name in ("missing", "gpus", "none", "tuning"):
        assert "the preflight failed with status 2; nothing was started" in logs[name]
        assert int(re.findall(r"=== ended with status 2 in attempt 1 after (\d+) s", logs[name])[0]) < 30
        assert site.restarts(refused[name]) == 0
    assert "=== ended with status 2 in attempt 1" in logs["recipe"]
    assert site.restarts(refused["recipe"]) == 0
    # Killed again and again without progress, it is queued again once, and that is all.
    assert "expected progress, found two attempts that began and ended at" in logs["loop"]
    assert site.restarts(refused["loop"]) == 1


def test_a_language_model_is_asked_by_an_array_whose_answers_are_merged(site, asked):
    for name, job in asked.items():
        assert site.ended(job) == "COMPLETED", site.log(job)[-3000:]
        assert site.log(job).count("=== ended with status 0 in attempt 1") == (2 if name == "describe" else 1)
    data = site.folder / "data/cc3m"
    assert set(Manifest.load(data).parsers) == {"pos", "llm"}
    assert all(Shard(data / "train-00000.tar").read(0).objects["llm"])
    assert (data / "descriptions.parquet").exists()


def test_a_list_is_downloaded(site, fetched):
    if not fetched.isdigit():
        pytest.skip(fetched)
    assert site.ended(fetched) == "COMPLETED", site.log(fetched)[-3000:]
    assert (site.folder / "fetched/cc12m/status.parquet").exists()
    assert list((site.folder / "fetched/cc12m").rglob("*.tar"))


def assert_same_end(out, expected, steps):
    """Weights and moments of two runs are equal to the last bit, and each step was trained and logged once."""
    last, wanted = checkpoints_of(out)[-1], checkpoints_of(expected)[-1]
    assert last.name == wanted.name == f"step-{steps:08d}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(wanted / name), load_file(last / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    curves = [
        [(e["step"], e.get("samples_seen"), e["loss"]) for e in lines_of(run / "metrics.jsonl") if "loss" in e]
        for run in (expected, out)
    ]
    assert [step for step, _, _ in curves[1]] == list(range(1, steps + 1))
    assert curves[0] == curves[1]
