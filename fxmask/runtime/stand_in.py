"""Classes of accelerated models that compare equal to the class of their original.

``isinstance`` asks an object for its ``__class__``, which is the original's. Some libraries look whether ``type(model)`` is
among the classes that they expect (``from_pipe`` of diffusers). It is the accelerated model's own class, which must compare as
the other.
"""

from __future__ import annotations

from typing import Any


class StandIn(type):
    """Class of the accelerated models of one class of denoiser: equal to that class, and hashed alike.

    Attributes:
        stands_for: the original's class.
    """

    stands_for: type

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.stands_for

    def __hash__(cls) -> int:
        return hash(cls.stands_for)


_KNOWN: dict[tuple[type, type], StandIn] = {}


def stand_in(cls: type, original: type) -> Any:
    """The class of instances of ``cls`` that stand for one of ``original``; always the same one."""
    if (cls, original) not in _KNOWN:
        names = {"stands_for": original, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _KNOWN[cls, original] = StandIn(cls.__name__, (cls,), names)
    return _KNOWN[cls, original]
