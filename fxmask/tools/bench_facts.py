"""What a measurement was made with: the device, its driver, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

QUERY = "name,driver_version,power.limit,clocks.max.sm,clocks.sm,temperature.gpu,ecc.mode.current"


def facts_of(device: torch.device) -> dict[str, Any]:
    """Versions and what is known of the device, as JSON has it. Nothing names the machine or its user."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in ("fxmask", "triton", "diffusers", "transformers")},
        "torch_git": torch.version.git_version,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "device": str(device),
    }
    return facts | _of_gpu(device) if device.type == "cuda" else facts


def _of_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "gpu_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nvidia_smi": _said(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]),
        "collect_env": _said([sys.executable, "-m", "torch.utils.collect_env"]),
    }


def _said(command: list[str]) -> str | None:
    """What a program prints; ``None`` if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
