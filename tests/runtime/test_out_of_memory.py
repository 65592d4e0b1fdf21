"""An allocation that fails is told by item, beside the prediction; other errors pass as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from autopar.errors import RunError
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import PlanFile, parse_slug
from autopar.runtime.step.out_of_memory import KNOBS, describe, naming_memory
from autopar.workload import Workload

MIB = 2**20
CPU = torch.device("cpu")
PREDICTED = {"parameters": 10.0 * MIB, "optimizer": 20.0 * MIB, "activations": 3.0 * MIB, "working": 1.0 * MIB,
             "reserve": 9.0 * MIB}  # fmt: skip


def test_items_come_largest_first_beside_their_predictions() -> None:
    held = {"parameters": 10 * MIB, "gradients": MIB, "optimizer": 25 * MIB, "activations": 2 * MIB}
    message = describe("step 3", "512.00 MiB", held, 64 * MIB, PREDICTED)
    assert message.startswith("out of memory on rank 0 in step 3, asking for 512.00 MiB. Held 38.00 MiB of 64.00 MiB: ")
    assert (
        "optimizer state 25.00 MiB (predicted 20.00 MiB), parameters 10.00 MiB (predicted 10.00 MiB), activations and "
        "everything else 2.00 MiB (predicted 4.00 MiB), gradients 1.00 MiB. The largest are optimizer state: use "
        "zero_stage 1, 2 or 3" in message
    )
    assert "predicted" not in describe("step 3", "more", held, 0.0, {})
    for item, knob in KNOBS.items():
        assert knob in describe("step 3", "more", {**dict.fromkeys(held, 0), item: 1}, 0.0, {})


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 1048576 bytes. Error code 12 (Cannot allocate memory)"), "1.00 MiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.50 GiB"),
        (torch.OutOfMemoryError("CUDA error"), "more"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_failed_allocations_are_known(error: RuntimeError, asked: str, wrapped: bool) -> None:
    with (
        pytest.raises(RunError, match=f"asking for {asked}. Held .* parameters 5.00 MiB"),
        naming_memory("step 1", lambda: {"parameters": 5 * MIB}, CPU),
    ):
        if not wrapped:
            raise error
        raise RuntimeError("[Stage 0] failed to run forward") from error


def test_other_errors_pass() -> None:
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError) as caught, naming_memory("step 1", dict, CPU):
        raise error
    assert caught.value is error


LIMITED = """
import resource, torch
from autopar.runtime.step.out_of_memory import naming_memory
kept = torch.ones(1 << 20)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
with naming_memory("step 7", lambda: {"parameters": 4 << 20}, torch.device("cpu"), {"parameters": 4 << 20}):
    torch.empty(1 << 28)
"""


def test_a_process_with_little_memory() -> None:
    """A real failure of the allocator, under a limit of the address space."""
    ended = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert "RunError: out of memory on rank 0 in step 7, asking for 1.00 GiB. Held" in last
    assert "parameters 4.00 MiB (predicted 4.00 MiB)" in last and "use a smaller microbatch" in last


def test_plan_files_carry_the_items() -> None:
    from autopar.estimate import Setting, estimate
    from costmodels.hardware import load_cluster
    from costmodels.stack import load_stack

    model, workload = load_preset("demo-gpt"), Workload(global_batch=8, seq_len=64)
    setting = Setting(
        graph=build_graph(model, seq_len=64), workload=workload, cluster=load_cluster("cpu:1x2"),
        stack=load_stack("autopar-gloo"),
    )  # fmt: skip
    best = estimate(setting, parse_slug("dp2.z2.mb2"))
    content = PlanFile(slug=best.plan.slug, model=model, workload=workload, plan=best.plan, predicted=best.headline)
    assert content.predicted_memory == dict(best.memory)
    assert content.predicted["step_s"] == best.step_s
    assert PlanFile(slug="", model=model, workload=workload, plan=best.plan).predicted_memory == {}
