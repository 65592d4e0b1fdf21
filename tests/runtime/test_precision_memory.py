"""Memory of bf16 over fp32 weights: the peak that is predicted against the peak that is measured, on one rank."""

from __future__ import annotations

import gc

import pytest
import torch

import autopar
from autopar.estimate import Setting, estimate
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.observe.memory import live_storages, measure_peak
from autopar.runtime.step.optimizer import build_optimizer
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

MODEL = ModelSpec(
    name="m", num_layers=4, hidden_size=256, num_heads=4, num_kv_heads=4, ffn_size=1024, vocab_size=1024,
    max_seq_len=64, fused_qkv=False,
)  # fmt: skip
WORKLOAD = Workload(global_batch=8, seq_len=64, precision=Precision.BF16)
PARAMETERS = sum(parameter.numel() for parameter in build(MODEL).parameters())


@pytest.mark.parametrize("slug", ["mb8", "mb2"])
def test_the_predicted_peak_is_the_measured_one(slug: str) -> None:
    gc.collect()
    plan, before = parse_slug(slug), sum(live_storages().values())
    model = autopar.parallelize(
        build(MODEL), plan, loss_fn=language_model_loss, num_microbatches=plan.num_microbatches(WORKLOAD), device="cpu",
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    optimizer = build_optimizer(model, learning_rate=1e-4)
    tokens = torch.randint(0, MODEL.vocab_size, (8, 65), generator=torch.Generator().manual_seed(0))

    def step(observer: object) -> None:
        model.train_step(tokens[:, :-1], tokens[:, 1:])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(None)
    peak = measure_peak(step, torch.device("cpu"), {})
    # Weights and two moments in fp32; between steps no copy in bf16 is left.
    assert abs(peak.held - before - 12 * PARAMETERS) < 0.01 * 12 * PARAMETERS
    setting = Setting(
        graph=build_graph(MODEL, seq_len=64, precision=Precision.BF16), workload=WORKLOAD,
        cluster=load_cluster("cpu:1x1"), stack=load_stack("autopar-gloo"),
    )  # fmt: skip
    found = estimate(setting, plan)
    assert found.memory["parameters"] == 4 * PARAMETERS and found.memory["optimizer"] == 8 * PARAMETERS
    assert found.memory["buffers"] >= 2 * PARAMETERS
    assert found.memory_bytes == pytest.approx(peak.highest - before, rel=0.05)
