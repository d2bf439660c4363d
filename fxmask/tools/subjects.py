"""NAME of the command line: the pipeline or the denoiser that it names, and what it is called with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.frontend.capture import capture
from fxmask.ir.program import Program
from fxmask.sampling.pipeline_trajectory import PipelineTrajectory, record_pipeline
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.trajectory import record
from fxmask.settings.components import denoisers_of, original_of
from fxmask.settings.pipeline import is_a_pipeline
from fxmask.tools.bench_cases import from_code, load_case
from fxmask.tools.bench_shapes import SHAPES, diffusers_package
from fxmask.tools.place import DTYPES, placed, require_device

FUNCTIONS = "give file.py:function or module:function, a folder, or a name on the hub (owner/name)"


@dataclass(frozen=True)
class Subject:
    """What a command works on.

    Attributes:
        name: that it was given.
        pipe: the pipeline; ``None`` for a denoiser alone.
        model: the denoiser.
        scheduler: its sampler; ``None`` if there is none.
        inputs: arguments of the denoiser, or a function (batch size, generator) that makes them.
        calls: of the pipeline, by name; one at least.
    """

    name: str
    pipe: Any
    model: torch.nn.Module
    scheduler: Any
    inputs: Any
    calls: tuple[Mapping[str, Any], ...] = ({},)

    @property
    def component(self) -> str:
        """Name of the pipeline's denoiser."""
        return denoisers_of(self.pipe)[0]

    def with_calls(self, calls: Sequence[Mapping[str, Any]], prompts: Sequence[str], steps: int | None) -> Subject:
        """The same with other calls, where any are given, and so many steps in each.

        Raises:
            InputError: calls are given for a denoiser.
        """
        if self.pipe is None:
            if calls or prompts:
                raise InputError(
                    f"{self.name!r} is a denoiser, and --call and --prompt are for pipelines; its function may return a "
                    "dict of arguments beside it"
                )
            return self
        beside = self.calls[0]  # what every call needs
        given: list[Mapping[str, Any]] = [
            {**beside, **call} for call in (*calls, *({"prompt": prompt} for prompt in prompts))
        ] or list(self.calls)
        return replace(self, calls=tuple({**call, "num_inference_steps": steps} if steps else call for call in given))

    def recorded(self, seed: int, steps: int | None = None, batch: int = 8) -> Sampler:
        """One recorded run: a call of the pipeline, the seed says which, or a run of the scheduler."""
        if self.pipe is not None:
            call = self.calls[seed % len(self.calls)]
            return record_pipeline(
                self.pipe, **{**call, **({"num_inference_steps": steps} if steps else {})}, generator=seeded(seed)
            )
        return record(
            self.model,
            self.required_scheduler(),
            num_inference_steps=steps or 50,
            batch_size=batch,
            example_inputs=self.inputs or None,
            seed=seed,
        )

    def required_scheduler(self) -> Any:
        """The scheduler.

        Raises:
            InputError: there is none.
        """
        if self.scheduler is None:
            raise InputError(
                f"{self.name!r} is a denoiser without a scheduler; let its function return both: return model, scheduler"
            )
        return self.scheduler

    def program(self, run: Sampler | None = None) -> Program:
        """The captured denoiser, by a call of a recorded run where there is one."""
        if isinstance(run, PipelineTrajectory):
            return capture(run.denoiser, run.calls[0][0], roles=run.roles)
        if run is not None:
            return capture(self.model, run.calls[0][0])
        return capture(self.model, self.inputs if isinstance(self.inputs, Mapping) else None)


def load_subject(name: str, device: str = "cpu", dtype: str | None = None) -> Subject:
    """What is named, on the device and in the type.

    Args:
        name: see ``FUNCTIONS``; a shape of the benchmark is a denoiser with random weights.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        dtype: a key of ``DTYPES``, or ``None`` for the weights' own.

    Raises:
        InputError: there is none, it is something else, or the device is not there.
    """
    place, wanted = require_device(device), DTYPES.get(dtype) if dtype else None
    if name in SHAPES:
        model, call = load_case(name, None, place, wanted)
        return Subject(name, None, model, None, call)
    made = (
        from_code(name, {"device": place, "dtype": wanted} if wanted else {"device": place})
        if ":" in name
        else _pretrained(name, wanted)
    )
    first, *rest = made if isinstance(made, tuple) else (made,)
    if is_a_pipeline(first):
        return _of_pipeline(name, first, rest, place, wanted)
    return _of_model(name, first, rest, place, wanted)


def seeded(seed: int) -> torch.Generator:
    """Noise of its own; it is drawn on the CPU, so that it is the same on every device."""
    return torch.Generator().manual_seed(seed)


def _of_pipeline(name: str, pipe: Any, rest: Sequence[Any], device: torch.device, dtype: torch.dtype | None) -> Subject:
    if callable(getattr(pipe, "to", None)):
        pipe = pipe.to(device, dtype) if dtype is not None else pipe.to(device)
    if callable(getattr(pipe, "set_progress_bar_config", None)):
        pipe.set_progress_bar_config(disable=True)  # one bar is enough
    calls = rest[0] if rest else {}
    listed = (calls,) if isinstance(calls, Mapping) else tuple(calls)
    if not listed or not all(isinstance(call, Mapping) for call in listed):
        raise InputError(f"{name!r} returned a pipeline and {calls!r}, which is no call by name, nor a list of them")
    return Subject(name, pipe, original_of(pipe, denoisers_of(pipe)[0]), getattr(pipe, "scheduler", None), {}, listed)


def _of_model(name: str, model: Any, rest: Sequence[Any], device: torch.device, dtype: torch.dtype | None) -> Subject:
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"{name!r} returned {type(model).__name__}, and a pipeline is called and holds a scheduler; {FUNCTIONS}"
        )
    model = torch.nn.Module.to(model.eval(), device, dtype)
    scheduler = next((x for x in rest if hasattr(x, "set_timesteps") or hasattr(x, "timesteps")), None)
    inputs: Any = next((x for x in rest if isinstance(x, Mapping) or (callable(x) and x is not scheduler)), {})
    return Subject(name, None, model, scheduler, placed(dict(inputs), device, dtype) if isinstance(inputs, Mapping) else inputs)


def _pretrained(name: str, dtype: torch.dtype | None) -> Any:
    """A pipeline of a folder or of the hub, or else a denoiser.

    Raises:
        InputError: there is none.
    """
    package = diffusers_package()
    try:
        return package.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a hub, of a file, of a class
        if (Path(name) / "config.json").is_file():
            with contextlib.suppress(Exception):
                return package.AutoModel.from_pretrained(name, torch_dtype=dtype)
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise InputError(f"{name!r} is no diffusers pipeline: {reason}; {FUNCTIONS}") from error
