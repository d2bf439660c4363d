"""Models made of the shipped U-Net, unevenly narrow ones and few-step ones, are captured, learned and run like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import TIMESTEPS, ddim, tiny_unet

import fxmask
from fxmask.passes.rectify import rectify

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "training")]
digits = pytest.importorskip("digits")
pytest.importorskip("transformers")  # of train.py

EXAMPLE = {"sample": torch.zeros(2, 1, 8, 8), "timestep": torch.tensor([7, 400])}


def widths(model: torch.nn.Module) -> list[int]:
    """Of all convolutions."""
    return [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]


@pytest.fixture(scope="module")
def narrow() -> torch.nn.Module:
    """A small U-Net, pruned by one batch of gradients."""
    pytest.importorskip("torch_pruning")
    from prune import prune

    model = tiny_unet(block_out_channels=(16, 32), layers_per_block=2)
    model(torch.randn(EXAMPLE["sample"].shape), EXAMPLE["timestep"]).sample.square().mean().backward()
    prune(model, 0.25, EXAMPLE)
    model.zero_grad()
    return model.eval().requires_grad_(False)


def check_it_is_like_any_other(model: torch.nn.Module, run: fxmask.Trajectory) -> None:
    """All ones is the model bit for bit; a plan computes less, and is what the reference makes of its mask."""
    program = fxmask.capture(model, run.calls[0][0])
    ones = fxmask.compile(program, rectify(program, fxmask.Mask.ones(program, run.timesteps)), backend="eager")
    assert torch.equal(run.rollout(ones), run.final)
    mask = fxmask.learn(program, run, speedup=1.3, effort="quick", progress=False)
    plan = rectify(program, mask)
    assert plan.mac_ratio == pytest.approx(1.3, rel=0.1)
    accelerated = fxmask.compile(program, plan, backend="eager")
    torch.testing.assert_close(run.rollout(accelerated), fxmask.reference.rollout(program, mask, run))


def test_a_pruned_model_is_like_any_other(narrow):
    fresh = widths(tiny_unet(block_out_channels=(16, 32), layers_per_block=2))
    kept = [after / before for after, before in zip(widths(narrow), fresh, strict=True)]
    assert len(set(kept)) > 2
    assert narrow(**EXAMPLE).sample.shape == EXAMPLE["sample"].shape
    check_it_is_like_any_other(narrow, fxmask.record(narrow, ddim(), num_inference_steps=len(TIMESTEPS), batch_size=2))


def test_a_checkpoint_holds_the_widths(narrow, tmp_path):
    """The configuration knows nothing of them."""
    from train import configuration

    narrow.half().float()  # what half precision keeps
    digits.save_model("narrow", configuration(narrow), narrow.state_dict(), tmp_path)
    again = digits.load_model("narrow", tmp_path)
    assert widths(again) == widths(narrow)
    assert torch.equal(again(**EXAMPLE).sample, narrow(**EXAMPLE).sample)


def test_what_fits_stays_as_it_is():
    model = tiny_unet()
    before = dict(model.named_parameters())
    digits.fit_widths(model, {name: weight.clone() for name, weight in model.state_dict().items()})
    assert all(after is before[name] for name, after in model.named_parameters())


def test_importance_leaves_the_noisiest_timesteps_out():
    from prune import accumulate_gradients

    class Exact(torch.nn.Module):
        """Finds the noise the better, the more there is of it."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, sample, timestep):
            from types import SimpleNamespace

            return SimpleNamespace(sample=self.scale * sample)

    model = Exact()
    used = accumulate_gradients(model, torch.ones(4, 1, 8, 8))
    assert used[0] == 0
    assert 200 < used[-1] < 950  # x_t - noise is below a twentieth from there on
    assert model.scale.grad != 0


@pytest.mark.parametrize("name", ["pruned", "consistency"])
def test_shipped_models_are_bit_identical_with_all_ones(name):
    if name == "pruned":
        scheduler, steps = digits.load_scheduler(), 6
    else:
        scheduler, steps = digits.load_scheduler("LCMScheduler", folder="consistency_scheduler"), 5
    model = digits.load_model(name)
    run = fxmask.record(model, scheduler, num_inference_steps=steps, batch_size=2)
    check_it_is_like_any_other(model, run)


def test_the_shipped_pruned_model_is_unevenly_narrow():
    full, pruned = digits.load_model("ddpm"), digits.load_model("pruned")
    kept = {round(after / before, 3) for after, before in zip(widths(pruned), widths(full), strict=True)}
    assert len(kept) > 3
    run = fxmask.record(full, digits.load_scheduler(), num_inference_steps=2, batch_size=1)
    assert 0.55 < fxmask.capture(pruned, run.calls[0][0]).macs / fxmask.capture(full, run.calls[0][0]).macs < 0.8


def test_few_steps_draw_digits():
    """The classifier is sure of nine in ten of 500; a few must not be far from that."""
    from consistency import sample

    images = sample(digits.load_model("consistency"), 40, steps=5)
    assert float((digits.load_classifier()(images).softmax(1).amax(1) > 0.8).float().mean()) >= 0.7


def test_steps_of_the_teacher_are_those_of_the_scheduler():
    from types import SimpleNamespace

    from consistency import ddim_step

    scheduler = digits.load_scheduler()
    scheduler.set_timesteps(20)
    noisy, noise = torch.randn(2, 2, 1, 16, 16).unbind()
    at = torch.tensor([500, 500])
    found = ddim_step(lambda *_: SimpleNamespace(sample=noise), noisy, at, at - 50)
    torch.testing.assert_close(
        found, scheduler.step(noise, 500, noisy, use_clipped_model_output=True).prev_sample, rtol=1e-4, atol=1e-4
    )


def test_the_loss_is_zero_where_the_student_is_consistent():
    """Of a single image, whose noise is known: v leads to it from everywhere; any other student's loss is not zero."""
    from types import SimpleNamespace

    from consistency import coefficients, consistency_loss

    image = torch.full((4, 1, 16, 16), -1.0)  # which shifting leaves as it is

    def teacher(noisy, timesteps):
        alpha, sigma = coefficients(timesteps)
        return SimpleNamespace(sample=(noisy - alpha * image) / sigma)

    def student(noisy, timesteps):
        alpha, sigma = coefficients(timesteps)
        return SimpleNamespace(sample=(alpha * noisy - image) / sigma)

    for done in (0.0, 0.5, 0.99):
        loss = consistency_loss(teacher, student, student, image, done, torch.Generator().manual_seed(0))
        assert float(loss) == pytest.approx(0.0, abs=1e-3)
        assert float(consistency_loss(teacher, teacher, student, image, done, torch.Generator().manual_seed(0))) > 0.1
