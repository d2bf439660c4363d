"""Branches on the values of arguments: a graph holds one side, and the other side runs the original."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer

import fxmask


class Conditioned(TinyTransformer):
    """Adds the conditioning; what it does with its values is up to the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = torch.nn.Linear(4, 4)

    def plain(self, x, t, context):
        return super().forward(x, t) + self.kv(context).unsqueeze(1)


class NullContext(Conditioned):
    def forward(self, x, t, context):
        y = self.plain(x, t, context)
        return -y if (context == 0).all() else y


class LargeInput(Conditioned):
    def forward(self, x, t, context):
        if x.abs().max().item() > 10:
            x = x / x.abs().max()
        return self.plain(x, t, context)


class Interval(Conditioned):
    """Guidance in an interval: two comparisons of one value, of which a tracer notes down the first."""

    def forward(self, x, t, context):
        y = self.plain(x, t, context)
        return 2 * y if 400 < t.reshape(-1)[0].item() < 800 else y


class Early(Conditioned):
    def forward(self, x, t, context):
        y = self.plain(x, t, context)
        return 2 * y if t.flatten()[0] > 500 else y


class Length(Conditioned):
    def forward(self, x, t, context):
        count = int((context > 0).sum())
        return self.plain(x, t, context) * (2 if count > 3 else 1)


class Converted(Conditioned):
    def forward(self, x, t, context):
        return self.plain(x, t, context) * (2 if context.numpy().min() < -1.5 else 1)


class Listed(Conditioned):
    def forward(self, x, t, context):
        first, *_ = context.flatten().tolist()
        return self.plain(x, t, context) * (2 if first < -1 else 1)


CONTEXT = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.3, -2.0, 1.0, 1.0]])
X = torch.linspace(-1, 1, 2 * 6 * 4).reshape(2, 6, 4)
CASES = {
    "null context": (NullContext, 900, [(X, 900, torch.zeros(2, 4)), (X, 300, CONTEXT * 2)]),
    "large input": (LargeInput, 900, [(X * 80, 900, CONTEXT), (X * 5, 900, CONTEXT)]),
    "interval, captured below": (Interval, 300, [(X, 700, CONTEXT), (X, 900, CONTEXT), (X, 100, CONTEXT)]),
    "interval, captured inside": (Interval, 700, [(X, 900, CONTEXT), (X, 300, CONTEXT), (X, 500, CONTEXT)]),
    "interval, captured above": (Interval, 900, [(X, 700, CONTEXT), (X, 300, CONTEXT)]),
    "early": (Early, 900, [(X, 100, CONTEXT), (X, 700, CONTEXT)]),
    "length": (Length, 900, [(X, 900, -CONTEXT), (X, 900, CONTEXT * 2), (X, 900, torch.ones(2, 4))]),
    "list": (Listed, 900, [(X, 900, CONTEXT - 4), (X, 900, CONTEXT + 1)]),
}


def captured(cls: type[torch.nn.Module], t: float) -> fxmask.Program:
    torch.manual_seed(0)
    return fxmask.capture(cls().eval(), {"x": X, "t": torch.tensor(t), "context": CONTEXT})


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_other_side_is_never_taken_silently(case):
    cls, t, trials = CASES[case]
    program = captured(cls, t)
    mask = fxmask.Mask.ones(program, TIMESTEPS)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    warned = 0
    for x, time, context in [(X, t, CONTEXT), *trials, (X, t, CONTEXT)]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = accelerated(x, torch.tensor(time), context)
        warned += len(caught)
        assert all("branches on the values of its arguments" in str(w.message) and __file__ in str(w.message) for w in caught)
        torch.testing.assert_close(got, program.model(x, torch.tensor(time), context))
    assert warned == 1, "once per cause"


def test_reference_and_learner_refuse_calls_of_the_other_side():
    program = captured(Early, 900)
    calls = [{"x": X, "t": torch.tensor(t), "context": CONTEXT} for t in TIMESTEPS]
    with pytest.raises(fxmask.CaptureError, match=r"branches on the values .* step 2 takes the other way"):
        fxmask.reference.run(program, fxmask.Mask.ones(program, TIMESTEPS), calls)


def test_a_package_of_a_model_that_branches_is_refused(tmp_path):
    program = captured(Early, 900)
    plan = fxmask.rectify(program, fxmask.Mask.ones(program, TIMESTEPS))
    with pytest.raises(fxmask.MaskError, match="branches on the values"):
        fxmask.compile(program, plan, backend="eager").export(tmp_path / "package")


def test_a_conversion_to_numpy_is_refused():
    with pytest.raises(fxmask.CaptureError, match="could not be captured"):
        captured(Converted, 900)


@torch.no_grad()
def test_a_number_that_changes_at_every_step_is_refused():
    class Scaled(Conditioned):
        def forward(self, x, t, context):
            return self.plain(x, t, context) * float(x.abs().max())

    with pytest.raises(fxmask.CaptureError, match=r"a number is read from \['x'\] with float\(\) at .*test_value_branches"):
        captured(Scaled, 900)
