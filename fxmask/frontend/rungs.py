"""Ways to turn a denoiser into a functional graph. None is trusted: ``verify`` compares each result with the model.

    torch.export (non-strict)   runs the model's own Python on fake tensors
    traced with values          runs it on the real tensors and records the operators (make_fx), for TorchScript and for
                                sizes that depend on the values of arguments; then exports the recording
    torch.export (strict)       interprets its bytecode (dynamo), for Python that must not be run

In the second one, arithmetic on arguments that are held fixed (``Signature.fixed``) happens while tracing and leaves constants.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable

import torch
from torch import fx

from fxmask.frontend.trace_values import trace_values
from fxmask.frontend.value_reads import WatchingWrapper, split_reads
from fxmask.frontend.wrapper import MODEL, Wrapper, WrapperWithData, distinct
from fxmask.ir.calls import BoundCall
from fxmask.passes.functionalize import functionalize

Export = Callable[[torch.nn.Module, BoundCall], fx.GraphModule]


def export_running(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By running the model's Python on fake tensors."""
    exported = torch.export.export(WrapperWithData(model, bound).eval(), distinct(list(bound.tensors.values())), strict=False)
    return functionalize(exported, model, MODEL)


def export_interpreting(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By interpreting the model's bytecode."""
    exported = torch.export.export(Wrapper(model, bound).eval(), distinct(list(bound.tensors.values())), strict=True)
    return functionalize(exported, model, MODEL)


def export_draft(model: torch.nn.Module, bound: BoundCall) -> fx.GraphModule:
    """By running the model's Python, taking at every question about a value the way that the example takes.

    What it took for granted is kept beside the graph (``ASSUMPTIONS``), to be asked of each call.
    """
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)  # a report of what was frozen; what matters of it is found by the comparison
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # torch leaves its trace file open
            tensors = distinct(list(bound.tensors.values()))
            wrapper = WatchingWrapper(model, bound).eval()
            exported = torch.export.draft_export(wrapper, tensors)
            gc.collect()
        module = functionalize(exported, model, MODEL)
        split_reads(module, wrapper.traces.reads[-1])
        return module
    finally:
        log.setLevel(level)


DRAFT = "torch.export (draft)"
LADDER: dict[str, Export] = {
    "torch.export (non-strict)": export_running,
    "traced with values": trace_values,
    "torch.export (strict)": export_interpreting,
    DRAFT: export_draft,
}
