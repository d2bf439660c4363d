"""Mask, Forecast: what is accepted, what is refused, and what loads read."""

from __future__ import annotations

import pickle

import pytest
import torch

import fxmask
from fxmask import Forecast, Mask, MaskError


def test_accepts_lists_and_keeps_values():
    mask = Mask(compute=[[1, 1], [0, 1]], timesteps=[9, 8], blocks=["a", "b"])
    assert mask.compute.dtype == torch.bool
    assert mask.timesteps == (9.0, 8.0)
    assert mask.terms(1, "a") == ((0, 1.0),)


def test_is_a_copy():
    rows = torch.ones(2, 1, dtype=torch.bool)
    mask = Mask(rows, (1, 0), ("a",))
    rows[1, 0] = False
    assert bool(mask.compute.all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compute": [[1]], "timesteps": [9, 8], "blocks": ["a"]}, r"need \(2, 1\)"),
        ({"compute": [[1, 1]], "timesteps": [9], "blocks": ["a", "a"]}, "repeated"),
        ({"compute": [[0], [1]], "timesteps": [9, 8], "blocks": ["a"]}, "no earlier step computes it"),
        ({"compute": torch.ones(0, 1), "timesteps": [], "blocks": ["a"]}, "at least one step"),
        (
            {"compute": [[1], [0]], "timesteps": [9, 8], "blocks": ["a"], "forecast": {(1, "b"): ((0, 1.0),)}},
            "not in the mask",
        ),
        (
            {"compute": [[1], [1]], "timesteps": [9, 8], "blocks": ["a"], "forecast": {(1, "a"): ((0, 1.0),)}},
            "where the mask computes it",
        ),
        (
            {"compute": [[1], [0], [0]], "timesteps": [9, 8, 7], "blocks": ["a"], "forecast": {(2, "a"): ((1, 1.0),)}},
            "reads step 1",
        ),
        (
            {"compute": [[1], [0]], "timesteps": [9, 8], "blocks": ["a"], "forecast": {(1, "a"): ((0, 1.0), (0, 2.0))}},
            "repeated",
        ),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(MaskError, match=message):
        Mask(**arguments)


def test_forecast_terms_replace_plain_reuse():
    mask = Mask([[1], [1], [0]], [9, 8, 7], ["a"], Forecast({(2, "a"): {0: -1.0, 1: 2.0}}))
    assert mask.terms(2, "a") == ((0, -1.0), (1, 2.0))


def test_starting_in_the_middle_computes_what_was_never_stored():
    mask = Mask([[1, 1], [1, 1], [0, 0], [1, 0], [0, 0]], range(5), ["a", "b"], {(4, "a"): ((1, -1.0), (3, 2.0))})
    late = mask.starting_at(2)
    assert late.compute[2:].tolist() == [[True, True], [True, False], [True, False]]
    assert late.forecast is None  # its source, step 1, never runs
    assert late.terms(3, "b") == ((2, 1.0),)


def test_equality_hash_and_pickle():
    a = Mask([[1], [0]], [9, 8], ["a"], {(1, "a"): ((0, 0.5),)})
    b = pickle.loads(pickle.dumps(a))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Mask([[1], [0]], [9, 8], ["a"])


def test_ones_lists_every_block(tiny):
    mask = Mask.ones(tiny, [3, 2, 1])
    assert mask.blocks == tuple(block.name for block in tiny.blocks)
    assert bool(mask.compute.all())


def test_mask_of_another_program_is_refused(tiny, dit_program):
    mask = fxmask.policies.interval(2)(tiny, [3, 2, 1])
    with pytest.raises(MaskError, match="does not have"):
        fxmask.rectify(dit_program, mask)


def test_plan_of_another_program_is_refused(tiny, dit_program):
    plan = fxmask.rectify(tiny, fxmask.policies.interval(2)(tiny, [3, 2, 1]))
    with pytest.raises(MaskError, match="fingerprint"):
        fxmask.compile(dit_program, plan, backend="eager")


@pytest.mark.parametrize("period", [0, -1, 1.5])
def test_interval_refuses(period):
    with pytest.raises(MaskError, match="positive"):
        fxmask.policies.interval(period)


def test_interval_acts_on_branches_only(tiny):
    mask = fxmask.policies.interval(3)(tiny, range(7))
    assert mask.blocks == tuple(b.name for b in tiny.branches)
    assert mask.compute.all(dim=1).tolist() == [True, False, False, True, False, False, True]
