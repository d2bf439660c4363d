"""flex_attention as plain operators: a graph that holds graphs cannot be cut, costed or compiled in parts.

    before:  %o = flex_attention(%q, %k, %v, score_mod, (..., mask_mod), scale)[0]
    after:   %m = where(mask_mod(b, h, i, j), score_mod(0, b, h, i, j), -inf)
             %o = scaled_dot_product_attention(%q, %k, %v, %m)
    or:      %s = matmul(%q, %k^T) * scale;  %s = where(mask_mod(b, h, i, j), score_mod(%s, b, h, i, j), -inf)
             %o = matmul(softmax(%s), %v)

The first form is right where a score is only shifted by what does not depend on it, and is taken where a mask of the queries'
type can hold these shifts. Functions of the positions become tensors over all positions that they depend on, so the blocks that
a block mask would leave out are computed here.
"""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx

from fxmask._torch import FakeTensor, make_fx, pytree
from fxmask.errors import CaptureError
from fxmask.ir.graph import attribute

aten = torch.ops.aten
FLEX_ATTENTION = "flex_attention"
LARGE = 2**24  # products of lengths from which the cost of a block mask's empty blocks is worth a warning
WHOLE = 2**30  # the block size that stands for no blocks at all
INDICES = ("b", "h", "i", "j")  # batch, head, query, key
Mod = Callable[..., torch.Tensor]  # (score,) b, h, i, j, *buffers


@dataclass(frozen=True)
class _Call:
    """One call of ``flex_attention``: its arguments with nodes in the place of tensors."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    score_mod: fx.GraphModule
    mask_mod: fx.GraphModule
    block_mask: Sequence[Any]
    scale: float
    score_buffers: Sequence[Any]
    mask_buffers: Sequence[Any]

    @classmethod
    def of(cls, module: fx.GraphModule, node: fx.Node) -> _Call:
        query, key, value, score_mod, block_mask, scale, _, *buffers = node.args
        score_buffers, mask_buffers = (*buffers, (), ())[:2]
        mods = [attribute(module, mod) for mod in (score_mod, block_mask[-1])]  # type: ignore[index, arg-type]
        found: list[Any] = [query, key, value, *mods, block_mask, scale, score_buffers, mask_buffers]
        return cls(node, *found)

    @property
    def results(self) -> dict[int, list[fx.Node]]:
        """Users by what they read: 0 the attention, 1 the logarithms of the sums, 2 the largest scores."""
        found: dict[int, list[fx.Node]] = {}
        for user in self.node.users:
            assert user.target is operator.getitem
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
        return found


def expand_attention(module: fx.GraphModule) -> None:
    """Replace every ``flex_attention`` of a graph in place.

    Raises:
        CaptureError: a block mask leaves out blocks that no function says, which only compiled code would do.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and str(node.target) == FLEX_ATTENTION:
            call = _Call.of(module, node)
            _check_blocks(module, call)
            with module.graph.inserting_before(node):
                results = _attention(module, call) if _is_attention(call) else _in_full(module, call)
            for k, users in call.results.items():
                for user in users:
                    user.replace_all_uses_with(results[k])
                    module.graph.erase_node(user)
            module.graph.erase_node(node)


def _check_blocks(module: fx.GraphModule, call: _Call) -> None:
    """Only ``mask_mod`` is taken into account, as where the model runs uncompiled; blocks say the same, or are refused."""
    block_sizes = call.block_mask[-3:-1]
    if min(block_sizes) >= WHOLE:
        return
    lengths = [int(x.meta["val"].shape[2]) for x in (call.query, call.key)]
    if _is_always_true(call.mask_mod):
        counts = [_constant(module, x) for x in (call.block_mask[2], call.block_mask[4]) if x is not None]
        blocks = math.prod(-(-length // size) for length, size in zip(lengths, block_sizes, strict=True))
        if any(x is None for x in counts) or bool((sum(x.sum((-1,)) for x in counts if x is not None) < blocks).any()):
            raise CaptureError(
                "flex_attention is given a block mask whose blocks leave out keys that its mask_mod does not (from_kv_blocks "
                "without mask_mod): compiled and uncompiled it computes different things. Give the block mask a mask_mod, or "
                "use scaled_dot_product_attention with attn_mask"
            )
    elif math.prod(lengths) >= LARGE:
        warnings.warn(
            f"flex_attention of {lengths[0]} queries and {lengths[1]} keys is captured as scaled_dot_product_attention with a "
            "mask: blocks that its block mask leaves out are computed, so a sparse one saves nothing here",
            stacklevel=2,
        )


def _constant(module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    value = attribute(module, node) if node.op == "get_attr" else None
    return value if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else None


# What the functions of positions are


def _is_attention(call: _Call) -> bool:
    """Whether scaled-dot-product attention with a mask gives the same."""
    if set(call.results) - {0} or not _is_shift(call.score_mod):
        return False
    exact = call.query.meta["val"].dtype in (torch.float32, torch.float64)
    return exact or _is_identity(call.score_mod)  # a shift in half precision would be rounded


def _is_identity(score_mod: fx.GraphModule) -> bool:
    return _result(score_mod) is _inputs(score_mod)[0]


def _is_shift(score_mod: fx.GraphModule) -> bool:
    """Whether a function adds to a score what does not depend on it, or replaces it by minus infinity."""
    score = _inputs(score_mod)[0]
    moving = {score}
    for node in score_mod.graph.nodes:
        if not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    return _shifts(_result(score_mod), score, moving)


def _shifts(node: Any, score: fx.Node, moving: set[fx.Node]) -> bool:
    if node is score:
        return True
    if not isinstance(node, fx.Node) or node not in moving:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.where:
        return _fixed(node.args[0], moving) and all(_shifts(x, score, moving) or _is_minus_infinity(x) for x in node.args[1:])
    if packet not in (aten.add, aten.sub) or node.kwargs:
        return False
    first, second = node.args
    if packet is aten.add and _shifts(second, score, moving):
        return _fixed(first, moving)
    return _shifts(first, score, moving) and _fixed(second, moving)


def _fixed(value: Any, moving: set[fx.Node]) -> bool:
    return value not in moving


def _is_minus_infinity(value: Any) -> bool:
    if isinstance(value, fx.Node):
        packet: Any = getattr(value.target, "overloadpacket", None)
        place = {aten.full: 1, aten.full_like: 1, aten.new_full: 2, aten.scalar_tensor: 0}.get(packet)
        return place is not None and _is_minus_infinity(value.args[place])
    return isinstance(value, float) and value == -math.inf


def _is_always_true(mask_mod: fx.GraphModule) -> bool:
    result = _result(mask_mod)
    packet = getattr(result.target, "overloadpacket", None)
    return packet in (aten.ones, aten.new_ones, aten.ones_like) or (packet is aten.full and result.args[1] is True)


def _inputs(mod: fx.GraphModule) -> list[fx.Node]:
    return list(mod.graph.find_nodes(op="placeholder"))


def _result(mod: fx.GraphModule) -> fx.Node:
    result: Any = next(iter(mod.graph.find_nodes(op="output"))).args[0]
    return result[0] if isinstance(result, (tuple, list)) else result  # type: ignore[no-any-return]


def _over_all_positions(mod: Mod, buffers: int, scores: Sequence[int | None] = ()) -> Mod:
    """A function of single positions as one of vectors of them, ``[B, H, I, J]``; ``scores`` has 0 for one score for each."""
    for k in reversed(range(len(INDICES))):
        dims = [0 if k == other else None for other in range(len(INDICES))]
        mod = torch.vmap(mod, in_dims=(*scores, *dims, *[None] * buffers))
    return mod


def _positions(mod: fx.GraphModule, leading: int, sizes: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """For each index all of its values; one, where the function does not depend on it."""
    used = [bool(node.users) for node in _inputs(mod)[leading : leading + len(INDICES)]]
    return [torch.arange(size if needed else 1, device=device) for size, needed in zip(sizes, used, strict=True)]


def _first(mod: fx.GraphModule) -> Mod:
    def run(*args: Any) -> torch.Tensor:
        result = mod(*args)
        return result[0] if isinstance(result, (tuple, list)) else result  # type: ignore[no-any-return]

    return run


def _sizes(query: torch.Tensor, key: torch.Tensor) -> list[int]:
    return [*query.shape[:3], key.shape[2]]


# The two forms


def _attention(module: fx.GraphModule, call: _Call) -> list[fx.Node]:
    """Scaled-dot-product attention with what the functions add to scores as its mask."""

    def mask(query: torch.Tensor, key: torch.Tensor, score_buffers: Sequence[Any], mask_buffers: Sequence[Any]) -> Any:
        sizes, device = _sizes(query, key), query.device
        seen = shift = None
        if not _is_always_true(call.mask_mod):
            places = _positions(call.mask_mod, 0, sizes, device)
            seen = _over_all_positions(_first(call.mask_mod), len(mask_buffers))(*places, *mask_buffers)
        if not _is_identity(call.score_mod):
            zero = torch.zeros((), dtype=query.dtype, device=device)
            places = _positions(call.score_mod, 1, sizes, device)
            moved = _over_all_positions(_first(call.score_mod), len(score_buffers), [None])
            shift = moved(zero, *places, *score_buffers).to(query.dtype)
        if seen is None or shift is None:
            return seen if shift is None else shift
        return torch.where(seen, shift, -math.inf)

    plain = _is_always_true(call.mask_mod) and _is_identity(call.score_mod)
    made = [] if plain else _insert(module, call.node, mask, (call.query, call.key, call.score_buffers, call.mask_buffers))
    query, key = call.query.meta["val"], call.key.meta["val"]
    key_node, value_node = call.key, call.value
    if key.shape[0] != query.shape[0]:
        expand = _expanded(query.shape[0])
        (key_node,), (value_node,) = (_insert(module, call.node, expand, (x,)) for x in (call.key, call.value))
    options = {"scale": call.scale, "enable_gqa": key.shape[1] != query.shape[1]}
    arguments = (call.query, key_node, value_node, *made)
    attend = module.graph.call_function(aten.scaled_dot_product_attention.default, arguments, options)
    _describe(attend, call.node)
    return [_laid_out(module, call.node, attend)]


def _expanded(batch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.expand(batch, *x.shape[1:])


def _in_full(module: fx.GraphModule, call: _Call) -> list[fx.Node]:
    """Every score by itself, as flex_attention computes them where it is not compiled."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        score_buffers: Sequence[Any],
        mask_buffers: Sequence[Any],
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1) for x in (key, value))
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = (query.to(exact) @ key.to(exact).transpose(-2, -1)) * call.scale
        places = [torch.arange(size, device=query.device) for size in scores.shape]
        score_mod = _over_all_positions(_first(call.score_mod), len(score_buffers), [0])
        scores = score_mod(scores, *places, *score_buffers).to(exact)
        if not _is_always_true(call.mask_mod):
            seen = _over_all_positions(_first(call.mask_mod), len(mask_buffers))(*places, *mask_buffers)
            scores = torch.where(seen, scores, -math.inf)
        nothing = (scores == -math.inf).all(-1)
        weights = torch.where(nothing.unsqueeze(-1), 0.0, scores.softmax(-1))
        sums = torch.where(nothing, -math.inf, scores.logsumexp(-1))
        return weights.to(query.dtype) @ value, sums / math.log(2), scores.amax(-1) / math.log(2)

    arguments = (call.query, call.key, call.value, call.score_buffers, call.mask_buffers)
    attention, *others = _insert(module, call.node, attend, arguments)
    return [_laid_out(module, call.node, attention), *others]


# Inserting nodes


def _laid_out(module: fx.GraphModule, node: fx.Node, attention: fx.Node) -> fx.Node:
    """The attention in the memory layout that the nodes behind ``flex_attention`` were recorded with."""
    strides = node.meta["val"][0].stride()
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    back = [order.index(d) for d in range(len(order))]

    def arrange(x: torch.Tensor) -> torch.Tensor:
        return x.permute(order).contiguous().permute(back)

    (made,) = _insert(module, node, arrange, (attention,), pre_dispatch=True)
    return made


def _insert(
    module: fx.GraphModule, node: fx.Node, function: Callable[..., Any], arguments: Any, pre_dispatch: bool = False
) -> list[fx.Node]:
    """The nodes of what a function of tensors computes, and its results; ``arguments`` holds nodes of the graph."""
    leaves, spec = pytree.tree_flatten(arguments)
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def run(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return function(*pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], spec))

    with _fake_mode_of(nodes[0]), torch.no_grad():
        traced = make_fx(run, pre_dispatch=pre_dispatch)(*(x.meta["val"] for x in nodes))
    values: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    for inside in traced.graph.nodes:
        if inside.op == "get_attr":
            values[inside] = _constant_of(module, attribute(traced, inside))
        elif inside.op == "call_function":
            values[inside] = module.graph.node_copy(inside, values.__getitem__)
            _describe(values[inside], node)
    results = next(iter(traced.graph.find_nodes(op="output"))).args[0]
    return [values[x] for x in (results if isinstance(results, (tuple, list)) else (results,))]


@contextlib.contextmanager
def _fake_mode_of(node: fx.Node) -> Iterator[None]:
    """Inside, tensors that are made have shapes only, like those of the graph."""
    mode = node.meta["val"].fake_mode
    with mode, mock.patch.object(mode, "allow_non_fake_inputs", True):
        yield


def _constant_of(module: fx.GraphModule, value: Any) -> fx.Node:
    """A tensor that a function of positions holds, as a constant of the graph."""
    if isinstance(value, FakeTensor):
        raise CaptureError("flex_attention is given a function that makes tensors of its own; make them before the call")
    name = f"constant_of_attention_{sum(str(n.target).startswith('constant_of_attention') for n in module.graph.nodes)}"
    setattr(module, name, value)
    made = module.graph.create_node("get_attr", name)
    made.meta["val"] = value
    return made


def _describe(made: fx.Node, node: fx.Node) -> None:
    """Where a node comes from, and its shape if it has none."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in node.meta:
            made.meta[key] = node.meta[key]
    if "val" not in made.meta:
        with _fake_mode_of(made.all_input_nodes[0]), torch.no_grad():
            args, kwargs = fx.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
            made.meta["val"] = made.target(*args, **kwargs)  # type: ignore[operator]
