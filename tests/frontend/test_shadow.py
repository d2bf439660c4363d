"""Capture works on a shadow of the model: the model itself is touched by nothing, whatever other threads do with it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import threading
import types
import warnings
from typing import Any

import numpy
import pytest
import torch
from conftest import TinyTransformer, make_calls
from fuzz.threads import Crowd

import fxmask
from fxmask import CaptureError
from fxmask._torch import tracing
from fxmask.frontend import subject
from fxmask.frontend.shadow import shadow_of


@dataclasses.dataclass
class Settings:
    scale: float
    layers: list[torch.nn.Module]


class Slotted:
    __slots__ = ("owner", "values")

    def __init__(self, owner: torch.nn.Module) -> None:
        self.owner, self.values = owner, [1.0]


class Locked:
    """Does not let itself be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __copy__(self) -> Locked:
        raise TypeError("no copies")

    __deepcopy__ = __reduce_ex__ = None  # type: ignore[assignment]


class Rich(torch.nn.Module):
    """Holds things of every kind that refer to its own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.again = self.layer
        self.register_buffer("table", torch.ones(4))
        self.aside = [torch.nn.Linear(4, 4)]
        self.plain = torch.ones(4)
        self.settings = Settings(2.0, [self.layer])
        self.slotted = Slotted(self.layer)
        self.locked = Locked()
        self.by_name = collections.OrderedDict(a={"layer": self.layer}, b=(self.layer, 3))
        self.queue = collections.deque([self.layer, 1])
        self.names = {"x", "y"}
        self.array = numpy.ones(3)
        self.method = self.layer.forward
        self.partial = functools.partial(torch.nn.Linear.forward, self.layer)
        layer = self.layer
        self.closure = lambda x: layer(x)
        self.seen: list[int] = []
        self.layer.register_forward_hook(lambda module, args, output: self.seen.append(1))
        self.forward = types.MethodType(Rich.forward, self)  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        self.settings.scale += 1
        for run in (self.again, self.method, self.partial, self.closure, *self.aside, self.queue[0], self.slotted.owner):
            x = x + run(x) * self.table * self.plain * float(self.array[0])
        return x


@torch.no_grad()
def test_a_shadow_computes_the_same_and_has_its_own_state():
    model = Rich().eval()
    shadow = shadow_of(model)
    x = torch.randn(2, 4)
    torch.testing.assert_close(shadow(x), model(x))
    assert [id(p) for p in shadow.parameters()] == [id(p) for p in model.parameters()], "weights are shared"
    assert shadow.table is model.table
    assert shadow.plain is model.plain
    shadow(x + 1)
    assert (model.settings.scale, shadow.settings.scale) == (3.0, 4.0)
    assert (len(model.seen), len(shadow.seen)) == (4, 8), "hooks, where the module itself is called"
    assert torch.equal(model.last, x)
    inner = shadow.layer
    assert inner is not model.layer
    owners = (
        shadow.again,
        shadow.settings.layers[0],
        shadow.slotted.owner,
        shadow.by_name["a"]["layer"],
        shadow.by_name["b"][0],
    )
    assert all(owner is inner for owner in owners)
    assert shadow.queue[0] is shadow.method.__self__ is shadow.partial.args[0] is inner
    assert shadow.closure.__closure__[0].cell_contents is inner
    assert shadow.forward.__self__ is shadow
    assert shadow.array is not model.array
    assert shadow.locked.lock is model.locked.lock
    assert type(shadow.by_name) is collections.OrderedDict
    inner.weight = torch.nn.Parameter(torch.zeros(4, 4))
    assert not torch.equal(model.layer.weight, inner.weight)


def test_the_model_is_never_seen_with_other_weights():
    """Exporting puts fake tensors in the place of parameters."""
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    calls, seen, done = make_calls(), [], threading.Event()
    with torch.no_grad():
        wanted = model(**calls[0])

    def look() -> None:
        with torch.no_grad():
            while not done.is_set():
                seen.append({type(p) for p in model.parameters()} == {torch.nn.Parameter})
                seen.append(torch.equal(model(**calls[0]), wanted))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for batch in (2, 3):
            fxmask.capture(model, make_calls(batch)[0])
    finally:
        done.set()
        thread.join()
    assert len(seen) > 10
    assert all(seen)


def test_a_model_that_changes_all_the_time_is_refused_by_name(monkeypatch):
    class Counting(TinyTransformer):
        count = 0

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t) * (1 + 0 * self.count)

    model = Counting().eval()
    take = subject.shadow_of

    def slow(given: Any) -> Any:
        model.count += 1  # as another thread would
        return take(given)

    monkeypatch.setattr(subject, "shadow_of", slow)
    with pytest.raises(CaptureError, match=r"changes while it is captured \(count: .*another thread"):
        fxmask.capture(model, make_calls()[0])


def test_a_crowd():
    """``python tests/fuzz/threads.py`` runs longer, with more forms."""
    crowd = Crowd(forms=5)
    crowd.run(seconds=4.0, threads=6)
    assert not crowd.wrong, crowd.wrong[:3]
    assert crowd.counts["whole runs"] > 0
    assert crowd.counts["bad calls that failed"] > 0


def test_a_form_that_failed_is_not_traced_again(monkeypatch):
    torch.manual_seed(0)
    program = fxmask.capture(TinyTransformer().eval(), make_calls()[0])
    accelerated = fxmask.compile(
        program,
        fxmask.Mask.ones(program, (900.0,)) and fxmask.rectify(program, fxmask.Mask.ones(program, (900.0,))),
        backend="eager",
    )
    from fxmask.runtime import variants

    traced = []
    recapture = variants.recapture
    monkeypatch.setattr(variants, "recapture", lambda *a: traced.append(1) or recapture(*a))
    bad = {"x": torch.randn(2, 6, 5), "t": torch.tensor(900)}
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            accelerated(**bad)
    assert len(traced) == 1
    for width in range(6, 6 + variants.MOST_REFUSED + 3):
        with contextlib.suppress(RuntimeError):
            accelerated(**{**bad, "x": torch.randn(2, 6, width)})
    assert len(accelerated._fxmask.variants._refused) <= variants.MOST_REFUSED


def test_a_model_that_failed_only_while_it_was_captured_is_named(monkeypatch):
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    plan = fxmask.rectify(program, fxmask.Mask.ones(program, (900.0,)))
    accelerated = fxmask.compile(program, plan, backend="eager")
    from fxmask.runtime import variants

    def fails(*_: Any) -> None:
        raise MemoryError("no room just now")

    monkeypatch.setattr(variants, "recapture", fails)
    call = make_calls(batch=3)[0]
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"failed while it was captured.*no room just now.*original model runs"),
    ):
        torch.testing.assert_close(accelerated(**call), model(**call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerated(**call)


def test_other_threads_call_modules_while_one_traces():
    """Tracers replace ``Module.__call__`` for the whole process."""
    found: list[Any] = []
    entered, leave = threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            entered.set()
            leave.wait(5)
            return x + 1

    other = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    x = torch.ones(1, 4)
    wanted = other(x)

    def work() -> None:
        entered.wait(5)
        try:
            found.append(torch.equal(other(x), wanted))
        except Exception as error:
            found.append(error)
        leave.set()

    thread = threading.Thread(target=work)
    thread.start()
    with tracing():
        traced = torch.fx.symbolic_trace(Slow())
    thread.join()
    assert found == [True]
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"], "the tracer was at work"


def test_another_thread_traces_by_itself_meanwhile():
    """What its tracer patches is reached by that thread, not by the one that holds the turn."""
    found: list[Any] = []
    held, done = threading.Event(), threading.Event()

    def work() -> None:
        held.wait(5)
        traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
        found.append([node.op for node in traced.graph.nodes])
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with tracing(), tracing():
        held.set()
        done.wait(10)
    thread.join()
    assert found == [["placeholder", "call_module", "call_module", "output"]]
