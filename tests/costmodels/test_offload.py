from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.errors import InputError
from costmodels.hardware import device_names, load_device
from costmodels.offload import (
    LINK_SHARE,
    Host,
    device_bytes_saved,
    host_bytes,
    offloaded_step,
)

MEGATRON = {"gradient_bytes": 4.0, "weight_bytes": 2.0, "moved_bytes": 2 * 12 + 4 + 2.0}
DGX2 = Host(memory_bytes=1.5e12, link_bandwidth=15.75e9, memory_bandwidth=256e9)
HOSTS = st.builds(
    Host, memory_bytes=st.just(1e12), link_bandwidth=st.floats(1e9, 5e11), memory_bandwidth=st.floats(1e9, 1e12)
)


def host_of(name: str) -> Host:
    host = load_device(name).host
    assert host is not None
    return host


def test_parts_are_bytes_over_bandwidth() -> None:
    host = Host(memory_bytes=1e12, link_bandwidth=100e9 / LINK_SHARE, memory_bandwidth=400e9)
    step = offloaded_step(host, 1e9, **MEGATRON)
    assert step.down == pytest.approx(0.04)
    assert step.up == pytest.approx(0.02)
    assert step.update == pytest.approx(30 / 200)
    assert step.seconds() == pytest.approx(0.04 + 0.02 + 0.15)


@given(HOSTS, st.floats(1e6, 1e11), st.integers(1, 1000))
def test_buckets_lead_from_the_sum_to_the_longest_part(host: Host, weights: float, buckets: int) -> None:
    step = offloaded_step(host, weights, **MEGATRON)
    parts = (float(step.down), float(step.update), float(step.up))
    found = step.seconds(buckets)
    assert max(parts) * (1 - 1e-12) <= found <= sum(parts) * (1 + 1e-12)
    assert step.seconds(1) == pytest.approx(sum(parts))
    assert step.seconds(10**9) == pytest.approx(max(parts), rel=1e-6)
    assert step.seconds(buckets + 1) <= found * (1 + 1e-12)


@given(st.integers(1, 12), st.tuples(*3 * [st.integers(1, 9)]))
def test_buckets_equal_a_simulated_pipeline(buckets: int, parts: tuple[int, int, int]) -> None:
    """Three resources, each bucket through all of them in order."""
    free = [0.0, 0.0, 0.0]
    for _ in range(buckets):
        ready = 0.0
        for resource, seconds in enumerate(parts):
            free[resource] = ready = max(free[resource], ready) + seconds / buckets
    step = dataclasses.replace(offloaded_step(DGX2, 1.0, **MEGATRON), down=parts[0], update=parts[1], up=parts[2])
    assert step.seconds(buckets) == pytest.approx(free[2])


@pytest.mark.parametrize(("billions", "published"), [(1, 0.22), (10, 2.57)])
def test_update_is_near_the_published_cpu_adam(billions: float, published: float) -> None:
    """Ren et al. 2021, table 4, one process on a whole DGX-2; gradients in fp32, weights out in fp16."""
    assert float(offloaded_step(DGX2, billions * 1e9, **MEGATRON).update) == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize(("billions", "published"), [(0.596, 0.926), (106 / 32, 9.6)])
def test_reported_steps_of_megatron_core_are_slower_but_of_that_size(billions: float, published: float) -> None:
    """NeMo-RL's Qwen3 0.6B on one H100, 1.678 s with and 0.752 s without; GLM-4.5-Air on 32 H100 under a profiler."""
    predicted = float(offloaded_step(host_of("h100"), billions * 1e9, **MEGATRON).seconds())
    assert published / 4 < predicted < published


def test_faster_hosts_and_fewer_weights_take_less_time() -> None:
    names = ["v100-dgx2", "v100", "a100-80g", "h100", "gb200"]
    seconds = [offloaded_step(host_of(name), 1e9, **MEGATRON).seconds() for name in names]
    assert seconds == sorted(seconds, reverse=True)
    shards = offloaded_step(host_of("h100"), 1e10 / np.array([1, 2, 4, 8]), **MEGATRON).seconds()
    assert np.allclose(shards, shards[0] / np.array([1, 2, 4, 8]))


def test_an_offloaded_update_is_far_slower_than_on_the_device() -> None:
    for name in ("a100-80g", "h100", "b200"):
        on_device = MEGATRON["moved_bytes"] * 1e9 / load_device(name).stream_bandwidth("optimizer")
        assert offloaded_step(host_of(name), 1e9, **MEGATRON).seconds() > 20 * on_device


def test_bytes() -> None:
    weights = np.array([1e9, 2e9])
    assert device_bytes_saved(weights, 12).tolist() == [12e9, 24e9]
    held = host_bytes(weights, state_bytes=12, gradient_bytes=4, weight_bytes=2)
    assert held.tolist() == [18e9, 36e9]
    # A GPT of 13 billion weights on one V100 (Ren et al. 2021): 16 bytes per weight on the host, 2 on the device.
    assert host_bytes(13e9, state_bytes=12, gradient_bytes=2, weight_bytes=2) == 16 * 13e9
    assert host_bytes(13e9, state_bytes=12, gradient_bytes=2, weight_bytes=2) < DGX2.memory_bytes


def test_shipped_hosts() -> None:
    assert load_device("cpu").host is None
    for name in set(device_names()) - {"cpu"}:
        device = load_device(name)
        assert device.host is not None
        assert "host" in device.origins
        # Host memory feeds every device's link at once, and is larger than a device's own but for B300 and GB300.
        assert LINK_SHARE * device.host.link_bandwidth < device.host.memory_bandwidth
        assert device.host.memory_bytes > device.memory_bytes or name in ("b300", "gb300")
    assert host_of("h200") == host_of("h800") == host_of("h100")
    assert host_of("a100-40g").memory_bytes == pytest.approx(host_of("a100-80g").memory_bytes / 2, rel=1e-3)
    assert host_of("gb200") == host_of("gb300")


def test_a_host_without_numbers_is_an_error() -> None:
    with pytest.raises(InputError, match="link_bandwidth is 0"):
        Host(memory_bytes=1e12, link_bandwidth=0.0, memory_bandwidth=1e11)
