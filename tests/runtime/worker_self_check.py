"""Started by test_self_check on four ranks: plans that are right, and the same ones broken without an exception."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from pytest import MonkeyPatch
from test_self_check import job_of
from torch import Tensor

from autopar.errors import RunError
from autopar.plan import parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.parallel import parallel_model
from autopar.runtime.parallel.mesh import build_mesh
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.tensor_parallel import local_tensor
from autopar.runtime.train import self_check as checks


def doubled(train_step: Callable[[ParallelModel, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Gradients twice as long, as from a reduction that adds where it should average. Adam would hardly notice."""

    def step(model: ParallelModel, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = train_step(model, inputs, targets)
        for parameter in model.parameters():
            if parameter.grad is not None:
                local_tensor(parameter.grad).mul_(2)
        return loss

    return step


def main() -> None:
    """Checks that hold, and checks that must not."""
    with report_progress(), joined("cpu") as device:

        def check(name: str, slug: str, wanted: str = "") -> None:
            plan = parse_slug(slug)
            state = torch.random.get_rng_state()
            try:
                told = checks.self_check(job_of(slug), plan, device, build_mesh(plan.layout, "cpu")).sentence
            except RunError as error:
                told = str(error)
            assert torch.equal(state, torch.random.get_rng_state())
            everyone: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(everyone, told)
            assert len(set(everyone)) == 1, everyone
            if dist.get_rank() == 0:
                send_message({"name": name, "slug": slug, "told": told})

        check("right", "dp2.tp2.sp.mb2")
        check("right", "pp2.dp2.z2.mb1.sched-zb-h1")
        with MonkeyPatch.context() as patch:
            patch.setitem(checks.MOST_FLOPS, "cpu", 0.0)
            check("small", "pp2.dp2.vp2.z3.mb2")
        with MonkeyPatch.context() as patch:
            patch.setattr(parallel_model, "reduce_partial", lambda parameters, mesh: None)
            check("norms not reduced", "dp2.tp2.sp.mb2")
        with MonkeyPatch.context() as patch:
            patch.setattr(ParallelModel, "train_step", doubled(ParallelModel.train_step))
            check("doubled", "dp4.z2.mb2")


if __name__ == "__main__":
    main()
