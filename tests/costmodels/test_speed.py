"""A machine that takes longer: all that its processors compute takes longer by as much, collectives do not."""

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


def step_s(profile: MachineProfile, slug: str, ranks: int = 4) -> float:
    return estimate(measured_setting(load_preset("demo-gpt"), WORKLOAD, profile, ranks), parse_slug(slug)).step_s


@pytest.fixture(scope="module")
def loopback() -> MachineProfile:
    return read_profile(REPORTS / "demo" / "profile.json")


def test_slowness_is_the_ratio_of_medians(loopback: MachineProfile) -> None:
    known = dataclasses.replace(loopback, yardstick_s=0.1)
    assert slowness(known, (0.3, 0.15, 0.05)) == pytest.approx(1.5)
    assert slowness(known, ()) is None
    assert slowness(dataclasses.replace(loopback, yardstick_s=0.0), (0.1,)) is None
    assert slowed(known, 1.5).yardstick_s == pytest.approx(0.15)


def test_a_process_alone_takes_longer_by_the_factor(loopback: MachineProfile) -> None:
    slower = with_fits(slowed(loopback, 1.5))
    assert step_s(slower, "mb8", 1) == pytest.approx(1.5 * step_s(with_fits(loopback), "mb8", 1), rel=1e-3)


@pytest.mark.parametrize("folder", ["demo", "runs/emulated"])
def test_collectives_keep_their_speed(folder: str) -> None:
    """Control of the former: where communication takes its share, the step does not grow by the whole factor."""
    profile = read_profile(REPORTS / folder / "profile.json")
    slower = with_fits(slowed(profile, 2.0))
    assert slower.collectives == profile.collectives and slower.link_rate == profile.link_rate
    assert step_s(with_fits(profile), "tp4.mb8") * 1.02 < step_s(slower, "tp4.mb8") < step_s(profile, "tp4.mb8") * 1.9


def test_no_factor_is_an_input_error(loopback: MachineProfile) -> None:
    with pytest.raises(InputError, match="above 0"):
        slowed(loopback, 0.0)
