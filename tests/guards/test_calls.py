"""What surrounds a call, what is passed to it, and when: modes, gradients, arguments that are no tensors, timesteps."""

from __future__ import annotations

import dataclasses
import warnings

import numpy
import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, make_calls

import fxmask
from fxmask.guards.values import key_of
from fxmask.runtime.timesteps import Timetable


def accelerate(model, call, roles=None, full=True, timesteps=TIMESTEPS, backend="eager"):
    program = fxmask.capture(model, call, roles)
    mask = fxmask.Mask.ones(program, timesteps) if full else fxmask.policies.interval(2)(program, timesteps)
    return fxmask.compile(program, fxmask.rectify(program, mask), backend=backend)


def tiny_model():
    torch.manual_seed(0)
    return TinyTransformer().eval()


# Modes around a call


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_autocast(captured, backend):
    model, calls = tiny_model(), make_calls()
    with torch.autocast("cpu", torch.bfloat16, enabled=captured):
        accelerated = accelerate(model, calls[0], backend=backend)
    for enabled in (captured, not captured, captured):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for call in calls[:3]:
                got, wanted = accelerated(**call), model(**call)
                assert got.dtype == wanted.dtype
                tolerance = 2e-2 if enabled else 1e-5
                torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert len(accelerated._fxmask.variants) == 2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_a_part_without_autocast_inside_of_it(backend):
    """A graph has the casts in it; what it computes in float32 is not cast when it runs under autocast."""

    class Exact(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                weight = self.embed.weight.reshape(-1)[:4].diag()
                exact = torch.nn.functional.linear(x, weight)
            return super().forward(x, t).float() * 1e-3 + exact

    torch.manual_seed(0)
    model, calls = Exact().eval(), make_calls()
    with torch.autocast("cpu", torch.bfloat16):
        accelerated = accelerate(model, calls[0], backend=backend)
        for call in calls[:2]:
            got, wanted = accelerated(**call), model(**call)
            assert got.dtype == wanted.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_default_type_is_part_of_a_graph():
    class Makes(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t) + torch.ones(4)

    torch.manual_seed(0)
    model, call = Makes().eval(), make_calls()[0]
    accelerated = accelerate(model, call)
    accelerated(**call)
    torch.set_default_dtype(torch.float64)
    try:
        got, wanted = accelerated(**call), model(**call)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(got, wanted)


@torch.no_grad()
def test_modes_of_attention_and_determinism_are_part_of_a_variant():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, call = tiny_model(), make_calls()[0]
    accelerated = accelerate(model, call)
    accelerated(**call)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(accelerated(**call), model(**call))
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(accelerated(**call), model(**call))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(accelerated._fxmask.variants) == 3
    accelerated(**call)
    assert len(accelerated._fxmask.variants) == 3


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_inference_mode(backend):
    model, calls = tiny_model(), make_calls()
    accelerated = accelerate(model, calls[0], full=False, backend=backend)
    with torch.no_grad():
        wanted = [accelerated(**call) for call in calls]
    with torch.inference_mode():
        calls = [{name: x.clone() for name, x in call.items()} for call in calls]
        got = [accelerated(**call) for call in calls[:3]]
    got += [accelerated(**call) for call in calls[3:]]  # it ends in the middle of a run
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_guidance_by_a_gradient_through_the_denoiser():
    model, call = tiny_model(), make_calls()[0]
    accelerated = accelerate(model, call)

    def gradient(denoiser):
        x = call["x"].clone().requires_grad_()
        clean = (x - 0.6 * denoiser(x, call["t"])) / 0.8
        return torch.autograd.grad(((clean - 1) ** 2).sum(), x)[0]

    with pytest.warns(UserWarning, match="gradient is taken through the denoiser") as caught:
        got = gradient(accelerated)
    assert caught[0].filename == __file__
    torch.testing.assert_close(got, gradient(model))
    torch.testing.assert_close(gradient(accelerated), gradient(model))  # said once


@pytest.mark.parametrize("transform", ["jvp", "vjp", "dual"])
@pytest.mark.filterwarnings("ignore:a gradient is taken")
def test_transforms_run_the_original(transform):
    model, call = tiny_model(), make_calls()[0]
    accelerated = accelerate(model, call)
    x, tangent = call["x"], torch.randn_like(call["x"])

    def derivative(denoiser):
        if transform == "jvp":
            return torch.func.jvp(lambda y: denoiser(y, call["t"]), (x,), (tangent,))[1]
        if transform == "vjp":
            return torch.func.vjp(lambda y: denoiser(y, call["t"]), x)[1](tangent)[0]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            return torch.autograd.forward_ad.unpack_dual(denoiser(dual, call["t"])).tangent

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one with a forward-mode derivative
        torch.testing.assert_close(derivative(accelerated), derivative(model))


# Arguments that are no tensors


@dataclasses.dataclass
class Conditioning:
    mask: torch.Tensor
    factor: float = 1.0


class Plain:
    def __init__(self, mask, factor=1.0):
        self.mask, self.factor = mask, factor


class Slots:
    __slots__ = ("factor", "mask")

    def __init__(self, mask, factor=1.0):
        self.mask, self.factor = mask, factor


class Items(dict):
    @property
    def mask(self):
        return self["mask"]

    factor = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Conditioning

    @property
    def mask(self):
        return self.inner.mask

    @property
    def factor(self):
        return self.inner.factor


OBJECTS = {
    "dataclass": Conditioning,
    "object": Plain,
    "slots": Slots,
    "dict": lambda mask, factor=1.0: Items(mask=mask),
    "nested": lambda mask, factor=1.0: Frozen(Conditioning(mask, factor)),
}


class TakesObject(TinyTransformer):
    def forward(self, x: torch.Tensor, t: torch.Tensor, cond) -> torch.Tensor:
        return super().forward(x, t) * (1 + cond.mask.mean()) * cond.factor


@pytest.mark.parametrize("kind", OBJECTS)
@torch.no_grad()
def test_tensors_inside_of_objects_are_inputs(kind):
    make = OBJECTS[kind]
    torch.manual_seed(0)
    model, call = TakesObject().eval(), make_calls()[0]
    accelerated = accelerate(model, {**call, "cond": make(torch.ones(64, 64))})
    for mean in (1.0, 0.5, -2.0):
        cond = make(torch.full((64, 64), mean))
        torch.testing.assert_close(accelerated(**call, cond=cond), model(**call, cond=cond))
    assert len(accelerated._fxmask.variants) == 1
    cond = make(torch.ones(64, 64), 3.0)
    torch.testing.assert_close(accelerated(**call, cond=cond), model(**call, cond=cond))
    assert len(accelerated._fxmask.variants) == (1 if kind == "dict" else 2)


class TakesValue(TinyTransformer):
    def forward(self, x: torch.Tensor, t: torch.Tensor, value) -> torch.Tensor:
        first = value["a"] if isinstance(value, dict) else value[0] if isinstance(value, (list, numpy.ndarray)) else value
        return super().forward(x, t) * (first if isinstance(first, float) else float(first))


def big(first):
    array = numpy.zeros(5000)
    array[0] = first
    return array


VALUES = {
    "number": (1.0, 2.0),
    "array": (big(1.0), big(2.0)),
    "list": ([1.0], [2.0]),
    "dict": ({"a": 1.0}, {"a": 2.0}),
    "numpy number": (numpy.float32(1.0), numpy.float32(2.0)),
    "whole number": (1, 2),
}


@pytest.mark.parametrize("kind", VALUES)
@torch.no_grad()
def test_values_are_compared_by_value(kind):
    torch.manual_seed(0)
    model, call = TakesValue().eval(), make_calls()[0]
    one, two = VALUES[kind]
    accelerated = accelerate(model, {**call, "value": one})
    for value in (one, two, one, two):
        torch.testing.assert_close(accelerated(**call, value=value), model(**call, value=value))
    assert len(accelerated._fxmask.variants) == 2


@torch.no_grad()
def test_values_that_look_alike_are_told_apart():
    """``repr`` shows dots for the middle of a large array."""

    class TakesMiddle(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor, value) -> torch.Tensor:
            return super().forward(x, t) * float(value[2500])

    torch.manual_seed(0)
    model, call = TakesMiddle().eval(), make_calls()[0]
    one, two = numpy.zeros(5000), numpy.zeros(5000)
    one[2500], two[2500] = 1.0, 2.0
    assert repr(one) == repr(two)
    accelerated = accelerate(model, {**call, "value": one})
    for value in (one, two, one):
        torch.testing.assert_close(accelerated(**call, value=value), model(**call, value=value))
    assert len(accelerated._fxmask.variants) == 2


@torch.no_grad()
def test_a_value_that_is_changed_in_place():
    torch.manual_seed(0)
    model, call, value = TakesValue().eval(), make_calls()[0], [1.0]
    accelerated = accelerate(model, {**call, "value": value})
    for first in (1.0, 0.5, 1.0):
        value[0] = first
        torch.testing.assert_close(accelerated(**call, value=value), model(**call, value=value))


@torch.no_grad()
def test_a_number_per_step_is_bounded_and_named():
    torch.manual_seed(0)
    model, call = TakesValue().eval(), make_calls()[0]
    accelerated = accelerate(model, {**call, "value": 1.0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(15):
            value = 0.1 * k
            torch.testing.assert_close(accelerated(**call, value=value), model(**call, value=value))
    assert len(accelerated._fxmask.variants) <= 8
    assert [w for w in caught if "argument value has had 6 values" in str(w.message)]
    assert len(caught) == 1


def test_keys_of_values():
    assert key_of(1) != key_of(1.0) != key_of(True)
    assert key_of(float("nan")) == key_of(float("nan"))
    assert key_of(Conditioning(1, 2.0)) == key_of(Conditioning(1, 2.0)) != key_of(Plain(1, 2.0))
    assert key_of({"a": [1, (2, {3})]}) == key_of({"a": [1, (2, {3})]}) != key_of({"a": [1, (2, {4})]})
    assert key_of(big(1.0)) != key_of(big(2.0))
    assert key_of(print) == key_of(print) != key_of(len)


# Timesteps


@pytest.mark.parametrize("kind", [numpy.int64, numpy.float32, int, float, torch.tensor])
@torch.no_grad()
def test_numbers_of_every_kind_as_timesteps(kind):
    class Takes(TinyTransformer):
        def forward(self, x: torch.Tensor, t) -> torch.Tensor:
            return super().forward(x, torch.as_tensor(t))

    torch.manual_seed(0)
    model, calls = Takes().eval(), make_calls()
    program = fxmask.capture(model, calls[0])
    mask = every_other(program)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    wanted = fxmask.reference.run(program, mask, calls)
    for _ in range(2):
        got = [accelerated(call["x"], kind(int(t))) for call, t in zip(calls, TIMESTEPS, strict=True)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def follows(timetable: Timetable, values, types) -> int:
    """How many timesteps are found in order."""
    return sum(timetable.step_of(value, types, i) == i for i, value in enumerate(values))


def rounded(values, *types):
    """Timesteps after they were cast, scaled by 1/1000 in that type, and back."""
    x = torch.tensor(values, dtype=torch.float64)
    for kind in types:
        x = x.to(kind)
    return x.double().tolist()


SCHEDULES = {
    "50 of 1000": [float(t) for t in range(981, 0, -20)],
    "28 shifted": [1000 * 3 * s / (1 + 2 * s) for s in torch.linspace(1, 1 / 28, 28).tolist()],
    "every one": [float(t) for t in range(999, -1, -1)],
    "karras": [80 ** (1 - i / 39) * 0.002 ** (i / 39) for i in range(40)],
    "to one": [1 - i / 50 for i in range(50)],
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_timesteps_are_found_after_the_rounding_of_their_type(name, kind):
    values = SCHEDULES[name]
    timetable = Timetable(values)
    assert follows(timetable, rounded(values, kind), [kind, kind]) == len(values)
    assert follows(timetable, rounded(values, kind), [torch.float32, kind]) == len(values)
    if name != "every one":  # there a bfloat16 in a float32 is as good as another timestep
        assert follows(timetable, rounded(values, kind), [torch.float32, torch.float32]) == len(values)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_timesteps_are_found_after_they_were_scaled_in_their_type(kind):
    values = SCHEDULES["28 shifted"]
    timetable = Timetable([t / 1000 for t in values])
    scaled = (torch.tensor(values).to(kind) / 1000).double().tolist()
    assert follows(timetable, scaled, [kind, kind]) == len(values)
    assert follows(timetable, scaled, [torch.float32, kind]) == len(values)


def test_a_countdown_in_float32():
    timetable = Timetable([1 - i / 49 for i in range(49)])
    now, values = torch.tensor(1.0), []
    for _ in range(49):
        values.append(float(now))
        now = now - 1 / 49
    assert follows(timetable, values, [torch.float32, torch.float32]) == 49


def test_timesteps_of_another_schedule_are_not_found():
    timetable = Timetable(SCHEDULES["50 of 1000"])
    others = [float(t) for t in range(971, 0, -20)]
    assert follows(timetable, others, [torch.float32, torch.float32]) == 0
    assert timetable.step_of(930.5, [torch.float32, torch.float32], None) is None


@torch.no_grad()
def test_a_rounded_timestep_is_computed_as_it_is(tables):
    """The table holds the plan's timesteps; a call at a rounded one must not be answered with those."""
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    timesteps = (999.0, 777.0, 555.0, 333.0, 111.0)
    accelerated = accelerate(model, {"x": torch.randn(2, 6, 4), "t": torch.tensor(999.0)}, timesteps=timesteps)
    with accelerated.generation() as run:
        for t in timesteps:
            x, rounded_t = torch.randn(2, 6, 4), torch.tensor(t).bfloat16().float()
            torch.testing.assert_close(accelerated(x, rounded_t), model(x, rounded_t), rtol=1e-5, atol=1e-5)
    assert run.matched == 4


# What is said


def test_conditioning_that_changes_at_every_step_is_named():
    class Own(TinyTransformer):
        """Self-conditioning: the prediction before."""

        def forward(self, x: torch.Tensor, t: torch.Tensor, before=None) -> torch.Tensor:
            return super().forward(x if before is None else x + before, t)

    torch.manual_seed(0)
    model, calls = Own().eval(), make_calls()
    for roles, matched in ((None, 0), ({"before": "step"}, 3)):
        accelerated = accelerate(model, {**calls[0], "before": torch.zeros(2, 6, 4)}, roles, full=False)
        before = None
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            with accelerated.generation() as run:
                for call in calls:
                    before = accelerated(**call, before=before)
        assert run.matched == matched
        messages = [str(w.message) for w in caught]
        assert bool(messages) == (roles is None)
        assert all("'before'" in m and "roles={'before': 'step'}" in m for m in messages)


def test_a_role_of_an_argument_that_was_none_is_kept():
    class Own(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor, before=None) -> torch.Tensor:
            return super().forward(x if before is None else x + before, t)

    model, calls = Own().eval(), make_calls()
    accelerated = accelerate(model, {**calls[0], "before": None}, {"before": "step"}, full=False)
    accelerated(**calls[0], before=torch.randn(2, 6, 4))
    assert [p.roles.get("before") for p in accelerated.programs if "before" in p.roles] == ["step"]


def test_the_report_says_what_the_latest_runs_did(tiny):
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="eager")
    assert accelerated.report().runs == ()
    for call in make_calls():
        accelerated(**call)
    (run,) = accelerated.report().runs
    assert (run.calls, run.followed, run.original) == (5, 4, 0)
    assert run.ratio == pytest.approx(accelerated.plan.mac_ratio)
    assert "5 calls, 4 followed the plan" in str(accelerated.report())
    with pytest.warns(UserWarning, match="nothing was accelerated"):
        for call in make_calls(timesteps=(990, 890, 790, 690)):
            accelerated(**call)
    last = accelerated.report().runs[-1]
    assert (last.calls, last.followed, last.ratio) == (4, 0, 1.0)
    assert accelerated.report().to_dict()["runs"][0]["calls"] == 5
