"""Properties that hold for every denoiser, every choice of cut values and every mask.

Each property is a function ``check_...`` of one (denoiser, mask) pair. It has a test of its own on pooled denoisers,
is checked on every kept pair, and in the slow run on 2,000 pairs of fresh denoisers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from denoisers import Denoiser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorder import Recorder
from strategies import (
    Choice,
    Pair,
    assert_same,
    choices,
    fresh_choices,
    holds,
    leaves,
    random_rows,
)
from torch import fx

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager
from fxmask.backends.inductor import Regions
from fxmask.backends.straight_line import chain_regions
from fxmask.ir.forecast import INPUT, Slot
from fxmask.ir.macs import count_macs
from fxmask.passes.insert_soft_mask import SoftGraph, insert_soft_mask
from fxmask.passes.specialize import specialize
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore

# Every pair that ever broke a property, whether the library, the property or the generator was wrong. Always run.
KEPT = [
    Choice(3, 0, steps=2),  # a Python-int timestep: one row of a product rounds differently from B equal rows
    Choice(26, 0, steps=2, blocks=1, cuts="branches", forecasts=False),  # `linear` rounds by its weight's requires_grad
    Choice(1, 197, steps=2, blocks=1, forecasts=False),  # a blended view with gaps in memory
    Choice(5, 2, steps=2, blocks=2, forecasts=False),  # a boolean cut value
    Choice(202012880, 216362, statements=6, steps=7, blocks=5, cuts="branches"),  # a skip of another level's size
    # A float64 value that was forecast with float32 coefficients, because a float32 value comes before it.
    Choice(1992502733, 84644, statements=1, steps=4, blocks=2),
    Choice(736662516, 919217, statements=3, steps=7, blocks=6, lanes=2),
]


def examples(count: int, explore: bool = False) -> settings:
    """Settings of a run of ``count`` pairs: the same ones every time, unless it explores."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, derandomize=not explore, database=None, deadline=None, print_blob=True, suppress_health_check=slow
    )


def run_reference(pair: Pair, mask: fxmask.Mask | None = None) -> list[Any]:
    """Results per step: one, or one per lane."""
    return fxmask.reference.run(pair.program, mask or pair.mask, pair.calls())


def run_specialised(pair: Pair, plan: fxmask.Plan, backend: str = "eager") -> list[Any]:
    """The same, from the accelerated model; every call but a lane's first must go on where the last one ended."""
    accelerated = fxmask.compile(pair.program, plan, backend=backend)
    with accelerated.generation() as generation:
        results = pair.run(accelerated)
    assert generation.matched == followed(pair)
    return results


def by_call(pair: Pair, results: list[Any]) -> list[Any]:
    """Results per step as results per call."""
    counts = [len(step) for step in pair.calls()]
    return [x for result, count in zip(results, counts, strict=True) for x in (result if count > 1 else [result])]


def followed(pair: Pair) -> int:
    """How many calls of a run go on from the one before: all but the first, of each lane if these are alike."""
    return len(pair.mask.order) - 1 if pair.mask.lanes else pair.lanes * (pair.mask.num_steps - 1)


# --- what runs computes what the mask means


def check_all_ones(pair: Pair) -> None:
    """With nothing skipped the reference, the specialised graph and the model agree in every bit.

    The model is called with the timestep in canonical form: products of one row and of B equal rows round differently.
    """
    ones = fxmask.Mask.ones(pair.program, pair.mask.timesteps, pair.mask.lanes)
    ones = replace(ones, called=pair.mask.called)
    signature = pair.program.signature
    with torch.no_grad():
        expected = [[pair.denoiser.model(**signature.bind((), call).arguments) for call in step] for step in pair.calls()]
    expected = [lanes[0] if len(lanes) == 1 else lanes for lanes in expected]
    assert_same(run_reference(pair, ones), expected)
    assert_same(run_specialised(pair, fxmask.rectify(pair.program, ones)), expected)


def check_specialised(pair: Pair) -> None:
    """Graphs without the skipped nodes compute what the reference computes with them."""
    assert_same(run_specialised(pair, fxmask.rectify(pair.program, pair.mask)), run_reference(pair))


class EagerParts(Regions):
    """Step graphs cut at every join, equal parts shared, without a compiler."""

    def prepare(self, graph_modules: Any) -> None:
        self._vocabulary.choose_merges(graph_modules, 0)

    def compile(self, graph_module: fx.GraphModule) -> Any:
        regions = self._vocabulary.split(graph_module)
        runs: Any = [self._compiled.setdefault(r.key, r.graph_module) for r in regions]  # type: ignore[arg-type]
        return chain_regions(graph_module, regions, runs)


def check_in_parts(pair: Pair) -> None:
    """Step graphs in regions compute what the reference computes."""
    with mock.patch.dict(BACKENDS, {"eager parts": Backend({"": EagerParts}, exact=True)}):
        assert_same(run_specialised(pair, fxmask.rectify(pair.program, pair.mask), "eager parts"), run_reference(pair))


def check_replayed(pair: Pair) -> None:
    """Steps that are recorded once and replayed on memory of their own compute what the reference computes."""
    backend = Backend({"": Eager}, exact=True, capturer=Recorder)
    with mock.patch.dict(BACKENDS, {"recorded": backend}):
        accelerated = fxmask.compile(pair.program, fxmask.rectify(pair.program, pair.mask), backend="recorded")
        for _ in range(2):
            with accelerated.generation() as generation:
                results = pair.run(accelerated)
            assert generation.matched == followed(pair)
            assert_same(results, run_reference(pair))
        assert accelerated.executor._problem is None


def check_rectified(pair: Pair) -> None:
    """Turning dead computes off changes no result: no needed one is ever turned off."""
    rectified = fxmask.rectify(pair.program, pair.mask).mask
    assert not (rectified.by_call.compute & ~pair.mask.by_call.compute).any()
    assert_same(run_reference(pair, rectified), run_reference(pair))


def check_starting_in_the_middle(pair: Pair) -> None:
    """A plan that starts at step k computes what the mask means when nothing is stored before k."""
    for start in range(pair.mask.num_steps):
        late = pair.mask.starting_at(start)
        wanted = by_call(pair, run_reference(pair, late))
        first = next(row for row, (step, _) in enumerate(pair.mask.order) if step == start)
        for plan in (fxmask.rectify(pair.program, pair.mask, start=first), fxmask.rectify(pair.program, late, start=first)):
            executor = Executor(plan, GraphStore(pair.program, "eager"))
            caches: list[dict[Slot, torch.Tensor]] = [{} for _ in range(pair.lanes)]
            for (row, cache, call), output in zip(pair.turns(), wanted, strict=True):
                if row >= first:
                    assert_same(executor.run_step(row, pair.tensors(call), caches[cache]), leaves(output))


def check_resuming_run(pair: Pair) -> None:
    """An accelerated model whose first call comes at step k runs its mask from there."""
    if pair.program.signature.timestep is None:
        return  # only the count tells its steps apart
    plan = fxmask.rectify(pair.program, pair.mask)
    accelerated = fxmask.compile(pair.program, plan, backend="eager")
    for start in range(pair.mask.num_steps - 1):  # at the last step nothing follows, which warns
        expected = run_reference(pair, pair.mask.starting_at(start))[start:]
        with accelerated.generation():
            results = pair.run(accelerated, start)
        assert_same(results, expected)


def check_no_aliases(pair: Pair) -> None:
    """Whatever a caller writes into what it gave and was given, later steps do not see it."""
    expected = run_reference(pair)
    accelerated = fxmask.compile(pair.program, fxmask.rectify(pair.program, pair.mask), backend="eager")
    results = []
    with accelerated.generation():
        for i, step in enumerate(pair.calls()):
            lanes = []
            named = (
                [pair.mask.lanes[lane] for at, lane in pair.mask.order if at == i] if pair.mask.lanes else [None] * len(step)
            )
            for name, call in zip(named, step, strict=True):
                with contextlib.nullcontext() if name is None else accelerated.cache_context(name):
                    output = accelerated(**call)
                lanes.append([x.clone() for x in leaves(output)])
                for x in leaves(output):
                    if 0 not in x.stride():  # torch refuses to write into expanded tensors
                        x.fill_(7)
                call["sample"].fill_(9)
                if "control" in call:
                    call["control"].fill_(9)
            results.append(lanes)
    assert_same([x for step in results for x in step], [leaves(x) for x in by_call(pair, expected)])


def soft_step(soft: SoftGraph, tensors: Sequence[torch.Tensor], scores: torch.Tensor, caches: list[torch.Tensor]) -> Any:
    """Outputs of one step of the soft graph; caches take the blended values whose score is above one half."""
    results = soft.graph_module(*tensors, scores, *caches)
    blended = results[soft.num_outputs :]
    for k, (b, _) in enumerate(soft.values):
        if scores[b] > 0.5:
            caches[k] = blended[k].clone()
    return list(results[: soft.num_outputs])


def check_soft_is_hard(pair: Pair) -> None:
    """The soft graph at scores of 0 and 1 computes what the mask means (up to the sign of zero)."""
    if pair.mask.lanes:
        return  # scores are of blocks and steps
    mask = _blendable(pair.program, pair.mask)
    with frozen(pair.denoiser.model):
        expected = run_reference(pair, mask)
    soft = insert_soft_mask(pair.program, [pair.program.block(name) for name in mask.blocks])
    caches = [soft.empty_caches(pair.program) for _ in range(pair.lanes)]
    for i, step in enumerate(pair.calls()):
        wants = expected[i] if pair.lanes > 1 else [expected[i]]
        for call, cache, output in zip(step, caches, wants, strict=True):
            with torch.no_grad():
                got = soft_step(soft, pair.tensors(call), mask.compute[i].float(), cache)
            assert_same(got, leaves(output), bits=False)


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Weights that require no gradient, like a soft graph's: ``aten.linear`` takes its sums in an order that depends on it."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


def _blendable(program: fxmask.Program, mask: fxmask.Mask) -> fxmask.Mask:
    """The mask without forecasts and without blocks that cannot be blended in every bit.

    Integers cannot. A blended view with gaps in memory becomes a tensor without gaps, on which a matrix product may
    take its sums in another order.
    """
    kept = []
    for b, name in enumerate(mask.blocks):
        values = [program.node(value).meta["val"] for value in program.block(name).values]
        if all(x.is_floating_point() and torch.ops.aten.is_non_overlapping_and_dense(x) for x in values):
            kept.append(b)
    return fxmask.Mask(mask.compute[:, kept], mask.timesteps, tuple(mask.blocks[b] for b in kept))


# --- what a plan promises


def check_idempotent(pair: Pair) -> None:
    """The plan of a plan's mask is the plan itself."""
    for start in range(len(pair.mask.order)):
        plan = fxmask.rectify(pair.program, pair.mask, start=start)
        assert fxmask.rectify(pair.program, plan.mask, start=start) == plan


def check_stored_before_loaded(pair: Pair) -> None:
    """Every load reads what an earlier step of the run stored, and nothing is held that no later step reads."""
    for start in range(len(pair.mask.order)):
        plan = fxmask.rectify(pair.program, pair.mask, start=start)
        held: set[Slot] = set()
        for i, step in enumerate(plan.steps[start:], start):
            reads = {slot for load in step.formed for slot in load.slots}
            assert reads <= held
            computed = {slot for slot in reads if slot.block != INPUT}
            assert all(slot.block in plan.steps[slot.step].compute and slot.step < i for slot in computed)
            assert {block for block, _ in step.store} - {INPUT} <= step.compute
            assert set(step.store) <= set(step.live_out)
            held |= {Slot(block, value, i) for block, value in step.store}
            assert set(step.drop) <= held
            held -= set(step.drop)
            later = {slot for other in plan.steps[i + 1 :] for load in other.formed for slot in load.slots}
            assert held == {slot for slot in later if slot.step <= i}
        assert not held


def check_computed_is_read(pair: Pair) -> None:
    """Every block that a step computes reaches an output of that step, or a value that a later step reads."""
    plan = fxmask.rectify(pair.program, pair.mask)
    for i, step in enumerate(plan.steps):
        loaded = {pair.program.block(load.block).values[load.value] for load in step.load}
        stored = {pair.program.block(block).values[value] for block, value in step.store}
        assert {name for b, name in enumerate(plan.mask.blocks) if plan.mask.by_call.compute[i, b]} == step.compute
        for name in step.compute:
            values = [pair.program.node(value) for value in pair.program.block(name).values]
            assert any(_is_read(value, loaded, stored) for value in values), (i, name)


def _is_read(node: fx.Node, loaded: set[str], stored: set[str]) -> bool:
    """Follow the readers of a value until an output or a stored value; what is loaded is not computed from anything."""
    seen, todo = {node}, [node]
    while todo:
        value = todo.pop()
        if value.op == "output" or value.name in stored:
            return True
        fresh = [user for user in value.users if user not in seen and user.name not in loaded]
        seen.update(fresh)
        todo += fresh
    return False


def check_few_graphs(pair: Pair) -> None:
    """No more graphs than distinct (compute, load, store), and each graph holds exactly the MACs that its steps claim."""
    plan = fxmask.rectify(pair.program, pair.mask)
    rows = {(step.compute, step.load, step.blend, step.store) for step in plan.steps}
    assert plan.distinct_graphs <= len(rows)
    weights = {node.name: count_macs(node) for node in pair.program.graph_module.graph.nodes}
    graphs = specialize(pair.program, plan)
    assert len(graphs) == plan.distinct_graphs
    for graph in graphs:
        macs = sum(weights.get(node.name, 0) for node in graph.graph_module.graph.nodes)
        assert {plan.steps[i].macs for i in graph.steps} == {macs}
    assert sorted(i for graph in graphs for i in graph.steps) == list(range(len(pair.mask.order)))


class Meter(dict[Slot, torch.Tensor]):
    """A cache that knows the largest number of bytes that it ever kept alive."""

    peak = 0

    def __setitem__(self, slot: Slot, tensor: torch.Tensor) -> None:
        super().__setitem__(slot, tensor)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.values()}
        assert len(storages) == len(self), "two cached values share memory"
        self.peak = max(self.peak, sum(storages.values()))


def check_peak_bytes(pair: Pair) -> None:
    """The plan's peak is what a real run holds at most, storages counted and not shapes; at the end nothing is held."""
    plan = fxmask.rectify(pair.program, pair.mask)
    executor = Executor(plan, GraphStore(pair.program, "eager"))
    cache = Meter()
    for row, number, call in pair.turns():
        with torch.no_grad():
            if not number:
                executor.run_step(row, pair.tensors(call), cache)
    assert cache.peak == plan.peak_cache_bytes
    assert not cache


CHECKS: tuple[Callable[[Pair], None], ...] = (
    check_all_ones,
    check_specialised,
    check_rectified,
    check_starting_in_the_middle,
    check_resuming_run,
    check_no_aliases,
    check_soft_is_hard,
    check_idempotent,
    check_stored_before_loaded,
    check_computed_is_read,
    check_few_graphs,
    check_peak_bytes,
)


@examples(40)
@given(choices())
def test_all_ones_is_the_model(choice: Choice) -> None:
    holds(check_all_ones, choice)


@examples(200)
@given(choices())
def test_specialised_is_the_reference(choice: Choice) -> None:
    holds(check_specialised, choice)


@examples(100)
@given(choices())
def test_step_graphs_in_parts(choice: Choice) -> None:
    holds(check_in_parts, choice)


@examples(60)
@given(choices())
def test_replayed_is_the_reference(choice: Choice) -> None:
    holds(check_replayed, choice)


@examples(60)
@given(choices())
def test_rectified_is_unrectified(choice: Choice) -> None:
    holds(check_rectified, choice)


@examples(30)
@given(choices(steps=5))
def test_starting_in_the_middle(choice: Choice) -> None:
    holds(check_starting_in_the_middle, choice)


@examples(30)
@given(choices(steps=5))
def test_resuming_an_accelerated_run(choice: Choice) -> None:
    holds(check_resuming_run, choice)


@examples(60)
@given(choices())
def test_nothing_aliases_a_cache(choice: Choice) -> None:
    holds(check_no_aliases, choice)


@examples(60)
@given(choices(cuts=("branches", "branches", "any"), forecasts=(False,)))
def test_soft_graph_at_zero_and_one_is_hard(choice: Choice) -> None:
    holds(check_soft_is_hard, choice)


@examples(60)
@given(choices())
def test_rectify_is_idempotent(choice: Choice) -> None:
    holds(check_idempotent, choice)


@pytest.mark.parametrize(("rows", "start"), [([[1, 1], [1, 0]], 0), ([[1, 1], [1, 0], [1, 1]], 1)])
def test_the_plan_of_a_plans_mask_is_the_plan(rows: list[list[int]], start: int) -> None:
    pair = chain_pair(2, len(rows))
    plan = fxmask.rectify(pair.program, replace(pair.mask, compute=torch.tensor(rows)), start=start)
    assert fxmask.rectify(pair.program, plan.mask, start=start) == plan


@examples(100)
@given(choices())
def test_nothing_is_loaded_before_it_is_stored(choice: Choice) -> None:
    holds(check_stored_before_loaded, choice)


@examples(100)
@given(choices())
def test_every_computed_block_has_a_reader(choice: Choice) -> None:
    holds(check_computed_is_read, choice)


@examples(60)
@given(choices())
def test_distinct_graphs_are_few_and_hold_what_they_claim(choice: Choice) -> None:
    holds(check_few_graphs, choice)


@examples(60)
@given(choices())
def test_peak_bytes_are_what_a_run_holds(choice: Choice) -> None:
    holds(check_peak_bytes, choice)


class MixedPrecision(torch.nn.Module):
    """A 0-d float32 value and a float64 one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(3, 3).double()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.tanh(sample.mean())
        return torch.tanh(self.wide(sample.double())).to(sample.dtype) * scale, scale


def test_a_forecast_keeps_the_type_of_every_value() -> None:
    pair = small_pair(MixedPrecision(), [[0], [1]], 2)
    forecast = fxmask.Forecast({(1, "0"): ((0, 0.643),), (1, "1"): ((0, 0.643),)})
    mask = replace(pair.mask, compute=torch.tensor([[1, 1], [0, 0]]), forecast=forecast)
    check_specialised(replace(pair, mask=mask))


@pytest.mark.parametrize("choice", KEPT, ids=str)
def test_kept_pairs(choice: Choice) -> None:
    for check in CHECKS:
        holds(check, choice)


MASKS = 5  # per fresh denoiser: capturing one takes longer than trying a mask


@pytest.mark.slow
@examples(2000 // MASKS, explore=True)
@given(fresh_choices())
def test_every_property_on_fresh_denoisers(choice: Choice) -> None:
    for k in range(MASKS):
        for check in CHECKS:
            holds(check, replace(choice, mask=choice.mask + k))


# --- every mask of some small denoisers

# The timestep enters every block: one whose inputs are all loaded would compute what is already stored, a redundancy that
# is not a matter of liveness.


class Chain(torch.nn.Module):
    """Blocks in a row; the value of each is the whole stream."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(blocks))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = sample
        for layer in self.layers:
            x = torch.tanh(layer(x) + timestep.reshape(-1, 1) / 1000)
        return x


class SkipNet(torch.nn.Module):
    """Two levels down, two up, and the first level read again by the last: a U-Net's skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(n, 3) for n in (3, 3, 3, 6))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = timestep.reshape(-1, 1) / 1000
        first = torch.tanh(self.layers[0](sample))
        second = torch.tanh(self.layers[1](first) + time)
        third = torch.tanh(self.layers[2](second) + time)
        return torch.tanh(self.layers[3](torch.cat([third, first], -1)) + time)


class Nested(torch.nn.Module):
    """A branch within a branch, and a value that both the stream and another branch read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(self.layers[0](sample))
        outer = torch.tanh(self.layers[1](inner) + inner + timestep.reshape(-1, 1) / 1000)
        return sample + outer * torch.tanh(self.layers[2](sample)) + inner


def small_pair(model: torch.nn.Module, groups: Sequence[Sequence[int]], steps: int) -> Pair:
    """A pair on a small model whose blocks cut the tanh values at the given positions, with a mask of ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    samples = torch.randn(steps, 2, 3, generator=generator)

    def make_calls(count: int, lanes: int = 1) -> list[list[dict[str, Any]]]:
        return [[{"sample": samples[i].clone(), "timestep": torch.tensor(900 - 100 * i)}] for i in range(count)]

    made = Denoiser("", model.eval(), make_calls, {}, lanes=False)
    values = [node.name for node in made.program.graph_module.graph.nodes if node.target is torch.ops.aten.tanh.default]
    blocks = [fxmask.Block(str(b), "branch", tuple(values[k] for k in group), 0, 0) for b, group in enumerate(groups)]
    program = replace(made.program, blocks=tuple(blocks))
    return Pair(Choice(0, steps=steps), made, program, fxmask.Mask.ones(program, made.timesteps(steps)))


def chain_pair(blocks: int, steps: int) -> Pair:
    return small_pair(Chain(blocks), [[b] for b in range(blocks)], steps)


def every_row(steps: int, blocks: int) -> Iterator[torch.Tensor]:
    """Every bool ``[T, B]`` whose first row is all ones."""
    for bits in itertools.product([False, True], repeat=(steps - 1) * blocks):
        yield torch.tensor([True] * blocks + list(bits)).reshape(steps, blocks)


def key_of(compute: torch.Tensor) -> bytes:
    return compute.contiguous().numpy().tobytes()


SMALL = {
    "chain of 3, 4 steps": lambda: chain_pair(3, 4),
    "skip connection, 3 steps": lambda: small_pair(SkipNet(), [[0], [1], [2], [3]], 3),
    "nested, 4 steps": lambda: small_pair(Nested(), [[0], [1], [2]], 4),
    "two values to a block, 6 steps": lambda: small_pair(Nested(), [[0], [1, 2]], 6),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_mask_of_a_small_denoiser(name: str) -> None:
    """What a plan keeps is exactly what is needed: no result changes, and turning any one more bit off changes one."""
    pair = SMALL[name]()
    store = GraphStore(pair.program, "eager")  # equal steps of all masks share a graph
    meaning: dict[bytes, torch.Tensor] = {}
    plans: dict[bytes, fxmask.Plan] = {}
    calls = pair.calls()
    for compute in every_row(*pair.mask.compute.shape):
        mask = replace(pair.mask, compute=compute)
        plan = plans[key_of(compute)] = fxmask.rectify(pair.program, mask)
        meaning[key_of(compute)] = torch.stack(fxmask.reference.run(pair.program, mask, calls))
        executor, cache = Executor(plan, store), Meter()
        with torch.no_grad():
            got = torch.stack([executor.run_step(i, pair.tensors(call), cache)[0] for i, (call,) in enumerate(calls)])
        assert torch.equal(got, meaning[key_of(compute)])
        assert cache.peak == plan.peak_cache_bytes
    assert len(plans) == 2 ** (pair.mask.compute.numel() - len(pair.mask.blocks)) >= 256
    for key, plan in plans.items():
        kept = plan.mask.compute
        assert torch.equal(meaning[key_of(kept)], meaning[key])
        for step, block in (kept[1:].nonzero() + torch.tensor([1, 0])).tolist():
            fewer = kept.clone()
            fewer[step, block] = False
            assert not torch.equal(meaning[key_of(fewer)], meaning[key]), (kept, step, block)


# --- the paper's Eq. 12


def equation_12(mask: torch.Tensor, updated: bool) -> torch.Tensor:
    """The paper's rectification (arXiv 2603.19939, Eq. 12): ``m[t, b] = 0 if m[t, b+1] = 0 and m[t+1, b] = 1``.

    ``t + 1`` is the next sampling step. What the equation leaves open, and how it is read here:

    - the last block has no next block: nothing in the step can replace its value, so it is never dropped;
    - the last step has no next step: nobody reads its stores, as if every block were recomputed after it;
    - ``m[t, b+1]`` is the rectified value (blocks go from last to first, so that drops cascade towards the input);
    - ``m[t+1, b]`` is the given mask's, or with ``updated`` the rectified one (steps from last to first, in place).
    """
    steps, blocks = mask.shape
    result = mask.clone()
    following = result if updated else mask
    for t in reversed(range(steps)):
        for b in reversed(range(blocks - 1)):
            recomputed = t + 1 == steps or bool(following[t + 1, b])
            if not result[t, b + 1] and recomputed:
                result[t, b] = False
    return result


def chain_liveness(mask: torch.Tensor) -> torch.Tensor:
    """Exact rectification of a chain: a block is needed iff the next one computes before it is itself computed again.

    Eq. 12 is the case in which it is computed again at the very next step.
    """
    steps, blocks = mask.shape
    result = mask.clone()
    for b in reversed(range(blocks - 1)):
        for t in range(steps):
            again = next((u for u in range(t + 1, steps) if mask[u, b]), steps)
            result[t, b] = mask[t, b] and bool(result[t:again, b + 1].any())
    return result


def rectified_rows(pair: Pair, compute: torch.Tensor) -> torch.Tensor:
    mask = replace(pair.mask, compute=compute, timesteps=pair.mask.timesteps[: len(compute)])
    return fxmask.rectify(pair.program, mask).mask.compute


def test_equation_12_on_chains() -> None:
    """On a chain that caches its stream, all masks of 3 blocks and 4 steps:

    - Eq. 12 never drops what liveness keeps, in either reading;
    - liveness is the closed form above;
    - the two are equal wherever the mask has one load per step at most, and ``m[t+1, b]`` is the given mask's.
    """
    pair = chain_pair(3, 4)
    single = 0
    for compute in every_row(4, 3):
        kept = rectified_rows(pair, compute)
        assert torch.equal(kept, chain_liveness(compute))
        for updated in (False, True):
            assert not (kept & ~equation_12(compute, updated)).any()
        if ((~compute).sum(1) <= 1).all():
            single += 1
            assert torch.equal(kept, equation_12(compute, updated=False))
    assert single == 4**3


@examples(60)
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 2**20))
def test_equation_12_on_long_chains(blocks: int, steps: int, seed: int) -> None:
    rng = random.Random(seed)
    pair = long_chain(blocks)
    compute = random_rows(steps, blocks, rng)
    assert torch.equal(rectified_rows(pair, compute), chain_liveness(compute))
    single = torch.ones(steps, blocks, dtype=torch.bool)
    for t in range(1, steps):
        single[t, rng.randrange(blocks)] = rng.random() < 0.2
    assert torch.equal(rectified_rows(pair, single), equation_12(single, updated=False))


@functools.cache
def long_chain(blocks: int) -> Pair:
    return chain_pair(blocks, 8)


@pytest.mark.parametrize(
    ("compute", "updated"),
    [
        # Block 1 loads at steps 1 and 2, so nobody reads block 0 of step 1. It is not recomputed at step 2, so it stays.
        ([[1, 1], [1, 0], [0, 0]], False),
        # Block 0 is dropped at step 2. Read in place, it now seems to be needed at step 1.
        ([[1, 1], [1, 0], [1, 0]], True),
    ],
)
def test_equation_12_keeps_dead_computes(compute: list[list[int]], updated: bool) -> None:
    rows = torch.tensor(compute, dtype=torch.bool)
    assert rectified_rows(chain_pair(2, 3), rows).sum() < equation_12(rows, updated).sum()


def test_equation_12_changes_the_result_where_there_are_skips() -> None:
    """The last block of a U-Net reads the first one: that the second loads does not make the first one dead."""
    pair = SMALL["skip connection, 3 steps"]()
    rows = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    wrong = equation_12(rows, updated=False)
    assert (rows & ~wrong).nonzero().tolist() == [[1, 0]]
    assert torch.equal(rectified_rows(pair, rows), rows)
    expected = run_reference(pair, replace(pair.mask, compute=rows))
    got = run_reference(pair, replace(pair.mask, compute=wrong))
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True, False, True]


# --- gradients of the scores


@examples(12)
@given(st.integers(0, 11), st.integers(0, 2**20), st.sampled_from(["branches", "any"]))
def test_gradients_of_the_scores_are_finite_differences(seed: int, mask: int, cuts: str) -> None:
    def check(pair: Pair) -> None:
        blocks = [pair.program.block(name) for name in _blendable(pair.program, pair.mask).blocks]
        soft = insert_soft_mask(pair.program, blocks)
        generator = torch.Generator().manual_seed(mask)
        caches = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in soft.empty_caches(pair.program)]
        scores = torch.rand(len(blocks), generator=generator, dtype=torch.float64).requires_grad_()
        tensors = pair.tensors(pair.calls()[0][0])

        def outputs(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(x for x in soft.graph_module(*tensors, values, *caches) if x.requires_grad)

        assert not blocks or torch.autograd.gradcheck(outputs, (scores,))

    holds(check, Choice(seed, mask, statements=4, steps=2, blocks=4, cuts=cuts, forecasts=False, smooth=True))
