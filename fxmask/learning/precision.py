"""What learning computes in: float32 as it is, whatever the type of the model that will run.

Differences that learning goes by, of samples by coefficients for instance, drown in the rounding of half precision. So a
model in half precision is learned from a copy with wide weights, which lives as long as the learning. Masks fit both, as
fingerprints do not tell types apart.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxmask._torch import exact_float32, forget_compiled_call
from fxmask.errors import InputError
from fxmask.frontend.capture import capture
from fxmask.frontend.modules import module_dtype
from fxmask.guards.ambient import without_autocast
from fxmask.ir.program import Program
from fxmask.ir.weights import named_tensors
from fxmask.learning.room import Room, tensor_bytes
from fxmask.sampling.sampler import ChangesType, Sampler

logger = logging.getLogger(__name__)
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_learn_dtype(dtype: Any) -> torch.dtype:
    """The type, if it is one to learn in.

    Raises:
        InputError: names those that are.
    """
    if dtype not in TYPES:
        raise InputError(f"learn_dtype={dtype!r} must be one of {[str(t) for t in TYPES]}; the default is torch.float32")
    chosen: torch.dtype = dtype
    return chosen


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Float32 is what it says inside, and nothing is cast on the way; put back at the end, also after an error."""
    with exact_float32(), without_autocast():
        yield


def widened(
    program: Program, runs: Sequence[Sampler], dtype: torch.dtype, room: Room
) -> tuple[Program, list[Sampler], Program | None]:
    """The program and the runs in a type of at least this precision, and the program as it was given, if that is another.

    Where that cannot be had, a log line says why, and learning goes on with what was given.

    Args:
        program: the captured denoiser.
        runs: recorded with it. They are recorded again, from the same noise.
        dtype: the type.
        room: where the wide weights must fit. What they take is taken from it.
    """
    given = program, list(runs), None
    cast = program.ambient is not None and program.ambient.autocast is not None
    if not cast and not _is_narrower(module_dtype(program.model), dtype):
        return given
    size = wide_bytes(program.model, dtype)
    try:
        if not program.verified:
            raise _CannotError("it has no weights")
        if room.size is not None and size >= room.size:
            raise _CannotError(f"its weights take {size:,} bytes in {dtype}, and the bound of memory is {room.given:,}")
        fixed = [type(run).__name__ for run in runs if not isinstance(run, ChangesType)]
        if fixed:
            raise _CannotError(f"a {fixed[0]} cannot be recorded again in another type; record the run in {dtype}")
        model = wide_copy(program.model, dtype)
        again = [run.in_type(model, dtype) for run in runs if isinstance(run, ChangesType)]
        wide = capture(model, again[0].calls[0][0], roles=program.given_roles)
        if [b.name for b in wide.blocks] != [b.name for b in program.blocks] or not program.fits(wide.fingerprint):
            raise _CannotError(f"its graph has other operators in {dtype}")
    except Exception as error:  # copies, recordings and captures fail in many ways; none of them needs to end the learning
        logger.warning(
            "%s is learned in %s, its own type, and not in %s: %s",
            type(program.model).__name__,
            module_dtype(program.model),
            dtype,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return given
    room.take(size)
    logger.info("%s is learned from a copy of it in %s, %s bytes of weights", type(model).__name__, dtype, f"{size:,}")
    return wide, list(again), program


class _CannotError(Exception):
    """Why there is no wide copy."""


def wide_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a type; tied ones once."""
    tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}.values()
    return sum(x.numel() * dtype.itemsize if _is_narrower(x.dtype, dtype) else tensor_bytes(x) for x in tensors)


def wide_copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of a model with its floating-point weights in a type, if they are narrower. The model is only read.

    Tied weights stay tied. Weights of the copy want no gradients.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise _CannotError(f"{name} is a {type(tensor).__name__}, which cannot be converted")
        if id(tensor) in memo:
            continue
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise _CannotError(f"{name} is stored in {tensor.dtype}")
        made = tensor.detach().to(dtype if _is_narrower(tensor.dtype, dtype) else tensor.dtype, copy=True)
        memo[id(tensor)] = torch.nn.Parameter(made, False) if isinstance(tensor, torch.nn.Parameter) else made
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        forget_compiled_call(module)
    return copied


def _is_narrower(dtype: torch.dtype, wanted: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(wanted).eps
