"""A second model over the same weights, so that capture never touches what another thread runs.

Exporting puts fake tensors in the place of parameters, runs ``forward`` (which may keep things in the model) and undoes both.
All of that happens to the shadow: its modules, their dictionaries, the containers and objects that they hold and the closures
of functions that refer to them are its own; tensors, classes and what cannot be copied are shared.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy
import torch

from fxmask._torch import COMPILED_CALL, HELD, forget_compiled_call, uncompiled
from fxmask.guards.code import is_foreign
from fxmask.guards.values import slots_of

SHARED = (
    *(type(None), bool, int, float, complex, str, bytes, type, torch.Tensor, torch.dtype, torch.device, torch.Size),
    *(types.ModuleType, types.BuiltinFunctionType, torch.jit.ScriptModule, torch.Generator),
)


def shadow_of(model: torch.nn.Module) -> Any:
    """A model that computes the same with the same tensors, and whose Python state is its own."""
    return _Shadow().of(model)


class _Unwrapped(torch.nn.Module):
    """In the place of what ``torch.compile`` wrapped around a module: the same path, and the module as it is written."""

    _orig_mod: torch.nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module itself."""
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)


class _Shadow:
    """Copies by identity: what is shared within the model is shared within its shadow."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no other object gets the identity of one that was copied

    def of(self, value: Any) -> Any:
        """The shadow of a value; the value itself if it can be shared."""
        if isinstance(value, SHARED):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._kept.append(value)
        for kind, make in _MAKERS.items():
            if isinstance(value, kind):
                return make(self, value)
        return self._object(value)

    def _keep(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = made
        return made

    def _module(self, module: torch.nn.Module) -> Any:
        if uncompiled(module) is not module:
            holder = self._keep(module, _Unwrapped())
            holder.training = module.training
            holder.add_module("_orig_mod", self.of(uncompiled(module)))
            return holder
        made = self._keep(module, object.__new__(type(module)))
        state = vars(module)
        vars(made).update({name: type(value)(value) if name in HELD else value for name, value in state.items()})
        for name, value in state.items():
            if name == HELD[2]:
                vars(made)[name].update({key: self.of(part) for key, part in value.items()})
            elif name not in HELD:
                vars(made)[name] = self.of(value)
        if state.get(COMPILED_CALL) is not None:
            forget_compiled_call(made)
        return made

    def _mapping(self, value: dict[Any, Any]) -> Any:
        made = self._keep(value, _copy(value))
        for key, item in value.items():
            shadow = self.of(item)
            if shadow is not item and made is not value:
                made[key] = shadow
        return made

    def _list(self, value: Any) -> Any:
        made = self._keep(value, _copy(value))
        for k, item in enumerate(value):
            if made is not value:
                made[k] = self.of(item)
        return made

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        items = [self.of(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return self._keep(value, value)
        return self._keep(value, value._make(items) if hasattr(value, "_make") else type(value)(items))

    def _set(self, value: set[Any]) -> Any:
        return self._keep(value, _copy(value))

    def _method(self, value: types.MethodType) -> Any:
        owner, function = self.of(value.__self__), self.of(value.__func__)
        same = owner is value.__self__ and function is value.__func__
        return self._keep(value, value if same else types.MethodType(function, owner))

    def _partial(self, value: functools.partial[Any]) -> Any:
        function, arguments = self.of(value.func), self.of(value.args)
        keywords = {name: self.of(item) for name, item in value.keywords.items()}
        made = type(value)(function, *arguments, **keywords)
        vars(made).update({name: self.of(item) for name, item in vars(value).items()})
        return self._keep(value, made)

    def _function(self, value: types.FunctionType) -> Any:
        """A function of the user's whose closure holds something of the model's; any other is shared."""
        if not value.__closure__ or not is_foreign(value):
            return self._keep(value, value)
        self._keep(value, value)  # meanwhile, for functions that refer to themselves
        cells = [_contents(cell) for cell in value.__closure__]
        shadows = [None if cell is None else self.of(cell[0]) for cell in cells]
        if all(cell is None or cell[0] is shadow for cell, shadow in zip(cells, shadows, strict=True)):
            return value
        closure = tuple(
            old if cell is None else types.CellType(shadow)
            for old, cell, shadow in zip(value.__closure__, cells, shadows, strict=True)
        )
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        made.__kwdefaults__ = value.__kwdefaults__
        vars(made).update(vars(value))
        return self._keep(value, made)

    def _array(self, value: numpy.ndarray[Any, Any]) -> Any:
        return self._keep(value, value.copy())

    def _object(self, value: Any) -> Any:
        """An object of a user's class; one that does not let itself be copied is shared."""
        cls = type(value)
        if not (is_foreign(cls) or cls is types.SimpleNamespace):
            return self._keep(value, value)
        try:
            made = object.__new__(cls)
        except TypeError:  # of a class that is written in C
            return self._keep(value, value)
        self._keep(value, made)
        for name in dict.fromkeys(name for base in cls.__mro__ for name in slots_of(base)):
            if hasattr(value, name):
                object.__setattr__(made, name, self.of(getattr(value, name)))
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            made.__dict__.update({name: self.of(item) for name, item in state.items()})
        return made


_MAKERS: dict[Any, Callable[[_Shadow, Any], Any]] = {
    torch.nn.Module: _Shadow._module,
    dict: _Shadow._mapping,
    (list, collections.deque): _Shadow._list,
    tuple: _Shadow._tuple,
    (set, frozenset): _Shadow._set,
    types.MethodType: _Shadow._method,
    functools.partial: _Shadow._partial,
    types.FunctionType: _Shadow._function,
    numpy.ndarray: _Shadow._array,
}


def _copy(value: Any) -> Any:
    """A container of its own; one that does not let itself be copied is shared."""
    try:
        return copy.copy(value)
    except Exception:
        return value


def _contents(cell: types.CellType) -> tuple[Any] | None:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not filled yet
        return None
