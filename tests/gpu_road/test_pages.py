"""The code of README and docs on an emulated GPU: a model on ``cuda``, example inputs on the CPU.

Blocks that need a hub run with small pipelines in place of those on it. What cannot run here is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from emulated_gpu import emulated_gpu
from pages import README, WITH_CODE, Block, blocks_of, name_of, names_of_pages, registries
from without_a_gpu import CUDA

import fxmask

NOT_RUN = [block for page in WITH_CODE for block in blocks_of(page) if not block.runs]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    with emulated_gpu():
        return names_of_pages("cuda")


@pytest.fixture
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    with registries(), emulated_gpu():
        yield


# They learn several times, about 10 s each
LONG = {"docs/getting-started.md", "docs/guide/learning.md", "docs/writing/calibrated-policy.md"}


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in LONG)) for page in WITH_CODE],
)
def test_code(page: Path, names: dict[str, Any], tmp_path: Path) -> None:
    """The blocks that run on a CPU; results are looked at by ``test_docs``."""
    scope = {**names, "folder": tmp_path, "__name__": "page"}
    for block in blocks_of(page):
        if block.runs:
            exec(block.compiled(), scope)
    assert {x.device for x in scope["model"].parameters()} == {CUDA}
    assert {x.device for x in scope["calls"][0].final.split(1)} == {CUDA}


HUB = "names a pipeline on a hub; pipelines of its kind, small, are in test_shipped.py"
COMPILER = "runs Inductor's code, which needs a GPU; test_kernels.py counts its kernels and interprets them"
REASONS = {"needs a hub": HUB, "needs a compiler": COMPILER, "needs the shipped checkpoints, and a compiler": COMPILER}


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{name_of(block.page)}:{block.line}, {block.why_not}")
def test_what_else_a_page_says(block: Block) -> None:
    """What is not run here, and why; a new reason needs an answer."""
    reason = REASONS[block.why_not]
    if block != NOT_RUN[0]:
        pytest.skip(reason)
    assert block.page == README  # runs below


@pytest.mark.slow  # learns for a U-Net: 45 s
@pytest.mark.usefixtures("_there")
def test_the_pipeline_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines, with a small pipeline in place of the one on the hub, few steps, and no compiler."""
    diffusers = pytest.importorskip("diffusers")
    pipelines = pytest.importorskip("pipelines")
    pipe, _ = pipelines.small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name, torch_dtype: pipe)
    monkeypatch.setattr(fxmask, "compile", functools.partial(fxmask.compile, backend="eager"))
    scope: dict[str, Any] = {"__name__": "page"}
    exec(NOT_RUN[0]._replace(code=NOT_RUN[0].code.replace("steps=30", "steps=4")).compiled(), scope)
    assert {x.device for x in pipe.unet.parameters()} == {CUDA}
    assert scope["image"].size == (16, 16)
    assert pipe.unet is scope["accelerated"]


@pytest.mark.parametrize("place", ["cache", "argument", "none"])
def test_a_tensor_that_is_left_on_the_cpu_is_seen(place: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the tests above fail."""
    from fxmask.runtime import executor

    run = names["calls"][0]
    with emulated_gpu():
        accelerated = fxmask.compile(names["program"], names["plan"], backend="eager")
        if place == "cache":
            monkeypatch.setattr(executor, "_compact", lambda x: x.to("cpu"))
        with contextlib.nullcontext() if place == "none" else pytest.raises(RuntimeError, match="same device"):
            if place == "argument":
                names["model"](**{**run.calls[0][0], "x": torch.randn(2, 6, 4)})
            assert run.rollout(accelerated).device == CUDA
