"""nn.Module -> Program: a ladder of ways to capture, each checked against the model on real inputs.

An export that succeeds can still compute something else, so no rung is trusted: a graph that differs from the model is
refused and the next rung is tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxmask.calls import RETURN_DICT, BoundCall, OutputSpec, Signature, flatten_output
from fxmask.errors import CaptureError, InputError
from fxmask.passes.count_macs import count_attention_macs, count_macs
from fxmask.passes.find_blocks import describe_blocks, find_blocks
from fxmask.passes.functionalize import functionalize
from fxmask.program import Block, Program
from fxmask.symbolic import export_symbolic

logger = logging.getLogger(__name__)

ROLES = ("sample", "timestep", "conditioning", "step")
# Largest difference, relative to the largest output, that still counts as rounding.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _export(strict: bool) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], torch.export.ExportedProgram]:
    def run(module: torch.nn.Module, tensors: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
        return torch.export.export(module, tensors, strict=strict)

    return run


LADDER = {
    "torch.export (non-strict)": _export(strict=False),
    "torch.export (strict)": _export(strict=True),
}


def capture(model: torch.nn.Module, example_inputs: Mapping[str, Any], roles: Mapping[str, str] | None = None) -> Program:
    """Capture a denoiser as a functional graph and find its blocks.

    Args:
        model: the denoiser, in eval mode. Its weights are shared, never copied.
        example_inputs: arguments of one call by name, sample and timestep included.
        roles: overrides of what an argument is: ``"sample"``, ``"timestep"``, ``"conditioning"`` (constant over a
            generation) or ``"step"`` (changes at every step, e.g. ControlNet residuals).

    Raises:
        InputError: training mode, unknown roles, or arguments that do not fit the model's signature.
        CaptureError: no way of capture gave a graph that computes what the model computes; says what was tried.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise InputError(
            f"{type(model).__name__} is in training mode, where dropout and batch statistics change every call; "
            "call model.eval() first"
        )
    unknown = {name: role for name, role in (roles or {}).items() if role not in ROLES}
    if unknown:
        raise InputError(f"unknown roles {unknown}; choose from {ROLES}")
    with _quiet(), torch.no_grad():
        signature = Signature.of(model, roles)
        signature, bound = _choose_timestep_form(model, signature, example_inputs)
        return capture_bound(model, signature, bound, roles)


def capture_bound(
    model: torch.nn.Module, signature: Signature, bound: BoundCall, roles: Mapping[str, str] | None = None
) -> Program:
    """Capture for a call that is already in canonical form."""
    with _quiet(), torch.no_grad():
        tensors = tuple(bound.tensors.values())
        outputs = _output_spec(model, bound)
        tried: list[str] = []
        for rung, export in LADDER.items():
            wrapper = _Wrapper(model, bound).eval()
            try:
                module = functionalize(export(wrapper, tensors), model, "model")
                difference = _verify(module, model, bound)
            except Exception as error:  # each rung fails in its own ways; all of them are reported
                tried.append(f"  {rung}: {_brief(error)}")
                logger.debug("%s failed", rung, exc_info=True)
                continue
            if difference is not None:
                tried.append(f"  {rung}: {difference}")
                continue
            return _assemble(module, model, signature, bound, outputs, dict(roles or {}), rung)
        raise CaptureError(
            f"{type(model).__name__} could not be captured as a graph that computes what the model computes. "
            "Tried:\n" + "\n".join(tried)
        )


class _Wrapper(torch.nn.Module):
    """Presents the model as a function from a flat list of tensors to a flat list of tensors."""

    def __init__(self, model: torch.nn.Module, bound: BoundCall) -> None:
        super().__init__()
        self.model = model
        self.bound = bound

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat, _ = flatten_output(self.model(**self.bound.rebuild(tensors)))
        return tuple(flat)


def _choose_timestep_form(
    model: torch.nn.Module, signature: Signature, example_inputs: Mapping[str, Any]
) -> tuple[Signature, BoundCall]:
    """One timestep per sample if the model computes the same with it, else the form that was given."""
    bound = signature.bind((), example_inputs)
    given = dict(example_inputs).get(signature.timestep) if signature.timestep else None
    if isinstance(given, torch.Tensor) and given.dim() > 0 and given.numel() > 1:
        return signature, bound
    single = replace(signature, batched_timestep=False)
    if signature.timestep is None or given is None:
        return single, bound
    expected = flatten_output(model(**dict(example_inputs)))[0]
    for candidate in (signature, single):
        trial = candidate.bind((), example_inputs)
        try:
            got = flatten_output(model(**trial.arguments))[0]
        except Exception as error:
            logger.debug("timestep form %s refused: %s", candidate.batched_timestep, error)
            continue
        if len(got) == len(expected) and all(_same(a, b) for a, b in zip(got, expected, strict=True)):
            return candidate, trial
    again = flatten_output(model(**dict(example_inputs)))[0]
    if not all(_same(a, b) for a, b in zip(again, expected, strict=True)):
        raise CaptureError(
            f"{type(model).__name__} gives another result when called twice with the same arguments: it draws random "
            "numbers or keeps state between calls, and neither can be cached"
        )
    raise CaptureError(
        f"{type(model).__name__} computes something else when argument {signature.timestep!r} is a tensor instead of "
        f"{given!r}; pass the timestep as a tensor, or name another argument with roles={{...: 'timestep'}}"
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b) or torch.allclose(a, b, 0, 0, True))


def _output_spec(model: torch.nn.Module, bound: BoundCall) -> OutputSpec:
    """Run the model once per value of ``return_dict`` and remember how its outputs are put together."""
    tensors = tuple(bound.tensors.values())
    if RETURN_DICT not in bound.arguments:
        return OutputSpec({None: flatten_output(model(**bound.rebuild(tensors)))[1]})
    builds: dict[Any, Callable[[Sequence[Any]], Any]] = {}
    for value in (bound.arguments[RETURN_DICT], not bound.arguments[RETURN_DICT]):
        with contextlib.suppress(Exception) if builds else contextlib.nullcontext():
            builds[value] = flatten_output(model(**bound.rebuild(tensors, **{RETURN_DICT: value})))[1]
    return OutputSpec(builds)


def _verify(module: fx.GraphModule, model: torch.nn.Module, bound: BoundCall) -> str | None:
    """Compare graph and model on the example and on other values; a description of the difference, or ``None``."""
    for name, tensors in _trial_inputs(bound):
        expected, _ = flatten_output(model(**bound.rebuild(tensors)))
        got = module(*tensors)
        for k, (a, b) in enumerate(zip(got, expected, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"output {k} is {a.dtype}{list(a.shape)}, the model's is {b.dtype}{list(b.shape)} ({name})"
            if _same(a, b):
                continue
            scale = float(b.abs().max()) if b.numel() else 0.0
            error = float((a.double() - b.double()).abs().max())
            if not error <= ROUNDING.get(b.dtype, 0.0) * max(scale, 1e-30):
                return f"output {k} differs from the model's by {error:.3g} (largest value {scale:.3g}; {name})"
    return None


def _trial_inputs(bound: BoundCall) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """The example itself, and the example with other floating-point values and another timestep."""
    tensors = tuple(bound.tensors.values())
    yield "example inputs", tensors
    generator = torch.Generator().manual_seed(0)
    changed = []
    for x in tensors:
        if x.is_floating_point() and x.dim() > 1:
            noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
            changed.append(x * 0.5 + noise)
        elif x.dim() <= 1 and not x.is_complex() and x.dtype != torch.bool and x.numel():
            changed.append(x // 2 if not x.is_floating_point() else x / 2)
        else:
            changed.append(x)
    yield "other values", tuple(changed)


def _assemble(
    module: fx.GraphModule,
    model: torch.nn.Module,
    signature: Signature,
    bound: BoundCall,
    outputs: OutputSpec,
    roles: dict[str, str],
    rung: str,
) -> Program:
    inputs = tuple(bound.tensors)
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    sample = placeholders[inputs.index(signature.sample)]
    batch = int(bound.tensors[signature.sample].shape[0])
    blocks = find_blocks(module.graph, sample, batch)
    weights = {
        str(node.target): operator.attrgetter(str(node.target))(module) for node in module.graph.nodes if node.op == "get_attr"
    }
    return Program(
        graph_module=module,
        inputs=inputs,
        example=bound,
        signature=signature,
        outputs=outputs,
        roles={name: _role(name, signature, roles) for name in inputs},
        blocks=blocks,
        macs=sum(count_macs(node) for node in module.graph.nodes),
        attention_macs=sum(count_attention_macs(node) for node in module.graph.nodes),
        model=model,
        rung=rung,
        verified=True,
        fingerprint=_fingerprint(module, blocks),
        weights=weights,
    )


def _role(name: str, signature: Signature, roles: Mapping[str, str]) -> str:
    root = name.split(".")[0]
    if name in roles or root in roles:
        return roles.get(name, roles.get(root, ""))
    if name == signature.sample:
        return "sample"
    return "timestep" if name == signature.timestep else "conditioning"


def _fingerprint(module: fx.GraphModule, blocks: Sequence[Block]) -> str:
    """Digest of operators and blocks. Independent of shapes, so that other batch sizes of a model have the same one."""
    digest = hashlib.sha256()
    for node in module.graph.nodes:
        if node.op == "call_function":
            digest.update(str(node.target).encode())
    for block in blocks:
        digest.update(f"{block.kind} {block.name} {len(block.values)}".encode())
    return digest.hexdigest()[:16]


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings that torch.export gives about its own internals say nothing to our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch(\.|$)")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def recapture(program: Program, bound: BoundCall) -> Program:
    """Capture the program's model again for a call of another shape or type, with the same blocks.

    Where both graphs have the same operators in the same order, blocks keep their places; else they are found again and
    must have the same names.

    Raises:
        CaptureError: the new graph has other blocks, so that a mask for the old one cannot be used.
    """
    roles = {name: role for name, role in program.roles.items() if role in ("conditioning", "step")}
    with _quiet(), torch.no_grad():
        symbolic = _from_symbolic(program, bound, roles)
    if symbolic is not None:
        with contextlib.suppress(CaptureError):  # symbolic sizes can lead through other operators
            return _carry_blocks(program, symbolic)
    return _carry_blocks(program, capture_bound(program.model, program.signature, bound, roles))


def _carry_blocks(program: Program, fresh: Program) -> Program:
    """A new capture with the blocks of an old one."""
    old = [node for node in program.graph_module.graph.nodes if node.op == "call_function"]
    new = [node for node in fresh.graph_module.graph.nodes if node.op == "call_function"]
    if [str(node.target) for node in old] == [str(node.target) for node in new]:
        twins = {a.name: b.name for a, b in zip(old, new, strict=True)}
        values = {block.name: tuple(twins[v] for v in block.values) for block in program.blocks}
        blocks = describe_blocks(fresh.graph_module.graph, program.blocks, values, fresh.batch_size)
    else:
        by_name = {block.name: block for block in fresh.blocks}
        missing = [block.name for block in program.blocks if block.name not in by_name]
        if missing:
            raise CaptureError(
                f"captured for other shapes, {type(program.model).__name__} has no blocks {missing[:5]}; "
                "accelerate the model for these shapes separately"
            )
        blocks = tuple(by_name[block.name] for block in program.blocks)
    return replace(fresh, blocks=blocks, fingerprint=program.fingerprint, symbolic=program.symbolic)


def _from_symbolic(program: Program, bound: BoundCall, roles: dict[str, str]) -> Program | None:
    """The program for another shape from one symbolic capture, compared with the model; ``None`` if it cannot be had."""
    model = program.model
    try:
        if not any(graph.covers(bound) for graph in program.symbolic):
            wrapper = _Wrapper(model, program.example).eval()
            made = export_symbolic(program.example, bound, wrapper, lambda exported: functionalize(exported, model, "model"))
            if made is None or not made.covers(bound):
                return None
            program.symbolic.append(made)
        graph = next(graph for graph in program.symbolic if graph.covers(bound))
        module = graph.at(bound)
        difference = _verify(module, model, bound)
    except Exception:  # an export fails in many ways; another capture follows
        logger.debug("no symbolic capture", exc_info=True)
        return None
    if difference is not None:
        logger.debug("the symbolic capture is refused: %s", difference)
        return None
    outputs = _output_spec(model, bound)
    return _assemble(module, model, program.signature, bound, outputs, roles, "torch.export (symbolic sizes)")
