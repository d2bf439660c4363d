"""Pictures: what is drawn is what the mask says, also where there are many blocks and steps, and without colour."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import fxmask
from fxmask import pictures
from fxmask.learning.candidate import ParetoPoint
from fxmask.pictures import masks

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def mask_of(steps: int, blocks: int) -> fxmask.Mask:
    torch.manual_seed(0)
    compute = torch.rand(steps, blocks) < 0.5
    compute[0] = True
    names = tuple(f"transformer_blocks.{b // 4}.{('attn1', 'attn2', 'ff', 'out')[b % 4]}" for b in range(blocks))
    forecast: dict[Any, Any] = {}
    if steps > 3:
        compute[:4, 0] = torch.tensor([True, True, False, True])
        forecast = {(2, names[0]): ((1, 1.5), (0, -0.5)), (3, names[0]): ((3, 0.5), (1, 0.5))}
    return fxmask.Mask(compute, tuple(range(steps, 0, -1)), names, forecast or None)


def points() -> tuple[ParetoPoint, ...]:
    return tuple(ParetoPoint(mask_of(4, 2), r, 0.01, d, "even", 1.0, f) for r, d, f in ((3.0, -25, -20), (1.5, -40, -30)))


DRAWN = {
    "heat map": lambda path: pictures.save_heat_map(mask_of(20, 12), path),
    "counts": lambda path: pictures.save_counts(mask_of(20, 12), path),
    "scores": lambda path: pictures.save_scores(torch.linspace(0, 1, 240), path),
    "step errors": lambda path: pictures.save_step_errors(
        {"sample": [0.0, 0.1], "prediction": [0.1, 0.2]}, path, kept=[1, 0.2]
    ),
    "pareto": lambda path: pictures.save_pareto(points(), path),
    "samples": lambda path: pictures.save_samples(
        {"in full": torch.linspace(0, 1, 144).reshape(3, 3, 4, 4), "fxmask": torch.linspace(0, 1, 32).reshape(2, 1, 4, 4)},
        path,
        notes={"fxmask": ["40 dB"] * 2},
        title="x",
    ),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_each_is_written_in_both_forms_and_the_same_each_time(name: str, suffix: str, tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    path = tmp_path / "sub" / f"picture{suffix}"
    assert DRAWN[name](path) == path
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".png":
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 2
        DRAWN[name](path)
        assert path.read_bytes() == content
    assert [x.name for x in path.parent.iterdir()] == [path.name], "nothing temporary is left"
    assert plt.get_fignums() == [], "figures of the user's own are not touched"


@pytest.mark.parametrize("name", DRAWN)
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(fxmask.InputError, match=r"must end in \.png or \.svg"):
        DRAWN[name](tmp_path / "picture.pdf")


def test_states() -> None:
    states = masks.states_of(mask_of(6, 4))
    mask = mask_of(6, 4)
    assert states[0].tolist()[:4] == [masks.COMPUTED, masks.COMPUTED, masks.FORECAST, masks.BLENDED]
    plain = states[1:].T == masks.COMPUTED
    assert torch.equal(plain, mask.compute[:, 1:])


def test_counts_are_those_of_the_paper() -> None:
    mask = mask_of(12, 3)
    counts = masks.counts_of(mask, 5)
    assert counts.shape == (3, 3)
    assert counts[1].tolist() == [int(mask.compute[a:b, 1].sum()) for a, b in ((0, 5), (5, 10), (10, 12))]
    with pytest.raises(fxmask.InputError, match="at least 1"):
        pictures.save_counts(mask, "x.png", every=0)


def test_greys_are_apart() -> None:
    """On a grey print, neighbouring states of the heat map differ in lightness by a fifth and more."""
    lightness = []
    for colour in masks.COLOURS:
        r, g, b = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        lightness.append(0.2126 * r + 0.7152 * g + 0.0722 * b)
    assert all(a - b > 0.15 for a, b in itertools.pairwise(lightness)), lightness


@pytest.mark.parametrize("draw", [pictures.save_heat_map, pictures.save_counts])
def test_200_blocks_and_250_steps(draw: Any, tmp_path: Path) -> None:
    """Every cell has pixels of its own, and the picture is no wall."""
    mask = mask_of(250, 200)
    path = draw(mask, tmp_path / "large.png")
    with Image.open(path) as image:
        width, height = image.size
    assert 5 * 250 < width < 3600
    assert 7 * 200 < height < 3600


def test_names_of_many_blocks_are_those_of_their_modules() -> None:
    names = mask_of(2, 200).blocks
    found = masks.grouped(names, 60)
    assert len(found) == 50
    assert found[1] == (4, 7, "transformer_blocks.1 (4)")
    assert [a for a, _, _ in found] == [0, *(b + 1 for _, b, _ in found[:-1])], "each block once, in order"
    assert len(masks.grouped(names, 7)) == 1, "one module has all of them"
    flat = tuple(f"x{k}" for k in range(100))
    assert len(masks.grouped(flat, 10)) == 10
    assert masks.grouped(names[:3], 10) == [(0, 0, names[0]), (1, 1, names[1]), (2, 2, names[2])]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: pictures.save_scores(torch.tensor([0.5, 1.5]), path), r"numbers in \[0, 1\]"),
        (lambda path: pictures.save_scores(torch.empty(0), path), "one at least"),
        (lambda path: pictures.save_step_errors({}, path), "one curve at least"),
        (lambda path: pictures.save_pareto([], path), "no point to draw"),
        (lambda path: pictures.save_samples({}, path), "one image at least"),
        (lambda path: pictures.save_samples({"x": torch.rand(3, 4, 4)}, path), "must be a tensor"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(fxmask.InputError, match=message):
        draw(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fxmask.InputError, match="cannot be written"):
        pictures.save_heat_map(mask_of(4, 2), tmp_path / "file" / "x.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(fxmask.InputError, match="pip install matplotlib"):
        pictures.save_heat_map(mask_of(4, 2), tmp_path / "x.png")
