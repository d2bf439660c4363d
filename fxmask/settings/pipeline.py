"""A pipeline whose denoiser is accelerated in place: the same object, called as ever.

Its class becomes a class of the same name whose ``__call__`` asks the session; everything else is inherited. Nothing of the
pipeline's is changed but that and the denoiser, and ``restore`` puts both back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.frontend.offloading import move_hook
from fxmask.runtime.model import AcceleratedModel
from fxmask.sampling.twin import is_pipeline
from fxmask.settings.components import component_of, put
from fxmask.settings.session import Session

SESSION = "_fxmask_session"
_CLASSES: dict[type, type] = {}


def is_a_pipeline(value: Any) -> bool:
    """Whether it is called and holds a scheduler: a pipeline, rather than a model."""
    return not isinstance(value, torch.nn.Module) and is_pipeline(value)


def install(pipe: Any, session: Session) -> None:
    """Put the accelerated denoisers and the session into a pipeline."""
    if SESSION in vars(pipe):
        restore(pipe)
    pipe.__dict__[SESSION] = session
    for part in session.parts:
        assert part.component is not None
        part.replaced = component_of(pipe, part.component)
        put(pipe, part.component, part.model)
        move_hook(part.replaced, part.model)
    pipe.__class__ = _class_of(type(pipe))


def restore(pipe: Any) -> Any:
    """Put the original denoiser and class back. Of a pipeline that is not accelerated: nothing.

    Returns:
        The pipeline.
    """
    session = vars(pipe).pop(SESSION, None)
    cls = type(pipe)
    if cls in _CLASSES.values():
        pipe.__class__ = cls.__mro__[1]
    for part in session.parts if isinstance(session, Session) else ():
        if part.component is not None:
            put(pipe, part.component, part.replaced)
            move_hook(part.model, part.replaced)
    return pipe


def session_of(pipe: Any) -> Session:
    """The session of an accelerated pipeline.

    Raises:
        InputError: it is not accelerated.
    """
    session = vars(pipe).get(SESSION)
    if not isinstance(session, Session):
        raise InputError(f"this {type(pipe).__name__} is not accelerated; call fxmask.accelerate(pipe) first")
    return session


def _class_of(cls: type) -> type:
    """A class of the same name whose instances ask the session when they are called."""
    if cls not in _CLASSES:
        own: Any = cls.__call__

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            session = vars(self).get(SESSION)
            bound = functools.partial(own, self)
            if session is None:
                return bound(*args, **kwargs)
            functools.update_wrapper(bound, own.__get__(self))
            return session.call(self, bound, args, kwargs)

        def reduce(self: Any, protocol: Any) -> Any:
            """Copies are of the original class: their denoiser has the plan that was used last, and nobody records."""
            return _plain_copy, (cls, {name: value for name, value in vars(self).items() if name != SESSION})

        names = {
            "__call__": call,
            "__reduce_ex__": reduce,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        _CLASSES[cls] = type(cls.__name__, (cls,), names)
    return _CLASSES[cls]


def _plain_copy(cls: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    made.__dict__.update(state)
    return made


def accelerated_of(pipe: Any) -> AcceleratedModel:
    """The accelerated denoiser of a pipeline."""
    return session_of(pipe).model
