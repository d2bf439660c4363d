"""Which code a model's forward can reach, and which names that code reads.

Python cannot say beforehand what a function will read. But a name that occurs in no code that ``forward`` can reach is
not read by it, and that leaves little enough to be watched. Names are followed without types: a method of that name in
any class that was met counts as reached. That finds too much rather than too little.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

READS = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_SUPER_ATTR", "DELETE_ATTR", "LOAD_DEREF"})
WHOLE = frozenset({"vars", "__dict__", "__getattribute__", "attrgetter"})  # read names that code need not spell
BUILDS = frozenset({"FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "BUILD_STRING", "BINARY_OP"})
NEVER_READ = frozenset({"__init__", "__new__", "__init_subclass__", "__class_getitem__"})  # by a model that is there already
LONGEST_NAME = 64  # of a string constant that may name an attribute

# Packages whose functions are taken as they are: what they read is theirs, or is asked for in ``ambient``.
TAKEN_AS_IS = frozenset({"torch", "numpy", "fxmask", "functorch", "triton", "sympy", *sys.stdlib_module_names})


def package_of(thing: Any) -> str:
    """The top-level package that a class or function is defined in."""
    return str(getattr(thing, "__module__", None) or "builtins").split(".")[0]


def is_foreign(thing: Any) -> bool:
    """Whether a class or function is none of PyTorch, NumPy or Python's own."""
    return package_of(thing) not in TAKEN_AS_IS or getattr(thing, "__module__", "") == "__main__"


class ReachedCode:
    """Functions that were reached, and the names that they read.

    Attributes:
        names: every attribute, global and string constant that is read.
        functions: the reached ones, by identity of their code.
        by_name: classes with code that reads attributes by names that it may have made up (``getattr(self, name)``).
        everything: whether a plain function does so; of which objects, nobody knows.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.functions: dict[int, types.FunctionType] = {}
        self.by_name: set[type] = set()
        self.everything = False
        self._methods: dict[str, list[tuple[type, types.FunctionType]]] = {}
        self._classes: set[type] = set()

    def meet(self, cls: type) -> None:
        """Take a class into account: its methods are reached through their names."""
        for base in cls.__mro__:
            if base in self._classes or base is object or not is_foreign(base):
                continue
            self._classes.add(base)
            for name, member in vars(base).items():
                for function in functions_in(member):
                    self._methods.setdefault(name, []).append((base, function))
                    if name in self.names or _is_special(name):
                        self.reach(function, base)

    def reach(self, function: types.FunctionType, owner: type | None = None) -> None:
        """Take a function and all that it can reach into account."""
        waiting = [(owner, function)]
        while waiting:
            cls, current = waiting.pop()
            if id(current.__code__) in self.functions:
                continue
            self.functions[id(current.__code__)] = current
            names, made_up = names_read(current.__code__)
            names -= NEVER_READ
            if made_up and current.__name__ != "__getattr__":  # whose names others have spelled
                if cls is not None:
                    self.by_name.add(cls)
                    waiting.extend(self._any_method(cls))
                self.everything = self.everything or cls is None
            fresh = names - self.names
            self.names |= names
            for name in fresh:
                waiting.extend(self._methods.get(name, ()))
            for name in names:
                value = current.__globals__.get(name)
                waiting.extend((None, f) for f in functions_in(value) if is_foreign(f))
                if isinstance(value, type) and is_foreign(value):
                    self.meet(value)

    def _any_method(self, cls: type) -> Iterator[tuple[type, types.FunctionType]]:
        """Methods of a class and of what inherits from it: code that puts a name together may mean each of them."""
        for members in self._methods.values():
            yield from ((owner, f) for owner, f in members if issubclass(owner, cls) and f.__name__ not in NEVER_READ)

    def reads(self, name: str, cls: type) -> bool:
        """Whether some reached code may read an attribute of this name of an object of this class."""
        return self.everything or name in self.names or not self.by_name.isdisjoint(cls.__mro__)


def functions_in(member: Any) -> Iterator[types.FunctionType]:
    """Python functions behind a class's or module's entry: plain, static, of a property, decorated, partial."""
    if isinstance(member, types.FunctionType):
        yield member
        wrapped = getattr(member, "__wrapped__", None)
        if wrapped is not None:
            yield from functions_in(wrapped)
    elif isinstance(member, (staticmethod, classmethod, types.MethodType)):
        yield from functions_in(member.__func__)
    elif isinstance(member, property):
        for part in (member.fget, member.fset):
            yield from functions_in(part)
    elif isinstance(member, (functools.cached_property, functools.partial)):
        yield from functions_in(member.func)


@functools.cache
def names_read(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """Names that a code object and those inside of it read, and whether it reads others, which it makes up as it runs."""
    instructions = list(dis.get_instructions(code))
    names = {i.argval for i in instructions if i.opname in READS and isinstance(i.argval, str)}
    made_up = not names.isdisjoint(WHOLE) or any(
        _is_made_up(instructions[k + 1 :]) for k, i in enumerate(instructions) if i.argval == "getattr" and i.opname in READS
    )
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, inner_made_up = names_read(constant)
            names |= inner
            made_up = made_up or inner_made_up
        elif isinstance(constant, str) and len(constant) <= LONGEST_NAME and constant.isidentifier():
            names.add(constant)
        elif isinstance(constant, tuple):
            names.update(_words(constant))
    return frozenset(names), made_up


def _is_made_up(following: list[dis.Instruction]) -> bool:
    """Whether the name in a call of ``getattr`` is anything but a constant; ``following``: instructions after its name."""
    arguments = list(itertools.takewhile(lambda i: not i.opname.startswith("CALL"), following))
    constant = any(i.opname == "LOAD_CONST" and isinstance(i.argval, str) for i in arguments)
    return not constant or any(i.opname in BUILDS for i in arguments)


def _words(constants: Iterable[Any]) -> Iterator[str]:
    yield from (c for c in constants if isinstance(c, str) and len(c) <= LONGEST_NAME and c.isidentifier())


def _is_special(name: str) -> bool:
    """Methods that Python calls without naming them."""
    return name.startswith("__") and name.endswith("__") and name not in ("__repr__", "__reduce__", "__del__", *NEVER_READ)
