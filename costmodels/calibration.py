"""A measured machine as the cost models see it: points to constants, each with its origin and its error.

Every fit minimises relative errors, predicted / measured - 1, since times span five orders of magnitude, and keeps
constants at or above zero, since a negative overhead predicts nonsense outside of the points.
"""

from __future__ import annotations

import dataclasses

from costmodels.fit_compute import fit_computes, fit_device, predict_points
from costmodels.fit_links import fit_communication, fit_curves, fit_link, fit_sharing
from costmodels.hardware import Cluster
from costmodels.profiles import (
    PROFILE_SCHEMA,
    CollectivePoint,
    ComputePoint,
    Fit,
    MachineProfile,
    SharingPoint,
    read_profile,
    stream_bytes,
    write_profile,
)

__all__ = [
    "PROFILE_SCHEMA",
    "CollectivePoint",
    "ComputePoint",
    "Fit",
    "MachineProfile",
    "SharingPoint",
    "fit_device",
    "fit_profile",
    "fit_sharing",
    "predict_points",
    "profile_cluster",
    "read_profile",
    "residuals",
    "stream_bytes",
    "with_fits",
    "write_profile",
]


def fit_profile(profile: MachineProfile) -> tuple[Fit, ...]:
    """Fit everything that the profile has points for, one Fit per formula.

    Raises:
        InputError: a profile without points of forward products, attention or elementwise operations.
    """
    return fit_computes(fit_device(profile), profile) + fit_communication(profile)


def with_fits(profile: MachineProfile) -> MachineProfile:
    """The profile with ``fits`` computed from its points."""
    return dataclasses.replace(profile, fits=fit_profile(profile))


def residuals(profile: MachineProfile) -> dict[str, tuple[float, float]]:
    """(median, worst) relative error of each formula on the points that it was fitted on, by name of the fit."""
    return {fit.name: (fit.median_error, fit.worst_error) for fit in fit_profile(profile)}


def profile_cluster(profile: MachineProfile) -> Cluster:
    """The measured machine as a Cluster that estimates can use.

    One machine: measured curves, and on CPUs every byte is moved by the processors that compute. An emulated cluster:
    one rate, no curves, all nodes sharing this machine's processors.

    Raises:
        InputError: as fit_device.
    """
    on_cpu, one_machine = profile.device == "cpu", profile.num_nodes == 1 or profile.link_rate is not None
    node_link = fit_link(profile, across_nodes=False)
    return Cluster(
        name=f"{profile.device_name}, measured",
        device=fit_device(profile),
        num_nodes=profile.num_nodes,
        devices_per_node=profile.ranks_per_node,
        node_link=node_link,
        network_link=fit_link(profile, across_nodes=True) if profile.num_nodes > 1 else node_link,
        curves=fit_curves(profile),
        sharing=fit_sharing(profile),
        ranks_per_machine=profile.ranks if one_machine else profile.ranks_per_node,
        link_uses_host=on_cpu and profile.num_nodes == 1,
    )
