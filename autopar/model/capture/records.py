"""What a trace holds: calls of torch functions, the kernels that they ran, and the tensors that these touched."""

from __future__ import annotations

from dataclasses import dataclass, field

from autopar.graph import AttentionShape, MatmulShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """A tensor as a kernel saw it.

    Attributes:
        storage: identity of its storage within the trace; views share it.
        shape: its dimensions.
        num_bytes: bytes that a pass over it moves (an expanded tensor moves its storage once).
        floating: it holds floating point or complex numbers.
    """

    storage: int
    shape: tuple[int, ...]
    num_bytes: int
    floating: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One dispatched operation that computes or moves data; views are not recorded.

    Attributes:
        name: the aten name without namespace, overload and surrounding underscores.
        reads, writes: distinct tensors.
        flops: of products and attention, 0 otherwise.
        product: shape, where it is one matrix product (a convolution as its im2col product).
    """

    name: str
    reads: tuple[Use, ...]
    writes: tuple[Use, ...]
    flops: int = 0
    product: MatmulShape | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes read and written."""
        return sum(use.num_bytes for use in self.reads + self.writes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A storage that autograd keeps for backward."""

    storage: int
    num_bytes: int
    floating: bool


@dataclass(kw_only=True, slots=True)
class Call:
    """One outermost call of a torch function, filled while the trace runs.

    Attributes:
        function: name of the function.
        module: path of the innermost module that runs; empty for the root.
        module_call: counts calls of modules, so that two calls of one module differ.
        in_model: False once the root module has returned: the loss.
        end: autograd sequence number after the call; a node below it (and not below an earlier call's) is the call's.
        forward, backward: kernels.
        saved: storages that no earlier call had autograd keep.
        result: its first tensor.
        attention: shape, where it is scaled dot product attention.
        accumulated: bytes moved by adding up the gradients of its result, if that is used more than once.
    """

    function: str
    module: str
    module_call: int
    in_model: bool
    end: int = 0
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    result: Use | None = None
    attention: AttentionShape | None = None
    accumulated: int = 0

    @property
    def computes(self) -> bool:
        """Whether it is more than views and constants."""
        return any(kernel.reads for kernel in self.forward)

    @property
    def flops(self) -> int:
        """Forward FLOPs."""
        return sum(kernel.flops for kernel in self.forward)


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedParameter:
    """A parameter of the traced module.

    Attributes:
        names: every path under which the module has it (tied parameters have several).
        shape: its dimensions.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A forward and backward pass.

    Attributes:
        calls: in the order of the forward pass.
        parameters: by storage, in the order of the module.
        inputs: storages of the arguments.
        accumulated: bytes moved by adding up gradients of parameters that are used more than once, by storage.
        leaves: paths of modules without children, with their class names.
        itemsize: bytes of an element of the activations.
    """

    calls: tuple[Call, ...]
    parameters: dict[int, TracedParameter]
    inputs: frozenset[int]
    accumulated: dict[int, int]
    leaves: dict[str, str]
    itemsize: int
