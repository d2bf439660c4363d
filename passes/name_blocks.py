"""Names for blocks that a person recognises, from module paths. Nothing is decided by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from fxmask.ir.graph import module_path
from fxmask.passes.dataflow import Dataflow, Values

MAX_NAMES = 3  # modules that a block's name lists
NAME_SHARE = 0.9  # a block is named after a module that owns this share of its MACs


def block_name(kind: str, values: Values, flow: Dataflow, weights: Mapping[str, int], region: Sequence[fx.Node]) -> str:
    """A module path that a person recognises.

    A branch has the name of the outermost module that owns nearly all of its MACs and little else; a stage that of the
    module where its value is made.
    """
    if kind == "output":
        return "output"
    if kind == "stage":
        path = module_path(values[-1])
        return f"{path}:stage" if path else "stage"
    owned = macs_by_module(region, flow)
    macs = sum(flow.macs[node] for node in region)
    owners = sorted((p for p, m in owned.items() if m >= NAME_SHARE * macs), key=lambda path: path.count("."))
    name = next((path for path in owners if owned[path] >= NAME_SHARE * weights[path]), None)
    if name is None:
        return _joint_name(owned, weights, macs) or (owners[-1] if owners else module_path(region[-1]) or "branch")
    # `resnets` is only a list; its one element is what a person would name
    return next((path for path in owners if path.startswith(f"{name}.") and path[len(name) + 1 :].isdigit()), name)


def _joint_name(owned: Mapping[str, int], weights: Mapping[str, int], macs: int) -> str | None:
    """The outermost modules that are wholly in a region and make up nearly all of it: ``blocks.1.attn+blocks.2.attn``."""
    whole = [path for path, m in owned.items() if m >= NAME_SHARE * weights[path]]
    outermost = [p for p in whole if not any(p.startswith(f"{other}.") for other in whole)]
    chosen: list[str] = []
    for path in sorted(outermost, key=lambda p: -owned[p]):
        chosen.append(path)
        if sum(owned[p] for p in chosen) >= NAME_SHARE * macs or len(chosen) == MAX_NAMES:
            break
    enough = sum(owned[p] for p in chosen) >= 0.5 * macs
    return "+".join(sorted(chosen, key=list(owned).index)) if enough else None


def macs_by_module(nodes: Iterable[fx.Node], flow: Dataflow) -> dict[str, int]:
    """MACs of ``nodes`` by module path, enclosing modules included."""
    weights: dict[str, int] = {}
    for node in nodes:
        path = module_path(node) if flow.macs[node] else ""
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            weights[prefix] = weights.get(prefix, 0) + flow.macs[node]
    return weights


def place_of(node: fx.Node) -> str:
    """Where a value of the stream is made: ``out of``, ``into`` or ``inside`` the module that its operator is in."""
    path = module_path(node)
    if not path:
        return "between modules"

    def outside(other: fx.Node) -> bool:
        return other.op == "output" or not f"{module_path(other)}.".startswith(f"{path}.")

    computed = [given for given in node.all_input_nodes if given.op != "get_attr"]
    if all(map(outside, node.users)):
        return f"out of {path}"
    return f"into {path}" if all(map(outside, computed)) else f"inside {path}"


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with a number where one comes again."""
    counts: dict[str, int] = {}
    result = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        result.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return result
