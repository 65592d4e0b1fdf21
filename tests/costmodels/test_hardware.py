from __future__ import annotations

import numpy as np
import pytest

from costmodels.errors import InputError
from costmodels.hardware import device_names, fabric_names, group_span, load_cluster, load_device, load_fabric
from costmodels.stack import load_stack, stack_names
from costmodels.units import GB, GIB, TFLOPS


def test_shipped_devices_name_the_origin_of_their_numbers() -> None:
    nvidia = {"v100", "v100-dgx2", "a100-40g", "a100-80g", "a800", "h100", "h100-500w", "h800", "h200", "b200", "b300"}
    assert nvidia | {"gb200", "gb300", "mi300x", "cpu"} == set(device_names())
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


def test_a_device_like_another_differs_in_what_it_says() -> None:
    h100, h800, h200 = (load_cluster(f"{name}:2x8") for name in ("h100", "h800", "h200"))
    assert h800.device.matmul == h100.device.matmul
    assert h800.node_link.bandwidth == 200 * GB
    assert h800.node_link.efficiency == h100.node_link.efficiency
    assert h200.device.memory_bandwidth == 4800 * GB
    assert h200.device.origins["attention"] == h100.device.origins["attention"]
    gb300, gb200, b200 = (load_device(name) for name in ("gb300", "gb200", "b200"))
    assert gb300.peak("nvfp4") == pytest.approx(1.5 * gb200.peak("nvfp4"))
    assert gb200.attention_kernels == b200.attention_kernels
    ratio = gb300.attention.peak_fraction / b200.attention.peak_fraction
    assert 1.5 < ratio < 2.2  # twice the units for exponentials


def test_fabrics_take_the_bandwidth_of_the_cluster(tmp_path) -> None:
    assert {"infiniband", "roce", "omnipath", "efa", "ethernet"} == set(fabric_names())
    for name in fabric_names():
        link = load_fabric(name, 25e9)
        assert (link.bandwidth, link.pipelined) == (25e9, True)
        assert {"bandwidth", "latency", "efficiency", "slowdown"} <= set(link.origins)
    with pytest.raises(InputError, match="unknown fabric 'infini'; did you mean 'infiniband'"):
        load_fabric("infini", 1e9)
    path = tmp_path / "c.toml"
    path.write_text('device = "h100"\nnum_nodes = 3\nfabric = "efa"\n')
    assert load_cluster(str(path)).network_link == load_fabric("efa", 50e9)
    path.write_text('device = "cpu"\nnum_nodes = 3\nfabric = "ethernet"\n')
    with pytest.raises(InputError, match="fabric and fabric_GBps"):
        load_cluster(str(path))


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


def test_a_like_device_is_levelled_but_where_it_says_otherwise() -> None:
    gb300, gb200 = load_device("gb300"), load_device("gb200")
    level = gb300.matmul_rate("bf16").peak_fraction / gb200.matmul_rate("bf16").peak_fraction
    assert level > 1.05
    assert gb300.matmul_rate("mxfp8").peak_fraction == pytest.approx(level * gb200.matmul_rate("mxfp8").peak_fraction)
    assert gb300.matmul_rate("nvfp4").peak_fraction == gb200.matmul_rate("nvfp4").peak_fraction
