"""A loop of a user's own, from plan to plan, equals a plain one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node

PLANS = (("dp2.z2.mb2", 4), ("pp2.mb2", 8), ("dp2.mb4", 12))


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_loop_goes_on_under_other_plans(tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = []
    (tmp_path / "job.json").write_text(json.dumps({"plans": PLANS}))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    launch(
        "user_loop", tmp_path / "job.json", nodes=[Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})],
        ranks_per_node=2, out_dir=tmp_path, stall_timeout_s=120, on_message=messages.append,
    )  # fmt: skip
    [found] = messages
    assert found["losses"] == pytest.approx(found["plain"], abs=1e-5)
    assert found["losses"][-1] < 0.7 * found["losses"][0]
