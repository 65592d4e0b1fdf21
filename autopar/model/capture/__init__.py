"""Capture any ``nn.Module`` as an OpGraph, by tracing one forward and backward pass on fake tensors.

The only part of planning that imports torch. A captured transformer equals, operation by operation, the graph that
``autopar.model.build`` makes from its numbers. Traced on the CPU, kernels are those that the CPU has: RMSNorm, for
one, is about ten elementwise kernels there and one on a GPU, so its traffic and what it keeps come out larger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from autopar.errors import InputError
from autopar.graph import Op, OpGraph, OpKind, Parameter, SavedTensor, Split, check_graph
from autopar.model.capture.blocks import block_indices, find_blocks
from autopar.model.capture.group import Group, group_calls
from autopar.model.capture.ops import LOG_SOFTMAX, kept_name, kind_of, parameters_of, shape_of, traffic
from autopar.model.capture.records import Trace
from autopar.model.capture.splits import Division, divide, planned_styles
from autopar.model.capture.trace import trace

__all__ = ["capture"]
