"""How well the free checks tell which images went wrong: their estimates beside true errors, and a run that is bounded by them.

    python examples/studies/instant_checks.py [--family ldm] [--runs 208] [--write]

A plan is made of one image at the usual guidance (20 DDIM steps, 2x). Then fresh images: *usual*, with other prompts and
noise; and *unsuited*: guidance at more than twice the plan's. Spearman's rank correlation of the estimate with the true
relative error over all images of a kind, and over both together; beside it that of the unweighted sum of squares of the
same differences. *Bounded*: the same images with ``max_error`` at one and a half times the plan's own estimate: a run that
passes it computes the rest. ``--write`` puts the table into ``examples/results/instant_checks.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from instant import CELLS, Cell, recorder

import fxmask
from fxmask.learning.instant.plans import InstantLearner
from fxmask.runtime.checks import Checks
from fxmask.runtime.model import AcceleratedModel
from fxmask.settings.checked import checks_of
from fxmask.tools.place import require_device

RESULTS = Path(__file__).resolve().parent.parent / "results"
FAMILIES = {"ldm": "ldm-4-ddim-20", "pixart": "pixart-4-ddim-20", "dit": "dit-4-ddim-20", "ddpm": "ddpm-ddim-20"}
UNSUITED = {"ldm": 10.0, "pixart": 10.0, "dit": 9.0}
BATCH = 16
SLACK = 1.5


def errors_of(samples: torch.Tensor, run: fxmask.Sampler) -> list[float]:
    """True relative L2 errors, one for each image."""
    squares = (samples - run.final).double().square().flatten(1).mean(dim=1)
    found: list[float] = (squares / run.final.double().square().mean()).sqrt().tolist()
    return found


def plain_sums(model: AcceleratedModel) -> list[float]:
    """The differences of the latest run, squared and added, for each image."""
    checks = model.report().runs[-1].checks
    assert checks is not None
    found: list[float] = torch.stack(list(checks.measures.values())).square().sum(dim=0).tolist()
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def measure(family: str, runs: int, device: torch.device) -> dict[str, Any]:
    """All of one family."""
    cell = CELLS[FAMILIES[family]]
    record = recorder(cell, device)
    first = record(1, 0)
    denoiser: Any = getattr(first, "denoiser", None)
    program = fxmask.capture(denoiser, first.calls[0][0], getattr(first, "roles", None))
    learner = InstantLearner([first])
    plan = learner.plans(cell.steps // 2)[0]
    checks = checks_of(learner, plan, None)
    assert checks is not None
    rectified = fxmask.rectify(program, plan.mask(program, first, None))
    kinds: dict[str, Cell] = {"usual": cell}
    if family in UNSUITED:
        kinds["unsuited"] = dataclasses.replace(cell, guidance=UNSUITED[family])
    result: dict[str, Any] = {"family": family, "estimate": plan.error, "kinds": {}}
    together: list[list[float]] = [[], [], []]
    for kind, other in kinds.items():
        again = recorder(other, device)
        rows: list[list[float]] = [[], [], []]
        bounded: list[float] = []
        macs = 0.0
        for n in range(runs // BATCH):
            fresh = again(BATCH, 2000 + n)
            model = AcceleratedModel(program, rectified, "eager", checks=checks)
            true = errors_of(fresh.rollout(model), fresh)
            estimates = model.report().runs[-1].error
            assert estimates is not None
            count = min(len(true), len(estimates), BATCH)  # both lanes of DiTPipeline are samples: one of them counts
            for column, values in zip(rows, (true, estimates, plain_sums(model)), strict=True):
                column += list(values)[:count]
            bound = Checks(checks.by_step, checks.error, checks.lanes, SLACK * plan.error)
            guarded = AcceleratedModel(program, rectified, "eager", checks=bound)
            bounded += errors_of(fresh.rollout(guarded), fresh)[:count]
            macs += 1 / guarded.report().runs[-1].ratio
        true, estimates, sums = rows
        result["kinds"][kind] = {
            "images": len(true),
            "correlation": rank_correlation(true, estimates),
            "unweighted": rank_correlation(true, sums),
            "mean": statistics.fmean(true),
            "worst": max(true),
            "estimated": statistics.fmean(estimates),
            "bounded mean": statistics.fmean(bounded),
            "bounded worst": max(bounded),
            "bounded MACs": macs / (runs // BATCH),
        }
        for column, values in zip(together, rows, strict=True):
            column += values
        print(family, kind, {k: round(v, 3) for k, v in result["kinds"][kind].items()}, flush=True)
    result["together"] = {
        "correlation": rank_correlation(together[0], together[1]),
        "unweighted": rank_correlation(together[0], together[2]),
    }
    return result


HEAD = f"""# Free checks

`python examples/studies/instant_checks.py`: a plan of one image (20 DDIM steps, 2x), and at its full steps the forecast of
what is computed there anyway. Errors are relative L2 errors of final samples, by image. *Unsuited*: guidance of 9 or 10
with a plan made at 4. *Bounded*: `max_error` at {SLACK:g} times the plan's own estimate; batches of {BATCH} are bounded
together, by their worst image.

| family | images | rank correlation | unweighted | true mean, worst | estimated mean | bounded mean, worst | MACs |
|---|---|---|---|---|---|---|---|
"""


NOTES = """
What is spent before the first check cannot be bounded: on the latent U-Net the first formed step alone stands for 41 % of
the expected square error, so that computing nearly all of the rest changes little, and single images that go another way
altogether (errors of 0.3 and more) are decided before it. On the DiT, where errors of unsuited runs grow over all steps,
the bound takes the mean from 0.61 to 0.37; on PixArt from 0.050 to 0.020. Weighting by what the solver makes of an error
tells more on the latent U-Net (0.69 for 0.57), and nothing where all steps count about alike (PixArt, the DiT, DDPM).
Measured on an H200.
"""


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for result in results:
        for kind, row in result["kinds"].items():
            lines.append(
                f"| {result['family']}, {kind} | {row['images']} | {row['correlation']:.2f} | {row['unweighted']:.2f} | "
                f"{row['mean']:.4f}, {row['worst']:.4f} | {row['estimated']:.4f} | "
                f"{row['bounded mean']:.4f}, {row['bounded worst']:.4f} | {row['bounded MACs']:.2f} |"
            )
        if len(result["kinds"]) > 1:
            both = result["together"]
            lines.append(f"| {result['family']}, both | | {both['correlation']:.2f} | {both['unweighted']:.2f} | | | | |")
    return HEAD + "\n".join(lines) + "\n" + NOTES


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), help="default: all")
    parser.add_argument("--runs", type=int, default=208, help="images of each kind")
    parser.add_argument("--write", action="store_true", help="write the table; what is not measured now stays")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "instant_checks.json", help="file of the measurements")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place, device = options.results, require_device(options.device)
    known = {x["family"]: x for x in json.loads(place.read_text(encoding="utf-8"))} if place.exists() else {}
    for family in options.family or FAMILIES:
        known[family] = measure(family, options.runs, device)
        ordered = [known[f] for f in FAMILIES if f in known]
        place.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        if options.write:
            (RESULTS / "instant_checks.md").write_text(table(ordered), encoding="utf-8")


if __name__ == "__main__":
    main()
