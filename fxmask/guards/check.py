"""Is everything that a snapshot holds still the same object? One pass in C over all of it.

Of what can be changed, identity is compared, not equality: an equal object that took another's place would be changed
later without anybody noticing. A difference is therefore a question, which a new snapshot answers by value.
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

import numpy
import torch

from fxmask._torch import GLOBAL_HOOKS, hooks_so_far
from fxmask.guards.code import is_foreign

SMALL = 200  # values of a model that is looked at in full in each step of a run: some 20 microseconds
PER_STEP = 100  # values of others that are looked at then: some 8 microseconds
CONTAINERS_PER_STEP = 24  # of PyTorch's, with submodules and weights, those near the model itself first: some 2 microseconds
ARRAYS_PER_STEP = 4
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

_dtype_of: Callable[[torch.Tensor], torch.dtype] = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_contents_of = operator.attrgetter("cell_contents")


class Held:
    """The objects that a snapshot is made of.

    Attributes:
        tensors: whose type and memory count.
        arrays: NumPy arrays, compared by value.
        cells: of closures.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.arrays: list[numpy.ndarray[Any, Any]] = []
        self.cells: list[Any] = []
        self._kept: list[Any] = []
        self._hooks = 0
        self._numbers_of_hooks: list[int] = []
        self._sized: list[Sized] = []
        self._internal: list[dict[Any, Any]] = []
        self._depths: list[int] = []  # of these
        self._hooked: list[dict[int, Any]] = []
        self._data: list[Any] = []  # containers that users change
        self._plain: list[tuple[Any, tuple[str, ...]]] = []  # namespaces, and their entries that are plain values
        self._objects: list[tuple[Any, tuple[str, ...]]] = []  # and those that are objects
        self._own: list[tuple[Any, tuple[str, ...]]] = []  # and those that users change
        self._slots: list[tuple[Callable[[Any], Any], Any]] = []

    def keep(self, value: Any) -> None:
        """Hold an object, so that no other can get its identity."""
        self._kept.append(value)

    def internal(self, container: dict[Any, Any], fillable: bool, depth: int = 0) -> None:
        """Watch a container of PyTorch's: a module's parameters or submodules.

        Args:
            container: to watch.
            fillable: also while it is empty.
            depth: of the module in the model.
        """
        if container:
            self._internal.append(container)
            self._depths.append(depth)
        elif fillable:
            self._sized.append(container)

    def hooks(self, hooks: dict[int, Any]) -> None:
        """Watch hooks: none of these goes, and while no hook is registered anywhere none comes."""
        if hooks:
            self.internal(hooks, False)
        self._hooked.append(hooks)

    def container(self, container: Any) -> None:
        """Watch a container's size, and what it holds; in each step of a run, too."""
        self._sized.append(container)
        self._data.append(container)

    def attributes(self, owner: Any, names: tuple[str, ...], own: bool) -> None:
        """Watch an object's attributes, and whether others come or go; ``own``: in each step of a run, too."""
        self._sized.append(owner)
        if own:
            self._own.append((owner, names))
        self.entries(owner, names)

    def entries(self, space: Any, names: tuple[str, ...]) -> None:
        """Watch entries of a namespace, and no others."""
        plain = tuple(n for n in names if _is_plain(space[n]))
        for group, chosen in ((self._plain, plain), (self._objects, tuple(n for n in names if n not in plain))):
            if chosen:
                group.append((space, chosen))

    def slots(self, owner: Any, names: tuple[str, ...]) -> None:
        """Watch attributes that are kept in slots."""
        self._slots.append((_getter(operator.attrgetter, names), owner))

    def freeze(self) -> None:
        """Note down how everything is now."""
        self.tensors = list({id(x): x for x in self.tensors}.values())
        self._addressed = [x for x in self.tensors if type(x) in PLAIN_TENSORS and not x.is_meta]
        self._plain_getters = [_getter(operator.itemgetter, names) for _, names in self._plain]
        self._plain_spaces = [space for space, _ in self._plain]
        self._plain_values = list(map(operator.call, self._plain_getters, self._plain_spaces))
        self._object_getters = [_getter(operator.itemgetter, names) for _, names in self._objects]
        self._object_spaces = [space for space, _ in self._objects]
        # ``==`` on two of these is a matter of identity, but for tensors of one element.
        self._internal_copies = [dict(container) for container in self._internal]
        self._singles = [c for c in self._internal if any(isinstance(x, torch.Tensor) and x.numel() == 1 for x in c.values())]
        self._values = list(self._read())
        self._sizes = list(map(len, self._sized))
        self._types = list(map(_dtype_of, self.tensors))
        self._addresses = list(map(torch.Tensor.data_ptr, self._addressed))
        self._contents = [x.tobytes() for x in self.arrays]
        self._freeze_step()

    def same(self) -> bool:
        """Whether everything is as it was."""
        try:
            return (
                self._no_new_hooks()
                and list(map(len, self._sized)) == self._sizes
                and list(map(operator.call, self._plain_getters, self._plain_spaces)) == self._plain_values
                and self._internal == self._internal_copies
                and all(map(operator.is_, self._read(), self._values))
                and list(map(_dtype_of, self.tensors)) == self._types
                and list(map(torch.Tensor.data_ptr, self._addressed)) == self._addresses
                and all(x.tobytes() == y for x, y in zip(self.arrays, self._contents, strict=True))
            )
        except (KeyError, AttributeError, ValueError, RuntimeError):  # gone: an entry, a cell's contents, a tensor's memory
            return False

    def same_in_step(self) -> bool:
        """Whether what is likeliest to change is as it was: own attributes and data, as many as cost nothing."""
        if self._small:
            return self.same()
        try:
            if not self._no_new_hooks():
                return False
            return (
                list(map(len, self._step_sized)) == self._step_sizes
                and self._step_internal == self._step_internal_copies
                and all(map(operator.is_, self._read_step(), self._step_values))
                and all(x.tobytes() == y for x, y in zip(self._step_arrays, self._contents, strict=False))
            )
        except (KeyError, ValueError, RuntimeError):
            return False

    def _no_new_hooks(self) -> bool:
        if hooks_so_far() != self._hooks:
            if self._hooks_now() != self._numbers_of_hooks:
                return False
            self._hooks = hooks_so_far()
        return True

    def _hooks_now(self) -> list[int]:
        return [len(users_global_hooks()), *map(len, self._hooked)]

    def live_containers(self) -> list[Any]:
        """Everything that can be changed in place: attribute dictionaries, containers of the user's and of PyTorch's."""
        watched = [*self._sized, *self._internal, *self._data, *self._hooked]
        return list({id(x): x for x in watched if isinstance(x, (dict, list, set, deque))}.values())

    def _read(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(map(operator.call, self._object_getters, self._object_spaces)),
            _contents(self._singles),
            _contents(self._data),
            chain.from_iterable(getter(owner) for getter, owner in self._slots),
            map(_contents_of, self.cells),
        )

    def _freeze_step(self) -> None:
        """Choose what is looked at in each step: small containers, closures, then numbers, then objects, then the rest; of
        modules and weights, those near the model itself."""
        self._hooks = hooks_so_far()
        self._numbers_of_hooks = self._hooks_now()
        self._small = self._cost() <= SMALL
        left = PER_STEP
        self._step_sized: list[Any] = []
        for container in sorted(self._data, key=len):
            left -= 1 + len(container)
            if left < 0:
                break
            self._step_sized.append(container)
        self._step_cells = self.cells[: max(0, left)]
        left -= len(self._step_cells)
        self._step_getters: list[Callable[[Any], Any]] = []
        self._step_spaces: list[Any] = []
        taken: dict[int, tuple[str, ...]] = {}
        for kinds in ((float, bool, type(None), complex), (object,)):
            for space, names in self._own:
                chosen = tuple(n for n in names if n not in taken.get(id(space), ()) and isinstance(space[n], kinds))
                if chosen and left >= len(chosen):
                    left -= len(chosen)
                    taken[id(space)] = chosen
                    self._step_getters.append(_getter(operator.itemgetter, chosen))
                    self._step_spaces.append(space)
        self._step_contents = list(map(_live_contents, self._step_sized))
        self._step_sizes = list(map(len, self._step_sized))
        self._step_values = list(self._read_step())
        shallow = sorted(range(len(self._internal)), key=self._depths.__getitem__)[:CONTAINERS_PER_STEP]
        self._step_internal = [self._internal[k] for k in shallow]
        self._step_internal_copies = [self._internal_copies[k] for k in shallow]
        self._step_arrays = self.arrays[:ARRAYS_PER_STEP]

    def _cost(self) -> float:
        """What it takes to look at everything, in values of 0.1 microseconds each."""
        return (
            len(self._values) + 1.7 * len(self.tensors) + 0.5 * (len(self._sized) + len(self._internal)) + 5 * len(self.arrays)
        )

    def _read_step(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(map(operator.call, self._step_getters, self._step_spaces)),
            chain.from_iterable(self._step_contents),
            map(_contents_of, self._step_cells),
        )


def users_global_hooks() -> list[Any]:
    """Forward hooks of all modules, but for those of PyTorch's own tools, which count FLOPs or track modules."""
    hooks = [hook for hooks in GLOBAL_HOOKS for hook in hooks.values()]
    return [hook for hook in hooks if isinstance(hook, functools.partial) or is_foreign(hook)]


def _is_plain(value: Any) -> bool:
    """Whether a value cannot be changed, so that an equal one is as good."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _getter(kind: Callable[..., Callable[[Any], Any]], names: Sequence[str]) -> Callable[[Any], Any]:
    """Reads entries as a tuple, also if there is but one."""
    return kind(*names) if len(names) > 1 else kind(*names, *names)


def _contents(containers: Sequence[Any]) -> Iterator[Any]:
    return chain.from_iterable(map(_live_contents, containers))


def _live_contents(container: Any) -> Any:
    """What is in a container, now and later."""
    return container.values() if isinstance(container, Mapping) else container
