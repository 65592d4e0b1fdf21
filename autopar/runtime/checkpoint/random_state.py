"""States of torch's random generators, by share of the batch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from autopar.errors import PlanError
from autopar.plan import Plan, parse_slug

CPU, CUDA = "random:cpu", "random:cuda"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of this rank's generators (uint8) by their key in a file."""
    states = {CPU: torch.get_rng_state()}
    if device.type == "cuda":
        states[CUDA] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators that there are states of."""
    if CPU in states:
        torch.set_rng_state(states[CPU])
    if CUDA in states and device.type == "cuda":
        torch.cuda.set_rng_state(states[CUDA], device)


def seed_anew(step: int, share: int) -> None:
    """Seed the generators of a share of the batch that a checkpoint has no state of; the same whenever it is read."""
    digest = hashlib.sha256(f"{step} {share}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7]))


def source_of(saved: str, plan: Plan, rank: int) -> int | None:
    """The rank of a saved plan whose random state this rank goes on with.

    Under the same layout that is the rank itself; under another one the first rank with the same share of the batch;
    None if there were fewer shares.
    """
    try:
        layout = parse_slug(saved).layout
    except PlanError:
        return None
    if layout == plan.layout:
        return rank
    wanted = plan.layout.data_share(rank)
    return next((other for other in range(layout.world_size) if layout.data_share(other) == wanted), None)
