"""Started by test_experts on four ranks: gradients of mixtures of experts under every division, against one process."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from gradient_checks import worst_gradient
from test_experts import BATCH, CAPACITY, DROPLESS, PLANS, SEQ, TOKENS_BYTES, rows_of
from torch import Tensor

import autopar
from autopar.model.spec import ModelSpec
from autopar.model.transformer import Transformer, build, language_model_loss
from autopar.plan import Plan, parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.observe.counting import CollectiveCounter
from autopar.runtime.parallel.mesh import build_mesh
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.tensor_parallel import local_tensor

TOLERANCE = 2e-5


def lively(spec: ModelSpec) -> Transformer:
    """A model whose router has opinions: with its ordinary initial values all experts are alike."""
    model = build(spec, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moe." in name:
                parameter.mul_(8.0)
    return model


def batch() -> Tensor:
    return torch.randint(0, 64, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(7))


def divided(spec: ModelSpec, plan: Plan) -> ParallelModel:
    per_rank = BATCH // plan.layout.dp
    return autopar.parallelize(
        lively(spec), plan, loss_fn=language_model_loss, num_microbatches=per_rank // plan.microbatch_size,
        device="cpu", mesh=build_mesh(plan.layout, "cpu"),
    )  # fmt: skip


def step(model: ParallelModel) -> Tensor:
    """One step on this rank's share."""
    layout = model.plan.layout
    place = layout.coordinates(dist.get_rank())
    share, size = place["dp_replicate"] * layout.dp_shard + place["dp_shard"], BATCH // layout.dp
    tokens = batch()[share * size : (share + 1) * size]
    return model.train_step(tokens[:, :-1], tokens[:, 1:])


def check(spec: ModelSpec, slug: str, whole: dict[str, Tensor], loss: float) -> None:
    """Loss and all gradients; of a second step they are added to those of the first."""
    model = divided(spec, parse_slug(slug))
    for times in (1, 2):
        mine = step(model).clone()
        dist.all_reduce(mine, dist.ReduceOp.AVG)
        assert abs(mine.item() - loss) < TOLERANCE, (slug, mine.item(), loss)
        worst = worst_gradient(model, {name: gradient * times for name, gradient in whole.items()})
        assert worst < TOLERANCE, f"{spec.name} {slug}, step {times}: {worst}"
    done(f"{spec.name} {slug}")


def check_controls(spec: ModelSpec, whole: dict[str, Tensor]) -> None:
    """A wrong scale, rows that stay where they are, and sequences that each rank counts for itself are seen."""
    model = divided(spec, parse_slug("dp4.ep2.mb2"))
    assert model.experts is not None
    model.experts = dataclasses.replace(model.experts, divisor=2)
    step(model)
    assert worst_gradient(model, whole) > 0.1
    done("wrong scale seen")


def check_counts(spec: ModelSpec) -> None:
    """What is handed over, summed over the ranks of a group, does not depend on the router."""
    plan = parse_slug("dp4.ep2.mb2")
    mesh = build_mesh(plan.layout, "cpu")
    model = autopar.parallelize(
        lively(spec), plan, loss_fn=language_model_loss, num_microbatches=1, device="cpu", mesh=mesh
    )
    with CollectiveCounter(mesh) as counter:
        step(model)
    exchanged = [call for call in counter.calls if call.axis == "ep"]
    assert {call.kind for call in exchanged} == {"all_to_all"} and {call.group_size for call in exchanged} == {2}
    blocks = spec.num_layers - spec.dense_layers
    assert len(exchanged) == blocks * 5, "counts, there and back, and their gradients"
    total = torch.tensor(sum(call.num_bytes for call in exchanged))
    dist.all_reduce(total)
    assert total.item() == rows_of(spec) * blocks * 4 + 4 * blocks * spec.num_experts * 8, total
    assert rows_of(spec) == TOKENS_BYTES * spec.top_k
    reduced = [call for call in counter.calls if call.axis == "edp"]
    mine = sum(p.numel() for name, p in model.named_parameters() if name in model.experts.names)
    assert {call.kind for call in reduced} == {"all_reduce"}
    local = sum(local_tensor(p).numel() for name, p in model.named_parameters() if name in model.experts.names)
    assert sum(call.num_bytes for call in reduced) == 4 * local == 4 * mine // 2
    done("counted")


def one_process(spec: ModelSpec) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the global batch."""
    model, tokens = lively(spec), batch()
    loss = language_model_loss(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def done(what: str) -> None:
    """Tell the test."""
    if dist.get_rank() == 0:
        send_message({"checked": what})


def main() -> None:
    """All checks."""
    with report_progress() as progress, joined("cpu"):
        for spec in (DROPLESS, CAPACITY):
            loss, whole = one_process(spec)
            for slug in PLANS[spec.name]:
                progress.update(plan=f"{spec.name} {slug}")
                check(spec, slug, whole, loss)
        loss, whole = one_process(DROPLESS)
        progress.update(plan="controls")
        check_controls(DROPLESS, whole)
        check_counts(DROPLESS)


if __name__ == "__main__":
    main()
