"""MODEL of the command line: the denoiser that it names, and the arguments of one call."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.ir.calls import Signature
from fxmask.sampling.pipeline_trajectory import record_pipeline
from fxmask.settings.pipeline import is_a_pipeline
from fxmask.tools.bench_shapes import SETS, SHAPES, diffusers_package
from fxmask.tools.place import built_on, placed

CPU = torch.device("cpu")


def cases_of(name: str) -> tuple[str, ...]:
    """The models that a name stands for: those of a set, or one."""
    return SETS.get(name, (name,))


def load_case(
    case: str, batch: int | None = None, device: torch.device = CPU, dtype: torch.dtype | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The denoiser and the arguments of one call.

    Args:
        case: ``"file.py:function"`` or ``"package.module:function"``: the function takes nothing, or some of ``batch``,
            ``device`` and ``dtype``, and returns the model, or the model and a dict of arguments; missing arguments are
            inferred; or a pipeline, or a pipeline and a call, of which it is the denoiser. Or the name of a shape (``SHAPES``),
            with random weights. Or a folder or a name on the hub of a diffusers model or pipeline, with its weights.
        batch: B; that of the call if not given.
        device: on which shapes are built, and to which others go.
        dtype: in which it is built; as it is if not given.

    Raises:
        InputError: there is no such model, or the function returns something else.
    """
    torch.manual_seed(0)
    given = {"batch": batch, "device": device, "dtype": dtype}
    made = _make(case, {name: value for name, value in given.items() if value is not None})
    model, call = (*made, {})[:2] if isinstance(made, tuple) else (made, {})
    if is_a_pipeline(model):
        model, call = _denoiser_of(model, call)
    elif not isinstance(call, Mapping):
        call = {}  # a scheduler
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{case!r} returned {type(model).__name__}, not a torch.nn.Module (and a dict of arguments)")
    model = model.eval()
    if device.type != "cpu" or dtype is not None:
        torch.nn.Module.to(model, device, dtype)  # diffusers' own warns of types that were never set
        call = placed(call, device, dtype)
    return model, with_batch(model, dict(call), batch)


def _denoiser_of(pipe: Any, calls: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The denoiser of a pipeline, and what it is called with: the pipeline is called once, with two steps."""
    if callable(getattr(pipe, "set_progress_bar_config", None)):
        pipe.set_progress_bar_config(disable=True)
    call = calls if isinstance(calls, Mapping) else next(iter(calls), {})
    run = record_pipeline(pipe, **{**call, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)})
    return run.denoiser, dict(run.calls[0][0])


def with_batch(model: torch.nn.Module, call: dict[str, Any], batch: int | None) -> dict[str, Any]:
    """The call for another batch: rows of its tensors are repeated, or left out."""
    sample = call.get(Signature.of(model).sample)
    if batch is None or not isinstance(sample, torch.Tensor) or len(sample) == batch:
        return call
    count = len(sample)

    def resize(x: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(batch, device=x.device) % count] if x.dim() and len(x) == count else x

    resized: dict[str, Any] = pytree.tree_map_only(torch.Tensor, resize, call)
    return resized


def _make(case: str, given: dict[str, Any]) -> Any:
    """The model, or the model and its call, on the device or not yet."""
    device, dtype = given["device"], given.get("dtype")
    if case in SHAPES:
        with built_on(device, dtype):
            return _taking_some(SHAPES[case])(**given)
    if ":" not in case and (Path(case).is_dir() or case.count("/") == 1):
        return _pretrained(case, device, dtype)
    with built_on(CPU, dtype):  # a function may draw numbers with a generator of its own, which is the CPU's
        return from_code(case, given)


def from_code(case: str, given: dict[str, Any]) -> Any:
    """What the function of a file or a module returns."""
    place, _, name = case.rpartition(":")
    beside = str(Path(place).resolve().parent if place.endswith(".py") else Path.cwd())
    if beside not in sys.path:
        sys.path.insert(0, beside)  # and it stays there: functions import when they are called, too
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return _taking_some(getattr(module, name))(**given)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise InputError(
            f"{case!r} is no function that makes a denoiser: {error}; give file.py:function, one of {sorted(SHAPES)}, or a "
            "folder or a name on the hub (owner/name)"
        ) from error


def _taking_some(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, given those of our arguments that it takes."""
    parameters = inspect.signature(function).parameters
    return lambda **given: function(**{k: v for k, v in given.items() if k in parameters})


def _pretrained(name: str, device: torch.device, dtype: torch.dtype | None) -> torch.nn.Module:
    """A diffusers model, or the denoiser of a pipeline, with its weights.

    Raises:
        InputError: there is none.
    """
    loader, reasons = diffusers_package().AutoModel, []
    for subfolder in (None, "transformer", "unet"):
        where = {} if subfolder is None else {"subfolder": subfolder}
        try:
            model: torch.nn.Module = loader.from_pretrained(name, torch_dtype=dtype, **where).to(device)
            return model
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a hub, of a file, of a class
            reasons.append(
                f"{subfolder or 'itself'}: {str(error).splitlines()[0][:150] if str(error) else type(error).__name__}"
            )
    raise InputError(f"{name!r} is no diffusers model, and no pipeline with a transformer or a U-Net ({'; '.join(reasons)})")
