"""What a captured graph froze of a model's Python state is looked at; a change is captured again, or named."""

from __future__ import annotations

import copy
import random
import threading
import warnings

import numpy
import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, ddim, every_other, make_calls, tiny_unet
from guards import actions
from guards.actions import FEATURES, Denoiser, Sequence, run_sequence

import fxmask
from fxmask.guards.state import Snapshot


def accelerate(model, call, roles=None, **options):
    program = fxmask.capture(model, call, roles)
    mask = fxmask.Mask.ones(program, TIMESTEPS)
    return fxmask.compile(program, fxmask.rectify(program, mask), backend="eager", **options)


@pytest.fixture(autouse=True)
def _globals():
    yield
    actions.STRENGTH, Denoiser.share = 1.0, 1.0
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", range(12))
def test_random_states_and_actions(seed):
    """``python tests/guards/actions.py`` runs thousands of these."""
    run_sequence(seed)


@pytest.mark.parametrize("feature", FEATURES)
@torch.no_grad()
def test_each_kind_of_state_is_seen(feature):
    """Between runs and in the middle of one; and what is set back is not captured again."""
    sequence = Sequence.__new__(Sequence)
    torch.manual_seed(0)
    sequence.model = Denoiser((feature,))
    sequence.now, sequence.rng, sequence.log = actions.Situation(), random.Random(3), []
    model = sequence.model
    accelerated = accelerate(model, sequence.call(0))
    for change in range(3):
        for step in range(3):
            if change and step == change - 1:
                actions.set_state(model, sequence.now, sequence.rng)
            call = sequence.call(step, change)
            got = accelerated(**call)
            torch.testing.assert_close(got, model(**call), msg=lambda m: f"{feature}: {m}")
    assert len(accelerated._fxmask.variants) <= 4


@torch.no_grad()
def test_a_known_state_is_not_captured_again(monkeypatch):
    model = TinyTransformer().eval()
    model.layers[0].out.scale = 1.0
    call = make_calls()[0]
    model.layers[0].out.forward = lambda x, layer=model.layers[0].out: torch.nn.functional.linear(x, layer.weight) * layer.scale
    accelerated = accelerate(model, call)
    for scale in (1.0, 0.5, 1.0, 0.5, 0.5):
        model.layers[0].out.scale = scale
        torch.testing.assert_close(accelerated(**call), model(**call))
    assert len(accelerated._fxmask.variants) == 2


@torch.no_grad()
def test_a_value_that_never_settles_is_named():
    model = Denoiser(("number",))
    sequence_call = {"x": torch.randn(2, 3, 4), "t": torch.tensor(900), "text": torch.randn(2, 4)}
    accelerated = accelerate(model, sequence_call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(12):
            model.number = 1.0 + k
            torch.testing.assert_close(accelerated(**sequence_call), model(**sequence_call))
    assert [str(w.message) for w in caught if "number has changed 6 times (number: " in str(w.message)]
    assert len(accelerated._fxmask.variants) <= 8


@torch.no_grad()
def test_what_is_set_on_the_accelerated_model_reaches_the_original():
    model = Denoiser(("number", "strengths"))
    call = {"x": torch.randn(2, 3, 4), "t": torch.tensor(900), "text": torch.randn(2, 4)}
    accelerated = accelerate(model, call)
    accelerated.number = 3.0
    accelerated.strengths[0] = 2.0
    assert model.number == 3.0
    torch.testing.assert_close(accelerated(**call), model(**call))
    del accelerated.number
    assert not hasattr(model, "number")


class Deep(TinyTransformer):
    """Too large for all of its state to be looked at in each step."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.array = numpy.ones(2)
        self.strengths = {"a": 1.0}

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x * float(self.array[0]) * self.strengths["a"], t)


@pytest.mark.parametrize("what", ["block", "array", "entry", "attribute"])
@torch.no_grad()
def test_a_change_near_the_model_is_seen_in_the_middle_of_a_run(what):
    torch.manual_seed(0)
    model, calls = Deep().eval(), make_calls()
    accelerated = accelerate(model, calls[0])
    assert not accelerated.program.state.held._small
    for step, call in enumerate(calls):
        if step == 2:
            if what == "block":
                model.layers[7] = copy.deepcopy(model.layers[3])
            elif what == "array":
                model.array[0] = 0.5
            elif what == "entry":
                model.strengths["a"] = 0.5
            else:
                model.inp = torch.nn.Linear(4, 8)
        torch.testing.assert_close(accelerated(**call), model(**call))


@pytest.mark.parametrize("where", ["", "layers.0", "layers.1.mlp.0"])
@torch.no_grad()
def test_a_hook_runs_and_the_warning_names_it(where):
    torch.manual_seed(0)
    model, call = TinyTransformer().eval(), make_calls()[0]
    accelerated = accelerate(model, call)
    accelerated(**call)
    seen = []
    handle = model.get_submodule(where).register_forward_hook(lambda module, args, output: seen.append(1) or output * 0.5)
    with pytest.warns(UserWarning, match="a hook was added after capture") as caught:
        got = accelerated(**call)
    assert where in str(caught[0].message)
    assert caught[0].filename == __file__
    assert seen
    torch.testing.assert_close(got, model(**call))
    handle.remove()
    seen.clear()
    torch.testing.assert_close(accelerated(**call), model(**call))
    assert not seen


@torch.no_grad()
def test_hooks_at_capture_are_named():
    model, call = TinyTransformer().eval(), make_calls()[0]
    kept = []
    handle = model.layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with pytest.warns(UserWarning, match=r"has forward hooks \(layers.0 forward hook .*lambda"):
        accelerated = accelerate(model, call)
    assert not kept, "what hooks did during capture is undone"
    handle.remove()
    torch.testing.assert_close(accelerated(**call), model(**call))


@torch.no_grad()
def test_a_global_hook_is_seen():
    model, call = TinyTransformer().eval(), make_calls()[0]
    accelerated = accelerate(model, call)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.warns(UserWarning, match="hook was added"):
            accelerated(**call)
    finally:
        handle.remove()


@torch.no_grad()
def test_counting_flops_is_no_change():
    """PyTorch's counter registers hooks on all modules."""
    from torch.utils.flop_counter import FlopCounterMode

    model, calls = TinyTransformer().eval(), make_calls()
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
    flops = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            accelerated(**call)
        flops.append(counter.get_total_flops())
    assert flops[1] < flops[0] / 2


@torch.no_grad()
def test_functions_of_torch_that_are_replaced_are_seen(monkeypatch):
    """As attention libraries do: ``F.scaled_dot_product_attention = theirs``."""
    model, call = TinyTransformer().eval(), make_calls()[0]
    accelerated = accelerate(model, call)
    accelerated(**call)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: v * 2)
    torch.testing.assert_close(accelerated(**call), model(**call))


@torch.no_grad()
def test_a_forward_that_is_replaced_is_seen(monkeypatch):
    model, call = TinyTransformer().eval(), make_calls()[0]
    accelerated = accelerate(model, call)
    accelerated(**call)
    layer = type(model.layers[0])
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, time: 2 * plain(self, x, time))
    torch.testing.assert_close(accelerated(**call), model(**call))
    monkeypatch.undo()
    model.head.forward = lambda x: torch.nn.functional.linear(x, model.head.weight)
    torch.testing.assert_close(accelerated(**call), model(**call))


@torch.no_grad()
def test_settings_of_built_in_layers_are_seen():
    """Seamless textures: every convolution's padding is made circular after loading."""
    model = tiny_unet()
    call = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(900)}
    accelerated = accelerate(model, call)
    accelerated(**call)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    with pytest.warns(UserWarning, match=r"conv_in.padding_mode: 'zeros' -> 'circular'.* accelerate the model again"):
        got = accelerated(**call).sample
    torch.testing.assert_close(got, model(**call).sample)


@torch.no_grad()
def test_adapters_are_seen():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    torch.manual_seed(0)
    model, calls = TinyTransformer().eval(), make_calls()
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, fxmask.Mask.ones(program, TIMESTEPS)), backend="eager")
    masked = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")

    def check():
        for call in calls:
            torch.testing.assert_close(accelerated(**call), model(**call))
        fresh = fxmask.capture(model, calls[0])
        wanted = fxmask.reference.run(fresh, every_other(fresh), calls)
        got = [masked(**call) for call in calls]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))

    check()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=False), model)
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    check()
    for layer in layers:
        layer.set_scale("default", 0.1)
    check()
    for layer in layers:
        layer.enable_adapters(False)
    check()
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    check()


@torch.no_grad()
def test_adapter_strength_may_change_in_the_middle_of_a_run(tables):
    torch.manual_seed(0)
    model, calls = TinyTransformer().eval(), make_calls()
    accelerated = accelerate(model, calls[0])
    with accelerated.generation():
        for k, call in enumerate(calls):
            if k == 2:
                model.embed.weight.mul_(-3.0)  # the table of the timestep is made of it
            torch.testing.assert_close(accelerated(**call), model(**call))


@torch.no_grad()
def test_the_type_of_a_weight_is_part_of_a_graph():
    """The parameter stays the object that it was; compiled code would read the memory of the new type as the old one."""

    class Scaled(TinyTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.linspace(1, 2, 4))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t) * self.gain

    torch.manual_seed(0)
    model, calls = Scaled().eval(), make_calls()
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, fxmask.Mask.ones(program, TIMESTEPS)), backend="inductor")
    torch.testing.assert_close(accelerated(**calls[0]), model(**calls[0]))
    model.gain.data = model.gain.data.double()
    for call in calls[:2]:
        got, wanted = accelerated(**call), model(**call)
        assert wanted.dtype == torch.float64  # though most of it was computed in float32
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_conditioning_overwritten_in_inference_mode():
    """A static buffer for prompts, written to by a server; nobody counts changes of such tensors."""
    model = Denoiser(())
    with torch.inference_mode():
        text = torch.randn(2, 4)
    call = {"x": torch.randn(2, 3, 4), "t": torch.tensor(900), "text": text.clone()}
    accelerated = accelerate(model, call)
    for k, t in enumerate(TIMESTEPS):
        if k == 2:
            with torch.inference_mode():
                text.copy_(torch.randn(2, 4))
        now = {**call, "t": torch.tensor(t), "text": text}
        torch.testing.assert_close(accelerated(**now), model(**now))


def test_a_snapshot_is_equal_to_the_next_one():
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    model = UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=4, **blocks)
    before, after = Snapshot.of(model), Snapshot.of(model)
    assert before.held.same()
    assert before.held.same_in_step()
    assert not before.changes(after)
    model.set_attn_processor(type(next(iter(model.attn_processors.values())))())
    assert not before.held.same(), "other objects"
    assert not before.changes(Snapshot.of(model)), "but equal ones"


def test_capture_leaves_the_model_and_the_arguments_alone():
    class Careless(TinyTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.latest, self.seen = 0, None, []

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.latest = x
            self.seen.append(x)
            return super().forward(x, t)

    model, call = Careless().eval(), make_calls()[0]
    accelerate(model, call)
    assert (model.count, model.latest, model.seen) == (0, None, [])


@pytest.mark.parametrize("how", ["timestep", "sample"])
def test_a_model_that_writes_to_its_arguments_is_refused_and_they_are_not_changed(how):
    class Writes(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if how == "timestep":
                t *= 10
            else:
                x.mul_(0.5)
            return super().forward(x, t)

    call = {"x": torch.randn(2, 6, 4), "t": torch.full((2,), 0.5)}
    before = {name: x.clone() for name, x in call.items()}
    with pytest.raises(fxmask.CaptureError, match=r"writes to its arguments \['[tx]'\] in place"):
        fxmask.capture(Writes().eval(), call)
    assert all(torch.equal(call[name], before[name]) for name in call)


def test_no_timestep_is_tried_beyond_a_table():
    """On a GPU an index beyond a table ends the process."""

    class Table(TinyTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.times = torch.nn.Embedding(100, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t) + self.times(self.checked(t)).reshape(-1, 1, 4)

        def checked(self, t: torch.Tensor) -> torch.Tensor:
            if type(t) is torch.Tensor and not torch.compiler.is_exporting():
                asked[:] = min(asked[0], int(t.min())), max(asked[1], int(t.max()))
            return t

    asked = numpy.array([1000, -1])  # a list would be put back after each call
    fxmask.capture(Table().eval(), {"x": torch.randn(2, 6, 4), "t": torch.tensor(90)})
    assert tuple(asked) == (0, 90)


def test_state_that_a_run_keeps_for_the_next_is_refused():
    class Residual(TinyTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.before = None

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            y = super().forward(x, t)
            result = y if self.before is None else y + 0.1 * self.before
            self.before = y
            return result

    with pytest.raises(fxmask.CaptureError, match=r"keeps state between calls in \['before'\]"):
        fxmask.capture(Residual().eval(), make_calls()[0])


@torch.no_grad()
def test_text_that_a_model_keeps_until_it_is_cleared():
    class Keeps(TinyTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kept = torch.nn.Embedding(10, 4), None

        def clear_cache(self) -> None:
            self.kept = None

        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            if self.kept is None:
                self.kept = self.words(text).mean(1, keepdim=True)
            return super().forward(x, t) + self.kept

    torch.manual_seed(0)
    model = Keeps().eval()
    call = {**make_calls()[0], "text": torch.randint(10, (2, 5))}
    accelerated = accelerate(model, call)
    for _ in range(3):
        now = {**call, "text": torch.randint(10, (2, 5))}
        accelerated.clear_cache()
        got = accelerated(**now)
        model.clear_cache()
        torch.testing.assert_close(got, model(**now))


@torch.no_grad()
def test_threads_see_a_change_once():
    model = Denoiser(("number",))
    call = {"x": torch.randn(2, 3, 4), "t": torch.tensor(900), "text": torch.randn(2, 4)}
    accelerated = accelerate(model, call)
    model.number = 0.5
    wanted, got = model(**call), []

    def work():
        with torch.no_grad():
            got.append(accelerated(**call))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(x, wanted) for x in got)
    assert len(got) == 4
    assert len(accelerated._fxmask.variants) == 2


def test_numpy_state_is_compared_by_value():
    model = Denoiser(("array",))
    snapshot = Snapshot.of(model)
    model.array = model.array.copy()
    assert not snapshot.changes(Snapshot.of(model))
    model.array[0] = 7
    (change,) = snapshot.changes(Snapshot.of(model))
    assert change.path == "array"
    assert isinstance(model.array, numpy.ndarray)


def test_the_scheduler_is_not_part_of_it():
    """What a model merely holds and its forward never reads does not matter."""
    model, call = TinyTransformer().eval(), make_calls()[0]
    model.note = "first"
    model.scheduler = ddim()
    snapshot = Snapshot.of(model)
    model.note = "second"
    model.scheduler.set_timesteps(7)
    assert not snapshot.changes(Snapshot.of(model))
    assert call
