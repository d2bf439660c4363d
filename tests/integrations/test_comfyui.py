"""The ComfyUI node, against a stand-in of ComfyUI's protocol: what a sampler calls, and what ``apply_model`` does with it."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
STEPS = 8


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The folder, imported as ComfyUI does: as a package of the folder's name."""
    name = "custom_nodes_fxmask"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The stand-in: the parts of comfy.model_patcher, comfy.model_base and comfy.samplers that the node meets


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.query, self.key = (
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.Linear(width, width),
        )
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.SiLU(), torch.nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, context: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        q, k = self.query(self.norm(x)), self.key(context)
        x = x + torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ k + time
        return x + self.mlp(self.norm(x))


class DiffusionModel(torch.nn.Module):
    """Called as ComfyUI calls its denoisers; counts calls."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.inward, self.outward = torch.nn.Linear(4, width), torch.nn.Linear(width, 4)
        self.time = torch.nn.Linear(8, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(2))

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = {} if transformer_options is None else transformer_options
        frequencies = torch.exp(-torch.arange(4) * 1.5)
        angles = timesteps[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, None]
        h = self.inward(x.flatten(2).transpose(1, 2))
        assert context is not None
        for block in self.blocks:
            h = block(h, context, time)
        for patch in options.get("patches", {}).get("output", ()):
            h = patch(h)
        if control is not None:
            h = h + control
        return self.outward(h).transpose(1, 2).reshape(x.shape)


class ModelSampling(torch.nn.Module):
    """comfy.model_sampling.EPS, with a schedule like Stable Diffusion's."""

    def __init__(self) -> None:
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, dim=0)
        self.register_buffer("log_sigmas", ((1 - alphas) / alphas).sqrt().log().float())

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sigma = sigma.view(sigma.shape[:1] + (1,) * (noise.ndim - 1))
        return noise / (sigma**2 + 1.0) ** 0.5

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        sigma = sigma.view(sigma.shape[:1] + (1,) * (output.ndim - 1))
        return model_input - output * sigma

    def noise_scaling(self, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return noise * torch.sqrt(1.0 + sigma**2.0) + latent

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        distances = sigma.log().to(self.log_sigmas.device) - self.log_sigmas[:, None]
        return distances.abs().argmin(dim=0).view(sigma.shape)

    def sigmas(self, steps: int) -> torch.Tensor:
        places = torch.linspace(999, 0, steps).round().long()
        return torch.cat([self.log_sigmas[places].exp(), torch.zeros(1)])


class BaseModel(torch.nn.Module):
    """comfy.model_base.BaseModel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.diffusion_model, self.model_sampling = DiffusionModel().eval(), ModelSampling()

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        sigma, options = t, {} if transformer_options is None else transformer_options
        xc = self.model_sampling.calculate_input(sigma, x).to(self.diffusion_model.dtype)
        t = self.model_sampling.timestep(t).float()
        output = self.diffusion_model(
            xc, t, context=c_crossattn, control=control, transformer_options=options, **kwargs
        ).float()
        return self.model_sampling.calculate_denoised(sigma, output, x)


class ModelPatcher:
    """comfy.model_patcher.ModelPatcher."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        made = ModelPatcher(self.model)
        made.model_options = copy.copy(self.model_options)
        return made

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function


CONTEXTS = {0: torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1)), 1: torch.zeros(1, 3, 16)}


@torch.no_grad()
def sample(
    patcher: ModelPatcher,
    steps: int = STEPS,
    seed: int = 0,
    layout: Sequence[Sequence[int]] | None = None,
    orders: Sequence[Sequence[Sequence[int]]] | None = None,
    says: bool = True,
    control: Any = None,
    patches: Any = None,
    images: int = 1,
    second_order: bool = False,
) -> torch.Tensor:
    """comfy.samplers: Euler steps with guidance. ``layout``: which conds share a batch; ``orders``: the layout of each step."""
    sigmas = patcher.model.model_sampling.sigmas(steps)
    noise = torch.randn(images, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = patcher.model.model_sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise))

    def denoise(x: torch.Tensor, sigma: torch.Tensor, step: int) -> torch.Tensor:
        chosen = orders[step] if orders is not None else layout or [[1, 0]]
        outputs: dict[int, torch.Tensor] = {}
        for conds in chosen:
            options: dict[str, Any] = {"cond_or_uncond": list(conds), "sigmas": sigma.expand(1)}
            options |= {"sample_sigmas": sigmas} if says else {}
            options |= {"patches": patches} if patches else {}
            c = {"c_crossattn": torch.cat([CONTEXTS[k].expand(images, -1, -1) for k in conds]), "transformer_options": options}
            c |= {"control": control} if control is not None else {}
            given = {
                "input": torch.cat([x] * len(conds)),
                "timestep": sigma.expand(len(conds) * images),
                "c": c,
                "cond_or_uncond": list(conds),
            }
            wrapper = patcher.model_options.get("model_function_wrapper")
            apply = patcher.model.apply_model
            made = wrapper(apply, given) if wrapper else apply(given["input"], given["timestep"], **c)
            outputs |= dict(zip(conds, made.chunk(len(conds)), strict=True))
        return outputs[1] + 3.0 * (outputs[0] - outputs[1])

    for i in range(steps):
        slope = (x - denoise(x, sigmas[i], i)) / sigmas[i]
        if second_order and sigmas[i + 1] > 0:
            middle = (sigmas[i] * sigmas[i + 1]).sqrt()
            between = x + slope * (middle - sigmas[i])
            slope = (between - denoise(between, middle, i)) / middle
        x = x + slope * (sigmas[i + 1] - sigmas[i])
    return x


def accelerated(nodes: ModuleType, speedup: float = 1.6) -> tuple[ModelPatcher, ModelPatcher, Any]:
    plain = ModelPatcher(BaseModel())
    node = nodes.NODE_CLASS_MAPPINGS["FxmaskAccelerate"]
    assert node.RETURN_TYPES == ("MODEL",)
    assert set(node.INPUT_TYPES()["required"]) == {"model", "speedup", "backend"}
    (patched,) = getattr(node(), node.FUNCTION)(plain, speedup=speedup, backend="eager")
    assert plain.model_options == {"transformer_options": {}}, "the model that came in stays as it is"
    return plain, patched, patched.model_options["model_function_wrapper"]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def followed(wrapper: Any, lanes: int = 1) -> list[int]:
    return [run.followed for run in wrapper.plans[-1].report().runs[-lanes:]]


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("layout", [[[1, 0]], [[0, 1]], [[0], [1]], [[1], [0]]])
def test_first_run_is_the_same_and_the_next_follow_a_plan(nodes: ModuleType, layout: Any, says: bool) -> None:
    plain, patched, wrapper = accelerated(nodes)
    assert torch.equal(sample(patched, layout=layout, says=says), sample(plain, layout=layout))
    assert wrapper.plans == ()
    for seed in (1, 2):
        found = sample(patched, seed=seed, layout=layout, says=says)
        assert 0 < error(found, sample(plain, seed=seed, layout=layout)) < 0.1
        assert followed(wrapper, len(layout)) == [STEPS - 1] * len(layout)
    assert len(wrapper.plans) == 1
    assert wrapper.plans[0].plan.mac_ratio == pytest.approx(1.6, rel=0.1)
    assert type(patched.model.diffusion_model) is DiffusionModel, "the model is as it was"


@torch.inference_mode()
def test_in_inference_mode(nodes: ModuleType) -> None:
    """As ComfyUI samples."""
    plain, patched, wrapper = accelerated(nodes)
    assert torch.equal(sample(patched), sample(plain))
    assert 0 < error(sample(patched, seed=1), sample(plain, seed=1)) < 0.1
    assert followed(wrapper) == [STEPS - 1]


def test_the_order_of_a_batch_does_not_matter(nodes: ModuleType) -> None:
    """Also where it changes from step to step: each row has its own caches."""
    _, patched, wrapper = accelerated(nodes)
    sample(patched)
    usual = sample(patched, seed=1)
    orders = [[[1, 0]] if step % 2 else [[0, 1]] for step in range(STEPS)]
    assert torch.allclose(sample(patched, seed=1, orders=orders), usual, atol=1e-5)
    assert followed(wrapper) == [STEPS - 1]


def test_a_batch_that_is_split_in_the_middle(nodes: ModuleType) -> None:
    """Where memory runs short, ComfyUI goes on with one call for each."""
    plain, patched, wrapper = accelerated(nodes)
    sample(patched)
    orders = [[[1, 0]] if step < 4 else [[1], [0]] for step in range(STEPS)]
    found = sample(patched, seed=1, orders=orders)
    assert error(found, sample(plain, seed=1)) < 0.1
    assert len(wrapper.plans) == 1


def test_other_schedules_have_plans_of_their_own(nodes: ModuleType) -> None:
    plain, patched, wrapper = accelerated(nodes)
    for steps in (STEPS, 6):
        assert torch.equal(sample(patched, steps), sample(plain, steps)), "the first of each in full"
        assert not torch.equal(sample(patched, steps, seed=1), sample(plain, steps, seed=1))
    assert len(wrapper.plans) == 2
    assert not torch.equal(sample(patched, seed=2), sample(plain, seed=2)), "and the first one is still known"
    assert len(wrapper.plans) == 2


def test_several_images(nodes: ModuleType) -> None:
    plain, patched, wrapper = accelerated(nodes)
    sample(patched, images=2)
    assert 0 < error(sample(patched, seed=1, images=2), sample(plain, seed=1, images=2)) < 0.1
    assert 0 < error(sample(patched, seed=1, images=3), sample(plain, seed=1, images=3)) < 0.1
    assert len(wrapper.plans) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": torch.tensor(0.1)}, "a ControlNet is used"),
        ({"patches": {"output": [lambda h: h * 1.1]}}, "the denoiser is patched"),
    ],
)
def test_what_a_graph_cannot_do_the_original_does(nodes: ModuleType, options: Any, message: str, caplog: Any) -> None:
    plain, patched, wrapper = accelerated(nodes)
    for seed in range(3):
        assert torch.equal(sample(patched, seed=seed, **options), sample(plain, seed=seed, **options))
    assert wrapper.plans == ()
    assert sum(message in record.message for record in caplog.records) == 1
    sample(patched)
    assert not torch.equal(sample(patched, seed=1), sample(plain, seed=1)), "without it there is a plan"
    assert torch.equal(sample(patched, seed=1, **options), sample(plain, seed=1, **options)), "and with it there is none"


def test_samplers_that_evaluate_between_sigmas_run_in_full(nodes: ModuleType) -> None:
    plain, patched, _ = accelerated(nodes)
    for seed in range(3):
        found = sample(patched, seed=seed, second_order=True)
        assert torch.equal(found, sample(plain, seed=seed, second_order=True))


def test_an_interrupted_run_is_forgotten(nodes: ModuleType) -> None:
    plain, patched, wrapper = accelerated(nodes)

    class Stop(Exception):
        pass

    def stop(h: torch.Tensor) -> torch.Tensor:
        raise Stop

    with pytest.raises(Stop):
        sample(patched, patches={"output": [stop]})
    assert type(patched.model.diffusion_model) is DiffusionModel
    assert torch.equal(sample(patched, seed=1), sample(plain, seed=1))
    assert wrapper.plans == ()
    sample(patched, seed=2)
    assert len(wrapper.plans) == 1


def test_the_stand_in_is_a_sampler() -> None:
    """The stand-in itself: images are finite, and guidance changes them."""
    patcher = ModelPatcher(BaseModel())
    found = sample(patcher)
    assert bool(found.isfinite().all())
    assert math.isfinite(error(found, sample(patcher, seed=1)))
    apart = sample(patcher, layout=[[0], [1]])
    assert torch.allclose(found, apart, atol=1e-4)
    assert not torch.allclose(found, sample(patcher, seed=1))
