"""Is a graph what the model computes? Both run on the example, on other values and at other timesteps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxmask._torch import pytree
from fxmask.frontend.subject import Subject
from fxmask.frontend.value_reads import ASSUMPTIONS
from fxmask.ir.assumptions import Assumptions
from fxmask.ir.calls import RETURN_DICT, BoundCall
from fxmask.ir.outputs import OutputSpec, flatten_output

logger = logging.getLogger(__name__)


# Largest difference, relative to the largest output, that still counts as rounding.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def find_difference(module: fx.GraphModule, subject: Subject, bound: BoundCall, inputs: Iterable[Trial]) -> str | None:
    """Compare graph and model on some inputs.

    Args:
        module: the graph.
        subject: the denoiser.
        bound: the call that the graph was captured for.
        inputs: from ``usual_inputs`` or ``many_inputs``.

    Returns a description of the first difference, or ``None``.
    """
    assumptions: Assumptions | None = module.meta.get(ASSUMPTIONS)
    for name, tensors in inputs:
        if assumptions is not None and assumptions.broken(tensors):
            continue  # the original runs then
        try:
            expected, _ = flatten_output(subject(bound.rebuild(tensors)))
        except Exception:
            if name == EXAMPLE:
                raise
            logger.debug("the model does not take %s", name, exc_info=True)  # e.g. a timestep beyond its table
            continue
        with subject.ambient.graph_mode():
            got = module(*tensors)
        for k, (a, b) in enumerate(zip(got, expected, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"output {k} is {a.dtype}{list(a.shape)}, the model's is {b.dtype}{list(b.shape)} ({name})"
            if same_values(a, b):
                continue
            scale = float(b.abs().max()) if b.numel() else 0.0
            error = float((_wide(a) - _wide(b)).abs().max())
            if not error <= ROUNDING.get(b.dtype, 0.0) * max(scale, 1e-30):
                return f"output {k} differs from the model's by {error:.3g} (largest value {scale:.3g}; {name})"
    return None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


EXAMPLE = "example inputs"
Trial = tuple[str, tuple[torch.Tensor, ...]]  # a name for messages, and the tensors of a call


def usual_inputs(bound: BoundCall, timestep: str | None, looked_up: bool = False) -> Iterator[Trial]:
    """The example itself, the example with other values throughout, with constant ones, and at other timesteps.

    Args:
        bound: the example.
        timestep: name of the timestep.
        looked_up: whether the timestep is an index into a table: then none is tried that may lie beyond it, which on a GPU
            would end the process.
    """
    tensors = dict(bound.tensors)
    yield EXAMPLE, tuple(tensors.values())
    generator = torch.Generator().manual_seed(0)
    changed = []
    for x in tensors.values():
        if x.dim() > 1 and _is_mask(x):
            changed.append(_shorter(x))
        elif x.dim() > 1 and x.dtype == torch.bool and x.numel():
            changed.append(_marked(x))
        elif x.is_floating_point() and x.dim() > 1:
            noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
            changed.append(x * 0.5 + noise)
        elif x.dtype == torch.bool or x.is_complex() or not x.numel():
            changed.append(x)
        elif x.is_floating_point():
            changed.append(x / 2)
        else:
            changed.append(x // 2 if x.dim() <= 1 else x.flip(0))
    yield "other values", tuple(changed)
    for value in (0.0, 1.0):
        constant = {n: torch.full_like(x, value) for n, x in tensors.items() if x.is_floating_point() and n != timestep}
        yield f"all values {value:g}", tuple({**tensors, **constant}.values())
    if timestep in tensors and tensors[timestep].numel():
        for value in _timesteps(tensors[timestep], looked_up):
            yield _at(tensors, timestep, value)


def _timesteps(example: torch.Tensor, looked_up: bool) -> tuple[float, ...]:
    """Timesteps that are tried: the ends of the usual range, or what lies between an index of the example and 0."""
    if not looked_up:
        return (0.0, 1.0, _last(example))
    return (0.0, float(example.min()) // 2)


def is_looked_up(module: fx.GraphModule, bound: BoundCall, timestep: str | None) -> bool:
    """Whether a graph uses something made of the timestep as an index into a table."""
    if timestep not in bound.tensors:
        return False
    made = {list(module.graph.find_nodes(op="placeholder"))[list(bound.tensors).index(timestep)]}
    for node in module.graph.nodes:
        if made.isdisjoint(node.all_input_nodes):
            continue
        made.add(node)
        packet: Any = getattr(node.target, "overloadpacket", None)
        position = LOOK_UPS.get(packet)
        if position is not None and not made.isdisjoint(pytree.tree_leaves(node.args[position])):
            return True
    return False


def many_inputs(bound: BoundCall, timestep: str | None, looked_up: bool = False) -> Iterator[Trial]:
    """The usual ones, and many timesteps with other values, where a branch on a value may have been frozen."""
    yield from usual_inputs(bound, timestep, looked_up)
    tensors = dict(bound.tensors)
    if timestep is None or timestep not in tensors or not tensors[timestep].numel():
        return
    last = float(tensors[timestep].min()) if looked_up else _last(tensors[timestep])
    for k in range(MANY):
        yield _at(tensors, timestep, last * (k + 0.5) / MANY)
        shift = 0.1 * (-1) ** k * 2 ** (k / 3)  # both ways, from small to far beyond noise: a mean has a sign
        shifted = {n: x + shift if n != timestep and x.is_floating_point() and x.dim() > 1 else x for n, x in tensors.items()}
        yield f"values shifted by {shift:.2g}", tuple(shifted.values())


def _last(timesteps: torch.Tensor) -> float:
    """The largest timestep of a sampler that counts as the example does."""
    return 1.0 if timesteps.is_floating_point() and float(timesteps.abs().max()) <= 1 else LAST_TIMESTEP


def _at(tensors: Mapping[str, torch.Tensor], timestep: str, value: float) -> Trial:
    return f"{timestep}={value:g}", tuple({**tensors, timestep: torch.full_like(tensors[timestep], value)}.values())


def _is_mask(x: torch.Tensor) -> bool:
    return not x.is_complex() and bool(x.numel()) and bool(((x == 0) | (x == 1)).all()) and bool(x.any())


def _shorter(mask: torch.Tensor) -> torch.Tensor:
    """The mask with one entry less in its last row: lengths are easily burned into a graph."""
    changed = mask.clone()
    row = changed.view(-1, changed.shape[-1])[-1]
    kept = row.nonzero().flatten()
    if len(kept) > 1:
        row[kept[-1]] = 0
    return changed


def _marked(mask: torch.Tensor) -> torch.Tensor:
    """An empty mask with its last entry set: what is padded is often given so."""
    changed = mask.clone()
    changed.view(-1)[-1] = True
    return changed


LOOK_UPS = {  # operators that take indices, and the position of these
    torch.ops.aten.embedding: 1,
    torch.ops.aten.index: 1,
    torch.ops.aten.take: 1,
    torch.ops.aten.index_select: 2,
    torch.ops.aten.gather: 2,
}
LAST_TIMESTEP = 999.0  # of the usual 1,000 training steps
MANY = 24  # timesteps that a draft is compared at


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN where the other is NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b) or torch.allclose(a, b, 0, 0, True))


def run_model(subject: Subject, bound: BoundCall) -> tuple[OutputSpec, list[torch.Tensor]]:
    """Run the model once per value of ``return_dict``: how its outputs are put together, and the tensors in them."""
    tensors = tuple(bound.tensors.values())
    if RETURN_DICT not in bound.arguments:
        flat, build = flatten_output(subject(bound.rebuild(tensors)))
        return OutputSpec({None: build}), flat
    given = bound.arguments[RETURN_DICT]
    flat, build = flatten_output(subject(bound.rebuild(tensors)))
    builds = {given: build}
    with contextlib.suppress(Exception):
        builds[not given] = flatten_output(subject(bound.rebuild(tensors, **{RETURN_DICT: not given})))[1]
    return OutputSpec(builds), flat


def output_spec_of(subject: Subject, bound: BoundCall) -> OutputSpec:
    """How the model's outputs are put together."""
    return run_model(subject, bound)[0]
