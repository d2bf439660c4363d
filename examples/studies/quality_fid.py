"""FID on classifier features: how far generated digits are from the real ones, beside the full sampler's own distance.

    d^2 = |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)        Heusel et al., 2017, with means m and covariances A, B

of the shipped classifier's 48 features, not of an Inception network's 2,048: the figures compare with each other alone.
Intervals are percentiles over resampled generated images. Every plan gets the same resamples of the same noise, so that
differences between plans have intervals of their own, much narrower than those of either.
"""

from __future__ import annotations

import json
import sys
from functools import cache, lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

from digits import frechet_distance, load_classifier, load_digits
from quality_cells import Cell, Evaluation, Results, Row, columns, default_mask
from quality_rivals import rivals

NOISE = 200_000  # first seed: neither learning nor the other rows see it
IMAGES = 2_048
RESAMPLES = 200
FULL = "full sampler 1.0"
COMPARED = ("fewer steps, scheduler's grid", "whole output, fitted forecast", "FORA: all branches reused")


@cache
@torch.no_grad()
def _real() -> torch.Tensor:
    """Features of the 1,797 digits that the checkpoints were trained on."""
    features: torch.Tensor = load_classifier().features(load_digits()[0])
    return features


@torch.no_grad()
def with_fid(row: Row) -> Row:
    """A row with the distance of its images from the real ones, and that of each resample."""
    features = load_classifier().features(row["images"].clamp(-1, 1))
    generator = torch.Generator().manual_seed(0)
    count = len(features)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES)]
    resampled = [frechet_distance(features[chosen], _real()) for chosen in drawn]
    # one string, because a list would be a line of the file for every number
    return {**row, "fid": frechet_distance(features, _real()), "resampled": " ".join(f"{x:.5g}" for x in resampled)}


@lru_cache(maxsize=1)
def many(cell: Cell) -> Evaluation:
    """The evaluation on enough images for a covariance."""
    return Evaluation(cell, NOISE, IMAGES)


def of(cell: Cell, folder: Path) -> Results:
    """The rows that have a distance."""
    return Results(folder / f"{cell.name}-fid.json")


def measure_fid(cell: Cell, folder: Path) -> None:
    """The full sampler, fxmask, and what is usually done instead, at 2x."""
    results = of(cell, folder)
    if not results.has(FULL):
        results.put(FULL, with_fid(many(cell).full()))
    if not results.has("fxmask 2.0"):
        mask, facts = default_mask(cell, folder)
        results.put("fxmask 2.0", with_fid(many(cell).of_mask(mask, **facts)))
    if all(results.has(f"{name} 2.0") for name in COMPARED):
        return
    for name, measure in rivals(many(cell), cell.training()):
        if name in COMPARED and not results.has(f"{name} 2.0"):
            row = measure(2.0)
            assert row is not None, "2x is within reach of each of them"
            results.put(f"{name} 2.0", with_fid(row))


def interval(row: Row, other: Row | None = None) -> tuple[float, float]:
    """95 % of the resampled distances, or of their differences from another row's."""
    values = torch.tensor([float(x) for x in row["resampled"].split()], dtype=torch.float64)
    if other is not None:
        values = values - torch.tensor([float(x) for x in other["resampled"].split()], dtype=torch.float64)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


TEXT = f"""
## FID on classifier features, at 2x

Frechet distance between the shipped classifier's 48 features of {IMAGES:,} generated images (fresh noise) and of the 1,797 real
digits that the checkpoints were trained on; not comparable with FIDs of Inception features. Intervals: 95 % of {RESAMPLES}
resamples of the generated images, which repeat images and so lie a little above the figure. *Less the full sampler's*: of
the difference on the same noise. *Within*: at most 5 % above the upper end of the full sampler's interval.
"""


def fid_table(folder: Path) -> list[str]:
    """Distances, and whether they are the full sampler's up to chance and 5 %."""
    lines: list[str] = []
    for path in sorted(folder.glob("*-fid.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        wanted = [key for key in (FULL, "fxmask 2.0", *(f"{name} 2.0" for name in COMPARED)) if key in rows]
        if FULL not in wanted:
            continue
        limit = interval(rows[FULL])[1] * 1.05
        for key in wanted:
            row = rows[key]
            low, high = interval(row)
            less, more = interval(row, rows[FULL])
            line = [path.stem.removesuffix("-fid"), key.rpartition(" ")[0], f"{row['ratio']:.2f}"]
            line += [f"{row['psnr']:.1f}" if "psnr" in row else "", f"{row['fid']:.3f}", f"{low:.3f} to {high:.3f}"]
            line += ["", ""] if key == FULL else [f"{less:+.3f} to {more:+.3f}", "yes" if row["fid"] <= limit else "**no**"]
            lines.append(columns(*line))
    if not lines:
        return []
    heading = columns("cell", "plan", "MAC ratio", "PSNR", "FID", "interval", "less the full sampler's", "within")
    return [TEXT, heading, "|---|---|---|---|---|---|---|---|", *lines]
