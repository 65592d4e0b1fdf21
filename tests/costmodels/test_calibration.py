"""Fits recover known constants, predict what they have not seen, and never turn negative."""

import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from costmodels.calibration import (
    CollectivePoint,
    ComputePoint,
    MachineProfile,
    SharingPoint,
    fit_device,
    fit_profile,
    predict_points,
    profile_cluster,
    read_profile,
    residuals,
    stream_bytes,
    with_fits,
    write_profile,
)
from costmodels.collectives import collective_seconds, link_seconds
from costmodels.compute import attention_seconds, matmul_seconds, stream_seconds
from costmodels.errors import InputError
from costmodels.fitting import nonnegative_fit, weighted_median
from costmodels.hardware import AttentionRate, Device, Link, MatmulRate
from costmodels.stack import load_stack

TRUE = Device(
    name="known",
    peak_flops={"fp32": 80e9},
    memory_bytes=8e9,
    memory_bandwidth=20e9,
    matmul=MatmulRate(peak_fraction=0.9, m_half=20.0, n_half=5.0, k_half=11.0),
    matmul_backward=MatmulRate(peak_fraction=0.8, m_half=40.0, n_half=7.0, k_half=3.0),
    attention=AttentionRate(peak_fraction=0.5, len_half=70.0),
    attention_backward=AttentionRate(peak_fraction=0.4, len_half=30.0),
    bandwidth_fraction={
        "normalization": 0.7, "normalization.backward": 0.5, "activation": 0.4, "activation.backward": 0.3,
        "elementwise": 1.2, "embedding": 0.8, "embedding.backward": 0.9, "loss": 0.6, "loss.backward": 0.7,
        "optimizer": 1.1, "default": 1.2,
    },
    op_overhead=5e-6,
)  # fmt: skip
SIZES = (96, 224, 416, 1056, 2080)
HELD_OUT = (128, 320, 768, 1536)


def matmul_points(sizes: tuple[int, ...], noise: float = 0.0, seed: int = 0) -> list[ComputePoint]:
    random = np.random.default_rng(seed)
    points = []
    for m, n, k in product(sizes, repeat=3):
        for phase in ("forward", "backward"):
            seconds = float(matmul_seconds(TRUE, "fp32", m, n, k, backward=phase == "backward"))
            points.append(
                ComputePoint(
                    kind="matmul", phase=phase, dims={"m": m, "n": n, "k": k}, num_bytes=0.0, spread=0.0,
                    flops=(4.0 if phase == "backward" else 2.0) * m * n * k,
                    seconds=seconds * float(np.exp(noise * random.standard_normal())),
                )
            )  # fmt: skip
    return points


def attention_points(sizes: tuple[int, ...]) -> list[ComputePoint]:
    points = []
    for seq, head_size in product(sizes, (32, 64)):
        for phase in ("forward", "backward"):
            backward = phase == "backward"
            seconds = attention_seconds(
                TRUE, "fp32", batch=2, heads=4, query_len=seq, key_len=seq, head_size=head_size, causal=True,
                backward=backward,
            )  # fmt: skip
            flops = 4.0 * 2 * 4 * seq * seq * head_size / 2 * (2.5 if backward else 1.0)
            dims = {"batch": 2, "heads": 4, "seq": seq, "head_size": head_size}
            points.append(
                ComputePoint(
                    kind="attention", phase=phase, dims=dims, flops=flops, num_bytes=0.0, seconds=float(seconds),
                    spread=0.0,
                )
            )  # fmt: skip
    return points


def stream_points() -> list[ComputePoint]:
    points = []
    for kind in ("normalization", "activation", "elementwise", "embedding", "loss", "optimizer"):
        for tokens in (1, 600, 5000):
            dims = {"tokens": tokens, "width": 512, "vocab": 512, "parameters": tokens * 512}
            for phase in ("forward", "backward"):
                num_bytes = stream_bytes(kind, phase, dims, 4)
                if num_bytes and not (kind == "optimizer" and phase == "backward"):
                    seconds = float(stream_seconds(TRUE, num_bytes, kind, backward=phase == "backward"))
                    if tokens == 1 and phase == "forward":
                        seconds = TRUE.op_overhead
                    points.append(
                        ComputePoint(
                            kind=kind, phase=phase, dims=dims, flops=0.0, num_bytes=num_bytes, seconds=seconds,
                            spread=0.0,
                        )
                    )  # fmt: skip
    return points


def make_profile(**changes: object) -> MachineProfile:
    fields: dict[str, object] = {
        "device_name": "known", "device": "cpu", "backend": "gloo", "precision": "fp32", "ranks": 4, "num_nodes": 1,
        "cores": 2, "memory_bytes": 8e9, "versions": {"torch": "2"}, "date": "2025-01-01T00:00:00+00:00",
        "peaks": {"flops": 80e9, "memory_bandwidth": 20e9},
        "compute": (*matmul_points(SIZES), *attention_points(SIZES), *stream_points()),
    }  # fmt: skip
    return MachineProfile(**{**fields, **changes})  # type: ignore[arg-type]


def link_points(link: Link, *, num_nodes: int = 1, sizes: tuple[float, ...] = (65536.0, 2.0**20, 2.0**23)) -> tuple[
    CollectivePoint, ...
]:  # fmt: skip
    algorithms = load_stack("autopar-gloo").algorithms
    points = []
    for kind, count, size in product(("all_reduce", "all_gather", "reduce_scatter", "send"), (2, 4), sizes):
        if kind != "send" or count == 2:
            seconds = float(link_seconds(kind, count, size, link, algorithms))
            points.append(
                CollectivePoint(
                    kind=kind, group_size=count, num_bytes=size, seconds=seconds, spread=0.0,
                    num_nodes=count if num_nodes > 1 else 1,
                )
            )  # fmt: skip
    return tuple(points)


def test_fit_recovers_a_known_device() -> None:
    device = fit_device(make_profile())
    for name in ("matmul", "matmul_backward", "attention", "attention_backward"):
        found, expected = getattr(device, name), getattr(TRUE, name)
        for field in dataclasses.fields(expected):
            wanted = getattr(expected, field.name)
            assert getattr(found, field.name) == (wanted and pytest.approx(wanted, rel=1e-6)), (name, field)
    assert device.op_overhead == pytest.approx(TRUE.op_overhead)
    assert device.bandwidth_fraction == pytest.approx(dict(TRUE.bandwidth_fraction))
    assert device.peak_flops == {"fp32": 80e9}


def test_exact_points_leave_no_residual_but_small_backward_ones() -> None:
    for name, (median, worst) in residuals(make_profile()).items():
        assert median < 1e-6, name
        if name in ("matmul", "matmul.backward", "attention"):
            assert worst < 1e-6, name


def test_constants_fitted_on_some_sizes_predict_others() -> None:
    points = matmul_points(SIZES, noise=0.08)
    device = fit_device(make_profile(compute=(*points, *attention_points(SIZES), *stream_points())))
    held_out = matmul_points(HELD_OUT)
    errors = np.abs(predict_points(device, "fp32", held_out) / [p.seconds for p in held_out] - 1)
    assert np.median(errors) < 0.02 and errors.max() < 0.08
    flat = dataclasses.replace(device, matmul=MatmulRate(peak_fraction=0.9), matmul_backward=None)
    control = np.abs(predict_points(flat, "fp32", held_out) / [p.seconds for p in held_out] - 1)
    assert np.median(control) > 0.1, "a constant efficiency does not describe these points: the test can fail"


def test_constants_stay_at_or_above_zero() -> None:
    """Points that get faster as they get smaller would want a negative half size."""
    points = [
        dataclasses.replace(point, seconds=point.flops / 80e9 * (1.5 - 40 / point.dims["m"]))
        for point in matmul_points(SIZES)
    ]
    rate = fit_device(make_profile(compute=(*points, *attention_points(SIZES), *stream_points()))).matmul
    assert rate.peak_fraction > 0 and rate.m_half == 0.0 and rate.n_half >= 0 and rate.k_half >= 0


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_fit_beats_every_other_point(seed: int) -> None:
    random = np.random.default_rng(seed)
    columns = random.random((12, 4))
    target = columns @ np.array([1.5, *random.uniform(-0.6, 0.6, 3)]) + 0.1 * random.standard_normal(12)
    scale = random.random(12) + 0.5
    best = nonnegative_fit(columns, target, scale)
    assert best[0] > 0 and (best >= 0).all()

    def error(x: np.ndarray) -> float:
        return float(np.sum(((columns @ x - target) / scale) ** 2))

    steps = random.standard_normal((500, 4)) * random.choice([0.01, 0.1, 1.0], (500, 1))
    assert all(error(best) <= error(np.maximum(best + step, 0.0)) + 1e-9 for step in steps)


def test_weighted_median_minimises_absolute_errors() -> None:
    random = np.random.default_rng(3)
    values, weights = random.standard_normal(31), random.random(31)
    best = weighted_median(values, weights)
    assert all((weights * abs(values - best)).sum() <= (weights * abs(values - x)).sum() + 1e-12 for x in values)


def test_every_fitted_constant_says_where_it_is_from() -> None:
    profile = with_fits(make_profile(collectives=link_points(Link(name="x", bandwidth=1e9, latency=1e-4))))
    for fit in profile.fits:
        assert "measured here" in fit.origin and f"{fit.num_points} points" in fit.origin and "residual" in fit.origin
    origins = profile_cluster(profile).device.origins
    assert "measured here, 125 points" in origins["matmul"]
    assert "measured here" in origins["bandwidth_fraction.normalization.backward"]


def test_loopback_has_curves_that_pass_through_the_points() -> None:
    points = link_points(Link(name="x", bandwidth=1e9, latency=1e-4))
    noisy = tuple(
        dataclasses.replace(p, seconds=p.seconds * 3) if (p.kind, p.num_bytes) == ("send", 65536.0) else p
        for p in points
    )
    cluster = profile_cluster(make_profile(collectives=noisy))
    assert cluster.link_uses_host and cluster.num_nodes == 1 and cluster.devices_per_node == 4
    for point in points:
        if point.kind != "send":
            seconds = collective_seconds(cluster, point.kind, point.group_size, 1, point.num_bytes)
            assert float(seconds) == pytest.approx(point.seconds)
    assert all(np.all(np.diff(curve.seconds) >= 0) for curve in cluster.curves)


def test_link_of_one_machine_is_recovered() -> None:
    cluster = profile_cluster(make_profile(collectives=link_points(Link(name="x", bandwidth=1.5e9, latency=2e-4))))
    assert cluster.node_link.speed == pytest.approx(1.5e9)
    assert cluster.node_link.latency == pytest.approx(2e-4)


def test_emulated_cluster_keeps_the_given_rate_and_fits_the_latency() -> None:
    true = Link(name="x", bandwidth=25e6, latency=3e-4, efficiency=0.99)
    points = list(link_points(true, num_nodes=4))
    points[0] = dataclasses.replace(points[0], seconds=points[0].seconds * 2)
    profile = make_profile(num_nodes=4, collectives=tuple(points), link_rate=25e6, link_efficiency=0.99)
    cluster = profile_cluster(profile)
    link = cluster.network_link
    assert (link.bandwidth, link.efficiency) == (25e6, 0.99)
    assert link.latency == pytest.approx(3e-4), "one point twice too slow does not move a median"
    assert "given" in link.origins["bandwidth"] and "measured here" in link.origins["latency"]
    assert not cluster.curves and not cluster.link_uses_host
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.ranks_per_machine) == (4, 1, 4)
    assert residuals(profile)["network_link.all_gather"][1] < 1e-9


def test_two_ranks_of_an_emulated_node_share_its_rate() -> None:
    true = Link(name="x", bandwidth=12.5e6, latency=3e-4)
    points = [p for p in link_points(true, num_nodes=2) if p.group_size == 2]
    cluster = profile_cluster(make_profile(num_nodes=2, collectives=tuple(points), link_rate=25e6))
    assert (cluster.devices_per_node, cluster.network_link.bandwidth) == (2, 12.5e6)
    assert cluster.network_link.latency == pytest.approx(3e-4)


def test_sharing_is_monotone_and_fills_gaps() -> None:
    points = (
        SharingPoint(active=1, slowdown=1.0),
        SharingPoint(active=2, slowdown=0.98),
        SharingPoint(active=4, slowdown=2.0),
    )
    cluster = profile_cluster(make_profile(sharing=points))
    assert cluster.sharing == pytest.approx((1.0, 1.0, 1.49, 2.0))
    assert cluster.slowdown(8) == pytest.approx(4.0)


def test_profile_survives_its_file(tmp_path: Path) -> None:
    profile = with_fits(make_profile(collectives=link_points(Link(name="x", bandwidth=1e9, latency=1e-4))))
    path = tmp_path / "profile.json"
    write_profile(path, profile)
    assert read_profile(path) == profile
    assert fit_profile(read_profile(path)) == profile.fits


def test_unusable_files_are_input_errors(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, make_profile())
    text = path.read_text()
    for broken, message in (
        (text[: len(text) // 2], "torn"),
        (text.replace('"schema_version": 1', '"schema_version": 99'), "schema_version"),
        (text.replace('"kind": "matmul"', '"kind": "matmull"', 1), "matmull"),
        (text.replace('"ranks": 4', '"rank": 4'), "rank"),
        (text.replace('"num_nodes": 1', '"num_nodes": 3'), "nodes must divide"),
    ):
        path.write_text(broken)
        with pytest.raises(InputError, match=message):
            read_profile(path)
    with pytest.raises(InputError, match="no such file"):
        read_profile(tmp_path / "missing.json")


def test_a_profile_without_products_is_refused() -> None:
    with pytest.raises(InputError, match="no matmul points"):
        fit_device(make_profile(compute=tuple(stream_points())))


def test_bytes_follow_the_graphs_convention() -> None:
    dims = {"tokens": 10, "width": 7, "vocab": 100, "parameters": 50}
    table = {
        ("normalization", "forward"): 2 * 70, ("normalization", "backward"): 3 * 70,
        ("activation", "forward"): 2 * 70, ("activation", "backward"): 3 * 70,
        ("elementwise", "forward"): 3 * 70, ("elementwise", "backward"): 0,
        ("embedding", "forward"): 2 * 70, ("embedding", "backward"): 2 * 70 + 700,
        ("loss", "forward"): 3 * 1000, ("loss", "backward"): 3 * 1000, ("optimizer", "forward"): 7 * 50,
    }  # fmt: skip
    for (kind, phase), elements in table.items():
        assert stream_bytes(kind, phase, dims, 4) == 4 * elements
        assert stream_bytes(kind, phase, dims, 2) == 2 * elements
