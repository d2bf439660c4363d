"""What a setting is: everything in a pipeline's call that a plan depends on, and nothing of what makes this image.

steps, size, guidance, ... (plain arguments)   +   scheduler (class, configuration)   +   adapters on the denoiser
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxmask.sampling.same_sampler import scheduler_facts
from fxmask.sampling.twin import is_scheduler
from fxmask.storage.differences import differences, scheduler_differences

# Of an image, rather than of how it is sampled.
OF_THE_IMAGE = frozenset(
    "num_images_per_prompt num_videos_per_prompt num_waveforms_per_prompt batch_size output_type return_dict callback_steps "
    "clean_caption class_labels seed".split()
)
SCHEDULES = ("timesteps", "sigmas")  # lists of numbers that say how it is sampled
SHOWN = 5  # differences in one line
TRUE_GUIDANCE = "true_cfg_scale"
SIZED = ("image", "latents", "mask_image", "control_image", "video")


@dataclass(frozen=True)
class Setting:
    """A setting, as plain data that JSON can hold.

    Attributes:
        arguments: plain arguments of the call by name, in order; sizes of images and latents among them.
        scheduler: class and configuration, as JSON.
        adapters: names and scales of what is added to the denoiser, as JSON.
    """

    arguments: tuple[tuple[str, Any], ...]
    scheduler: str
    adapters: str

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.arguments if name in MAIN and value is not None]
        facts = json.loads(self.scheduler)
        schedulers = [facts] if "class" in facts else list(facts.values())
        return ", ".join([*shown, *(str(x["class"]) for x in schedulers if "class" in x)])

    def differences(self, now: Setting) -> list[str]:
        """In what another setting differs from this one, each in a few words."""
        found = differences(dict(self.arguments), dict(now.arguments))
        return [*found, *self.differences_around(now)]

    def differences_around(self, now: Setting) -> list[str]:
        """The same of what is no argument: schedulers and adapters."""
        before, after = json.loads(self.scheduler), json.loads(now.scheduler)
        if before.get("class") and after.get("class"):
            found = scheduler_differences(before, after)
        else:  # several, by name
            names = sorted(before.keys() & after.keys())
            found = [f"{n}.{x}" for n in names for x in scheduler_differences(before[n], after[n])]
        adapters, others = ({"adapters": json.loads(x.adapters)} for x in (self, now))
        return [*(f"scheduler.{x}" for x in found), *differences(adapters, others)]

    def to_data(self) -> dict[str, Any]:
        """As JSON."""
        return {"arguments": [list(pair) for pair in self.arguments], "scheduler": self.scheduler, "adapters": self.adapters}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Setting:
        """From what ``to_data`` made."""
        given = tuple((str(n), _frozen(v)) for n, v in data["arguments"] if v is not None)
        return cls(given, str(data["scheduler"]), str(data["adapters"]))


MAIN = ("num_inference_steps", "height", "width", "guidance_scale", "eta", "strength", "num_frames")


def setting_of(
    pipe: Any, call: Any, args: Sequence[Any], kwargs: Mapping[str, Any], models: Sequence[torch.nn.Module]
) -> Setting:
    """The setting of one call of a pipeline.

    Args:
        pipe: the pipeline.
        call: its ``__call__``, with or without ``self``.
        args: of the call.
        kwargs: of the call.
        models: its denoisers.
    """
    named = _by_name(call, args, kwargs)
    arguments = tuple(sorted(_plain_arguments(named).items()))
    return replace(setting_around(pipe, models), arguments=arguments)


def setting_around(pipe: Any, models: Sequence[torch.nn.Module]) -> Setting:
    """The setting of every call, without its arguments: schedulers and adapters as they are now."""
    schedulers = {name: scheduler_facts(x) for name, x in vars(pipe).items() if is_scheduler(x)}
    facts = schedulers["scheduler"] if schedulers.keys() == {"scheduler"} else schedulers
    adapters = [adapters_of(model) for model in models]
    return Setting((), _as_json(facts), _as_json(adapters[0] if len(adapters) == 1 else adapters))


def unlike(settings: Iterable[Setting], now: Setting, *, arguments: bool = True) -> str:
    """In what a setting differs from the nearest of others, in one line; empty if there is none, or one is equal."""
    found = [known.differences(now) if arguments else known.differences_around(now) for known in settings]
    nearest = min(found, key=len, default=[])
    more = f"; and {len(nearest) - SHOWN} more" if len(nearest) > SHOWN else ""
    return "; ".join(nearest[:SHOWN]) + more


def _as_json(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, default=repr)


def _by_name(call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, defaults among them."""
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the call itself will say what is wrong
        return dict(kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        named.update(value if inspect.signature(call).parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _plain_arguments(named: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in named.items():
        if name in OF_THE_IMAGE or name.startswith("callback"):
            continue
        if value is None:  # or not given: what is not plain, as a generator, is not told apart from none
            continue
        if isinstance(value, (bool, int, float)):
            found[name] = value
        elif name in SCHEDULES and hasattr(value, "__iter__"):
            found[name] = tuple(float(x) for x in value)
        elif name.endswith(SIZED):
            size = _size_of(value)
            if size is not None:
                found[f"size of {name}"] = size
    if TRUE_GUIDANCE in named:  # there, guidance needs something to guide away from
        found["negative"] = any(x is not None for name, x in named.items() if name.startswith("negative_"))
    return found


def _size_of(value: Any) -> tuple[int, ...] | None:
    """Height and width of an image, or of latents; of several, the first one's."""
    if isinstance(value, (list, tuple)) and value:
        return _size_of(value[0])
    if isinstance(value, torch.Tensor):
        return tuple(value.shape[2:]) if value.dim() > 2 else tuple(value.shape[1:])
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):  # arrays: height, width, channels
        return tuple(int(n) for n in shape)
    size = getattr(value, "size", None)
    return tuple(size) if isinstance(size, tuple) else None


def adapters_of(model: torch.nn.Module) -> dict[str, Any]:
    """Adapters on a denoiser: which are active, at what scales; of image prompts, their scales."""
    active: set[str] = set()
    scales: dict[str, float] = {}
    merged: set[str] = set()
    layer: Any
    for layer in model.modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and hasattr(layer, "active_adapters"):
            names = list(layer.active_adapters)
            active.update(map(str, names))
            merged.update(map(str, getattr(layer, "merged_adapters", ())))
            scales.update({str(n): float(scaling[n]) for n in names if n in scaling})
    prompts = []
    for processor in getattr(model, "attn_processors", {}).values() if hasattr(model, "attn_processors") else ():
        scale = getattr(processor, "scale", None)
        if isinstance(scale, (list, tuple)):
            prompts.append([float(x) if isinstance(x, (int, float)) else repr(x) for x in scale])
    return {"active": sorted(active), "merged": sorted(merged), "scales": scales, "image prompts": prompts}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
