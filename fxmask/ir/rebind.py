"""Binding a call that looks like the one before it: the same arguments by position, other tensors in their places.

``Signature.bind`` walks through nested arguments and makes names of their leaves, which takes longer than a step of a small
model may. The calls of one run differ in their tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxmask.ir.calls import BoundCall, FixedTensor, Signature

TENSORS = (torch.Tensor, torch.nn.Parameter)
VALUES = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class _Template:
    """A call whose arguments are tensors and plain values, none of them nested.

    Attributes:
        bound: the call.
        count: how many arguments came by position.
        names: of all that were given: parameters of those by position, then keywords.
        keywords: names of the latter.
        values: of those that are no tensors, by place; a tensor's place is in ``places``.
        places: of tensors.
        timestep: place of the timestep, if it was given.
    """

    bound: BoundCall
    count: int
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    values: tuple[tuple[int, Any], ...]
    places: tuple[int, ...]
    timestep: int | None

    @classmethod
    def of(cls, signature: Signature, bound: BoundCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Template | None:
        """A template of a call, or ``None`` if its arguments are nested or of other kinds."""
        parameters = list(signature.parameters.parameters)
        names = (*parameters[: len(args)], *kwargs)
        given = (*args, *kwargs.values())
        plain = all(type(x) in TENSORS or type(x) in VALUES for x in (*given, *bound.arguments.values()))
        flat = tuple(bound.arguments) == bound.layout and len(names) == len(given)
        if not plain or not flat or any(isinstance(x, FixedTensor) for _, x in bound.static):
            return None
        timestep = names.index(signature.timestep) if signature.timestep in names else None
        if signature.timestep is not None and (timestep is None or type(given[timestep]) not in (*TENSORS, int, float)):
            return None
        places = tuple(k for k, x in enumerate(given) if type(x) in TENSORS)
        values = tuple((k, x) for k, x in enumerate(given) if k not in places and k != timestep)
        return cls(bound, len(args), names, tuple(kwargs), values, places, timestep)

    def matches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[Any, ...]) -> bool:
        """Whether a call differs from this one in tensors and the timestep only."""
        if len(args) != self.count or tuple(kwargs) != self.keywords:
            return False
        for k in self.places:
            x = given[k]
            if type(x) not in TENSORS or not (x.dim() < 2 or x.is_contiguous()):
                return False
        for k, value in self.values:
            if type(given[k]) is not type(value) or given[k] != value:
                return False
        return self.timestep is None or self.timestep in self.places or type(given[self.timestep]) in (int, float)


class Rebinder:
    """Binds the calls of one model.

    Args:
        signature: of the model.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._template: _Template | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall:
        """As ``Signature.bind``.

        Raises:
            InputError: the arguments do not fit the signature.
        """
        template, given = self._template, (*args, *kwargs.values())
        if template is not None and template.matches(args, kwargs, given):
            return self._like(template, given)
        bound = self.signature.bind(args, kwargs)
        self._template = _Template.of(self.signature, bound, args, kwargs)
        return bound

    def _like(self, template: _Template, given: tuple[Any, ...]) -> BoundCall:
        before, signature = template.bound, self.signature
        arguments = dict(before.arguments)
        arguments.update(zip(template.names, given, strict=True))
        timestep = before.timestep
        if template.timestep is not None:
            timestep, sample = given[template.timestep], arguments[signature.sample]
            batch = sample.shape[0] if sample.dim() else 1
            arguments[template.names[template.timestep]] = signature.canonical_timestep(timestep, sample.device, batch)
        tensors = {name: arguments[name] for name in before.tensors}
        bound = BoundCall(tensors, before.static, arguments, before.spec, before.layout, timestep, before.samples)
        vars(bound)["static_key"] = before.static_key
        return bound
