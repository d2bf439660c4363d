"""The paper's learner with one thing changed at a time, by number of passes, beside interval reuse and DeepCache.

    python examples/studies/paper_variants.py --family ddpm --steps 20 --speedup 2 --passes 20 60
    python examples/studies/paper_variants.py --table       # only writes the table and the picture of what was measured

Every point is a learning run of its own, as the rate of learning falls towards the last pass. What was measured is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))  # where families.py is

import families

import fxmask
from fxmask.files.replace import replace_file
from fxmask.learning.paper.options import PaperOptions
from fxmask.metrics import psnr
from fxmask.passes.observer import switched_off
from fxmask.sampling.pipeline_trajectory import PipelineTrajectory, record_pipeline
from fxmask.tools.evaluation.plans import best_stage, evenly
from fxmask.tools.subjects import seeded

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEPT, PAGE, PICTURE = (RESULTS / f"paper_variants.{kind}" for kind in ("json", "md", "png"))
COMPONENTS = {"ddpm": "denoiser", "dit": "denoiser", "ldm": "unet", "pixart": "transformer"}
LIVE: dict[str, Any] = {"cost": "live", "measured": True}
VARIANTS = {
    "paper": PaperOptions(),
    "paper, branches": PaperOptions(blocks="branch"),
    "paper, student's inputs": PaperOptions(inputs="student"),
    "paper, Bernoulli": PaperOptions(sampling="bernoulli"),
    "paper, Gumbel-Softmax": PaperOptions(sampling="gumbel"),
    "paper, one recorded batch": PaperOptions(fresh=False),
    "live cost": PaperOptions(cost="live"),
    "measured weights": PaperOptions(measured=True),
    "window": PaperOptions(window=4),
    "live cost, measured weights": PaperOptions(**LIVE),
    "live cost, measured weights, window": PaperOptions(**LIVE, window=4),
    "live cost, measured weights, branches": PaperOptions(**LIVE, blocks="branch"),
    "ours": PaperOptions.ours(),
    "ours, branches": PaperOptions.ours(blocks="branch"),
}
Point = dict[str, Any]


def recorded(pipe: Any, calls: list[dict[str, Any]], steps: int, images: int, seed: int) -> PipelineTrajectory:
    """A run of some images, whose conditioning goes on where that of other seeds ends."""
    several = [calls[(seed * images + k) % len(calls)] for k in range(images)]
    lists = {name: [call[name] for call in several] for name in ("class_labels", "prompt") if name in several[0]}
    call = {**several[0], **(lists or {"batch_size": images})}
    return record_pipeline(pipe, **call, num_inference_steps=steps, output_type="pt", generator=seeded(seed))


class Bench:
    """One family at one setting.

    Args:
        family: of `families.py`.
        steps: sampling steps.
        speedup: ratio of MACs that is asked for.
        batch: images of each pass.
        images: of other noise, to compare.
    """

    def __init__(self, family: str, steps: int, speedup: float, batch: int, images: int) -> None:
        pipe, calls = getattr(families, family)()
        self.cell = f"{family}, {steps} steps, {speedup:g}x"
        self.speedup = speedup
        self.training = [recorded(pipe, calls, steps, batch, k) for k in range(2)]
        self.fresh = recorded(pipe, calls, steps, images, 99)
        self.program = fxmask.capture(getattr(pipe, COMPONENTS[family]), self.training[0].calls[0][0])

    def point(self, name: str, mask: fxmask.Mask, passes: int = 0, seconds: float = 0.0) -> Point:
        """What a mask costs and reaches."""
        plan = fxmask.rectify(self.program, mask)
        with switched_off("rectify"):
            whole = fxmask.rectify(self.program, mask)
        final = self.fresh.rollout(fxmask.compile(self.program, plan, backend="eager"))
        return {
            "cell": self.cell,
            "plan": name,
            "passes": passes,
            "ratio": plan.mac_ratio,
            "unrectified": whole.mac_ratio,
            "psnr": float(psnr(final, self.fresh.final).mean()),
            "seconds": seconds,
        }

    def rivals(self) -> list[Point]:
        """Interval reuse of branches and of streams, and DeepCache's best stage."""
        found = []
        for blocks in (self.program.branches, self.program.streams):
            mask = evenly(self.program, self.training[0].timesteps, tuple(block.name for block in blocks), self.speedup)
            found.append(self.point("interval, branches" if blocks[0].kind == "branch" else "interval, streams", mask))
        if self.program.stages:
            found.append(self.point("DeepCache", best_stage(self.program, self.training[0], self.speedup)))
        return found

    def learned(self, name: str, passes: int) -> Point:
        """One variant after so many passes."""
        began = time.process_time()
        options = replace(VARIANTS[name], epochs=passes)
        given = {"speedup": self.speedup, "learner": "paper", "options": options, "progress": False}
        mask = fxmask.learn(self.program, self.training, **given)
        return self.point(name, mask, passes, time.process_time() - began)


def kept() -> list[Point]:
    """What was measured so far."""
    found: list[Point] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    return found


def keep(points: list[Point]) -> None:
    """Put these in the place of older ones of the same plan."""
    keys = {(p["cell"], p["plan"], p["passes"]) for p in points}
    both = [p for p in kept() if (p["cell"], p["plan"], p["passes"]) not in keys] + points
    replace_file(KEPT, (json.dumps(both, indent=1) + "\n").encode(), KEPT.with_name(".paper_variants.partial"))


def write(points: list[Point]) -> None:
    """The page and its picture."""
    cells = list(dict.fromkeys(p["cell"] for p in points))
    lines = [
        "# The paper's learner by passes",
        "",
        "`python examples/studies/paper_variants.py`: PSNR in dB of 16 fresh images against the full sampler, and seconds of a",
        "processor that learning took. Each row is a learning run of its own; a pass is one sampling run of one image from",
        "fresh noise. Learning stops earlier where the mask does not change any more, as that of *ours* at 20 steps.",
        "",
        f"![PSNR by number of passes]({PICTURE.name})",
        "",
    ]
    for cell in cells:
        lines += [f"## {cell}", "", "| plan | passes | MAC ratio | without rectification | PSNR | seconds |"]
        lines.append("|---|---|---|---|---|---|")
        own = sorted((p for p in points if p["cell"] == cell), key=lambda p: (p["passes"] > 0, p["plan"], p["passes"]))
        for p in own:
            passes, seconds = (p["passes"], f"{p['seconds']:.0f}") if p["passes"] else ("", "")
            ratios = f"{p['ratio']:.2f}x | {p['unrectified']:.2f}x"
            lines.append(f"| {p['plan']} | {passes} | {ratios} | {p['psnr']:.1f} | {seconds} |")
        lines.append("")
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    draw(points, cells)


def draw(points: list[Point], cells: list[str]) -> None:
    """PSNR by passes, a panel per cell; rivals, which learn nothing, as lines."""
    figure = Figure(figsize=(5.6 * len(cells), 5.4), layout="constrained")
    panels = figure.subplots(1, len(cells), squeeze=False)
    names = list(dict.fromkeys(p["plan"] for p in points if p["passes"]))
    for panel, cell in zip(panels[0], cells, strict=True):
        for k, rival in enumerate(p for p in points if p["cell"] == cell and not p["passes"]):
            panel.axhline(rival["psnr"], color="0.4", linestyle=("-", "--", ":")[k], label=rival["plan"])
        for k, name in enumerate(names):
            own = sorted((p["passes"], p["psnr"]) for p in points if p["cell"] == cell and p["plan"] == name)
            if own:
                panel.plot(*zip(*own, strict=True), marker="o", color=f"C{k}", label=name)
        panel.set(title=cell, xlabel="passes", xscale="log", ylabel="PSNR, dB")
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measures what is asked for and not there yet, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="ddpm", choices=COMPONENTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--passes", type=int, nargs="+", default=[60])
    parser.add_argument("--batch", type=int, default=1, help="images of each pass")
    parser.add_argument("--images", type=int, default=16, help="of fresh noise to compare")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.table:
        bench = Bench(options.family, options.steps, options.speedup, options.batch, options.images)
        keep(bench.rivals())
        for passes in options.passes:
            for name in options.only:
                if not any(p["cell"] == bench.cell and p["plan"] == name and p["passes"] == passes for p in kept()):
                    keep([bench.learned(name, passes)])
    write(kept())


if __name__ == "__main__":
    main()
