"""The nodes that ComfyUI lists."""

from __future__ import annotations

from typing import Any, ClassVar

from .wrapper import ModelWrapper


class FxmaskAccelerate:
    """MODEL -> MODEL, whose sampling runs have a plan from the second one on."""

    CATEGORY = "model_patches"
    FUNCTION = "accelerate"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "The first sampling run at a schedule is made in full; from the next one on parts of the denoiser are skipped or "
        "forecast. What the plan does not cover runs in full."
    )
    BACKENDS: ClassVar[list[str]] = ["auto", "inductor", "eager"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes."""
        speedup = ("FLOAT", {"default": 2.0, "min": 1.05, "max": 8.0, "step": 0.05})
        return {"required": {"model": ("MODEL",), "speedup": speedup, "backend": (cls.BACKENDS,)}}

    def accelerate(self, model: Any, speedup: float, backend: str) -> tuple[Any]:
        """A clone of the model with a wrapper; the model that came in stays as it is."""
        clone = model.clone()
        clone.set_model_unet_function_wrapper(ModelWrapper(clone.model, speedup, backend))
        return (clone,)


NODE_CLASS_MAPPINGS = {"FxmaskAccelerate": FxmaskAccelerate}
NODE_DISPLAY_NAME_MAPPINGS = {"FxmaskAccelerate": "fxmask: accelerate"}
