"""Random denoisers: from an integer, the source text of a standalone program with a small, awkward denoiser in it.

``write_source(seed)`` gives a file that defines ``Denoiser`` (weights made from the seed), ``make_calls`` (the calls of a
sampling run, lane by lane) and ``ROLES``. ``load`` executes it. A failing test prints the file, so that it can be pasted
and run; ``python tests/denoisers.py SEED [STATEMENTS]`` prints it too.

Statement ``k`` of a denoiser depends on the seed and on ``k`` alone, so fewer statements are a prefix of the same program:
that is how Hypothesis shrinks one.
"""

from __future__ import annotations

import argparse
import functools
import linecache
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import fxmask

WIDTH = 8
TOKENS = 4  # length of the image stream in token form
TEXT = 3  # length of the text stream

HEADER = '''\
"""Random denoiser {seed} with {statements} statements."""

import collections
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

SEED = {seed}
BATCH = {batch}
DTYPE = torch.{dtype}
ROLES = {roles}
LANES = {lanes}  # whether lanes can be told apart by their conditioning


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    extra: object = None


Pair = collections.namedtuple("Pair", ["sample", "extra"])


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
{init}
        self.to(DTYPE){after}

    def forward({parameters}):
{forward}


def make_calls(steps, lanes=1):
    """Arguments of the denoiser: a list of steps, each a list of lanes, each a dict."""
    generator = torch.Generator().manual_seed(SEED)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DTYPE)

    held = []
    for lane in range(lanes):
        held.append({held})
    calls = []
    for i in range(steps):
        t = 900 - 100 * i
        calls.append([{{"sample": randn({shape}){changing}, **held[lane]}} for lane in range(lanes)])
    return calls
'''


@dataclass
class Writer:
    """The program under construction.

    Attributes:
        rng: of the statement that is being written.
        image: whether the sample is ``[B, C, H, W]``; else it is ``[B, N, C]``.
        smooth: leave out what has kinks, for finite differences.
        init: lines of ``__init__`` that make modules and buffers; ``after`` the ones that follow ``self.to``.
        body: lines of ``forward``.
        x: variable of the stream, ``x_size`` in height; 0 in token form.
        size: height of what is being written.
        old: earlier values of the stream, as (variable, size).
        text: variable of the text stream, once something uses it.
        side: the side inputs in use.
        todo: features of the statements that are still to be written.
    """

    seed: int
    image: bool
    double: bool
    smooth: bool
    rng: random.Random = field(default_factory=random.Random)
    init: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    x: str = "x"
    size: int = 0
    x_size: int = 0
    old: list[tuple[str, int]] = field(default_factory=list)
    text: str | None = None
    side: set[str] = field(default_factory=set)
    todo: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def let(self, expression: str) -> str:
        """Assign an expression to a new variable."""
        self.count += 1
        self.body.append(f"v{self.count} = {expression}")
        return f"v{self.count}"

    def module(self, expression: str) -> str:
        """A new submodule or buffer."""
        self.count += 1
        name = f"m{self.count}"
        if expression.startswith("torch."):
            self.init.append(f'self.register_buffer("{name}", {expression})')
        else:
            self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def maybe(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance

    def stream(self, expression: str) -> None:
        """The next value of the stream."""
        self.old.append((self.x, self.x_size))
        self.x, self.x_size = self.let(expression), self.size

    def layer(self, width_in: int = WIDTH, width_out: int = WIDTH) -> str:
        """A submodule that does work on the stream."""
        if self.image:
            kernel = self.rng.choice(["3, padding=1", "1"])
            return self.module(f"nn.Conv2d({width_in}, {width_out}, {kernel})")
        return self.module(f"nn.Linear({width_in}, {width_out})")

    def act(self, value: str) -> str:
        smooth = ["F.silu({})", "torch.tanh({})", "F.gelu({})", "{}.sigmoid()"]
        return self.rng.choice(smooth if self.smooth else [*smooth, "F.relu({})"]).format(value)

    def norm(self, value: str) -> str:
        if self.maybe(0.3):
            return value
        norm = f"nn.GroupNorm(2, {WIDTH})" if self.image else f"nn.LayerNorm({WIDTH})"
        return f"{self.module(norm)}({value})"

    def branch(self, value: str) -> str:
        """A variable with a function of ``value`` that costs something."""
        value = self.let(f"{self.layer()}({self.norm(value)})")
        return self.let(f"{self.layer()}({self.act(value)})") if self.maybe() else value

    def time(self, times: int = 1) -> str:
        """What the timestep embedding says, in a shape that broadcasts over the stream."""
        value = self.let(f"{self.module(f'nn.Linear({WIDTH}, {WIDTH * times})')}({self.act('temb')})")
        return f"{value}[:, :, None, None]" if self.image else f"{value}[:, None]"

    def tokens(self, value: str) -> str:
        return self.let(f"{value}.flatten(2).transpose(1, 2)") if self.image else value

    def untokens(self, value: str) -> str:
        return f"{value}.transpose(1, 2).unflatten(2, ({self.size}, {self.size}))" if self.image else value

    def use_text(self) -> str:
        if self.text is None:
            self.side.add("text")
            self.text = self.let(f"{self.module(f'nn.Linear({WIDTH}, {WIDTH})')}(text)")
        return self.text

    def earlier(self) -> str:
        """An earlier value of the stream in its present shape, or the present one."""
        return self.rng.choice([name for name, size in self.old if size == self.size] or [self.x])

    @property
    def channels(self) -> str:
        return "1" if self.image else "-1"

    def attend(self, queries: str, context: str, keep: str | None = None) -> str:
        """Two-headed attention of ``[B, N, W]`` on ``[B, M, W]``."""
        q = self.let(f"{self.module(f'nn.Linear({WIDTH}, {WIDTH})')}({queries})")
        k = self.let(f"{self.module(f'nn.Linear({WIDTH}, {2 * WIDTH})')}({context})")
        k, v = (self.let(f"{k}.chunk(2, -1)[{i}]") for i in range(2))
        q, k, v = (self.let(f"{name}.unflatten(-1, (2, {WIDTH // 2})).transpose(1, 2)") for name in (q, k, v))
        if keep is not None:
            mixed = self.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={keep}[:, None, None])")
        elif self.maybe():
            mixed = self.let(f"F.scaled_dot_product_attention({q}, {k}, {v})")
        else:
            weights = self.let(f"({q} @ {k}.transpose(-1, -2) * 0.5).softmax(-1)")
            mixed = self.let(f"{weights} @ {v}")
        out = self.module(f"nn.Linear({WIDTH}, {WIDTH})")
        return self.let(f"{out}({mixed}.transpose(1, 2).flatten(2))")

    def write_next(self) -> None:
        """Write the next statement."""
        index, feature = self.todo.pop(0)
        outer, self.rng = self.rng, random.Random(f"{self.seed}/{index}")
        FEATURES[feature](self)
        self.rng = outer


Feature = Callable[[Writer], None]
FEATURES: dict[str, Feature] = {}
KINKED = {"keep", "swap"}  # not differentiable, or a test of a boolean


def feature(write: Feature) -> Feature:
    FEATURES[write.__name__] = write
    return write


@feature
def chain(w: Writer) -> None:
    for _ in range(w.rng.randint(1, 2)):
        w.stream(w.act(f"{w.layer()}({w.x})"))


@feature
def residual(w: Writer) -> None:
    w.stream(f"{w.x} + {w.branch(w.x)}")


@feature
def nested(w: Writer) -> None:
    """A branch that has a branch inside."""
    f = w.branch(w.x)
    g = w.branch(f)
    w.stream(f"{w.x} + ({f} + {g})")


@feature
def gated(w: Writer) -> None:
    gate = w.time()
    f = w.branch(w.x)
    w.stream(w.rng.choice(["{x} + {g} * {f}", "torch.addcmul({x}, {f}, {g})", "{x} - {f} * {g}"]).format(x=w.x, f=f, g=gate))


@feature
def modulated(w: Writer) -> None:
    """Adaptive normalisation: shift, scale and gate from one product."""
    whole = w.let(w.time(3))
    shift, scale, gate = (w.let(f"{whole}.chunk(3, {w.channels})[{i}]") for i in range(3))
    h = w.let(f"{w.norm(w.x)} * (1 + {scale}) + {shift}")
    w.stream(f"{w.x} + {gate} * {w.branch(h)}")


@feature
def attention(w: Writer) -> None:
    tokens = w.tokens(w.norm(w.x) if not w.image else w.let(w.norm(w.x)))
    w.stream(f"{w.x} + {w.untokens(w.attend(tokens, tokens))}")


@feature
def cross_attention(w: Writer) -> None:
    w.stream(f"{w.x} + {w.untokens(w.attend(w.tokens(w.x), w.use_text()))}")


@feature
def joint_attention(w: Writer) -> None:
    """Both streams attend to both, and both are updated."""
    text = w.use_text()
    tokens = w.tokens(w.x)
    length = w.let(f"{text}.shape[1]")
    both = w.let(f"torch.cat([{text}, {tokens}], 1)")
    mixed = w.attend(both, both)
    gate = w.time() if w.maybe() else "0.5"
    w.stream(f"{w.x} + {w.untokens(f'{mixed}[:, {length}:]')} * {gate}")
    w.text = w.let(f"{text} + {mixed}[:, :{length}]")
    if w.maybe():
        w.text = w.let(f"{w.text} + {w.module(f'nn.Linear({WIDTH}, {WIDTH})')}({w.text})")


@feature
def parallel(w: Writer) -> None:
    """Attention and MLP side by side."""
    h = w.let(w.norm(w.x))
    tokens = w.tokens(h)
    first = w.untokens(w.attend(tokens, tokens))
    w.stream(f"{w.x} + {first} + {w.branch(h)}")


@feature
def concat_skip(w: Writer) -> None:
    """A concatenation with an earlier value, with or without a shortcut beside the branch."""
    both = w.let(f"torch.cat([{w.x}, {w.earlier()}], {w.channels})")
    f = w.let(w.act(f"{w.layer(2 * WIDTH)}({both})"))
    if w.maybe():
        f = w.let(f"{w.layer()}({f}) + {w.layer(2 * WIDTH)}({both})")
    w.stream(f)


@feature
def long_skip(w: Writer) -> None:
    w.stream(f"{w.branch(w.x)} + {w.earlier()}")


@feature
def unet(w: Writer) -> None:
    """Down, something inside, up, and a concatenation with what was before."""
    if not w.image or w.size < 2:
        return residual(w)
    skip, size = w.x, w.size
    w.size = size // 2
    w.stream(w.rng.choice([f"{w.module(f'nn.Conv2d({WIDTH}, {WIDTH}, 3, 2, 1)')}({w.x})", f"F.avg_pool2d({w.x}, 2)"]))
    for _ in range(min(len(w.todo), w.rng.randint(1, 2))):
        w.write_next()
    w.size = size
    if w.maybe():
        w.stream(f"{w.module(f'nn.ConvTranspose2d({WIDTH}, {WIDTH}, 2, 2)')}({w.x})")
    else:
        w.stream(f'{w.layer()}(F.interpolate({w.x}, scale_factor=2.0, mode="nearest"))')
    both = w.let(f"torch.cat([{w.x}, {skip}], 1)")
    f = w.let(f"{w.layer()}({w.act(f'{w.layer(2 * WIDTH)}({both})')})")
    shortcut = w.module(f"nn.Conv2d({2 * WIDTH}, {WIDTH}, 1)")
    return w.stream(f"{shortcut}({both}) + {f}")


@feature
def in_place(w: Writer) -> None:
    """A value, or a view of one, is changed in place before or after it was read."""
    f = w.branch(w.x)
    y = w.let(f"{w.x} + {f}") if w.maybe() else None
    last = "[..., ::2]"
    w.body.append(
        w.rng.choice(
            [
                f"{f}.add_({w.time()})",
                f"{f}.mul_(0.5)",
                f"{f}.transpose(1, 2).mul_(-0.75)",
                f"{f}{last}.add_(1.0)",
                f"{f}.flatten(1)[:, 1::2].mul_({w.module('torch.randn(1)')})",
                f"{f}[:, :1] = {w.x}[:, :1]",
                f"{f}.copy_({w.x}.flip(1))",
            ]
        )
    )
    w.stream(f"{y or w.x} + {f}")
    if w.maybe(0.3):  # the stream itself, whose earlier readers have read
        w.body.append(f"{w.x}.mul_(0.9)")


@feature
def read_twice(w: Writer) -> None:
    """A value that several blocks read."""
    f = w.branch(w.x)
    w.stream(f"{w.x} + {f}")
    for _ in range(w.rng.randint(1, 2)):
        w.stream(f"{w.x} + {w.branch(f)}")
    if w.maybe():
        w.stream(f"{w.x} + 0.25 * {f}")


@feature
def two_outputs(w: Writer) -> None:
    """One product, cut in two, each half read elsewhere."""
    whole = w.let(f"{w.layer(WIDTH, 2 * WIDTH)}({w.x})")
    first, second = (w.let(f"{whole}.chunk(2, {w.channels})[{i}]") for i in range(2))
    w.stream(f"{w.x} + {first}")
    if w.maybe():
        w.stream(f"{w.x} + {w.branch(w.x)}")
    w.stream(f"{w.x} * {second}.sigmoid() + {second}")


@feature
def shared(w: Writer) -> None:
    """One submodule, applied twice."""
    layer = w.layer()
    w.stream(f"{w.x} + {layer}({w.x})")
    if w.maybe():
        w.stream(w.act(w.x))
    w.stream(f"{w.x} + {layer}({w.act(w.x)})")


@feature
def views(w: Writer) -> None:
    """Mixing along another dimension, between transposes."""
    length = w.size if w.image else TOKENS
    layer = w.module(f"nn.Linear({length}, {length})")
    turned = w.let(f"{w.x}.transpose(-1, -2)")
    w.stream(f"{w.x} + {layer}({turned}).transpose(-1, -2)")
    if w.maybe() and not w.image:
        parts = w.let(f"{w.x}.unbind(1)")
        w.stream(f"torch.stack([{parts}[k] for k in (1, 0, 3, 2)], 1)")


@feature
def expand(w: Writer) -> None:
    """A summary of the stream, expanded back over it."""
    summary = w.let(f"{w.x}.mean(1, keepdim=True)")
    f = w.let(f"{w.layer()}({summary}.expand_as({w.x}) + {w.x})")
    w.stream(f"{w.x} + {f} + {summary}.expand(-1, {w.x}.shape[1], {'-1, -1' if w.image else '-1'})")


@feature
def buffers(w: Writer) -> None:
    shape = f"{WIDTH}, {w.size}, {w.size}" if w.image else f"{TOKENS}, {WIDTH}"
    table = w.module(f"torch.randn(1, {shape})")
    w.stream(f"{w.branch(w.x)} + {w.x} * {w.module('torch.rand(1)')} + {table}")


@feature
def label(w: Writer) -> None:
    """An integer side input."""
    w.side.add("label")
    row = w.let(f"{w.module(f'nn.Embedding(5, {WIDTH})')}(label)")
    row = f"{row}[:, :, None, None]" if w.image else f"{row}[:, None]"
    w.stream(f"{w.x} + {w.branch(w.x)} * {row}")


@feature
def keep(w: Writer) -> None:
    """A boolean side input: some samples, or some tokens, keep the old value."""
    w.side.add("keep")
    if not w.image and w.maybe():
        return w.stream(f"{w.x} + {w.attend(w.x, w.x, 'keep')}")
    chosen = "keep[:, :1, None, None]" if w.image else "keep[:, :, None]"
    return w.stream(f"torch.where({chosen}, {w.branch(w.x)}, {w.x})")


@feature
def swap(w: Writer) -> None:
    """A condition on the sample itself, and a comparison that becomes a number."""
    f = w.branch(w.x)
    above = w.let(f"{f} > {w.x}")
    w.stream(f"torch.where({above}, {f}, {w.x}) + {above}.to({w.x}.dtype).mean() * {f}.amax()")


@feature
def added(w: Writer) -> None:
    """Conditioning inside a dict argument, and a number among the arguments."""
    w.side |= {"added", "strength"}
    bias = w.let(f'{w.module(f"nn.Linear({WIDTH}, {WIDTH})")}(added["bias"]) * strength')
    bias = f"{bias}[:, :, None, None]" if w.image else f"{bias}[:, None]"
    w.stream(f"{w.x} + {w.branch(f'({w.x} + {bias})')}")


@feature
def control(w: Writer) -> None:
    """A side input that changes at every step."""
    w.side.add("control")
    w.stream(f"{w.x} + {w.branch(w.x)}")
    if not w.image or w.size == 4:
        w.stream(f"{w.x} + control")


@feature
def precise(w: Writer) -> None:
    """A part in double precision."""
    if not w.double:
        return residual(w)
    layer = w.layer()
    w.after.append(f"{layer}.double()")
    f = w.let(f"{layer}({w.x}.double())")
    return w.stream(f"{w.x} + {f}.to({w.x}.dtype)")


@feature
def unused(w: Writer) -> None:
    """An input, a submodule and a value that nothing reads."""
    w.side.add("unused")
    w.branch(w.x)
    residual(w)


OUTPUTS = ("tensor", "tensor", "tuple", "dict", "dataclass", "named", "return_dict", "list")


def _output(w: Writer, bare: bool) -> list[str]:
    """The end of ``forward``: the prediction and what else the denoiser returns."""
    rng = w.rng
    if bare:  # the stream itself is what is returned
        out = w.x
    else:
        layer = f"nn.Conv2d({WIDTH}, 4, 3, padding=1)" if w.image else f"nn.Linear({WIDTH}, {WIDTH})"
        out = w.let(f"{w.module(layer)}({w.norm(w.x)})")
        if rng.random() < 0.3:
            out = w.let(f"sample - {out}") if rng.random() < 0.5 else w.let(f"{out}.transpose(-1, -2)")
    extras = [w.x, w.earlier(), out, f"{out}.transpose(1, 2)", f"{w.x}[:, :1]", "temb", "sample", "None"]
    extra = rng.choice(extras)
    form = rng.choice(OUTPUTS)
    lines = {
        "tensor": [f"return {out}"],
        "tuple": [f"return {out}, {extra}"],
        "list": [f"return [{extra if extra != 'None' else 'temb'}, {out}]"],
        "dict": [f'return {{"sample": {out}, "extra": {extra}}}'],
        "dataclass": [f"return Output({out}, {extra})"],
        "named": [f"return Pair({out}, {extra})"],
        "return_dict": ["if not return_dict:", f"    return ({out},)", f"return Output({out})"],
    }[form]
    if form == "return_dict":
        w.side.add("return_dict")
    return lines


@dataclass(frozen=True)
class Options:
    """Sizes and switches of a random denoiser; ``None`` lets the seed decide.

    Attributes:
        statements: how many statements ``forward`` has.
        dtype: of weights and sample.
        smooth: differentiable throughout, for finite differences.
    """

    statements: int | None = None
    dtype: str | None = None
    smooth: bool = False


def write_source(seed: int, options: Options = Options()) -> str:
    """Source text of the program of random denoiser ``seed``."""
    rng = random.Random(f"denoiser {seed}")
    image = rng.random() < 0.5
    statements = rng.randint(2, 6)
    dtype = rng.choices(["float32", "float64", "bfloat16"], [8, 1, 1])[0]
    timed = rng.random() < 0.93
    timestep = rng.choice(["torch.tensor(t)", "torch.full((BATCH,), t)", "t", "float(t)", "torch.tensor(float(t))"])
    batch = rng.choice([1, 2, 2, 3])
    bare, shape = rng.random() < 0.3, f"BATCH, {TOKENS}, {WIDTH}"
    statements = statements if options.statements is None else options.statements
    dtype = options.dtype or dtype
    w = Writer(seed, image, dtype != "bfloat16", options.smooth, size=4 * image, x_size=4 * image)
    if image:
        shape = f"BATCH, {WIDTH if bare else 4}, 4, 4"
    names = sorted(set(FEATURES) - (KINKED if options.smooth else set()))
    w.todo = [(k, random.Random(f"{seed}:{k}").choice(names)) for k in range(statements)]
    _begin(w, timed, bare)
    while w.todo:
        w.write_next()
    w.rng = random.Random(f"{seed}/output")
    w.body += _output(w, bare)
    return _assemble(w, statements, dtype, batch, shape, timed, timestep)


def _begin(w: Writer, timed: bool, bare: bool) -> None:
    w.init.append('self.register_buffer("frequencies", torch.tensor([0.001, 0.01, 0.1, 1.0]))')
    if timed:
        w.init.append(f"self.time = nn.Linear(8, {WIDTH})")
        w.body += [
            "if not torch.is_tensor(timestep):",
            "    timestep = torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64)",
            "angles = timestep.reshape(-1, 1) * self.frequencies",
            "temb = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(sample.dtype))",
        ]
    else:
        w.init.append(f"self.temb = nn.Parameter(torch.randn(1, {WIDTH}))")
        w.body.append("temb = self.temb * 1.0")
    entry = f"nn.Conv2d({WIDTH if bare else 4}, {WIDTH}, 3, padding=1)" if w.image else f"nn.Linear({WIDTH}, {WIDTH})"
    w.init.append(f"self.entry = {entry}")
    w.body.append("x = self.entry(sample)")


# Per side input: its parameter, its role, its value, and whether two lanes differ in it.
SIDE_INPUTS = {
    "text": ("text", "conditioning", f"randn(BATCH, {TEXT}, {WIDTH})", True),
    "added": ("added", "conditioning", f'{{"bias": randn(BATCH, {WIDTH})}}', True),
    "label": ("label", "conditioning", "(torch.arange(BATCH) + lane) % 5", True),
    "keep": ("keep", "conditioning", f"torch.tensor([True] + [False, True, False][:{TOKENS - 1}]).expand(BATCH, -1)", False),
    "unused": ("unused=None", "conditioning", "randn(2)", False),
    "strength": ("strength=1.0", None, "0.5", False),
    "return_dict": ("return_dict=True", None, "bool(SEED % 2)", False),
    "control": ("control=None", "step", None, False),
}


def _assemble(w: Writer, statements: int, dtype: str, batch: int, shape: str, timed: bool, timestep: str) -> str:
    used = [name for name in SIDE_INPUTS if name in w.side]
    parameters = ["self", "sample", *(["timestep"] if timed else []), *(SIDE_INPUTS[name][0] for name in used)]
    held = ", ".join(f'"{name}": {SIDE_INPUTS[name][2]}' for name in used if SIDE_INPUTS[name][2])
    changing = f', "timestep": {timestep}' if timed else ""
    if "control" in used:
        changing += f', "control": randn({_control_shape(w)})'
    return HEADER.format(
        seed=w.seed,
        statements=statements,
        batch=batch,
        dtype=dtype,
        roles={name: SIDE_INPUTS[name][1] for name in used if SIDE_INPUTS[name][1]},
        lanes=any(SIDE_INPUTS[name][3] for name in used),
        init="\n".join(" " * 12 + line for line in w.init),
        after="".join(f"\n        {line}" for line in w.after),
        parameters=", ".join(parameters),
        forward="\n".join(" " * 8 + line for line in w.body),
        held=f"{{{held}}}",
        shape=shape,
        changing=changing,
    )


def _control_shape(w: Writer) -> str:
    return f"BATCH, {WIDTH}, 4, 4" if w.image else f"BATCH, {TOKENS}, {WIDTH}"


@dataclass(frozen=True, eq=False)
class Denoiser:
    """An executed program.

    Attributes:
        source: its text.
        model: in eval mode.
        make_calls: ``make_calls(steps, lanes)`` gives the arguments of a run.
        roles: as ``fxmask.capture`` takes them.
        lanes: whether lanes can be told apart.
    """

    source: str
    model: torch.nn.Module
    make_calls: Callable[..., list[list[dict[str, Any]]]]
    roles: Mapping[str, str]
    lanes: bool

    @functools.cached_property
    def program(self) -> fxmask.Program:
        """The captured denoiser."""
        return fxmask.capture(self.model, self.make_calls(1)[0][0], roles=self.roles)

    def timesteps(self, steps: int) -> tuple[float, ...]:
        """As ``make_calls`` gives them."""
        return tuple(900.0 - 100 * i for i in range(steps))


def load(source: str) -> Denoiser:
    """Execute the text of a program; tracebacks show its lines."""
    filename = f"<denoiser {abs(hash(source))}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    names: dict[str, Any] = {"__name__": "random_denoiser"}
    exec(compile(source, filename, "exec", dont_inherit=True), names)
    model = names["Denoiser"]().eval()
    return Denoiser(source, model, names["make_calls"], names["ROLES"], names["LANES"])


@functools.lru_cache(maxsize=256)
def denoiser(seed: int, options: Options = Options()) -> Denoiser:
    """Random denoiser ``seed``, captured once however many masks it is tried with."""
    return load(write_source(seed, options))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the program of a random denoiser.")
    parser.add_argument("seed", type=int)
    parser.add_argument("statements", type=int, nargs="?")
    given = parser.parse_args()
    print(write_source(given.seed, Options(given.statements)))
