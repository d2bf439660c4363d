"""Why a model could not be captured: in one line, with the module's name and what to do instead."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxmask.errors import CaptureError
from fxmask.ir.graph import module_path

PLAIN_PARAMETERS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def refuse_active_hooks(model: torch.nn.Module) -> None:
    """What diffusers and accelerate put around ``forward`` and no graph can hold: caches, offloading, several devices.

    Raises:
        CaptureError: names the hook, the module, and how to switch it off.
    """
    name = type(model).__name__
    for path, hook in _library_hooks(model):
        kind = type(hook).__name__
        where = f"{kind} around {path or 'the model'!r}"
        if getattr(hook, "_is_stateful", False):
            raise CaptureError(
                f"{name} has a cache of diffusers' own switched on ({where}), which decides at each call what to compute. It "
                f"cannot be accelerated twice: call disable_cache() (or remove the hook that apply_... added) and capture again"
            )
        if "Offload" in kind or "LayerExecution" in kind or getattr(hook, "offload", False):
            raise CaptureError(
                f"{name} has its weights offloaded by hooks ({where}), and a graph, which calls no hooks, would not find them. "
                "Load the model without group offloading and sequential offloading (enable_group_offload, "
                "enable_sequential_cpu_offload), move it with .to(device), and capture that"
            )
        if "Parallel" in kind:
            raise CaptureError(
                f"{name} is spread over several devices by hooks ({where}); capture it before enable_parallelism, on one device"
            )


def _library_hooks(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Objects that diffusers and accelerate have put around the forward of modules, by path."""
    for path, module in model.named_modules():
        registered = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        attached = getattr(module, "_hf_hook", None)
        for hook in [*registered.values(), *getattr(attached, "hooks", [attached])]:
            if hook is not None:
                yield path, hook


def advice(model: torch.nn.Module) -> str:
    """What in a model is known to stand in the way of every capture, and what to do about it; empty if there is nothing."""
    parts: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for sentence in _known_trouble(module):
            parts.setdefault(sentence, []).append(path)
    return " ".join(sentence.format(_listed(paths)) for sentence, paths in parts.items())


def _known_trouble(module: torch.nn.Module) -> Iterator[str]:
    if isinstance(module, torch.jit.ScriptModule):
        yield "TorchScript submodules cannot be exported: {}; use the modules that they were scripted from."
    if hasattr(module, "_packed_params") and type(module).__module__.startswith("torch.ao"):
        yield (
            "The reason is quantised layers, whose packed weights no graph can hold: {}. Capture the model before it is "
            "quantised (quantize_dynamic), or quantise it with torchao (quantize_(model, Int8WeightOnlyConfig())): its layers "
            "can be captured."
        )
    for kind in dict.fromkeys(type(x).__name__ for x in module.parameters(recurse=False) if type(x) not in PLAIN_PARAMETERS):
        yield (
            f"The reason may be quantised layers, or other weights that are no plain tensors ({kind}): {{}}. Capture the model "
            "before they are converted, or quantise it with torchao."
        )
    fast: Any = torch.backends.mha.get_fastpath_enabled
    if isinstance(module, torch.nn.TransformerEncoder) and getattr(module, "use_nested_tensor", True) and fast():
        yield (
            "torch.nn.TransformerEncoder takes its fast path of nested tensors where it is given a padding mask ({}), and that "
            "returns zeros for what is padded, which no graph does. Switch it off with "
            "torch.backends.mha.set_fastpath_enabled(False), or TransformerEncoder(..., enable_nested_tensor=False)."
        )


def _listed(paths: list[str]) -> str:
    return f"{[path or '(the model itself)' for path in paths[:5]]}" + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def refuse_data_dependent(module: fx.GraphModule) -> None:
    """Sizes that depend on the values of tensors cannot be cached or compiled.

    Raises:
        CaptureError: names the operator and the module.
    """
    for node in module.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
                path = module_path(node)
                where = f" in module {path!r}" if path else " in the model's own forward"
                raise CaptureError(f"data-dependent sizes: {node.target}{where} has a size that is known only when it runs")


def explain(error: BaseException, model: torch.nn.Module) -> str:
    """The reason of a failure in one line, and the module of the model where it happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    where = _where(error, model)
    return (f"{reason} [{where}]" if where else reason) + _remedy(error)


def _remedy(error: BaseException) -> str:
    """What to do about an error that came out of a known part of PyTorch."""
    for current in _chain(error):
        files = {Path(frame.f_code.co_filename).name for frame, _ in traceback.walk_tb(current.__traceback__)}
        if "flex_attention.py" in files:
            return (
                ". In flex_attention: its functions must not make tensors (torch.tensor); give them Python numbers or buffers, "
                "or use scaled_dot_product_attention with attn_mask"
            )
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _where(error: BaseException, model: torch.nn.Module) -> str | None:
    """The innermost module of the model whose code the error passed through, or the line of code that it names."""
    paths = {id(module): path for path, module in model.named_modules()}
    for current in _chain(error):
        found = None
        for frame, line in traceback.walk_tb(current.__traceback__):
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and id(owner) in paths:
                found = (owner, line)
        if found is not None:
            owner, line = found
            return f"in module {paths[id(owner)] or '(the model itself)'!r}, {type(owner).__name__}, line {line}"
    places = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
    return f"at {places[-1]}" if places else None
