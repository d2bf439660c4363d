"""A CUDA device that computes on the CPU: tensors with values that call themselves ``cuda:0`` and refuse those of the CPU.

    with emulated_gpu():
        model = model.to("cuda")
        fxmask.accelerate(model, ...)       all of it runs, and a tensor that was left on the CPU raises, as on a real GPU

Operators run on the CPU, so results are the CPU's. Attention's result has the memory of a GPU's (``without_a_gpu.LAYOUTS``).
Where a graph is made, PyTorch sees fake CUDA tensors. Not emulated: streams, memory, generators, and anything of Inductor or
Triton. Not refused: what autograd's own formulas mix while they go back, and single numbers beside what they are combined with.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from without_a_gpu import CUDA, SDPA, gpu

aten = torch.ops.aten
ATTENTION = (torch.nn.functional.scaled_dot_product_attention, SDPA, aten.scaled_dot_product_attention)
COPIES = (aten._to_copy, aten.copy_)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # a GPU's tensor, by indices of either
# What Python is told of every tensor here
SAYS = {torch.Tensor.device.__get__: CUDA, torch.Tensor.is_cuda.__get__: True, torch.Tensor.is_cpu.__get__: False}  # type: ignore[attr-defined]


class OnGpu(torch.Tensor):
    """A tensor that calls itself a CUDA one; ``held`` is the CPU's, in the same memory."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> OnGpu:
        made = torch.Tensor._make_subclass(
            cls, held.detach(), requires_grad, dispatch_device=True, device_for_backend_keys=CUDA
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ATTENTION:
            return attention(*args, **kwargs)
        if func in SAYS:
            return SAYS[func]
        with torch._C.DisableTorchFunctionSubclass(), _known("move", _moves(func, args, kwargs)):
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked by C++; autograd would look for a driver's streams
            return torch.device("cpu") if _for_autograd() else CUDA
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        if id(self) not in memo:
            memo[id(self)] = made = OnGpu(self.held.clone(), self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True  # type: ignore[attr-defined]
        return memo[id(self)]  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {CUDA}"

    def __format__(self, form: str) -> str:
        return self.held.__format__(form)


def _moves(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether it is ``x.cpu()``, ``x.to(device)`` or ``x.to(other)``: then devices are compared."""
    asked = (*args[1:], *kwargs.values())
    return func is torch.Tensor.cpu or (
        func is torch.Tensor.to and any(isinstance(x, (str, torch.device, torch.Tensor)) for x in asked)
    )


_happening = {"backward": False, "move": False}


@contextlib.contextmanager
def _known(what: str, happens: bool = True) -> Iterator[None]:
    before = _happening[what]
    _happening[what] = before or happens
    try:
        yield
    finally:
        _happening[what] = before


def _for_autograd() -> bool:
    """Whether it is autograd that asks: while it records what is computed, and while it goes back."""
    recording = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _happening["backward"] or (recording and not _happening["move"])


def _run_backward(engine: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's ``_engine_run_backward``, and known to be running."""

    def run_backward(outputs: Any, given: Any, keep: bool, create: bool, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with _known("backward"):
            results = engine(outputs, given, keep, create, inputs, *args, **kwargs)
        pairs = zip(results or (), inputs or (), strict=False)  # zeros were made where autograd thought the GPU was
        return tuple(OnGpu(x) if type(x) is torch.Tensor and isinstance(of, OnGpu) else x for x, of in pairs)

    return run_backward


def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """As a GPU's fused kernels return it: [B, H, L, D] in the memory of [B, L, H, D]."""
    tensors = [x for x in (query, key, value, *args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    refuse_mixed(SDPA, tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        result = aten._scaled_dot_product_attention_math(query, key, value, *args, **kwargs)[0]
    else:
        given, kwargs = _map(lambda x: x.held if isinstance(x, OnGpu) else x, ((query, key, value, *args), kwargs))
        result = OnGpu(SDPA(*given, **kwargs))
    return result.transpose(1, 2).contiguous().transpose(1, 2) if result.dim() == 4 else result


def refuse_mixed(func: Any, tensors: list[torch.Tensor]) -> None:
    """As CUDA's operators do: only a single number of the CPU may stand beside them, and only where values are combined."""
    on_cpu = [x for x in tensors if not isinstance(x, OnGpu)]
    pointwise = torch.Tag.pointwise in func.tags
    wrong = [x for x in on_cpu if x.dim() or not pointwise] if not _happening["backward"] else []
    packet = func.overloadpacket
    taken = packet in COPIES or (packet in INDEXED and isinstance(tensors[0], OnGpu))
    if wrong and len(on_cpu) < len(tensors) and not taken:
        shapes = [f"{list(x.shape)} on {'cuda:0' if isinstance(x, OnGpu) else x.device}" for x in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {', '.join(shapes)}")


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on what the tensors hold; results are on the GPU if the arguments are, or if it is asked for."""
    tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    fake = next((x for x in tensors if isinstance(x, FakeTensor)), None)
    if fake is not None:  # a graph is being made
        mode = fake.fake_mode
        args, kwargs = _map(lambda x: mode.from_tensor(x) if isinstance(x, OnGpu) else x, (args, kwargs))
        return func(*args, **kwargs)
    refuse_mixed(func, tensors)
    given = {id(x.held): x for x in tensors if isinstance(x, OnGpu)}
    args, kwargs = _map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    results = func(*args, **kwargs)
    if id(results) in given:
        return given[id(results)]  # in place
    there = bool(given) if device is None else torch.device(device).type == "cuda"
    if func is aten.copy_.default or not there:
        return results
    return _map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, results)


def _leaves(value: Any) -> Iterator[Any]:
    """What an operator's arguments are made of; pytree's is slow."""
    if isinstance(value, (list, tuple)):
        for x in value:
            yield from _leaves(x)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """The same with every leaf changed."""
    if isinstance(value, dict):
        return {key: _map(change, x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_map(change, x) for x in value])
    return change(value)


_TRACING = (
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
)
PLAIN = (torch.Tensor, torch.nn.Parameter, OnGpu)


def _in_a_graph(args: Any, kwargs: Any) -> bool:
    """Whether PyTorch is making a graph of the operator, on tensors of its own."""
    if any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING):
        return True
    return any(isinstance(x, torch.Tensor) and type(x) not in PLAIN for x in _leaves((args, kwargs)))


class _Factories(TorchDispatchMode):
    """Tensors that are made on the GPU, or brought there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda" and not _in_a_graph(args, kwargs):
            return run(func, args, kwargs)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _Event:
    """Everything that was asked for has happened."""

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _in_this_thread() -> Iterator[None]:
    """What holds for one thread only."""
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device="cuda") goes by way of the CPU
    try:
        with torch.autograd.set_multithreading_enabled(False), _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


def _emulating(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """``Thread.run`` for threads that start inside."""

    def run_emulating(thread: threading.Thread) -> None:
        with _in_this_thread():
            run(thread)

    return run_emulating


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    """Inside, ``"cuda"`` is a device that computes on the CPU."""
    answers: dict[str, Callable[..., Any]] = {
        "Event": _Event,
        "current_stream": lambda *_: None,
        "stream": lambda *_: contextlib.nullcontext(),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (2**36, 2**36),
    }
    future, overwrite = torch.__future__, torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.enter_context(gpu())
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize"))
        for module in (torch.autograd, torch.autograd.graph):
            engine = module._engine_run_backward  # type: ignore[attr-defined]
            stack.enter_context(mock.patch.object(module, "_engine_run_backward", _run_backward(engine)))
        stack.enter_context(mock.patch.object(threading.Thread, "run", _emulating(threading.Thread.run)))
        stack.callback(future.set_overwrite_module_params_on_conversion, overwrite)
        future.set_overwrite_module_params_on_conversion(True)  # a parameter's memory cannot move to another class
        stack.enter_context(_in_this_thread())
        yield
