"""Kernels of step graphs on a GPU, counted on a machine without one: Inductor's Triton code for an H100.

    python examples/studies/gpu_kernels.py [--models dit,ddpm,dit_xl] [--dtypes float32,bfloat16] [--steps 10] [--write]

For each model and type: kernels of plain compilation, of the step in which every block is computed, and of some other step
graphs of a random mask at half of the MACs and of interval(2), whole and in regions. ``live`` is what a step graph is compared
with: the kernels of plain compilation of nothing but what lives in that step, its cached values given as arguments; ``ratio``
is the step graph's kernels by these. ``copies`` are kernels that compute nothing: they bring a tensor into another layout, or
store it. Nothing runs, so this says how many kernels there are, not how long they take.

Measurements are kept in ``examples/results/gpu_kernels.json``; ``--write`` puts the table of all that is there into
``examples/results/gpu_kernels.md``, in front of the remarks. Models and types that are not asked for stay as they
were; to write the table alone, ask for no model: ``--models "" --write``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

import fxmask
from fxmask.backends.inductor import parts_of
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.passes.choose_layouts import LAYOUT
from fxmask.passes.lift_weights import lift_weights
from fxmask.passes.specialize import build_step_graph
from fxmask.runtime.graph_store import GraphStore
from fxmask.tools.bench_masks import random_mask, timesteps_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # where the machine without a GPU is
import without_a_gpu as gpu  # noqa: E402

RESULTS = ROOT / "examples" / "results" / "gpu_kernels.md"
MEASURED = RESULTS.with_suffix(".json")
REMARKS = "## Remarks"
OTHERS = 2  # step graphs of each mask, besides the one with every block


def dit() -> torch.nn.Module:
    """The shipped DiT, without its weights."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(str(ROOT / "examples/checkpoints/dit")))


def ddpm() -> torch.nn.Module:
    """The shipped U-Net, without its weights."""
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(UNet2DModel.load_config(str(ROOT / "examples/checkpoints/ddpm")))


def dit_xl() -> torch.nn.Module:
    """DiT-XL/2 at 256 pixels."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28}
    return DiTTransformer2DModel(**sizes, sample_size=32)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"dit": dit, "ddpm": ddpm, "dit_xl": dit_xl}


@dataclass(frozen=True)
class Kernels:
    """What a call launches.

    Attributes:
        triton: generated kernels.
        library: library routines: matrix products, convolutions, attention.
        copies: of the generated ones, those that compute nothing.
        channels_last: convolutions whose result is channels-last.
        convolutions: all of them.
    """

    triton: int = 0
    library: int = 0
    copies: int = 0
    channels_last: int = 0
    convolutions: int = 0

    @property
    def all(self) -> int:
        """Generated ones and library routines."""
        return self.triton + self.library

    def __add__(self, other: Kernels) -> Kernels:
        return Kernels(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Counter:
    """Counts the kernels of graphs, each graph once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[fx.GraphModule, Kernels]] = {}

    def lifted(self, graph_module: fx.GraphModule) -> Kernels:
        """Of a graph whose weights are arguments."""
        if id(graph_module) not in self._known:
            code = gpu.triton_code(graph_module)
            triton, library = gpu.launches(code)
            last = gpu.convolutions(code)
            found = Kernels(len(triton), len(library), len(gpu.copies(code)), sum(last), len(last))
            self._known[id(graph_module)] = graph_module, found  # held, so that no other graph gets its identity
        return self._known[id(graph_module)][1]

    def plain(self, graph_module: fx.GraphModule) -> Kernels:
        """Of plain compilation."""
        return self.lifted(lift_weights(graph_module)[0])

    def parts(self, run: Any) -> tuple[Kernels, int]:
        """Of what a compiler made of a step graph, and how many compilations that are."""
        parts = parts_of(run)
        return sum((self.lifted(part.graph_module) for part in parts), Kernels()), len(parts)


def abstract(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Program:
    """The program of a model on a GPU, batch 2."""
    with torch.device("meta"):
        model = make().eval().to(dtype)
    with gpu.gpu():
        return fxmask.capture(gpu.on_gpu(model))


def live_alone(program: Program, plan: Plan, step: int, precomputed: Mapping[str, str] | None = None) -> fx.GraphModule:
    """The graph of what a step computes and of nothing else, with its cached values as arguments: no stores, no forecasts.

    With ``precomputed`` (as for ``build_step_graph``), the timestep's and the conditioning's values are arguments, too.
    """
    given = tuple(load._replace(terms=((load.slots[0], 1.0),)) for load in plan.steps[step].load)
    return build_step_graph(program, given, (), (step,), precomputed=precomputed).graph_module


def steps_of(plan: Plan) -> list[int]:
    """Steps with different graphs: those that compute least and most, of those that skip something."""
    skipping = [i for i in plan.first_steps.values() if plan.steps[i].load]
    by_work = sorted(skipping, key=lambda i: plan.steps[i].macs)
    return [by_work[k * (len(by_work) - 1) // max(1, OTHERS - 1)] for k in range(min(OTHERS, len(by_work)))]


def measure(name: str, dtype: str, num_steps: int, found: Callable[[dict[str, Any]], None]) -> None:
    """All rows of one model in one type; each is handed to ``found`` when it is there."""
    program = abstract(MODELS[name], getattr(torch, dtype))
    count = Counter()
    marked = sum(LAYOUT in node.meta for node in program.graph_module.graph.find_nodes(op="get_attr"))
    about = {"model": name, "dtype": dtype}
    plain = count.plain(program.graph_module)
    found({**about, "graph": "plain", "form": "plain", "laid_out": marked, "kernels": asdict(plain), "live": plain.all})
    timesteps = timesteps_of(num_steps)
    masks = {
        "all blocks": fxmask.policies.interval(1)(program, timesteps),
        "interval(2)": fxmask.policies.interval(2)(program, timesteps),
        "random, half": random_mask(program, num_steps, 2.0),
    }
    for form in ("whole", "regions"):
        for title, mask in masks.items():
            plan = fxmask.rectify(program, mask)
            store = GraphStore(program, "inductor", form)
            with gpu.gpu():
                store.prepare(plan)
            for step in [0] if title == "all blocks" else steps_of(plan):
                graph, run = store.get(plan, step)
                kernels, parts = count.parts(run)
                live = plain if title == "all blocks" else count.plain(live_alone(program, plan, step))
                of_step = plan.steps[step]
                found(
                    {
                        **about,
                        "graph": f"{title}, step {step}",
                        "form": form,
                        "kernels": asdict(kernels),
                        "live": live.all,
                        "live_copies": live.copies,
                        "parts": parts,
                        "macs": of_step.macs / program.macs,
                        "loads": len(graph.load),
                        "stores": len(graph.store),
                    }
                )


def row_of(found: dict[str, Any]) -> str:
    """A line of the table."""
    k = Kernels(**found["kernels"])
    whole = found["form"] == "plain"
    cells = [found["model"], found["dtype"], found["graph"] if not whole else "plain compilation"]
    cells += ["" if whole else f"{found['form']} ({found['parts']})"]
    cells += ["100 %" if whole else f"{100 * found['macs']:.0f} %"]
    cells += ["" if whole else f"{found['loads']} / {found['stores']}", f"{k.triton} + {k.library}"]
    cells += ["" if whole else str(found["live"]), "" if whole else f"{k.all / found['live']:.2f}", str(k.copies)]
    cells += [f"{k.channels_last} of {k.convolutions}" if k.convolutions else ""]
    return "| " + " | ".join(cells) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    """All rows in the order of models and types."""
    head = ["model", "type", "step graph", "form (parts)", "MACs", "loads / stores", "triton + library", "live", "ratio"]
    head += ["copies", "channels-last"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    order = [(name, dtype) for name in MODELS for dtype in ("float32", "bfloat16")]
    return "\n".join(lines + [row_of(row) for pair in order for row in rows if (row["model"], row["dtype"]) == pair])


def measured() -> list[dict[str, Any]]:
    """All rows that are there; read anew each time, because another process may measure another model."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text()) if MEASURED.exists() else []
    return rows


def save(rows: list[dict[str, Any]]) -> None:
    """In place of those that are there."""
    MEASURED.write_text(json.dumps(rows, indent=1))


def keep(start: float, row: dict[str, Any]) -> None:
    """Add a row to those that are there."""
    save([*measured(), row])
    print(f"{time.monotonic() - start:5.0f} s {row_of(row)}", flush=True)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="dit,ddpm,dit_xl")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="keep the table in the results")
    options = parser.parse_args()
    for name in filter(None, options.models.split(",")):
        for dtype in options.dtypes.split(","):
            save([row for row in measured() if (row["model"], row["dtype"]) != (name, dtype)])
            measure(name, dtype, options.steps, functools.partial(keep, time.monotonic()))
    rows = measured()
    print(table(rows))
    if options.write:
        remarks = RESULTS.read_text().partition(REMARKS)[2] if RESULTS.exists() else "\n"
        made = f"`studies/gpu_kernels.py`, torch {torch.__version__}: Inductor's code for an H100, batch 2."
        head = f"# Kernels on a GPU\n\n{made}\n"
        RESULTS.write_text("\n".join([head, table(rows), "", REMARKS + remarks]))


if __name__ == "__main__":
    main()
