"""Trace one forward and backward pass of a module on fake tensors: nothing is allocated, the module is not touched.

Torch functions delimit calls, dispatched operations are the kernels inside them. A backward kernel belongs to the
call whose autograd node runs it: nodes carry sequence numbers that grow with the forward pass.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import InputError
from autopar.graph import AttentionShape
from autopar.model.capture.fake import fake_state, fake_values
from autopar.model.capture.gradients import backward_roots, gradient_sums
from autopar.model.capture.kernels import Storages, attention_shape, is_attention, read_kernel, tensors
from autopar.model.capture.records import Call, Saved, Trace

# Functions that are whole modules: their kernels count one by one.
COMPOSITES = (F.multi_head_attention_forward,)
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
ACCUMULATE_GRAD = "torch::autograd::AccumulateGrad"


class _Recorder:
    """State of one trace."""

    def __init__(self, module: nn.Module) -> None:
        self.storages = Storages()
        self.paths = {id(child): path for path, child in module.named_modules()}
        self.classes = {path: type(child).__name__ for path, child in module.named_modules()}
        self.stack: list[tuple[str, int]] = []
        self.calls: list[Call] = []
        self.current: Call | None = None
        self.composite = False
        self.ends: list[int] = []
        self.saved: set[int] = set()
        self.in_model = True
        self.in_backward = False
        self.accumulating: Any = None
        self.last_kernel = ""
        self._module_calls = 0

    def enter_module(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(id(module), self.stack[-1][0] if self.stack else "")
        self._module_calls += 1
        self.stack.append((path, self._module_calls))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def open_call(self, function: str) -> Call:
        path, module_call = self.stack[-1] if self.stack else ("", 0)
        return Call(function=function, module=path, module_call=module_call, in_model=self.in_model)

    def close_call(self, call: Call, result: Any) -> None:
        """Keep a call that ran kernels or left autograd nodes."""
        call.end = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        start = self.calls[-1].end if self.calls else 0
        if not (call.forward or call.saved or call.end > start):
            return
        first = next(tensors(result), None)
        call.result = None if first is None else self.storages.use(first)
        self.calls.append(call)

    def call_function(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.current is not None or self.in_backward:
            return func(*args, **kwargs)
        if func in COMPOSITES:
            self.composite = True
            result = func(*args, **kwargs)
            self.composite = False
            return result
        call = self.current = self.open_call(getattr(func, "__name__", "function").strip("_"))
        if func is F.scaled_dot_product_attention:
            call.attention = _attention_of(SDPA_ARGUMENTS, args, kwargs)
        result = func(*args, **kwargs)
        self.current = None
        self.close_call(call, result)
        return result

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        self.last_kernel = func._overloadpacket.__name__
        out = func(*args, **kwargs)
        kernel = read_kernel(func, args, kwargs, out, self.storages)
        if kernel is None:
            return out
        if self.in_backward:
            call = self._backward_call()
            if call is not None:
                call.backward.append(kernel)
        elif self.current is not None:
            self.current.forward.append(kernel)
        else:
            call = self.open_call(kernel.name)
            call.forward.append(kernel)
            if is_attention(kernel.name):
                call.attention = _attention_of([a.name for a in func._schema.arguments], args, kwargs)
            self.close_call(call, out)
        return out

    def _backward_call(self) -> Call | None:
        """The call whose node runs. Sums of gradients that several users of a tensor send are counted elsewhere."""
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is None or node.name() == ACCUMULATE_GRAD:
            return None
        if self.accumulating is not None:
            if node == self.accumulating:
                return None
            self.accumulating = None
        return self.call_of(node)

    def call_of(self, node: Any) -> Call | None:
        index = bisect.bisect_right(self.ends, node._sequence_nr())
        return self.calls[index] if index < len(self.calls) else None

    def start_backward(self, roots: list[Tensor]) -> dict[int, int]:
        """Book sums of gradients on the calls that made the tensors; return those of parameters by storage.

        A hook on each sender tells the kernel that adds its gradient, which runs under that node, from the node's own.
        """
        self.in_backward = True
        self.ends = [call.end for call in self.calls]
        of_parameters: dict[int, int] = {}
        for found in gradient_sums(roots):
            for sender in found.senders:
                sender.register_hook(self._mark(sender))
            call = self.call_of(found.node)
            if found.parameter is not None:
                of_parameters[self.storages.number(found.parameter)] = found.num_bytes
            elif call is not None:
                call.accumulated += found.num_bytes
        return of_parameters

    def _mark(self, node: Any) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.accumulating = node

        return hook

    def pack(self, tensor: Tensor) -> Tensor:
        """Record that autograd keeps a tensor."""
        storage = self.storages.number(tensor)
        if storage not in self.saved and not self.in_backward:
            self.saved.add(storage)
            kept = Saved(
                storage=storage,
                num_bytes=tensor.untyped_storage().nbytes(),
                floating=tensor.is_floating_point() or tensor.is_complex(),
            )
            call = self.current or (self.calls[-1] if self.calls else None)
            if call is not None:
                call.saved.append(kept)
        return tensor

    def where(self) -> str:
        """The module that runs, for messages."""
        if self.in_backward:
            return "the backward pass"
        if not self.in_model:
            return "the loss"
        path = self.stack[-1][0] if self.stack else ""
        name = self.classes[path]
        return f"module '{path}' ({name})" if path else f"module {name}"


def _attention_of(names: Sequence[str], args: Any, kwargs: Any) -> AttentionShape | None:
    """Shape of attention from the arguments of the function or of a fused kernel."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return attention_shape(given["query"], given["key"], causal=bool(given.get("is_causal", False)))


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.call_function(func, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.dispatch(func, args, kwargs or {})


@contextmanager
def _module_hooks(recorder: _Recorder) -> Iterator[None]:
    entry = register_module_forward_pre_hook(recorder.enter_module)
    leave = register_module_forward_hook(recorder.leave_module)
    try:
        yield
    finally:
        entry.remove()
        leave.remove()


@contextmanager
def _as_input_error(recorder: _Recorder) -> Iterator[None]:
    """Turn what the user's model raises into one message; the original stays its cause.

    torch logs the traceback of a shape mismatch as well; it is kept quiet, since the message says the same.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    quiet = logger.disabled
    logger.disabled = True
    try:
        yield
    except InputError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InputError(
            f"capture: {recorder.where()} needs the values of a tensor ({error.func}), but only shapes are known: "
            "replace the branch or the index by a computation on whole tensors (torch.where, a mask)"
        ) from error
    except Exception as error:
        raise InputError(
            f"capture: {recorder.where()} failed at '{recorder.last_kernel}': {type(error).__name__}: {error}"
        ) from error
    finally:
        logger.disabled = quiet


def trace(module: nn.Module, inputs: tuple[Any, ...], loss_fn: Callable[..., Any] | None, targets: Any) -> Trace:
    """Trace ``loss_fn(module(*inputs), targets)`` and its backward, or the module alone without a loss.

    Raises:
        InputError: the model needs values, not only shapes, or fails on these inputs.
    """
    recorder = _Recorder(module)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        state, parameters = fake_state(module, recorder.storages)
        device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
        fake_inputs, fake_targets = fake_values((inputs, targets), device)
    recorder.saved.update(recorder.storages.number(tensor) for tensor in state.values())
    input_storages = frozenset(recorder.storages.number(tensor) for tensor in tensors(fake_inputs))
    with fake_mode, torch.enable_grad(), _Kernels(recorder):
        with (
            _module_hooks(recorder),
            torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor),
            _Functions(recorder),
            _as_input_error(recorder),
        ):
            output = functional_call(module, state, fake_inputs, strict=True)
            recorder.in_model = False
            if loss_fn is not None:
                output = loss_fn(output, fake_targets) if targets is not None else loss_fn(output)
        roots = backward_roots(output)
        accumulated = recorder.start_backward(roots)
        with _as_input_error(recorder):
            torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    floating = [p for p in state.values() if p.is_floating_point()] + list(tensors(fake_inputs))
    return Trace(
        calls=tuple(recorder.calls),
        parameters=parameters,
        inputs=input_storages,
        accumulated=accumulated,
        leaves={
            path: type(child).__name__ for path, child in module.named_modules() if next(child.children(), None) is None
        },
        itemsize=floating[0].element_size() if floating else 4,
    )
