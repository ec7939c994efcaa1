"""Which of several processes this one is, from what launchers set."""

import pytest

from sftcli.errors import UsageError
from sftcli.services.processes.rank import find_place, first_host, is_launched

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8",
}  # fmt: skip


def test_no_launcher_means_one_process():
    assert find_place({}) is None
    assert find_place({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert find_place({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_single_process_of_torchrun_is_still_its_own():
    assert not is_launched({"WORLD_SIZE": "1", "RANK": "0"})
    last = TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}
    assert is_launched(last)
    assert find_place(SLURM | last) is None
    assert is_launched(SLURM)


def test_variables_of_torchrun_are_read():
    place = find_place(TORCHRUN)
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 8, 1, 4)
    assert (place.address, place.port, place.is_hosted, place.attempt) == ("gpu01", 29500, True, None)


def test_variables_of_srun_are_read_and_all_tasks_meet_at_one_port_of_the_first_node():
    places = [find_place(SLURM | {"SLURM_PROCID": str(rank)}) for rank in range(6)]
    assert [place.rank for place in places if place] == list(range(6))
    assert {(place.address, place.port, place.is_hosted) for place in places if place} == {
        ("gpu03", 21969, False)
    }
    assert {(place.local_rank, place.local_size, place.threads) for place in places if place} == {(1, 3, 8)}


def test_torchrun_inside_srun_goes_first():
    place = find_place(SLURM | TORCHRUN)
    assert place is not None
    assert place.size == 8


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("a1,a2", "a1"),
        ("gpu[03-05,9]-ib,cpu1", "gpu03-ib"),
        ("n[7,9]", "n7"),
        ("x-[001-100]", "x-001"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_variable_that_a_launcher_forgot_is_named(name: str):
    with pytest.raises(UsageError, match=f"{name} is not set"):
        find_place({key: value for key, value in TORCHRUN.items() if key != name})
    assert UsageError.exit_code == 2


def test_variable_that_is_no_number_is_named():
    with pytest.raises(UsageError, match="RANK is 'first'"):
        find_place(TORCHRUN | {"RANK": "first"})
