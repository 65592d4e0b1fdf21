"""A machine that takes longer: everything that its processors do takes longer by as much, links with a rate do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autopar.estimate import estimate
from autopar.estimate.machine import measured_setting
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.workload import Precision, Workload
from costmodels.calibration import MachineProfile, read_profile, with_fits
from costmodels.errors import InputError
from costmodels.speed import slowed, slowness

REPORTS = Path(__file__).parents[2] / "reports"
WORKLOAD = Workload(global_batch=8, seq_len=128, precision=Precision.FP32)


def step_s(profile: MachineProfile, slug: str) -> float:
    return estimate(measured_setting(load_preset("demo-gpt"), WORKLOAD, profile, 4), parse_slug(slug)).step_s


@pytest.fixture(scope="module")
def loopback() -> MachineProfile:
    return read_profile(REPORTS / "demo" / "profile.json")


def test_slowness_is_the_ratio_of_medians(loopback: MachineProfile) -> None:
    known = dataclasses.replace(loopback, yardstick_s=0.1)
    assert slowness(known, (0.3, 0.15, 0.05)) == pytest.approx(1.5)
    assert slowness(known, ()) is None
    assert slowness(dataclasses.replace(loopback, yardstick_s=0.0), (0.1,)) is None
    assert slowed(known, 1.5).yardstick_s == pytest.approx(0.15)


@pytest.mark.parametrize("slug", ["dp4.mb2", "tp2.dp2.mb4", "pp4.mb1", "dp4.z3.mb2"])
def test_on_one_machine_the_whole_step_takes_longer(loopback: MachineProfile, slug: str) -> None:
    slower = with_fits(slowed(loopback, 1.5))
    assert step_s(slower, slug) == pytest.approx(1.5 * step_s(with_fits(loopback), slug), rel=1e-3)


def test_the_links_of_a_cluster_keep_their_rate() -> None:
    """Control of the former: where the network takes its share, the step does not grow by the whole factor."""
    cluster = read_profile(REPORTS / "emulated" / "profile.json")
    slower = with_fits(slowed(cluster, 2.0))
    assert slower.collectives == cluster.collectives and slower.link_rate == cluster.link_rate
    assert step_s(with_fits(cluster), "dp4.mb2") * 1.02 < step_s(slower, "dp4.mb2") < step_s(cluster, "dp4.mb2") * 1.5


def test_no_factor_is_an_input_error(loopback: MachineProfile) -> None:
    with pytest.raises(InputError, match="above 0"):
        slowed(loopback, 0.0)
