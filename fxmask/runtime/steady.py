"""The next call of a lane, prepared by the one before it.

The calls of one run differ in the sample and the timestep. What else there is to a call (its form, its conditioning, which
argument is which of the graph's inputs) is looked at once per run. A later call is compared with that, by identity, and bound
by position; one that differs in anything is looked at closely, by the way that the first one took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask._torch import version_of
from fxmask.guards.ambient import modes
from fxmask.ir.calls import RETURN_DICT, BoundCall
from fxmask.ir.rebind import TENSORS, VALUES
from fxmask.runtime import clock
from fxmask.runtime.timesteps import types_of
from fxmask.runtime.variants import Variant


@dataclass(frozen=True, slots=True)
class Steady:
    """A call that goes on as its lane did. Places count the arguments by position, then those by keyword, then what is in
    those that are containers.

    Attributes:
        count: how many arguments come by position.
        keywords: names of the others.
        containers: place, type, and keys or length, of arguments that hold others.
        conditioning: place, tensor, and how often that was written to when it was looked at.
        changing: place, shape, type and device of the tensors that change from step to step.
        values: place and value of what is no tensor.
        timestep: its place; -1 if there is none.
        timestep_form: its type, and shape, type and device if it is a tensor.
        readable: whether it can be read without waiting, whichever it is.
        inputs: the place of each of the program's inputs.
        types: that the timestep may have been rounded to.
        modes: around the call.
        return_dict: what was asked for.
    """

    count: int
    keywords: tuple[str, ...]
    containers: tuple[tuple[int, Any, Any], ...]
    conditioning: tuple[tuple[int, torch.Tensor, int], ...]
    changing: tuple[tuple[int, torch.Size, torch.dtype, torch.device], ...]
    values: tuple[tuple[int, Any], ...]
    timestep: int
    timestep_form: tuple[Any, ...]
    readable: bool
    inputs: tuple[int, ...]
    types: tuple[torch.dtype, ...]
    modes: tuple[Any, ...]
    return_dict: Any

    @classmethod
    def of(cls, variant: Variant, bound: BoundCall, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Steady | None:
        """What the calls after this one look like, or ``None`` if each must be looked at closely.

        Args:
            variant: that runs the call.
            bound: the call.
            args: as it was given.
            kwargs: as it was given.
        """
        program, signature = variant.program, variant.program.signature
        parameters = list(signature.parameters.parameters)
        names, given = [*parameters[: len(args)], *kwargs], [*args, *kwargs.values()]
        if variant.asks_in_steps or len(names) != len(given):
            return None
        containers = []
        for k, x in enumerate(list(given)):
            if type(x) in (dict, list, tuple):
                keys = tuple(x) if type(x) is dict else len(x)
                containers.append((k, type(x), keys))
                names += [f"{names[k]}.{key}" for key in (x if type(x) is dict else range(len(x)))]
                given += x.values() if type(x) is dict else x
        held = {k for k, _, _ in containers}
        place_of = {name: k for k, name in enumerate(names) if k not in held}
        if len(place_of) != len(names) - len(held) or not all(name in place_of for name in program.inputs):
            return None
        timestep = place_of.get(signature.timestep, -1) if signature.timestep is not None else -1
        if signature.timestep is not None and (timestep < 0 or type(given[timestep]) not in (*TENSORS, int, float)):
            return None
        conditioning, changing = [], []
        for name in program.inputs:
            k = place_of[name]
            x = given[k]
            if k == timestep:
                continue
            if type(x) not in TENSORS or (x.dim() >= 2 and not x.is_contiguous()):
                return None
            if program.roles[name] != "conditioning":
                changing.append((k, x.shape, x.dtype, x.device))
                continue
            version = version_of(x)
            if version == -1 and clock.on_host(x):
                return None  # nobody counts its changes, and comparing it costs little
            conditioning.append((k, x, version))
        tensors = {timestep, *(k for k, *_ in conditioning), *(k for k, *_ in changing)}
        values = tuple((k, given[k]) for k in place_of.values() if k not in tensors)
        if not all(type(x) in VALUES for _, x in values):
            return None
        return cls(
            count=len(args),
            keywords=tuple(kwargs),
            containers=tuple(containers),
            conditioning=tuple(conditioning),
            changing=tuple(changing),
            values=values,
            timestep=timestep,
            timestep_form=_form(given[timestep]) if timestep >= 0 else (),
            readable=timestep >= 0 and (type(given[timestep]) not in TENSORS or clock.on_host(given[timestep])),
            inputs=tuple(place_of[name] for name in program.inputs),
            types=tuple(types_of(bound)),
            modes=modes(bound.sample.device.type),
            return_dict=bound.arguments.get(RETURN_DICT),
        )

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """What a call is given, by place; ``None`` if it differs in more than the sample and the timestep."""
        if len(args) != self.count or tuple(kwargs) != self.keywords:
            return None
        given = [*args, *kwargs.values()]
        for k, kind, keys in self.containers:
            x = given[k]
            if type(x) is not kind or (tuple(x) if kind is dict else len(x)) != keys:
                return None
            given += x.values() if kind is dict else x
        for k, tensor, version in self.conditioning:
            x = given[k]
            if x is not tensor and not (type(x) in TENSORS and is_same_memory(x, tensor)):
                return None
            if version_of(x) != version:
                return None
        for k, shape, dtype, device in self.changing:
            x = given[k]
            if type(x) not in TENSORS or x.shape != shape or x.dtype is not dtype or x.device != device:
                return None
            if not x.is_contiguous():
                return None
        for k, value in self.values:
            x = given[k]
            if x is not value and (type(x) is not type(value) or x != value):
                return None
        if self.timestep >= 0 and _form(given[self.timestep]) != self.timestep_form:
            return None
        return given


def is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are one in memory, layout and type."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _form(timestep: Any) -> tuple[Any, ...]:
    kind = type(timestep)
    return (kind, timestep.shape, timestep.dtype, timestep.device) if kind in TENSORS else (kind,)
