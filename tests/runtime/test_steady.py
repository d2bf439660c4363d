"""The short way of a call that goes on as its lane did gives what the long way gives, whatever comes in between."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from conftest import TIMESTEPS, every_other

import fxmask
from fxmask.runtime.generation import Generation


class Denoiser(torch.nn.Module):
    """Conditioning in a tensor and in a dictionary, plain values, and a list of residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.text, self.time = torch.nn.Linear(4, 8), torch.nn.Linear(3, 8), torch.nn.Linear(1, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.out = torch.nn.Linear(8, 4)
        self.strength = 1.0

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        added: Any = None,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> Any:
        time = self.time(t.reshape(-1, 1).to(x.dtype) / 1000).unsqueeze(1)
        h = self.inp(x) + self.text(text)
        if added is not None:
            h = h + added["size"].unsqueeze(1)
        for layer in self.layers:
            h = h + scale * self.strength * torch.tanh(layer(h) + time)
        out = self.out(h)
        return {"sample": out} if return_dict else (out,)


SEEDS = 3


@pytest.fixture(scope="module")
def program() -> fxmask.Program:
    torch.manual_seed(0)
    call = {
        "x": torch.randn(2, 6, 4),
        "t": torch.tensor(900),
        "text": torch.randn(2, 6, 3),
        "added": {"size": torch.randn(2, 8)},
    }
    return fxmask.capture(Denoiser().eval(), call, roles={"text": "conditioning", "added": "conditioning"})


class User:
    """Calls a denoiser in ways that are random, but the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.texts = [self.randn(2, 6, 3) for _ in range(2)]
        self.sizes = {"size": self.randn(2, 8)}
        self.timesteps = torch.tensor(TIMESTEPS).long()
        self.steps, self.form = [0, 0], "view"

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def call(self, model: Any, lane: int) -> Any:
        """One call of a lane, at its next step or at another one."""
        chance = self.rng.random()
        if chance < 0.04:
            self.steps[lane] = self.rng.randrange(len(TIMESTEPS))
        elif chance < 0.07:
            self.steps[lane] = 0
        step = self.steps[lane] % len(TIMESTEPS)
        self.steps[lane] = step + 1
        batch = 3 if self.rng.random() < 0.04 else 2
        t: Any = self.timesteps[step]
        if self.rng.random() < 0.1:
            self.form = self.rng.choice(["view", "batch", "number", "new", "float"])
        form = self.form
        t = {"view": t, "batch": t.expand(batch), "number": int(t), "new": t.clone(), "float": t.float() * (1 + 2e-6)}[form]
        text = self.texts[lane]
        if self.rng.random() < 0.04:
            text.mul_(1.5)  # in place
        if self.rng.random() < 0.1:
            text = text.clone()
        x, sizes = self.randn(batch, 6, 4), dict(self.sizes)
        if batch == 3:
            text, sizes = torch.cat([text, text[:1]]), {"size": torch.cat([sizes["size"], sizes["size"][:1]])}
        kwargs: dict[str, Any] = {"added": sizes}
        if self.rng.random() < 0.05:
            kwargs["return_dict"] = False
        if self.rng.random() < 0.03:
            kwargs["scale"] = 0.5
        if self.rng.random() < 0.03:
            model.strength = self.rng.choice([1.0, 2.0])
        if self.rng.random() < 0.05:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        positional = self.rng.random() < 0.05
        with torch.set_grad_enabled(self.rng.random() < 0.2):
            output = model(x, t, text, **kwargs) if positional else model(x=x, t=t, text=text, **kwargs)
        return output["sample"] if isinstance(output, dict) else output[0]

    def run(self, model: Any, lanes: int, marked: bool) -> list[torch.Tensor]:
        """Some images' worth of calls."""
        results: list[torch.Tensor] = []
        for _ in range(4):
            generation = model.generation() if marked else None
            if generation is not None:
                generation.__enter__()
            for _ in range(8):
                results += [self.call(model, lane).detach().clone() for lane in range(lanes)]
            if generation is not None:
                generation.__exit__(None, None, None)
        return results


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("lanes", [1, 2])
def test_whatever_comes_the_long_way_gives_the_same(program, monkeypatch, lanes, marked):
    short = 0
    follow = Generation.follow

    def counted(self: Generation, *given: Any) -> Any:
        nonlocal short
        found = follow(self, *given)
        short += found is not None
        return found

    for seed in range(SEEDS):
        results, reports = [], []
        for way in (counted, lambda *given: None):
            monkeypatch.setattr(Generation, "follow", way)
            program.model.strength = 1.0
            model = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
            results.append(User(seed).run(model, lanes, marked))
            reports.append([(run.calls, run.followed, run.macs) for run in model.report().runs])
        program.model.strength = 1.0
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), seed
        assert reports[0] == reports[1], seed
    assert short > SEEDS * 4  # it was taken


def test_nested_conditioning_takes_the_short_way(program, monkeypatch):
    """A dictionary that is made anew for each call, of the same tensors."""
    model = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
    text, size, x = torch.randn(2, 6, 3), torch.randn(2, 8), torch.randn(2, 6, 4)
    monkeypatch.setattr(Generation, "_siblings", _once(Generation._siblings))
    with model.generation(), torch.no_grad():
        for t in torch.tensor(TIMESTEPS).long():
            model(x, t, text, added={"size": size}, return_dict=False)


def _once(function: Any) -> Any:
    """Fails when it is called again."""
    calls: list[int] = []

    def checked(*given: Any) -> Any:
        calls.append(1)
        assert len(calls) == 1, "a later call was looked at closely"
        return function(*given)

    return checked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_timesteps_take_the_short_way(monkeypatch, dtype):
    torch.manual_seed(0)
    timesteps = (981.0, 721.0, 501.0, 301.0, 101.0)
    call = {"x": torch.randn(2, 6, 4), "t": torch.tensor(981), "text": torch.randn(2, 6, 3)}
    program = fxmask.capture(
        Denoiser().eval().to(dtype), {k: v.to(dtype) for k, v in call.items()}, roles={"text": "conditioning"}
    )
    model = fxmask.compile(program, fxmask.rectify(program, every_other(program, timesteps)), backend="eager")
    monkeypatch.setattr(Generation, "_siblings", _once(Generation._siblings))
    text = torch.randn(2, 6, 3).to(dtype)
    with model.generation() as generation, torch.no_grad():
        for t in torch.tensor(timesteps).to(dtype):
            model(torch.randn(2, 6, 4).to(dtype), t, text)
    assert generation.matched == len(timesteps) - 1


@pytest.mark.filterwarnings("ignore:autocast was None")
def test_modes_that_change_in_the_middle_of_a_run(program):
    model = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
    text, added, x = torch.randn(2, 6, 3), {"size": torch.randn(2, 8)}, torch.randn(2, 6, 4)
    t = torch.tensor(TIMESTEPS).long()
    with model.generation(), torch.no_grad():
        for i in range(2):
            model(x, t[i], text, added=added)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(x, t[2], text, added=added)["sample"]
            assert torch.equal(got, program.model(x, t[2], text, added=added)["sample"])
    assert got.dtype == torch.bfloat16


class TimestepFirst(torch.nn.Module):
    """Its first argument is the timestep, and each step reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x) + t.reshape(-1, 1) / 1000)
        return x


def test_a_number_as_the_first_argument(monkeypatch):
    torch.manual_seed(0)
    program = fxmask.capture(TimestepFirst().eval(), {"t": torch.tensor(900), "x": torch.randn(2, 4)})
    mask = every_other(program)
    model = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    calls = [{"t": int(t), "x": torch.randn(2, 4)} for t in TIMESTEPS]
    expected = fxmask.reference.run(program, mask, [{**call, "t": torch.tensor(call["t"])} for call in calls])
    monkeypatch.setattr(Generation, "_siblings", _once(Generation._siblings))
    with model.generation(), torch.no_grad():
        assert all(torch.equal(model(**call), want) for call, want in zip(calls, expected, strict=True))


@pytest.mark.filterwarnings("ignore:none of 2 denoiser calls")
def test_a_call_that_is_of_no_run_prepares_nothing(program):
    """A lane whose first call was of a form that is looked at each time, and then a stray call with other conditioning."""
    mask, added, x = every_other(program), {"size": torch.randn(2, 8)}, torch.randn(2, 6, 4)
    texts = [torch.randn(2, 6, 3) for _ in range(2)]
    model = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    first = numpy.float64(TIMESTEPS[0])  # no plain number
    with model.generation() as generation, torch.no_grad():
        model(x, first, texts[0], added=added)
        model(x, 650.0, texts[1], added=added)
        assert [lane.steady for lane in generation._lanes] == [None, None]
