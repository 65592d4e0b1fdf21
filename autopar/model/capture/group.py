"""From calls to operations: one per leaf module that computes, one per function elsewhere, one for the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from autopar.model.capture.records import Call, Kernel, Saved, Trace, Use

LOSS = "loss"


@dataclass(kw_only=True, slots=True)
class Group:
    """The calls that become one operation.

    Attributes:
        name: of the operation, unique.
        module: path of the module that made the calls.
        function: name of the function that computes, if it is one.
        calls: in order.
        backward: backward kernels of the calls, and of views of the result.
        saved: storages kept first here.
        accumulated: see Call.
        producers: groups whose results it reads, in order.
        output_bytes: of the results that others read.
    """

    name: str
    module: str
    function: str
    calls: list[Call]
    backward: list[Kernel] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    accumulated: int = 0
    producers: list[Group] = field(default_factory=list)
    output_bytes: int = 0

    @property
    def forward(self) -> list[Kernel]:
        """Forward kernels."""
        return [kernel for call in self.calls for kernel in call.forward]

    @property
    def reads(self) -> list[Use]:
        """Tensors that forward kernels read."""
        return [use for kernel in self.forward for use in kernel.reads]

    @property
    def writes(self) -> dict[int, int]:
        """Bytes written by storage."""
        written: dict[int, int] = {}
        for kernel in self.forward:
            for use in kernel.writes:
                written[use.storage] = max(use.num_bytes, written.get(use.storage, 0))
        return written

    @property
    def result(self) -> Use | None:
        """First tensor of the last call that computes."""
        return next((call.result for call in reversed(self.calls) if call.computes), None)

    @property
    def in_model(self) -> bool:
        """False for the loss."""
        return self.calls[0].in_model

    def take(self, call: Call) -> None:
        """Book backward work and kept tensors of a call here."""
        self.backward.extend(call.backward)
        self.saved.extend(call.saved)
        self.accumulated += call.accumulated


def group_calls(trace: Trace, root_name: str) -> list[Group]:
    """Operations in the order of the forward pass, with the flow of data between them.

    A view is no operation: the copy that its backward makes belongs to the producer of what it views.
    """
    groups: list[Group] = []
    names: defaultdict[str, int] = defaultdict(int)
    used: set[str] = set()
    producer: dict[int, Group] = {}
    homeless: list[Call] = []
    for calls, whole_leaf in _bundles(trace):
        computing = [call for call in calls if call.computes]
        if not computing:
            for call in calls:
                owner = producer.get(call.result.storage) if call.result else None
                if owner is not None:
                    owner.take(call)
                else:
                    homeless.append(call)
            continue
        name = _unique(_base_name(computing[0], whole_leaf, root_name), names, used)
        group = Group(name=name, module=calls[0].module, function=computing[0].function, calls=calls)
        for call in (*homeless, *calls):
            group.take(call)
        homeless.clear()
        for use in group.reads:
            source = producer.get(use.storage)
            if source is not None and source not in group.producers:
                group.producers.append(source)
        for storage in group.writes:
            producer[storage] = group
        groups.append(group)
    _set_outputs(groups)
    return groups


def _bundles(trace: Trace) -> Iterable[tuple[list[Call], bool]]:
    """Calls that belong together, and whether they are a whole leaf module.

    One run of a leaf module belongs together unless it holds several products; so does the loss.
    """
    bundles: dict[object, list[Call]] = {}
    for index, call in enumerate(trace.calls):
        key: object = index
        if not call.in_model:
            key = LOSS
        elif call.module in trace.leaves:
            key = (call.module, call.module_call)
        bundles.setdefault(key, []).append(call)
    for key, calls in bundles.items():
        products = sum(bool(call.flops or call.attention) for call in calls)
        if products > 1 and key != LOSS:
            yield from (([call], False) for call in calls)
        else:
            yield calls, isinstance(key, tuple)


def _base_name(call: Call, whole_leaf: bool, root_name: str) -> str:
    """Path of a leaf module; elsewhere the path and the function, or its kernel where it is only one."""
    if not call.in_model:
        return LOSS
    if whole_leaf:
        return call.module or root_name
    kernels = [kernel for kernel in call.forward if kernel.reads]
    function = kernels[0].name if len(kernels) == 1 else call.function
    if call.attention is not None:
        function = "sdpa"
    return f"{call.module}.{function}" if call.module else function


def _unique(base: str, names: defaultdict[str, int], used: set[str]) -> str:
    name = base
    while name in used:
        names[base] += 1
        name = f"{base}_{names[base]}"
    used.add(name)
    return name


def _set_outputs(groups: list[Group]) -> None:
    read_by: defaultdict[int, set[str]] = defaultdict(set)
    for group in groups:
        for use in group.reads:
            read_by[use.storage].add(group.name)
    for group in groups:
        used = sum(size for storage, size in group.writes.items() if read_by[storage] - {group.name})
        result = group.result
        group.output_bytes = used or (result.num_bytes if result else 0)
