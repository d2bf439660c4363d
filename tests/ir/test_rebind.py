"""A call that is bound like the one before it is bound as if it were the first."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy
import pytest
import torch

from fxmask.errors import InputError
from fxmask.ir.calls import Signature
from fxmask.ir.rebind import Rebinder


class Net(torch.nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor | float,
        text: torch.Tensor | None = None,
        scale: float | bool | str = 1.0,
        more: Any = None,
        return_dict: bool = True,
    ) -> torch.Tensor:
        return x


@dataclasses.dataclass
class Extra:
    shift: torch.Tensor


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 4)))


CALLS: list[Any] = [
    lambda: ((), {"x": x(), "t": torch.tensor(900)}),
    lambda: ((x(), torch.tensor(700)), {}),
    lambda: ((x(),), {"t": torch.tensor([700, 700])}),
    lambda: ((), {"t": torch.tensor(900), "x": x()}),
    lambda: ((), {"x": x(3, 3, 4), "t": torch.tensor(900.0)}),
    lambda: ((), {"x": x(2, 4, 3).transpose(1, 2), "t": torch.tensor(900)}),
    lambda: ((), {"x": x(), "t": 900}),
    lambda: ((), {"x": x(), "t": 900.5}),
    lambda: ((), {"x": x(), "t": True}),
    lambda: ((), {"x": x(), "t": numpy.float32(0.5)}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "text": x(2, 5)}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "text": x(5, 2).T}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "text": None}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "scale": 1}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "scale": 1.0}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "scale": True}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "scale": float("nan")}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "scale": "linear"}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "scale": x(1)}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "more": {"a": x(2)}}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "more": [x(2), 3]}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "more": Extra(x(2))}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "more": numpy.ones(2)}),
    lambda: ((), {"x": x(), "t": torch.tensor(900), "return_dict": False}),
    lambda: ((), {"x": [x(3, 4), x(3, 4)], "t": torch.tensor(900)}),
    lambda: ((), {"x": torch.nn.Parameter(x()), "t": torch.tensor(900)}),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    return type(a) is type(b) and (a == b or a is b or repr(a) == repr(b))


@pytest.mark.parametrize("fixed", [(), ("text",)])
@pytest.mark.parametrize("seed", range(6))
def test_every_call_after_every_other(seed, fixed):
    signature = dataclasses.replace(Signature.of(Net()), fixed=fixed)
    bind, rng = Rebinder(signature), random.Random(seed)
    for _ in range(150):
        args, kwargs = rng.choice(CALLS)()
        for _ in range(rng.choice([1, 2])):  # the second time there is a template of just this call
            found, wanted = bind(args, kwargs), signature.bind(args, kwargs)
            assert list(found.tensors) == list(wanted.tensors)
            assert all(same(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)
            assert found.key == wanted.key
            assert repr(found.static) == repr(wanted.static)
            assert (found.layout, found.spec, found.samples) == (wanted.layout, wanted.spec, wanted.samples)
            assert list(found.arguments) == list(wanted.arguments)
            assert same(found.timestep, wanted.timestep)
            again = found.rebuild(list(found.tensors.values()))
            assert list(again) == list(wanted.rebuild(list(wanted.tensors.values())))


def test_a_template_is_used(monkeypatch):
    signature, calls = Signature.of(Net()), []
    bind = Rebinder(signature)
    whole = Signature.bind
    monkeypatch.setattr(Signature, "bind", lambda self, *a: calls.append(1) or whole(self, *a))
    for t in (900, 700, 500):
        bind((), {"x": x(), "t": torch.tensor(t), "text": x(2, 5), "return_dict": False})
    assert len(calls) == 1


def test_a_call_that_does_not_fit_is_refused_after_one_that_did():
    bind = Rebinder(Signature.of(Net()))
    bind((), {"x": x(), "t": torch.tensor(900)})
    with pytest.raises(InputError, match="cannot be called like this"):
        bind((), {"x": x(), "tt": torch.tensor(900)})
    with pytest.raises(InputError, match="must be a tensor"):
        bind((), {"x": None, "t": torch.tensor(900)})
