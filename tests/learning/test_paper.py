"""The paper's learner: outcomes are met, budgets are exact, the same seed gives the same mask, ablations differ."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ddim, tiny_unet

import fxmask
from fxmask import OutcomeError
from fxmask.learning.paper import passes as paper
from fxmask.learning.paper.budget import StreamBudget
from fxmask.learning.paper.learner import rollout_error
from fxmask.learning.paper.live_cost import LiveCost
from fxmask.learning.paper.options import PaperOptions
from fxmask.learning.paper.scores import ScoreLearner, _smoothed, _strength, measured_weights, step_weights
from fxmask.learning.paper.start import NEAR, evenly, fixed_schedules
from fxmask.learning.paper.state import State

QUICK = PaperOptions(epochs=3)


@pytest.mark.parametrize("outcome", [{"speedup": 2.0}, {"speedup": 1.3}, {"macs": 0.4}])
def test_outcome_is_met_after_rectification(dit_trajectory, dit_program, outcome):
    _, trajectory = dit_trajectory
    mask = fxmask.learn(dit_program, trajectory, **outcome, learner="paper", options=QUICK)
    plan = fxmask.rectify(dit_program, mask)
    wanted = outcome.get("speedup") or 1 / outcome["macs"]
    assert plan.mac_ratio == pytest.approx(wanted, rel=0.03)
    assert mask.timesteps == trajectory.timesteps
    assert set(mask.blocks) == {b.name for b in dit_program.streams}


def test_branch_blocks_are_an_option(dit_trajectory, dit_program):
    _, trajectory = dit_trajectory
    branches = PaperOptions(epochs=3, blocks="branch")
    mask = fxmask.learn(dit_program, trajectory, speedup=1.5, learner="paper", options=branches)
    assert set(mask.blocks) == {b.name for b in dit_program.branches}
    assert fxmask.rectify(dit_program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)


def test_same_seed_same_mask(dit_trajectory, dit_program):
    _, trajectory = dit_trajectory
    masks = [
        fxmask.learn(dit_program, trajectory, speedup=1.5, seed=seed, learner="paper", options=QUICK) for seed in (0, 0, 1)
    ]
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]


@pytest.mark.parametrize("max_graphs", [2, 3, 4])
def test_max_graphs(unet_trajectory, unet_program, max_graphs):
    _, trajectory = unet_trajectory
    mask = fxmask.learn(unet_program, trajectory, speedup=1.5, max_graphs=max_graphs, learner="paper", options=QUICK)
    plan = fxmask.rectify(unet_program, mask)
    assert plan.distinct_graphs <= max_graphs
    assert plan.mac_ratio == pytest.approx(1.5, rel=0.03)


def test_learning_beats_chance(dit_trajectory, dit_program):
    """The learned mask is better than the mean of random masks of the same cost."""
    _, trajectory = dit_trajectory
    learned = fxmask.learn(dit_program, trajectory, speedup=1.4, learner="paper", options=PaperOptions(epochs=30))
    budget = StreamBudget(dit_program, trajectory.timesteps)
    errors = []
    for seed in range(8):
        rank = torch.rand(learned.compute.shape, generator=torch.Generator().manual_seed(seed))
        rows = budget.project(rank, 1 / 1.4, None, 0)
        errors.append(rollout_error(dit_program, fxmask.Mask(rows, learned.timesteps, learned.blocks), trajectory))
    assert rollout_error(dit_program, learned, trajectory) < sum(errors) / len(errors)


def test_max_error_is_kept(unet_trajectory, unet_program):
    _, trajectory = unet_trajectory
    loose = fxmask.learn(unet_program, trajectory, max_error=0.5, learner="paper", options=QUICK)
    tight = fxmask.learn(unet_program, trajectory, max_error=0.01, learner="paper", options=QUICK)
    assert rollout_error(unet_program, loose, trajectory) <= 0.5
    assert rollout_error(unet_program, tight, trajectory) <= 0.01
    assert fxmask.rectify(unet_program, tight).mac_ratio <= fxmask.rectify(unet_program, loose).mac_ratio


def test_program_of_another_batch_size(dit_trajectory, dit_program):
    model, _ = dit_trajectory
    generator = torch.Generator().manual_seed(0)
    conditioning = {"class_labels": torch.randint(10, (3,), generator=generator)}
    trajectory = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=3, example_inputs=conditioning)
    mask = fxmask.learn(dit_program, trajectory, speedup=1.5, learner="paper", options=QUICK)
    assert fxmask.rectify(dit_program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)


def test_interrupted_learning_keeps_what_it_has(dit_trajectory, dit_program, monkeypatch, caplog):
    _, trajectory = dit_trajectory
    steps = 0
    original = paper.soft_step

    def interrupt(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps > 9:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(paper, "soft_step", interrupt)
    mask = fxmask.learn(dit_program, trajectory, speedup=1.5, learner="paper")
    assert "interrupted" in caplog.text
    assert fxmask.rectify(dit_program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)


def test_step_weights_are_those_of_the_paper():
    """Eq. 9 and 10, on outputs made so that delta / max delta is 1, 0.55, 0.3, 0.05."""
    outputs = [torch.tensor([[0.0, 10.0]])]
    for delta in (0.4, 0.22, 0.12, 0.02):
        outputs.append(outputs[-1] / (1 - delta))  # ||e' - e|| / ||e'|| = delta
    changes = [paper.relative_change(before, now) for before, now in zip([None, *outputs], outputs, strict=False)]
    assert changes == pytest.approx([0.0, 0.4, 0.22, 0.12, 0.02], abs=1e-6)
    assert step_weights(torch.tensor(changes)).tolist() == [1.0, 1.0, 1.0, 1.5, 2.0]


def test_memory_of_a_soft_step_is_one_step():
    """Caches carry no graph from one step to the next."""
    from fxmask.passes.insert_soft_mask import insert_soft_mask

    model = tiny_unet()
    trajectory = fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2)
    program = fxmask.capture(model, trajectory.calls[0][0])
    soft = insert_soft_mask(program, program.streams)
    inputs = tuple(program.signature.bind((), dict(trajectory.calls[0][0])).tensors.values())
    scores = torch.full((len(soft.blocks),), 0.7)
    window = paper._Window(soft, program)
    used = scores.requires_grad_()
    loss, window.caches, student = paper.soft_step(soft, inputs, used, window.caches, trajectory.outputs[0][0], False)
    window.steps.append((0, used, loss))
    window.close(torch.zeros(1, len(scores)), torch.ones(1))
    assert not window.steps
    assert all(not cache.requires_grad for cache in [*window.caches, student])


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_window_is_the_gradient_of_its_losses(dit_trajectory, dit_program, window, weighted):
    """Against one backward pass over all steps, with caches cut where windows begin; weights as each step's penalty has."""
    _, trajectory = dit_trajectory
    options = PaperOptions(fresh=False, window=window)
    lanes = learner_of(dit_program, [trajectory])._lanes(trajectory)
    program, soft = lanes[0]
    rows = torch.rand(6, len(soft.blocks), generator=torch.Generator().manual_seed(1))
    rows[0] = 1
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0, 4.0]) if weighted else None
    for seed in range(window):
        found = paper.run_pass(trajectory, lanes, rows, options, seed, weights).gradient
        used = [row.clone().requires_grad_() for row in rows]
        caches, losses = soft.empty_caches(program), []
        for i in range(6):
            if (i - seed) % window == 0:
                caches = [cache.detach() for cache in caches]
            inputs = tuple(program.signature.bind((), dict(trajectory.calls[i][0])).tensors.values())
            out, *values = soft.graph_module(*inputs, used[i], *caches)
            loss = (out - trajectory.outputs[i][0]).flatten(1).norm(dim=1).mean()
            losses.append(loss if weights is None else loss / weights[i])
            kept = [i == 0 or window > 1 or bool(used[i][b] > 0.5) for b, _ in soft.values]
            caches = [value if new else old for new, value, old in zip(kept, values, caches, strict=True)]
        expected = torch.stack(torch.autograd.grad(torch.stack(losses).sum(), used))
        torch.testing.assert_close(found, expected if weights is None else expected * weights[:, None], rtol=1e-3, atol=1e-6)


def test_a_window_tells_a_score_of_the_steps_that_load_what_it_stores(dit_trajectory, dit_program):
    """Of the steps after a full one that are skipped whole, the full one's scores are told; alone they are not."""
    _, trajectory = dit_trajectory
    lanes = learner_of(dit_program, [trajectory])._lanes(trajectory)
    rows = torch.ones(6, len(dit_program.streams))
    rows[3:] = 0
    alone, ahead = (paper.run_pass(trajectory, lanes, rows, PaperOptions(fresh=False, window=w), 0) for w in (1, 6))
    assert alone.gradient[2].abs().max() < 1e-3 * ahead.gradient[2].abs().max()
    assert ahead.error == pytest.approx(alone.error)


def test_a_window_of_several_lanes(dit_trajectory, dit_program):
    """Two equal lanes say what one does."""
    _, run = dit_trajectory
    both = dataclasses.replace(
        run, calls=tuple((a[0], a[0]) for a in run.calls), outputs=tuple((a[0], a[0]) for a in run.outputs)
    )
    lanes = learner_of(dit_program, [run])._lanes(run)
    rows = torch.rand(6, len(dit_program.streams), generator=torch.Generator().manual_seed(0))
    rows[0] = 1
    options = PaperOptions(fresh=False, window=3)
    one, two = paper.run_pass(run, lanes, rows, options, 1), paper.run_pass(both, lanes * 2, rows, options, 1)
    torch.testing.assert_close(one.gradient, two.gradient)


def test_unreachable_speedup_says_what_is_reachable(dit_trajectory, dit_program):
    _, trajectory = dit_trajectory
    with pytest.raises(OutcomeError, match=r"speedup=1000.*out of reach.*speedup=\d+\.\d+ .*is the most"):
        fxmask.learn(dit_program, trajectory, speedup=1000, learner="paper")


def test_no_branches_is_an_error():
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    model = Plain().eval()
    trajectory = fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2, example_inputs={"x": torch.randn(2, 4)})
    program = fxmask.capture(model, trajectory.calls[0][0])
    with pytest.raises(OutcomeError, match="no residual stream"):
        fxmask.learn(program, trajectory, learner="paper")


ABLATIONS = [
    {"gumbel": True},
    {"sampling": "bernoulli"},
    {"weighted": False},
    {"bimodal": 0.0},
    {"inputs": "student"},
    {"fresh": False},
    {"cost": "live"},
]


def scores_of(program, runs, budget=0.6, seed=0, checkpoint=None, **options):
    learner = learner_of(program, runs, budget, seed, checkpoint, **options)
    return learner.learn(progress=False)


def learner_of(program, runs, budget=0.6, seed=0, checkpoint=None, judge=None, **options):
    kept = StreamBudget(program, runs[0].timesteps).kept
    return ScoreLearner(program, runs, program.streams, kept, budget, PaperOptions(**options), seed, checkpoint, judge)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_ablations_meet_the_outcome_with_another_mask(dit_trajectory, dit_program, ablation):
    _, trajectory = dit_trajectory
    whole = scores_of(dit_program, [trajectory], epochs=4)
    scores = scores_of(dit_program, [trajectory], epochs=4, **ablation)
    assert not torch.equal(whole.values, scores.values)
    mask = fxmask.learn(dit_program, trajectory, speedup=1.5, learner="paper", options=PaperOptions(epochs=3, **ablation))
    assert fxmask.rectify(dit_program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)


def test_every_pass_draws_other_noise(unet_trajectory, unet_program, monkeypatch):
    """The teacher's inputs at the first step of each pass, and of none the recorded one."""
    _, trajectory = unet_trajectory
    firsts = []
    original = paper.soft_step

    def watched(soft, inputs, scores, caches, target, first, blended):
        firsts.extend([inputs[0].clone()] if first else [])
        return original(soft, inputs, scores, caches, target, first, blended)

    monkeypatch.setattr(paper, "soft_step", watched)
    scores_of(unet_program, [trajectory], epochs=3)
    assert len(firsts) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*firsts, trajectory.initial_noise], 2))
    firsts.clear()
    scores_of(unet_program, [trajectory], epochs=2, fresh=False)
    assert all(torch.equal(x, trajectory.initial_noise) for x in firsts)


def test_a_fresh_loop_is_a_run_of_the_sampler(dit_trajectory):
    """Without keeping anything, the same run as a recording from the same seed; other seeds make others."""
    model, trajectory = dit_trajectory
    finals = []
    for seed in (5, 5, 6):
        loop = trajectory.fresh_loop(seed)
        call = next(loop)
        try:
            while True:
                with torch.no_grad():
                    call = loop.send(model(**call).sample)
        except StopIteration as end:
            finals.append(end.value)
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])
    assert torch.equal(finals[0], trajectory.renoised(model, 5).final)


def test_runs_take_turns(dit_trajectory, dit_program, monkeypatch):
    """Conditioning of every recorded run is used."""
    model, trajectory = dit_trajectory
    other = fxmask.record(
        model, ddim(), num_inference_steps=6, batch_size=2, example_inputs={"class_labels": torch.tensor([7, 7])}
    )
    seen = []
    original = paper.soft_step

    def watched(soft, inputs, *rest):
        seen.append(tuple(x.tolist() for x in inputs if x.dtype == torch.int64 and x.dim() == 1 and len(x) == 2))
        return original(soft, inputs, *rest)

    monkeypatch.setattr(paper, "soft_step", watched)
    other = dataclasses.replace(other, timesteps=trajectory.timesteps)
    scores_of(dit_program, [trajectory, other], epochs=2)
    assert any([7, 7] in x for x in seen[6:])
    assert not any([7, 7] in x for x in seen[:6])


def test_a_fixed_strength_leaves_the_speed_up_open(dit_trajectory, dit_program):
    _, trajectory = dit_trajectory

    def ratio(strength: float) -> float:
        options = PaperOptions(epochs=25, strength=strength)
        mask = fxmask.learn(dit_program, trajectory, learner="paper", options=options)
        return fxmask.rectify(dit_program, mask).mac_ratio

    assert ratio(1e-6) < ratio(10.0)
    with pytest.raises(OutcomeError, match=r"strength=0.1\) fixes lambda1.*drop speedup="):
        fxmask.learn(dit_program, trajectory, speedup=2.0, learner="paper", options=PaperOptions(strength=0.1))


def test_learning_stops_when_the_mask_does_not_change(dit_trajectory, dit_program):
    _, trajectory = dit_trajectory
    stopped = scores_of(dit_program, [trajectory], epochs=60, strength=10.0, patience=5)
    assert 20 <= stopped.passes < 60
    assert scores_of(dit_program, [trajectory], epochs=30, strength=10.0, patience=0).passes == 30


@pytest.mark.parametrize(
    "how",
    [{}, {"sampling": "bernoulli"}, {"window": 3, "judged": 2, "judge": lambda rank: float(rank[1:].sum())}],
    ids=["start", "bernoulli", "judged"],
)
def test_a_checkpoint_goes_on_bit_for_bit(dit_trajectory, dit_program, tmp_path, how):
    _, trajectory = dit_trajectory
    options = {"epochs": 6, **how}
    whole = scores_of(dit_program, [trajectory], **options)
    first = learner_of(dit_program, [trajectory], checkpoint=tmp_path / "state", **options)
    for _ in range(3):
        first._one(6)
    again = learner_of(dit_program, [trajectory], checkpoint=tmp_path / "state", **options)
    assert again.state.passes == 3
    assert again.state.lowest == first.state.lowest
    assert torch.equal(again.learn(progress=False).values, whole.values)
    with pytest.raises(fxmask.InputError, match="belongs to another run"):
        learner_of(dit_program, [trajectory], checkpoint=tmp_path / "state", **{**options, "epochs": 7})
    (tmp_path / "state").write_bytes(b"no checkpoint")
    with pytest.raises(fxmask.InputError, match="is damaged"):
        learner_of(dit_program, [trajectory], checkpoint=tmp_path / "state", **options)


def test_the_best_of_the_judged_masks_is_taken(dit_trajectory, dit_program):
    """At the start, every second pass and at the end; the errors are made up."""
    _, trajectory = dit_trajectory
    errors = iter([5.0, 4.0, 1.0, 3.0])
    seen = []

    def judge(rank: torch.Tensor) -> float:
        seen.append(rank)
        return next(errors)

    scores = scores_of(dit_program, [trajectory], epochs=5, judged=2, judge=judge)
    assert len(seen) == 4
    assert torch.equal(scores.rank, seen[2])
    assert not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize("family", ["unet", "dit"])
@pytest.mark.parametrize("budget", [0.4, 0.55, 0.7])
def test_fixed_schedules_are_the_nearest_to_a_budget(family, budget, request):
    """Against all numbers of steps."""
    program = request.getfixturevalue(f"{family}_program")
    kept = StreamBudget(program, tuple(map(float, range(12, 0, -1)))).kept
    names = range(len(program.streams))
    groups = [torch.ones(len(names), dtype=torch.bool), *(torch.tensor([b == c for c in names]) for b in names)]
    found = fixed_schedules(12, groups, kept, budget)
    expected = []
    for group in groups:
        near = min((evenly(12, group, n) for n in range(1, 13)), key=lambda rows: abs(kept(rows) - budget))
        expected += [near] if abs(kept(near) / budget - 1) <= NEAR else []
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool(rows[0].all()) for rows in found)


def test_our_variant_starts_from_a_schedule_and_is_not_worse(unet_trajectory, unet_program):
    """On the recorded run, of the fixed schedules near the asked ratio the best one is where it starts."""
    _, run = unet_trajectory
    starts = []
    original = State.judge

    def watched(state: State, error: float) -> None:
        starts.append((state.scores.clone(), error))
        original(state, error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "judge", watched)
        mask = fxmask.learn(unet_program, run, speedup=1.5, learner="paper", options=PaperOptions.ours(epochs=3))
    budget = StreamBudget(unet_program, run.timesteps)
    single = torch.eye(len(unet_program.streams), dtype=torch.bool)
    schedules = fixed_schedules(run.num_steps, [torch.ones_like(single[0]), *single], budget.kept, 1 / 1.5)
    first = starts[0][0] > 0.5
    assert any(torch.equal(first, rows) for rows in schedules)
    quality = fxmask.metrics.psnr(fxmask.reference.rollout(unet_program, mask, run), run.final).mean()
    assert float(quality) == pytest.approx(-min(error for _, error in starts), abs=1e-4)


def test_lambda1_follows_the_cost_and_where_it_is_going():
    worth, share = torch.rand(4, 3), torch.full((3,), 0.3, dtype=torch.float64)

    def after(kept: float, before: float) -> float:
        return _strength(1.0, worth, share, kept, before, budget=0.5)

    assert after(0.6, 0.6) > 1 > after(0.4, 0.4)
    assert after(0.5, 0.5) == 1
    assert after(0.6, 0.7) < 1 < after(0.4, 0.3)


def test_checkpoints_of_before_belong_to_the_same_options():
    """Options that are newer count only where they are used."""
    old = (
        "PaperOptions(epochs=None, learning_rate=0.1, bimodal=0.5, weighted=True, sampling='start', gumbel=False, "
        "blocks='stream', inputs='teacher', fresh=True, cost='sum', measured=False, strength=None, patience=10, on_scores=None)"
    )
    assert PaperOptions().identity == old
    identities = {PaperOptions(**given).identity for given in ({}, {"window": 2}, {"judged": 3}, {"start": "schedule"})}
    assert len(identities) == 4


def test_bytes_of_caches_are_kept(unet_trajectory, unet_program):
    _, trajectory = unet_trajectory
    free = fxmask.rectify(
        unet_program, fxmask.learn(unet_program, trajectory, speedup=1.2, learner="paper", options=QUICK)
    ).peak_cache_bytes
    bound = int(0.8 * free)
    mask = fxmask.learn(unet_program, trajectory, speedup=1.2, max_cache_bytes=bound, learner="paper", options=QUICK)
    plan = fxmask.rectify(unet_program, mask)
    assert plan.peak_cache_bytes <= bound
    assert plan.mac_ratio == pytest.approx(1.2, rel=0.03)
    with pytest.raises(OutcomeError, match="max_cache_bytes=1;"):
        fxmask.learn(unet_program, trajectory, speedup=1.2, max_cache_bytes=1, learner="paper", options=QUICK)


def test_two_lanes_have_caches_of_their_own(dit_trajectory, dit_program):
    """Guidance as two calls a step: the gradient is the mean of what each lane gives alone."""
    model, _ = dit_trajectory
    runs = [
        fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2, example_inputs={"class_labels": torch.tensor(c)})
        for c in ([1, 2], [3, 4])
    ]
    both = dataclasses.replace(
        runs[0],
        calls=tuple((a[0], b[0]) for a, b in zip(runs[0].calls, runs[1].calls, strict=True)),
        outputs=tuple((a[0], b[0]) for a, b in zip(runs[0].outputs, runs[1].outputs, strict=True)),
    )
    options = PaperOptions(fresh=False)
    soft = learner_of(dit_program, [runs[0]])._lanes(runs[0])
    scores = torch.rand(4, len(dit_program.streams), generator=torch.Generator().manual_seed(0))
    scores[0] = 1
    alone = [paper.run_pass(run, soft, scores, options, 0) for run in runs]
    together = paper.run_pass(both, soft * 2, scores, options, 0)
    torch.testing.assert_close(together.gradient, (alone[0].gradient + alone[1].gradient) / 2)
    assert together.error == pytest.approx((alone[0].error + alone[1].error) / 2)


@pytest.mark.parametrize("fresh", [True, False])
def test_memory_does_not_grow_with_the_number_of_steps(monkeypatch, fresh):
    """Bytes of live tensors at every step of learning, the recorded trajectory left out."""
    model = tiny_unet()
    original = paper.soft_step
    peaks = {}
    for steps in (5, 20, 60):
        trajectory = fxmask.record(model, ddim(), num_inference_steps=steps, batch_size=1)
        program = fxmask.capture(model, trajectory.calls[0][0])
        gc.collect()
        before = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) is torch.Tensor}
        seen = []

        def watched(*args, before=before, seen=seen):
            live = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if _is_tensor(x)}
            seen.append(sum(size for pointer, size in live.items() if pointer not in before))
            return original(*args)

        monkeypatch.setattr(paper, "soft_step", watched)
        scores_of(program, [trajectory], epochs=1, fresh=fresh)
        peaks[steps] = max(seen)
    rows = 60 * len(program.streams) * 4 * 8  # scores, their moments and their pulls are the one thing [T, B] there is
    assert peaks[60] <= peaks[5] * 1.05 + rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["unet", "dit"])
def test_live_cost_of_a_hard_mask_is_that_of_its_plan(family, seed, request):
    program = request.getfixturevalue(f"{family}_program")
    rows = torch.rand(6, len(program.streams), generator=torch.Generator().manual_seed(seed)) < 0.5
    rows[0] = True
    cost = LiveCost.of(program, program.streams)(rows.double())
    plan = StreamBudget(program, (5.0, 4.0, 3.0, 2.0, 1.0, 0.0)).plan(rows)
    assert cost.tolist() == pytest.approx([step.macs / program.macs for step in plan.steps])


def test_measured_weights_are_smoothed_responses(dit_trajectory):
    """One outlier among neighbours does not count; a trend does; the mean of what a step moves is 1."""
    values = torch.linspace(2, 1, 48, dtype=torch.float64)
    values[20] = 50.0
    smooth = _smoothed(values)
    assert smooth.max() <= 2
    assert smooth[2] > 1.2 * smooth[-3]
    assert torch.equal(_smoothed(torch.ones(30)), torch.ones(30))
    weights = measured_weights([dit_trajectory[1]])
    assert weights.shape == (6,)
    assert float((1 / weights).mean()) == pytest.approx(1, rel=0.05)


def test_live_cost_charges_a_stream_for_what_only_it_reads(dit_program):
    """Of full scores the last stream's gradient is all that is before it; the first one's is its own."""
    scores = torch.ones(6, len(dit_program.streams))
    gradient = LiveCost.of(dit_program, dit_program.streams).gradient(scores)
    assert gradient[3, -1] > 3 * gradient[3, 0] > 0


def _rank(rank: int, size: int, place: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    model = tiny_unet()
    run = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=1)
    program = fxmask.capture(model, run.calls[0][0])
    results[rank] = scores_of(program, [run], epochs=3).values
    dist.destroy_process_group()


def test_ranks_average_their_gradients(tmp_path):
    """Two processes come to the same scores, which are those of the mean of their two passes."""
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (2, str(tmp_path / "store"), results), nprocs=2)
        ranks = dict(results)
    assert torch.equal(ranks[0], ranks[1])
    model = tiny_unet()
    run = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=1)
    program = fxmask.capture(model, run.calls[0][0])
    alone = learner_of(program, [run], epochs=3)
    lanes = alone._lanes(run)
    for k in range(3):
        numbers = [1_000_003 + 2 * k + rank for rank in range(2)]
        one, two = (paper.run_pass(run, lanes, alone.state.scores, alone.options, number) for number in numbers)
        both = paper.Pass((one.gradient + two.gradient) / 2, (one.change + two.change) / 2, (one.error + two.error) / 2)
        alone._together = lambda _own, both=both: both
        alone._one(3)
    assert torch.allclose(alone.state.scores, ranks[0], atol=1e-6)


def test_options_are_checked():
    with pytest.raises(fxmask.InputError, match="blocks='level'"):
        PaperOptions(blocks="level")
    with pytest.raises(fxmask.InputError, match="at least 1"):
        PaperOptions(epochs=0)
    with pytest.raises(fxmask.InputError, match=r"window=0\) must be at least 1"):
        PaperOptions(window=0)
    with pytest.raises(fxmask.InputError, match="a fixed strength has none"):
        PaperOptions.ours(strength=0.1)


def _is_tensor(x: object) -> bool:
    return type(x) is torch.Tensor or type(x) is torch.nn.Parameter
