"""Steps that are recorded and replayed. What records is a stand-in without a GPU, which is stricter than CUDA graphs."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, make_calls, tiny_dit
from recorder import Meter, Recorder

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager
from fxmask.runtime.replay import ReplayingExecutor
from fxmask.runtime.static_memory import MOST_RUNS
from fxmask.runtime.variants import Variants


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setitem(BACKENDS, "recorded", Backend({"whole": Eager}, exact=True, capturer=lambda: made))
    return made


@pytest.fixture
def with_table(monkeypatch):
    """The same where values of the timestep are computed for all steps at once."""
    made = Recorder()
    monkeypatch.setitem(BACKENDS, "recorded", Backend({"whole": Eager}, capturer=lambda: made))
    return made


def forecasting(program: fxmask.Program) -> fxmask.Mask:
    """Every branch is computed at the first two steps and the fourth, and extrapolated from two values elsewhere."""
    mask = every_other(program)
    compute = torch.zeros_like(mask.compute)
    compute[[0, 1, 3]] = True
    before = {2: (0, 1), 4: (1, 3)}
    terms = {(i, b): (((a, -0.5), (c, 1.5))) for i, (a, c) in before.items() for b in mask.blocks}
    return fxmask.Mask(compute, mask.timesteps, mask.blocks, fxmask.Forecast(terms))


def accelerated_on(program: fxmask.Program, mask: fxmask.Mask) -> fxmask.AcceleratedModel:
    return fxmask.compile(program, fxmask.rectify(program, mask), backend="recorded")


def run(model, calls):
    with model.generation(), torch.no_grad():
        return [model(**call) for call in calls]


def same(got, expected, exact=True):
    return all(torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("make", [every_other, forecasting])
def test_recordings_are_made_once(tiny, recorder, make):
    mask = make(tiny)
    accelerated = accelerated_on(tiny, mask)
    for seed in (0, 1):
        calls = make_calls(seed=seed)
        assert same(run(accelerated, calls), fxmask.reference.run(tiny, mask, calls))
        if seed == 0:
            recorded = recorder.recorded
    assert recorder.recorded == recorded
    assert recorder.replays == 2 * len(TIMESTEPS)


@pytest.mark.parametrize("make", [every_other, forecasting])
def test_with_a_table(tiny, with_table, make):
    mask = make(tiny)
    accelerated = accelerated_on(tiny, mask)
    for seed in (0, 1):
        calls = make_calls(seed=seed)
        assert same(run(accelerated, calls), fxmask.reference.run(tiny, mask, calls), exact=False)
    assert with_table.replays == 2 * (len(TIMESTEPS) + 1)  # and one when a run begins


def test_results_are_the_callers(tiny, recorder):
    mask = every_other(tiny)
    accelerated = accelerated_on(tiny, mask)
    calls = make_calls()
    expected = fxmask.reference.run(tiny, mask, calls)
    with accelerated.generation():
        for call, want in zip(calls, expected, strict=True):
            got = accelerated(**call)
            assert torch.equal(got, want)
            got.fill_(float("nan"))
            call["x"].fill_(float("nan"))


def test_each_run_in_progress_has_memory_of_its_own(tiny, with_table):
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    runs = [make_calls(seed=seed) for seed in (0, 1)]
    expected = [fxmask.reference.run(tiny, mask, calls) for calls in runs]
    generations = [accelerated.generation() for _ in runs]
    for step in range(len(TIMESTEPS)):
        for generation, calls, want in zip(generations, runs, expected, strict=True):
            with generation:
                assert torch.allclose(accelerated(**calls[step]), want[step], atol=1e-5)
    recorded = with_table.recorded
    for calls, want in zip(runs, expected, strict=True):  # memory was given back when the runs ended
        assert same(run(accelerated, calls), want, exact=False)
    assert with_table.recorded == recorded


def test_plans_that_share_graphs_have_memory_of_their_own(tiny, with_table):
    """As plans of several settings do, one after the other and by turns."""
    masks = [every_other(tiny), forecasting(tiny)]
    model = accelerated_on(tiny, masks[0])
    first = model._fxmask.planned
    other = Variants(tiny, fxmask.rectify(tiny, masks[1]), "recorded", None, relatives=[first])
    assert other.first.graphs is first.first.graphs
    runs = [make_calls(seed=seed) for seed in (0, 1)]
    expected = [[fxmask.reference.run(tiny, mask, calls) for calls in runs] for mask in masks]
    for _ in range(2):
        for variants, wants in zip((first, other), expected, strict=True):
            for calls, want in zip(runs, wants, strict=True):
                with model.generation_of(variants), torch.no_grad():
                    assert same([model(**call) for call in calls], want, exact=False)
    generations = [model.generation_of(variants) for variants in (first, other)]
    for step in range(len(TIMESTEPS)):
        for generation, wants in zip(generations, expected, strict=True):
            with generation, torch.no_grad():
                assert torch.allclose(model(**runs[0][step]), wants[0][step], atol=1e-5)


@pytest.fixture(scope="module")
def dit():
    return fxmask.capture(tiny_dit(), dit_calls(0)[0])


def dit_calls(label, seed=0, batch=2, timesteps=TIMESTEPS):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((batch,), label)
    return [
        {
            "hidden_states": torch.randn(batch, 1, 8, 8, generator=generator),
            "timestep": torch.full((batch,), int(t)),
            "class_labels": labels,
        }
        for t in timesteps
    ]


def sample_of(output):
    return output.sample if hasattr(output, "sample") else output[0]


def test_lanes_of_one_run(dit, with_table):
    """Guidance in two calls per step: each has its conditioning and its caches."""
    mask = every_other(dit)
    accelerated = accelerated_on(dit, mask)
    lanes = [dit_calls(1), dit_calls(2)]
    for _ in range(2):
        with accelerated.generation(), torch.no_grad():
            got = [[sample_of(accelerated(**call)) for call in step] for step in zip(*lanes, strict=True)]
        for k, calls in enumerate(lanes):
            want = [sample_of(x) for x in fxmask.reference.run(dit, mask, calls)]
            assert same([step[k] for step in got], want, exact=False)


def test_another_image_has_its_own_conditioning(dit, with_table):
    mask = every_other(dit)
    accelerated = accelerated_on(dit, mask)
    for label in (1, 2, 3):
        want = [sample_of(x) for x in fxmask.reference.run(dit, mask, dit_calls(label))]
        assert same([sample_of(x) for x in run(accelerated, dit_calls(label))], want, exact=False)
    assert (
        len({key for _, memory in accelerated.executor.graphs.memories._free for key in memory.recorded}) == with_table.recorded
    )


def test_threads(tiny, with_table):
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    runs = [make_calls(seed=seed) for seed in range(4)]
    expected = [fxmask.reference.run(tiny, mask, calls) for calls in runs]
    results = [None] * len(runs)

    def work(k):
        for _ in range(3):
            results[k] = run(accelerated, runs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(runs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(same(got, want, exact=False) for got, want in zip(results, expected, strict=True))


def test_too_many_runs_at_a_time(tiny, with_table, caplog):
    """Those that get no memory run all the same, and say so once."""
    mask = every_other(tiny)
    accelerated = accelerated_on(tiny, mask)
    runs = [make_calls(seed=seed) for seed in range(MOST_RUNS + 2)]
    expected = [fxmask.reference.run(tiny, mask, calls) for calls in runs]
    generations = [accelerated.generation() for _ in runs]
    for step in range(len(TIMESTEPS)):
        for generation, calls, want in zip(generations, runs, expected, strict=True):
            with generation:
                assert torch.allclose(accelerated(**calls[step]), want[step], atol=1e-5)
    assert [r.levelname for r in caplog.records if "runs are in progress" in r.message] == ["WARNING"]


def test_abandoned_runs_give_their_memory_back(tiny, recorder):
    accelerated = accelerated_on(tiny, every_other(tiny))
    for seed in range(2 * MOST_RUNS):
        with accelerated.generation():
            accelerated(**make_calls(seed=seed)[0])
    assert len(accelerated.executor.graphs.memories._free) == 1


def test_what_cannot_be_recorded_runs_as_it_is(tiny, monkeypatch, caplog):
    made = Recorder(fails=True)
    monkeypatch.setitem(BACKENDS, "recorded", Backend({"whole": Eager}, exact=True, capturer=lambda: made))
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    for seed in (0, 1):
        calls = make_calls(seed=seed)
        assert same(run(accelerated, calls), fxmask.reference.run(tiny, mask, calls))
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "out of memory" in said[0].getMessage()


def test_too_little_memory_for_recordings(tiny, recorder, monkeypatch, caplog):
    mask = every_other(tiny)
    accelerated = accelerated_on(tiny, mask)

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ReplayingExecutor, "_memory", full)
    for seed in (0, 1):
        calls = make_calls(seed=seed)
        assert same(run(accelerated, calls), fxmask.reference.run(tiny, mask, calls))
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        "steps run one kernel after the other, not as CUDA graphs: CUDA out of memory"
    ]


def test_a_recording_that_fails_in_the_middle_of_a_run(tiny, with_table):
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    calls = make_calls()
    got = []
    with accelerated.generation():
        for i, call in enumerate(calls):
            with_table.fails = i >= 2
            got.append(accelerated(**call))
    assert same(got, fxmask.reference.run(tiny, mask, calls), exact=False)


def test_while_somebody_else_records(tiny, with_table):
    """A user's own recording takes the kernels themselves; steps before and after are replayed."""
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    calls = make_calls()
    run(accelerated, calls)
    for seed, busy in enumerate(([1], [0, 2], [3, 4]), 1):
        got, calls = [], make_calls(seed=seed)  # other values than those that the buffers hold
        with accelerated.generation():
            for i, call in enumerate(calls):
                with_table.idle = i not in busy
                got.append(accelerated(**call))
        with_table.idle = True
        assert same(got, fxmask.reference.run(tiny, mask, calls), exact=False)


def test_a_timestep_that_is_nearly_the_plans(tiny, with_table):
    """The table has no row for it, so the step is not replayed; later ones read what it stored."""
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    calls = [{**call, "t": call["t"].float()} for call in make_calls()]
    program = accelerated.program
    for off in range(len(TIMESTEPS)):
        shifted = [{**call, "t": call["t"] * (1 + 2e-6 * (i == off))} for i, call in enumerate(calls)]
        replays = with_table.replays
        got = run(accelerated, shifted)
        assert same(got, fxmask.reference.run(program, mask, shifted), exact=False)
        if off == 1:
            assert with_table.replays < replays + len(TIMESTEPS) + 1


def test_weights_changed_in_place_are_seen(with_table):
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    mask = every_other(program)
    accelerated = accelerated_on(program, mask)
    run(accelerated, make_calls())
    recorded = with_table.recorded
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.1)
    assert same(run(accelerated, make_calls()), fxmask.reference.run(program, mask, make_calls()), exact=False)
    assert with_table.recorded == recorded


def test_weights_put_elsewhere_are_recorded_again(with_table):
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    mask = every_other(program)
    accelerated = accelerated_on(program, mask)
    run(accelerated, make_calls())
    recorded = with_table.recorded
    for p in model.parameters():
        p.data = p.data * 1.1
    expected = fxmask.reference.run(program, mask, make_calls())
    assert same(run(accelerated, make_calls()), expected, exact=False)
    assert with_table.recorded > recorded


def test_weights_changed_in_the_middle_of_a_run(with_table):
    """The table is computed anew, into the memory that the run has."""
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    mask = every_other(program)
    plain = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    results = []
    for accelerated in (accelerated_on(program, mask), plain):
        got = []
        with accelerated.generation(), torch.no_grad():
            for i, call in enumerate(make_calls()):
                if i == 2:
                    for p in model.parameters():
                        p.mul_(1.1)
                got.append(accelerated(**call))
        for p in model.parameters():
            p.data.div_(1.1)
        results.append(got)
    assert same(*results, exact=False)


def test_memory_is_the_runs_or_the_models(dit, with_table):
    """Recordings read and write nothing that could be freed or taken by others."""
    accelerated = accelerated_on(dit, forecasting(dit))
    run(accelerated, dit_calls(1))
    ((_, memory),) = accelerated.executor.graphs.memories._free
    table = memory.table
    owned = [*memory.inputs, *memory.once.values(), *table.tensors, *memory.bytes, *memory.outputs.values()]
    owned.append(accelerated.executor.prologues._steps)  # the plan's timesteps, held as long as its graphs
    known = {x.untyped_storage().data_ptr() for x in [*owned, *dit.model.parameters(), *dit.model.buffers()]}
    strangers = [x for place, x in with_table.external.items() if place not in known]
    assert not strangers


def test_traffic_of_a_steady_step(dit, with_table):
    """Copied in are the sample and the step's index, out goes the result; nothing else is launched."""
    accelerated = accelerated_on(dit, forecasting(dit))
    run(accelerated, dit_calls(1))
    calls = dit_calls(1)
    with accelerated.generation(), torch.no_grad():
        for i, call in enumerate(calls):
            meter = Meter(with_table)
            with meter:
                accelerated(**call)
            if i:
                launched = {name: n for name, n in meter.counts.items() if name not in FREE}
                assert launched == {"_foreach_copy_": 2, "clone": 1}


FREE = {"view", "reshape", "expand", "select", "detach", "_local_scalar_dense", "as_strided", "unsqueeze"}


def test_memory_does_not_grow_with_graphs(dit, with_table):
    """Caches take what lives at once, whatever the number of graphs."""
    generator = torch.Generator().manual_seed(0)
    timesteps = tuple(range(950, -1, -50))
    rows = torch.rand(len(timesteps), len(dit.branches), generator=generator) < 0.5
    rows[0] = True
    mask = fxmask.Mask(rows, timesteps, [b.name for b in dit.branches])
    accelerated = accelerated_on(dit, mask)
    run(accelerated, dit_calls(1, timesteps=timesteps))
    ((_, memory),) = accelerated.executor.graphs.memories._free
    assert accelerated.plan.distinct_graphs > 10
    assert sum(memory.layout.sizes) <= 1.05 * accelerated.plan.peak_cache_bytes


def test_compile_all_records(tiny, with_table):
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask).compile_all(progress=False)
    assert with_table.recorded == accelerated.plan.distinct_graphs + 1
    calls = make_calls()
    assert same(run(accelerated, calls), fxmask.reference.run(tiny, mask, calls), exact=False)


def test_inference_mode_and_back(tiny, recorder):
    mask = every_other(tiny)
    accelerated = accelerated_on(tiny, mask)
    calls = make_calls()
    expected = fxmask.reference.run(tiny, mask, calls)
    with torch.inference_mode():
        assert same(run(accelerated, [{k: x.clone() for k, x in call.items()} for call in calls]), expected)
    assert same(run(accelerated, calls), expected)


def test_runs_that_start_in_the_middle(tiny, with_table):
    mask = forecasting(tiny)
    accelerated = accelerated_on(tiny, mask)
    calls = make_calls()
    for start in (0, 2, 1, 3, 0):
        got = run(accelerated, calls[start:])
        assert same(got, fxmask.reference.run(tiny, mask.starting_at(start), calls)[start:], exact=False)
    assert len(accelerated.executor.graphs.memories._free) <= MOST_RUNS


def test_other_shapes(tiny, with_table):
    mask = every_other(tiny)
    accelerated = accelerated_on(tiny, mask)
    for batch in (2, 3, 2):
        calls = make_calls(batch=batch)
        program = fxmask.capture(tiny.model, calls[0])
        assert same(run(accelerated, calls), fxmask.reference.run(program, mask, calls), exact=False)


def test_copies_of_weights_are_brought_up_to_date(tiny, monkeypatch):
    """A recording reads copies of weights that were laid out; no Python of the compiler runs in a replay."""
    events = []

    class Layouts:
        def refresh(self) -> None:
            events.append("refresh")

    class Following(Eager):
        layouts = Layouts()

        def compile(self, graph_module):
            def run(*arguments):
                return graph_module(*arguments)

            run.before = lambda: events.append("before")
            return run

    recorder = Recorder()
    monkeypatch.setitem(BACKENDS, "recorded", Backend({"whole": Following}, exact=True, capturer=lambda: recorder))
    accelerated = accelerated_on(tiny, every_other(tiny))
    for _ in range(2):
        run(accelerated, make_calls())
    assert events == ["refresh", *["before"] * len(TIMESTEPS)] * 2


def test_where_nothing_can_be_recorded(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plan = fxmask.rectify(tiny, every_other(tiny))
    with pytest.raises(fxmask.BackendError, match="NVIDIA GPU"):
        fxmask.compile(tiny, plan, backend="cudagraph")
    assert fxmask.compile(tiny, plan, backend="auto").executor.graphs.capturer is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ["regions", "whole"])
@pytest.mark.parametrize("make", [every_other, forecasting])
def test_on_a_gpu(mode, make):
    torch.manual_seed(0)
    model = TinyTransformer().eval().cuda()
    calls = [{k: v.cuda() for k, v in call.items()} for call in make_calls()]
    program = fxmask.capture(model, calls[0])
    mask = make(program)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), mode=mode, backend="cudagraph")
    expected = fxmask.reference.run(program, mask, calls)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for k in range(4):
        with torch.cuda.stream(streams[k % 2]):
            streams[k % 2].wait_stream(streams[0])
            with accelerated.generation():
                for call, want in zip(calls, expected, strict=True):
                    got = accelerated(**call)
                    assert torch.allclose(got, want, atol=1e-4)
                    got.fill_(float("nan"))
        torch.cuda.synchronize()
    assert accelerated.executor._problem is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_allocations_of_other_threads_while_recording():
    torch.manual_seed(0)
    model = TinyTransformer().eval().cuda()
    calls = [{k: v.cuda() for k, v in call.items()} for call in make_calls()]
    program = fxmask.capture(model, calls[0])
    mask = every_other(program)
    stop = threading.Event()

    def allocate():
        while not stop.is_set():
            torch.empty(int(torch.randint(1, 2**22, ())), device="cuda").fill_(1).sum().item()
            torch.cuda.empty_cache()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(5):
            accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="cudagraph")
            expected = fxmask.reference.run(program, mask, calls)
            with accelerated.generation():
                assert all(torch.allclose(accelerated(**c), w, atol=1e-4) for c, w in zip(calls, expected, strict=True))
            assert accelerated.executor._problem is None
    finally:
        stop.set()
        thread.join()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_on_the_second_gpu():
    torch.manual_seed(0)
    model = TinyTransformer().eval().to("cuda:1")
    calls = [{k: v.to("cuda:1") for k, v in call.items()} for call in make_calls()]
    program = fxmask.capture(model, calls[0])
    mask = every_other(program)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="cudagraph")
    expected = fxmask.reference.run(program, mask, calls)
    with accelerated.generation():
        assert all(torch.allclose(accelerated(**c), w, atol=1e-4) for c, w in zip(calls, expected, strict=True))
