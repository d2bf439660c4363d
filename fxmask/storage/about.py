"""What a saved plan says of itself besides what loading needs: what it saves, and which versions made it."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fxmask.ir.plan import Plan

LEARNED, PLAN_FACTS, VERSIONS, BASE = "learned", "plan", "versions", "base_model"
LIBRARIES = ("diffusers", "transformers")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
OWN = frozenset({"model", "roles", "start", "backend", "mode", PLAN_FACTS, VERSIONS, BASE})  # made anew by every save


def plan_facts(plan: Plan, batch_size: int) -> dict[str, Any]:
    """What a plan saves: MACs of the whole run, at the captured batch size, with it and without."""
    return {
        "mac_ratio": plan.mac_ratio,
        "macs": sum(plan.macs_per_step),
        "full_macs": plan.full_macs * len(plan.steps[plan.start :]),
        "distinct_graphs": plan.distinct_graphs,
        "peak_cache_bytes": plan.peak_cache_bytes,
        "batch_size": batch_size,
    }


def versions() -> dict[str, str]:
    """Versions of what made the plan, of libraries as far as they are in use."""
    package = __name__.partition(".")[0]
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in (package, *LIBRARIES)}
    known = {name: str(version) for name, version in found.items() if version is not None}
    return {**known, "torch": str(torch.__version__), "python": platform.python_version()}


def base_model(model: torch.nn.Module) -> dict[str, str]:
    """The name of the model on a hub, if it says where it is from: a name, or a folder of the hub's cache."""
    source = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    cached = CACHED.search(source)
    name = f"{cached['owner']}/{cached['name']}" if cached else source
    return {BASE: name} if HUB_NAME.fullmatch(name) else {}


def kept_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of the facts of a saved plan, those that go on with it when it is loaded."""
    return {name: value for name, value in facts.items() if name not in OWN}
