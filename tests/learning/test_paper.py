"""The paper's learner: outcomes are met, budgets are exact, the same seed gives the same mask, ablations differ."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import ddim, tiny_unet

import fxmask
from fxmask import OutcomeError
from fxmask.learning.paper import scores as paper
from fxmask.learning.paper.budget import Budget
from fxmask.learning.paper.learner import rollout_error
from fxmask.learning.paper.options import PaperOptions
from fxmask.learning.paper.scores import learn_scores, step_weights

QUICK = PaperOptions(epochs=3)


@pytest.mark.parametrize("outcome", [{"speedup": 2.0}, {"speedup": 1.3}, {"macs": 0.4}])
def test_outcome_is_met_after_rectification(dit_trajectory, dit_program, outcome):
    _, trajectory = dit_trajectory
    mask = fxmask.learn(dit_program, trajectory, **outcome, learner="paper", options=QUICK)
    plan = fxmask.rectify(dit_program, mask)
    wanted = outcome.get("speedup") or 1 / outcome["macs"]
    assert plan.mac_ratio == pytest.approx(wanted, rel=0.03)
    assert mask.timesteps == trajectory.timesteps
    assert set(mask.blocks) == {b.name for b in dit_program.branches}


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
    learned = fxmask.learn(dit_program, trajectory, speedup=1.4, learner="paper")
    budget = Budget.of(dit_program, trajectory.num_steps)
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
    original = paper._step

    def interrupt(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps > 9:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(paper, "_step", interrupt)
    mask = fxmask.learn(dit_program, trajectory, speedup=1.5, learner="paper")
    assert "interrupted" in caplog.text
    assert fxmask.rectify(dit_program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)


def test_step_weights_are_those_of_the_paper(unet_trajectory):
    """Eq. 9 and 10, on outputs made so that delta / max delta is 1, 0.55, 0.3, 0.05."""
    import dataclasses

    _, trajectory = unet_trajectory
    e0 = torch.tensor([[0.0, 10.0]])

    def change(e: torch.Tensor, delta: float) -> torch.Tensor:  # ||e' - e|| / ||e'|| = delta, orthogonal to a long e
        return e / (1 - delta)

    outputs = [e0]
    for delta in (0.4, 0.22, 0.12, 0.02):
        outputs.append(change(outputs[-1], delta))
    weights = step_weights(dataclasses.replace(trajectory, outputs=tuple((e,) for e in outputs)))
    assert weights.tolist() == [1.0, 1.0, 1.0, 1.5, 2.0]


def test_memory_of_a_soft_step_is_one_step():
    """Caches carry no graph from one step to the next."""
    from fxmask.passes.insert_soft_mask import insert_soft_mask

    model = tiny_unet()
    trajectory = fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2)
    program = fxmask.capture(model, trajectory.calls[0][0])
    soft = insert_soft_mask(program, program.branches)
    inputs = tuple(program.signature.bind((), dict(trajectory.calls[0][0])).tensors.values())
    scores = torch.full((len(soft.blocks),), 0.7, requires_grad=True)
    _, caches, _ = paper._step(soft, inputs, scores, soft.empty_caches(program), trajectory.outputs[0][0], False)
    assert all(not cache.requires_grad for cache in caches)


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
    with pytest.raises(OutcomeError, match="no residual branch"):
        fxmask.learn(program, trajectory, learner="paper")


@pytest.mark.parametrize("ablation", [{"gumbel": True}, {"weighted": False}, {"bimodal": 0.0}])
def test_ablations_meet_the_outcome_with_another_mask(dit_trajectory, dit_program, ablation):
    _, trajectory = dit_trajectory
    whole = learn_scores(dit_program, trajectory, 0.6, 0, False, PaperOptions(epochs=4))
    scores = learn_scores(dit_program, trajectory, 0.6, 0, False, PaperOptions(epochs=4, **ablation))
    assert not torch.equal(whole.values, scores.values)
    mask = fxmask.learn(dit_program, trajectory, speedup=1.5, learner="paper", options=PaperOptions(epochs=3, **ablation))
    assert fxmask.rectify(dit_program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)


def test_memory_does_not_grow_with_the_number_of_steps(monkeypatch):
    """Bytes of live tensors at every step of learning, the recorded trajectory left out."""
    model = tiny_unet()
    original = paper._step
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

        monkeypatch.setattr(paper, "_step", watched)
        learn_scores(program, trajectory, 0.6, 0, False, PaperOptions(epochs=1))
        peaks[steps] = max(seen)
    rows = 60 * len(program.branches) * 4 * 8  # scores, their moments and their pulls are the one thing [T, B] there is
    assert peaks[60] <= peaks[5] * 1.05 + rows


def _is_tensor(x: object) -> bool:
    return type(x) is torch.Tensor or type(x) is torch.nn.Parameter
