"""Predictions that a refactoring must leave identical to the bit.

A change of the cost model changes ``predictions.json`` on purpose: write it again with
``python tests/golden/test_golden.py`` and show the table of predicted against measured before and after.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.estimate import Setting, estimate
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

FILE = Path(__file__).with_name("predictions.json")
CASES = [
    ("llama3-70b", "h100:8x8", "megatron-core", 128, 8192, "tp4.pp4.vp5.cp2.dp2.z1.mb1.ac-none.sp"),
    ("llama3-70b", "h100:8x8", "megatron-core", 128, 8192, "tp8.pp4.dp2.z1.mb1.ac-full.sp"),
    ("gpt3-175b", "a100-80g:64x8", "megatron-core", 1536, 2048, "tp8.pp16.vp3.dp4.mb1.ac-full"),
    ("gpt2-xl", "a100-40g:1x8", "torchtitan", 64, 1024, "dp8.z3.mb4.ac-none"),
    ("bert-large", "v100:2x8", "megatron-core", 256, 512, "tp2.dp8.mb8.ac-selective"),
    ("demo-gpt", "cpu:1x4", "autopar-gloo", 16, 128, "pp2.dp2.mb2"),
    ("demo-gpt", "cpu:4x1", "autopar-gloo", 16, 128, "tp2.dp2.z2.mb8.sp"),
]


def predict(case: tuple[str, str, str, int, int, str]) -> dict[str, Any]:
    model, cluster, stack, batch, seq_len, slug = case
    precision = {"v": Precision.FP16, "c": Precision.FP32}.get(cluster[0], Precision.BF16)
    setting = Setting(
        graph=build_graph(load_preset(model), seq_len=seq_len, precision=precision),
        workload=Workload(global_batch=batch, seq_len=seq_len, precision=precision),
        cluster=load_cluster(cluster),
        stack=load_stack(stack),
    )
    result = estimate(setting, parse_slug(slug))
    return {"step_s": result.step_s, "breakdown": dict(result.breakdown), "memory": dict(result.memory)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[-1]}")
def test_predictions_are_golden(case: tuple[str, str, str, int, int, str]) -> None:
    golden = json.loads(FILE.read_text())[" ".join(map(str, case))]
    # One part in 1e12: the last bits differ between processors' vector units.
    found = predict(case)
    assert found["step_s"] == pytest.approx(golden["step_s"], rel=1e-12)
    assert found["breakdown"] == pytest.approx(golden["breakdown"], rel=1e-12, abs=1e-15)
    assert found["memory"] == pytest.approx(golden["memory"], rel=1e-12)


if __name__ == "__main__":
    FILE.write_text(json.dumps({" ".join(map(str, case)): predict(case) for case in CASES}, indent=1) + "\n")
