"""Lanes with rows of their own in a model in use: named or not, in one batch, and where they are not what the plan expects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emulated_gpu import emulated_gpu
from recorder import Recorder

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager
from fxmask.sampling.split_lanes import SplitLanes, lanes_in_batch, split_lanes

TIMESTEPS = (900.0, 600.0, 300.0, 0.0)
OUTPUT = "output"


class Guided(torch.nn.Module):
    """A denoiser of a sample and a text, exact in float64: every value is a whole number or a short fraction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Linear(4, 4).double() for _ in range(2))
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.copy_(torch.arange(16).reshape(4, 4) % 5 - 2)
                layer.bias.zero_()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden = self.first(sample) + text + timestep.reshape(-1, 1)
        return sample + self.second(hidden.relu())


unaccelerated = pytest.mark.filterwarnings("ignore:(none of|the last denoiser calls)")


def call(step: int, text: float, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + step)
    sample = torch.randint(-3, 4, (rows, 4), generator=generator).double()
    return {"sample": sample, "timestep": torch.tensor(TIMESTEPS[step]), "text": torch.full((rows, 4), text).double()}


TEXTS = (0.0, 1.0)
MASK = torch.tensor([[[1], [1]], [[0], [1]], [[1], [1]], [[0], [0]]], dtype=torch.bool)
# The first lane at step 1 from its own past; at step 3 the second one from the first one's difference.
TERMS = {(1, "a", OUTPUT): ((0, 2.0),), (3, "b", OUTPUT): (((OUTPUT, 2, "a"), 1.0), (2, -1.0))}


@pytest.fixture(scope="module")
def program() -> fxmask.Program:
    found = fxmask.capture(Guided().eval(), call(0, 0.0), {"text": "conditioning"})
    assert OUTPUT in [block.name for block in found.blocks]
    return found


def mask_of(program: fxmask.Program, lanes: Sequence[str] = ("a", "b"), **options: Any) -> fxmask.Mask:
    return fxmask.Mask(MASK, TIMESTEPS, (OUTPUT,), fxmask.Forecast(TERMS), program.fingerprint, lanes=tuple(lanes), **options)


def calls_of_run(seed: int = 0, rows: int = 2) -> list[list[dict[str, torch.Tensor]]]:
    return [[call(step, text, rows, seed) for text in TEXTS] for step in range(4)]


def expected(program: fxmask.Program, seed: int = 0) -> list[list[torch.Tensor]]:
    results: list[list[torch.Tensor]] = fxmask.reference.run(program, mask_of(program), calls_of_run(seed))
    return results


def flat(results: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return [x for step in results for x in step]


def same(got: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Sequence[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(got), flat(wanted), strict=True))


def accelerated_of(program: fxmask.Program, **options: Any) -> Any:
    return fxmask.compile(program, fxmask.rectify(program, mask_of(program, **options)), backend="eager")


def programs_of(accelerated: Any) -> list[int]:
    """Batch sizes of what has been captured."""
    return [variant.program.batch_size for variant in accelerated._fxmask.planned.values()]


def test_what_lanes_read_of_each_other(program: fxmask.Program) -> None:
    """The reference says what the mask means; by hand, for three of the calls."""
    model, calls = program.model, calls_of_run()
    results = expected(program)
    with torch.no_grad():
        full = [[model(**c) for c in step] for step in calls]
    assert torch.equal(results[1][0], 2 * full[0][0])
    assert torch.equal(results[1][1], full[1][1])
    assert torch.equal(results[3][0], full[2][0])
    assert torch.equal(results[3][1], full[2][0] - full[2][1])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("marked", [True, False])
def test_separate_calls(program: fxmask.Program, named: bool, marked: bool) -> None:
    """Lanes are told by their names, or by their turn and the sample that they share; run after run."""
    accelerated = accelerated_of(program)
    for seed in range(3):
        results = []
        with accelerated.generation() if marked else contextlib.nullcontext():
            for step in calls_of_run(seed):
                outputs = []
                for name, c in zip("ab", step, strict=True):
                    with accelerated.cache_context(name) if named else contextlib.nullcontext():
                        outputs.append(accelerated(**c))
                results.append(outputs)
        assert same(results, expected(program, seed))
    assert sum(run.followed for run in accelerated.report().runs[-2:]) == 7


@unaccelerated
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("turns", ["lane by lane", "run by run", "crossed"])
def test_runs_side_by_side_are_not_mixed_up(program: fxmask.Program, named: bool, turns: str) -> None:
    """Two unmarked runs in turn: no call reads the other run's values, whatever is computed for that."""
    accelerated = accelerated_of(program)
    order = {
        "lane by lane": [(0, 0), (1, 0), (0, 1), (1, 1)],
        "run by run": [(0, 0), (0, 1), (1, 0), (1, 1)],
        "crossed": [(1, 0), (0, 0), (0, 1), (1, 1)],
    }[turns]
    one, two = calls_of_run(1), calls_of_run(2)
    with torch.no_grad():
        full = [[[program.model(**c) for c in step] for step in run] for run in (one, two)]
    allowed = [[flat(x) for x in pair] for pair in zip(full, [expected(program, 1), expected(program, 2)], strict=True)]
    for k in range(4):
        for n, lane in order:
            with accelerated.cache_context("ab"[lane]) if named else contextlib.nullcontext():
                got = accelerated(**(one, two)[n][k][lane])
            assert any(torch.equal(got, outputs[2 * k + lane]) for outputs in allowed[n])


@unaccelerated
def test_two_prompts_from_one_noise(program: fxmask.Program) -> None:
    """Unmarked runs of other texts, step by step, in which every lane has the same sample: names keep them apart."""
    accelerated = accelerated_of(program)
    for step in range(4):
        for name, text in (("a", 0.0), ("a", 2.0), ("b", 1.0), ("b", 3.0)):
            given = call(step, text)
            with accelerated.cache_context(name), torch.no_grad():
                got, full = accelerated(**given), program.model(**given)
            if name == "a" and step != 1:  # no source of the first lane is the other one's
                earlier = [program.model(**call(2, x)) for x in (0.0, 2.0)] if step == 3 else []
                assert any(torch.equal(got, x) for x in [full, *earlier[int(text // 2) :][:1]])


@unaccelerated
def test_one_lane_alone_is_right(program: fxmask.Program) -> None:
    """Guidance that is off: the second lane never comes, and all is computed."""
    accelerated = accelerated_of(program)
    with accelerated.generation():
        for step in calls_of_run():
            with torch.no_grad():
                assert torch.equal(accelerated(**step[0]), program.model(**step[0]))


@unaccelerated
def test_lanes_in_another_order_are_right(program: fxmask.Program) -> None:
    """By name the second lane comes first: no run follows the plan, and nothing is read that is not there."""
    accelerated = accelerated_of(program)
    with accelerated.generation():
        for step in calls_of_run():
            for name, c in reversed(list(zip("ab", step, strict=True))):
                with accelerated.cache_context(name), torch.no_grad():
                    assert torch.equal(accelerated(**c), program.model(**c))


def test_starting_in_the_middle(program: fxmask.Program) -> None:
    accelerated = accelerated_of(program)
    late = mask_of(program).starting_at(2)
    wanted = fxmask.reference.run(program, late, calls_of_run())[2:]
    with accelerated.generation():
        got = [[accelerated(**c) for c in step] for step in calls_of_run()[2:]]
    assert same(got, wanted)


def test_a_first_lane_that_comes_midway(program: fxmask.Program) -> None:
    """Guidance that starts at a later step, its lane called before the other one: there its name tells that it belongs."""
    called = torch.tensor([[False, True], [True, True], [True, True], [True, True]])
    compute = torch.tensor([[[0], [1]], [[1], [0]], [[1], [1]], [[0], [0]]], dtype=torch.bool)
    terms = {(1, "b", OUTPUT): ((0, 1.0),), (3, "a", OUTPUT): ((2, 1.0),), (3, "b", OUTPUT): ((2, 2.0),)}
    mask = replace(mask_of(program), compute=compute, called=called, forecast=fxmask.Forecast(terms))
    calls = [[c for c, there in zip(step, row, strict=True) if there] for step, row in zip(calls_of_run(), called, strict=True)]
    wanted = fxmask.reference.run(program, mask, calls)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    for _ in range(2):
        got = []
        for step, row in zip(calls, called, strict=True):
            names = [name for name, there in zip("ab", row, strict=True) if there]
            for name, c in zip(names, step, strict=True):
                with accelerated.cache_context(name):
                    got.append(accelerated(**c))
        assert all(torch.equal(a, b) for a, b in zip(got, flat([wanted[:1], *wanted[1:]]), strict=True))
        assert sum(run.followed for run in accelerated.report().runs[-2:]) == 6


@pytest.mark.parametrize("inference", [True, False])
def test_two_images_in_one_buffer(program: fxmask.Program, inference: bool) -> None:
    """A caller that writes the sample of another image where the last one was does not make its call a lane of that run."""
    accelerated = accelerated_of(program)
    one, two = call(0, 0.0, seed=1), call(0, 1.0, seed=2)
    with torch.inference_mode(inference):
        buffer = one["sample"].clone()
        accelerated(**{**one, "sample": buffer})
        buffer.copy_(two["sample"])
        other = accelerated(**{**two, "sample": buffer})
        assert torch.equal(other, program.model(**two))
    assert not any(run.followed for run in accelerated.report().runs)


def test_a_caller_writes_into_its_sample_between_the_lanes(program: fxmask.Program) -> None:
    """What was there at the call counts: the lanes of a step belong together all the same."""
    accelerated = accelerated_of(program)
    for step in calls_of_run():
        for c in step:
            accelerated(**c)
            c["sample"].fill_(7)
    assert sum(run.followed for run in accelerated.report().runs) == 7


# --- one batch


TURNS = pytest.mark.parametrize("parts", [(), (1, 0)], ids=["in order", "the last part first"])


def whole(step: Sequence[dict[str, torch.Tensor]], parts: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """The batch of a step's calls, in which they are these parts."""
    calls = [step[lane] for lane in np.argsort(parts)] if parts else step
    both = {name: torch.cat([c[name] for c in calls]) for name in ("sample", "text")}
    return {**both, "timestep": step[0]["timestep"]}


def taken_apart(output: torch.Tensor, parts: Sequence[int] = ()) -> list[torch.Tensor]:
    """Of each lane what a batch was answered."""
    chunks = output.chunk(2)
    return [chunks[part] for part in parts or range(2)]


@TURNS
def test_lanes_of_one_batch(program: fxmask.Program, parts: tuple[int, ...]) -> None:
    """Parts come out as if they were called one by one; a step that computes all of them is one call of the whole batch."""
    big = fxmask.capture(program.model, whole(calls_of_run()[0], parts), {"text": "conditioning"})
    accelerated = accelerated_of(big, batched=True, parts=parts)
    for seed in range(2):
        with accelerated.generation():
            got = [taken_apart(accelerated(**whole(step, parts)), parts) for step in calls_of_run(seed)]
        assert same(got, expected(program, seed))
    assert accelerated.plan.whole_steps == {0, 4}
    report = str(accelerated.report())
    assert "lanes a, b with rows of their own" in report
    assert "5/8 calls" in report
    assert accelerated.report().to_dict()["lanes"] == ["a", "b"]
    assert sorted(p.batch_size for p in accelerated.programs) == [2, 4]
    assert accelerated.program.batch_size == 2


@pytest.mark.parametrize("batched", [False, True])
def test_on_an_emulated_gpu(program: fxmask.Program, batched: bool) -> None:
    """Call by call and in one batch: no tensor is left on the CPU, and the values are its."""

    def there(c: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to("cuda") for name, value in c.items()}

    wanted = expected(program)
    with emulated_gpu():
        first = calls_of_run()[0]
        example = there(whole(first) if batched else first[0])
        accelerated = accelerated_of(
            fxmask.capture(Guided().eval().to("cuda"), example, {"text": "conditioning"}), batched=batched
        )
        for _ in range(2):
            got = []
            for step in calls_of_run():
                outputs = [accelerated(**there(c)) for c in ([whole(step)] if batched else step)]
                got.append([x.cpu() for output in outputs for x in output.chunk(2 if batched else 1)])
            assert same(got, wanted)
    assert all(run.followed for run in accelerated.report().runs)


def test_the_whole_batch_is_called_once(program: fxmask.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxmask.runtime.executor import Executor

    big = fxmask.capture(program.model, whole(calls_of_run()[0]), {"text": "conditioning"})
    accelerated = accelerated_of(big, batched=True)
    runs: list[tuple[str, int]] = []
    for name in ("run_step", "run_whole"):
        original = getattr(Executor, name)

        def counting(self: Any, step: int, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            runs.append((_name, step))
            return _original(self, step, *args, **kwargs)

        monkeypatch.setattr(Executor, name, counting)
    with accelerated.generation():
        for step in calls_of_run():
            accelerated(**whole(step))
    assert [x for x in runs if x[0] == "run_whole"] == [("run_whole", 0), ("run_whole", 4)]
    assert [step for name, step in runs if name == "run_step"] == [2, 3, 6, 7]


@TURNS
def test_recorded_steps_of_one_batch(program: fxmask.Program, parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of parts are replayed, those of the whole batch run as they are; both leave their values where the other reads."""
    monkeypatch.setitem(BACKENDS, "recorded", Backend({"": Eager}, exact=True, capturer=Recorder))
    big = fxmask.capture(program.model, whole(calls_of_run()[0], parts), {"text": "conditioning"})
    plan = fxmask.rectify(big, mask_of(big, batched=True, parts=parts))
    accelerated = fxmask.compile(big, plan, backend="recorded")
    for seed in (0, 1, 0):
        with accelerated.generation():
            got = [taken_apart(accelerated(**whole(step, parts)), parts) for step in calls_of_run(seed)]
        assert same(got, expected(program, seed))
    assert accelerated.executor._problem is None


def test_weights_that_change_in_the_middle_of_a_run(program: fxmask.Program) -> None:
    """What steps of the whole batch compute ahead follows them: here a bias of the timestep's own table."""

    class Timed(Guided):
        def __init__(self) -> None:
            super().__init__()
            self.time = torch.nn.Linear(1, 4).double()

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(sample, timestep, text) + self.time(timestep.reshape(-1, 1).double())

    model = Timed().eval()
    big = fxmask.capture(model, whole(calls_of_run()[0]), {"text": "conditioning"})
    accelerated = fxmask.compile(big, fxmask.rectify(big, mask_of(big, batched=True)), backend="inductor", progress=False)
    with accelerated.generation(), torch.no_grad():
        for step in range(3):
            if step == 2:
                model.time.bias.add_(64.0)
            given = whole(calls_of_run()[step])
            got = accelerated(**given)
        torch.testing.assert_close(got, model(**given))


@unaccelerated
def test_a_batch_of_images_is_no_batch_of_lanes(program: fxmask.Program) -> None:
    """Guidance that is off, and two images: their samples differ, so nothing of one is formed from the other's."""
    big = fxmask.capture(program.model, whole(calls_of_run()[0]), {"text": "conditioning"})
    accelerated = accelerated_of(big, batched=True)
    with accelerated.generation(), torch.no_grad():
        for step in range(4):
            images = {**call(step, 1.0, 4), "sample": torch.cat([call(step, 1.0, 2, seed)["sample"] for seed in (5, 6)])}
            assert torch.equal(accelerated(**images), program.model(**images))


@unaccelerated
def test_guidance_that_stops_midway_is_no_batch_of_lanes(program: fxmask.Program) -> None:
    """As many rows as a lane had: its graphs are there, and nothing is captured for half of them amid an image."""
    big = fxmask.capture(program.model, whole(calls_of_run()[0]), {"text": "conditioning"})
    accelerated, runs = accelerated_of(big, batched=True), calls_of_run()
    with torch.no_grad():
        with accelerated.generation():
            accelerated(**whole(runs[0]))
            accelerated(**whole(runs[1]))
            known = programs_of(accelerated)
            assert torch.equal(accelerated(**runs[2][1]), program.model(**runs[2][1])), "nothing of its own to go on from"
            accelerated(**runs[3][1])
        assert programs_of(accelerated) == known
        one = {name: x[::2] if x.dim() else x for name, x in whole(runs[0]).items()}
        with accelerated.generation():  # one image with guidance has as many rows
            assert torch.equal(accelerated(**one), program.model(**one))
            later = {name: x[::2] if x.dim() else x for name, x in whole(runs[1]).items()}
            got = accelerated(**later)
            assert torch.equal(got[:1], 2 * program.model(**one)[:1])
            assert torch.equal(got[1:], program.model(**later)[1:])


@pytest.mark.filterwarnings("ignore:(none of|the last denoiser calls|a gradient|.*transform)")
def test_a_mapped_call_is_right(program: fxmask.Program) -> None:
    big = fxmask.capture(program.model, whole(calls_of_run()[0]), {"text": "conditioning"})
    accelerated, given = accelerated_of(big, batched=True), call(0, 1.0)
    samples = torch.stack([given["sample"], 2 * given["sample"]])

    def predict(model: Any, sample: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(**{**given, "sample": sample})
        return result

    mapped = [torch.func.vmap(lambda x, m=model: predict(m, x))(samples) for model in (accelerated, program.model)]
    assert torch.equal(*mapped)


@unaccelerated
def test_an_odd_batch_runs(program: fxmask.Program) -> None:
    big = fxmask.capture(program.model, whole(calls_of_run()[0]), {"text": "conditioning"})
    accelerated = accelerated_of(big, batched=True)
    with accelerated.generation(), torch.no_grad():
        assert torch.equal(accelerated(**call(0, 1.0, 3)), program.model(**call(0, 1.0, 3)))


@TURNS
def test_a_saved_plan_of_lanes(
    program: fxmask.Program, parts: tuple[int, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    big = fxmask.capture(program.model, whole(calls_of_run()[0], parts), {"text": "conditioning"})
    accelerated = accelerated_of(big, batched=True, parts=parts)
    accelerated.save("plan")
    again = fxmask.load("plan", program.model)
    assert again.plan.mask == accelerated.plan.mask
    assert again.plan.mask.batched
    assert again.plan.mask.parts == parts
    with again.generation():
        got = [taken_apart(again(**whole(step, parts)), parts) for step in calls_of_run()]
    assert same(got, expected(program))


# --- recorded runs


class Run:
    """As much of a recorded run as taking lanes apart asks for: guidance at 3 in one batch, Euler's steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.sample, self.num_steps = model, "sample", 4
        self.start = call(0, 0.0)["sample"]
        self.calls: list[list[dict[str, torch.Tensor]]] = []
        self.outputs: list[list[torch.Tensor]] = []
        loop = self.loop()
        try:
            given = next(loop)
            while True:
                self.calls.append([given])
                with torch.no_grad():
                    self.outputs.append([model(**given)])
                given = loop.send(self.outputs[-1][0])
        except StopIteration as end:
            self.final = end.value

    def loop(self) -> Iterator[Any]:
        x = self.start
        for step in range(4):
            text = torch.cat([torch.full((2, 4), t).double() for t in TEXTS])
            both = yield {"sample": torch.cat([x, x]), "timestep": torch.tensor(TIMESTEPS[step]), "text": text}
            a, b = both.chunk(2)
            x = x - (a + 3 * (b - a)) / 1024
        return x


def test_a_recorded_batch_comes_apart(program: fxmask.Program) -> None:
    run: Any = Run(program.model)
    assert lanes_in_batch(run) == 2
    view = split_lanes(run, program.model)
    assert view is not None
    assert [len(step) for step in view.calls] == [2] * 4
    assert torch.equal(view.rollout(program.model), run.final)
    turned = view.in_order_of((1, 0))
    assert torch.equal(turned.rollout(program.model), run.final)
    assert [[float(c["text"][0, 0]) for c in step] for step in (*view.calls[:1], *turned.calls[:1])] == [[0.0, 1.0], [1.0, 0.0]]
    assert torch.equal(turned.outputs[2][0], view.outputs[2][1])
    assert (view.lanes[0], turned.lanes[0]) == (("0", "1"), ("1", "0"))


def test_masks_tell_parts_apart(program: fxmask.Program) -> None:
    one, other, again = (mask_of(program, batched=True, parts=parts) for parts in ((), (1, 0), (0, 1)))
    assert one == again
    assert one != other
    assert (one.parts, again.part_of_lane, other.part_of_lane) == ((), (0, 1), (1, 0))


def test_what_is_no_batch_of_lanes(program: fxmask.Program) -> None:
    run: Any = Run(program.model)
    for step in run.calls:
        step[0]["text"] = torch.ones(4, 4).double()
    assert lanes_in_batch(run) == 1  # nothing differs between the parts
    run = Run(program.model)
    run.calls[2][0]["sample"] = run.calls[2][0]["sample"] + torch.arange(4).double()[:, None]
    assert lanes_in_batch(run) == 1  # the parts are of different images


def test_a_model_that_looks_across_its_batch_is_left_whole(program: fxmask.Program) -> None:
    class Across(Guided):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(sample, timestep, text) - text.mean()

    model = Across().eval()
    run: Any = Run(model)
    assert lanes_in_batch(run) == 2
    assert split_lanes(run, model) is None
    assert isinstance(split_lanes(Run(program.model), program.model), SplitLanes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": ("a", "a")}, "names are repeated"),
        ({"lanes": ("a",)}, "1 lanes"),
        ({"called": torch.zeros(4, 2)}, "calls no lane"),
        ({"called": torch.ones(3, 2)}, "one entry|an entry"),
        ({"batched": True, "called": torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]])}, "parts of one batch"),
        ({"batched": True, "parts": (0, 0)}, r"parts=\(0, 0\).*which part of a batch"),
        ({"batched": True, "parts": (0, 1, 2)}, "which part of a batch"),
        ({"parts": (1, 0)}, "with batched=True"),
        ({"forecast": fxmask.Forecast({(1, "c", OUTPUT): ((0, 1.0),)})}, "names lane 'c'"),
        ({"forecast": fxmask.Forecast({(1, "a", OUTPUT): (((OUTPUT, 1, "b"), 1.0),)})}, "not an earlier step"),
        ({"forecast": fxmask.Forecast({(3, "b", OUTPUT): (((OUTPUT, 1, "a"), 1.0),)})}, "step 1 of lane 'a'"),
    ],
)
def test_masks_that_mean_nothing(program: fxmask.Program, change: dict[str, Any], message: str) -> None:
    with pytest.raises(fxmask.MaskError, match=message):
        replace(mask_of(program), **change)
