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
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx

from fxmask.errors import PassError
from fxmask.passes.log import log_pass

Condition = Callable[[fx.Graph], str | None]
P = ParamSpec("P")
R = TypeVar("R")
DECLARED: dict[str, PassInfo] = {}  # every pass, by name; in which order they run is said in ``pipeline``
_off: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("fxmask_passes_off", default=frozenset())
_observers: contextvars.ContextVar[tuple[list[PassRecord], ...]] = contextvars.ContextVar("fxmask_observers", default=())


@dataclass(frozen=True)
class PassResult:
    """What a pass that works in place says of itself.

    Attributes:
        graph: that it was given, changed or not.
        count: how many nodes it changed or removed.
    """

    graph: fx.Graph
    count: int = 0

    @property
    def modified(self) -> bool:
        """Whether it changed anything."""
        return self.count > 0


@dataclass(frozen=True)
class PassRecord:
    """One run of a pass.

    Attributes:
        name: of the pass.
        seconds: how long it took, passes inside it included.
        nodes_before: of the graph that it was given.
        nodes_after: of the graph that it made; ``nodes_before`` if it made none.
        modified: whether the graph that it leaves computes by other operators than the one it was given.
        skipped: whether it was switched off.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    skipped: bool

    def __str__(self) -> str:
        effect = "off" if self.skipped else "changed" if self.modified else "same"
        return f"{self.name:<22} {1e3 * self.seconds:8.1f} ms  {self.nodes_before:>6} -> {self.nodes_after:<6} nodes  {effect}"


@dataclass(frozen=True)
class PassInfo:
    """What a pass declares.

    Attributes:
        name: of the pass.
        requires: names of conditions of the graph that it is given.
        ensures: names of conditions of the graph that it leaves.
        optional: whether it is an optimisation that can be switched off.
        module: that defines it.
    """

    name: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    optional: bool
    module: str


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
        parameters = inspect.signature(function)
        first = next(iter(parameters.parameters))
        DECLARED[name] = PassInfo(
            name,
            tuple(c.__name__ for c in requires),
            tuple(c.__name__ for c in ensures),
            otherwise is not None,
            function.__module__,
        )

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = parameters.bind(*args, **kwargs)
            given = graph_of(bound.arguments[first])
            if requires and given is None:
                kind = type(bound.arguments[first]).__name__
                raise PassError(f"pass {name!r} takes a captured program or graph as {first!r}, got {kind}; see fxmask.capture")
            _check(name, "requires", requires, given)
            skipped = otherwise is not None and name in _off.get()
            before, operators, started = _count(given), _operators(given), time.perf_counter()
            result: Any = otherwise(*args, **kwargs) if skipped and otherwise else function(*args, **kwargs)
            seconds = time.perf_counter() - started
            made = graph_of(result) or given
            if not skipped:
                _check(name, "ensures", ensures, made)
            record = PassRecord(name, seconds, before, _count(made), _operators(made) != operators, skipped)
            for records in _observers.get():
                records.append(record)
            log_pass(record, made)
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
    optional = optional_passes()
    unknown = [name for name in names if name not in optional]
    if unknown:
        raise PassError(f"{unknown} cannot be switched off; optional passes are {optional}")
    token = _off.set(_off.get() | set(names))
    try:
        yield
    finally:
        _off.reset(token)


def optional_passes() -> list[str]:
    """Names of the passes that can be switched off."""
    return [name for name, info in DECLARED.items() if info.optional]


def graph_of(value: Any) -> fx.Graph | None:
    """The graph in a graph, a graph module, an exported program, or anything with a ``graph_module``."""
    if isinstance(value, fx.Graph):
        return value
    if isinstance(value, (fx.GraphModule, torch.export.ExportedProgram)):
        return value.graph
    if isinstance(value, PassResult):
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


def _operators(graph: fx.Graph | None) -> list[Any]:
    """What a graph computes by: enough to tell whether a pass did anything."""
    return [(node.op, node.target, len(node.users)) for node in graph.nodes] if graph is not None else []
