"""The GPU's side of things on a machine without a GPU: fake CUDA tensors, Inductor's Triton code for an H100, its machine code.

    model = on_gpu(model)                       weights are fake CUDA tensors: shapes, types and layouts, no memory
    with gpu(): program = fxmask.capture(model, call)
    code = triton_code(graph_module, arguments)     Inductor's Python module for arguments of these shapes and layouts
    assemble(name, source)                      a kernel's PTX and sm_90a machine code, by the ptxas in triton's wheel
    interpreted(code)                           the same module on CPU tensors: kernels run in Triton's interpreter

``interpreted`` needs TRITON_INTERPRET=1 before triton is imported, ``assemble`` needs it unset: two processes.
"""

# ruff: noqa: PT008  (what is patched is called in many ways, and need not be a mock)

from __future__ import annotations

import contextlib
import copy
import importlib.util
import operator
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import fx
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
SDPA = aten.scaled_dot_product_attention.default
LAYOUTS = ("flash", "efficient", "math")  # of attention's result, by the kernel that computes it


class H100:
    """What CUDA says of the device."""

    name, uuid, gcnArchName = "NVIDIA H100 80GB HBM3", "0", ""
    major, minor, multi_processor_count, warp_size = 9, 0, 132, 32
    total_memory, L2_cache_size = 80 * 2**30, 50 * 2**20
    max_threads_per_multi_processor, max_threads_per_block, regs_per_multiprocessor = 2048, 1024, 65536
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472
    is_integrated = is_multi_gpu_board = 0


class Driver:
    """What Triton and Inductor ask of a driver before anything is launched."""

    get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: CUDA)
    get_device_interface = staticmethod(lambda: torch.cuda)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    is_active = staticmethod(lambda: True)
    map_python_to_cpp_type = staticmethod(lambda t: t)

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132})


# ---------------------------------------------------------------------------------------------------------- fake tensors


def on_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model whose parameters and buffers are fake CUDA tensors; what else it holds stays where it is."""
    torch._C._ensureCUDADeviceGuardSet()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for x in [*model.parameters(), *model.buffers()]:
        with mode:
            fake: torch.Tensor = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
        memo[id(x)] = torch.nn.Parameter(fake, requires_grad=False) if isinstance(x, torch.nn.Parameter) else fake
    return copy.deepcopy(model, memo)


def _dispatch(layout: str) -> Callable[..., Any]:
    """Of fake tensors: attention as on a GPU, where fused kernels return [B, H, L, D] in the memory of [B, L, H, D]."""
    usual = FakeTensorMode.dispatch

    def dispatch(self: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not SDPA:
            return usual(self, func, types, args, kwargs)
        q, k, v = args[:3]
        if len({x.device for x in (q, k, v)}) != 1:
            raise RuntimeError(f"attention on tensors of several devices: {q.device}, {k.device}, {v.device}")
        *batch, length, _ = q.shape
        with self:
            if layout == "math" or len(batch) != 2:
                return torch.empty(*batch, length, v.shape[-1], dtype=q.dtype, device=q.device)
            made = torch.empty(batch[0], length, batch[1], v.shape[-1], dtype=q.dtype, device=q.device)
            return made.transpose(1, 2)

    return dispatch


def _conv_format(image: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.memory_format:
    """As cuDNN has it, in every type: channels-last if the image or the weight is. The true one asks for cuDNN."""
    given = {suggest_memory_format(image), suggest_memory_format(weight)}
    return next(iter(given & {torch.channels_last, torch.channels_last_3d}), torch.contiguous_format)


@contextlib.contextmanager
def gpu(layout: str = "flash") -> Iterator[None]:
    """Everything that PyTorch asks of the device before anything runs on it, answered as an H100 would."""
    from torch._dynamo.device_interface import CudaInterface

    answers: dict[str, Any] = {
        **dict.fromkeys(("synchronize", "set_device", "_lazy_init", "set_rng_state"), lambda *_: None),
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), lambda *_: 0),
        **dict.fromkeys(("get_device_properties", "_get_device_properties"), lambda *_: H100),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: H100.name,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    }
    torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        for interface in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(mock.patch.object(interface, "get_device_properties", staticmethod(lambda *_: H100)))
        stack.enter_context(mock.patch.object(CudaInterface, "current_device", staticmethod(lambda: 0)))
        stack.enter_context(mock.patch.object(CudaInterface, "get_raw_stream", staticmethod(lambda i: 0)))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _conv_format))
        stack.enter_context(mock.patch.object(FakeTensorMode, "dispatch", _dispatch(layout)))
        yield


# ------------------------------------------------------------------------------------------------------ generating code


class _Generated(Exception):
    """The code is there; nothing is to be loaded or run."""


def _forget_answers() -> None:
    """What PyTorch has remembered of the devices that were there, in either world, is asked again."""
    from torch.utils import _triton

    for question in vars(_triton).values():
        if hasattr(question, "cache_clear"):
            question.cache_clear()


@contextlib.contextmanager
def inductor_for_gpu() -> Iterator[None]:
    """Inside, Inductor generates code for an H100 and asks nothing of a real one."""
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers

    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    _forget_answers()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_answers)  # the last thing, when nothing answers as an H100 any more
        stack.enter_context(gpu())
        # passes that trace patterns on real CUDA tensors, autotuning, and the driver's own start
        stack.enter_context(mock.patch.object(fuse_attention, "_get_sfdp_patterns", lambda *a, **k: []))
        stack.enter_context(mock.patch.object(pad_mm, "_pad_mm_init", lambda *a, **k: None))
        stack.enter_context(mock.patch.object(misc_patterns, "_misc_patterns_init", lambda *a, **k: None))
        stack.enter_context(mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", lambda self: None))
        stack.enter_context(
            mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: triton.runtime.driver.set_active(Driver))
        )
        # folding would run on the device that is not there
        options = {
            "force_disable_caches": True,
            "triton.autotune_at_compile_time": False,
            "joint_graph_constant_folding": False,
        }
        options |= {x: False for x in ("use_static_triton_launcher", "use_static_cuda_launcher") if hasattr(config, x)}
        stack.enter_context(config.patch(options))
        triton.runtime.driver.set_active(Driver)
        try:
            yield
        finally:
            if before is not None:
                triton.runtime.driver.set_active(before)


def with_gpu_attention(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that calls the attention kernel which PyTorch picks on an H100: it asks the device, which is not there."""
    graph_module = copy.deepcopy(graph_module)
    for node in list(graph_module.graph.find_nodes(op="call_function", target=SDPA)):
        query, *rest = node.args
        plain = len(rest) == 2 and not any(node.kwargs.get(x) for x in ("attn_mask", "dropout_p", "is_causal", "enable_gqa"))
        scale = {key: value for key, value in node.kwargs.items() if key == "scale"}
        with graph_module.graph.inserting_before(node):
            if plain and query.meta["val"].dtype != torch.float32:
                fused = graph_module.graph.call_function(aten._scaled_dot_product_flash_attention.default, node.args, scale)
            else:
                mask = node.kwargs.get("attn_mask", rest[2] if len(rest) > 2 else None)
                given = (query, *rest[:2], mask, False)
                fused = graph_module.graph.call_function(aten._scaled_dot_product_efficient_attention.default, given, scale)
            result = graph_module.graph.call_function(operator.getitem, (fused, 0))
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module


def triton_code(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor] | None = None) -> str:
    """Inductor's output module for a graph without weights of its own, on fake CUDA arguments.

    Args:
        graph_module: its weights are arguments.
        arguments: whose shapes, layouts and types count; by default those of the graph's placeholders.
    """
    from torch._inductor.graph import GraphLowering
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fxmask._torch import inductor_compile

    if arguments is None:
        arguments = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    got: list[str] = []

    def generate(self: Any) -> Any:
        got.append(self.codegen()[0].value)
        raise _Generated

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with inductor_for_gpu(), torch.no_grad(), mock.patch.object(GraphLowering, "compile_to_module", generate):
        with mode:
            fakes = [torch.empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype, device=CUDA) for x in arguments]
        try:
            inductor_compile(with_gpu_attention(graph_module), fakes)
        except Exception:
            if not got:
                raise
    return got[0]


def kernels_of(code: str) -> dict[str, str]:
    """The Triton kernels of a generated module: name -> source."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S))


def launches(code: str) -> tuple[list[str], list[str]]:
    """Names of the Triton kernels and of the library routines that a generated module calls, in order."""
    body = code[code.find("def call(") :]
    return re.findall(r"(triton_\w+)\.run\(", body), re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", body)


def copies(code: str) -> list[str]:
    """The launched kernels that compute nothing: what they store is what they load, perhaps in another layout."""
    found = []
    for name, source in kernels_of(code).items():
        loads = re.findall(r"(\w+) = tl\.load\(", source)
        stored = re.findall(r"tl\.store\(\w+ \+ .*?, (\w+), ", source)
        if stored and set(stored) <= set(loads):
            found.append(name)
    return [name for name in launches(code)[0] if name in found]


def convolutions(code: str) -> list[bool]:
    """For each two-dimensional convolution that a generated module calls, whether its result is channels-last."""
    found = []
    for name in re.findall(r"(\w+) = extern_kernels\.convolution\(", code):
        sizes = re.search(rf"(?:assert_size_stride|assert_tensor_metadata)\({name}, \((.*?)\), \((.*?)\)", code)
        if sizes is not None:
            strides = [int(x) for x in sizes[2].split(",") if x.strip()]
            if len(strides) == 4:
                found.append(strides[1] == 1)
    return found


# ------------------------------------------------------------------------------------------- machine code and execution


def _module(name: str, source: str) -> ModuleType:
    folder = Path(tempfile.mkdtemp())
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def assemble(name: str, source: str) -> list[Any]:
    """The kernel compiled for sm_90a, once per configuration that Inductor would try: objects with ``.asm["cubin"]``."""
    with inductor_for_gpu():
        tuner = getattr(_module(name, source), name)
        return [tuner._precompile_config(config).kernel for config in tuner.configs]


class _Interpreted:
    """A kernel behind Inductor's launcher interface, one block at a time in Triton's interpreter."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def run(self, *arguments: Any, stream: Any = None) -> None:
        names = self.function.arg_names
        sizes = {n: a for n, a in zip(names, arguments, strict=False) if n.endswith("numel")}
        blocks, grid = {}, []
        for axis in "xyz":
            size = sizes.get(axis + "numel", 1)
            blocks[axis.upper() + "BLOCK"] = width = min(1024, 1 << max(0, size - 1).bit_length())
            grid.append(-(-size // width) if axis.upper() + "BLOCK" in names else size if axis + "numel" in names else 1)
        blocks["R0_BLOCK"] = 64
        self.function[tuple(grid)](*arguments, **{k: v for k, v in blocks.items() if k in names})


class _Libdevice:
    """CUDA's math library for the interpreter."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if hasattr(tl.math, name):
            return getattr(tl.math, name)
        known = {
            "tanh": np.tanh,
            "pow": np.power,
            "expm1": np.expm1,
            "log1p": np.log1p,
            "nearbyint": np.rint,
            "trunc": np.trunc,
        }
        apply = known[name]

        def run(*values: Any) -> Any:
            first = values[0]
            data = apply(*[v.handle.data for v in values]).astype(first.handle.data.dtype)
            return tl.core.tensor(TensorHandle(data, first.handle.dtype), first.type)

        return run


_FOR_CPU = (
    (r"(?m)^(empty_strided_cuda = .*|from torch\._C import _cuda_getCurrentRawStream.*)$", ""),
    (r"with torch\.cuda\._DeviceGuard\(0\):", "with contextlib.nullcontext():"),
    (r"torch\.cuda\.set_device\(0\)", "pass"),
    (r"get_raw_stream\(0\)", "0"),
    (r"'cuda:0'|torch\.device\(type='cuda', index=0\)", "'cpu'"),
    # kernels of a GPU's attention by what a CPU has; the graph reads the first result only
    (r"torch\.ops\.aten\._scaled_dot_product_flash_attention\.default\(", "flash_attention("),
    (r"torch\.ops\.aten\._scaled_dot_product_efficient_attention\.default\(", "efficient_attention("),
    # a library routine's result may have another layout on a CPU: bring it to the one that the kernels were made for
    (
        r"assert_tensor_metadata\((\w+), (\(.*?\)), (\(.*?\)), (torch\.\w+), .*",
        r"\1 = empty_strided_cuda(\2, \3, \4).copy_(\1)",
    ),
    (r"(?m)^(\s+)assert_size_stride\((\w+), (\(.*?\)), (\(.*?\)).*$", r"\1\2 = as_on_gpu(\2, \3, \4)"),
)
_HELPERS = """
import contextlib
import torch

def empty_strided_cuda(sizes, strides, dtype):
    return torch.empty_strided(sizes, strides, dtype=dtype)

def as_on_gpu(x, sizes, strides):
    assert tuple(x.shape) == tuple(sizes), (x.shape, sizes)
    return x if x.stride() == tuple(strides) else torch.empty_strided(sizes, strides, dtype=x.dtype).copy_(x)

def flash_attention(q, k, v, *args, scale=None):
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale),)

def efficient_attention(q, k, v, bias, *args, scale=None):
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale),)
"""


def interpreted(code: str) -> Callable[[list[torch.Tensor]], Any]:
    """The module's ``call(arguments) -> results`` on CPU tensors."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    from torch._inductor import async_compile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    class Kernels:
        def triton(self, name: str, source: str, device_str: str = "cuda") -> Any:
            module = _module(name, source)
            module.libdevice = _Libdevice()
            return getattr(module, name)

        def wait(self, scope: Any) -> None:
            pass

    for pattern, text in _FOR_CPU:
        code = re.sub(pattern, text, code)
    with contextlib.ExitStack() as stack:
        for name in ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction", "foreach"):
            stack.enter_context(mock.patch.object(triton_heuristics, name, lambda *a, **k: _Interpreted))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(mock.patch.object(async_compile, "AsyncCompile", Kernels))
        module: Any = _module("interpreted_module", _HELPERS + code)
        return getattr(module, "call", None) or module.Runner([]).call
