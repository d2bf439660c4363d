"""What a step costs in Python, outside of compiled graphs: a DiT of 28 layers whose step graphs are stubs.

    python examples/studies/steady_step.py [--runs 60] [--write]

The denoiser is tiny and has as many blocks, cached values and precomputed values as DiT-XL/2. Each step graph is a stub that
returns what the graph returned in the first run, so that what is timed is the way through the runtime: which run, lane and
step a call is, what of the model may have changed, arguments, caches, the output. Each step's shortest time over all runs
counts, and of these the median over the steps in the middle of a run. ``--write`` puts the table and a profile into
``examples/results/steady_step.md``, in front of the remarks.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results" / "steady_step.md"
STEPS, BATCH = 20, 2
MIDDLE = range(4, STEPS - 1)


class Stub:
    """Returns what a step graph returned when it was first called."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._results: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """The same results each time."""
        if self._results is None:
            self._results = self._run(*arguments)
        return self._results


class StubCompiler(Eager):
    """Makes stubs."""

    def compile(self, graph_module: Any) -> Callable[..., Any]:
        """A stub."""
        return Stub(graph_module)


class StubRecorder:
    """Recordings that do nothing when they are replayed."""

    def problem(self, device: torch.device) -> None:
        """None."""

    def is_idle(self, device: torch.device) -> bool:
        """Nobody records."""
        return True

    def ordered(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """There is one thread."""
        return contextlib.nullcontext()

    def record(self, prepare: Callable[[], None], run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """A replay that does nothing."""
        run()
        return lambda: None


class Nothing(torch.nn.Module):
    """A denoiser that does nothing."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """The sample."""
        return hidden_states


def dit() -> torch.nn.Module:
    """28 layers, 4,000 numbers each."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1, "num_layers": 28}
    return DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10).eval()


class Timed:
    """Runs of a model, step by step."""

    def __init__(self, model: Any, timesteps: tuple[float, ...], marked: bool) -> None:
        self._model = model
        self._marked = marked
        self._call = {"hidden_states": torch.randn(BATCH, 1, 8, 8), "class_labels": torch.tensor([1, 2])}
        self._timesteps = torch.tensor(timesteps).long()

    def run(self, profile: cProfile.Profile | None = None) -> list[int]:
        """Nanoseconds of each step; those in the middle are profiled."""
        taken = []
        generation = self._model.generation() if self._marked else contextlib.nullcontext()
        with torch.no_grad(), generation:
            for i in range(STEPS):
                timestep = self._timesteps[i].expand(BATCH)
                if profile is not None and i in MIDDLE:
                    profile.enable()
                started = time.perf_counter_ns()
                self._model(timestep=timestep, **self._call)
                taken.append(time.perf_counter_ns() - started)
                if profile is not None:
                    profile.disable()
        return taken

    def microseconds(self, runs: int) -> float:
        """Of one step."""
        best = [min(step) for step in zip(*(self.run() for _ in range(runs)), strict=True)]
        return statistics.median(best[i] for i in MIDDLE) / 1e3


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="put the table into the results")
    options = parser.parse_args()
    BACKENDS["stubs"] = Backend({"whole": StubCompiler})
    BACKENDS["replayed stubs"] = Backend({"whole": StubCompiler}, capturer=StubRecorder)
    sample, labels = torch.randn(BATCH, 1, 8, 8), torch.tensor([1, 2])
    call = {"hidden_states": sample, "timestep": torch.full((BATCH,), 950), "class_labels": labels}
    program = fxmask.capture(dit(), call)
    timesteps = tuple(float(t) for t in range(950, -1, -50))
    rows = torch.rand(STEPS, len(program.branches), generator=torch.Generator().manual_seed(0)) < 0.5
    rows[0] = True
    plan = fxmask.rectify(program, fxmask.Mask(rows, timesteps, [b.name for b in program.branches]))
    lines, profiles = [], []
    for name, backend, marked in (
        ("step graphs are called, marked generation", "stubs", True),
        ("the same, not marked", "stubs", False),
        ("steps are replayed, marked generation", "replayed stubs", True),
        ("the same, not marked", "replayed stubs", False),
    ):
        model = fxmask.compile(program, plan, backend=backend)
        timed = Timed(model, timesteps, marked)
        timed.run()
        timed.run()
        taken = timed.microseconds(options.runs)
        profile = cProfile.Profile()
        for _ in range(20):
            timed.run(profile)
        report = io.StringIO()
        stats = pstats.Stats(profile, stream=report).strip_dirs().sort_stats("tottime")
        calls = stats.total_calls / (20 * len(MIDDLE))  # type: ignore[attr-defined]
        stats.print_stats(14)
        lines.append(f"| {name} | {taken:.0f} | {calls:.0f} |")
        profiles.append((name, report.getvalue()))
    nothing = Timed(Nothing(), timesteps, marked=False)
    lines.append(f"| a module that does nothing | {nothing.microseconds(options.runs):.1f} | |")
    step = executor_step(model)
    text = "\n".join(
        [
            "# A steady step, outside of compiled graphs",
            "",
            f"`python examples/studies/steady_step.py --write`; a DiT of 28 layers, {STEPS} steps, {plan.distinct_graphs} step",
            f"graphs; in the middle {step}. Microseconds are of the machine at hand;",
            "function calls are not. A replayed step's copy in and clone out run here, on a CPU; on a GPU they are launches.",
            "",
            "| | us per step | function calls per step |",
            "|---|---|---|",
            *lines,
        ]
    )
    print(text)
    body = "\n".join(f"\n## Profile: {name}\n\n```text\n{profile.strip()}\n```" for name, profile in profiles[::2])
    if options.write:
        kept = RESULTS.read_text().partition("## Remarks")[2] if RESULTS.exists() else ""
        RESULTS.write_text(f"{text}\n{body}\n" + (f"\n## Remarks{kept}" if kept else ""))


def executor_step(model: fxmask.AcceleratedModel) -> str:
    """What a step in the middle of the run moves."""
    executor = model.executor
    graph, _ = executor.graphs.get(executor.plan, STEPS // 2)
    plan = executor.plan.steps[STEPS // 2]
    return (
        f"{len(graph.precomputed)} precomputed values, {sum(len(x.slots) for x in plan.formed)} loads, "
        f"{len(plan.store)} stores, {len(plan.drop)} drops"
    )


if __name__ == "__main__":
    main()
