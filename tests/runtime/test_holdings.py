"""Holdings name exactly the elements that lie in each rank's tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autopar
from autopar.plan import parse_slug
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from autopar.runtime.parallel.holdings import Cut, Piece, cut_runs, pieces_of, whole_model

PLANS = (
    "dp4.mb1", "dp4.z2.mb1", "dp4.z3.mb1", "dp4.z3.rep2.mb1", "dp2.tp2.mb1", "dp2.tp2.z2.mb1", "dp2.tp2.z3.sp.mb1",
    "dp2.pp2.mb1", "dp2.pp2.z3.mb1", "dp2.pp2.vp2.z2.mb1", "tp2.pp2.mb1", "pp4.mb1", "dp2.cp2.z3.mb1",
    "dp2.pp2.vp2.mb1.sched-zb-v",
)  # fmt: skip
EXPERT_PLANS = (
    "dp4.ep2.mb1", "dp4.ep2.z3.mb1", "dp4.ep2.etp2.z2.mb1", "dp4.etp2.z3.mb1", "dp2.tp2.sp.ep2.z3.mb1",
    "dp4.ep2.z3.rep2.mb1", "dp2.pp2.ep2.mb1", "dp2.cp2.ep2.z1.mb1",
)  # fmt: skip
FUSED_PLANS = ("dp2.tp2.mb1", "dp2.tp2.z2.mb1", "dp4.z2.mb1")
TIED_PLANS = ("dp2.tp2.z3.sp.mb1", "dp2.pp2.z2.mb1", "pp2.vp2.tp2.mb1.sched-zb-v", "dp4.mb1")


def elements(shape: tuple[int, ...], pieces: tuple[Piece, ...], local_shape: torch.Size) -> torch.Tensor:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    local = torch.full(local_shape, -1)
    for piece in pieces:
        there, here = (
            tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))
            for start in (piece.offset, piece.local)
        )
        local[here] = whole[there]
    return local


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(0, 3)), max_size=3),
)
def test_pieces_are_what_chunk_leaves(shape: tuple[int, int], wanted: list[tuple[int, int, int]]) -> None:
    local, cuts = torch.arange(shape[0] * shape[1]).view(shape), []
    for dim, parts, index in wanted:
        cuts.append(Cut(dim=dim, parts=parts, index=index % parts))
        chunks = local.chunk(parts, dim)
        empty = local.narrow(dim, 0, 0)
        local = chunks[index % parts] if index % parts < len(chunks) else empty
    assert torch.equal(elements(shape, pieces_of(shape, cuts), local.shape), local)


def test_rows_in_another_order() -> None:
    """Query, key and value of a fused product, two heads each, divided over two ranks by heads."""
    whole = torch.arange(12 * 3).view(12, 3)
    rows = ((0, 2), (4, 6), (8, 10), (2, 4), (6, 8), (10, 12))
    mixed = torch.cat([whole[start:stop] for start, stop in rows])
    for rank in range(2):
        pieces = pieces_of((12, 3), [Cut(dim=0, parts=2, index=rank)], rows)
        assert len(pieces) == 3
        assert torch.equal(elements((12, 3), pieces, torch.Size((6, 3))), mixed.chunk(2)[rank])
    assert len(pieces_of((12, 3), [], ((0, 4), (4, 12)))) == 1


def test_the_order_of_divisions_matters() -> None:
    """Control: two divisions of one dimension in the wrong order name other elements."""
    cuts = [Cut(dim=0, parts=2, index=0), Cut(dim=0, parts=3, index=1)]
    assert pieces_of((12,), cuts) != pieces_of((12,), cuts[::-1])


def test_scalars_and_nothing() -> None:
    assert pieces_of((), []) == (Piece(offset=(), local=(), shape=()),)
    assert pieces_of((0, 3), []) == ()
    assert cut_runs(((0, 2),), Cut(dim=0, parts=4, index=3)) == ()


def test_shared_parameters_have_their_first_name() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    whole = whole_model(module)
    assert whole.shapes == {"a.weight": (2, 2)}
    assert whole.first_names == {"a.weight": "a.weight", "b.weight": "a.weight"}


def test_one_rank_holds_everything() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model = autopar.parallelize(module, parse_slug("mb1"), loss_fn=F.mse_loss, num_microbatches=1, device="cpu")
    assert [(h.name, h.copies, h.first) for h in model.holdings] == [(n, 1, True) for n, _ in model.owned]
    assert model.holdings[0].pieces == (Piece(offset=(0, 0), local=(0, 0), shape=(2, 3)),)


@pytest.mark.dist
def test_every_layout(tmp_path: Path) -> None:
    """The worker compares them with parameters that hold their own global positions."""
    job = tmp_path / "job.json"
    plans = [("uneven", slug) for slug in PLANS] + [("experts", slug) for slug in EXPERT_PLANS]
    plans += [("fused", slug) for slug in FUSED_PLANS] + [("tied", slug) for slug in TIED_PLANS]
    job.write_text(json.dumps({"plans": plans}))
    folder = str(Path(__file__).parent)
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})
    messages: list[dict[str, Any]] = []
    launch(
        "worker_holdings", job, nodes=[node], ranks_per_node=4, out_dir=tmp_path, stall_timeout_s=120,
        on_message=messages.append,
    )  # fmt: skip
    assert [message["ranks"][0]["slug"] for message in messages] == [slug for _, slug in plans]
    ranks = {plan: message["ranks"] for plan, message in zip(plans, messages, strict=True)}
    several = [max(rank["several"] for rank in ranks["fused", slug]) for slug in FUSED_PLANS]
    assert [number > 0 for number in several] == [True, True, False]
    found = {slug: each for (model, slug), each in ranks.items() if model in ("uneven", "experts")}
    copies = {slug: ranks[0]["copies"] for slug, ranks in found.items()}
    assert copies["dp4.mb1"] == [4] and copies["dp4.z2.mb1"] == copies["dp4.z3.mb1"] == [1]
    assert copies["dp4.z3.rep2.mb1"] == copies["dp2.pp2.mb1"] == [2]
    assert copies["dp2.tp2.mb1"] == [2, 4] and copies["dp2.tp2.z2.mb1"] == [1, 2]
    assert copies["tp2.pp2.mb1"] == [1, 2] and copies["pp4.mb1"] == [1]
    assert copies["dp4.ep2.mb1"] == [2, 4] and copies["dp4.ep2.z3.mb1"] == [1] and copies["dp2.cp2.z3.mb1"] == [1]
    # The model was chosen so that there are ranks without any of the positions.
    assert sum(rank["empty"] for rank in found["dp4.z3.mb1"]) > 0
