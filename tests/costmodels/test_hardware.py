from __future__ import annotations

import numpy as np
import pytest

from costmodels.errors import InputError
from costmodels.hardware import device_names, group_span, load_cluster, load_device
from costmodels.stack import load_stack, stack_names
from costmodels.units import GB, GIB, TFLOPS


def test_shipped_devices_name_the_origin_of_their_numbers() -> None:
    assert {"v100", "a100-40g", "a100-80g", "h100", "h200", "b200", "cpu"} <= set(device_names())
    for name in device_names():
        device = load_device(name)
        assert {"peak_flops", "memory", "matmul", "attention", "bandwidth_fraction"} <= set(device.origins)
        cluster = load_cluster(f"{name}:2x4")
        for link in (cluster.node_link, cluster.network_link):
            assert {"bandwidth", "latency"} <= set(link.origins)


def test_datasheet_numbers() -> None:
    h100 = load_device("h100")
    assert h100.peak("bf16") == pytest.approx(989.4 * TFLOPS)
    assert h100.memory_bandwidth == 3350 * GB
    assert load_device("a100-40g").memory_bytes == 40 * GIB
    assert load_cluster("h100:8x8").world_size == 64
    assert load_cluster("a100-80g:16").num_nodes == 1


def test_v100_has_no_bf16() -> None:
    with pytest.raises(InputError, match="v100 has no bf16"):
        load_device("v100").peak("bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10:8x8", "unknown device 'h10'; did you mean 'h100'"),
        ("h100", "not DEVICE:NODESxDEVICES"),
        ("h100:0x8", "not DEVICE:NODESxDEVICES"),
        ("h100:8x8x8", "not DEVICE:NODESxDEVICES"),
        ("missing.toml", "no such file"),
    ],
)
def test_wrong_clusters(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_cluster(text)


def test_cluster_file(tmp_path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'device = "h100"\nnum_nodes = 3\nmemory_GiB = 96\n'
        '[network_link]\nname = "RoCE"\nbandwidth_GBps = 25\nlatency_us = 12\n'
    )
    cluster = load_cluster(str(path))
    assert (cluster.world_size, cluster.device.memory_bytes, cluster.network_link.bandwidth) == (24, 96 * GIB, 25e9)
    path.write_text('device = "h100"\nnum_nodes = 3\nnetwork = 1\n')
    with pytest.raises(InputError, match="unknown key 'network'; did you mean 'network_link'"):
        load_cluster(str(path))


def test_group_span() -> None:
    local, nodes = group_span(np.array([8, 16, 8, 4, 2]), np.array([1, 1, 8, 4, 2]), 8)
    assert local.tolist() == [8, 8, 1, 2, 2]
    assert nodes.tolist() == [1, 2, 8, 2, 1]


def test_stacks_load() -> None:
    assert {"megatron-core", "torchtitan", "autopar-gloo", "autopar-nccl"} <= set(stack_names())
    with pytest.raises(InputError, match="unknown stack 'megatron'; did you mean 'megatron-core'"):
        load_stack("megatron")
