"""The paper's learner with one thing changed at a time, beside interval reuse, on the shipped DDPM.

python examples/studies/paper_variants.py --steps 20 --speedup 2 --passes 60
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

from digits import load_model, load_scheduler

import fxmask
from fxmask.learning.paper.options import PaperOptions
from fxmask.metrics import psnr
from fxmask.passes.observer import switched_off
from fxmask.tools.evaluation.plans import best_stage, evenly

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, branches": {"blocks": "branch"},
    "paper, student's inputs": {"inputs": "student"},
    "paper, Bernoulli": {"sampling": "bernoulli"},
    "paper, one recorded batch": {"fresh": False},
    "live cost": {"cost": "live"},
    "measured weights": {"measured": True},
    "live cost and measured weights": {"cost": "live", "measured": True},
}


def main() -> None:
    """Prints one line for each rival and variant: ratio of MACs, without rectification, PSNR, seconds of learning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2, help="images of each pass")
    parser.add_argument("--images", type=int, default=16, help="of fresh noise to compare")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options = parser.parse_args()
    model, scheduler = load_model("ddpm"), load_scheduler()
    given = {"num_inference_steps": options.steps}
    training = fxmask.record(model, scheduler, batch_size=options.batch, **given)
    fresh = fxmask.record(model, scheduler, batch_size=options.images, seed=99, **given)
    program = fxmask.capture(model, training.calls[0][0])

    def told(name: str, mask: fxmask.Mask, seconds: float = 0.0) -> None:
        plan = fxmask.rectify(program, mask)
        with switched_off("rectify"):
            whole = fxmask.rectify(program, mask)
        quality = psnr(fresh.rollout(fxmask.compile(program, plan, backend="eager")), fresh.final).mean()
        print(f"| {name} | {plan.mac_ratio:.2f}x | {whole.mac_ratio:.2f}x | {quality:.1f} | {seconds:.0f} |", flush=True)

    print("| plan | MAC ratio | unrectified | PSNR | seconds |\n|---|---|---|---|---|")
    for blocks in (program.branches, program.streams):
        names = tuple(block.name for block in blocks)
        told(f"interval, {blocks[0].kind}", evenly(program, training.timesteps, names, options.speedup))
    told("DeepCache", best_stage(program, training, options.speedup))
    for name in options.only:
        began = time.perf_counter()
        chosen = PaperOptions(epochs=options.passes, **VARIANTS[name])
        mask = fxmask.learn(program, training, speedup=options.speedup, learner="paper", options=chosen, progress=False)
        told(name, mask, time.perf_counter() - began)


if __name__ == "__main__":
    main()
