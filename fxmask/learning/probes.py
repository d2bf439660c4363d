"""Probes: first-order errors of single blocks, from backward passes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fxmask.ir.forecast import Slot
from fxmask.ir.graph import value_bytes
from fxmask.ir.interpret import interpret
from fxmask.ir.program import Program
from fxmask.learning.pieces import Place, drawn_for
from fxmask.learning.room import Room, all_bytes, peak_bytes
from fxmask.learning.student import Student, per_image, tensors_of
from fxmask.sampling.sampler import Sampler

logger = logging.getLogger(__name__)
MAX_AGE = 8
PROBES = 2


class Probes(NamedTuple):
    """Mean squares of probes over directions and images, float64.

    Attributes:
        alone: of each block at ages 1..A, ``[T, B, A]``.
        together: of the sum over all blocks at age 1, ``[T]``.
    """

    alone: torch.Tensor
    together: torch.Tensor


def has_derivatives(program: Program) -> bool:
    """Whether the prediction can be differentiated by every float input that it depends on; custom operators often cannot."""
    tensors = list(program.example.tensors.values())
    outputs, _ = _forward(program.graph_module, tensors, {})
    try:
        outputs[0].sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        logger.info("the denoiser has no derivatives, so plans that need them are not tried: %s", error)
        return False
    return True


def measure_probes(student: Student, blocks: Sequence[str]) -> Probes:
    """Probes of some blocks, from forwards and backwards through every recorded call of the first lane."""
    lanes = len(student.order) / student.num_steps
    student.units += (1 + 2 * PROBES) / lanes  # of each step: one forward pass, and a backward pass of twice that per probe
    first = student.first_run()
    parts = [
        _probes_of(t, lanes[0], first + place.run, blocks, student.room, place)
        for t, lanes, place in zip(student.trajectories, student.programs, student.places, strict=True)
    ]
    probes = torch.cat(student.group.gather(parts), dim=1).double()
    return Probes(probes.pow(2).mean(dim=1), probes[..., 0].sum(dim=2).pow(2).mean(dim=1))


def _probes_of(
    trajectory: Sampler, program: Program, seed: int, blocks: Sequence[str], room: Room, place: Place
) -> torch.Tensor:
    """Probes float32 ``[T, R, B, A]`` for R (direction, image) pairs.

    Raises:
        InputError: there is no room for a backward pass through one call.
    """
    values = {value: b for b, name in enumerate(blocks) for value in program.block(name).values}
    window: list[MutableMapping[Slot, torch.Tensor]] = []  # values of the latest steps, this one last
    graph = program.graph_module.graph
    least = all_bytes(graph) + peak_bytes(graph)
    room.require(least, f"a backward pass through one call of a batch of {trajectory.batch_size}")
    held = (MAX_AGE + 1) * sum(value_bytes(program.node(value)) for value in values)
    if not room.holds(least + held):
        room.say("values of earlier steps that probes compare with go elsewhere")
    images = trajectory.batch_size
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(trajectory.num_steps):
        outputs, found = _forward(program.graph_module, tensors_of(program, trajectory.calls[step][0]), values)
        values_now = {Slot(name, 0, step): value.detach() for name, value in found.items()}
        window = window[-MAX_AGE:]
        if room.holds(least + held):
            window.append(values_now)
        else:
            window.append(room.elsewhere(trajectory.final.device))
            window[-1].update(values_now)
        table = torch.zeros(PROBES, images, len(blocks), MAX_AGE)
        names = [name for name, value in found.items() if value.requires_grad]
        for r in range(PROBES if step and names else 0):
            count = len(outputs[0]) // images * place.whole
            drawn = torch.randn((count, *outputs[0].shape[1:]), generator=generator)
            u = (drawn_for(place, drawn) if place.size < place.whole else drawn).to(outputs[0])
            wanted = [found[n] for n in names]
            gradients = torch.autograd.grad(outputs[0], wanted, u, retain_graph=r + 1 < PROBES, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                for age in range(1, len(window)):
                    moved = window[-1 - age][Slot(name, 0, step - age)] - found[name].detach()
                    products = per_image(gradient * moved, images) / math.sqrt(outputs[0].numel() / images)
                    table[r, :, values[name], age - 1] += products.cpu()
            del gradients
        if step:  # older than the run: as bad as the oldest there is
            table[..., len(window) - 1 :] = table[..., len(window) - 2 : len(window) - 1]
        rows.append(table.flatten(0, 1))
    return torch.stack(rows)


@torch.enable_grad()
def _forward(
    module: fx.GraphModule, tensors: Sequence[torch.Tensor], wanted: Mapping[str, int]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of a graph and some of its values, with gradients from the first wanted value on."""
    found: dict[str, torch.Tensor] = {}

    def watch(node: fx.Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if node.op == "placeholder":
            return value.detach().requires_grad_() if value.is_floating_point() else value
        if node.op == "get_attr":
            return value.detach()
        if node.name in wanted:
            found[node.name] = value
        return value

    return list(interpret(module, tensors, watch)), found
