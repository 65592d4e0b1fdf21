"""States of torch's random generators, by data parallel coordinate."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from autopar.errors import PlanError
from autopar.layout import Layout
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


def seed_anew(step: int, coordinate: int) -> None:
    """Seed the generators of a data parallel rank that a checkpoint has no state of; the same whenever it is read."""
    digest = hashlib.sha256(f"{step} {coordinate}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7]))


def data_coordinate(layout: Layout, rank: int) -> int:
    """Which share of the batch a rank has."""
    position = layout.coordinates(rank)
    return position["dp_replicate"] * layout.dp_shard + position["dp_shard"]


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
    wanted = data_coordinate(plan.layout, rank)
    return next((other for other in range(layout.world_size) if data_coordinate(layout, other) == wanted), None)
