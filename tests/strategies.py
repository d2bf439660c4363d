"""Random pairs of a denoiser and a mask, from a handful of integers that Hypothesis draws and shrinks."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from denoisers import Denoiser, Options, denoiser
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fxmask
from fxmask.ir.forecast import INPUT, Source, Term

logging.getLogger("torch.__trace").propagate = False  # else every failure ends in pages of torch's own log

POOL = 48  # denoisers of the normal run, each captured once and shared by its tests

Calls = list[list[dict[str, Any]]]


@dataclass(frozen=True)
class Choice:
    """What a pair is made from. A failing one is printed, and kept by pasting it into ``KEPT``.

    Attributes:
        denoiser: seed of the denoiser.
        mask: seed of cut values, mask and forecasts.
        statements: of the denoiser; ``None`` lets its seed decide.
        steps: T.
        blocks: B, at most.
        cuts: ``"found"`` for blocks that the library finds, ``"branches"`` for its disjoint ones, ``"any"`` for
            arbitrary values of the graph: nested, integer, views, several to a block.
        forecasts: whether some loads are linear combinations.
        lanes: denoiser calls per step, where the denoiser can tell them apart.
        own_rows: whether the lanes have rows of their own in the mask, and some steps leave one out.
        smooth: a differentiable denoiser in double precision.
    """

    denoiser: int
    mask: int = 0
    statements: int | None = None
    steps: int = 4
    blocks: int = 4
    cuts: str = "any"
    forecasts: bool = True
    lanes: int = 1
    smooth: bool = False
    own_rows: bool = False


@dataclass(frozen=True, eq=False)
class Pair:
    """A denoiser with blocks, a mask for them, and the calls of a run."""

    choice: Choice
    denoiser: Denoiser
    program: fxmask.Program
    mask: fxmask.Mask

    @property
    def lanes(self) -> int:
        return self.choice.lanes if self.denoiser.lanes else 1

    def calls(self) -> Calls:
        """Fresh tensors every time: nobody can change what another run is given."""
        made = self.denoiser.make_calls(self.mask.num_steps, self.lanes)
        if not self.mask.lanes:
            return made
        of_one_image = [[{**call, "sample": step[0]["sample"].clone()} for call in step] for step in made]
        return [[call for lane, call in enumerate(step) if (i, lane) in self.mask.order] for i, step in enumerate(of_one_image)]

    def turns(self) -> list[tuple[int, int, dict[str, Any]]]:
        """(row of the plan, number of the cache, call) of all calls, in order."""
        if self.mask.lanes:
            return [(row, 0, call) for row, call in enumerate(call for step in self.calls() for call in step)]
        return [(i, lane, call) for i, step in enumerate(self.calls()) for lane, call in enumerate(step)]

    def run(self, accelerated: Any, start: int = 0) -> list[Any]:
        """Results per step of an accelerated model: one, or one per call. Lanes with rows of their own are named."""
        results = []
        for i, step in enumerate(self.calls()[start:], start):
            names = (
                [self.mask.lanes[lane] for at, lane in self.mask.order if at == i] if self.mask.lanes else [None] * len(step)
            )
            outputs = []
            for name, call in zip(names, step, strict=True):
                with contextlib.nullcontext() if name is None else accelerated.cache_context(name):
                    outputs.append(accelerated(**call))
            results.append(outputs[0] if len(outputs) == 1 else outputs)
        return results

    def tensors(self, call: dict[str, Any]) -> list[torch.Tensor]:
        """The inputs of the program's graph."""
        return list(self.program.signature.bind((), call).tensors.values())

    def script(self) -> str:
        """A file that shows the pair when it is run."""
        terms = dict(self.mask.forecast.terms) if self.mask.forecast else {}
        rows = self.mask.compute.int().tolist()
        blocks = "".join(f"    fxmask.Block({b.name!r}, {b.kind!r}, {b.values!r}, 0, 0),\n" for b in self.program.blocks)
        shared, calling = "", "    got = [[accelerated(**call) for call in step] for step in calls]\n"
        if self.mask.lanes:  # lanes of one image, each under its name, without the calls that the mask does not have
            shared = (
                "for step in calls:\n    for call in step:\n        call['sample'] = step[0]['sample'].clone()\n"
                f"order = {self.mask.order}\n"
                "calls = [[call for lane, call in enumerate(step) if (i, lane) in order] for i, step in enumerate(calls)]\n"
            )
            calling = (
                "    got = []\n"
                "    for (_, lane), call in zip(order, [call for step in calls for call in step]):\n"
                "        with accelerated.cache_context(mask.lanes[lane]):\n"
                "            got.append(accelerated(**call))\n"
            )
        return (
            f"{self.denoiser.source}\n\nimport fxmask\n\n# {self.choice}\n"
            f"calls = make_calls({self.mask.num_steps}, {self.lanes})\n{shared}"
            "program = fxmask.capture(Denoiser().eval(), calls[0][0], ROLES)\n"
            f"program = dataclasses.replace(program, blocks=(\n{blocks}))\n"
            f"mask = fxmask.Mask(torch.tensor({rows}), {self.mask.timesteps}, {self.mask.blocks}, fxmask.Forecast({terms}), "
            f"lanes={self.mask.lanes}, called={None if self.mask.called is None else self.mask.called.tolist()})\n"
            "expected = fxmask.reference.run(program, mask, calls)\n"
            'accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")\n'
            f"with accelerated.generation():\n{calling}"
            "print(expected, got)\n"
        )


def make_pair(choice: Choice) -> Pair:
    """The pair that a choice stands for; the same one every time."""
    options = Options(choice.statements, "float64" if choice.smooth else None, choice.smooth)
    made = denoiser(choice.denoiser, options)
    rng = random.Random(f"mask {choice.mask}")
    blocks = _cut(made.program, choice, rng)
    program = replace(made.program, blocks=blocks)
    listed = [block for block in blocks if rng.random() < 0.9]
    names = tuple(block.name for block in listed)
    if choice.own_rows and made.lanes and choice.lanes > 1:
        return Pair(choice, made, program, _mask_of_lanes(program, choice, made.timesteps(choice.steps), names, rng))
    compute = random_rows(choice.steps, len(names), rng)
    forecast = random_forecast(program, compute, names, rng) if choice.forecasts else None
    mask = fxmask.Mask(compute, made.timesteps(choice.steps), names, forecast, program.fingerprint)
    return Pair(choice, made, program, mask)


def _cut(program: fxmask.Program, choice: Choice, rng: random.Random) -> tuple[fxmask.Block, ...]:
    if choice.cuts == "any":
        return _arbitrary_blocks(program, choice, rng)
    found = list(program.blocks if choice.cuts == "found" else program.branches)
    rng.shuffle(found)
    taken: set[str] = set()
    kept = []
    for block in found:  # a value may be cut by one block only
        if not taken & set(block.values) and len(kept) < choice.blocks:
            taken |= set(block.values)
            kept.append(block)
    return tuple(block for block in program.blocks if block in kept)


def _arbitrary_blocks(program: fxmask.Program, choice: Choice, rng: random.Random) -> tuple[fxmask.Block, ...]:
    nodes = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    nodes = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    rng.shuffle(nodes)
    blocks = []
    for k in range(choice.blocks):
        size = rng.choice([1, 1, 1, 2, 3])
        values, nodes = nodes[:size], nodes[size:]
        if values:
            blocks.append(fxmask.Block(f"cut{k}", "branch", tuple(n.name for n in values), 0, 0))
    return tuple(blocks)


def random_rows(steps: int, blocks: int, rng: random.Random) -> torch.Tensor:
    """Bool ``[T, B]``, the first row all ones: dense, sparse, or at intervals."""
    density = rng.choice([0.15, 0.4, 0.7, 0.95])
    columns = []
    for _ in range(blocks):
        interval = rng.randint(2, 4) if rng.random() < 0.2 else 0
        columns.append([i == 0 or (i % interval == 0 if interval else rng.random() < density) for i in range(steps)])
    return torch.tensor(columns, dtype=torch.bool).reshape(blocks, steps).T


def _mask_of_lanes(
    program: fxmask.Program, choice: Choice, timesteps: Sequence[float], names: tuple[str, ...], rng: random.Random
) -> fxmask.Mask:
    """A mask with rows for each lane, whose forecasts read any call before."""
    lanes = tuple("abc"[: choice.lanes])
    called = torch.ones(choice.steps, len(lanes), dtype=torch.bool)
    if rng.random() < 0.4:  # guidance that stops or starts midway
        at, lane = rng.randrange(choice.steps), rng.randrange(len(lanes))
        called[slice(at, None) if rng.random() < 0.5 else slice(at), lane] = False
    ones = torch.ones(choice.steps, len(lanes), len(names), dtype=torch.bool)
    every = fxmask.Mask(ones, tuple(timesteps), names, None, program.fingerprint, lanes=lanes, called=called)
    compute = random_rows(len(every.order), len(names), rng)
    forecast = random_forecast(program, compute, names, rng) if choice.forecasts else None
    terms = dict(forecast.terms) if forecast else {}
    for b, name in enumerate(names):
        for row, (_, lane) in enumerate(every.order):
            if not compute[row, b] and (row, name) not in terms:
                before = [at for at in range(row) if compute[at, b]]
                terms[row, name] = ((([at for at in before if every.order[at][1] == lane] or before)[-1], 1.0),)
    rows = fxmask.Mask(compute, every.by_call.timesteps, names, fxmask.Forecast(terms) if terms else None, program.fingerprint)
    return every.folded(rows)


def random_forecast(
    program: fxmask.Program, compute: torch.Tensor, names: Sequence[str], rng: random.Random
) -> fxmask.Forecast | None:
    """Some loads from one to three earlier steps that compute, at random coefficients. Integers are only reused.

    Where shapes allow it, other blocks and the sample are read as well.
    """
    terms: dict[tuple[int, str], tuple[Term, ...]] = {}

    def shapes(name: str) -> list[tuple[object, object]]:
        values = [program.node(value).meta["val"] for value in program.block(name).values]
        return [(value.shape, value.dtype) for value in values]

    for b, name in enumerate(names):
        if not all(program.node(value).meta["val"].is_floating_point() for value in program.block(name).values):
            continue
        for step in range(compute.shape[0]):
            if rng.random() < (0.9 if compute[step, b] else 0.6):
                continue
            earlier = compute[:step, b].nonzero().flatten().tolist()
            sources: list[Source] = list(rng.sample(earlier, min(rng.randint(1, 3), len(earlier))))
            if compute[step, b]:  # a blend
                sources.append(step)
            if rng.random() < 0.4 and shapes(name) == shapes(INPUT):
                sources += [(INPUT, at) for at in rng.sample(range(step + 1), rng.randint(1, min(2, step + 1)))]
            for c, other in enumerate(names):
                if other != name and rng.random() < 0.2 and shapes(other) == shapes(name):
                    sources += [(other, at) for at in compute[:step, c].nonzero().flatten().tolist()[-1:]]
            terms[step, name] = tuple((s, rng.choice([1.0, 0.5, -0.25, round(rng.uniform(-1, 1), 3)])) for s in sources)
    return fxmask.Forecast(terms) if terms else None


def choices(
    denoisers: st.SearchStrategy[int] = st.integers(0, POOL - 1),  # noqa: B008
    statements: st.SearchStrategy[int | None] = st.none(),  # noqa: B008
    cuts: Sequence[str] = ("any", "any", "found"),
    forecasts: Sequence[bool] = (True, False),
    steps: int = 8,
) -> st.SearchStrategy[Choice]:
    """Random pairs; by default of the pooled denoisers."""
    return st.builds(
        Choice,
        denoiser=denoisers,
        mask=st.integers(0, 2**20),
        statements=statements,
        steps=st.integers(2, steps),
        blocks=st.integers(1, 7),
        cuts=st.sampled_from(list(cuts)),
        forecasts=st.sampled_from(list(forecasts)),
        lanes=st.integers(1, 3),
        own_rows=st.booleans(),
    )


def fresh_choices(**sizes: Any) -> st.SearchStrategy[Choice]:
    """Random pairs of denoisers that no other test has seen, which shrink statement by statement."""
    return choices(denoisers=st.integers(0, 2**31), statements=st.integers(1, 7), **sizes)


def holds(check: Callable[[Pair], None], choice: Choice) -> None:
    """Check a property; where it fails, add the program to the error."""
    pair = make_pair(choice)
    try:
        check(pair)
    except Exception as error:
        error.add_note(f"{check.__name__} does not hold for {choice}; paste this into a file:\n\n{pair.script()}")
        raise


def assert_same(got: Any, expected: Any, bits: bool = True) -> None:
    """Equal in type, structure and every value.

    Args:
        got: a denoiser's return value, or a list of such.
        expected: the same.
        bits: tell -0.0 from 0.0 too.
    """
    assert type(got) is type(expected), f"{type(got).__name__} is not {type(expected).__name__}"
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(got, expected), f"differs by up to {(got.double() - expected.double()).abs().max():.3g}"
        assert not bits or not expected.is_floating_point() or torch.equal(got.signbit(), expected.signbit())
    elif hasattr(expected, "__dataclass_fields__"):
        assert_same(vars(got), vars(expected), bits)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert_same(list(got.values()), list(expected.values()), bits)
    elif isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b, bits)
    else:
        assert got == expected


def leaves(output: Any) -> list[torch.Tensor]:
    """Every tensor in a denoiser's return value."""
    if hasattr(output, "__dataclass_fields__"):
        output = vars(output)
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
