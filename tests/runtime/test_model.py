"""The runtime: a drop-in that is never stale."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, labels, make_calls, tiny_unet

import fxmask
from fxmask.ir.forecast import Slot


def accelerate(program: fxmask.Program, timesteps: tuple[float, ...] = TIMESTEPS) -> fxmask.AcceleratedModel:
    return fxmask.compile(program, fxmask.rectify(program, every_other(program, timesteps)), backend="eager")


def expect(program: fxmask.Program, calls: list, mask: fxmask.Mask | None = None) -> list:
    return fxmask.reference.run(program, mask or every_other(program), calls)


def same(got: list, expected: list) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_caching_changes_the_result_at_all(tiny):
    """Guards the other tests: a runtime that never cached would pass many of them."""
    calls = make_calls()
    full = [tiny.model(**call) for call in calls]
    cached = expect(tiny, calls)
    assert [torch.equal(a, b) for a, b in zip(full, cached, strict=True)] == [True, False, True, False, True]


def test_marked_generation_equals_reference(tiny):
    accelerated, calls = accelerate(tiny), make_calls()
    with accelerated.generation():
        got = [accelerated(**call) for call in calls]
    assert same(got, expect(tiny, calls))


def test_same_generation_twice(tiny):
    accelerated = accelerate(tiny)
    for seed in (0, 1):
        calls = make_calls(seed=seed)
        assert same([accelerated(**call) for call in calls], expect(tiny, calls))
        assert same([accelerated(**call) for call in calls], expect(tiny, calls))


def test_interrupted_generation_then_a_new_one(tiny):
    accelerated = accelerate(tiny)
    for call in make_calls(seed=1)[:3]:
        accelerated(**call)
    calls = make_calls(seed=2)
    assert same([accelerated(**call) for call in calls], expect(tiny, calls))


def test_run_that_starts_in_the_middle(tiny):
    accelerated, calls = accelerate(tiny), make_calls()
    late = fxmask.reference.run(tiny, every_other(tiny).starting_at(1), calls)[1:]
    for context in (accelerated.generation, accelerated.generation):
        with context():
            assert same([accelerated(**call) for call in calls[1:]], late)
    assert same([accelerated(**call) for call in calls[1:]], late)
    assert same([accelerated(**call) for call in calls], expect(tiny, calls)), "and a full run after it"


def test_repeated_timesteps(tiny):
    """Second-order solvers call twice at one timestep."""
    timesteps = (900.0, 700.0, 700.0, 500.0, 500.0)
    calls = make_calls(timesteps=timesteps)
    mask = every_other(tiny, timesteps)
    accelerated = accelerate(tiny, timesteps)
    expected = fxmask.reference.run(tiny, mask, calls)
    for _ in range(2):
        assert same([accelerated(**call) for call in calls], expected)
    with accelerated.generation():
        assert same([accelerated(**call) for call in calls], expected)


def test_other_number_of_steps_runs_in_full(tiny):
    accelerated = accelerate(tiny)
    calls = make_calls(timesteps=(900, 800, 700, 600, 500, 400, 300, 200, 100, 0))
    with pytest.warns(UserWarning, match="nothing was accelerated"):
        assert same([accelerated(**call) for call in calls], [tiny.model(**call) for call in calls])


def test_a_useless_generation_warns(tiny):
    accelerated = accelerate(tiny)
    calls = make_calls(timesteps=(901, 801, 701))
    with pytest.warns(UserWarning, match="nothing was accelerated"), accelerated.generation():
        for call in calls:
            accelerated(**call)
    accelerated = accelerate(tiny)
    with pytest.warns(UserWarning, match=r"made for 5 steps at timesteps \[900, .* and a call came at 901"):
        for call in calls * 2:
            accelerated(**call)


def test_two_generations_interleaved_in_one_thread(tiny):
    accelerated = accelerate(tiny)
    calls = [make_calls(seed=seed) for seed in (0, 1)]
    runs = [accelerated.generation() for _ in calls]
    got: list[list[torch.Tensor]] = [[], []]
    for i in range(len(TIMESTEPS)):
        for k, run in enumerate(runs):
            with run:
                got[k].append(accelerated(**calls[k][i]))
    assert all(same(g, expect(tiny, c)) for g, c in zip(got, calls, strict=True))


@pytest.mark.parametrize("timesteps", [TIMESTEPS, (900.0, 700.0, 700.0, 500.0, 500.0)])
def test_lanes_that_nothing_tells_apart_in_a_marked_generation(tiny, timesteps):
    """Two calls per step without conditioning: each has caches of its own, by turns."""
    accelerated = accelerate(tiny, timesteps)
    steps = list(zip(make_calls(seed=0, timesteps=timesteps), make_calls(seed=1, timesteps=timesteps), strict=True))
    expected = fxmask.reference.run(tiny, every_other(tiny, timesteps), steps)
    for _ in range(2):
        with accelerated.generation():
            got = [accelerated(**call) for step in steps for call in step]
        assert same(got, [x for step in expected for x in step])


def test_unmarked_interleaving_is_never_stale(tiny):
    """Two runs that nothing tells apart, step by step: every call runs in full."""
    accelerated = accelerate(tiny)
    calls = [make_calls(seed=seed) for seed in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(len(TIMESTEPS)):
            for lane in calls:
                assert torch.equal(accelerated(**lane[i]), tiny.model(**lane[i]))
        again = [accelerated(**call) for call in calls[0]]
    assert same(again, expect(tiny, calls[0])), "a clear run after it is accelerated"


def test_two_threads(tiny):
    accelerated = accelerate(tiny)
    failures = []
    barrier = threading.Barrier(2)

    def work(seed: int, marked: bool) -> None:
        calls = make_calls(seed=seed)
        expected = expect(tiny, calls)
        for _ in range(5):
            got = []
            with accelerated.generation() if marked else torch.no_grad():
                for call in calls:
                    barrier.wait()
                    got.append(accelerated(**call))
            if not same(got, expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(k, bool(k))) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_a_copied_context_is_another_run(tiny, kind):
    """Web servers copy contexts into worker threads, and asyncio tasks inherit them."""
    import asyncio
    import contextvars

    accelerated = accelerate(tiny)
    accelerated(**make_calls()[0])  # a run is under way in the context that is copied
    calls = [make_calls(seed=seed) for seed in (0, 1)]
    got: list[list[torch.Tensor]] = [[], []]
    order = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (0, 3), (1, 2), (0, 4), (1, 3), (1, 4)]

    if kind == "threads":
        from concurrent.futures import ThreadPoolExecutor

        pools = [ThreadPoolExecutor(1) for _ in calls]
        contexts = [contextvars.copy_context() for _ in calls]
        for run, step in order:
            got[run].append(pools[run].submit(contexts[run].run, lambda c: accelerated(**c), calls[run][step]).result())
        for pool in pools:
            pool.shutdown()
    else:

        async def work(run: int, turns: asyncio.Queue[int], done: asyncio.Event) -> None:
            for call in calls[run]:
                await turns.get()
                got[run].append(accelerated(**call))
                done.set()

        async def serve() -> None:
            queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in calls]
            done = asyncio.Event()
            tasks = [asyncio.create_task(work(run, queues[run], done)) for run in range(2)]
            for run, step in order:
                done.clear()
                queues[run].put_nowait(step)
                await done.wait()
            await asyncio.gather(*tasks)

        asyncio.run(serve())
    for ours, theirs in zip(got, calls, strict=True):
        assert same(ours, expect(tiny, theirs))


def test_an_exception_inside_a_step(tiny):
    accelerated, calls = accelerate(tiny), make_calls()
    for call in calls[:2]:
        accelerated(**call)
    with pytest.raises(RuntimeError):
        accelerated(x=torch.randn(2, 6, 5), t=torch.tensor(500))
    assert same([accelerated(**call) for call in calls], expect(tiny, calls))


def test_failing_step_leaves_no_trace(tiny, monkeypatch):
    accelerated, calls = accelerate(tiny), make_calls()
    with accelerated.generation() as run:
        for call in calls[:3]:
            accelerated(**call)
        executor = accelerated.executor
        monkeypatch.setattr(executor, "run_step", lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            accelerated(**calls[3])
        monkeypatch.undo()
        # step 3 loads; retried, its caches are no longer trusted, so it computes
        assert torch.equal(accelerated(**calls[3]), tiny.model(**calls[3]))
        assert run.calls == 5
    with accelerated.generation():
        for call in calls[:2]:
            accelerated(**call)
        monkeypatch.setattr(executor, "run_step", lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            accelerated(**calls[2])
        monkeypatch.undo()
        # step 3 would load what the failed step did not store
        assert torch.equal(accelerated(**calls[3]), tiny.model(**calls[3]))
        accelerated(**calls[4])


def test_batch_size_changes_between_runs(tiny):
    accelerated = accelerate(tiny)
    for batch in (1, 3, 2, 64):
        calls = make_calls(batch=batch, seed=batch)
        program = fxmask.capture(tiny.model, calls[0])
        expected = fxmask.reference.run(program, fxmask.policies.interval(2)(program, TIMESTEPS), calls)
        assert same([accelerated(**call) for call in calls], expected)


def test_dtype_changes_between_runs():
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    accelerated = accelerate(program)
    [accelerated(**call) for call in make_calls()]
    accelerated.double()
    calls = [{"x": c["x"].double(), "t": c["t"]} for c in make_calls()]
    got = [accelerated(**call) for call in calls]
    assert got[0].dtype == torch.float64
    again = fxmask.capture(model, calls[0])
    assert same(got, fxmask.reference.run(again, fxmask.policies.interval(2)(again, TIMESTEPS), calls))


@pytest.mark.parametrize("form", [int, float, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor([t, t])])
def test_timestep_forms_and_positional_arguments(tiny, form):
    accelerated = accelerate(tiny)
    calls = make_calls()
    got = [accelerated(call["x"], form(int(call["t"]))) for call in calls]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expect(tiny, calls), strict=True))
    plain = [tiny.model(**call) for call in calls]
    assert not torch.allclose(got[1], plain[1], atol=1e-6), "it was accelerated"


def test_samples_at_different_timesteps_run_in_full(tiny):
    accelerated = accelerate(tiny)
    x, t = torch.randn(2, 6, 4), torch.tensor([900, 700])
    assert torch.equal(accelerated(x, t), tiny.model(x, t))


def test_weights_changed_in_place_are_seen():
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    accelerated, calls = accelerate(program), make_calls()
    [accelerated(**call) for call in calls]
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(0.1)
    again = fxmask.capture(model, calls[0])
    expected = fxmask.reference.run(again, fxmask.policies.interval(2)(again, TIMESTEPS), calls)
    assert same([accelerated(**call) for call in calls], expected)


def test_replaced_module_is_captured_again():
    """LoRA libraries replace layers after compilation."""

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.low = torch.nn.Linear(base.in_features, base.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.low(x)

    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    accelerated, calls = accelerate(program), make_calls()
    [accelerated(**call) for call in calls]
    for call in calls[:2]:
        accelerated(**call)  # a run that is abandoned must not hide the change
    model.layers[0].mlp[0] = Adapter(model.layers[0].mlp[0])
    got = [accelerated(**call) for call in calls]
    assert torch.equal(got[0], model(**calls[0]))
    assert torch.equal(got[2], model(**calls[2]))


def test_outputs_and_caches_do_not_alias(tiny):
    """A caller may write to what it was given, also where the whole output is held."""
    names = [b.name for b in tiny.blocks]
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[1::2, names.index("output")] = False
    mask = fxmask.Mask(rows, TIMESTEPS, names)
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="eager")
    calls = make_calls()
    expected = fxmask.reference.run(tiny, mask, calls)
    assert torch.equal(expected[0], expected[1])
    got = []
    for call in calls:
        sample = call["x"].clone()
        result = accelerated(x=sample, t=call["t"])
        got.append(result.clone())
        result.fill_(float("nan"))
        sample.fill_(float("nan"))
    assert same(got, expected)


def test_a_new_run_holds_nothing_of_the_abandoned_one(tiny):
    accelerated, calls = accelerate(tiny), make_calls()
    with accelerated.generation() as run:
        accelerated(**calls[0])
        accelerated(**calls[2])
        assert {slot.step for lane in run._lanes for slot in lane.cache} == {2}
        accelerated(**calls[3])


def test_cache_holds_what_the_plan_says(tiny):
    accelerated, calls = accelerate(tiny), make_calls()
    peak = 0
    with accelerated.generation() as run:
        for call in calls:
            accelerated(**call)
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for lane in run._lanes for t in lane.cache.values()
            }
            peak = max(peak, sum(storages.values()))
    assert peak == accelerated.plan.peak_cache_bytes
    assert all(not lane.cache for lane in run._lanes), "nothing is kept after the last reader"
    assert Slot("a", 0, 1) == Slot("a", 0, 1)


def test_conditional_and_unconditional_calls(dit_trajectory, dit_program):
    """Separate calls per step are told apart by their conditioning, with and without a marked generation."""
    _, trajectory = dit_trajectory
    mask = fxmask.policies.interval(2)(dit_program, trajectory.timesteps)
    accelerated = fxmask.compile(dit_program, fxmask.rectify(dit_program, mask), backend="eager")
    null = torch.full((2,), 1000)
    steps = [[dict(call), {**call, "class_labels": null}] for (call,) in trajectory.calls]
    expected = fxmask.reference.run(dit_program, mask, steps)
    for fresh_tensors in (False, True):
        got = []
        for step in steps:
            for call in step:
                call = {**call, "class_labels": call["class_labels"].clone()} if fresh_tensors else call
                got.append(accelerated(**call).sample)
        assert same(got, [result.sample for step in expected for result in step])


def test_lanes_of_abandoned_runs_are_forgotten(dit_trajectory, dit_program):
    """A server that sees a new prompt each time, and cancelled requests, must not fill its memory."""
    _, trajectory = dit_trajectory
    accelerated = accelerate(dit_program, trajectory.timesteps)
    for k in range(100):
        for (call,) in trajectory.calls[: 1 + k % 3]:
            accelerated(**{**call, "class_labels": torch.tensor([k, k + 1])})
    assert len(accelerated._generation()._lanes) <= 70


def test_return_types(unet_trajectory, unet_program):
    model, trajectory = unet_trajectory
    accelerated = accelerate(unet_program, trajectory.timesteps)
    call = dict(trajectory.calls[0][0])
    assert type(accelerated(**call)) is type(model(**call))
    assert isinstance(accelerated(**call, return_dict=False), tuple)
    assert torch.equal(accelerated(**call, return_dict=False)[0], model(**call).sample)


def test_passes_for_the_original(unet_program):
    accelerated = accelerate(unet_program)
    model = unet_program.model
    assert accelerated.config is model.config
    assert accelerated.dtype == model.dtype
    assert accelerated.device == model.device
    assert accelerated.conv_in is model.conv_in
    assert isinstance(accelerated, type(model))
    assert isinstance(accelerated, fxmask.AcceleratedModel)
    assert accelerated.original is model
    assert list(accelerated.state_dict()) == list(model.state_dict())
    assert [n for n, _ in accelerated.named_parameters()] == [n for n, _ in model.named_parameters()]
    accelerated.load_state_dict(model.state_dict())
    with pytest.raises(AttributeError):
        _ = accelerated.no_such_attribute
    assert "fewer MACs" in repr(accelerated)


def test_training_mode_runs_the_original(tiny):
    accelerated = accelerate(tiny)
    try:
        accelerated.train()
        assert tiny.model.training
        x = torch.randn(2, 6, 4, requires_grad=True)
        accelerated(x, torch.tensor(5)).sum().backward()
        assert x.grad is not None
    finally:
        accelerated.eval()
    assert not tiny.model.training
    assert not accelerated.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(tiny, duplicate):
    accelerated, calls = accelerate(tiny), make_calls()
    twin = duplicate(accelerated)
    assert type(twin) is type(accelerated)
    assert twin.original is not tiny.model
    assert twin.mask == accelerated.mask
    assert same([twin(**call) for call in calls], expect(tiny, calls))


def test_a_form_of_call_that_cannot_be_captured_runs_the_original():
    class Picky(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor, mode: str = "plain") -> torch.Tensor:
            y = super().forward(x, t)
            return y if mode == "plain" else y + float(y.mean())

    torch.manual_seed(0)
    model = Picky().eval()
    program = fxmask.capture(model, make_calls()[0])
    accelerated = accelerate(program)
    call = make_calls()[0]
    with pytest.warns(UserWarning, match=r"mode was 'plain', is 'loud', and the model cannot be captured") as caught:
        got = accelerated(**call, mode="loud")
    assert caught[0].filename == __file__
    with torch.no_grad():
        assert torch.equal(got, model(**call, mode="loud"))
    assert torch.equal(accelerated(**call, mode="loud"), got)
    assert accelerated.report().runs[-1].original == 2


def test_unet_at_batch_one_and_sixty_four():
    """diffusers' U-Net has a branch on the batch size."""
    model = tiny_unet()
    call = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(900)}
    accelerated = accelerate(fxmask.capture(model, call))
    for batch in (1, 64):
        x = torch.randn(batch, 1, 8, 8)
        assert torch.equal(accelerated(x, 900).sample, model(x, 900).sample)


def test_report(tiny):
    accelerated = accelerate(tiny)
    data = accelerated.report().to_dict()
    assert {"mac_ratio", "macs_per_step", "distinct_graphs", "peak_cache_bytes", "kept_per_step"} <= set(data)
    assert data["distinct_graphs"] == 2
    assert data["mac_ratio"] == pytest.approx(5 * tiny.macs / sum(data["macs_per_step"]))
    assert "distinct graphs" in str(accelerated.report())


def test_rollout_with_the_accelerated_model(dit_trajectory, dit_program):
    model, trajectory = dit_trajectory
    assert trajectory.stochastic
    assert torch.equal(trajectory.rollout(model), trajectory.final)
    ones = fxmask.Mask.ones(dit_program, trajectory.timesteps)
    accelerated = fxmask.compile(dit_program, fxmask.rectify(dit_program, ones), backend="eager")
    assert torch.equal(trajectory.rollout(accelerated), trajectory.final)
    other = fxmask.record(
        model,
        trajectory.scheduler,
        num_inference_steps=6,
        batch_size=2,
        example_inputs=labels,
        step_kwargs={"eta": 1.0},
        seed=1,
    )
    assert not torch.equal(other.final, trajectory.final)
