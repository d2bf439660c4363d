"""Step graphs of a captured model, their GPU kernels run in Triton's interpreter and compared with eager on the same values.

Run by ``test_kernels.py`` with TRITON_INTERPRET=1. One line per step graph: its name and the largest relative error.
"""

from __future__ import annotations

import torch
from conftest import TIMESTEPS
from without_a_gpu import gpu, interpreted, on_gpu, triton_code

import fxmask
from fxmask.backends.inductor import WholeGraphs, parts_of
from fxmask.runtime.graph_store import GraphStore


class Layer(torch.nn.Module):
    """Attention with two heads and an MLP, both scaled by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.mlp = torch.nn.Sequential(
            torch.nn.LayerNorm(16), torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = (t.to(x.dtype) / 1000).reshape(-1, 1, 1)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + time * self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + time * self.mlp(x)


def main() -> None:
    """Compare a step that computes everything, one that loads values, and one that forms a value from two."""
    torch.manual_seed(0)
    model = Layer().eval()
    weights = dict(model.named_parameters())
    with gpu():
        program = fxmask.capture(on_gpu(model), {"x": torch.randn(2, 8, 16), "t": torch.tensor([500, 500])})
    names = tuple(block.name for block in program.branches)
    rows = torch.ones(len(TIMESTEPS), len(names), dtype=torch.bool)
    rows[2, 0] = rows[4, 0] = False
    mask = fxmask.Mask(rows, TIMESTEPS, names, forecast={(4, names[0]): ((1, -0.5), (3, 1.5))})
    plan = fxmask.rectify(program, mask)
    store = GraphStore(program, "inductor", compiler=WholeGraphs())
    with gpu():
        store.prepare(plan)
    for title, step in (("all blocks", 0), ("skipped", 2), ("forecast", 4)):
        graph, run = store.get(plan, step)
        (part,) = parts_of(run)
        arguments = []
        for node in part.graph_module.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            if "weight" in node.meta:
                arguments.append(weights[node.meta["weight"]].detach())
            elif node.name.startswith("coefficients"):
                (load,) = [load for load in plan.steps[step].formed if not load.plain]
                arguments.append(torch.tensor([c for _, c in load.terms]))
            elif value.is_floating_point():
                arguments.append(torch.randn(tuple(value.shape)).as_strided(value.shape, value.stride()))
            else:
                arguments.append(torch.full(tuple(value.shape), 500, dtype=value.dtype))
        call = interpreted(triton_code(part.graph_module))
        results = call([x.clone() for x in arguments])
        expected = part.graph_module(*arguments)
        assert len(results) == len(expected) == graph.num_outputs + len(graph.store)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, expected, strict=True))
        print(f"{title}: {worst:.1e}")


if __name__ == "__main__":
    main()
