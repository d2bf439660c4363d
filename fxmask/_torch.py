"""Every private or unstable name of PyTorch that fxmask uses, each with its reason: the one file to read when PyTorch moves.

Inductor is imported when it is first needed: it takes seconds, and a saved package runs without it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

# Fake tensors: shapes without memory, for models that are tried or captured without running them.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# Where torch.export switches backends off.
from torch.export import _trace as export_trace

# Puts a tracer's own functions in the place of methods, and takes them away again.
from torch.fx._symbolic_trace import _Patcher

# The tracer behind torch.export: records the operators of a call on real tensors.
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.proxy_tensor import make_fx as _make_fx

# Function modes see every operator; one that need not is put aside for a while.
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

# Nested arguments as flat leaves, as torch.export itself flattens them.
from torch.utils import _device as device_mode
from torch.utils import _pytree as pytree

__all__ = [
    "COMPILED_CALL",
    "GLOBAL_HOOKS",
    "HELD",
    "HOOKS",
    "MODULE_INTERNALS",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "answered_questions",
    "aoti_compile",
    "aoti_load",
    "collected_output_code",
    "copy_all",
    "cpp_compiler_problem",
    "default_device",
    "exact_float32",
    "float32_precisions",
    "forget_compiled_call",
    "get_proxy_mode",
    "hooks_so_far",
    "inductor_compile",
    "is_transformed",
    "leave_pool",
    "make_fx",
    "occupy_gpu",
    "own_submodules",
    "own_tensors",
    "own_tensors_by_name",
    "pytree",
    "quiet_loggers",
    "raw_modes",
    "recording_graph",
    "registered_operators",
    "shape_only",
    "share_state",
    "tensor_stores",
    "tracing",
    "uncompiled",
    "version_of",
    "without_function_mode",
    "without_inductor_cache",
    "writes_to",
]

OpOverload = torch._ops.OpOverload  # the type of ``torch.ops.aten.add.Tensor``: what graphs call
HigherOrderOperator = torch._ops.HigherOrderOperator  # operators that take graphs: regions under no_grad, control flow

OpOverloadPacket = torch._ops.OpOverloadPacket  # ``torch.ops.aten.add``: what functions call

# What every module has besides its own attributes, and where it keeps its hooks; and the hooks of all modules.
MODULE_INTERNALS = frozenset(vars(torch.nn.Module())) - {"training"}
HELD = ("_parameters", "_buffers", "_modules")
COMPILED_CALL = "_compiled_call_impl"  # where ``module.compile()`` leaves its result
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks)

# What a module holds its tensors and submodules in; there is no public way to have one module stand for another's.
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 where that is not counted (inference tensors)."""
    return -1 if tensor.is_inference() else int(tensor._version)


def writes_to(tensors: Sequence[torch.Tensor]) -> int:
    """How often any of many that are no inference tensors was changed in place."""
    # a loop in Python is faster than ``map`` here
    return sum([x._version for x in tensors])


def copy_all(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy each value to its place without waiting; on a GPU those of one type and layout in one kernel."""
    if places:
        torch._foreach_copy_(list(places), list(values), non_blocking=True)


def leave_pool(device: torch.device, pool: Any) -> bool:
    """Allocate outside of a pool again after a recording into it could not be ended, and let go of it in the recording's place.

    Returns:
        Whether the allocator was inside.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        return False
    torch._C._cuda_releasePool(index, pool)
    return True


def hooks_so_far() -> int:
    """How many hooks were registered in this process so far, on whatever module."""
    return int(torch.utils.hooks.RemovableHandle.next_id)


# Where PyTorch keeps how float32 is computed: (backend, operators); what is "none" follows the entry that is more general.
_GENERAL = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_PARTS = tuple((backend, part) for backend in ("cuda", "mkldnn") for part in ("matmul", "conv", "rnn"))
_precision_of: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_set_precision: Callable[[str, str, str], Any] = torch._C._set_fp32_precision_setter


def float32_precisions() -> tuple[str, ...]:
    """How float32 is computed where it matters: matrix products and convolutions of CUDA and of oneDNN.

    ``torch.get_float32_matmul_precision`` and ``allow_tf32`` raise where a program has set it in the newer way.
    """
    return tuple(_precision_of(*entry) for entry in _PARTS)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 is computed as float32 inside: no TF32, no bfloat16 in its place. For the whole process; put back at the end.

    Set in the older way and in the newer one, which PyTorch wants to agree: it raises where one is read after the other was
    set to something else.
    """
    matmul, cudnn = (
        _set_before(torch.get_float32_matmul_precision, "highest"),
        _set_before(torch._C._get_cudnn_allow_tf32, True),
    )
    before: list[tuple[tuple[str, str], str]] = []
    for entry in _GENERAL:  # first: what they say hides whether the others say anything
        before.append((entry, _precision_of(*entry)))
        _set_precision(*entry, "none")
    before += [(entry, _precision_of(*entry)) for entry in _PARTS]
    try:
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(False)
        for entry in _PARTS:
            _set_precision(*entry, "ieee")
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(cudnn)
        for entry, value in reversed(before):
            _set_precision(*entry, value)


def _set_before(read: Callable[[], Any], default: Any) -> Any:
    """What was set in the older way; its default, if it was the newer way that was used."""
    try:
        return read()
    except RuntimeError:
        return default


def is_transformed() -> bool:
    """Whether the call is inside of a transform (``torch.func``) or of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def default_device() -> torch.device | None:
    """Where new tensors are put; ``torch.get_default_device`` takes longer than a step may."""
    device: torch.device | None = device_mode.CURRENT_DEVICE
    return device


def shape_only(cls: type, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass with shape, layout, type and device, and no memory."""
    return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), tuple(strides), dtype=dtype, device=device)


# Modes of this thread or process; the public functions behind some of them take microseconds each.
_MODES: tuple[Callable[[], Any], ...] = (
    torch.get_default_dtype,
    torch._C._get_deterministic_algorithms,
    torch._C._get_flash_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch._C._get_cudnn_sdp_enabled,
    torch.backends.mha.get_fastpath_enabled,
)
_MODES_OF: dict[str, tuple[Callable[[], Any], ...]] = {
    device: (*_MODES, *(functools.partial(_precision_of, *entry) for entry in _PARTS if entry[0] == backend))
    for device, backend in (("cpu", "mkldnn"), ("cuda", "cuda"))
}


def raw_modes(device: str) -> list[Any]:
    """Modes that matter on a type of device, but for autocast, to be compared with what they were."""
    return [device_mode.CURRENT_DEVICE, *[read() for read in _MODES_OF.get(device, _MODES)]]


def share_state(module: torch.nn.Module, model: torch.nn.Module) -> None:
    """Let ``module`` hold ``model``'s own dictionaries: whatever is done to one is done to the other."""
    module.__dict__.update({name: model.__dict__[name] for name in _STATE})


def own_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module itself, without its submodules'."""
    values = [*module._parameters.values(), *module._buffers.values()]
    return [value for value in values if value is not None]


def own_tensors_by_name(module: torch.nn.Module) -> list[tuple[str, torch.Tensor | None]]:
    """Parameters and buffers of a module itself by name, ``None`` for those that are left out."""
    return [*module._parameters.items(), *module._buffers.items()]


def tensor_stores(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries that a module's own parameters and buffers are in."""
    return module._parameters, module._buffers


def own_submodules(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Direct submodules by name, also such names as attributes cannot have."""
    return module._modules


def own_attributes(module: torch.nn.Module) -> list[Any]:
    """What a module holds besides parameters, buffers and submodules."""
    return [value for key, value in vars(module).items() if key not in _STATE[:3]]


def forget_compiled_call(module: torch.nn.Module) -> None:
    """Undo ``module.compile()``, which goes past ``forward``."""
    module.__dict__[COMPILED_CALL] = None


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module that ``torch.compile`` wrapped; any other module itself."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")  # imported by ``torch.compile``, and slow to import
    while compiler is not None and isinstance(module, compiler.OptimizedModule):
        module = module._orig_mod
    return module


_TRACING = threading.RLock()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time traces and compiles inside, and other threads go on with what they run.

    PyTorch's tracers replace ``torch.nn.Module.__call__`` and ``__getattr__`` for the whole process; here, what they put there
    is reached by the thread that traces, and the others get what was there before. Export also switches cuDNN and oneDNN off
    for the whole process, so that operators that only these have stay out of its graphs; other threads would round
    differently meanwhile (and convolve slowly), so here it does not.
    """
    with _TRACING, contextlib.ExitStack() as stack:
        if _Patcher.patch_method is not _patch_here:  # else this thread is inside of another trace
            stack.enter_context(mock.patch.object(_Patcher, "patch_method", _patch_here))
            stack.enter_context(mock.patch.object(export_trace, "_ignore_backend_decomps", contextlib.nullcontext))
        yield


_patch_everywhere = _Patcher.patch_method


def _patch_here(self: Any, cls: type, name: str, new: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """As a tracer's ``patch_method``, for the thread that it runs in."""
    before, owner = getattr(cls, name), threading.get_ident()

    @functools.wraps(new)
    def here(*given: Any, **named: Any) -> Any:
        return (new if threading.get_ident() == owner else before)(*given, **named)

    _patch_everywhere(self, cls, name, here, *args, **kwargs)


def make_fx(function: Callable[..., Any], **options: Any) -> Callable[..., fx.GraphModule]:
    """PyTorch's tracer of that name, in one thread at a time."""
    traced = _make_fx(function, **options)

    def trace(*arguments: Any) -> fx.GraphModule:
        with tracing():
            module: fx.GraphModule = traced(*arguments)
            return module

    return trace


def recording_graph() -> fx.Graph:
    """The graph that ``make_fx`` is recording right now."""
    mode: Any = get_proxy_mode()
    graph: fx.Graph = mode.tracer.graph
    return graph


@contextlib.contextmanager
def answered_questions(log: list[tuple[Any, Any]]) -> Iterator[None]:
    """Collects every question about symbolic values that is answered inside while exporting: (expression, answer)."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    ask = ShapeEnv.evaluate_expr

    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = ask(self, *args, **kwargs)
        expression = args[0] if args else kwargs.get("orig_expr")
        if getattr(expression, "free_symbols", None):
            log.append((expression, given))
        return given

    with mock.patch.object(ShapeEnv, "evaluate_expr", answer):
        yield


FAKE_TENSOR_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
STANDALONE_LOGGER = "torch._inductor.standalone_compile"


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Loggers of PyTorch that report what is expected here say nothing inside."""
    loggers = [logging.getLogger(name) for name in names]
    before = [log.disabled for log in loggers]
    for log in loggers:
        log.disabled = True
    try:
        yield
    finally:
        for log, disabled in zip(loggers, before, strict=True):
            log.disabled = disabled


def cpp_compiler_problem() -> str | None:
    """Why Inductor finds no working C++ compiler, or ``None`` if it does."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).strip().splitlines()[0]
    except Exception as error:  # whatever else a broken toolchain raises: eager still works
        return f"{type(error).__name__}: {error}"
    return None


def inductor_compile(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Inductor itself, without torch.compile's guards and recompile limit, for the shapes of these arguments."""
    artifact: Callable[..., Any] = torch._inductor.standalone_compile(
        graph_module, list(arguments), dynamic_shapes="from_example_inputs"
    )
    return artifact


@contextlib.contextmanager
def without_inductor_cache() -> Iterator[None]:
    """Inductor generates code inside, also where its cache has it."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@contextlib.contextmanager
def collected_output_code(keep: Callable[[str], Any]) -> Iterator[None]:
    """Hands every module that Inductor generates inside to ``keep``."""
    from torch._inductor.graph import GraphLowering

    with mock.patch.object(GraphLowering, "save_output_code", keep):
        yield


def registered_operators() -> frozenset[str]:
    """Names of all operators that PyTorch's dispatcher knows now: ``aten::add.Tensor``, ``aten::relu``."""
    return frozenset(torch._C._dispatch_get_all_op_names())


GPU_HERTZ = 2.2e9  # above the clock rate of any GPU so far: counting so many cycles takes a second, or somewhat longer


def occupy_gpu(device: torch.device, seconds: float) -> None:
    """Let a GPU's current stream do nothing for at least so long, so that launches get ahead of it; there is no public way."""
    with torch.cuda.device(device):
        torch.cuda._sleep(int(seconds * GPU_HERTZ))  # type: ignore[no-untyped-call]


def aoti_compile(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Compile ahead of time into a package without line tables, which would be three quarters of it."""
    options = {}
    if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):
        options["aot_inductor.enable_line_tables"] = False
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


def aoti_load(path: Path, device_index: int) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """What a package computes. ``aoti_load_package`` would first call the C++ compiler, to name vector instructions."""
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]] = loader(str(path), "model", False, 1, device_index).boxed_run
    return run


@contextlib.contextmanager
def without_function_mode(mode: TorchFunctionMode) -> Iterator[bool]:
    """Run without a function mode, if it is the innermost one; yields whether it is. A mode costs time for every operator."""
    if _get_current_function_mode() is not mode:  # type: ignore[no-untyped-call]
        yield False
        return
    with _pop_mode_temporarily():
        yield True
