"""fxmask: an optimising compiler for the sampling loop of diffusion models."""

from fxmask import pictures, policies, reference
from fxmask.api import accelerate, compile, learn, load, pareto, restore, save
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
from fxmask.frontend.capture import capture
from fxmask.ir.block import Block
from fxmask.ir.forecast import Forecast
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.learning.candidate import ParetoPoint
from fxmask.learning.paper.options import PaperOptions
from fxmask.metrics import psnr, relative_error
from fxmask.passes.observer import observe, switched_off
from fxmask.passes.rectify import rectify
from fxmask.pictures import draw_mask, draw_pareto
from fxmask.runtime.generation import Generation
from fxmask.runtime.model import AcceleratedModel
from fxmask.runtime.quality import Quality
from fxmask.runtime.report import Report
from fxmask.sampling.block_values import block_values
from fxmask.sampling.pipeline_trajectory import PipelineTrajectory, record_pipeline
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.trajectory import Trajectory, record
from fxmask.tools.diagnosis import Diagnosis, diagnose
from fxmask.tools.measure import measure, step_errors

__version__ = "0.1.0"

__all__ = [
    "AcceleratedModel",
    "BackendError",
    "Block",
    "CaptureError",
    "Diagnosis",
    "DistributedError",
    "Forecast",
    "FxmaskError",
    "Generation",
    "InputError",
    "Mask",
    "MaskError",
    "OutcomeError",
    "PaperOptions",
    "ParetoPoint",
    "PassError",
    "PipelineTrajectory",
    "Plan",
    "Program",
    "Quality",
    "Report",
    "Sampler",
    "SchedulerError",
    "Trajectory",
    "accelerate",
    "block_values",
    "capture",
    "compile",
    "diagnose",
    "draw_mask",
    "draw_pareto",
    "learn",
    "load",
    "measure",
    "observe",
    "pareto",
    "pictures",
    "policies",
    "psnr",
    "record",
    "record_pipeline",
    "rectify",
    "reference",
    "relative_error",
    "restore",
    "save",
    "step_errors",
    "switched_off",
]
