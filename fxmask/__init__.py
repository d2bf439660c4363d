"""fxmask: an optimising compiler for the sampling loop of diffusion models."""

from fxmask import policies, reference
from fxmask.api import accelerate, compile
from fxmask.errors import (
    BackendError,
    CaptureError,
    FxmaskError,
    InputError,
    MaskError,
    OutcomeError,
    PassError,
    SchedulerError,
)
from fxmask.learning import learn
from fxmask.mask import Forecast, Mask, Plan
from fxmask.passes.rectify import rectify
from fxmask.program import Block, Program
from fxmask.report import Report
from fxmask.runtime import AcceleratedModel, Generation
from fxmask.tracing import capture
from fxmask.trajectory import Trajectory, record

__version__ = "0.1.0"

__all__ = [
    "AcceleratedModel",
    "BackendError",
    "Block",
    "CaptureError",
    "Forecast",
    "FxmaskError",
    "Generation",
    "InputError",
    "Mask",
    "MaskError",
    "OutcomeError",
    "PassError",
    "Plan",
    "Program",
    "Report",
    "SchedulerError",
    "Trajectory",
    "accelerate",
    "capture",
    "compile",
    "learn",
    "policies",
    "record",
    "rectify",
    "reference",
]
