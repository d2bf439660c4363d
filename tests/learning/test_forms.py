"""Calls of several forms in recorded runs: lanes and runs with prompts, batches and images of other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyLayer, ddim, tiny_unet

import fxmask
from fxmask import InputError
from fxmask.learning.adjoint import refine_all
from fxmask.learning.effort import EFFORTS, Limits
from fxmask.learning.finalists import free_coefficients
from fxmask.learning.forms import Forms
from fxmask.learning.levels import evenly, levels_of
from fxmask.learning.search import Search
from fxmask.learning.student import Student


class TextNet(torch.nn.Module):
    """Tokens that attend to a prompt of any length."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(1, width)
        self.text = torch.nn.Linear(5, width)
        self.layers = torch.nn.ModuleList(TinyLayer(width) for _ in range(depth))
        self.inp, self.head = torch.nn.Linear(4, width), torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        time = self.embed(t.reshape(-1, 1).to(x.dtype) / 1000)
        prompt, x = heads(self.text(text)), self.inp(x) * scale
        for layer in self.layers:
            x = x + torch.nn.functional.scaled_dot_product_attention(heads(x), prompt, prompt).transpose(1, 2).flatten(2)
            x = layer(x, time)
        return self.head(x)


def heads(x: torch.Tensor) -> torch.Tensor:
    """Two heads; by sizes, which a graph is specialised to."""
    return x.reshape(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)


class Pipe:
    """Two calls a step, with and without a prompt, or one."""

    def __init__(self, net: torch.nn.Module, eta: float = 0.0) -> None:
        self.net, self.scheduler, self.eta = net, ddim(), eta

    def __call__(
        self, lengths: tuple[int, ...] = (7, 4), batch: int = 2, tokens: int = 6, scales: Any = None, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randn(batch, n, 5, generator=generator) for n in lengths]
        self.scheduler.set_timesteps(6)
        x = torch.randn(batch, tokens, 4, generator=generator)
        for i, t in enumerate(self.scheduler.timesteps):
            extra = {} if scales is None else {"scale": scales[i]}
            with torch.no_grad():
                predictions = [self.net(x, t, text, **extra) for text in texts]
            e = predictions[0] if len(texts) == 1 else 1.5 * predictions[0] - 0.5 * predictions[1]
            x = self.scheduler.step(e, t, x, eta=self.eta, generator=generator).prev_sample


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return TextNet().eval()


def captured(run):
    return fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)


def final(program, plan, run):
    return run.rollout(fxmask.compile(program, plan, backend="eager"))


@pytest.fixture(scope="module")
def mixed(net):
    """Stochastic runs: two lanes of different lengths, other lengths, batches and sizes from run to run."""
    pipe = Pipe(net, eta=1.0)
    calls = [{"lengths": (7, 4)}, {"lengths": (5, 7), "batch": 3, "seed": 1}, {"lengths": (7, 7), "tokens": 10, "seed": 2}]
    runs = [fxmask.record_pipeline(pipe, **call) for call in calls]
    return captured(runs[0]), runs


def test_lanes_and_runs_of_several_forms(mixed):
    program, runs = mixed
    student = Student(program, runs)
    assert student.program is program
    assert [[p.example.tensors["text"].shape[:2] for p in lanes] for lanes in student.programs] == [
        [(2, 7), (2, 4)],
        [(3, 5), (3, 7)],
        [(2, 7), (2, 7)],
    ]
    assert student.programs[2][0] is student.programs[2][1]
    mask = fxmask.learn(program, runs, speedup=1.5, effort="quick", progress=False)
    plan = fxmask.rectify(program, mask)
    assert plan.mac_ratio == pytest.approx(1.5, rel=0.03)
    for run in runs:
        assert final(program, plan, run).shape == run.final.shape


def test_what_is_scored_is_what_runs_in_every_form(mixed):
    program, runs = mixed
    student = Student(program, runs)
    for level in levels_of(student, 2):
        schedule = evenly(student, level, 0.6)
        if schedule is None:
            continue
        rolled = student.rollout(schedule)
        plan = fxmask.rectify(program, student.mask(schedule, rolled.coefficients))
        for run, expected in zip(runs, rolled.finals, strict=True):
            assert torch.allclose(final(program, plan, run), expected, rtol=1e-3, atol=1e-4), level


def test_coefficients_are_refined_in_every_form(mixed):
    program, runs = mixed
    search = Search(program, runs, effort=EFFORTS["default"], limits=Limits(), seed=0, progress=False)
    student = search.student
    level = next(x for x in search.levels if x.name == "branches" and x.history == 1)
    plain = search.measured.evaluate(evenly(student, level, 0.6))
    freed = free_coefficients(student, plain, Limits())
    assert freed.schedule.blend == 1
    refined, score = refine_all(student, freed.schedule, freed.coefficients)
    assert score < plain.score
    plan = fxmask.rectify(program, student.mask(freed.schedule, refined))
    rolled = student.rollout(freed.schedule, refined)
    for run, expected in zip(student.trajectories, rolled.finals, strict=True):
        assert torch.allclose(final(program, plan, run), expected, rtol=1e-3, atol=1e-4)


def test_costs_are_those_of_the_first_call_of_all(net):
    pipe = Pipe(net)
    runs = [fxmask.record_pipeline(pipe, lengths=(n,), seed=n) for n in (4, 9)]
    program = captured(runs[1])
    forms = Forms(program, runs)
    students = [Student(program, [run], forms=forms) for run in runs]
    assert [s.program.example.tensors["text"].shape[1] for s in students] == [4, 4]
    assert students[1].programs == [(program,)]
    loads = frozenset([program.branches[0].name])
    assert students[0].cost(loads) == students[1].cost(loads)


def test_one_run_with_uneven_lanes_is_enough(net):
    run = fxmask.record_pipeline(Pipe(net), lengths=(7, 4))
    program = captured(run)
    mask = fxmask.learn(program, run, speedup=1.3, effort="quick", progress=False)
    assert fxmask.rectify(program, mask).mac_ratio == pytest.approx(1.3, rel=0.03)


def test_images_of_two_sizes():
    model = tiny_unet()
    runs = [
        fxmask.record(model, ddim(), num_inference_steps=4, example_inputs={"sample": torch.zeros(2, 1, n, n)}, seed=n)
        for n in (8, 16)
    ]
    program = fxmask.capture(model, runs[0].calls[0][0])
    mask = fxmask.learn(program, runs, speedup=1.3, effort="quick", progress=False)
    assert fxmask.rectify(program, mask).mac_ratio == pytest.approx(1.3, rel=0.03)


def test_a_form_with_other_blocks_is_refused_by_name(net):
    class Longer(TextNet):
        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            if text.shape[1] > 6:
                x = x + 0.1 * self.head(self.layers[0](self.inp(x), self.embed(t.reshape(-1, 1).to(x.dtype) / 1000)))
            return super().forward(x, t, text)

    torch.manual_seed(0)
    pipe = Pipe(Longer().eval())
    runs = [fxmask.record_pipeline(pipe, lengths=(n,), seed=n) for n in (5, 5, 7)]
    message = r"recorded run 2 calls Longer.*text was float32\[2, 5, 5\] on cpu, is float32\[2, 7, 5\].*pad all prompts"
    with pytest.raises(InputError, match=f"(?s){message}"):
        fxmask.learn(captured(runs[0]), runs, speedup=1.3, effort="quick", progress=False)
    both = fxmask.record_pipeline(pipe, lengths=(5, 7))
    with pytest.raises(InputError, match=r"recorded run 0, lane 1 calls Longer"):
        fxmask.learn(captured(both), both, speedup=1.3, effort="quick", progress=False)


@pytest.mark.parametrize("learner", ["default", "paper"])
def test_a_form_that_changes_from_step_to_step_is_refused_by_name(net, learner):
    run = fxmask.record_pipeline(Pipe(net), lengths=(5,), scales=[1.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    program = captured(run)
    with pytest.raises(InputError, match=r"recorded run 0, change their form at step 2: scale was 1.0, is 0.5.*as a tensor"):
        fxmask.learn(program, run, speedup=1.3, learner=learner, progress=False)


def test_the_papers_learner_takes_a_run_of_another_form(net):
    runs = [fxmask.record_pipeline(Pipe(net), lengths=(n,), seed=n) for n in (5, 7)]
    options = fxmask.PaperOptions(epochs=1)
    mask = fxmask.learn(captured(runs[0]), runs[1], speedup=1.3, learner="paper", options=options, progress=False)
    assert mask.num_steps == 6
