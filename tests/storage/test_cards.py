"""What saved plans say of themselves: facts, the model card, names on a hub, checksums, older formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ddim, labels, tiny_dit
from pipelines import generator, small_stable_diffusion

import fxmask
from fxmask import MaskError
from fxmask.settings.saved import LIST
from fxmask.storage import hub
from fxmask.storage.card import CARD, OURS
from fxmask.storage.plans import load_plan
from fxmask.storage.schema import PLAN, TENSORS

CALL = {"num_inference_steps": 6}


def recorded(model: Any, seed: int) -> Any:
    return fxmask.record(model, ddim(), num_inference_steps=6, batch_size=2, example_inputs=labels, seed=seed)


@pytest.fixture(scope="module")
def accelerated() -> Any:
    return fxmask.accelerate(
        tiny_dit(), ddim(), num_inference_steps=6, speedup=1.8, example_inputs=labels, backend="eager", progress=False, seed=3
    )


@pytest.fixture(scope="module")
def measured(accelerated: Any) -> Any:
    fxmask.measure(accelerated, [recorded(accelerated.original, 1000)])
    return accelerated


def small(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    calls = [{**call, **CALL, "generator": generator(seed)} for seed in (5, 6)]
    options = {"backend": "eager", "progress": False, "speedup": 2.0, **options}
    return fxmask.accelerate(pipe, example_calls=calls, **options), {**call, **CALL}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a pipeline's plans, measured."""
    pipe, call = small()
    fxmask.measure(pipe, [{**call, "generator": generator(1000)}])
    folder = tmp_path_factory.mktemp("plans") / "plans"
    fxmask.save(pipe, folder)
    return folder


# Facts


def test_a_plan_says_what_it_was_learned_on_and_what_was_measured(measured: Any, tmp_path: Path) -> None:
    fxmask.save(measured, tmp_path / "plan")
    _, facts, _ = load_plan(tmp_path / "plan")
    assert facts["learned"] == {"runs": 1, "images": 8, "seeds": [3], "effort": "instant", "asked": {"speedup": 1.8}}
    assert facts["plan"]["mac_ratio"] == measured.plan.mac_ratio
    assert facts["plan"]["macs"] == sum(measured.plan.macs_per_step)
    assert facts["plan"]["full_macs"] == 6 * measured.plan.full_macs
    assert facts["scheduler"]["class"] == "DDIMScheduler"
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["versions"]["fxmask"] == fxmask.__version__
    quality = measured.report().quality
    assert facts["measured"] == quality.to_dict()
    assert quality.images == 2
    assert quality.psnr_low <= quality.psnr
    assert quality.fewer_steps == round(6 / measured.plan.mac_ratio)
    loaded = fxmask.load(tmp_path / "plan", measured.original, progress=False)
    assert loaded.report().quality == quality
    loaded.save(tmp_path / "again")
    assert load_plan(tmp_path / "again")[1]["learned"] == facts["learned"], "and goes on"


def test_what_was_measured_of_another_plan_is_not_said(measured: Any, tmp_path: Path) -> None:
    program = measured.program
    other = fxmask.compile(
        program, fxmask.rectify(program, fxmask.policies.interval(2)(program, measured.mask.timesteps)), "eager"
    )
    other.note(measured=measured.report().quality.to_dict())
    assert other.report().quality is None
    other.save(tmp_path / "plan")
    assert "measured" not in load_plan(tmp_path / "plan")[1]


def test_measured_numbers_are_those_of_the_samples(accelerated: Any) -> None:
    run = recorded(accelerated.original, 77)
    quality = fxmask.measure(accelerated, [run])
    found = fxmask.psnr(run.rollout(accelerated), run.final)
    assert quality.psnr == pytest.approx(float(found.mean()))
    assert quality.error == pytest.approx(fxmask.relative_error(run.rollout(accelerated), run.final))
    fewer = fxmask.psnr(run.with_steps(accelerated.original, quality.fewer_steps).final, run.final)
    assert quality.fewer_psnr == pytest.approx(float(fewer.mean()))
    errors = fxmask.step_errors(accelerated, run)
    assert errors["sample"][0] == 0
    assert errors["prediction"][0] == pytest.approx(0, abs=1e-5)
    assert len(errors["sample"]) == len(errors["prediction"]) == 6
    assert max(errors["sample"]) > 1e-4


@pytest.mark.parametrize(
    ("what", "message"),
    [([], "one run at least"), ([{"prompt": "x"}], "recorded runs"), (None, "one run at least")],
)
def test_measuring_something_else(accelerated: Any, what: Any, message: str) -> None:
    with pytest.raises(fxmask.InputError, match=message):
        fxmask.measure(accelerated, what)


def test_report_has_quality_and_the_largest_blocks() -> None:
    model = tiny_dit()
    run = recorded(model, 0)
    program = fxmask.capture(model, run.calls[0][0])
    model = fxmask.compile(program, fxmask.rectify(program, fxmask.policies.interval(2)(program, run.timesteps)), "eager")
    assert "held-out" not in str(model.report())
    fxmask.measure(model, [run])
    report = model.report()
    text = str(report)
    assert "held-out PSNR" in text
    assert "steps instead" in text
    macs = [report.block_macs[name] for name in report.largest]
    assert macs == sorted(macs, reverse=True)
    assert text.count("/6 steps, ") == min(12, len(report.largest))
    page = report._repr_html_()
    assert page.count("<rect") == 6
    assert "<script" not in page
    assert len(page) < 20_000
    assert report.to_dict()["quality"]["images"] == 2
    json.dumps(report.to_dict())


def test_names_of_blocks_are_escaped_in_pages(accelerated: Any) -> None:
    from dataclasses import replace

    report = replace(accelerated.report(), kept_per_block={"<b>x": 1}, block_macs={"<b>x": 1})
    assert "&lt;b&gt;x" in report._repr_html_()
    assert "<b>" not in report._repr_html_()


# The card


def test_the_card_of_a_model(measured: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    fxmask.save(measured, folder)
    text = (folder / CARD).read_text()
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert "library_name: fxmask" in head.splitlines()
    quality = measured.report().quality
    for value in (
        f"{quality.psnr:.1f} dB mean",
        "DDIMScheduler",
        f"{measured.plan.mac_ratio:.2f}x fewer",
        f"torch {torch.__version__}",
    ):
        assert value in rest
    assert "![computed" in rest
    assert (folder / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert fxmask.load(folder, measured.original, progress=False).plan == measured.plan, "what is beside a plan does not matter"
    fxmask.save(measured, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "mask.png", PLAN, TENSORS]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    """A mask of one's own was learned on nothing, and nobody measured it."""
    model = tiny_dit()
    run = recorded(model, 0)
    program = fxmask.capture(model, run.calls[0][0])
    mask = fxmask.policies.interval(2)(program, run.timesteps)
    fxmask.save(fxmask.compile(program, fxmask.rectify(program, mask), "eager"), tmp_path / "plan")
    text = (tmp_path / "plan" / CARD).read_text()
    for name in ("images", "seeds", "PSNR", "scheduler", "None", "null"):
        assert name not in text
    assert "| steps | 6 |" in text


def test_someone_elses_readme_stays(accelerated: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "plan"
    fxmask.save(accelerated, folder)
    mine = (folder / CARD).read_text().replace(OURS, "my own words")
    (folder / CARD).write_text(mine)
    fxmask.save(accelerated, folder)
    assert (folder / CARD).read_text() == mine
    assert "stays as it is" in caplog.text


def test_without_matplotlib_the_card_has_the_mask_as_text(
    accelerated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fxmask.save(accelerated, tmp_path / "plan")
    assert "```text\nMask: 6 steps" in (tmp_path / "plan" / CARD).read_text()
    assert not (tmp_path / "plan" / "mask.png").exists()


def test_what_a_plan_says_cannot_leave_its_cell(accelerated: Any, tmp_path: Path) -> None:
    accelerated.note(learned={"prompt": "a | b\n# <script>`x`"})
    try:
        fxmask.save(accelerated, tmp_path / "plan")
    finally:
        accelerated.note(learned={})
    (line,) = [x for x in (tmp_path / "plan" / CARD).read_text().splitlines() if x.startswith("| prompt")]
    assert line == "| prompt | a \\| b # &lt;script>'x' |"


def test_where_a_model_is_from(accelerated: Any) -> None:
    from fxmask.storage.about import base_model

    def of(name: str) -> dict[str, str]:
        return base_model(SimpleNamespace(config=SimpleNamespace(_name_or_path=name)))  # type: ignore[arg-type]

    assert of("owner/name") == {"base_model": "owner/name"}
    assert of("/root/.cache/hub/models--owner--name-x/snapshots/1/unet") == {"base_model": "owner/name-x"}
    assert of("/a/folder") == of("") == base_model(torch.nn.Linear(1, 1)) == {}


# Pipelines


def test_plans_of_a_pipeline(plans: Path) -> None:
    text = (plans / CARD).read_text()
    for value in ("guidance scale", "| seeds | [5, 6] |", "held-out PSNR", "DDIMScheduler", "num_inference_steps=6"):
        assert value in text
    (picture,) = plans.glob("*.png")
    assert f"]({picture.name})" in text
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe = fxmask.load(plans, pipe, backend="eager", progress=False)
    pipe(**call, **CALL, generator=generator(1))
    assert pipe.unet.report().quality.images == 2, "what was measured is known of a loaded plan"


def test_measuring_a_pipeline() -> None:
    pipe, call = small()
    original, calls = pipe.unet.original, [{**call, "generator": generator(seed)} for seed in (50, 51)]
    quality = fxmask.measure(pipe, calls)
    plain, _ = small_stable_diffusion()
    plain.set_progress_bar_config(disable=True)
    plain.unet.load_state_dict(original.state_dict())
    arguments = [{**call, "generator": generator(seed)} for seed in (50, 51)]
    full = torch.cat([torch.as_tensor(next(iter(plain(**x).values()))) for x in arguments])
    arguments = [{**call, "generator": generator(seed)} for seed in (50, 51)]
    fast = torch.cat([torch.as_tensor(next(iter(pipe(**x).values()))) for x in arguments])
    assert quality.psnr == pytest.approx(float(fxmask.psnr(fast, full, 1.0).mean()), abs=0.01)
    assert quality.fewer_steps == 3
    with pytest.raises(fxmask.InputError, match="calls by name"):
        fxmask.measure(pipe, [3])


# Checksums and older formats


def test_a_list_that_was_changed_is_refused(plans: Path, tmp_path: Path) -> None:
    shutil.copytree(plans, tmp_path / "plans")
    raw = (tmp_path / "plans" / LIST).read_bytes()
    (tmp_path / "plans" / LIST).write_bytes(raw.replace(b'"effort": "instant"', b'"effort": "default"'))
    with pytest.raises(MaskError, match="not what its digest was made of"):
        fxmask.load(tmp_path / "plans", small_stable_diffusion()[0])


def test_a_plan_of_another_folder_is_refused_by_name(plans: Path, tmp_path: Path) -> None:
    pipe, _ = small(speedup=1.5)
    fxmask.save(pipe, tmp_path / "other")
    shutil.copytree(plans, tmp_path / "plans")
    (name,) = (path.name for path in plans.iterdir() if path.is_dir())
    shutil.rmtree(tmp_path / "plans" / name)
    shutil.copytree(tmp_path / "other" / name, tmp_path / "plans" / name)
    with pytest.raises(MaskError, match="num_inference_steps=6.* is not the one that"):
        fxmask.load(tmp_path / "plans", small_stable_diffusion()[0])


def test_a_list_of_the_first_version_is_read_and_written_anew(plans: Path, tmp_path: Path) -> None:
    """It had no digests, and named an absent generator as a part of the setting."""
    folder = tmp_path / "plans"
    shutil.copytree(plans, folder)
    data = json.loads((folder / LIST).read_text())
    del data["digest"]
    data["version"] = 1
    for entry in data["settings"]:
        del entry["plan"]
        entry["setting"]["arguments"].append(["generator", None])
    (folder / LIST).write_text(json.dumps(data))
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    fxmask.load(folder, pipe, backend="eager", progress=False)
    pipe(**call, **CALL, generator=generator(1))
    assert pipe.unet.report().runs[-1].followed == 5, "its settings are found again"
    fxmask.save(pipe, folder)
    assert json.loads((folder / LIST).read_text())["version"] == 2
    data["version"] = 7
    (folder / LIST).write_text(json.dumps(data))
    with pytest.raises(MaskError, match="its version is 7"):
        fxmask.load(folder, pipe)


# Names on a hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the hub was asked for; it hands out ``tmp_path / "snapshot"``."""
    found: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        found.append((name, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return found


def test_a_name_on_the_hub(accelerated: Any, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fxmask.save(accelerated, tmp_path / "snapshot")
    loaded = fxmask.load("owner/name@v1.0", accelerated.original, progress=False)
    assert loaded.plan == accelerated.plan
    ((name, options),) = asked
    assert (name, options["revision"]) == ("owner/name", "v1.0")
    assert "parts/*.pt2" not in options["allow_patterns"], "machine code stays where it is"
    hub.local_folder("owner/name", allow_compiled=True)
    assert "parts/*.pt2" in asked[-1][1]["allow_patterns"]


def test_folders_are_folders(asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for folder in ("owner/name", str(tmp_path / "x" / "y"), "plans", "a/b/c", Path("owner/other")):
        assert hub.local_folder(folder) == Path(folder)
    assert asked == []


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, which is told to stay offline."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MaskError, match=r"no folder 'owner/name' here, and the hub did not.*hf download owner/name"):
        fxmask.load("owner/name", tiny_dit())


def test_without_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MaskError, match="pip install huggingface_hub"):
        fxmask.load("owner/name", tiny_dit())
