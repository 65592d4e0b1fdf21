"""Settings that tests of answers ask about."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autopar.estimate import Setting
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack


def _setting_of(model: str, cluster: str, batch: int, seq_len: int, stack: str = "megatron-core") -> Setting:
    workload = Workload(global_batch=batch, seq_len=seq_len)
    graph = build_graph(load_preset(model), seq_len=seq_len)
    return Setting(graph=graph, workload=workload, cluster=load_cluster(cluster), stack=load_stack(stack))


@pytest.fixture(scope="session")
def setting_of() -> Callable[..., Setting]:
    """A preset on a cluster: (model, cluster, global batch, sequence length, stack)."""
    return _setting_of
