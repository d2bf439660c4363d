"""Dead code: remove every node whose value nobody needs.

    before:  %a = conv(x); %b = sdpa(q, k, v); _assert_tensor_metadata(%a); return (%a,)
    after:   %a = conv(x);                                                  return (%a,)

fx's own ``eliminate_dead_code`` keeps attention and metadata asserts (they count as impure there), and with them the
whole branch that feeds them. The graphs here are functional, so the only impure nodes are placeholders and the output.
"""

from __future__ import annotations

from torch import fx

from fxmask.errors import PassError

KEPT = ("placeholder", "output")


def remove_dead(graph: fx.Graph) -> int:
    """Erase dead nodes of a functional graph in place; returns how many.

    Raises:
        PassError: a node mutates its inputs, so that removing it could change the result.
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node.op in KEPT or node.users:
            continue
        if mutates(node) and not is_assert(node):
            raise PassError(f"remove_dead needs a functional graph, but {node.format_node()} mutates its input")
        graph.erase_node(node)
        erased += 1
    return erased


def mutates(node: fx.Node) -> bool:
    """Whether the node's operator writes to one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def is_assert(node: fx.Node) -> bool:
    """Whether the node only checks something and computes nothing."""
    name = getattr(node.target, "__name__", str(node.target)) if callable(node.target) else str(node.target)
    return node.op == "call_function" and ("_assert" in name or name.startswith("sym_constrain_range"))
