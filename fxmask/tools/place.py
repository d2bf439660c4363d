"""Where a denoiser of the command line runs, and in which type."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def require_device(name: str) -> torch.device:
    """The device of that name.

    Args:
        name: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises:
        InputError: it is none of these, or this machine does not have it; says what PyTorch sees.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device; choose cpu, cuda or cuda:1") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"device {name!r} has not been tried; choose cpu, cuda or cuda:1")
    if not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        raise InputError(
            f"device {name!r}: PyTorch {torch.__version__} sees no NVIDIA GPU here (it {built}); look at what nvidia-smi and "
            "python -m torch.utils.collect_env say, or use cpu"
        )
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise InputError(f"device {name!r}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


@contextlib.contextmanager
def built_on(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """What is built inside is built on the device and in the type: a large model has no copy in float32 beside the GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def placed(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Tensors, however nested, on the device; those of floating-point numbers in the type, if there is one."""

    def place(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, dtype if x.is_floating_point() else None)

    return pytree.tree_map_only(torch.Tensor, place, value)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, what asks for the current GPU is given this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def release(device: torch.device) -> None:
    """Give memory back that nothing holds any more, after a failure for instance."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe_failure(error: BaseException, device: torch.device) -> str:
    """One line for a table: why something did not run."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"does not fit in memory{_room(device)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _room(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({total / 2**30:.0f} GiB on the GPU, {free / 2**30:.0f} GiB free of it)"
