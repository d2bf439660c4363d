"""The bar of learning: a total, and where the work is; one for several outcomes in a row."""

from __future__ import annotations

from typing import Any

import pytest

from fxmask.learning import progress
from fxmask.learning.progress import Progress


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every bar that is made."""
    found: list[Any] = []
    original = progress.tqdm

    def make(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(progress, "tqdm", make)
    return found


def test_a_bar_follows_the_units_of_work(bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    spent, shown = [3.0], Progress(True)
    with shown.bar("learning 2x", 18.0, lambda: spent[0]):
        (bar,) = bars
        assert bar.total == 18.0
        for units in (4.5, 9.0):
            spent[0] = units
            shown.tick()
        assert bar.n == 6.0, "what was spent before does not count"
        shown.show(best="-43.7 dB", ratio="2.00x")
        spent[0] = 12.0
    assert (bar.n, bar.total) == (9.0, 9.0), "it ends where the work ended"
    text = capsys.readouterr().err
    assert "learning 2x" in text
    assert "9 of at most 9 sampling runs" in text
    assert "best=-43.7 dB, ratio=2.00x" in text


def test_one_bar_inside_of_another_is_that_one(bars: list[Any]) -> None:
    spent, shown = [0.0], Progress(True)
    with shown.bar("learning for an error of 0.05", 100.0, lambda: spent[0]):
        for _ in range(3):
            with shown.bar("learning 2x", 18.0, lambda: spent[0]):
                spent[0] += 5.0
                shown.tick()
    assert len(bars) == 1
    assert bars[0].n == 15.0
    with shown.bar("another", 1.0, lambda: spent[0]):
        shown.tick()
    assert len(bars) == 2


def test_more_work_than_was_promised_widens_the_bar(bars: list[Any]) -> None:
    spent, shown = [0.0], Progress(True)
    with shown.bar("learning", 2.0, lambda: spent[0]):
        spent[0] = 3.0
        shown.tick()
        assert (bars[0].n, bars[0].total) == (3.0, 3.0)


def test_nothing_is_shown_where_nothing_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(False)
    shown.tick()
    with shown.bar("learning", 2.0, lambda: 1.0):
        shown.tick()
        shown.show(best="x")
    assert capsys.readouterr().err == ""


def test_interrupted_bars_are_closed(bars: list[Any]) -> None:
    shown = Progress(True)
    with pytest.raises(KeyboardInterrupt), shown.bar("learning", 2.0, float):
        raise KeyboardInterrupt
    assert bars[0].disable, "closed"
    with shown.bar("learning", 2.0, float):
        assert len(bars) == 2
