"""Variants: the program captured for each form of call."""

from __future__ import annotations

import itertools
import threading
import warnings
from dataclasses import replace
from typing import Any

import torch

from fxmask.backends.protocol import Compiler
from fxmask.errors import CaptureError
from fxmask.frontend.recapture import recapture
from fxmask.ir.calls import BoundCall
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.passes.rectify import rectify
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore


class Variant:
    """The program captured for one form of call (shapes, types, static arguments), and its executors by start step."""

    def __init__(
        self,
        program: Program,
        mask: Mask,
        backend: str,
        mode: str | None,
        plan: Plan | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.program = program
        self.mask = mask
        self.key = program.example.key
        self._anchor = next(iter(program.weights.values()), None)
        self._place = self._anchor.device if self._anchor is not None else None
        self.graphs = GraphStore(program, backend, mode, compiler)
        self._executors: dict[int, Executor] = {}
        if plan is not None:
            self._executors[plan.start] = Executor(plan, self.graphs)

    def in_place(self) -> bool:
        """Whether the first weight is still on the device that it was captured on."""
        return self._anchor is None or self._anchor.device == self._place

    def executor(self, start: int) -> Executor:
        """Runs the mask from step ``start`` on."""
        if start not in self._executors:
            self._executors[start] = Executor(rectify(self.program, self.mask, start=start), self.graphs)
        return self._executors[start]


class Variants:
    """The programs of one accelerated model, captured when a form of call is first seen.

    Args:
        program: the first capture.
        plan: of this program.
        backend: of every variant.
        mode: of the backend.
        compiler: of the first variant, if it comes from a package, which has graphs for one form of call; others are
            compiled with Inductor then.
    """

    def __init__(self, program: Program, plan: Plan, backend: str, mode: str | None, compiler: Compiler | None = None) -> None:
        self.program = program
        self.plan = plan
        self.backend = backend
        self.mode = mode
        self.loaded = compiler is not None
        self._model = program.model
        first = Variant(program, plan.source, backend, mode, plan, compiler)
        self._known: dict[tuple[Any, ...], Variant] = {program.example.key: first}
        self._weights = weight_identities(program.model)
        self._refused: set[tuple[Any, ...]] = set()
        self._warned: set[Any] = set()
        self._lock = threading.RLock()

    @property
    def elsewhere(self) -> tuple[str, str | None]:
        """Backend and mode for other forms of call than the one that a package was made for."""
        return ("inductor", None) if self.loaded else (self.backend, self.mode)

    @property
    def known(self) -> tuple[Variant, ...]:
        """One for each form of call that was seen."""
        return tuple(self._known.values())

    @property
    def first(self) -> Variant | None:
        """That of the program's own form of call; ``None`` after weights were replaced, until such a call comes again."""
        return self._known.get(self.program.example.key)

    def executor(self) -> Executor:
        """Runs the plan at the captured form of call."""
        variant = self.first
        if variant is None:
            variant = self.of(self.program.example)
        if variant is None:
            raise CaptureError("the model cannot be captured any more as it is now; accelerate it again")
        return variant.executor(self.plan.start)

    def of(self, bound: BoundCall) -> Variant | None:
        """The variant for a form of call, captured now if it is new; ``None`` if it cannot be."""
        key = bound.key
        weights = weight_identities(self._model)
        sample = bound.tensors[self.program.signature.sample]
        if any(device != sample.device for _, _, device, _ in weights):
            # Offloading moves weights in hooks of the original's forward, which a graph does not call.
            self._warn_once("offloaded", "the weights are not where the sample is, so the original model runs, unaccelerated")
            return None
        if weights == self._weights and key in self._known:
            return self._known[key]
        with self._lock:
            if weights != self._weights:  # .half(), .to(), or modules replaced (LoRA): graphs hold the old ones
                self._known.clear()
                self._refused.clear()
                self._weights = weights
            if key in self._refused:
                return None
            if key not in self._known:
                if self.loaded:
                    self._warn_once(
                        "package",
                        f"{describe_difference(self.program.example, bound)}, so the model is captured and "
                        "compiled now; export a package from such a call",
                    )
                try:
                    program = recapture(self.program, detached_call(bound))
                except CaptureError as error:
                    self._refused.add(key)
                    self._warn_once(key, f"this form of call runs unaccelerated, with the original model: {error}")
                    return None
                self._known[key] = Variant(program, self.plan.source, *self.elsewhere)
            return self._known[key]

    def _warn_once(self, topic: Any, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=5)


def describe_difference(old: BoundCall, new: BoundCall) -> str:
    """In what a call differs from the one that a package was made for."""
    forms = [{name: f"{x.dtype}{list(x.shape)} on {x.device}" for name, x in bound.tensors.items()} for bound in (old, new)]
    name = next((name for name in {**forms[0], **forms[1]} if forms[0].get(name) != forms[1].get(name)), None)
    if name is None:
        return "the model's weights were replaced, or a call has other arguments than the package was exported for"
    return f"the package was exported for {name} {forms[0].get(name)}, it is now {forms[1].get(name)}"


def weight_identities(model: torch.nn.Module) -> tuple[Any, ...]:
    """Identity, type, place and layout of every parameter and buffer: what a captured graph relies on."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return tuple((id(x), x.dtype, x.device, x.stride()) for x in tensors)


def detached_call(bound: BoundCall) -> BoundCall:
    """A call that keeps no reference to the caller's tensors."""
    tensors = {name: x.detach().clone() for name, x in bound.tensors.items()}
    arguments = bound.rebuild(list(tensors.values()))
    return replace(bound, tensors=tensors, arguments=arguments)
