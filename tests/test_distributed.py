"""Which rank a process is, by the variables of torchrun and of Slurm."""

import pytest

from setclip import distributed
from setclip.distributed import broadcast, gather_objects, read_environment, world_size
from setclip.errors import InputError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu07,gpu09",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_without_a_launcher_there_is_one_process():
    environment: dict[str, str] = {}
    assert read_environment(environment) == (0, 1, 0)
    assert environment == {}


def test_torchruns_variables_are_read():
    environment = dict(TORCHRUN)
    assert read_environment(environment) == (5, 8, 1)
    assert environment == TORCHRUN


def test_torchruns_variables_come_before_slurms():
    assert read_environment({**SLURM, **TORCHRUN}) == (5, 8, 1)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_without_the_rest_is_refused_by_name(missing):
    with pytest.raises(
        InputError, match=rf"RANK is set, but not {missing}; start with torchrun or srun, or unset RANK"
    ):
        read_environment(without(TORCHRUN, missing))


def test_slurms_variables_are_written_where_torch_looks():
    environment = dict(SLURM)
    assert read_environment(environment) == (6, 8, 2)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "6",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "MASTER_ADDR": "gpu07",
    }
    assert 20_000 <= int(environment["MASTER_PORT"]) < 40_000


def test_all_tasks_of_a_step_agree_on_the_port_and_other_steps_and_jobs_take_another():
    def port(**changes: str) -> str:
        environment = {**SLURM, **changes}
        read_environment(environment)
        return environment["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0")
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="4712")}) == 3


def test_an_address_that_the_user_sets_is_kept():
    environment = {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    read_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1234")


def test_a_bracketed_list_of_hosts_is_expanded_by_scontrol(monkeypatch):
    asked: list[list[str]] = []

    def run(arguments, **_):
        asked.append(arguments)
        return type("Done", (), {"stdout": "gpu03\ngpu04\n"})

    monkeypatch.setattr(distributed.subprocess, "run", run)
    environment = {**SLURM, "SLURM_STEP_NODELIST": "gpu[03-04]"}
    read_environment(environment)
    assert environment["MASTER_ADDR"] == "gpu03"
    assert asked == [["scontrol", "show", "hostnames", "gpu[03-04]"]]


@pytest.mark.parametrize("variables", [without(SLURM, "SLURM_STEP_ID"), {**SLURM, "SLURM_NTASKS": "1"}])
def test_a_batch_shell_and_a_single_task_are_one_process(variables):
    environment = dict(variables)
    assert read_environment(environment) == (0, 1, 0)
    assert "RANK" not in environment


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"expected a CUDA device \(--device cuda\), found none; use --device cpu"):
        distributed.start("cuda")


def test_more_ranks_than_gpus_on_a_node_are_refused(monkeypatch):
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 2)
    for name, value in {**TORCHRUN, "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="expected a GPU for local rank 2, found 2 GPUs; start fewer ranks a node"):
        distributed.start("cuda")


def test_outside_a_process_group_collectives_are_of_one_rank():
    assert world_size() == 1
    assert broadcast("value") == "value"
    assert gather_objects("value") == ["value"]
