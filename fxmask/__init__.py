"""fxmask: an optimising compiler for the sampling loop of diffusion models."""

from fxmask import policies, reference
from fxmask.api import accelerate, compile, load
from fxmask.errors import (
    BackendError,
    CaptureError,
    DistributedError,
    FxmaskError,
    InputError,
    MaskError,
    OutcomeError,
    PassError,
    SchedulerError,
)
from fxmask.learning import ParetoPoint, learn, pareto
from fxmask.mask import Forecast, Mask, Plan
from fxmask.passes.rectify import rectify
from fxmask.pipelines import PipelineTrajectory, record_pipeline
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
    "DistributedError",
    "Forecast",
    "FxmaskError",
    "Generation",
    "InputError",
    "Mask",
    "MaskError",
    "OutcomeError",
    "ParetoPoint",
    "PassError",
    "PipelineTrajectory",
    "Plan",
    "Program",
    "Report",
    "SchedulerError",
    "Trajectory",
    "accelerate",
    "capture",
    "compile",
    "learn",
    "load",
    "pareto",
    "policies",
    "record",
    "record_pipeline",
    "rectify",
    "reference",
]
