"""Exported program -> functional ATen graph with the model's own parameters.

    exported:   graph(p_weight, b_table, x):  %y = conv(x, p_weight); %z = add_(%y, b_table); return (%z,)
    functional: graph(x):  %w = get_attr[weight]; %y = conv(x, %w); %z = add(%y, %t); return (%z,)

In-place operators become functional ones (a cached value that is later mutated would be silently corrupted); registered
operators that write to their arguments do so on copies (``auto_functionalized``). Regions under no_grad or another autocast
are part of the graph by then; flex_attention becomes plain operators, and other operators that take graphs are refused.
Asserts and dead code go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from fxmask._torch import HigherOrderOperator
from fxmask.errors import CaptureError
from fxmask.ir.graph import made_functional, module_path
from fxmask.ir.weights import attribute_of, named_tensors
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.expand_attention import expand_attention
from fxmask.passes.observer import graph_pass
from fxmask.passes.remove_dead import remove_dead

# Buffers of the output that a functional graph would have to write back.
_MUTATIONS = {
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.PARAMETER_MUTATION: "parameter",
    OutputKind.USER_INPUT_MUTATION: "argument",
}

# What to use instead of operators that take graphs, by parts of their names.
_REMEDIES = {
    "flex_attention": "scaled_dot_product_attention with attn_mask",
    "cond": "torch.where, which chooses between values",
    "while_loop": "a loop of a fixed length, in Python",
    "scan": "a loop of a fixed length, in Python",
    "triton_kernel": "torch.library.custom_op around the call of the kernel, with a register_fake",
    "torchbind": "tensors in the place of script objects",
    "checkpoint": "the module without checkpointing, which saves nothing in inference",
}


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
        CaptureError: the model writes to a buffer, a parameter or an argument when called, so a call cannot be a function; or
            it calls an operator that takes graphs and cannot be cut.
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
    expand_attention(result)
    _refuse_graphs_inside(graph)
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
            copies[node].meta["nn_module_stack"] = {key: (_own_path(path, prefix), kind) for key, (path, kind) in stack.items()}
    return graph, attributes


def _own_path(path: str, prefix: str) -> str:
    """Path of a module in the model; what ``torch.compile`` wraps around modules has no place in it."""
    own = path.removeprefix(prefix) if path != prefix[:-1] else ""
    return ".".join(part for part in own.split(".") if part != "_orig_mod")


def _refuse_graphs_inside(graph: fx.Graph) -> None:
    """Refuse operators that take graphs, but for those that only stand for a registered operator.

    Raises:
        CaptureError: names the operator, the module, and what to use instead.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator) or made_functional(node):
            continue
        name, path = str(node.target), module_path(node)
        remedy = next((f"; use {text}" for word, text in _REMEDIES.items() if word in name), "")
        where = f" in module {path!r}" if path else ""
        raise CaptureError(f"the graph holds {name!r} ({node.name}){where}, which cannot be cut into blocks{remedy}")
