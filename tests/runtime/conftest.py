"""Layouts held against one process, several in one start of real ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autopar.measurement import CountedCollective
from autopar.model.spec import ModelSpec
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from costmodels.records import from_plain, to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A plan next to one process: largest differences of losses and final weights, and what each rank did.

    Attributes:
        loss_error, weight_error: absolute; of the losses, one evaluated without training is among them.
        collectives: of one step, by rank.
        peaks: bytes that a step takes beside what is held before it, by rank.
    """

    slug: str
    loss_error: float
    weight_error: float
    collectives: tuple[tuple[CountedCollective, ...], ...]
    peaks: tuple[int, ...]

    def counted(self, rank: int = 0) -> set[tuple[str, str, int, int, int]]:
        """Collectives of a rank as tuples."""
        return {(c.kind, c.axis, c.group_size, c.count, c.num_bytes) for c in self.collectives[rank]}


Case = tuple[ModelSpec, str] | tuple[ModelSpec, str, str]
CompareLayouts = Callable[..., list[Compared]]


@pytest.fixture
def compare_layouts(tmp_path: Path) -> CompareLayouts:
    """Train every case (model, slug, and what is to be done wrongly) on as many ranks as said."""

    def run(ranks: int, cases: Sequence[Case], *, batch: int = 8, seq: int = 16) -> list[Compared]:
        plain = [
            {"spec": to_plain(spec), "slug": slug, "wrong": wrong[0] if wrong else ""} for spec, slug, *wrong in cases
        ]
        job = tmp_path / "job.json"
        job.write_text(json.dumps({"cases": plain, "batch": batch, "seq": seq}))
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        messages: list[dict[str, Any]] = []
        launch(
            "worker_equality", job, nodes=[Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})],
            ranks_per_node=ranks, out_dir=tmp_path, stall_timeout_s=120, on_message=messages.append,
        )  # fmt: skip
        assert [message["slug"] for message in messages] == [slug for _, slug, *_ in cases]
        return [_compared(message) for message in messages]

    return run


def _compared(message: dict[str, Any]) -> Compared:
    return Compared(
        slug=message["slug"],
        loss_error=message["loss_error"],
        weight_error=message["weight_error"],
        collectives=tuple(
            tuple(from_plain(CountedCollective, entry, "message") for entry in entries)
            for entries in message["collectives"]
        ),
        peaks=tuple(message["peaks"]),
    )
