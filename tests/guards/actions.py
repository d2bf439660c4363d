"""Random Python state, random user actions: is the accelerated model ever silently wrong?

    python tests/guards/actions.py [--sequences N] [--first SEED] [--share N] [--backend eager]

One sequence: a denoiser whose ``forward`` reads some state (attributes, containers, objects, closures, globals, hooks,
plain tensors), and an accelerated twin, under ``Mask.ones`` or under a mask; then a few runs, with user actions between and
inside of them. At every call

    a twin under Mask.ones    equals the model;
    one under a mask          equals a freshly captured and compiled one, or the model.

A failure prints the seed and what was done. The tests run a few sequences, this command as many as you like.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fxmask

WIDTH = 4
TIMESTEPS = (900.0, 600.0, 300.0)
VALUES = (1.0, 0.5, -2.0)
STRENGTH = 1.0  # a global that a denoiser reads


@dataclasses.dataclass
class Settings:
    scale: float = 1.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Processor:
    """An attention processor: an object that is called."""

    def __init__(self) -> None:
        self.scale = [1.0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale[0]


class OtherProcessor(Processor):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return -x * self.scale[0]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x + self.gate(time).unsqueeze(1) * self.mlp(x)


@dataclasses.dataclass
class Extra:
    """An argument that is no tensor, with a tensor inside."""

    shift: torch.Tensor
    factor: float = 1.0


class Denoiser(torch.nn.Module):
    """Reads one kind of state per name in ``features``."""

    share = 1.0  # a class attribute

    def __init__(self, features: tuple[str, ...]) -> None:
        super().__init__()
        self.features = features
        self.embed = torch.nn.Linear(1, WIDTH)
        self.text = torch.nn.Linear(WIDTH, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
        self.number = 1.0
        self.flag = True
        self.strengths = [1.0]
        self.by_name = {"a": {"b": 1.0}}
        self.settings = Settings()
        self.slotted = Slotted()
        self.processor = Processor()
        self.shift = torch.zeros(WIDTH)
        self.tensors = {"shift": torch.zeros(WIDTH)}
        self.array = numpy.ones(WIDTH, dtype=numpy.float32)
        self.aside = [torch.nn.Linear(WIDTH, WIDTH)]  # no submodule
        self.act = make_scaler(1.0)
        self.kept: Any = None
        self.register_buffer("table", torch.ones(WIDTH), persistent=False)
        self.eval()

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, extra: Any = None, mode: float = 1.0
    ) -> torch.Tensor:
        time = self.embed(t.reshape(-1, 1).to(x.dtype) / 1000) + self.text(text)
        for layer in self.layers:
            x = layer(x, time)
        for feature in self.features:
            x = getattr(self, f"read_{feature}")(x)
        if extra is not None:
            x = x * extra.factor + extra.shift
        return x * mode

    def read_number(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.number

    def read_flag(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.flag else -x

    def read_strengths(self, x: torch.Tensor) -> torch.Tensor:
        return x * sum(self.strengths)

    def read_by_name(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by_name["a"]["b"]

    def read_settings(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.settings.scale

    def read_slotted(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.slotted.scale

    def read_processor(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(x)

    def read_shift(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift.to(x.dtype)

    def read_tensors(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.tensors["shift"].to(x.dtype)

    def read_array(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(self.array[0])

    def read_aside(self, x: torch.Tensor) -> torch.Tensor:
        aside = self.aside[0]
        return x + torch.nn.functional.linear(x, aside.weight.to(x.dtype), aside.bias.to(x.dtype))

    def read_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)

    def read_table(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.table.to(x.dtype)

    def read_share(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.share

    def read_strength(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(x)

    def read_kept(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.embed.weight.detach().sum()  # worked out once, as text is in some denoisers
        return x * self.kept.to(x.dtype)


FEATURES = tuple(name.removeprefix("read_") for name in vars(Denoiser) if name.startswith("read_"))


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * STRENGTH


def make_scaler(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * value


@dataclasses.dataclass
class Situation:
    """What surrounds the next calls."""

    batch: int = 2
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    inference: bool = False
    grad: bool = False
    thread: bool = False
    prompt: int = 0
    steps: tuple[float, ...] = TIMESTEPS
    extra: Any = None
    mode: float = 1.0
    handles: list[Any] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if not self.grad:
                stack.enter_context(torch.inference_mode() if self.inference else torch.no_grad())
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Actions: each changes a model or a situation, and says what it did.


def set_state(model: Denoiser, now: Situation, rng: random.Random) -> str:
    """Change one of the things that the model's forward reads, in one of the ways in which people do."""
    global STRENGTH
    value, feature = rng.choice(VALUES), rng.choice(model.features)
    if feature == "number":
        model.number = value
    elif feature == "flag":
        model.flag = not model.flag
    elif feature == "strengths":
        rng.choice([lambda: model.strengths.__setitem__(0, value), lambda: setattr(model, "strengths", [value])])()
    elif feature == "by_name":
        rng.choice([lambda: model.by_name["a"].update(b=value), lambda: model.by_name.update(a={"b": value})])()
    elif feature == "settings":
        rng.choice([lambda: setattr(model.settings, "scale", value), lambda: setattr(model, "settings", Settings(value))])()
    elif feature == "slotted":
        model.slotted.scale = value
    elif feature == "processor":
        if rng.random() < 0.5:
            model.processor = rng.choice([Processor, OtherProcessor])()
        model.processor.scale[0] = value
    elif feature == "shift":
        if rng.random() < 0.5:
            model.shift = torch.full((WIDTH,), value)
        else:
            model.shift.fill_(value)
    elif feature == "tensors":
        if rng.random() < 0.5:
            model.tensors["shift"] = torch.full((WIDTH,), value)
        else:
            model.tensors["shift"].fill_(value)
    elif feature == "array":
        model.array[0] = value
    elif feature == "aside":
        if rng.random() < 0.5:
            model.aside[0] = torch.nn.Linear(WIDTH, WIDTH)
        else:
            model.aside[0].weight.data.mul_(value)
    elif feature == "act":
        model.act = make_scaler(value)
    elif feature == "table":
        if rng.random() < 0.5:
            model.table = torch.full((WIDTH,), value)
        else:
            model.table.fill_(value)
    elif feature == "share":
        Denoiser.share = value
    elif feature == "strength":
        STRENGTH = value
    elif feature == "kept":
        model.kept = None
    return f"{feature} = {value}"


def add_hook(model: Denoiser, now: Situation, rng: random.Random) -> str:
    where = rng.choice([model, model.layers[0], model.layers[1].mlp])
    now.handles.append(where.register_forward_hook(lambda module, args, output: output * 0.5))
    return f"hook on {type(where).__name__}"


def remove_hooks(model: Denoiser, now: Situation, rng: random.Random) -> str:
    for handle in now.handles:
        handle.remove()
    now.handles.clear()
    return "hooks removed"


def change_weights(model: Denoiser, now: Situation, rng: random.Random) -> str:
    weight = rng.choice(list(model.parameters()))
    how = rng.choice(["in place", "data", "state dict", "layer"])
    if how == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    elif how == "data":
        weight.data = weight.data * 1.5
    elif how == "state dict":
        model.load_state_dict({name: x * 1.1 for name, x in model.state_dict().items()})
    else:
        model.layers[0] = Layer().to(now.dtype).eval()
    return f"weights, {how}"


def change_dtype(model: Denoiser, now: Situation, rng: random.Random) -> str:
    now.dtype = torch.float64 if now.dtype == torch.float32 else torch.float32
    model.to(now.dtype)
    return f"dtype {now.dtype}"


def change_modes(model: Denoiser, now: Situation, rng: random.Random) -> str:
    name = rng.choice(["autocast", "inference", "grad", "thread"])
    setattr(now, name, not getattr(now, name))
    return f"{name} {getattr(now, name)}"


def change_default_dtype(model: Denoiser, now: Situation, rng: random.Random) -> str:
    other = torch.float64 if torch.get_default_dtype() == torch.float32 else torch.float32
    torch.set_default_dtype(other)
    return f"default dtype {other}"


def change_call(model: Denoiser, now: Situation, rng: random.Random) -> str:
    what = rng.choice(["batch", "prompt", "steps", "extra", "mode"])
    if what == "batch":
        now.batch = rng.choice([1, 2, 3])
    elif what == "prompt":
        now.prompt += 1
    elif what == "steps":
        now.steps = rng.choice([TIMESTEPS, TIMESTEPS[1:], (900.0, 700.0, 500.0, 300.0), TIMESTEPS[::-1]])
    elif what == "extra":
        now.extra = rng.choice([None, Extra(torch.full((WIDTH,), rng.choice(VALUES)), rng.choice(VALUES))])
    else:
        now.mode = rng.choice([1.0, numpy.float32(0.5), 2])
    return f"{what} changed"


ACTIONS = (set_state, set_state, set_state, add_hook, remove_hooks, change_weights, change_dtype, change_modes, change_call)


class Sequence:
    """One model, its accelerated twins, and what happens to them."""

    def __init__(self, seed: int, backend: str = "eager") -> None:
        self.rng = random.Random(seed)
        self.backend = backend
        self.log: list[str] = [f"seed {seed}"]
        torch.manual_seed(seed)
        self.model = Denoiser(tuple(self.rng.sample(FEATURES, self.rng.randint(1, 3))))
        self.log.append(f"reads {self.model.features}")
        self.now = Situation()
        self.full = self.rng.random() < 0.5
        self.twin = self.accelerated()

    def accelerated(self) -> fxmask.AcceleratedModel:
        program = fxmask.capture(self.model, self.call(0))
        mask = fxmask.Mask.ones(program, TIMESTEPS) if self.full else fxmask.policies.interval(2)(program, TIMESTEPS)
        return fxmask.compile(program, fxmask.rectify(program, mask), backend=self.backend)

    def call(self, step: int, run: int = 0) -> dict[str, Any]:
        now, dtype = self.now, self.now.dtype
        extra = now.extra and Extra(now.extra.shift.to(dtype), now.extra.factor)
        x = randn(100 * run + step, now.batch, 3, WIDTH).to(dtype)
        text = randn(now.prompt, now.batch, WIDTH).to(dtype)
        return {"x": x, "t": torch.tensor(int(now.steps[step])), "text": text, "extra": extra, "mode": now.mode}

    def act(self) -> None:
        self.log.append(self.rng.choice(ACTIONS)(self.model, self.now, self.rng))

    def run(self) -> None:
        """One run; perhaps with an action, or an error, in its middle."""
        number = len(self.log)
        length = len(self.now.steps)
        middle = self.rng.randrange(1, length) if self.rng.random() < 0.4 else None
        fails = self.rng.randrange(length) if self.rng.random() < 0.1 else None
        fresh = None
        if not self.full and middle is None and fails is None and not self.now.handles and self.rng.random() < 0.4:
            with warnings.catch_warnings(), self.now.around():
                warnings.simplefilter("ignore")
                with contextlib.suppress(fxmask.CaptureError):
                    fresh = self.accelerated()
        for step in range(length):
            if step == middle:
                self.act()
                if len(self.now.steps) != length:  # that is for the next run, of another image: the one that is abandoned here
                    self.now.prompt += 1  # could else be taken up by it, which no sequence of calls can tell (``generation()``)
                    return
            if step == fails:
                self.log.append("a call that fails")
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.twin(**{**self.call(step, number), "text": torch.zeros(7, 7)})
            self.step(step, number, fresh)

    def step(self, step: int, number: int, fresh: fxmask.AcceleratedModel | None) -> None:
        call = self.call(step, number)
        kept = self.model.kept
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = self.answer(self.twin, call)
            self.model.kept = kept  # the original may have run
        wanted = None if fresh is None else self.answer(fresh, call)
        self.model.kept = kept
        original = self.answer(self.model, call)
        self.model.kept = kept
        self.log.append(f"step {step}" + "".join(f" [{str(w.message)[:90]}]" for w in caught))
        if self.full:
            self.check("Mask.ones is not the model", got, original)
        elif wanted is not None and not close(got, original):
            self.check("the mask is not what a fresh one does", got, wanted)

    def answer(self, model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
        result: list[Any] = []

        def work() -> None:
            try:
                with self.now.around():
                    result.append(model(**call).detach())
            except Exception as error:
                result.append(error)

        if self.now.thread:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def check(self, what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        if not close(got, wanted):
            error = float((got.double() - wanted.double()).abs().max()) if got.shape == wanted.shape else float("nan")
            raise AssertionError(f"{what}, by {error:.3g} ({got.dtype}, {wanted.dtype}):\n" + "\n".join(self.log))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-4
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a.double() - b.double()).abs().max() <= tolerance * max(1e-3, float(b.double().abs().max())))


def run_sequence(seed: int, backend: str = "eager", runs: int = 3, go_on_from: Sequence | None = None) -> Sequence:
    """Run one sequence; ``AssertionError`` with everything that was done if something is silently wrong.

    Args:
        seed: of model and actions.
        backend: of the twin.
        runs: how many.
        go_on_from: another sequence, whose model and twin live on, which saves their capture.
    """
    global STRENGTH
    if go_on_from is None:
        STRENGTH, Denoiser.share = 1.0, 1.0
        torch.set_default_dtype(torch.float32)
        sequence = Sequence(seed, backend)
    else:
        sequence = go_on_from
        sequence.rng = random.Random(seed)
        sequence.log.append(f"seed {seed}")
        sequence.now.prompt += 1
        sequence.twin._fxmask.variants._values.clear()  # else nothing new is followed after a while
    for _ in range(runs):
        for _ in range(sequence.rng.randint(0, 2)):
            sequence.act()
        sequence.run()
    return sequence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--share", type=int, default=8, help="sequences that go on with one model, one after the other")
    options = parser.parse_args()
    wrong: list[int] = []
    sequence = None
    for seed in range(options.first, options.first + options.sequences):
        try:
            sequence = run_sequence(seed, options.backend, go_on_from=sequence if seed % options.share else None)
        except Exception as error:
            sequence = None
            wrong.append(seed)
            print(f"--- seed {seed}: {''.join(traceback.format_exception(error))}", flush=True)
        if (seed + 1) % 100 == 0:
            print(f"{seed + 1 - options.first} sequences, {len(wrong)} wrong", flush=True)
    print(f"{options.sequences} sequences, {len(wrong)} wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
