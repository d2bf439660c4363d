"""What keeps a denoiser in a pipeline from being accelerated at a call, or a plan from suiting it, in words."""

from __future__ import annotations

from fxmask.frontend.offloading import HOOK, hook_of
from fxmask.runtime.history import Run
from fxmask.runtime.model import AcceleratedModel
from fxmask.settings.known import Known

DRIFT = 3.0  # times the estimated error, in so many runs in a row, before a warning
DRIFTING = 3
LEAST = 1e-3  # errors below are not seen, whatever was estimated


def obstacle_to(model: AcceleratedModel, component: str | None) -> str | None:
    """Why the original must answer all calls now; ``None`` if nothing stands in the way."""
    if getattr(model.original, "_cache_config", None) is not None:
        return (
            f"enable_cache() was called on the {component} of this pipeline, so that cache is used, and no plan; call "
            "disable_cache() on it to go back to the plans"
        )
    if HOOK in vars(model) and hook_of(model) is None:
        return (
            f"the weights of the {component} of this pipeline are moved in the middle of its calls "
            "(enable_sequential_cpu_offload), which no graph can do, so it runs as it always did; enable_model_cpu_offload() "
            "moves all of them at once and works, and so does .to(device)"
        )
    return None


def drift_of(known: Known, run: Run | None) -> str | None:
    """What to say of errors that are far beyond the plan's own, if the last run's checks have arrived on the host."""
    if known.checks is None or run is None or run.checks is None or run.checks.checks is not known.checks:
        return None
    error = run.checks.arrived_error()
    if error is None:
        return None
    known.drifted = known.drifted + 1 if max(error) > DRIFT * max(known.checks.error, LEAST) else 0
    if known.drifted != DRIFTING:
        return None
    return (
        f"are estimated to have {DRIFT:g} times the error of the plan's own ({max(error):.2g}, {known.checks.error:.2g}): it "
        "was made of an image unlike these. Call improve() on the accelerated denoiser, or pass every=20 to accelerate(), so "
        "that plans follow what they are used for"
    )
