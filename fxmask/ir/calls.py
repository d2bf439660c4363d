"""One call of a denoiser, in a canonical form.

A model is called with positional and keyword arguments, nested containers, ``return_dict`` either way and a timestep
that is an int, a float, a 0-d tensor or one value per sample. A captured graph takes a flat list of tensors. This
module is the only place that knows how one becomes the other:

    (args, kwargs) --bind--> BoundCall(tensors by leaf name, static leaves) --> graph inputs
    graph outputs --OutputSpec--> what the model would have returned
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.guards.values import closed, key_of, opened, text_of

# Parameter names that denoisers use for these roles. Position decides where no name matches.
SAMPLE_NAMES = ("sample", "hidden_states", "x", "latents", "noisy_latents", "x_t", "z_t", "img", "image")
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_level", "ts")
CONDITIONING_WORDS = ("hidden_states", "embed", "emb", "mask", "text", "context", "cond", "label", "class", "prompt", "image")
RETURN_DICT = "return_dict"
VIDEO_DIMS, SEQUENCE_DIMS = 5, 3


def leaf_name(path: tuple[Any, ...]) -> str:
    """Readable name of a pytree leaf: ``added_cond_kwargs.text_embeds``."""
    parts = []
    for entry in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                parts.append(str(getattr(entry, attribute)))
                break
        else:
            parts.append(str(entry))
    return ".".join(parts)


class FixedTensor:
    """A tensor argument whose values a graph is specialised to; equal to another one if every value is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
        self._key = (digest, tuple(tensor.shape), tensor.dtype, tensor.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedTensor) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"FixedTensor{self._key}"


@dataclass(frozen=True)
class BoundCall:
    """The arguments of one call, flattened.

    Attributes:
        tensors: tensor leaves by name, the timestep in the model's canonical form.
        static: every other leaf, (name, value); part of what a graph is specialised to.
        arguments: the arguments by parameter name, before flattening.
        spec: tree structure of ``arguments``.
        layout: for each leaf its name, in tree order.
        timestep: the timestep as it was given.
        samples: leaf names of the sample: one, or one for each tensor of a list.
    """

    tensors: dict[str, torch.Tensor]
    static: tuple[tuple[str, Any], ...]
    arguments: dict[str, Any]
    spec: pytree.TreeSpec
    layout: tuple[str, ...]
    timestep: Any = None
    samples: tuple[str, ...] = ()

    @property
    def sample(self) -> torch.Tensor:
        """The noisy sample; of a list of them the first tensor, whose type and place are those of all."""
        return self.tensors[self.samples[0]]

    @property
    def batch_size(self) -> int:
        """How many samples there are."""
        return len(self.samples) if self.is_list else int(self.sample.shape[0])

    @property
    def is_list(self) -> bool:
        """Whether the samples come as a list of tensors, which may differ in size."""
        return "." in self.samples[0]

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured graph depends on: structure, shapes, dtypes, devices and static values."""
        shapes = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in self.tensors.items())
        return (shapes, self.static_key)

    @functools.cached_property
    def static_key(self) -> tuple[Any, ...]:
        """By value, and now: what an argument is may change after the call."""
        return tuple(
            (name, value if isinstance(value, FixedTensor) else key_of(value))
            for name, value in self.static
            if not _is_return_dict(name)
        )

    def differences(self, other: BoundCall) -> list[str]:
        """In what the form of another call differs from this one's, argument by argument."""
        before, after = self._described(), other._described()
        names = [name for name in {**before, **after} if before.get(name, ("",))[0] != after.get(name, ("",))[0]]
        missing = (None, "not given")
        return [f"{name} was {before.get(name, missing)[1]}, is {after.get(name, missing)[1]}" for name in names]

    def _described(self) -> dict[str, tuple[Any, str]]:
        """Key and text of each argument by name."""
        found = {n: ((tuple(x.shape), x.dtype, x.device), describe_tensor(x)) for n, x in self.tensors.items()}
        keys = dict(self.static_key)
        return {**found, **{n: (keys[n], text_of(value)) for n, value in self.static if n in keys}}

    def rebuild(self, tensors: Sequence[torch.Tensor], **replaced: Any) -> dict[str, Any]:
        """Arguments by parameter name with other tensors in the tensor leaves."""
        values = {name: value.tensor if isinstance(value, FixedTensor) else value for name, value in self.static}
        values.update(zip(self.tensors, tensors, strict=True))
        arguments = closed(pytree.tree_unflatten([values[name] for name in self.layout], self.spec))
        arguments.update(replaced)
        return dict(arguments)


def parts_of_batch(arguments: Any, sample: torch.Tensor, count: int) -> list[Any]:
    """Arguments, nested, for each of ``count`` equal parts of a batch: every tensor with a row per sample is taken apart.

    Beside a video ``[B, C, F, H, W]`` or ``[B, F, C, H, W]`` what has a row for every frame of each too, as AnimateDiff's text.
    """
    rows = len(sample)
    per_frame = {rows * size for size in sample.shape[1:3]} if sample.dim() == VIDEO_DIMS else set()

    def is_of_batch(x: torch.Tensor) -> bool:
        return x.dim() > 0 and (x.shape[0] == rows or (x.dim() >= SEQUENCE_DIMS and x.shape[0] in per_frame))

    def part(x: Any, k: int) -> Any:
        return x.chunk(count)[k] if isinstance(x, torch.Tensor) and is_of_batch(x) else x

    return [pytree.tree_map(lambda x, k=k: part(x, k), arguments) for k in range(count)]


def moving_part(sample: torch.Tensor, prediction: torch.Size) -> torch.Tensor:
    """What the sampler moves of a sample ``[B, ...]``: as much as is predicted; what was put beside it is conditioning.

    Lanes of one image share it, also where an image that is edited is beside it in one lane and zeros in another.
    """
    if sample.dim() != len(prediction):
        return sample
    return sample[(slice(None), *(slice(size) for size in prediction[1:]))]


def repeats(sample: torch.Tensor, count: int) -> bool:
    """Whether a batch is so many equal parts. Waits for the device."""
    if sample.shape[0] % count:
        return False
    first, *others = sample.chunk(count)
    return all(torch.equal(first, other) for other in others)


def describe_tensor(x: torch.Tensor) -> str:
    """Type, shape and place of a tensor: ``float32[2, 4, 64, 64] on cpu``."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"


def _is_return_dict(name: str) -> bool:
    return name == RETURN_DICT


@dataclass(frozen=True)
class Signature:
    """Parameters of a model's ``forward`` and the roles of the first two.

    Attributes:
        parameters: of ``forward``, by name, without ``self``.
        sample: name of the parameter that holds the noisy sample.
        timestep: name of the parameter that holds the timestep; ``None`` if the model takes none.
        batched_timestep: whether the graph takes one timestep per sample (``[B]``) rather than a single one (``[]``).
        one_timestep: whether a single one has the form ``[1]``.
        timestep_type: type of the captured timestep, ``"int64"``, if it was a tensor: numbers without a type get it, too.
        fixed: leaf names of tensors whose values a graph is specialised to, like numbers and strings; for masks and
            lengths that decide sizes.
    """

    parameters: inspect.Signature
    sample: str
    timestep: str | None
    batched_timestep: bool = True
    one_timestep: bool = False
    timestep_type: str = ""
    fixed: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: torch.nn.Module, roles: Mapping[str, str] | None = None) -> Signature:
        """Read the signature of ``model.forward`` and find the sample and the timestep in it.

        Args:
            model: the denoiser.
            roles: overrides, ``{parameter: "sample" | "timestep" | "conditioning" | "step"}``.

        Raises:
            InputError: a role names a parameter that does not exist, or no parameter can be the sample.
        """
        parameters = inspect.signature(model.forward)
        named = [
            name
            for name, p in parameters.parameters.items()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        given = dict(roles or {})
        for name in given:
            root = name.split(".")[0]
            if root not in parameters.parameters and not _takes_any_keyword(parameters):
                raise InputError(f"roles names {name!r}, but {type(model).__name__}.forward has {named}")
        sample = _first(name for name, role in given.items() if role == "sample")
        timestep = _first(name for name, role in given.items() if role == "timestep")
        if sample is None:
            sample = _first(n for n in SAMPLE_NAMES if n in named and n not in given) or _first(named)
        if sample is None:
            raise InputError(
                f"{type(model).__name__}.forward takes no named argument that could be the sample. If it only wraps the "
                f"denoiser, pass that: model.module, or what else it is called ({[n for n, _ in model.named_children()][:5]})"
            )
        if timestep is None:
            timestep = _first(n for n in TIMESTEP_NAMES if n in named and n not in given and n != sample)
        if timestep is None and len(named) > 1:
            second = named[1] if named[0] == sample else named[0]
            optional = parameters.parameters[second].default is not inspect.Parameter.empty
            conditioning = second in given or any(word in second for word in CONDITIONING_WORDS)
            timestep = None if conditioning or optional else second
        return cls(parameters, sample, timestep)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall:
        """Flatten one call.

        Raises:
            InputError: the arguments do not fit the signature, or the sample is neither a tensor nor a list of tensors.
        """
        try:
            bound = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"the denoiser cannot be called like this: {error}; its signature is {self.parameters}") from None
        bound.apply_defaults()
        arguments = {n: _without_numpy(x) for n, x in _inline_variadic(self.parameters, bound.arguments).items()}
        sample = arguments.get(self.sample)
        samples: Any = [sample] if isinstance(sample, torch.Tensor) else sample
        if not isinstance(samples, (list, tuple)) or not samples or not all(isinstance(x, torch.Tensor) for x in samples):
            raise InputError(
                f"argument {self.sample!r} is the sample and must be a tensor or a list of tensors, got {_kind(sample)}; "
                "pass roles={...} if another argument is the sample"
            )
        single = isinstance(sample, torch.Tensor)
        batch = (samples[0].shape[0] if samples[0].dim() else 1) if single else len(samples)
        given = arguments.get(self.timestep) if self.timestep is not None else None
        if self.timestep is not None:
            arguments[self.timestep] = self.canonical_timestep(arguments.get(self.timestep), samples[0].device, batch)
        pairs, spec = pytree.tree_flatten_with_path(opened(arguments))
        leaves = [(path, self._canonical_leaf(leaf_name(path), leaf)) for path, leaf in pairs]
        tensors = {leaf_name(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
        static = tuple((leaf_name(path), leaf) for path, leaf in leaves if not isinstance(leaf, torch.Tensor))
        names = tuple(name for name in tensors if self.is_sample(name))
        return BoundCall(tensors, static, arguments, spec, tuple(leaf_name(path) for path, _ in leaves), given, names)

    def is_sample(self, name: str) -> bool:
        """Whether a leaf is the sample, or a tensor of the list that is the sample."""
        return name.split(".")[0] == self.sample

    def _canonical_leaf(self, name: str, leaf: Any) -> Any:
        """Values where a graph is specialised to them; else memory in one order, which a graph is specialised to."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if name in self.fixed:
            return FixedTensor(leaf)
        return leaf if leaf.dim() < 2 else leaf.contiguous()

    def _type_of_number(self, timestep: int | float) -> torch.dtype:
        """Type for a timestep that is a plain number: the captured one's, if that holds it."""
        captured: torch.dtype | None = getattr(torch, self.timestep_type) if self.timestep_type else None
        if captured is not None and (captured.is_floating_point or float(timestep).is_integer()):
            return captured
        return torch.int64 if isinstance(timestep, int) else torch.float64

    def canonical_timestep(self, timestep: Any, device: torch.device, batch: int) -> Any:
        """The timestep in the form that the graph takes, from whatever form it was given in."""
        if isinstance(timestep, bool) or not isinstance(timestep, (int, float, torch.Tensor)):
            return timestep
        if not isinstance(timestep, torch.Tensor):
            dtype = self._type_of_number(timestep)
            timestep = torch.full((), timestep, dtype=dtype, device=device)
        single = timestep.dim() == 0 or timestep.numel() == 1
        if self.batched_timestep and single:
            return timestep.to(device).reshape(1).expand(batch)
        if not self.batched_timestep and single:
            return timestep.to(device).reshape((1,) if self.one_timestep else ())
        return timestep


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {', '.join(dict.fromkeys(type(x).__name__ for x in value)) or 'nothing'}"
    return type(value).__name__


def _without_numpy(value: Any) -> Any:
    """NumPy's numbers as Python's: schedulers hand them out as timesteps."""
    return value.item() if isinstance(value, numpy.generic) else value


def _first(names: Any) -> str | None:
    return next(iter(names), None)


def _takes_any_keyword(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _inline_variadic(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name with ``**kwargs`` merged in; ``*args`` cannot be named and must be empty."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise InputError(f"*{name} of the denoiser was given {len(value)} arguments; pass arguments by name")
        elif kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return flat
