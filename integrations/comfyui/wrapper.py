"""What ComfyUI calls in place of ``apply_model``, once for each batch of a sampling step.

    wrapper(apply_model, {"input": x, "timestep": sigma, "c": {...}, "cond_or_uncond": [0, 1]}) -> denoised

The sigma says which step it is. A run begins where sigma rises. The first run at a schedule is made in full, and its sigmas are
noted down; when the next one begins, a plan is made: one more run is sampled (Euler steps over the same sigmas) and recorded.
Inside of ``apply_model`` the accelerated denoiser stands in for ``diffusion_model``. Calls with and without the prompt may
come in one batch, in either order, or one by one: each has caches of its own. With patches, a ControlNet, or sigmas that rise,
the original runs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fxmask

logger = logging.getLogger(__name__)
PLAIN = (type(None), bool, int, float, str)
CLOSE = 1e-5  # relative: sigmas that are the same
MOST_PLANS = 8
CHANGING = ("patches", "patches_replace", "wrappers", "callbacks")  # what changes what a denoiser computes

Schedule = tuple[float, ...]


class Denoiser(torch.nn.Module):
    """``diffusion_model`` with everything but sample and timestep in one argument.

    Args:
        model: ComfyUI's ``diffusion_model``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, Any]) -> torch.Tensor:
        """The prediction; ``x`` is ``[B, ...]`` and ``timesteps`` ``[B]``."""
        result: torch.Tensor = self.model(x, timesteps, transformer_options={}, **conditioning)
        return result


class Sigmas:
    """Euler steps over given sigmas, in the form that ``fxmask.accelerate`` takes as a scheduler.

    Args:
        sampling: ComfyUI's ``model_sampling``: what sigmas mean for this model.
        sigmas: falling, without the last zero.
    """

    def __init__(self, sampling: Any, sigmas: Schedule) -> None:
        self._sampling = sampling
        self._sigmas = sigmas
        one = torch.ones(1, 1)
        self.init_noise_sigma = float(sampling.noise_scaling(torch.tensor(sigmas[0]), one, torch.zeros(1, 1)))
        self.timesteps = torch.tensor([float(sampling.timestep(torch.tensor(s))) for s in sigmas])

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """The sigmas are what they are."""
        if num_inference_steps != len(self._sigmas):
            raise ValueError(f"there are {len(self._sigmas)} sigmas, not {num_inference_steps}")
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the denoiser is given."""
        found: torch.Tensor = self._sampling.calculate_input(self._at(timestep, sample), sample)
        return found

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor]:
        """One Euler step."""
        place = self._place(timestep)
        sigma, after = self._sigmas[place], (*self._sigmas, 0.0)[place + 1]
        denoised = self._sampling.calculate_denoised(self._at(timestep, sample), model_output, sample)
        return (sample + (sample - denoised) / sigma * (after - sigma),)

    def _place(self, timestep: torch.Tensor) -> int:
        return int((self.timesteps.double() - torch.as_tensor(timestep).double().flatten()[0]).abs().argmin())

    def _at(self, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample.new_tensor(self._sigmas[self._place(timestep)]).expand(len(sample))


@dataclass
class Run:
    """One sampling run.

    Attributes:
        sigmas: of its steps until now.
        expected: its whole schedule, where the sampler says it.
        example: one call of the denoiser.
        generations: by what the rows of a call are (with or without the prompt) and how many, caches.
        plan: that it follows; ``None``: it runs in full.
        reason: why it cannot be accelerated.
        first: which conds were called at its first sigma.
    """

    sigmas: list[float] = field(default_factory=list)
    expected: Schedule | None = None
    example: dict[str, Any] | None = None
    generations: dict[Any, Any] = field(default_factory=dict)
    plan: Any = None
    reason: str | None = None
    first: set[tuple[int, ...]] = field(default_factory=set)

    def is_over(self, sigma: float, conds: tuple[int, ...]) -> bool:
        """Whether a call with this sigma belongs to another run: it has risen, or this was called at the first one before."""
        if not self.sigmas or sigma > self.sigmas[-1] * (1 + CLOSE):
            return True
        return conds in self.first and math.isclose(sigma, self.sigmas[0], rel_tol=CLOSE)


class ModelWrapper:
    """For ``set_model_unet_function_wrapper``.

    Args:
        model: ComfyUI's ``model.model``: it holds ``diffusion_model`` and ``model_sampling``.
        speedup: ratio of MACs.
        backend: of step graphs, see ``fxmask.accelerate``.
    """

    def __init__(self, model: Any, speedup: float = 2.0, backend: str = "auto") -> None:
        self._model = model
        self._speedup = speedup
        self._backend = backend
        self._run = Run()
        self._plans: dict[Any, Any] = {}
        self._said: set[str] = set()

    def __call__(self, apply_model: Callable[..., torch.Tensor], args: Mapping[str, Any]) -> torch.Tensor:
        """One call of the sampler; what ``apply_model`` returns."""
        x, timestep, c = args["input"], args["timestep"], args["c"]
        sigma, conds = float(timestep.flatten()[0]), tuple(args.get("cond_or_uncond") or [0])
        if self._run.is_over(sigma, conds):
            self._begin(sigma, c.get("transformer_options") or {})
        if not self._run.sigmas or sigma < self._run.sigmas[-1] * (1 - CLOSE):
            self._run.sigmas.append(sigma)
        if len(self._run.sigmas) == 1:
            self._run.first.add(conds)
        with self._standing_in(_rows(args, len(x))):
            return apply_model(x, timestep, **c)

    @property
    def plans(self) -> tuple[Any, ...]:
        """Accelerated denoisers, one for each schedule and size that was seen twice."""
        return tuple(plan for plan in self._plans.values() if plan is not None)

    def _begin(self, sigma: float, options: Mapping[str, Any]) -> None:
        """A new run: with the plan of its schedule, which is made now if the last run had the same."""
        before, self._run = self._run, Run(expected=_whole(options.get("sample_sigmas")))
        if len(before.sigmas) == 1 and math.isclose(before.sigmas[0], sigma, rel_tol=CLOSE):
            self._run.plan = before.plan  # it ended before its second step, or several prompts share an image
            return
        schedule = self._run.expected or tuple(before.sigmas)
        if before.example is None or not schedule or abs(schedule[0] - sigma) > CLOSE * sigma:
            return
        key = (_form(before.example), tuple(float(f"{s:.5g}") for s in schedule))
        if key not in self._plans and _same(before.sigmas, schedule) and before.reason is None:
            self._plans[key] = self._make(schedule, before.example)
            while len(self._plans) > MOST_PLANS:
                del self._plans[next(iter(self._plans))]
        self._run.plan = self._plans.get(key)

    def _make(self, schedule: Schedule, example: Mapping[str, Any]) -> Any:
        """A plan for a schedule; ``None`` where there can be none, which is said once."""
        denoiser = Denoiser(self._model.diffusion_model).eval()
        sigmas = Sigmas(self._model.model_sampling, schedule)
        try:
            return fxmask.accelerate(
                denoiser,
                sigmas,
                num_inference_steps=len(schedule),
                speedup=self._speedup,
                backend=self._backend,
                example_inputs={"x": example["x"], "conditioning": example["conditioning"]},
            )
        except fxmask.FxmaskError as error:
            self._say(f"no plan for {len(schedule)} steps: {error}")
            return None

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("fxmask: %s", message)

    @contextlib.contextmanager
    def _standing_in(self, rows: Sequence[int]) -> Iterator[None]:
        """Inside, ``diffusion_model`` asks this wrapper."""
        modules = self._model._modules
        original = modules["diffusion_model"]
        modules["diffusion_model"] = _StandIn(original, lambda *call, **named: self._denoise(original, rows, call, named))
        try:
            yield
        finally:
            modules["diffusion_model"] = original

    def _denoise(self, original: torch.nn.Module, rows: Sequence[int], call: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """One call of ``diffusion_model``."""
        run = self._run
        plain = _plain_call(call, named)
        if isinstance(plain, str):
            run.reason = plain
            self._say(f"{plain}, so the original runs")
        if isinstance(plain, str) or torch.is_grad_enabled():
            return original(*call, **named)
        count = len(plain["x"])
        order = sorted(range(count), key=lambda k: rows[k])  # rows with the prompt first, whatever came first
        plain = plain if order == list(range(count)) else _permuted(plain, order)
        run.example = run.example or _kept(plain)
        if run.plan is None:
            return original(*call, **named)
        lane = tuple(rows[k] for k in order)
        generation = run.generations.setdefault(lane, run.plan.generation())
        with generation:
            made = run.plan(plain["x"], plain["timesteps"], conditioning=plain["conditioning"])
        return made[torch.tensor(order, device=made.device).argsort()]


class _StandIn(torch.nn.Module):
    """Called in place of a module; everything else is the module's own."""

    def __init__(self, original: torch.nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(_original=original, _call=call)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapper makes of the call."""
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def _plain_call(call: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any] | str:
    """Sample, timesteps and everything else, by name; or why a graph cannot make this call."""
    if len(call) < 2:
        return "the denoiser is not called as usual"
    given = dict(named)
    options, control = given.pop("transformer_options", None) or {}, given.pop("control", None)
    if control is not None:
        return "a ControlNet is used"
    changing = [name for name in CHANGING if options.get(name)]
    if changing:
        return f"the denoiser is patched ({changing[0]})"
    if len(call) > 2:
        given["context"] = call[2]
    if len(call) > 3 or not all(isinstance(value, (torch.Tensor, *PLAIN)) for value in given.values()):
        return "the denoiser is given what is neither tensor nor number"
    return {"x": call[0], "timesteps": call[1], "conditioning": {k: v for k, v in given.items() if v is not None}}


def _permuted(plain: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The call with its rows in another order."""

    def leaf(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.dim() and len(value) == len(order)
        return value[torch.tensor(order, device=value.device)] if whole else value

    conditioning = {name: leaf(value) for name, value in plain["conditioning"].items()}
    return {"x": leaf(plain["x"]), "timesteps": leaf(plain["timesteps"]), "conditioning": conditioning}


def _kept(plain: dict[str, Any]) -> dict[str, Any]:
    """A copy that nobody writes to."""
    conditioning = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in plain["conditioning"].items()}
    return {"x": plain["x"].clone(), "timesteps": plain["timesteps"].clone(), "conditioning": conditioning}


def _rows(args: Mapping[str, Any], count: int) -> list[int]:
    """For each row of a batch, whether it is with (0) or without (1) the prompt."""
    chunks = list(args.get("cond_or_uncond") or [0])
    return [chunk for chunk in chunks for _ in range(max(1, count // len(chunks)))][:count]


def _form(example: Mapping[str, Any]) -> Any:
    """What a plan's graphs are for: sizes without the batch, types, names."""
    x = example["x"]
    return tuple(x.shape[1:]), x.dtype, tuple(sorted(example["conditioning"]))


def _whole(sigmas: Any) -> Schedule | None:
    """The schedule that a sampler says it has, without the last zero."""
    if not isinstance(sigmas, torch.Tensor):
        return None
    found = tuple(s for s in sigmas.flatten().tolist() if s > 0)
    return found or None


def _same(sigmas: Sequence[float], schedule: Schedule) -> bool:
    """Whether a run had this schedule, and no step between."""
    return len(sigmas) == len(schedule) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(sigmas, schedule, strict=True))
