"""Started by test_parallelize on two ranks: modules of a user's own against one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_parallelize import Branched, mlp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import PlanError
from autopar.plan import parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined

BATCH = 8


class Normed(nn.Module):
    """A region with a parameter inside that every rank sees only a part of, and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 4), nn.RMSNorm(4)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        inner = self.scale(self.up(x).unflatten(-1, (-1, 4))).flatten(-2)
        return factor * self.down(inner)


def normed() -> nn.Module:
    torch.manual_seed(1)
    return Normed()


def branched() -> nn.Module:
    torch.manual_seed(2)
    return Branched()


def check(name: str, make: Callable[[], nn.Module], slug: str, declared: Mapping[str, str] | None = None) -> None:
    """Two steps of plain gradient descent under a plan equal those of one process."""
    plan, rank = parse_slug(slug), dist.get_rank()
    plain, updates = make(), []
    share = BATCH // plan.layout.dp
    model = autopar.parallelize(
        make(), plan, loss_fn=F.mse_loss, num_microbatches=share // plan.microbatch_size, device="cpu",
        tensor_parallel_plan=declared,
    )  # fmt: skip
    updates = [torch.optim.SGD(plain.parameters(), lr=0.1), torch.optim.SGD(model.parameter_groups(), lr=0.1)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = torch.randn(BATCH, 8, generator=generator)
        y = torch.randn(BATCH, plain(x).shape[-1], generator=generator)
        expected = F.mse_loss(plain(x), y)
        expected.backward()
        first = share * rank if plan.layout.dp > 1 else 0
        loss = model.train_step(x[first : first + share], y[first : first + share]).clone()
        if plan.layout.dp > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG)
        torch.testing.assert_close(loss, expected.detach())
        gradients = dict(plain.named_parameters())
        for parameter_name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, parameter_name
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            torch.testing.assert_close(
                whole, gradients[parameter_name].grad, msg=lambda m, n=parameter_name: f"{n}: {m}"
            )
        for update in updates:
            update.step()
            update.zero_grad()
    done(f"{name} {slug}")


def refused(name: str, make: Callable[[], nn.Module], slug: str, declared: Mapping[str, str] | None, word: str) -> None:
    """A plan that must be refused with a message that says ``word``."""
    try:
        autopar.parallelize(
            make(),
            parse_slug(slug),
            loss_fn=F.mse_loss,
            num_microbatches=4,
            device="cpu",
            tensor_parallel_plan=declared,
        )
    except PlanError as error:
        assert word in str(error), error
        done(f"{name} {slug.removesuffix('.mb2')} refused")
        return
    raise AssertionError(f"{name} {slug} was not refused")


def done(what: str) -> None:
    """Tell the test."""
    if dist.get_rank() == 0:
        send_message({"checked": what})


def main() -> None:
    """All checks."""
    with report_progress() as progress, joined("cpu"):
        pair = {"0": "colwise", "2": "rowwise", "3": "whole"}
        for slug in ("dp2.mb2", "dp2.z3.mb4", "pp2.mb2", "pp2.mb2.split-3-1", "tp2.mb4"):
            progress.update(plan=slug)
            check("sequential", mlp, slug, pair if "tp2" in slug else None)
        check("branched", branched, "dp2.z2.mb4")
        refused("branched", branched, "pp2.mb2", None, "declare pipeline_parts()")
        products = {"up": "colwise", "down": "rowwise"}
        inner = {**products, "scale": "inner"}
        check("normed", normed, "tp2.mb4", inner)
        refused("normed", normed, "tp2.mb2", products, "declare its module as 'inner'")
        refused("normed", normed, "tp2.sp.mb2", inner, "must declare pipeline_parts")


if __name__ == "__main__":
    main()
