"""The mesh against the groups of the layout, for every order of the axes and every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.errors import PlanError
from autopar.layout import ORDERS, Layout
from autopar.plan import parse_slug
from autopar.runtime.parallel.mesh import build_mesh, data_mesh, group_labels, submesh

SLUGS = ("tp2.dp2.pp2.mb1", "tp2.cp2.dp2.mb1", "cp2.dp4.z3.rep2.mb1", "cp2.dp2.z2.tp2.mb1", "pp2.cp4.mb1", "cp8.mb1")


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """This process as one of many, which send nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def group_with(layout: Layout, rank: int, *axes: str) -> tuple[int, ...]:
    return next(group for group in layout.groups(*axes) if rank in group)


def possible(slug: str) -> list[Layout]:
    found = []
    for order in ORDERS:
        try:
            found.append(parse_slug(f"{slug}.order-{order}").layout)
        except PlanError:
            assert "rep2" in slug and "dp-cp" in order
    return found


@pytest.mark.parametrize("slug", SLUGS)
def test_groups_are_those_of_the_layout(slug: str) -> None:
    for rank in (0, 3, 5, 6):
        with rank_of(rank, 8):
            for layout in possible(slug):
                mesh = build_mesh(layout, "cpu")
                assert mesh is not None
                names, by_ranks = group_labels(mesh)
                for axis in ("tp", "cp", "pp"):
                    part = submesh(mesh, axis)
                    assert (part is None) == (getattr(layout, axis) == 1)
                    if part is not None:
                        assert tuple(part.mesh.flatten().tolist()) == group_with(layout, rank, axis)
                        assert part.get_local_rank() == layout.coordinates(rank)[axis]
                        assert names[part.get_group().group_name] == axis
                data = data_mesh(mesh)
                assert data is not None
                if data.ndim == 1:
                    expected = {"dp": group_with(layout, rank, "dp_replicate", "dp_shard", "cp")}
                else:
                    expected = {
                        "dp_replicate": group_with(layout, rank, "dp_replicate"),
                        "dp_shard": group_with(layout, rank, "dp_shard", "cp"),
                    }
                for axis, (label, ranks) in enumerate(expected.items()):
                    group = data.get_group(axis)
                    assert tuple(dist.get_process_group_ranks(group)) == ranks
                    assert names[group.group_name] == label and by_ranks[ranks] == label


def test_gradients_have_a_group_of_their_own() -> None:
    with rank_of(0, 2):
        mesh = build_mesh(parse_slug("cp2.mb1").layout, "cpu")
        data = data_mesh(mesh)
        assert mesh is not None and data is not None
        assert data.get_group().group_name != mesh.get_group("cp").group_name
        assert data_mesh(mesh) is data


def test_a_mesh_is_of_as_many_ranks() -> None:
    with rank_of(0, 2), pytest.raises(PlanError, match="the plan is for 4 ranks, but there are 2"):
        build_mesh(parse_slug("dp4.mb1").layout, "cpu")
    assert build_mesh(Layout(), "cpu") is None and data_mesh(None) is None and submesh(None, "tp") is None
