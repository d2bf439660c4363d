"""The Python state that a captured graph froze, as it was.

``Snapshot.of(model)`` walks from the model to everything that its ``forward`` may read: attributes of modules and of the
objects they hold, containers, hooks, closures, globals, class attributes, plain tensors. What it finds it notes twice:

    tokens    by path, compared by value: what changed, and is it a change at all?  (slow: tens of milliseconds)
    held      the very objects, in the order in which ``check`` reads them again     (fast: see ``check.py``)

Weights belong to it: a graph holds the parameters themselves, so which they are counts, and their type, place and layout,
but not their values.
"""

from __future__ import annotations

import collections
import dis
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from fxmask._torch import HELD, HOOKS, MODULE_INTERNALS, OpOverload, OpOverloadPacket, own_tensors_by_name
from fxmask.guards.check import Held, users_global_hooks
from fxmask.guards.code import ReachedCode, functions_in, is_foreign, names_read
from fxmask.guards.values import slots_of

MOST_OBJECTS = 100_000  # that are looked at; a model that holds more holds something that is no part of it
ALWAYS_READ = frozenset({"training", "forward"})  # by PyTorch itself
# Methods of PyTorch's layers that no forward calls.
NOT_IN_FORWARD = frozenset({"__init__", "__repr__", "__dir__", "__setstate__", "extra_repr", "reset_parameters"})
IMMUTABLE = (
    *(type(None), bool, int, str, bytes, range, slice, type(...)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
OPAQUE = (
    types.ModuleType,
    torch.jit.ScriptModule,
    torch.Generator,
    types.CodeType,
    types.FrameType,
    types.GeneratorType,
    Iterator,
)


@dataclass(frozen=True)
class Change:
    """One difference between the state at capture and now.

    Attributes:
        path: where: ``down_blocks.0.attn.processor.scale``.
        before: as text.
        now: as text.
        is_other_tensor: whether another tensor is there, of whatever form.
    """

    path: str
    before: str
    now: str
    is_other_tensor: bool = False

    @property
    def is_hook(self) -> bool:
        """Whether a forward hook came, went or changed."""
        return " hook" in self.path

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.now}"


class Snapshot:
    """What a model's forward may read, as it is now.

    Attributes:
        tokens: by path, what is there, in a form that compares by value.
        code: the same for classes, globals and functions, which count where both snapshots have reached them.
        held: the objects themselves, to be looked at again.
        tensors: parameters, buffers and other tensors by path.
        hooks: forward hooks, in words.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens: dict[str, Any] = {}
        self.code: dict[str, Any] = {}
        self.held = Held()
        self.tensors: dict[str, torch.Tensor] = {}
        self.hooks: list[str] = []
        self._model = model
        self._seen: dict[int, str] = {}
        self._later: list[tuple[Any, str]] = []  # objects that are held, after the modules, which give the better paths
        self._code = _reached_code(model)
        self._walk_modules()
        while self._later:
            self._walk(*self._later.pop(0))
        self._walk_code()
        while self._later:
            self._walk(*self._later.pop(0))
        self.held.freeze()

    @classmethod
    def of(cls, model: torch.nn.Module) -> Snapshot:
        """The state of a model now."""
        return cls(model)

    def changes(self, now: Snapshot) -> list[Change]:
        """What is different now, in the order of the paths."""
        paths = [path for path in {**self.tokens, **now.tokens} if self.tokens.get(path) != now.tokens.get(path)]
        found = [_change(path, self.tokens.get(path), now.tokens.get(path)) for path in paths]
        both = [path for path, token in self.code.items() if now.code.get(path, token) != token]
        return found + [Change(path, _text(self.code[path]), _text(now.code[path])) for path in both]

    # Modules

    def _walk_modules(self) -> None:
        for path, module in self._model.named_modules():
            self._module(module, path)

    def _module(self, module: torch.nn.Module, path: str) -> None:
        if id(module) in self._seen:
            return
        self._seen[id(module)] = path
        prefix = f"{path}." if path else ""
        self.tokens[path or "(the model)"] = ("object", type(module))
        for name, tensor in own_tensors_by_name(module):
            self._note(tensor, prefix + name)
        state = vars(module)
        for name in HELD:
            self.held.internal(state[name], is_foreign(type(module)), path.count("."))
        for name in HOOKS:
            self._hooks(state[name], f"{path or '(the model)'} {name.strip('_').replace('_', ' ')[:-1]}")
        self._attributes(module, [n for n in state if n not in MODULE_INTERNALS], prefix)

    def _hooks(self, hooks: dict[int, Any], path: str) -> None:
        self.held.hooks(hooks)
        for k, hook in enumerate(hooks.values()):
            self._hook(hook, f"{path} {k}")

    def _hook(self, hook: Any, path: str) -> None:
        name = getattr(hook, "__qualname__", type(hook).__name__)
        self.tokens[path] = ("hook", name)
        self.hooks.append(f"{path.rsplit(' ', 1)[0]} {name}")
        self._note(hook, f"{path} {name}")

    def _attributes(self, owner: Any, names: list[str], prefix: str) -> None:
        state, cls = vars(owner), type(owner)
        read = [n for n in names if self._is_read(n, cls)]
        self.held.attributes(state, tuple(read), own=is_foreign(cls))
        for name in read:
            self._note(state[name], prefix + name)

    def _is_read(self, name: str, cls: type) -> bool:
        """Whether an attribute may be read: of PyTorch's layers, what they set themselves only if their own code reads it."""
        read, stored = built_in_names(cls)
        if name in read or name == "forward":
            return True
        if is_foreign(cls):
            return name in ALWAYS_READ or self._code.reads(name, cls)
        return name != "training" and (name in self._code.names or (name not in stored and self._code.reads(name, cls)))

    # Everything else

    def _note(self, value: Any, path: str) -> None:
        """The token of a value; what can change inside of it is walked, now or later."""
        if isinstance(value, IMMUTABLE):
            self.tokens[path] = ("value", type(value), value)
        elif isinstance(value, (float, complex)):
            self.tokens[path] = ("value", type(value), repr(value))  # NaN equals NaN
        elif isinstance(value, torch.Tensor):
            self.tensors[path] = value
            self.held.tensors.append(value)
            self.tokens[path] = ("tensor", id(value), *form_of(value))
        elif isinstance(value, torch.nn.Module) and id(value) in self._seen:
            self.tokens[path] = ("same as", self._seen[id(value)])
        elif isinstance(value, torch.nn.Module):
            for inner, module in value.named_modules():  # a module that is no submodule: in a list, behind a processor
                self._module(module, f"{path}.{inner}" if inner else path)
        elif isinstance(value, (type, types.BuiltinFunctionType, OpOverload, OpOverloadPacket)):
            self.tokens[path] = ("identity", value)
        elif isinstance(value, OPAQUE):
            return
        elif id(value) in self._seen:  # an object that two share is as good as two equal ones
            self.tokens[path] = self.tokens.get(self._seen[id(value)], ("object", type(value)))
        elif len(self._seen) < MOST_OBJECTS:
            self._seen[id(value)] = path
            self.held.keep(value)
            if isinstance(value, (list, tuple, set, frozenset, dict, collections.deque)):
                self._walk(value, path)
            else:
                self._later.append((value, path))

    def _walk(self, value: Any, path: str) -> None:
        """The tokens of a container, a function or an object."""
        if isinstance(value, (list, tuple, collections.deque)):
            self._sequence(value, path)
        elif isinstance(value, (set, frozenset)):
            self.held.container(value)
            self.tokens[path] = ("set", frozenset(value) if all(isinstance(x, IMMUTABLE) for x in value) else len(value))
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._mapping(value, path)
        elif isinstance(value, numpy.ndarray):
            self.held.arrays.append(value)
            self.tokens[path] = ("array", str(value.dtype), value.shape, value.tobytes())
        elif isinstance(value, numpy.generic):
            self.tokens[path] = ("value", type(value), repr(value))
        elif isinstance(value, functools.partial):
            self._note(value.func, f"{path}()")
            self._note(value.args, f"{path} arguments")
            self._note(value.keywords, f"{path} arguments")
        elif isinstance(value, types.MethodType):
            self._note(value.__self__, f"{path} of")
            self._note(value.__func__, path)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        else:
            self._object(value, path)

    def _sequence(self, value: Any, path: str) -> None:
        if not isinstance(value, tuple):
            self.held.container(value)
        self.tokens[path] = ("sequence", type(value), len(value))
        for k, item in enumerate(value):
            self._note(item, f"{path}[{k}]")

    def _mapping(self, value: Mapping[Any, Any], path: str) -> None:
        self.held.container(value)
        plain = all(isinstance(key, IMMUTABLE) for key in value)
        self.tokens[path] = ("mapping", type(value), tuple(value) if plain else len(value))
        for k, (key, item) in enumerate(value.items()):
            self._note(item, f"{path}[{key!r}]" if plain else f"{path}[{k}]")

    def _function(self, function: types.FunctionType, path: str) -> None:
        self.tokens[path] = ("code", function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._note(cell.cell_contents, f"{name} in {path}")
            except ValueError:  # not filled yet
                continue
            self.held.cells.append(cell)
        if function.__defaults__:
            self._note(function.__defaults__, f"{path} defaults")
        if function.__kwdefaults__:
            self._note(function.__kwdefaults__, f"{path} defaults")
        if is_foreign(function):
            self._code.reach(function)

    def _object(self, value: Any, path: str) -> None:
        cls = type(value)
        self.tokens[path] = ("object", cls)
        if is_foreign(cls):
            self._code.meet(cls)
        elif not (cls.__module__.startswith("torch") or cls is types.SimpleNamespace):
            return  # of Python's own: loggers, locks, paths
        if isinstance(getattr(value, "__dict__", None), dict):
            self._attributes(value, list(vars(value)), f"{path}.")
        slots = [n for base in cls.__mro__ for n in slots_of(base) if hasattr(value, n)]
        if slots:
            self.held.slots(value, tuple(slots))
            for name in slots:
                self._note(getattr(value, name), f"{path}.{name}")

    # Code

    def _walk_code(self) -> None:
        """What reached functions read of their modules, and what classes hold."""
        done: set[type] = set()
        for base in {base: None for module in self._model.modules() for base in type(module).__mro__}:
            self._class(base, done)
        for function in list(self._code.functions.values()):
            self._globals(function, done)
        for k, hook in enumerate(users_global_hooks()):
            self._hook(hook, f"every module's forward hook {k}")

    def _class(self, cls: type, done: set[type]) -> None:
        if cls in done or cls in (object, torch.nn.Module):
            return
        done.add(cls)
        members = vars(cls)
        names = [n for n in members if n in ALWAYS_READ or (is_foreign(cls) and n in self._code.names)]
        self._members(members, names, cls.__qualname__)

    def _globals(self, function: types.FunctionType, done: set[type]) -> None:
        space = function.__globals__
        names, _ = names_read(function.__code__)
        self._members(space, [n for n in names if n in space], str(space.get("__name__")))
        for name in names:
            value = space.get(name)
            if isinstance(value, type) and is_foreign(value):
                self._class(value, done)
            elif isinstance(value, types.ModuleType):
                self._functions_of(value, names)

    def _functions_of(self, module: types.ModuleType, names: frozenset[str]) -> None:
        """Functions that code calls by way of PyTorch's modules: attention libraries replace some of them."""
        space = vars(module)
        if is_foreign_module(module):
            return
        self._members(space, [n for n in names if callable(space.get(n))], module.__name__)
        for name in names:
            inner = space.get(name)
            if isinstance(inner, types.ModuleType) and inner.__name__ == f"{module.__name__}.{name}":
                self._functions_of(inner, names)

    def _members(self, space: Any, names: list[str], prefix: str) -> None:
        """Functions, data and classes under names of a class or a module."""
        names = [n for n in names if f"{prefix}.{n}" not in self.code and not isinstance(space[n], types.ModuleType)]
        names = [n for n in names if not n.startswith("__") or callable(space[n])]
        self.held.entries(space, tuple(names))
        for name in names:
            path, value = f"{prefix}.{name}", space[name]
            functions = list(functions_in(value))
            if functions and not isinstance(value, functools.partial):
                self.code[path] = ("code", tuple(f.__code__ for f in functions))
                for function in functions:
                    if id(function) not in self._seen and is_foreign(function):
                        self._seen[id(function)] = path
                        self._function(function, path)
            elif callable(value):
                self.code[path] = ("identity", value)
            else:
                self.code[path] = ("there",)
                self._note(value, path)


def is_foreign_module(module: types.ModuleType) -> bool:
    """Whether a module is none of PyTorch's."""
    return module.__name__.split(".")[0] != "torch"


@functools.cache
def built_in_names(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names that the code of a layer of PyTorch's may read of itself, and those that it sets."""
    bases = [base for base in cls.__mro__ if base not in (object, torch.nn.Module) and not is_foreign(base)]
    functions = [(n, f) for base in bases for n, member in vars(base).items() for f in functions_in(member)]
    read = frozenset[str]().union(*(names_read(f.__code__)[0] for n, f in functions if n not in NOT_IN_FORWARD))
    stored = {i.argval for _, f in functions for i in dis.get_instructions(f.__code__) if i.opname == "STORE_ATTR"}
    return read, frozenset(stored)


def form_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a graph relies on of a tensor besides which it is."""
    return (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride() if tensor.layout == torch.strided else None)


def _reached_code(model: torch.nn.Module) -> ReachedCode:
    code = ReachedCode()
    for cls in {type(module): None for module in model.modules()}:
        code.meet(cls)
        for base in cls.__mro__:
            for name in ("forward", "__call__"):
                for function in functions_in(vars(base).get(name)):
                    if is_foreign(base):
                        code.reach(function, base)
    for module in model.modules():
        for function in functions_in(vars(module).get("forward")):
            code.reach(function)
    return code


def _change(path: str, before: Any, now: Any) -> Change:
    both = before is not None and now is not None and before[0] == now[0] == "tensor"
    return Change(path, _text(before), _text(now), both and before[1] != now[1])


def _text(token: Any) -> str:
    """A token as people read it."""
    if token is None:
        return "not there"
    kind, *rest = token
    if kind == "value":
        return rest[1] if isinstance(rest[1], str) and rest[0] in (float, complex) else repr(rest[1])
    if kind == "tensor":
        return f"{rest[1]}{list(rest[3])} on {rest[2]}"
    if kind in ("object", "identity"):
        return getattr(rest[0], "__qualname__", str(rest[0]))
    if kind in ("sequence", "mapping", "set"):
        size = rest[-1] if isinstance(rest[-1], int) else len(rest[-1])
        return f"{size} entries"
    if kind == "code":
        codes = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        return ", ".join(f"{c.co_name} ({c.co_filename.rsplit('/', 1)[-1]}:{c.co_firstlineno})" for c in codes)
    return " ".join(map(str, rest))
