"""Saved plans of a pipeline, in another process and another state: what fits is used, what does not is said by name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from pipelines import small_stable_diffusion
from test_settings import Pipeline, accelerated, images

import fxmask
from fxmask.errors import MaskError
from fxmask.files.sealed import fields_in
from fxmask.settings.pipeline import session_of
from fxmask.settings.saved import LIST
from fxmask.storage.schema import PLAN

pytest.importorskip("diffusers")


class Lazy(torch.nn.Module):
    """Makes a table at its first call and keeps it, as rotary embeddings often do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = tiny_unet(), None

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(-1, 1, 8).sin().outer(torch.linspace(-1, 1, 8))
        return self.inner(sample + 0.1 * self.table, timestep).sample


def lazy() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline(Lazy().eval())


def test_plans_of_models_that_make_tables_at_their_first_call(tmp_path: Path) -> None:
    pipe = accelerated(lazy())
    images(pipe, {}, 0)
    made = images(pipe, {}, 1)
    fxmask.save(pipe, tmp_path / "plans")
    other = fxmask.load(tmp_path / "plans", lazy(), backend="eager", progress=False)
    assert torch.equal(images(other, {}, 1), made), "no call was made before: its table was not there yet"
    assert session_of(other).account().images == 1
    pipe.unet.save(tmp_path / "model")
    model = fxmask.load(tmp_path / "model", lazy().unet, backend="eager", progress=False)
    assert model.plan == pipe.unet.plan


def small() -> tuple[Any, dict[str, Any]]:
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call, 0)
    images(pipe, call, 1)
    folder = tmp_path_factory.mktemp("saved") / "plans"
    fxmask.save(pipe, folder)
    return folder


@pytest.fixture
def plans(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "plans"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fxmask")]


def test_another_scheduler_is_said_in_one_line(plans: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import EulerDiscreteScheduler

    pipe, call = small()
    with caplog.at_level(logging.WARNING, "fxmask.settings"):
        fxmask.load(plans, pipe, backend="eager", progress=False)
    assert not said(caplog), "the same scheduler"
    pipe, _ = small()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with caplog.at_level(logging.WARNING, "fxmask.settings"):
        fxmask.load(plans, pipe, backend="eager", progress=False)
    (line,) = said(caplog)
    assert "scheduler.class: saved 'DDIMScheduler', now 'EulerDiscreteScheduler'" in line
    assert "scheduler.config.timestep_spacing: saved 'leading', now 'trailing'" in line
    caplog.clear()
    images(pipe, call, 0)
    (line,) = said(caplog)
    assert line.startswith("not seen before")
    assert "scheduler.class: saved 'DDIMScheduler'" in line


def test_other_steps_are_said_in_one_line(plans: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = small()
    fxmask.load(plans, pipe, backend="eager", progress=False)
    images(pipe, call, 0, num_inference_steps=7)
    (line,) = said(caplog)
    assert line.endswith("(num_inference_steps: saved 6, now 7)")


# What differs where a digest does


def test_a_changed_list_says_which_field(plans: Path) -> None:
    raw = (plans / LIST).read_bytes()
    (plans / LIST).write_bytes(raw.replace(b'"effort": "instant"', b'"effort": "default"'))
    with pytest.raises(MaskError, match=r"its digest was made of: settings\[0\]\.effort differs"):
        fxmask.load(plans, small()[0])


def test_a_changed_plan_says_which_fields(plans: Path) -> None:
    (place,) = (path for path in plans.iterdir() if path.is_dir())
    raw = (place / PLAN).read_bytes()
    assert raw.count(b'"start": 0') == 1
    (place / PLAN).write_bytes(
        raw.replace(b'"timestep_spacing": "leading"', b'"timestep_spacing": "trailing"').replace(b'"start": 0', b'"start": 1')
    )
    fields = r"facts\.scheduler\.config\.timestep_spacing, facts\.start differ"
    with pytest.raises(MaskError, match=rf"is not the one that .* was written with: {fields}; copy"):
        fxmask.load(plans, small()[0])
    with pytest.raises(MaskError, match=rf"its digest was made of: {fields}"):
        fxmask.load(place, small()[0].unet)


def test_a_plan_of_another_save_says_which_fields(plans: Path, tmp_path: Path) -> None:
    pipe, call = small()
    accelerated(pipe, speedup=1.5)
    images(pipe, call, 0)
    images(pipe, call, 1)
    fxmask.save(pipe, tmp_path / "other")
    (place,) = (path for path in plans.iterdir() if path.is_dir())
    for path in (tmp_path / "other" / place.name).iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    with pytest.raises(MaskError, match=r"written with: .*facts\.learned\.asked\.speedup.* differ; copy"):
        fxmask.load(plans, small()[0])


def test_changed_tensors_are_said_by_name(plans: Path) -> None:
    (place,) = (path for path in plans.iterdir() if path.is_dir())
    (tensors,) = place.glob("*.safetensors")
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1  # of the last tensor
    tensors.write_bytes(raw)
    with pytest.raises(MaskError, match=r"its digest is another: plan\.safetensors: \w+(\.\w+)* differs"):
        fxmask.load(plans, small()[0])


def test_digests_of_fields_are_for_messages_only(plans: Path) -> None:
    assert fields_in((plans / LIST).read_bytes()).keys() >= {"outcome.speedup", "settings[0].effort", "component"}
    assert fields_in(b"{") == fields_in(b"[]") == fields_in(b'{"fields": 3}') == {}
