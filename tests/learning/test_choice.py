"""The choice among plans with few images: what least was fitted for has the benefit of doubt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmask.learning.choice import SPREAD, choose, is_ahead, margin

PLAIN, REFINED = 0, 3


def test_a_clear_lead_decides():
    plain, refined = [-30.0, -31.0, -29.0, -30.0], [-36.0, -37.0, -35.0, -36.0]
    assert choose([plain, refined], [PLAIN, REFINED]) == 1
    assert choose([refined, plain], [PLAIN, REFINED]) == 0


def test_in_doubt_the_plainer_one():
    plain, refined = [-30.0, -31.0, -29.0, -30.0], [-30.5, -31.5, -29.5, -30.5]
    assert choose([plain, refined], [PLAIN, REFINED]) == 0
    assert choose([plain, refined], [PLAIN, PLAIN]) == 1, "of equals the better one"
    swings = [-50.0, -12.0, -49.0, -15.0]  # better in the mean, by two images
    assert choose([plain, swings], [PLAIN, REFINED]) == 0


def test_one_image_must_say_it_loudly():
    assert choose([[-30.0], [-30.0 - 2 * SPREAD]], [PLAIN, REFINED]) == 0
    assert choose([[-30.0], [-30.0 - 4 * SPREAD]], [PLAIN, REFINED]) == 1


def test_an_image_that_is_there_twice_counts_once():
    """Guidance of some pipelines doubles the batch, and says nothing more."""
    plain, refined = [-30.0, -31.0], [-33.0, -34.0]
    assert choose([plain, refined], [PLAIN, REFINED]) == 0
    assert choose([plain * 8, refined * 8], [PLAIN, REFINED]) == 0
    many = [[x - n / 10 for n in range(8) for x in row] for row in (plain, refined)]
    assert choose(many, [PLAIN, REFINED]) == 1, "sixteen different ones are enough"


def test_two_images_that_are_hard_say_nothing_of_easy_ones():
    """Six decibels on both were two decibels less on 32 others: DiT with guidance at 4, learned from one image."""
    alike, apart = [-5.3, -7.1], [-11.0, -13.6]
    assert not is_ahead(apart, alike)
    assert is_ahead([-53.5, -54.2], [-44.7, -45.3])
    assert is_ahead([*apart, -12.0, -14.0], [*alike, -6.0, -8.0]), "four images are enough for such a lead"
    assert not is_ahead([*apart * 2], [*alike * 2]), "images that are there twice are not four"


@given(st.integers(1, 200), st.floats(-5, 5))
def test_the_margin_shrinks_with_images(count, mean):
    alike = [mean] * count
    assert 0 < margin([*alike, mean]) < margin(alike)
    assert margin([mean]) == pytest.approx(3 * SPREAD)


@given(st.lists(st.tuples(st.lists(st.integers(-60, 0), min_size=3, max_size=3, unique=True), st.integers(0, 3)), min_size=1))
def test_the_choice_is_never_fitted_more_than_the_best(plans):
    errors, fitted = [[float(x) for x in row] for row, _ in plans], [n for _, n in plans]
    chosen, least = choose(errors, fitted), min(sum(row) for row in errors)
    assert fitted[chosen] <= min(n for row, n in zip(errors, fitted, strict=True) if sum(row) == least)
    best = min(errors, key=sum)
    lag = [a - b for a, b in zip(errors[chosen], best, strict=True)]
    assert sum(lag) / 3 <= margin(lag) + 1e-9
