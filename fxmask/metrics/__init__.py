"""Metrics of images: pairs of them, and sets of them.

``pairs`` compares accelerated samples with the unaccelerated ones, image by image; ``sets`` and ``features`` compare sets,
by way of any feature extractor. What needs more than torch imports it when it is called.
"""

from fxmask.metrics.features import FeatureSet, Reference, compare_sets
from fxmask.metrics.pairs import lpips, psnr, relative_error, ssim
from fxmask.metrics.sets import clip_score, frechet_distance, inception_score, precision_recall
from fxmask.metrics.statistics import Moments

__all__ = [
    "FeatureSet",
    "Moments",
    "Reference",
    "clip_score",
    "compare_sets",
    "frechet_distance",
    "inception_score",
    "lpips",
    "precision_recall",
    "psnr",
    "relative_error",
    "ssim",
]
