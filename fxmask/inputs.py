"""Example arguments for a denoiser: what can be inferred is inferred, the rest is asked for by name.

Shapes come from ``forward``'s signature, from the ``config`` keys in ``CONFIG``, and from trial: a copy of the model without
memory (fake tensors) is called with candidates, and the ones with which it gets furthest are kept. A captured graph needs
shapes only, so for that random conditioning will do; learning needs real conditioning and asks for it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxmask.calls import Signature, first_tensor
from fxmask.errors import InputError

logger = logging.getLogger(__name__)

ExampleInputs = Mapping[str, Any] | Callable[[int, torch.Generator], Mapping[str, Any]] | None

# The only `config` keys that are ever read, and what for.
CONFIG: dict[str, tuple[str, ...]] = {
    "channels": ("in_channels", "num_channels", "channels"),
    "size": ("sample_size", "image_size", "img_size"),
    "height": ("sample_height",),
    "width": ("sample_width",),
    "frames": ("sample_frames", "num_frames", "video_length"),
    "patch": ("patch_size",),
    "text": (
        "joint_attention_dim",
        "caption_channels",
        "text_embed_dim",
        "text_dim",
        "cap_feat_dim",
        "encoder_hid_dim",
        "encoder_hidden_size",
        "cross_attention_input_dim",
        "cross_attention_dim",
        "cross_attention_dim_t5",
        "embedding_dim",
    ),
    "pooled": (
        "pooled_projection_dim",
        "cond_embed_dim",
        "global_states_input_dim",
        "embedding_dim",
        "projection_class_embeddings_input_dim",
    ),
    "length": ("text_len", "text_len_t5", "max_text_seq_length", "max_sequence_length", "num_embeddings"),
    "micro": ("addition_time_embed_dim",),
    "codes": ("codebook_size",),
}
DEFAULT_SIZE = 32  # height and width where the config has none
TOKENS = 16  # length of a text where the config has none
MAX_TRIALS = 300
MAX_SECONDS = 30.0


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Failures that are expected are not logged by torch, and its warnings about its own internals are not shown."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")]
    before = [log.disabled for log in loggers]
    for log in loggers:
        log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch(\.|$)")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for log, disabled in zip(loggers, before, strict=True):
            log.disabled = disabled


def module_device(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU if there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def module_dtype(model: torch.nn.Module) -> torch.dtype:
    """Type of the first floating-point parameter; the default type if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def is_abstract(model: torch.nn.Module) -> bool:
    """Whether the model has shapes but no weights: built on the meta device or under a fake tensor mode."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def fake_copy(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """A copy of the model whose tensors have shapes but no memory; nothing that is done to it reaches the model."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")]
        loose = pytree.tree_leaves(held) if is_abstract(model) else []  # e.g. a list of tables
        for value in itertools.chain(module._parameters.values(), module._buffers.values(), loose):
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                fake: torch.Tensor = _fake(value, mode)
                if isinstance(value, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, requires_grad=False)
                memo[id(value)] = fake
    return copy.deepcopy(model, memo)


def _fake(x: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    device = torch.device("cpu") if x.is_meta or isinstance(x, FakeTensor) else x.device
    with mode:
        return torch.empty(tuple(x.shape), dtype=x.dtype, device=device)


def fake_call(call: Mapping[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """The arguments as fake tensors."""
    faked: dict[str, Any] = pytree.tree_map(lambda x: _fake(x, mode) if isinstance(x, torch.Tensor) else x, dict(call))
    return faked


def resolve_conditioning(example_inputs: ExampleInputs, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
    """The user's example inputs as a dict, calling them if they are a function of (batch size, generator).

    Raises:
        InputError: they are neither a mapping, nor a function that returns one.
    """
    if example_inputs is None:
        return {}
    given = example_inputs(batch_size, generator) if callable(example_inputs) else example_inputs
    if not isinstance(given, Mapping):
        raise InputError(
            "example_inputs must be a dict of forward arguments, or a function (batch_size, generator) -> dict; "
            f"got {type(given).__name__}"
        )
    return dict(given)


def example_call(
    model: torch.nn.Module, timestep: torch.Tensor, conditioning: Mapping[str, Any], batch_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of one call that the model accepts, none of them invented but sample and timestep.

    Args:
        model: the denoiser.
        timestep: 0-d, as the scheduler gives it.
        conditioning: arguments that the user gave; may include sample and timestep.
        batch_size: B, where no sample was given.
        dtype: of the sample, where none was given.

    Raises:
        InputError: something can neither be inferred nor was given; names it and says in what form.
    """
    signature = Signature.of(model)
    call = dict(conditioning)
    _refuse_unknown(model, signature, call)
    missing = [name for name in _required(signature) if name not in call and name not in (signature.sample, signature.timestep)]
    if missing:
        raise InputError(
            f"{type(model).__name__}.forward needs {missing}, which cannot be inferred: random conditioning would be "
            f"the wrong distribution to learn from. Pass example_inputs={{{', '.join(f'{n!r}: ...' for n in missing)}}} "
            f"with tensors for a batch of {batch_size}, or a function (batch_size, generator) -> dict"
            + _hints(model, signature, call, batch_size, missing)
        )
    if signature.sample not in call:
        shape = _sample_shape(model, signature, call, batch_size)
        call[signature.sample] = torch.zeros(shape, dtype=dtype, device=timestep.device)
    if signature.timestep is None or signature.timestep in call:
        return call
    return _try_timestep_forms(model, signature, call, timestep)


def _refuse_unknown(model: torch.nn.Module, signature: Signature, call: Mapping[str, Any]) -> None:
    accepted = signature.parameters.parameters
    unknown = [n for n in call if n not in accepted and not _accepts_any(signature.parameters)]
    if unknown:
        raise InputError(
            f"example_inputs has {unknown}, which {type(model).__name__}.forward does not take; it takes {list(accepted)}"
        )


def _required(signature: Signature) -> list[str]:
    return [
        name
        for name, p in signature.parameters.parameters.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def needed_names(signature: Signature) -> set[str]:
    """Arguments without which a call cannot be made: the sample, the timestep, and those without a default."""
    roles = {signature.sample, signature.timestep} - {None}
    return {*_required(signature), *(str(name) for name in roles)}


def _try_timestep_forms(
    model: torch.nn.Module, signature: Signature, call: dict[str, Any], timestep: torch.Tensor
) -> dict[str, Any]:
    batch = len(call[signature.sample])
    name = signature.timestep
    assert name is not None
    problems = []
    for form in (timestep, timestep.expand(batch)):
        try:
            with torch.no_grad():
                first_tensor(model(**{**call, name: form}))
        except Exception as error:
            problems.append(f"{name} of shape {list(form.shape)}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        return {**call, name: form}
    optional = [n for n, p in signature.parameters.parameters.items() if n not in call and n != name and p.default is None]
    hint = f" Arguments that were left at None: {optional}." if optional else ""
    raise InputError(
        f"{type(model).__name__} does not accept the inferred arguments.{hint} If the model is conditional, its "
        "conditioning cannot be inferred: pass it with example_inputs={name: tensor}, or as a function "
        "(batch_size, generator) -> dict. Tried "
        + "; ".join(problems)
        + _hints(model, signature, {n: v for n, v in call.items() if n != signature.sample}, batch, optional)
    )


def _hints(model: torch.nn.Module, signature: Signature, call: Mapping[str, Any], batch: int, names: Sequence[str]) -> str:
    """Shapes and types of arguments with which the model would run, as text."""
    try:
        found = infer_call(model, call, batch, signature)
    except InputError:
        return "; their shapes could not be found by trial either"
    lines = [f"{name}: {_describe(found[name])}" for name in names if name in found]
    return ". It would run with " + "; ".join(lines) if lines else ""


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _accepts_any(parameters: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.parameters.values())


def _sample_shape(model: torch.nn.Module, signature: Signature, call: Mapping[str, Any], batch_size: int) -> tuple[int, ...]:
    """The sample's shape where the config has channels and size; which order and rank is found by trial."""
    reason = ""
    if isinstance(_config(model, "channels"), int) and (_config(model, "size") or _config(model, "height")) is not None:
        first, *others = _sample_shapes(model, batch_size)
        if not others or _runs(model, signature, {**call, signature.sample: torch.zeros(first)}, batch_size):
            return first
        try:
            return tuple(infer_call(model, call, batch_size, signature)[signature.sample].shape)
        except InputError as error:
            reason = f" ({error})"
    raise InputError(
        f"the shape of {signature.sample!r} cannot be inferred: {type(model).__name__} has no config with "
        f"{CONFIG['channels'][0]} and {CONFIG['size'][0]} that fit. Pass example_inputs={{{signature.sample!r}: tensor}} "
        f"of shape [batch, channels, ...]{reason or _hints(model, signature, call, batch_size, [signature.sample])}"
    )


def _runs(model: torch.nn.Module, signature: Signature, call: dict[str, Any], batch: int) -> bool:
    try:
        trial = _Trial(model, signature)
    except Exception:  # a model that cannot be copied is not tried
        logger.debug("no trial", exc_info=True)
        return True
    name = signature.timestep
    forms = _timesteps(batch) if name is not None and name not in call else [None]
    return any(trial.run(call if form is None else {**call, str(name): form}) for form in forms)


def infer_call(
    model: torch.nn.Module, given: Mapping[str, Any] | None, batch_size: int, signature: Signature, seed: int = 0
) -> dict[str, Any]:
    """Arguments that the model accepts: those that are given, and random ones in the place of others that it needs.

    Args:
        model: the denoiser.
        given: arguments that the user gave.
        batch_size: B, where none was given.
        signature: of the model.
        seed: of the random values.

    Raises:
        InputError: no arguments were found with which the model runs; names those that are missing, with hints.
    """
    fixed = dict(given or {})
    _refuse_unknown(model, signature, fixed)
    if isinstance(fixed.get(signature.sample), torch.Tensor):
        batch_size = len(fixed[signature.sample])
    search = _Search(model, signature, fixed, batch_size, torch.Generator().manual_seed(seed))
    try:
        found = search.run()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be tried without memory ({type(error).__name__}: {error}); pass example_inputs "
            f"with {sorted(needed_names(signature) - fixed.keys())}"
        ) from error
    if found is None:
        needed = [name for name in _required(signature) if name not in fixed]
        optional = [n for n, p in signature.parameters.parameters.items() if n not in fixed and p.default is None]
        hints = [f"{n}: e.g. {_describe(options[0])}" for n, options in search.options.items() if n in needed and options]
        raise InputError(
            f"{type(model).__name__} does not run with any arguments that could be inferred. Pass example_inputs with "
            f"{needed or 'its conditioning'}"
            + (f" ({'; '.join(hints)})" if hints else "")
            + (f"; arguments left at None: {optional}" if optional else "")
            + f". It got furthest with: {search.reason}"
        )
    device = torch.device("cpu") if is_abstract(model) else module_device(model)
    placed: dict[str, Any] = pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) and not x.is_meta else x, found
    )
    return placed


def _config(model: torch.nn.Module, meaning: str) -> Any:
    """The first value of the config keys for a meaning; ``None`` if there is none."""
    return next(iter(_configs(model, meaning)), None)


def _configs(model: torch.nn.Module, meaning: str) -> list[Any]:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        values = [config.get(key) for key in CONFIG[meaning]]
    else:
        values = [getattr(config, key, None) for key in CONFIG[meaning]]
    return list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values if isinstance(v, (int, tuple, list))))


def _sample_shapes(model: torch.nn.Module, batch: int) -> list[tuple[int, ...]]:
    """Shapes that the sample may have, the likeliest first."""
    channels = _config(model, "channels")
    size = _config(model, "size")
    patch = _config(model, "patch")
    if isinstance(size, tuple):
        return [(batch, channels, *size)]
    side = size if isinstance(size, int) else DEFAULT_SIZE
    height, width = (_config(model, name) or side for name in ("height", "width"))
    frames = _config(model, "frames") or 4
    times = [frames, *({1 + (frames - 1) // 4, 4, 2} - {frames})]
    cut = max([p for p in (patch if isinstance(patch, tuple) else (patch,)) if isinstance(p, int)] or [1])
    shapes: list[tuple[int, ...]] = []
    for c in dict.fromkeys([c for c in (channels,) if isinstance(c, int)] or [4, 3, 1, 16]):
        shapes.append((batch, c, height, width))
        for t in times:
            shapes += [(batch, c, t, height, width), (batch, t, c, height, width)]
        shapes += [(batch, c, side), (batch, (side // cut) ** 2 if side // cut <= 64 else 64, c)]
    shapes += [(batch, d) for d in _configs(model, "text") if isinstance(d, int)]
    return shapes


def _timesteps(batch: int) -> list[torch.Tensor]:
    return [torch.full((batch,), 500), torch.tensor(500), torch.full((batch,), 0.5), torch.tensor(0.5)]


class _Progress(TorchFunctionMode):
    """Counts calls: how far a trial got before it failed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Trial:
    """Calls a copy of the model without memory."""

    def __init__(self, model: torch.nn.Module, signature: Signature) -> None:
        self.signature = signature
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = fake_copy(model, self.mode)
        self.progress = 0
        self.reason = "nothing was tried"

    def run(self, call: Mapping[str, Any]) -> bool:
        """Whether the model takes the call and returns something of the sample's shape but for one dimension."""
        counter = _Progress()
        try:
            with quiet_torch(), self.mode, torch.no_grad(), counter:
                output = first_tensor(self.model(**fake_call(call, self.mode)))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True  # it got to where sizes depend on values; fake tensors have none
        except Exception as error:
            self.progress = counter.count
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return False
        sample = call[self.signature.sample]
        if output.dim() == sample.dim() and sum(a != b for a, b in zip(output.shape, sample.shape, strict=True)) <= 1:
            return True
        if not sample.is_floating_point():  # codes in, logits out
            return True
        self.progress = counter.count - 1
        self.reason = f"a sample of shape {list(sample.shape)} gives an output of shape {list(output.shape)}"
        return False


@dataclass
class _Search:
    """Coordinate search for arguments with which a model runs: each change that gets further is kept."""

    model: torch.nn.Module
    signature: Signature
    given: dict[str, Any]
    batch: int
    generator: torch.Generator
    options: dict[str, list[Any]] = field(default_factory=dict)
    reason: str = ""

    def run(self) -> dict[str, Any] | None:
        """A call that works, or ``None``."""
        parameters = self.signature.parameters.parameters
        required = [name for name in _required(self.signature) if name not in self.given]
        roles = [name for name in (self.signature.sample, self.signature.timestep) if name is not None]
        needed = [name for name in dict.fromkeys([*roles, *required]) if name not in self.given]
        optional = [name for name, p in parameters.items() if p.default is None and name not in self.given and _may_need(name)]
        optional.sort(key=lambda name: "mask" in name)  # a model that fails for want of something else takes a mask
        self.options = {name: list(self._candidates(name)) for name in dict.fromkeys([*needed, *optional])}
        trial = _Trial(self.model, self.signature)
        call = {**self.given, **{name: self.options[name][0] for name in needed if self.options[name]}}
        return self._improve(trial, call)

    def _improve(self, trial: _Trial, call: dict[str, Any]) -> dict[str, Any] | None:
        ends = time.monotonic() + MAX_SECONDS
        trials = 1
        if trial.run(call):
            return call
        best, self.reason = trial.progress, trial.reason
        improved = True
        while improved:
            improved = False
            for name, options in self.options.items():
                for option in options:
                    if trials >= MAX_TRIALS or time.monotonic() > ends:
                        return None
                    candidate = {**call, name: option}
                    trials += 1
                    if trial.run(candidate):
                        return candidate
                    if trial.progress > best:
                        best, self.reason, call, improved = trial.progress, trial.reason, candidate, True
        return None

    def _candidates(self, name: str) -> Iterator[Any]:
        """Values that an argument may have, the likeliest first."""
        if name == self.signature.sample:
            yield from map(self._sample, _sample_shapes(self.model, self.batch))
            yield from (torch.zeros(s[0], *s[2:], dtype=torch.int64) for s in _sample_shapes(self.model, self.batch)[:1])
            return
        if name == self.signature.timestep:
            yield from _timesteps(self.batch)
            return
        yield from self._conditioning(name)

    def _conditioning(self, name: str) -> Iterator[Any]:
        words = name.lower()
        lengths = [n for n in _configs(self.model, "length") if isinstance(n, int)] + [TOKENS]
        text = [n for n in _configs(self.model, "text") if isinstance(n, int)]
        pooled = [n for n in _configs(self.model, "pooled") if isinstance(n, int)]
        labels = torch.zeros(self.batch, dtype=torch.int64)
        if "mask" in words:
            yield from (torch.ones(self.batch, n, dtype=torch.int64) for n in lengths)
            yield from (torch.ones(self.batch, n, dtype=torch.bool) for n in lengths)
        elif "label" in words or "class" in words or words == "y":
            yield labels
            yield from (self._noise(self.batch, d) for d in pooled)
        elif "guidance" in words or "fps" in words:
            yield torch.full((self.batch,), 4.0)
        elif "kwargs" in words:
            yield from self._keywords(pooled)
        elif "ids" in words and "txt" in words:
            yield from (torch.zeros(n, 3) for n in lengths)
        elif "ids" in words:
            tokens = {s[1] for s in _sample_shapes(self.model, self.batch) if len(s) == 3}
            yield from (torch.zeros(n, 3) for n in sorted(tokens))
            yield torch.zeros(self.batch, 3)
        elif any(word in words for word in ("pooled", "global", "proj", "vector")):
            yield from (self._noise(self.batch, d) for d in [*pooled, *text])
            yield from (self._noise(self.batch, 1, d) for d in pooled)
        elif "micro" in words or "size" in words or "coords" in words:
            yield torch.full((self.batch, 2), 64.0)
            yield torch.full((self.batch, 6), 64.0)
            yield torch.full((self.batch, 5), 64.0)
        else:
            yield from (self._noise(self.batch, n, d) for n in lengths for d in text)
            yield from (self._noise(self.batch, d) for d in [*pooled, *text])
            yield labels

    def _keywords(self, pooled: Sequence[int]) -> Iterator[Any]:
        micro = next((m for m in _configs(self.model, "micro") if isinstance(m, int)), 0)
        for d in pooled:
            if micro and d > 6 * micro:
                yield {"text_embeds": self._noise(self.batch, d - 6 * micro), "time_ids": torch.full((self.batch, 6), 64.0)}
        yield {"resolution": None, "aspect_ratio": None}
        yield {"resolution": torch.full((self.batch, 2), 64.0), "aspect_ratio": torch.ones(self.batch, 1)}
        yield {}

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(module_dtype(self.model))

    def _sample(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._noise(*shape)


def _may_need(name: str) -> bool:
    """Optional arguments without which some models do not run; others only change how they run."""
    words = (
        "hidden_states",
        "pooled",
        "projection",
        "label",
        "class",
        "guidance",
        "added_cond",
        "ids",
        "embed",
        "mask",
        "size",
    )
    return any(word in name for word in words) and "controlnet" not in name and "block" not in name
