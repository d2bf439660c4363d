"""Binding times: what a value depends on says when it can be computed at the earliest.

    weights < timestep < conditioning < sample

    before:  %e = silu(time_mlp(%t)); %m = linear(%e, %w); %k = linear(%text, %wk); %y = f(%x, %m, %k)     at every step
    after:   %m: a table with a row for each step; %k: once per generation; %y = f(%x, table_m[i], once_k)

The results are the same up to rounding. Values are precomputed where a step needs them: views of them, and what is cheaper
to compute than to read, stay in the step graphs, so that a precomputed value is the smallest tensor that will do.
"""

from __future__ import annotations

import enum

from torch import fx

from fxmask.ir.graph import is_random
from fxmask.ir.program import Program


class BindingTime(enum.IntFlag):
    """What a value depends on, besides the weights."""

    WEIGHTS = 0
    TIMESTEP = 1
    CONDITIONING = 2
    SAMPLE = 4


OF_ROLE = {"timestep": BindingTime.TIMESTEP, "conditioning": BindingTime.CONDITIONING}


def binding_times(program: Program) -> dict[fx.Node, BindingTime]:
    """What each node depends on; random numbers are drawn anew at every step, like samples.

    A block's value may come from another step, whatever it is computed from: it counts as a sample.
    """
    roles = iter(program.inputs)
    cut = {value for block in program.blocks for value in block.values}
    times: dict[fx.Node, BindingTime] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            times[node] = OF_ROLE.get(program.roles[next(roles)], BindingTime.SAMPLE)
            continue
        time = BindingTime.WEIGHTS
        for given in node.all_input_nodes:
            time |= times[given]
        if node.name in cut or is_random(node):
            time |= BindingTime.SAMPLE
        times[node] = time
    return times
