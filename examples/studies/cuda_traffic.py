"""What goes in and out of CUDA graphs in each step, and the memory that they need, for DiT-XL/2 without its weights.

    python examples/studies/cuda_traffic.py [--steps 20] [--batch 2] [--dtype bfloat16] [--write]

The runtime works on tensors that have no values, with a recorder that records nothing: what it launches outside of recordings
is counted, and memory is summed up. ``activations`` is the largest number of bytes that a step graph's operators hold at once
besides what is static, one operator after the other; Inductor's fused kernels hold less. ``--write`` puts the table into
``examples/results/cuda_traffic.md``.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.replay import ReplayingExecutor
from fxmask.runtime.static_memory import Lease
from fxmask.tools.bench_masks import random_mask

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results" / "cuda_traffic.md"
MEBI = 2**20


class Peak(TorchDispatchMode):
    """Bytes that operators allocate and hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()).cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                reference = StorageWeakRef(x.untyped_storage())
                if reference.cdata not in given:
                    self._held.setdefault(reference.cdata, (reference, x.untyped_storage().nbytes()))
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return result


class Silent:
    """Records nothing: a replay does the work, and says how much memory it took."""

    def __init__(self) -> None:
        self.recordings = self.activations = 0
        self.replaying = False

    def problem(self, device: torch.device) -> None:
        """None: tensors without values can be anywhere."""

    def is_idle(self, device: torch.device) -> bool:
        """Nobody records."""
        return True

    def ordered(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """There is one thread."""
        return contextlib.nullcontext()

    def record(self, prepare: Callable[[], None], run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """What does the work."""
        self.recordings += 1
        with self._replaying(), Peak() as peak:
            run()
        self.activations = max(self.activations, peak.most)

        def replay() -> None:
            with self._replaying():
                run()

        return replay

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[None]:
        self.replaying = True
        try:
            yield
        finally:
            self.replaying = False


class Launches(TorchDispatchMode):
    """Counts copies in and out, outside of replays, tensor by tensor."""

    def __init__(self, recorder: Silent) -> None:
        super().__init__()
        self._recorder = recorder
        self.copied = self.cloned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not self._recorder.replaying:
            self.copied += len(args[0]) if name == "_foreach_copy_" else name == "copy_"
            self.cloned += name == "clone"
        return func(*args, **(kwargs or {}))


def dit_xl(dtype: torch.dtype, batch: int) -> fxmask.Program:
    """DiT-XL/2 at 256 pixels, without its weights."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28}
    with torch.device("meta"):
        model = DiTTransformer2DModel(**sizes, sample_size=32).eval().to(dtype)
        sample = torch.empty(batch, 4, 32, 32, dtype=dtype)
        call = {"hidden_states": sample, "timestep": torch.empty(batch, dtype=torch.int64)}
        return fxmask.capture(model, {**call, "class_labels": torch.empty(batch, dtype=torch.int64)})


def measure(program: fxmask.Program, mask: fxmask.Mask) -> dict[str, str]:
    """One run, after one that records."""
    recorder = Silent()
    BACKENDS["silent"] = Backend({"whole": Eager}, capturer=lambda: recorder)
    plan = fxmask.rectify(program, mask)
    executor = ReplayingExecutor(plan, GraphStore(program, "silent"), recorder)
    tensors = list(program.example.tensors.values())
    per_step: list[tuple[int, int]] = []
    with torch.no_grad():
        for _ in range(2):
            rows: Any = None  # the run before gives its memory back
            rows, cache, per_step = executor.begin(tensors), {}, []
            assert isinstance(rows, Lease)
            for step in range(mask.num_steps):
                with Launches(recorder) as launches:
                    outputs = executor.run_step(step, tensors, cache, rows)
                per_step.append((launches.copied, launches.cloned))
    memory = rows.memory
    table = sum(x.numel() * x.element_size() for x in memory.table.tensors)
    caches, static = sum(memory.layout.sizes), memory.nbytes
    needed = plan.peak_cache_bytes + recorder.activations
    return {
        "step graphs": f"{plan.distinct_graphs}",
        "recordings, and one when a run begins": f"{recorder.recordings - 1} + 1",
        "MAC ratio": f"{plan.mac_ratio:.2f}",
        "copies in per step": f"{min(c for c, _ in per_step)} to {max(c for c, _ in per_step)}",
        "clones out per step": f"{min(c for _, c in per_step)} to {max(c for _, c in per_step)} ({len(outputs)} outputs)",
        "live caches": f"{plan.peak_cache_bytes / MEBI:.1f} MiB",
        "buffers of the caches": f"{caches / MEBI:.1f} MiB",
        "table of all steps, and one row": f"{table / MEBI:.1f} MiB",
        "all static memory": f"{static / MEBI:.1f} MiB",
        "activations of the largest step graph (the pool)": f"{recorder.activations / MEBI:.1f} MiB",
        "static memory and pool, by live caches and activations": f"{(static + recorder.activations) / needed:.2f}",
    }


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--write", action="store_true", help="put the table into the results")
    options = parser.parse_args()
    program = dit_xl(getattr(torch, options.dtype), options.batch)
    columns = {
        "random mask, 2x": measure(program, random_mask(program, options.steps, 2.0)),
        "interval(2)": measure(program, fxmask.policies.interval(2)(program, range(50 * options.steps - 50, -1, -50))),
    }
    lines = [
        f"# CUDA graphs of DiT-XL/2 at 256 pixels, batch {options.batch}, {options.dtype}, {options.steps} steps",
        "",
        "`python examples/studies/cuda_traffic.py --write`; no GPU was there: bytes and launches are counted, not timed.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(column[name] for column in columns.values())} |" for name in next(iter(columns.values()))),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
