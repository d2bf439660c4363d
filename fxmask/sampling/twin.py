"""Twins: copies of a pipeline that report to a watcher."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxmask._torch import forget_compiled_call
from fxmask.frontend.modules import unwrapped
from fxmask.frontend.offloading import standing_in

LANE = "cache_context"  # in which diffusers' pipelines call a denoiser, with the name of the call: "cond", "uncond"
METHODS = ("forward", "encode")  # that are watched; an autoencoder is not called through its forward
Module = torch.nn.Module


@dataclass(frozen=True)
class ComponentMethod:
    """A method of a component: its original, bound to the component's copy."""

    component: str
    method: str
    module: Module
    original: Callable[..., Any]


class _Watcher(Protocol):
    """What a twin reports to, and what answers in its place.

    Attributes:
        lane: name of the call that is made now, where the pipeline says it.
    """

    lane: str | None

    def called(self, entry: ComponentMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A component is called."""

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A scheduler is called."""


def make_twin(pipe: Any, watcher: _Watcher | None, memo: dict[int, Any] | None = None, prefix: str = "") -> Any:
    """A copy of a pipeline that reports to ``watcher``; without one, a copy that keeps the schedulers' present state."""
    memo = {} if memo is None else memo
    twin = object.__new__(type(pipe))
    memo[id(pipe)] = twin
    twin.__dict__.update(pipe.__dict__)
    # Its own parts first, so that they have the names that they have here.
    for name, value in sorted(pipe.__dict__.items(), key=lambda item: is_pipeline(item[1]) and not isinstance(item[1], Module)):
        if id(value) not in memo:
            if isinstance(value, Module):
                memo[id(value)] = standing_in(value) if watcher is None else _watched_module(value, prefix + name, watcher)
            elif is_scheduler(value):
                memo[id(value)] = copy.deepcopy(value) if watcher is None else _watched_scheduler(value, watcher)
            elif is_pipeline(value):
                make_twin(value, watcher, memo, f"{prefix}{name}.")
            else:
                continue
        twin.__dict__[name] = memo[id(value)]
    return twin


def is_scheduler(value: Any) -> bool:
    """Whether it steps, and has timesteps or is given them."""
    return callable(getattr(value, "step", None)) and (hasattr(value, "set_timesteps") or hasattr(value, "timesteps"))


def is_pipeline(value: Any) -> bool:
    """Whether an attribute of a pipeline is another one, which holds its own components."""
    return callable(value) and hasattr(value, "__dict__") and any(map(is_scheduler, vars(value).values()))


def _watched_module(module: Module, name: str, watcher: _Watcher) -> Module:
    module = standing_in(module)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    forget_compiled_call(twin)
    for method in METHODS:
        original = getattr(twin, method, None)
        if callable(original):
            twin.__dict__[method] = _reporting(ComponentMethod(name, method, unwrapped(module), original), watcher)
    context = getattr(twin, LANE, None)
    if callable(context):
        twin.__dict__[LANE] = _naming(context, watcher)
    return twin


def _reporting(entry: ComponentMethod, watcher: _Watcher) -> Callable[..., Any]:
    @functools.wraps(entry.original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return watcher.called(entry, args, kwargs)

    return call


def _naming(original: Callable[..., Any], watcher: _Watcher) -> Callable[..., Any]:
    @contextlib.contextmanager
    @functools.wraps(original)
    def context(name: str, **options: Any) -> Iterator[None]:
        before, watcher.lane = watcher.lane, name
        try:
            with original(name, **options):
                yield
        finally:
            watcher.lane = before

    return context


def _watched_scheduler(scheduler: Any, watcher: _Watcher) -> Any:
    """A copy of another class, not with another attribute: copies that the pipeline makes of it must step themselves."""
    cls = type(scheduler)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watcher.stepped(self, functools.partial(cls.step, self), args, kwargs)

    twin = copy.deepcopy(scheduler)
    twin.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__, "__doc__": cls.__doc__})
    return twin


def unwatched(scheduler: Any) -> Any:
    """A copy of the scheduler that reports to nobody."""
    plain = copy.deepcopy(scheduler)
    plain.__class__ = type(scheduler).__mro__[1]
    return plain


def hide_progress(pipe: Any) -> None:
    """Replays show no bars."""
    for part in (pipe, *filter(is_pipeline, vars(pipe).values())):
        shown = vars(part).get("_progress_bar_config")
        part.__dict__["_progress_bar_config"] = {**(shown if isinstance(shown, dict) else {}), "disable": True}
