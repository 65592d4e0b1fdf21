"""What is given when plans are priced: model, workload, cluster, stack."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.graph import OpGraph
from autopar.workload import Workload
from costmodels.hardware import Cluster
from costmodels.memory import optimizer_bytes_per_parameter
from costmodels.stack import Stack


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Setting:
    """The question that every candidate plan answers. Compared by identity: what is priced under it is kept.

    Attributes:
        graph: the model at the workload's sequence length and precision.
        workload: batch, sequence, precision, optimizer.
        cluster: hardware.
        stack: training software.
    """

    graph: OpGraph
    workload: Workload
    cluster: Cluster
    stack: Stack

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return self.workload.precision.itemsize

    @property
    def gradient_bytes(self) -> float:
        """Bytes of a kept gradient element."""
        return 4.0 if self.weight_bytes == 4 else self.stack.data.gradient_bytes

    @property
    def reduce_bytes(self) -> float:
        """Bytes of a gradient element while it is reduced over data parallel ranks."""
        return 4.0 if self.weight_bytes == 4 else self.stack.data.reduce_bytes

    @property
    def gather_bytes(self) -> float:
        """Bytes of a weight element while it is gathered over data parallel ranks."""
        return self.stack.data.gather_bytes or self.weight_bytes

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state per weight."""
        data = self.stack.data
        return optimizer_bytes_per_parameter(
            self.workload.optimizer.value, self.weight_bytes, data.master_weights, master_bytes=data.master_bytes,
            moment_bytes=data.moment_bytes,
        )  # fmt: skip

    @property
    def collective_wait(self) -> float:
        """Seconds that each blocking collective waits for ranks that share processors."""
        return self.stack.overheads.get("collective.wait", 0.0) if self.cluster.sharing else 0.0
