"""Every pass goes through one observer: what it requires and ensures, its name, time and effect, and its off switch.

    @graph_pass(requires=(functional,), ensures=(functional, no_dead_code))
    def remove_dead(graph): ...

A condition is a function ``graph -> problem or None``. An optimisation names what happens ``otherwise``, when it is
switched off; results must not depend on it, so that a wrong result can be bisected to a pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx

from fxmask.errors import PassError

Condition = Callable[[fx.Graph], str | None]
P = ParamSpec("P")
R = TypeVar("R")

OPTIONAL: list[str] = []  # passes that are optimisations only, in the order in which they were defined

_off: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("fxmask_passes_off", default=frozenset())
_observers: contextvars.ContextVar[tuple[list[PassRecord], ...]] = contextvars.ContextVar("fxmask_observers", default=())


@dataclass(frozen=True)
class PassRecord:
    """One run of a pass.

    Attributes:
        name: of the pass.
        seconds: how long it took, passes inside it included.
        nodes_before: of the graph that it was given.
        nodes_after: of the graph that it made; ``nodes_before`` if it made none.
        skipped: whether it was switched off.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    skipped: bool


def graph_pass(
    requires: Sequence[Condition] = (),
    ensures: Sequence[Condition] = (),
    otherwise: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a pass; its first argument holds the graph.

    Args:
        requires: what must hold of the graph that the pass is given.
        ensures: what holds of the graph that it returns, or of the given one if it works in place.
        otherwise: called with the same arguments when the pass is switched off; makes it optional.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        if otherwise is not None:
            OPTIONAL.append(name)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            given = graph_of(args[0])
            _check(name, "requires", requires, given)
            skipped = otherwise is not None and name in _off.get()
            before, started = _count(given), time.perf_counter()
            result: Any = otherwise(*args, **kwargs) if skipped and otherwise else function(*args, **kwargs)
            made = graph_of(result) or given
            if not skipped:
                _check(name, "ensures", ensures, made)
            record = PassRecord(name, time.perf_counter() - started, before, _count(made), skipped)
            for records in _observers.get():
                records.append(record)
            return result  # type: ignore[no-any-return]

        return run

    return declare


@contextlib.contextmanager
def observe() -> Iterator[list[PassRecord]]:
    """Collect a record of every pass that runs inside."""
    records: list[PassRecord] = []
    token = _observers.set((*_observers.get(), records))
    try:
        yield records
    finally:
        _observers.reset(token)


@contextlib.contextmanager
def switched_off(*names: str) -> Iterator[None]:
    """Run without some optimisations; results stay the same.

    Raises:
        PassError: a name is not that of an optional pass.
    """
    unknown = [name for name in names if name not in OPTIONAL]
    if unknown:
        raise PassError(f"{unknown} cannot be switched off; optional passes are {OPTIONAL}")
    token = _off.set(_off.get() | set(names))
    try:
        yield
    finally:
        _off.reset(token)


def graph_of(value: Any) -> fx.Graph | None:
    """The graph in a graph, a graph module, an exported program, or anything with a ``graph_module``."""
    if isinstance(value, fx.Graph):
        return value
    if isinstance(value, (fx.GraphModule, torch.export.ExportedProgram)):
        return value.graph
    module = getattr(value, "graph_module", None)
    return module.graph if isinstance(module, fx.GraphModule) else None


def _check(name: str, what: str, conditions: Sequence[Condition], graph: fx.Graph | None) -> None:
    for condition in conditions:
        problem = condition(graph) if graph is not None else "there is no graph"
        if problem:
            raise PassError(f"pass {name!r} {what} {condition.__name__}, but {problem}")


def _count(graph: fx.Graph | None) -> int:
    return len(graph.nodes) if graph is not None else 0


def mutates(node: fx.Node) -> bool:
    """Whether the node's operator writes to one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def is_assert(node: fx.Node) -> bool:
    """Whether the node only checks something and computes nothing."""
    name = getattr(node.target, "__name__", str(node.target)) if callable(node.target) else str(node.target)
    return node.op == "call_function" and ("_assert" in name or name.startswith("sym_constrain_range"))


def functional(graph: fx.Graph) -> str | None:
    """No operator writes to its inputs."""
    node = next((n for n in graph.nodes if n.op == "call_function" and mutates(n) and not is_assert(n)), None)
    return f"{node.format_node()} writes to its input" if node is not None else None


def has_shapes(graph: fx.Graph) -> str | None:
    """Every computed value has its shape in ``meta["val"]``."""
    node = next((n for n in graph.nodes if n.op in ("call_function", "placeholder") and "val" not in n.meta), None)
    return f"{node.name} has no shape" if node is not None else None


def no_dead_code(graph: fx.Graph) -> str | None:
    """Every computed value has a user."""
    node = next((n for n in graph.nodes if n.op not in ("placeholder", "output") and not n.users), None)
    return f"nobody uses {node.name}" if node is not None else None


def one_output_tuple(graph: fx.Graph) -> str | None:
    """The graph returns one flat tuple of values."""
    outputs = list(graph.find_nodes(op="output"))
    flat = len(outputs) == 1 and isinstance(outputs[0].args[0], (tuple, list))
    return None if flat and all(isinstance(n, fx.Node) for n in outputs[0].args[0]) else "its output is not a flat tuple"
