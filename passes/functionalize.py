"""Exported program -> functional ATen graph with the model's own parameters.

    exported:   graph(p_weight, b_table, x):  %y = conv(x, p_weight); %z = add_(%y, b_table); return (%z,)
    functional: graph(x):  %w = get_attr[weight]; %y = conv(x, %w); %z = add(%y, %t); return (%z,)

In-place operators become functional ones (a cached value that is later mutated would be silently corrupted), wrapped
regions (autocast, no_grad) are inlined, asserts and dead code go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from fxmask._torch import HigherOrderOperator
from fxmask.errors import CaptureError
from fxmask.ir.weights import attribute_of, named_tensors
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.observer import graph_pass
from fxmask.passes.remove_dead import remove_dead

# Buffers of the output that a functional graph would have to write back.
_MUTATIONS = {OutputKind.BUFFER_MUTATION: "buffer", OutputKind.USER_INPUT_MUTATION: "argument"}


@graph_pass(ensures=(functional, has_shapes, one_output_tuple))
def functionalize(
    exported: torch.export.ExportedProgram, model: torch.nn.Module, prefix: str, names: Mapping[str, str] | None = None
) -> fx.GraphModule:
    """Functional graph of an exported wrapper around ``model``.

    Args:
        exported: the export of a module that holds ``model`` as its submodule ``prefix``.
        model: the denoiser; its ``Parameter`` and buffer objects are shared, never copied.
        prefix: name of the submodule, removed from module paths.
        names: for lifted tensors that the export knows by another name, their names in ``model``.

    Raises:
        CaptureError: the model writes to a buffer or an argument when called, so a call cannot be a function.
    """
    exported = exported.run_decompositions({})
    for spec in exported.graph_signature.output_specs:
        if spec.kind in _MUTATIONS:
            raise CaptureError(
                f"the denoiser writes to its {_MUTATIONS[spec.kind]} {spec.target!r} when called; a cached graph must "
                "be a function of its inputs. Use out-of-place operators there, or model.eval() if it is a running "
                "statistic"
            )
    graph, attributes = _unlift(exported, dict(named_tensors(model)), f"{prefix}.", names or {})
    result = fx.GraphModule(attributes, graph, class_name="Program")
    while _inline_wrapped(result):
        pass
    _drop_copies(graph)
    remove_dead(graph)  # asserts are dead code too
    graph.lint()
    result.recompile()
    return result


def _drop_copies(graph: fx.Graph) -> None:
    """``copy(x, y)``, left over from writes into a tensor, is ``y``; and unlike ``y`` it has no derivative."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        written, value = (n.meta["val"] for n in node.args[:2])
        if written.shape == value.shape and written.dtype == value.dtype and written.device == value.device:
            node.replace_all_uses_with(node.args[1])


def _unlift(
    exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor], prefix: str, names: Mapping[str, str]
) -> tuple[fx.Graph, dict[str, Any]]:
    """Copy the graph with lifted parameters turned back into attributes."""
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            target = str(spec.target)
            if target in names:
                target = prefix + names[target]
            if target.startswith(prefix) and target.removeprefix(prefix) in tensors:
                value: Any = tensors[target.removeprefix(prefix)]
                target = attribute_of(target.removeprefix(prefix))
            else:
                value = exported.constants.get(target, exported.state_dict.get(target))
                target = "constant_" + target.replace(".", "_")
            attributes[target] = value
            copies[node] = graph.create_node("get_attr", target, name=node.name)
            copies[node].meta = dict(node.meta)
            continue
        if node.op == "get_attr":
            attributes[str(node.target)] = getattr(exported.graph_module, str(node.target))
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
        stack = node.meta.get("nn_module_stack")
        if stack:
            copies[node].meta["nn_module_stack"] = {
                key: (path.removeprefix(prefix) if path != prefix[:-1] else "", kind) for key, (path, kind) in stack.items()
            }
    return graph, attributes


def _inline_wrapped(module: fx.GraphModule) -> bool:
    """Inline one ``wrap_with_...`` region (no_grad, autocast off); returns whether there was one.

    Raises:
        CaptureError: an operator that takes a subgraph and cannot be inlined (cond, while_loop, autocast on).
    """
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        name = str(node.target)
        position = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        # wrap_with_autocast(device_type, dtype, enabled, cache_enabled, body, ...)
        enters_autocast = "autocast" in name and node.args[2] is not False
        if position is None or not name.startswith("wrap_with_") or enters_autocast:
            raise CaptureError(f"the graph holds {name!r} ({node.name}), control flow that cannot be cut into blocks")
        get_subgraph = node.args[position]
        assert isinstance(get_subgraph, fx.Node)
        _splice(module, node, getattr(module, str(get_subgraph.target)), node.args[position + 1 :])
        if not get_subgraph.users:
            module.graph.erase_node(get_subgraph)
        return True
    return False


def _splice(module: fx.GraphModule, node: fx.Node, inner: fx.GraphModule, operands: tuple[Any, ...]) -> None:
    """Replace ``node`` by the nodes of ``inner`` called on ``operands``."""
    values: dict[fx.Node, Any] = {}
    arguments = iter(operands)
    result: Any = None
    with module.graph.inserting_before(node):
        for inside in inner.graph.nodes:
            if inside.op == "placeholder":
                values[inside] = next(arguments)
            elif inside.op == "output":
                result = fx.map_arg(inside.args[0], lambda n: values[n])
            else:
                if inside.op == "get_attr":
                    setattr(module, str(inside.target), getattr(inner, str(inside.target)))
                values[inside] = module.graph.node_copy(inside, lambda n: values[n])
                values[inside].meta = dict(inside.meta)
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            if user.target.__name__ == "getitem":  # type: ignore[union-attr]
                user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
                module.graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)
