"""Tracing with values: the operators of a call on real tensors are recorded, then exported."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxmask._torch import make_fx, own_submodules, recording_graph
from fxmask.frontend.wrapper import MODEL, WrapperWithData, distinct
from fxmask.ir.calls import BoundCall
from fxmask.ir.graph import is_random, mutates
from fxmask.ir.weights import named_tensors
from fxmask.passes.functionalize import functionalize

SILENT = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


def trace_values(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By recording the operators of a call on the real tensors."""
    tensors = distinct(list(bound.tensors.values()))
    wrapper = WrapperWithData(model, bound).eval()
    with _recorded_paths(model) as paths, _NoHiddenReads():
        traced = make_fx(wrapper.forward, tracing_mode="real", pre_dispatch=True)(*tensors)
    known = {id(tensor): name for name, tensor in named_tensors(model)}
    _fold_sizes(traced, known)
    names = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        held = getattr(traced, str(node.target))
        if id(held) in known:
            names[f"traced.{node.target}"] = known[id(held)]
    exported = torch.export.export(_TraceModule(traced, paths).eval(), tensors, strict=False)
    return functionalize(exported, model, MODEL, names)


class _NoHiddenReads(TorchFunctionMode):
    """Lets ``item`` object, as it does for what is recorded, where other ways to a value would be silent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SILENT and args[0].numel():
            args[0].detach().reshape(-1)[0].item()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _recorded_paths(model: torch.nn.Module) -> Iterator[dict[str, str]]:
    """While tracing, the path of the innermost module that each recorded node belongs to."""
    paths: dict[str, str] = {}
    entered: list[tuple[str, int]] = []

    def enter(path: str, *_: Any) -> None:
        entered.append((path, len(recording_graph().nodes)))

    def leave(*_: Any) -> None:
        path, start = entered.pop()
        nodes = recording_graph().nodes
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
        if node.op != "call_function" or mutates(node) or is_random(node):
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


class _Scope(torch.nn.Module):
    """A module of which only the path matters: what is computed inside is attributed to it."""

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns."""
        return compute()


class _TraceModule(torch.nn.Module):
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
            if part not in own_submodules(scope):
                scope.add_module(part, _Scope())
            inner = own_submodules(scope)[part]
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
