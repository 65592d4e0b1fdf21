"""What the optimizer of a model under a plan updates, and with what."""

from __future__ import annotations

import pytest
import torch

import autopar
from autopar.errors import InputError
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.step.optimizer import AdamWOptions, build_optimizer, decay_groups
from autopar.workload import Optimizer

SPEC = ModelSpec(
    name="t", num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=2, ffn_size=32, vocab_size=20, max_seq_len=8,
    fused_qkv=False,
)  # fmt: skip


def model() -> ParallelModel:
    return autopar.parallelize(
        build(SPEC), parse_slug("mb2"), loss_fn=language_model_loss, num_microbatches=1, device="cpu"
    )


def test_norms_and_biases_do_not_decay() -> None:
    """A step without gradients' influence (they are zero) shrinks matrices by rate * decay and leaves the rest."""
    parallel = model()
    with torch.no_grad():
        for parameter in parallel.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(parallel, learning_rate=0.1, adamw=AdamWOptions(weight_decay=0.5)).step()
    for name, parameter in parallel.named_parameters():
        kept = "norm" in name or name.endswith("bias")
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1.0 if kept else 0.95))


def test_options_reach_torch() -> None:
    options = AdamWOptions(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=False)
    optimizer = build_optimizer(model(), learning_rate=2e-3, adamw=options)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-6, 2e-3)
    plain = build_optimizer(model(), Optimizer.SGD, learning_rate=0.1)
    assert isinstance(plain, torch.optim.SGD) and plain.param_groups[0]["weight_decay"] == 0


def test_every_parameter_is_in_one_group() -> None:
    named = list(build(SPEC).named_parameters())
    for decay in (0.1, 0.0):
        found = [id(p) for group in decay_groups(named, decay) for p in group["params"]]
        assert sorted(found) == sorted(id(p) for _, p in named)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamWOptions(betas=(0.9, 1.0)), "betas are"),
        (lambda: AdamWOptions(eps=0.0), "use eps>0"),
        (lambda: build_optimizer(model(), learning_rate=-1.0), "not negative"),
    ],
)
def test_impossible_options_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
