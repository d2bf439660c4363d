"""What compiled code depends on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import BackendError
from fxmask.storage.differences import differences


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on: PyTorch, the kind of device, and what processor and GPU can do."""
    facts = {
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "cpu": _instructions(torch.cpu.get_capabilities()),
    }
    if device.type == "cuda":
        facts["gpu"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return facts


def _instructions(capabilities: Mapping[str, Any]) -> dict[str, bool]:
    """What a processor can do, without how much of it there is: cores, caches."""
    return {name: True for name, value in sorted(capabilities.items()) if value is True}


def refuse_other_machine(folder: Path, exported: Mapping[str, Any], device: torch.device) -> None:
    """Refuse a package that was compiled for another PyTorch, device, or a processor that can do more than this one."""
    here = machine_facts(device)
    exported = {**exported, "cpu": _instructions(exported["cpu"])}
    here["cpu"] = {name: here["cpu"].get(name) for name in exported["cpu"]}  # what else it can do does not matter
    found = [line.replace("saved", "exported for", 1) for line in differences(exported, here)]
    if found:
        lines = "\n  ".join(found)
        raise BackendError(
            f"the package in {folder} does not run here:\n  {lines}\n"
            "Compiled code belongs to one version of PyTorch, one kind of device and of processor. Load its plan with "
            "fxmask.load(folder, model, backend='auto'), which captures and compiles, and export that"
        )
