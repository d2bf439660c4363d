"""Arguments of pipelines and of the calls inside them: copied, named, compared."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.ir.calls import leaf_name


@dataclass(frozen=True)
class PipelineArguments:
    """Of one call of a pipeline."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> PipelineArguments:
        """The arguments again, with copies of tensors and generators."""
        return PipelineArguments(fresh_copies(self.args), fresh_copies(self.kwargs))

    def steps(self, pipe: Any) -> int | None:
        """The ``num_inference_steps`` of the call; ``None`` if it takes none, or was given timesteps or sigmas of its own."""
        bound = self._bound(pipe)
        if bound is None or any(bound.arguments.get(name) is not None for name in ("timesteps", "sigmas")):
            return None
        value = bound.arguments.get("num_inference_steps")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def with_steps(self, pipe: Any, num_inference_steps: int) -> PipelineArguments:
        """The arguments with another number of steps; ``steps`` must know the present one."""
        bound = self._bound(pipe)
        assert bound is not None
        bound.arguments["num_inference_steps"] = num_inference_steps
        return PipelineArguments(bound.args, bound.kwargs)

    def _bound(self, pipe: Any) -> inspect.BoundArguments | None:
        """By parameter of the call, with defaults; ``None`` where a callable does not say what it takes."""
        try:
            bound = inspect.signature(pipe).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            return None
        bound.apply_defaults()
        return bound


def fresh_copies(tree: Any) -> Any:
    """Copies of tensors and generators, in the state that they are in."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, torch.Generator):
            twin = torch.Generator(value.device)
            twin.set_state(value.get_state())
            return twin
        return value

    return pytree.tree_map(leaf, tree)


def arguments_by_name(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one call by parameter name, those that ``**kwargs`` takes among them."""
    named: dict[str, Any] = {}
    for name, value in parameters.bind(*args, **kwargs).arguments.items():
        kind = parameters.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(f"the denoiser takes *{name}, and the pipeline passes {len(value)} such arguments without names")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # arrays of another library, whose comparison has no single truth
        return False


def same_tree(a: Any, b: Any) -> bool:
    """Whether two nested arguments have equal leaves."""
    (ours, spec), (theirs, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec == other and all(map(_same_leaf, ours, theirs))


EQUAL_COPIES = 4  # how many latest values of an argument are looked through for an equal one: two lanes, or a few more


class CopyStore:
    """Copies of arguments. A tensor equal to one of the latest under the same name is the same copy.

    Attributes:
        bytes: of all copies.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._latest: dict[str, list[torch.Tensor]] = {}

    def __call__(self, owner: str, tree: Any) -> Any:
        """A copy of nested arguments; leaves that were seen before are the same tensors."""
        return pytree.tree_map_with_path(lambda path, leaf: self._leaf(f"{owner} {leaf_name(path)}", leaf), tree)

    def _leaf(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        latest = self._latest.get(name, [])
        for kept in latest:
            if _same_leaf(kept, leaf):
                return kept
        fresh = leaf.detach().clone()
        self.bytes += fresh.numel() * fresh.element_size()
        self._latest[name] = [fresh, *latest][:EQUAL_COPIES]
        return fresh
