"""The batch script: what it says, that bash takes it, and that its own lines run on an emulated cluster."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autopar.cli import run
from autopar.errors import InputError
from autopar.export.slurm import SlurmJob, nodes_of, sbatch_script
from autopar.model.spec import ModelSpec
from autopar.plan import PlanFile, parse_slug, write_plan_file
from autopar.runtime.launch.emulate import emulated_cluster, why_unavailable
from autopar.runtime.launch.nodes import Node
from autopar.runtime.launch.progress import RUNNING, read_statuses
from autopar.runtime.outcome import read_outcome
from autopar.workload import Precision, Workload

REASON = why_unavailable()
TINY = ModelSpec(
    name="tiny-gpt", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=256,
    max_seq_len=32, fused_qkv=False,
)  # fmt: skip
JOB = SlurmJob(name="j", nodes=4, ranks_per_node=8, device="cuda", plan="plan.json", out="/shared/my run")
STEPS = 400


def write_plan(path: Path, slug: str) -> Path:
    plan = parse_slug(slug)
    workload = Workload(global_batch=4, seq_len=32, precision=Precision.FP32)
    write_plan_file(path, PlanFile(slug=plan.slug, model=TINY, workload=workload, plan=plan))
    return path


def bash_takes(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_what_the_script_asks_for() -> None:
    script = sbatch_script(JOB)
    for line in ("#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --signal=B:TERM@120", "#SBATCH --requeue"):
        assert line in script.splitlines()
    assert "--partition" not in script and "SOCKET_IFNAME=ib0" in script
    assert "'/shared/my run'/result.json" in script or "'/shared/my run/result.json'" in script
    assert bash_takes(script) and not bash_takes(script + "if"), "control: bash -n sees what is wrong"
    named = sbatch_script(dataclasses.replace(JOB, device="cpu", partition="long", interface="eth1", setup=("a b",)))
    assert "#SBATCH --partition=long" in named and "--gpus-per-node" not in named and "\na b\n" in named
    assert "export GLOO_SOCKET_IFNAME=eth1" in named and bash_takes(named)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"nodes": 0}, "nodes and ranks"), ({"checkpoint_s": 10}, "too late for a checkpoint"),
     ({"partition": "a b"}, "holds blanks"), ({"python": "it's"}, "quotation mark")],
)  # fmt: skip
def test_what_it_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(JOB, **changed)
    with pytest.raises(InputError, match="12 ranks does not fill nodes of 8"):
        nodes_of(12, 8)


def test_the_command(tmp_path: Path) -> None:
    plan, script = write_plan(tmp_path / "plan.json", "dp4.mb1"), tmp_path / "job.sbatch"
    arguments = ["export", "slurm", str(plan), "-o", str(script), "--ranks-per-node", "2", "--device", "cpu"]
    assert run([*arguments, "--", "--steps", "7"]) == 0
    text = script.read_text()
    assert "#SBATCH --nodes=2" in text and f"run {plan} --out runs --device cpu --steps 7 &" in text
    assert bash_takes(text)


FAKE_SRUN = """#!/bin/bash
shift
for node in 0 1; do
  ip netns exec "$FAKE_NODES-$node" env SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 \\
    SLURMD_NODENAME=10.77.0.$((node + 1)) SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=all "$@" &
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit $code
"""
FAKE_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '10.77.0.1\\n10.77.0.2\\n'; else echo "$@" >> "$FAKE_LOG"; fi
"""
FAKE_SCANCEL = """#!/bin/bash
echo "$@" >> "$FAKE_LOG"
for node in 0 1; do kill -TERM $(ip netns pids "$FAKE_NODES-$node"); done
"""


def fake_slurm(folder: Path, nodes: tuple[Node, ...]) -> dict[str, str]:
    """An environment in which srun starts a task in each namespace, and the others note what they are told."""
    folder.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("scancel", FAKE_SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "FAKE_LOG": str(folder / "log"),
        "FAKE_NODES": nodes[0].command_prefix[-1].rpartition("-")[0], "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "all", "PYTHONPATH": str(Path.cwd()),
    }  # fmt: skip


def steps_of(folder: Path) -> list[int]:
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return [int(row["step"]) for row in csv.DictReader(stream) if row["loss"]]


@pytest.mark.netns
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_the_script_runs_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    """On two nodes: told that its time is up it saves, ends well and queues itself; started again it goes on."""
    plan, script, out = write_plan(tmp_path / "plan.json", "dp2.mb2"), tmp_path / "job.sbatch", tmp_path / "run"
    options = ["--ranks-per-node", "1", "--device", "cpu", "--folder", str(out), "--python", sys.executable]
    more = ["--steps", str(STEPS), "--log-every", "1", "--no-self-check"]
    assert run(["export", "slurm", str(plan), "-o", str(script), *options, "--interface", "eth0", "--", *more]) == 0
    with emulated_cluster(2, 50e6) as nodes:
        environment = fake_slurm(tmp_path / "bin", nodes)
        log = (tmp_path / "log").open("wb")
        first = subprocess.Popen(["bash", str(script)], env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 400
        while len(steps_of(out)) < 3 and first.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
        stopped = read_outcome(out)
        assert stopped.stopped and 3 <= stopped.steps_done < STEPS
        assert (tmp_path / "bin" / "log").read_text().splitlines() == ["--signal=TERM 77.0", "requeue 77"]
        script.write_text(script.read_text().replace(f"--steps {STEPS}", f"--steps {stopped.steps_done + 3}"))
        again = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=400)
        assert again.returncode == 0, again.stderr[-3000:]
    found = read_outcome(out)
    assert (found.first_step, found.stopped) == (stopped.steps_done, False)
    assert steps_of(out) == list(range(1, stopped.steps_done + 4))
    assert len((tmp_path / "bin" / "log").read_text().splitlines()) == 2, "a run that is done is not queued again"


@pytest.mark.netns
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_nodes_started_one_by_one_survive_a_kill(tmp_path: Path) -> None:
    """``autopar run --nodes`` on two nodes: a rank of the second is killed, and all go on from the last checkpoint."""
    plan, out = write_plan(tmp_path / "plan.json", "dp2.mb2"), tmp_path / "run"
    with emulated_cluster(2, 50e6) as nodes:
        parts = []
        for node in nodes:
            command = [
                *node.command_prefix, sys.executable, "-m", "autopar", "run", str(plan), "-o", str(out), "--nodes", "2",
                "--node-rank", str(node.index), "--master", f"{nodes[0].address}:29555", "--interface", "eth0",
                "--steps", "150", "--save-every", "5", "--log-every", "1", "--no-self-check", "--device", "cpu",
                "--max-restarts", "2",
            ]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
            log = (tmp_path / f"log{node.index}").open("wb")
            parts.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        struck = False
        end = time.monotonic() + 400
        while not struck and time.monotonic() < end and any(part.poll() is None for part in parts):
            status = read_statuses(out / "ranks", 2).get(1)
            if status is not None and status.state == RUNNING and len(steps_of(out)) >= 6:
                os.kill(status.pid, signal.SIGKILL)
                struck = True
            time.sleep(0.01)
        codes = [part.wait(timeout=300) for part in parts]
    logs = "".join((tmp_path / f"log{i}").read_text() for i in range(2))
    assert struck and codes == [0, 0], logs[-4000:]
    assert steps_of(out) == list(range(1, 151))
    found = read_outcome(out)
    assert found.first_step >= 5 and found.first_step % 5 == 0 and found.steps_done == 150
    assert logs.count("going on after step") == 1, "each line is shown once"
