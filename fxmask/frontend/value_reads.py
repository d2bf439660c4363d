"""Watching a model's Python ask for the values of tensors, and what it does with the answers.

    bool(x), int(x), float(x)    the answer is a plain value: whatever is done with it is not seen, so the value itself counts
    x.item(), x.tolist()         the answer is a symbol: each comparison of it is seen, and its outcome counts

A draft export goes the way that the example goes. The tensors that were asked for become outputs of the exported graph;
together with the outcomes they are the conditions under which that way is the right one (``Assumptions``).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxmask._torch import answered_questions
from fxmask.errors import CaptureError
from fxmask.frontend.wrapper import Tensors, WrapperWithData
from fxmask.ir.assumptions import Assumptions, Condition
from fxmask.ir.calls import BoundCall
from fxmask.ir.graph import output_node, placeholders

ASSUMPTIONS = "fxmask_assumptions"  # the key in a graph module's ``meta``
OWN = str(Path(__file__).resolve().parent.parent)
PLAIN = {torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.is_nonzero}


@dataclass
class Reads:
    """What a model has asked for.

    Attributes:
        tensors: that it asked for the value of, one element each.
        symbols: the symbol of each that was answered by one.
        values: the answer of each that was answered by a plain value.
        questions: comparisons of symbols, and their outcomes.
        places: where in the model's code.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    symbols: dict[str, int] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    questions: list[tuple[Any, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def note(self, tensor: torch.Tensor, answer: Any) -> None:
        """Note down one answer."""
        k = len(self.tensors)
        self.tensors.append(tensor.detach().reshape(()))
        self.places.append(_place())
        expression = answer.node.expr if isinstance(answer, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None
        if expression is None or not expression.free_symbols:
            self.values[k] = answer
        else:
            self.symbols.update({str(symbol): k for symbol in expression.free_symbols})


class Traces:
    """The reads of each time that a model was traced; export puts back lists that are attributes of a module."""

    def __init__(self) -> None:
        self.reads: list[Reads] = []


class WatchingWrapper(WrapperWithData):
    """Returns, after the model's outputs, the tensors whose values the model has asked for."""

    def __init__(self, model: torch.nn.Module, bound: BoundCall) -> None:
        super().__init__(model, bound)
        self.traces = Traces()

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        """The flat outputs of the model, and what it asked for."""
        reads = Reads()
        self.traces.reads.append(reads)
        with answered_questions(reads.questions), _Watch(reads):
            outputs = super().forward(*tensors)
        return (*outputs, *reads.tensors)


class _Watch(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return self._list(args[0])
        if func not in PLAIN and func is not torch.Tensor.item:
            return func(*args, **(kwargs or {}))
        before = len(self._reads.questions)
        answer = func(*args, **(kwargs or {}))
        if func in PLAIN:
            del self._reads.questions[before:]  # its own way to the value
        self._reads.note(args[0], answer)
        return answer

    def _list(self, tensor: torch.Tensor) -> Any:
        if tensor.dim() == 0:
            return self.__torch_function__(torch.Tensor.item, (), (tensor,))
        return [self._list(x) for x in tensor.unbind()]


def split_reads(module: fx.GraphModule, reads: Reads) -> None:
    """Cut the tensors that were asked for off a graph's outputs; they become its ``Assumptions``.

    Args:
        module: returns them after its outputs; is changed.
        reads: of the trace that made it.
    """
    count = len(reads.tensors)
    if not count:
        return
    output = output_node(module.graph)
    results = list(output.args[0])  # type: ignore[arg-type]
    asked = results[len(results) - count :]
    inputs = [_inputs_of(node, placeholders(module.graph)) for node in asked]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in asked))
    graph.eliminate_dead_code()
    values = fx.GraphModule(module, graph, class_name="Assumptions")
    output.args = (tuple(results[: len(results) - count]),)
    module.graph.eliminate_dead_code()
    module.recompile()
    module.meta[ASSUMPTIONS] = Assumptions(values, tuple(_conditions(reads, inputs)))


def refuse_unseen(assumptions: Assumptions | None, names: Sequence[str], role: Callable[[str], str]) -> None:
    """Refuse a graph that keeps a number which changes from step to step.

    Args:
        assumptions: of the graph.
        names: of its inputs, in order.
        role: of an input.

    Raises:
        CaptureError: names the argument and the line.
    """
    for condition in assumptions.conditions if assumptions else ():
        changing = [names[k] for k in condition.inputs if role(names[k]) != "conditioning"]
        if changing and condition.pinned and isinstance(condition.expected, float):
            raise CaptureError(
                f"a number is read from {changing} with float() at {condition.place}; what is done with it cannot be seen, and "
                "a graph would keep it. Compare the tensor instead, bool(x.max() > 10), or use its .item()"
            )


def _conditions(reads: Reads, inputs: Sequence[frozenset[int]]) -> Iterator[Condition]:
    for k, value in reads.values.items():
        if inputs[k]:
            yield Condition((k,), lambda x: x, value, True, tuple(sorted(inputs[k])), reads.places[k])
    for expression, outcome in reads.questions:
        symbols = sorted((s for s in expression.free_symbols if str(s) in reads.symbols), key=str)
        if not symbols or len(symbols) != len(expression.free_symbols):
            continue
        positions = tuple(reads.symbols[str(s)] for s in symbols)
        needed = frozenset[int]().union(*(inputs[k] for k in positions))
        if needed:
            pinned = not isinstance(outcome, (bool, sympy.logic.boolalg.BooleanAtom))
            expected = outcome if pinned else bool(outcome)
            expected = float(expected) if isinstance(expected, sympy.Float) else expected
            test = sympy.lambdify(symbols, expression, modules="math")
            yield Condition(positions, test, expected, pinned, tuple(sorted(needed)), reads.places[positions[0]])


def _place() -> str:
    """The line of the model's code that asks: the innermost one outside of PyTorch and of this package."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and not frame.filename.startswith((OWN, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "the model"


def _inputs_of(node: fx.Node, inputs: Sequence[fx.Node]) -> frozenset[int]:
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return frozenset(k for k, given in enumerate(inputs) if given in seen)
