"""Denoisers that wait on the host until they are called: ``enable_model_cpu_offload``, a hook of accelerate's around each.

Such a hook moves all weights of its module at once, before a call; what is called behind it finds them where it needs them. So
it is carried over to whatever stands in for the module: the accelerated one, and the copies that are recorded. Hooks that move
the weights of one layer after another, in the middle of a call, are none of these.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxmask._torch import forget_compiled_call
from fxmask.frontend.modules import HOOKED, unwrapped

HOOK, BEFORE = "_hf_hook", "_old_forward"
DEPTH = "_fxmask_depth"  # under which a hook knows how many ask for its weights


def hook_of(module: torch.nn.Module) -> Any:
    """The hook that moves all of a module before its call; ``None`` if it has none, or one of another kind."""
    hook = vars(module).get(HOOK)
    return hook if any(cls.__name__ == "CpuOffload" for cls in type(hook).__mro__) else None


def move_hook(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Take such a hook off one module, if it has one, and put it around another one with the same weights."""
    hook = hook_of(source)
    if hook is None or hook_of(target) is hook:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(source)
    if getattr(vars(source).get("forward"), "__func__", None) is getattr(type(source), "forward", None):
        del source.__dict__["forward"]  # what was put back is the class's own
    add_hook_to_module(target, hook)


def standing_in(module: torch.nn.Module) -> torch.nn.Module:
    """The denoiser behind a module; where that is offloaded, a copy with the same weights and the hook."""
    original, hook = unwrapped(module), hook_of(module)
    if hook is None or module is original:
        return original
    copy: Any = object.__new__(type(original))
    copy.__dict__.update(original.__dict__)
    forget_compiled_call(copy)
    forward = vars(original).get("forward") or functools.partial(type(original).forward, copy)
    entries = {HOOK: hook, BEFORE: forward, HOOKED: original}
    copy.__dict__.update(entries, forward=functools.wraps(original.forward)(_moving(hook, copy, forward)))
    hooked: torch.nn.Module = copy
    return hooked


def _moving(hook: Any, module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, forward(*args, **kwargs))

    return call


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """Where an offloaded module runs; ``None`` if it is not."""
    hook = hook_of(module)
    return None if hook is None else torch.device(hook.execution_device)


@contextlib.contextmanager
def onloaded(module: torch.nn.Module) -> Iterator[None]:
    """The weights of an offloaded module are where it runs, inside; of any other one nothing is done."""
    hook = hook_of(module)
    if hook is None:
        yield
        return
    depth = vars(hook).get(DEPTH, 0)
    vars(hook)[DEPTH] = depth + 1
    try:
        if not depth:
            hook.pre_forward(module)
        yield
    finally:
        vars(hook)[DEPTH] = depth
        if not depth:
            hook.init_hook(module)
