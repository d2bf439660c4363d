"""Attention processors that a pipeline puts into its models for one call, and takes out at its end.

A replay ends right after the last step, before the pipeline does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxmask.sampling.twin import Module, is_pipeline


def processors_kept(pipe: Any) -> Callable[[], None]:
    """What puts the attention processors of a pipeline's models back as they are now."""
    held = [(layer, layer.processor) for layer in _layers(pipe)]

    def restore() -> None:
        for layer, processor in held:
            if layer.processor is not processor:
                layer.set_processor(processor)

    return restore


def _layers(pipe: Any) -> list[Any]:
    found: list[Any] = []
    for value in vars(pipe).values():
        if isinstance(value, Module):
            found += [layer for layer in value.modules() if hasattr(layer, "processor") and hasattr(layer, "set_processor")]
        elif is_pipeline(value):
            found += _layers(value)
    return found
