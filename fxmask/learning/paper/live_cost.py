"""Expected MACs of soft scores, with liveness relaxed to numbers in [0, 1]. This is ours; the paper's cost is ``sum_b s_b``.

    use[t, b]  = max over the blocks c that read b in a step of live[t, c];  1 if the outputs do
    need[t, b] = max(use[t, b], (1 - s[t+1, b]) * need[t+1, b])        a later step may load what step t computes
    live[t, b] = s[t, b] * need[t, b]
    cost[t]    = sum over nodes of MACs * max over the blocks c that they serve of live[t, c]

At ``s`` in {0, 1} this is the cost of the rectified plan. A stream that is skipped spares what only it reads, and its score
is charged for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxmask.ir.block import Block
from fxmask.ir.macs import count_macs
from fxmask.ir.program import Program

OUTPUT = -1  # in place of a block's number: the denoiser's outputs


@dataclass(frozen=True)
class LiveCost:
    """Who reads whom in one step, and the MACs of each set of readers.

    Attributes:
        readers: of each block the blocks that read its values, before they are computed themselves.
        macs: by set of blocks, the fraction of all MACs of the nodes that serve these blocks and nothing else.
    """

    readers: tuple[frozenset[int], ...]
    macs: dict[frozenset[int], float]

    @classmethod
    def of(cls, program: Program, blocks: Sequence[Block]) -> LiveCost:
        """Read it off a program's graph."""
        owner = {value: b for b, block in enumerate(blocks) for value in block.values}
        serves: dict[str, frozenset[int]] = {}
        readers: list[frozenset[int]] = [frozenset()] * len(blocks)
        macs: dict[frozenset[int], float] = {}
        for node in reversed(program.graph_module.graph.nodes):
            served = frozenset((OUTPUT,)) if node.op == "output" else frozenset().union(*(serves[u.name] for u in node.users))
            if node.name in owner:
                b = owner[node.name]
                readers[b] |= served
                served = frozenset((b,))
            serves[node.name] = served
            if served and count_macs(node):
                macs[served] = macs.get(served, 0.0) + count_macs(node) / max(1, program.macs)
        return cls(tuple(readers), macs)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Expected fraction of all MACs at each step, ``[T]``, of scores ``[T, B]``; differentiable."""
        live: dict[int, torch.Tensor] = {OUTPUT: torch.ones(len(scores), dtype=scores.dtype)}
        for b in reversed(self._order()):
            use = self._most(live, self.readers[b])
            need = [use[-1]]
            for t in reversed(range(len(scores) - 1)):
                need.append(torch.maximum(use[t], (1 - scores[t + 1, b]) * need[-1]))
            live[b] = scores[:, b] * torch.stack(need[::-1])
        parts = [share * self._most(live, served) for served, share in self.macs.items()]
        return torch.stack(parts).sum(0)

    def _order(self) -> list[int]:
        """Blocks, each before those that read it."""
        order: list[int] = []
        left = set(range(len(self.readers)))
        while left:
            free = [b for b in left if not any(b in self.readers[other] for other in left)]
            assert free  # a graph has no circles
            order += sorted(free)
            left -= set(free)
        return order

    @staticmethod
    def _most(live: dict[int, torch.Tensor], blocks: frozenset[int]) -> torch.Tensor:
        if not blocks:
            return torch.zeros_like(live[OUTPUT])
        return torch.stack([live[b] for b in sorted(blocks)]).amax(0)

    def gradient(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the total cost by every score, ``[T, B]``; in units of a mean block, as ``sum_b s_b`` is."""
        used = scores.detach().clone().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(len(self.readers) * self(used).sum(), [used])
        return found
