"""What is derived from spans and moments: by hand, adding up to the step, and from files of an older version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.measured import collective_seconds, inspected_step_s, pass_seconds, peak_items, rank_seconds
from autopar.measurement import (
    CountedCollective,
    Measurement,
    Moment,
    RankMeasurement,
    Span,
    read_measurement,
    write_measurement,
)
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.schedule.actions import Direction
from autopar.workload import Precision, Workload

DEMO = Path(__file__).parents[1] / "reports" / "demo" / "runs"


def work(name: str, start: float, end: float) -> Span:
    phase = "optimizer" if name == "optimizer" else "forward" if "F" in name else "backward"
    return Span(name=name, phase=phase, start_s=start, end_s=end)


def call(name: str, start: float, end: float, exposed: float | None = None, num_bytes: int = 0) -> Span:
    return Span(
        name=name, phase="communication", start_s=start, end_s=end, exposed_s=exposed, num_bytes=num_bytes
    )  # fmt: skip


def rank(number: int, *spans: Span, moments: tuple[Moment, ...] = (), **memory: int) -> RankMeasurement:
    return RankMeasurement(
        rank=number, peak_bytes=memory.pop("peak", 0), memory=memory, collectives=(), spans=spans, moments=moments
    )


def measurement(slug: str, *ranks: RankMeasurement) -> Measurement:
    plan = parse_slug(slug)
    return Measurement(
        slug=plan.slug, model=load_preset("demo-gpt"), plan=plan, backend="gloo", device="cpu", versions={}, date="",
        workload=Workload(global_batch=8, seq_len=128, precision=Precision.FP32), losses=(), step_s=(), ranks=ranks,
    )  # fmt: skip


def test_exposed_communication_is_taken_out_of_passes() -> None:
    """A gather within the forward; a reduction that begins in the backward and is awaited for 1 s after it."""
    run = measurement(
        "dp2.mb4",
        rank(
            0, work("0F0", 0, 4), call("all_gather dp", 1, 2, 0.75), work("0B0", 4, 10),
            call("all_reduce dp", 7, 11, 1.5), work("optimizer", 11, 12),
        ),
        rank(1, work("0F0", 0, 5), work("0B0", 5, 11), work("optimizer", 11.5, 13)),
    )  # fmt: skip
    first, second = rank_seconds(run)
    assert first.passes == pytest.approx({(0, "forward"): 3.25, (0, "backward"): 5.5})
    assert first.communication == pytest.approx({("all_gather", "dp"): 0.75, ("all_reduce", "dp"): 1.5})
    assert (first.optimizer, first.between) == pytest.approx((1.0, 1.0))  # the other rank takes a second longer
    assert (second.between, second.idle) == pytest.approx((0.5, 0.5))
    assert pass_seconds(run)[0, Direction.FORWARD].compute == pytest.approx((3.25 + 5) / 2)


def test_waiting_for_a_stage_is_bubble_and_waiting_for_its_message_is_transfer() -> None:
    run = measurement(
        "pp2.mb8",
        rank(0, work("0F0", 0, 2), work("0B0", 7, 10), work("optimizer", 10, 11)),
        rank(
            1, work("1F0", 2.5, 4.5), work("1B0", 4.5, 6.5), call("broadcast pp", 6.5, 7, 0.5), work("optimizer", 7, 8)
        ),
    )
    first, last = rank_seconds(run)
    assert (first.bubble, first.transfer, first.between) == pytest.approx((4.5, 0.5, 0.0))
    # It waits 2 s for the forward and, at the end, 0.5 s to tell the loss and 3 s for the first stage.
    assert (last.bubble, last.transfer) == pytest.approx((2 + 0.5 + 3, 0.5))
    assert not last.communication


def test_zero_bubble_backwards_are_one_item_of_a_stage() -> None:
    run = measurement(
        "pp2.mb8.sched-zb-h1",
        rank(0, work("0F0", 0, 1), work("0I0", 5, 6), work("0W0", 6, 8)),
        rank(1, work("1F0", 1, 2), work("1I0", 2, 4), work("1W0", 5, 6)),
    )
    first, last = rank_seconds(run)
    assert first.passes == pytest.approx({(0, "forward"): 1, (0, "backward"): 3})
    assert first.bubble == pytest.approx(3)  # from 1 to the end of 1I0, not of 1W0
    assert first.transfer == pytest.approx(1)
    assert pass_seconds(run)[1, Direction.BACKWARD_WEIGHT].total == pytest.approx(1)
    assert last.between + last.bubble == pytest.approx(1 + 1 + 2)


def test_a_collective_moves_from_when_its_last_rank_is_there() -> None:
    run = measurement(
        "tp2.dp2.mb4",
        rank(0, call("all_reduce tp", 0, 3, 3, 100), call("all_reduce tp", 5, 6, 1, 100)),
        rank(1, call("all_reduce tp", 2, 3, 1, 100), call("all_reduce tp", 4, 6, 0.5, 100)),
        rank(2, call("all_reduce tp", 0, 9, 0, 100)),
        rank(3),
    )
    found = collective_seconds(run)
    [of_first] = found[0]
    assert (of_first.count, of_first.num_bytes) == (2, 200)
    assert (of_first.seconds, of_first.moving, of_first.waiting) == pytest.approx((4, 2, 2))
    assert found[1][0].overlapped == pytest.approx(1.5)
    # Rank 3 called something else: nothing can be said about rank 2's waiting.
    assert found[2][0].waiting == 0


def moment(name: str, begin: int, peak: int, end: int) -> Moment:
    return Moment(name=name, begin_bytes=begin, peak_bytes=peak, end_bytes=end)


HELD = {"parameters": 100, "optimizer": 200, "buffers": 10, "gradients": 100}


def test_items_of_a_peak_in_backward() -> None:
    """Two microbatches in flight of 50 each, gradients of 100 from the first backward on, 7 more while it works."""
    found = rank(
        0, peak=310 + 207, **HELD,
        moments=(
            moment("0F0", 0, 55, 50), moment("0F1", 50, 105, 100), moment("0B0", 100, 160, 150),
            moment("0F2", 150, 205, 200), moment("0B1", 200, 207, 150), moment("optimizer", 100, 120, 100),
        ),
    )  # fmt: skip
    items = peak_items(found, parse_slug("pp2.mb2"))
    assert items == {
        "parameters": 100, "optimizer": 200, "buffers": 10, "gradients": 100, "activations": 100, "working": 7,
    }  # fmt: skip
    assert sum(items.values()) == found.peak_bytes


def test_items_of_a_peak_while_the_optimizer_steps() -> None:
    moments = (moment("0F0", 0, 50, 50), moment("0B0", 50, 100, 100), moment("optimizer", 100, 300, 100))
    items = peak_items(rank(0, peak=610, moments=moments, **HELD), parse_slug("mb2"))
    assert (items["gradients"], items["activations"], items["working"]) == (100, 0, 200)


def test_weights_that_zero_2_gathers_are_parameters() -> None:
    """Shards of 100 of weights of 400, gathered in the first forward beside 30 of activations."""
    gathers = (CountedCollective(kind="all_gather", axis="dp", group_size=4, count=3, num_bytes=400),)
    moments = (moment("0F0", 0, 440, 430), moment("0B0", 430, 500, 100), moment("optimizer", 100, 100, 100))
    found = RankMeasurement(
        rank=0, peak_bytes=810, memory=HELD, collectives=gathers, spans=(), moments=moments
    )  # fmt: skip
    items = peak_items(found, parse_slug("dp4.z2.mb2"))
    assert (items["parameters"], items["buffers"], items["activations"]) == (400, 110, 30)
    assert (items["gradients"], items["working"]) == (0, 70)


@pytest.mark.parametrize("path", sorted(DEMO.glob("*/measurement.json")), ids=lambda path: path.parent.name)
def test_older_files_are_read_and_add_up(path: Path, tmp_path: Path) -> None:
    run = read_measurement(path)
    step_s = inspected_step_s(run)
    found = rank_seconds(run)
    assert len(found) == run.plan.layout.world_size
    for seconds in found:
        parts = (*seconds.passes.values(), *seconds.communication.values(), seconds.optimizer, seconds.idle)
        assert sum(parts) == pytest.approx(step_s)
        assert min(parts) >= -1e-3 * step_s
    for one in run.ranks:
        assert sum(peak_items(one, run.plan).values()) == one.peak_bytes
    write_measurement(tmp_path / "measurement.json", run)
    assert json.loads((tmp_path / "measurement.json").read_text())["schema_version"] == 2
    assert read_measurement(tmp_path / "measurement.json") == run


def test_unknown_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "measurement.json"
    path.write_text(json.dumps({"schema_version": 3}))
    with pytest.raises(InputError, match="schema_version is 3"):
        read_measurement(path)
