"""The job scripts by themselves, and what `setclip.jobs` tells of a chain, without a Slurm."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from setclip.errors import InputError
from setclip.jobs import QueuedTask, states_of, table

SCRIPTS = Path(__file__).parents[1] / "slurm"
CORPORA = ("cc3m", "cc12m", "yfcc15m")
STAGES = ("fetch", "prepare", "parse_llm", "describe", "pretrain")
JOBS = [*(f"{stage}_{name}" for stage in STAGES for name in CORPORA), "finetune", "evaluate"]


def test_shellcheck_finds_nothing_in_any_script():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    # The thin ones all read common.sh: once is enough.
    thick = [SCRIPTS / name for name in ("common.sh", "pipeline.sh", "rank.sh")]
    thin = [SCRIPTS / f"{name}.sh" for name in JOBS]
    assert {*thick, *thin} == set(SCRIPTS.glob("*.sh"))
    for words in (["--external-sources", *thick], ["--exclude=SC1091", *thin]):
        found = subprocess.run([shellcheck, *words], cwd=SCRIPTS.parent, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("name", JOBS)
def test_a_script_holds_resources_and_one_call(name):
    path = SCRIPTS / f"{name}.sh"
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert len(text.splitlines()) <= 12
    assert '"$@"' in text, "arguments are forwarded"
    for needed in ("--time=", "--requeue", "--open-mode=append", "--signal=B:USR1@", "--output=slurm/logs/%x-"):
        assert needed in text
    assert not re.search(r"--(partition|account|qos)", text), "these are the site's"


def test_a_script_outside_of_a_job_says_how_to_submit_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    found = subprocess.run(
        ["bash", SCRIPTS / "fetch_cc3m.sh"], cwd=SCRIPTS.parent, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 2
    assert "expected a Slurm job, found none; submit it: sbatch" in found.stderr


def test_attempts_without_anything_to_show_are_counted_too(home):
    """A training that is killed before its first checkpoint must not be queued for ever."""
    (home / "slurm/logs/a").mkdir()
    counted = "for _ in 1 2 3 4 5; do count_attempt; echo on; done"
    script = f"source slurm/common.sh; RANK_LOGS=slurm/logs/a; progress() {{ :; }}; {counted}"
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NAME": "a", "SLURM_SUBMIT_DIR": str(home)}
    found = subprocess.run(["bash", "-c", script], cwd=home, capture_output=True, text=True, env={**os.environ, **job})
    assert found.stdout.count("on\n") == 2
    assert "found two attempts that began and ended at nothing" in found.stderr
    assert found.returncode == 1


@pytest.fixture
def home(tmp_path):
    """A checkout with the scripts alone, on a cluster whose queue is empty."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\n")
    (tmp_path / "bin/squeue").chmod(0o755)
    shutil.copytree(
        SCRIPTS, tmp_path / "slurm", ignore=lambda folder, names: names if Path(folder).name == "logs" else []
    )
    (tmp_path / "slurm/logs").mkdir(exist_ok=True)
    return tmp_path


def pipeline(home, *words, **more):
    environment = {**os.environ, "PYTHON": sys.executable, "PATH": f"{home}/bin:{os.environ['PATH']}", **more}
    environment.pop("SETCLIP_DATA", None)
    return subprocess.run([home / "slurm/pipeline.sh", *words], capture_output=True, text=True, env=environment)


def test_the_whole_chain_is_planned_stage_after_stage(home):
    evaluations = {"EVALUATIONS": "zeroshot imagenet; retrieval coco", "FINETUNE_DATA": ""}
    said = pipeline(home, "yfcc15m", "--dry-run", LLM_MODEL="some/model", **evaluations)
    assert said.stderr == ""
    lines = said.stdout.splitlines()
    assert all(line.startswith("sbatch --kill-on-invalid-dep=yes ") for line in lines)
    after = [match[1] if (match := re.search(r"--dependency=afterok:(\S+)", line)) else None for line in lines]
    stages = ["fetch", "prepare", "merge", "parse_llm", "parse_llm_merge", "describe", "describe_merge"]
    assert after == [None, *stages, "pretrain", "pretrain"]
    assert lines[-1].split("slurm/evaluate.sh ")[1].split()[:4] == [
        "retrieval",
        "coco",
        "--checkpoint",
        "runs/yfcc15m-clip",
    ]
    assert "--gpus-per-node=0" in lines[4]
    assert "slurm/parse_llm_yfcc15m.sh merge" in lines[4]


def test_a_stage_whose_files_are_there_is_not_submitted_again(home):
    data = home / "data/cc12m"
    data.mkdir(parents=True)
    (data / "manifest.json").write_text('{"parsers": {"pos": "1"}}')
    said = pipeline(home, "cc12m", "--dry-run", PRETRAIN_SBATCH="--nodes=4", PRETRAIN_ARGS="--optim.lr 1e-3").stdout
    assert "no language model" in said
    assert re.search(r"^prepare +done$", said, re.MULTILINE)
    assert re.search(r"^sbatch .* --nodes=4 slurm/pretrain_cc12m.sh --optim.lr 1e-3$", said, re.MULTILINE), (
        "waits for nothing"
    )


def test_what_is_prepared_is_fine_tuned_on_and_evaluated_each_after_the_other(home):
    for folder in (home / "data/coco", home / "elsewhere/mine"):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    data = f"coco flickr30k {home}/elsewhere/mine/"
    said = pipeline(home, "cc12m", "--finetune-data", data, "--dry-run", FINETUNE_ARGS="--head pie", EVALUATIONS="")
    assert said.stderr == ""
    lines = [line.rstrip() for line in said.stdout.splitlines()]
    assert re.search(r"^finetune:flickr30k +left out: no manifest.json in data/flickr30k ", said.stdout, re.MULTILINE)
    pretrain, coco, mine, of_coco, of_mine = lines[-5:]
    assert "slurm/pretrain_cc12m.sh" in pretrain
    begin = "--dependency=afterok:pretrain slurm/finetune.sh plain --model runs/cc12m"
    assert coco.endswith(f"{begin} --dataset coco --out runs/cc12m-coco --head pie")
    assert mine.endswith(f"{begin} --data {home}/elsewhere/mine/ --out runs/cc12m-mine --head pie")
    # On the place and split that the run's own results name, whatever FINETUNE_ARGS says of them.
    tuned = "retrieval --checkpoint runs/cc12m-{0} --out runs/cc12m-{0}/results/retrieval.json"
    assert of_coco.endswith(f"afterok:finetune:coco slurm/evaluate.sh {tuned.format('coco')}")
    assert of_mine.endswith(f"afterok:finetune:mine slurm/evaluate.sh {tuned.format('mine')}")
    # Of several seeds each run makes its own results; without data there is nothing to do.
    seeds = pipeline(home, "cc12m", "--dry-run", FINETUNE_DATA="coco", FINETUNE_ARGS="--seeds 3", EVALUATIONS="")
    assert "slurm/finetune.sh" in seeds.stdout
    assert "slurm/evaluate.sh" not in seeds.stdout
    assert "finetune" not in pipeline(home, "cc12m", "--dry-run", FINETUNE_DATA="").stdout


@pytest.mark.parametrize(
    ("words", "is_evaluated"),
    [
        ("--hold-out 1000", False),
        ("--head pie --hold_out=5", False),
        ("--hold-out 1000 --test data/x --test-split none", False),
        ("--hold-out 1000 --test data/x", True),
        ("--hold-out 0", True),
    ],
)
def test_a_model_that_reports_on_held_out_pictures_is_not_evaluated_on_its_training_data(home, words, is_evaluated):
    (home / "data/coco").mkdir(parents=True)
    (home / "data/coco/manifest.json").write_text("{}")
    said = pipeline(home, "cc12m", "--dry-run", FINETUNE_DATA="coco", FINETUNE_ARGS=words, EVALUATIONS="").stdout
    assert ("slurm/evaluate.sh" in said) == is_evaluated
    left_out = (
        "evaluate:finetuned-coco +left out: with --hold-out its figures are those of runs/cc12m-coco/results.json"
    )
    assert bool(re.search(rf"^{left_out}$", said, re.MULTILINE)) != is_evaluated


def test_a_dry_run_leaves_the_chain_as_it_was_submitted(home):
    chain = home / "slurm/logs/chain-cc12m.tsv"
    chain.write_text("fetch\there\n")
    (home / "here").mkdir()
    said = pipeline(home, "cc12m", "--dry-run", FINETUNE_DATA="", EVALUATIONS="zeroshot imagenet")
    assert "slurm/evaluate.sh zeroshot imagenet" in said.stdout
    assert chain.read_text() == "fetch\there\n"


def test_two_evaluations_of_one_name_are_refused(home):
    said = pipeline(home, "cc12m", EVALUATIONS="retrieval coco; retrieval coco --split val")
    assert said.returncode == 2
    assert "error: expected evaluations with different names, found two named retrieval-coco" in said.stderr
    assert not list((home / "slurm/logs").glob("chain-*")), "nothing was planned"


def test_outside_of_the_container_the_login_node_has_a_python_of_its_own(home):
    of_jobs = {"CONTAINER": "apptainer exec a.sif", "PYTHON": "/opt/in-the-container/python"}
    said = pipeline(home, "cc12m", "--dry-run", LOGIN_PYTHON=sys.executable, **of_jobs)
    assert said.stderr == ""
    assert "slurm/pretrain_cc12m.sh" in said.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["cc13m"], "cc13m"),
        (["cc12m", "--dry"], "cc12m --dry"),
        (["cc12m", "--finetune-data"], "cc12m --finetune-data"),
        (["cc12m", "--finetune-data", "--dry-run"], "cc12m --finetune-data --dry-run"),
        ([], "nothing"),
    ],
)
def test_unknown_words_are_refused(home, words, found):
    said = pipeline(home, *words)
    assert said.returncode == 2
    assert "expected a corpus (cc3m, cc12m, yfcc15m) and perhaps" in said.stderr
    assert f"found: {found}" in said.stderr
    assert not list((home / "slurm/logs").glob("chain-*")), "nothing was planned"


def test_two_data_sets_of_one_name_are_refused(home):
    for folder in (home / "data/coco", home / "my/coco"):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    said = pipeline(home, "cc12m", "--dry-run", FINETUNE_DATA="coco my/coco")
    assert said.returncode == 2
    assert "error: expected data sets with different names, found two named coco: coco my/coco" in said.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SETCLIP_DEVICE": "cpu"}, "1"),
        ({"SETCLIP_DEVICE": "cpu", "SLURM_NTASKS_PER_NODE": "3"}, "3"),
        ({"SETCLIP_DEVICE": "cpu", "SLURM_NTASKS": "4"}, "2"),
        ({"SETCLIP_DEVICE": "cpu", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "1"}, "4"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "1"}, "8"),
    ],
)
def test_ranks_are_as_many_as_gpus_or_on_cpus_as_tasks(home, variables, expected):
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "a", "SLURM_SUBMIT_DIR": str(home)}
    script = "source slurm/common.sh; ranks_per_node"
    environment = {**os.environ, **job, **variables}
    found = subprocess.run(["bash", "-c", script], cwd=home, capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == expected


@pytest.mark.parametrize(
    ("attempt", "run_has", "words", "expected"),
    [
        (1, (), (), ""),
        (1, ("config.yaml", "checkpoints/step-00000005"), (), "--resume True"),
        (1, ("config.yaml",), (), "--overwrite True"),  # killed before its first checkpoint
        (1, ("config.yaml", "checkpoints/step-00000005"), ("--overwrite", "True"), ""),
        (2, ("config.yaml", "checkpoints/step-00000005"), ("--overwrite", "True"), "--overwrite False --resume True"),
        (2, ("config.yaml",), (), "--overwrite True"),
        (2, ("seed-0/config.yaml", "seed-0/checkpoints/step-00000005"), (), "--overwrite False --resume True"),
    ],
)
def test_a_fine_tuning_goes_on_where_there_is_a_checkpoint(home, attempt, run_has, words, expected):
    """The command that the ranks would be given, in place of which it is printed."""
    run, logs = home / "runs/finetune", home / "slurm/logs/a-1"
    logs.mkdir()
    (logs / "run").write_text(f"{run}\n")
    (logs / "begun").touch()
    os.utime(logs / "begun", (1, 1))
    for name in run_has:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NAME": "a", "SLURM_SUBMIT_DIR": str(home)}
    job |= {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_PARTITION": "p", "SETCLIP_DEVICE": "cpu", "PYTHON": "python"}
    job["SLURM_RESTART_COUNT"] = str(attempt - 1)
    stand_ins = 'check() { :; }; finish() { :; }; launch() { echo launched: "$@"; }'
    script = f"source slurm/common.sh; {stand_ins}; finetune plain {' '.join(words)}"
    environment = {**os.environ, **job}
    found = subprocess.run(["bash", "-c", script], cwd=home, capture_output=True, text=True, env=environment)
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("launched: ")]
    given = f"launched: 1 python -m finetune.run plain --out {run} --device cpu {' '.join([*words, expected])}"
    assert " ".join(line.split()) == " ".join(given.split())


# --- the state of a chain

BEGUN = "=== {name}, job {job}, attempt {attempt}, on node1, commit abc, 2026-11-21 17:00:00 UTC: python -m something\n"


@pytest.fixture
def chain(tmp_path):
    """A chain of which the preparation runs, and a training that has been stopped once."""
    logs, run, data = tmp_path / "logs", tmp_path / "run", tmp_path / "data"
    for folder in (logs, run, data / ".parts"):
        folder.mkdir(parents=True)
    places = {
        "fetch": tmp_path / "raw",
        "prepare": data,
        "merge": data,
        "pretrain": run,
        "evaluate:retrieval-a": run / "results/a.json",
    }
    (logs / "chain-a.tsv").write_text("".join(f"{stage}\t{place}\n" for stage, place in places.items()))
    (logs / "chain-a.jobs").write_text("fetch\t1\nprepare\t2\nmerge\t3\npretrain\t9\npretrain\t4\n")
    (logs / "fetch_a-1.log").write_text(
        BEGUN.format(name="fetch_a", job=1, attempt=2)
        + "downloading: 1,200/5,000 samples, 40 samples/s, 1 min 35 s left, some note\n"
        "error: no network\n=== ended with status 2 in\n"
    )
    (data / ".parts/plan.json").write_text(json.dumps({"units": ["a", "b", "c"]}))
    (data / ".parts/000001").mkdir()
    for task, ending in enumerate(("=== ended with status 0 in", "packing: 1/2 inputs, 0.1 inputs/s")):
        (logs / f"prepare_a-2_{task}.log").write_text(
            BEGUN.format(name="prepare_a", job=f"2_{task}", attempt=1) + ending + "\n"
        )
    facts = {"event": "start", "step": 0, "time": 1.0, "total_steps": 400}
    (run / "sessions.jsonl").write_text(json.dumps(facts) + "\n")
    entry = {"step": 100, "samples_per_second": 1000.0, "seconds_per_step": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(entry) + '\n{"step": 10')
    (logs / "pretrain_a-4.log").write_text(BEGUN.format(name="pretrain_a", job=4, attempt=2) + "ValueError: x\n")
    return logs


def test_each_stage_tells_state_progress_rate_time_left_and_last_error(chain):
    queue = [
        QueuedTask("2", "RUNNING", "None"),
        QueuedTask("3", "PENDING", "Dependency"),
        QueuedTask("4", "RUNNING", "None"),
    ]
    states = {state.stage: state for state in states_of("a", chain, queue)}
    assert {name: state.state for name, state in states.items()} == {
        "fetch": "failed",
        "prepare": "running",
        "merge": "waiting",
        "pretrain": "running",
        "evaluate:retrieval-a": "not submitted",
    }
    fetch, prepare, training = states["fetch"], states["prepare"], states["pretrain"]
    assert (fetch.progress, fetch.rate, fetch.left) == (
        "downloading 1,200 of 5,000 samples; attempt 2",
        "40 samples/s",
        "1 min 35 s",
    )
    assert fetch.error == "error: no network"
    assert prepare.progress == "1 running, 1 done; 1 of 3 inputs"
    assert (training.job, training.progress) == ("4", "step 100 of 400 (25%); attempt 2")
    assert (training.rate, training.left, training.error) == ("1,000 samples/s", "2 min 30 s", "ValueError: x")
    assert states["merge"].progress == "Dependency"
    shown = table(list(states.values()))
    assert shown.splitlines()[0].split() == ["stage", "state", "job", "progress", "rate", "left"]
    assert "fetch (job 1): error: no network" in shown


def test_a_fine_tuning_tells_step_rate_time_left_and_best_recall(chain, tmp_path):
    run = tmp_path / "tuned"
    run.mkdir()
    with open(chain / "chain-a.tsv", "a") as file:
        file.write(f"finetune:small\t{run}\n")
    with open(chain / "chain-a.jobs", "a") as file:
        file.write("finetune:small\t6\n")

    def state():
        return states_of("a", chain, [QueuedTask("6", "RUNNING", "None")])[-1]

    assert (state().state, state().progress) == ("running", "")
    (run / "config.yaml").write_text("epochs: 12.0\nbatch_size: 32\n")
    entries = [
        {"step": 5, "epoch": 0.5, "loss": 1.0, "elapsed_seconds": 90.0},  # of the attempt before
        {"step": 10, "epoch": 1.0, "loss": 1.0, "elapsed_seconds": 7.0},
        {"step": 20, "epoch": 2.0, "loss": 1.0, "elapsed_seconds": 12.0},
        {"step": 20, "val_rsum": 61.25, "elapsed_seconds": 13.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert state().progress == "step 20 of 120 (17%), best rsum 61.2"
    assert (state().rate, state().left) == ("64 pictures/s", "50 s")
    (run / "seed-1").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).rename(run / "seed-1" / name)
    assert state().progress == "seed-1, step 20 of 120 (17%), best rsum 61.2"

    (run / "results.json").write_text("{}")
    assert states_of("a", chain, [])[-1].state == "done"
    (run / "checkpoints/step-00000030").mkdir(parents=True)
    os.utime(run / "results.json", (1, 1))
    assert states_of("a", chain, [])[-1].state == "failed", "results of before it was trained further"


@pytest.mark.parametrize("run_of", ["tuned", "tuned/seed-1"])
def test_results_of_a_fine_tuning_are_old_once_what_it_began_with_is_trained_anew(chain, tmp_path, run_of):
    pretrained, tuned = tmp_path / "run/checkpoints/step-00000400", tmp_path / "tuned"
    chosen = tmp_path / run_of / "checkpoints/chosen"
    for folder in (pretrained, chosen, tuned / "results"):
        folder.mkdir(parents=True)
    (chosen / "setclip_config.json").write_text(json.dumps({"from": {"where": str(pretrained), "step": 400}}))
    places = {"finetune:a": tuned, "evaluate:finetuned-a": tuned / "results/retrieval.json"}
    (chain / "chain-a.tsv").write_text("".join(f"{stage}\t{place}\n" for stage, place in places.items()))
    for path in (tuned / "results.json", tuned / "results/retrieval.json"):
        path.write_text("{}")
        os.utime(path, (1000, 1000))

    def states():
        return [state.state for state in states_of("a", chain, [])]

    os.utime(pretrained, (900, 900))
    assert states() == ["done", "done"]
    os.utime(pretrained, (1100, 1100))  # to the same step
    assert states() == ["not submitted", "not submitted"]
    os.utime(pretrained, (900, 900))
    (pretrained.parent / "step-00000800").mkdir()  # further
    assert states() == ["not submitted", "not submitted"]


@pytest.mark.parametrize("stage", ["parse_llm", "describe"])
def test_an_array_that_has_ended_well_is_done_before_its_merge_is(chain, tmp_path, stage):
    data = tmp_path / "data"
    shutil.rmtree(data / ".parts")
    manifest = data / "manifest.json"
    manifest.write_text('{"parsers": {"pos": "1"}}')
    os.utime(manifest, (1000, 1000))
    (chain / "chain-a.tsv").write_text("".join(f"{name}\t{data}\n" for name in ("prepare", "merge", stage)))
    (chain / "chain-a.jobs").write_text(f"{stage}\t7\n")

    def end(task, status):
        begun = BEGUN.format(name=stage, job=f"7_{task}", attempt=1)
        told = f"part {task} of 2 is done; after the last one: a command\n"
        (chain / f"{stage}_a-7_{task}.log").write_text(f"{begun}{told}=== ended with status {status} in attempt 1\n")

    def states():
        return [state.state for state in states_of("a", chain, [])]

    end(0, 0)
    assert states() == ["done", "done", "failed"], "the other task has not even begun"
    end(1, 1)
    assert states() == ["done", "done", "failed"]
    end(1, 0)
    assert states() == ["done", "done", "done"]
    manifest.rename(tmp_path / "aside")
    assert states()[-1] == "failed"
    (data / ".parsing").mkdir()
    assert states() == ["done", "done", "done"], "the merge rewrites the shards"
    (data / ".parsing").rmdir()
    manifest.write_text('{"parsers": {"pos": "2"}}')
    os.utime(manifest, (2**32, 2**32))
    assert states() == ["done", "done", "failed"], "of shards that were made anew nothing was asked"


def test_a_job_that_went_without_a_word_is_not_taken_for_done(chain):
    states = {
        state.stage: state for state in states_of("a", chain, [QueuedTask("3", "PENDING", "DependencyNeverSatisfied")])
    }
    assert states["merge"].state == "failed"
    assert "cancelled, or its node failed" in states["merge"].error


def test_a_chain_that_was_never_submitted_is_named(tmp_path):
    with pytest.raises(InputError, match=r"expected a chain b at \S+, found none; submit it: slurm/pipeline.sh b"):
        states_of("b", tmp_path, [])
