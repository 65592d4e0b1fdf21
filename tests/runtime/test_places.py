"""Which part of a run a process has, from options and from the environments of torchrun and Slurm."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import InputError
from autopar.runtime.launch.node_run import interface_variables, run_rank, torchrun_command
from autopar.runtime.launch.places import Place, Role, find_place
from autopar.runtime.run import WORKER

SLURM = {
    "SLURM_JOB_ID": "7001", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_NODEID": "1",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip


def hosts_of(nodes: str) -> list[str]:
    assert nodes == "n[3-4]"
    return ["n3", "n4"]


def test_alone_this_process_starts_all_ranks() -> None:
    assert find_place({}).role is Role.LAUNCHER
    # A batch script, and a step of one task, which starts everything itself.
    batch = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    assert find_place(batch).role is Role.LAUNCHER
    assert find_place({**batch, "SLURM_STEP_NUM_TASKS": "1"}).role is Role.LAUNCHER


def test_under_torchrun_it_is_a_rank() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
    place = find_place({**SLURM, **environment})
    assert (place.role, place.rank, place.world_size, place.node, place.num_nodes) == (Role.RANK, 5, 8, 1, 2)
    assert not place.variables and not place.leads
    assert find_place({**environment, "RANK": "0", "GROUP_RANK": "0"}).leads


def test_one_task_a_node_starts_its_ranks() -> None:
    place = find_place(SLURM, hosts_of=hosts_of)
    assert (place.role, place.num_nodes, place.node, place.master) == (Role.NODE, 2, 1, "n3:29401")
    assert place.run_id == "slurm-7001" and not place.leads


def test_one_task_a_rank_is_a_rank() -> None:
    environment = {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    place = find_place(environment, hosts_of=hosts_of)
    assert (place.role, place.rank, place.world_size) == (Role.RANK, 5, 8)
    assert dict(place.variables) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "n3", "MASTER_PORT": "29401",
    }  # fmt: skip
    with pytest.raises(InputError, match="7 tasks on 2 nodes"):
        find_place({**environment, "SLURM_STEP_NUM_TASKS": "7"}, hosts_of=hosts_of)


def test_named_nodes_come_first() -> None:
    place = find_place({**SLURM, "RANK": "3", "WORLD_SIZE": "4"}, nodes=4, node_rank=0, master="a.b:77")
    assert (place.role, place.num_nodes, place.node, place.master) == (Role.NODE, 4, 0, "a.b:77") and place.leads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 2}, "go together"),
        ({"nodes": 2, "node_rank": 0}, "go together"),
        ({"nodes": 2, "node_rank": 2, "master": "a:1"}, "--node-rank 2 is not one of 2 nodes"),
        ({"nodes": 2, "node_rank": 1, "master": "a"}, "'a' is not host:port"),
        ({"nodes": 2, "node_rank": 1, "master": ":1"}, "':1' is not host:port"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_place({}, **options)


def test_the_command_of_a_node() -> None:
    place = Place(role=Role.NODE, num_nodes=4, node=2, master="n0:29400", run_id="slurm-7")
    command = torchrun_command(place, "m", __file__, ranks_per_node=8, max_restarts=3, local_address="10.0.0.3")  # type: ignore[arg-type]
    words = " ".join(command[1:])
    assert words == (
        "-m torch.distributed.run --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint n0:29400 --rdzv-id "
        f"slurm-7 --rdzv-conf is_host=0 --local-addr 10.0.0.3 --max-restarts 3 -m m {__file__}"
    )


def test_interfaces() -> None:
    assert interface_variables("") == {}
    assert interface_variables("lo")["NCCL_SOCKET_IFNAME"] == "lo"
    with pytest.raises(InputError, match="interface 'nope' has no IPv4 address here; there are .*lo"):
        interface_variables("nope")


@pytest.mark.parametrize("kind", ["module", "package"])
def test_a_rank_runs_main_of_modules_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Packages keep it in ``__main__``, as ``python -m`` has it; the training worker is one."""
    name = f"told_{kind}"
    file = tmp_path / f"{name}.py" if kind == "module" else tmp_path / name / "__main__.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("told = []\ndef main(arguments):\n    told.extend(arguments)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run_rank(find_place({}), name, ["job.json"])
    assert importlib.import_module(name if kind == "module" else f"{name}.__main__").told == ["job.json"]
    assert callable(importlib.import_module(f"{WORKER}.__main__").main)
