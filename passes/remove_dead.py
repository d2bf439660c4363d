"""Dead code: remove every node whose value nobody needs.

    before:  %a = conv(x); %b = sdpa(q, k, v); _assert_tensor_metadata(%a); return (%a,)
    after:   %a = conv(x);                                                  return (%a,)

fx's own ``eliminate_dead_code`` keeps attention and metadata asserts (they count as impure there), and with them the
whole branch that feeds them. The graphs here are functional, so the only impure nodes are placeholders and the output.
"""

from __future__ import annotations

from torch import fx

from fxmask.passes.conditions import functional, no_dead_code
from fxmask.passes.observer import PassResult, graph_pass

KEPT = ("placeholder", "output")


@graph_pass(requires=(functional,), ensures=(functional, no_dead_code), otherwise=PassResult)
def remove_dead(graph: fx.Graph) -> PassResult:
    """Erase dead nodes of a functional graph in place.

    Raises:
        PassError: a node mutates its inputs, so that removing it could change the result.
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node.op not in KEPT and not node.users:
            graph.erase_node(node)
            erased += 1
    return PassResult(graph, erased)
