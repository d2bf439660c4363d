"""Pipelines with two denoisers: both are recorded in one call, planned for one outcome, swapped, saved and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ddim, tiny_unet
from pipelines import PIPELINES, generator, wan_transformer
from test_settings import accelerated, images

import fxmask
from fxmask.learning.instant.parts import Piece, counts_for_error, counts_within
from fxmask.settings.components import denoisers_of, put
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def wan_2_2(boundary: float = 0.9) -> tuple[Any, dict[str, Any]]:
    """The first denoiser takes the noisy steps, the second one the others."""
    from diffusers import WanPipeline

    plain, call = PIPELINES["wan"]()
    parts = {"vae": plain.vae, "scheduler": plain.scheduler, "transformer": plain.transformer}
    pipe = WanPipeline(None, None, **parts, transformer_2=wan_transformer(1), boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": 9, "num_videos_per_prompt": 1}


class Cascade:
    """Two pipelines' worth: a denoiser of its own for each of two sampling loops, the first one in a pipeline of its own."""

    def __init__(self) -> None:
        self.prior_pipe = Prior()
        self.prior_prior = self.prior_pipe.prior
        self.decoder, self.scheduler = tiny_unet(), ddim()

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 6, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        start = self.prior_pipe(num_inference_steps, generator)
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 1, 8, 8, generator=generator) + 0.1 * start
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.decoder(x, t).sample, t, x).prev_sample
        return {"images": x}


class Prior:
    def __init__(self) -> None:
        self.prior, self.scheduler = tiny_unet(), ddim()

    def __call__(self, num_inference_steps: int, generator: torch.Generator | None) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 1, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.prior(x, t).sample, t, x).prev_sample
        return x


def spent(session: Any) -> float:
    """MACs of both denoisers as planned, as a fraction of all."""
    plans = [(part.model.plan, part.program.macs) for part in session.parts]
    full = sum(plan.mask.num_steps * macs for plan, macs in plans)
    return sum(plan.mask.num_steps / plan.mac_ratio * macs for plan, macs in plans) / full


def test_both_denoisers_share_one_outcome(tmp_path: Any) -> None:
    pipe, call = wan_2_2()
    originals = pipe.transformer, pipe.transformer_2
    plain = [images(pipe, call, seed) for seed in (0, 1)]
    accelerated(pipe, speedup=1.5)
    assert torch.equal(images(pipe, call, 0), plain[0])
    made = images(pipe, call, 1)
    session = session_of(pipe)
    assert [part.component for part in session.parts] == ["transformer", "transformer_2"]
    assert [part.account().images for part in session.parts] == [1, 1]
    steps = [part.model.plan.mask.num_steps for part in session.parts]
    assert sum(steps) == 9
    assert min(steps) > 1
    assert spent(session) <= 1.02 / 1.5
    assert not torch.equal(made, plain[1])
    fxmask.save(pipe, tmp_path / "plans")
    other, _ = wan_2_2()
    fxmask.load(tmp_path / "plans", other, backend="eager")
    assert torch.equal(images(other, call, 1), made)
    assert session_of(other).account().recorded == 0
    assert (fxmask.restore(pipe).transformer, pipe.transformer_2) == originals
    assert torch.equal(images(pipe, call, 1), plain[1])


def test_what_is_measured_is_known_of_both(tmp_path: Any) -> None:
    pipe, call = wan_2_2()
    accelerated(pipe, speedup=1.5)
    with pytest.raises(fxmask.InputError, match="no denoiser of this pipeline has a plan"):
        fxmask.measure(pipe, [{**call, "num_inference_steps": 6, "generator": generator(0)}])
    calls = [{**call, "num_inference_steps": 6, "generator": generator(seed)} for seed in (50, 51)]
    quality = fxmask.measure(pipe, calls)
    found = [part.model.report().quality for part in session_of(pipe).parts]
    assert quality.images == 2
    assert [q is not None and (q.psnr, q.images) for q in found] == 2 * [(quality.psnr, 2)]
    assert found[0].mask != found[1].mask, "each is measured with its own plan"
    fxmask.save(pipe, tmp_path / "plans")
    assert (tmp_path / "plans" / "README.md").read_text().count("held-out PSNR") == 2


def test_a_denoiser_without_steps_is_no_reason_to_refuse() -> None:
    pipe, call = wan_2_2(boundary=0.0)
    plain = images(pipe, call, 1)
    accelerated(pipe, speedup=1.5)
    for seed in (0, 1):
        made = images(pipe, call, seed)
    session = session_of(pipe)
    known = [next(iter(part.settings.values())) for part in session.parts]
    assert [k.unused for k in known] == [False, True]
    assert session.account().images == 1
    assert not torch.equal(made, plain)


def test_a_sampling_loop_each() -> None:
    pipe = Cascade()
    prior = pipe.prior_prior
    plain = [images(pipe, {}, seed) for seed in (0, 1)]
    accelerated(pipe, speedup=1.5)
    assert pipe.prior_pipe.prior is pipe.prior_prior  # swapped wherever it is held
    assert torch.equal(images(pipe, {}, 0), plain[0])
    made = images(pipe, {}, 1)
    session = session_of(pipe)
    assert [part.component for part in session.parts] == ["prior_prior", "decoder"]
    assert [part.account().images for part in session.parts] == [1, 1]
    assert spent(session) <= 1.02 / 1.5
    assert not torch.equal(made, plain[1])
    fxmask.restore(pipe)
    assert pipe.prior_pipe.prior is prior
    assert torch.equal(images(pipe, {}, 1), plain[1])


def test_more_runs_are_fitted_together() -> None:
    pipe, call = wan_2_2()
    accelerated(pipe, speedup=1.5, every=2)
    for seed in range(4):
        images(pipe, call, seed)
    session = session_of(pipe)
    known = [next(iter(part.settings.values())) for part in session.parts]
    assert [len(k.runs) for k in known] == [2, 2]
    assert spent(session) <= 1.02 / 1.5


def test_each_is_improved_within_its_share() -> None:
    pipe, call = wan_2_2()
    accelerated(pipe, speedup=1.5, example_calls=[call], effort="quick")
    session = session_of(pipe)
    assert all(part.account().calls > 0 for part in session.parts)
    assert spent(session) <= 1.05 / 1.5


# Which they are


def test_denoisers_are_found_by_name_or_by_what_they_take() -> None:
    pipe, _ = wan_2_2()
    assert denoisers_of(pipe) == ("transformer", "transformer_2")
    assert denoisers_of(pipe, "transformer_2") == ("transformer_2",)
    assert denoisers_of(Cascade()) == ("prior_prior", "decoder")
    plain, _ = PIPELINES["control_net"]()
    assert denoisers_of(plain) == ("unet",)
    with pytest.raises(fxmask.InputError, match="component='vea' is no module"):
        denoisers_of(pipe, "vea")


def test_only_inner_pipelines_hold_denoisers() -> None:
    pipe = Cascade()
    del pipe.prior_prior, pipe.decoder
    assert denoisers_of(pipe) == ("prior_pipe.prior",)
    other = tiny_unet()
    put(pipe, "prior_pipe.prior", other)
    assert pipe.prior_pipe.prior is other


def test_what_is_called_at_every_step_may_have_to_be_said() -> None:
    class Two:
        def __init__(self) -> None:
            self.one, self.two, self.scheduler = tiny_unet(), tiny_unet(), ddim()

        def __call__(self) -> None:
            raise AssertionError

    with pytest.raises(fxmask.InputError, match="is called at every step is not known"):
        fxmask.accelerate(Two())
    assert session_of(accelerated(Two(), component=["two", "one"])).component == "two"


# How full steps are shared out


class Known:
    """A learner whose errors are known."""

    def __init__(self, steps: int) -> None:
        self.steps = steps


class Priced(Piece):
    """A piece with the errors it is told."""

    told: tuple[float, ...]

    def errors(self) -> list[float]:
        return list(self.told)


def piece(cost: float, *told: float) -> Piece:
    made = Priced(Known(len(told)), cost, 0.0)  # type: ignore[arg-type]
    object.__setattr__(made, "told", told)
    return made


def test_full_steps_go_where_they_help_most() -> None:
    pieces = [piece(1.0, 0.9, 0.8, 0.7, 0.0), piece(1.0, 0.2, 0.1, 0.05, 0.0)]
    assert counts_within(pieces, 0.63) == [4, 1]
    assert counts_within(pieces, 1.0) == [4, 4]
    dear = [piece(3.0, 0.9, 0.8, 0.7, 0.0), piece(1.0, 0.9, 0.1, 0.05, 0.0)]
    assert counts_within(dear, 0.5) == [1, 4]
    cheap = [piece(0.1, 1.0, 0.5, 0.0), piece(1.0, 0.3, 0.2, 0.0)]
    assert counts_within(cheap, 0.5) == [3, 1]
    assert counts_within(cheap, 0.5, per_step=True) == [2, 1]
    assert counts_for_error(pieces, 1.0) == [2, 1]
    assert counts_for_error(pieces, 0.1) == [4, 4]
    with pytest.raises(fxmask.OutcomeError, match="need a full step each"):
        counts_within(pieces, 0.2)


def test_generators_and_noise_of_both_are_kept() -> None:
    pipe, call = wan_2_2()
    one, two = generator(3), generator(3)
    pipe(**call, generator=one)
    accelerated(pipe)
    pipe(**call, generator=two)
    assert torch.equal(one.get_state(), two.get_state())
