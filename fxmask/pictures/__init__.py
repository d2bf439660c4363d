"""Pictures of masks, scores, errors and samples: one function each, PNG or SVG by the file's suffix."""

from fxmask.pictures.curves import draw_pareto, save_pareto, save_scores, save_step_errors
from fxmask.pictures.masks import draw_mask, save_counts, save_heat_map
from fxmask.pictures.samples import save_samples

__all__ = [
    "draw_mask",
    "draw_pareto",
    "save_counts",
    "save_heat_map",
    "save_pareto",
    "save_samples",
    "save_scores",
    "save_step_errors",
]
