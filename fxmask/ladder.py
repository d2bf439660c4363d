"""Ways to turn a denoiser into a functional graph. None is trusted: ``tracing`` compares each result with the model.

    torch.export (non-strict)   runs the model's own Python on fake tensors
    traced with values          runs it on the real tensors and records the operators (make_fx), for TorchScript and for
                                sizes that depend on the values of arguments; then exports the recording
    torch.export (strict)       interprets its bytecode (dynamo), for Python that must not be run

In the second one, arithmetic on arguments that are held fixed (``Signature.fixed``) happens while tracing and leaves constants.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode

from fxmask.calls import BoundCall, flatten_output
from fxmask.errors import CaptureError
from fxmask.passes.functionalize import functionalize, named_tensors
from fxmask.passes.observer import mutates

Tensors = tuple[torch.Tensor, ...]
Export = Callable[[torch.nn.Module, BoundCall], fx.GraphModule]
MODEL = "model"  # the attribute under which a wrapper holds the denoiser


class Wrapper(torch.nn.Module):
    """Presents the model as a function from a flat list of tensors to a flat list of tensors."""

    def __init__(self, model: torch.nn.Module, bound: BoundCall) -> None:
        super().__init__()
        self.model = model
        self.bound = bound

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        """The flat outputs of the model."""
        flat, _ = flatten_output(self.model(**self.bound.rebuild(tensors)))
        return tuple(flat)


class _WrapperWithData(Wrapper):
    """Reads ``.data`` as ``.detach()``: a write through ``.data`` is seen by no tracer and would be lost."""

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        with _DataIsDetach():
            return super().forward(*tensors)


class _DataIsDetach(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def distinct(tensors: Sequence[torch.Tensor]) -> Tensors:
    """The tensors with repeated objects copied: a tracer would take two arguments for one."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        result.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return tuple(result)


def export_running(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By running the model's Python on fake tensors."""
    exported = torch.export.export(_WrapperWithData(model, bound).eval(), distinct(list(bound.tensors.values())), strict=False)
    return functionalize(exported, model, MODEL)


def export_interpreting(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By interpreting the model's bytecode."""
    exported = torch.export.export(Wrapper(model, bound).eval(), distinct(list(bound.tensors.values())), strict=True)
    return functionalize(exported, model, MODEL)


def trace_values(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By recording the operators of a call on the real tensors."""
    tensors = distinct(list(bound.tensors.values()))
    wrapper = _WrapperWithData(model, bound).eval()
    with _recorded_paths(model) as paths:
        traced = make_fx(wrapper.forward, tracing_mode="real", pre_dispatch=True)(*tensors)
    known = {id(tensor): name for name, tensor in named_tensors(model)}
    _fold_sizes(traced, known)
    names = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        held = getattr(traced, str(node.target))
        if id(held) in known:
            names[f"traced.{node.target}"] = known[id(held)]
    exported = torch.export.export(_Replay(traced, paths).eval(), tensors, strict=False)
    return functionalize(exported, model, MODEL, names)


def export_draft(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By running the model's Python, taking at every question about a value the way that the example takes.

    A check that always passes leaves a right graph; a real branch leaves one of its sides, which only a comparison over many
    timesteps and values can notice.
    """
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)  # a report of what was frozen; what matters of it is found by the comparison
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # torch leaves its trace file open
            tensors = distinct(list(bound.tensors.values()))
            exported = torch.export.draft_export(_WrapperWithData(model, bound).eval(), tensors)
            gc.collect()
        return functionalize(exported, model, MODEL)
    finally:
        log.setLevel(level)


DRAFT = "torch.export (draft)"
LADDER: dict[str, Export] = {
    "torch.export (non-strict)": export_running,
    "traced with values": trace_values,
    "torch.export (strict)": export_interpreting,
    DRAFT: export_draft,
}


@contextlib.contextmanager
def _recorded_paths(model: torch.nn.Module) -> Iterator[dict[str, str]]:
    """While tracing, the path of the innermost module that each recorded node belongs to."""
    paths: dict[str, str] = {}
    entered: list[tuple[str, int]] = []

    def enter(path: str, *_: Any) -> None:
        entered.append((path, len(_recording().nodes)))

    def leave(*_: Any) -> None:
        path, start = entered.pop()
        nodes = _recording().nodes
        for node in itertools.islice(reversed(nodes), len(nodes) - start):
            paths.setdefault(node.name, path)

    hooks = []
    try:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            hooks.append(module.register_forward_pre_hook(functools.partial(enter, path)))
            hooks.append(module.register_forward_hook(leave))
        yield paths
    finally:
        for hook in hooks:
            hook.remove()


def _fold_sizes(traced: fx.GraphModule, known: Mapping[int, str]) -> None:
    """Replace operators whose sizes depend on data by their values, where these come from constants alone.

    %m = get_attr[mask]; %i = nonzero(%m); %y = index(%x, %i)   becomes   %i = get_attr[values]; %y = index(%x, %i)
    """
    written = {node.args[0] for node in traced.graph.nodes if node.op == "call_function" and mutates(node)}
    constants: dict[fx.Node, Any] = {}
    for node in list(traced.graph.nodes):
        if node in written:
            continue
        if node.op == "get_attr" and isinstance(getattr(traced, str(node.target)), torch.Tensor):
            held = getattr(traced, str(node.target))
            if id(held) not in known:
                constants[node] = held
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or mutates(node) or torch.Tag.nondeterministic_seeded in tags:
            continue
        if not node.all_input_nodes or any(given not in constants for given in node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constants[n])
        constants[node] = node.target(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in tags and isinstance(constants[node], torch.Tensor):
            name = f"_values_of_{node.name}"
            setattr(traced, name, constants[node])
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(traced.graph.create_node("get_attr", name))
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _recording() -> fx.Graph:
    mode: Any = get_proxy_mode()
    graph: fx.Graph = mode.tracer.graph
    return graph


class _Scope(torch.nn.Module):
    """A module of which only the path matters: what is computed inside is attributed to it."""

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns."""
        return compute()


class _Replay(torch.nn.Module):
    """Runs a recorded graph, each node inside a module of the path that it was recorded in."""

    def __init__(self, traced: fx.GraphModule, paths: dict[str, str]) -> None:
        super().__init__()
        self.traced = traced
        self.model = _Scope()
        self._scopes: dict[str, torch.nn.Module] = {}
        for path in paths.values():
            if path not in self._scopes:
                self._scopes[path] = self._scope(path)
        self._paths = paths

    def _scope(self, path: str) -> torch.nn.Module:
        scope: torch.nn.Module = self.model
        for part in path.split(".") if path else []:
            if part not in scope._modules:
                scope.add_module(part, _Scope())
            inner = scope._modules[part]
            assert inner is not None
            scope = inner
        return scope

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The recorded outputs, computed again."""
        scopes, paths = self._scopes, self._paths

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                compute = functools.partial(super().run_node, n)
                path = paths.get(n.name) if n.op == "call_function" else None
                return compute() if path is None else scopes[path](compute)

        return Interpreter(self.traced).run(*tensors)


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
                stack = list(node.meta.get("nn_module_stack", {}).values())
                where = f" in module {stack[-1][0]!r}" if stack and stack[-1][0] else " in the model's own forward"
                raise CaptureError(f"data-dependent sizes: {node.target}{where} has a size that is known only when it runs")


def explain(error: BaseException, model: torch.nn.Module) -> str:
    """The reason of a failure in one line, and the module of the model where it happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    where = _where(error, model)
    return f"{reason} [{where}]" if where else reason


def _where(error: BaseException, model: torch.nn.Module) -> str | None:
    """The innermost module of the model whose code the error passed through, or the line of code that it names."""
    paths = {id(module): path for path, module in model.named_modules()}
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        found = None
        for frame, line in traceback.walk_tb(current.__traceback__):
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and id(owner) in paths:
                found = (owner, line)
        if found is not None:
            owner, line = found
            return f"in module {paths[id(owner)] or '(the model itself)'!r}, {type(owner).__name__}, line {line}"
        current = current.__cause__ or current.__context__
    places = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
    return f"at {places[-1]}" if places else None
