"""A recorder that stands in for CUDA graphs on a CPU, and is stricter than they are.

What is recorded is a tape of operators and of the very tensors that they read and wrote. A replay does them again on these.
As on a GPU, recording has no effect on memory, results land at the same place each time, and all recordings share one pool:
each replay first ruins what every recording left there. Unlike a GPU it fails where something is done out of order.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxmask.errors import BackendError


class _Tape(TorchDispatchMode):
    """Operators as they are called, and what must be undone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.made: list[torch.Tensor] = []  # kept, so that addresses are not given out again
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.external: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        inner = set(map(_place, self.made))
        for x in given:
            if _place(x) not in inner:
                self.external[_place(x)] = x
        if func._schema.is_mutable:
            self.before += [(x, x.clone()) for x in given if _place(x) not in inner]
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        places = set(map(_place, given))
        fresh = [x for x in outputs if _place(x) not in places]
        self.made += fresh
        if fresh or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, outputs if fresh else []))
        return result


class Recorder:
    """Records on any device.

    Attributes:
        recorded: how many recordings were made.
        replays: how many replays there were.
        replaying: whether one is going on.
        external: address of memory that recordings read or write, and did not allocate themselves -> a tensor in it.
        fails: whether recording fails.
    """

    def __init__(self, fails: bool = False) -> None:
        self.recorded = self.replays = 0
        self.replaying = False
        self.external: dict[int, torch.Tensor] = {}
        self.fails = fails
        self.idle = True
        self._pool: list[torch.Tensor] = []
        self._lock = threading.RLock()
        self._owner: int | None = None

    def problem(self, device):
        return None

    def is_idle(self, device):
        return self.idle

    @contextlib.contextmanager
    def ordered(self, device):
        with self._lock:
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before

    def record(self, prepare, run, device):
        assert self._owner == threading.get_ident(), "recorded outside of ordered()"
        prepare()
        prepare()
        if self.fails:
            raise BackendError("a step graph could not be recorded: out of memory")
        tape = _Tape()
        try:
            with torch.inference_mode(False), torch.no_grad(), tape:  # a recording knows no modes
                run()
        except RuntimeError as error:
            raise BackendError(str(error)) from error
        finally:
            for x, value in reversed(tape.before):
                x.copy_(value)
        self.recorded += 1
        self.external.update(tape.external)
        self._pool += tape.made
        _ruin(self._pool)

        @torch.inference_mode(False)
        @torch.no_grad()
        def replay() -> None:
            assert self._owner == threading.get_ident(), "replayed outside of ordered()"
            self.replays += 1
            self.replaying = True
            try:
                _ruin(self._pool)
                for func, args, kwargs, outputs in tape.calls:
                    again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                    for place, value in zip(outputs, again, strict=False):
                        place.copy_(value)
            finally:
                self.replaying = False

        return replay


class Again(Recorder):
    """Records nothing: a replay does the work again. For tensors that have no values."""

    def record(self, prepare, run, device):
        prepare()
        self.recorded += 1
        return run


def _ruin(pool: list[torch.Tensor]) -> None:
    for x in pool:
        if x.is_floating_point():
            x.fill_(float("nan"))


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Meter(TorchDispatchMode):
    """Counts what is launched outside of replays, by the operator's name; copies between tensors one by one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._recorder.replaying:
            name = func._schema.name.split("::")[1]
            count = len(args[0]) if name.startswith("_foreach") else 1
            self.counts[name] = self.counts.get(name, 0) + count
        return func(*args, **(kwargs or {}))
