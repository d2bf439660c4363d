"""nn.Module -> Program: a ladder of ways to capture, each checked against the model on real inputs.

An export that succeeds can still compute something else, so no rung is trusted: a graph that differs from the model is
refused and the next rung is tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxmask.calls import RETURN_DICT, BoundCall, OutputSpec, Signature, flatten_output
from fxmask.errors import CaptureError, InputError
from fxmask.inputs import fake_call, fake_copy, infer_call, is_abstract, needed_names, quiet_torch
from fxmask.ladder import DRAFT, LADDER, MODEL, Export, Wrapper, explain, export_running, refuse_data_dependent, trace_values
from fxmask.passes.count_macs import count_attention_macs, count_macs
from fxmask.passes.find_blocks import describe_blocks, find_blocks
from fxmask.passes.functionalize import functionalize
from fxmask.program import Block, Program
from fxmask.symbolic import export_symbolic

logger = logging.getLogger(__name__)

ROLES = ("sample", "timestep", "conditioning", "step")
UNVERIFIED = "torch.export (fake tensors, not verified)"
# Largest difference, relative to the largest output, that still counts as rounding.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def capture(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
    batch_size: int = 2,
) -> Program:
    """Capture a denoiser as a functional graph and find its blocks.

    A model without weights (built under ``torch.device("meta")`` or a fake tensor mode) is captured too, for its blocks and
    MACs: the program says ``verified=False`` and cannot be compiled.

    Args:
        model: the denoiser, in eval mode. Its weights are shared, never copied.
        example_inputs: arguments of one call by name. What is missing is inferred from the signature and the config, with
            random values: enough for a graph, not to learn a mask from.
        roles: overrides of what an argument is: ``"sample"``, ``"timestep"``, ``"conditioning"`` (constant over a
            generation) or ``"step"`` (changes at every step, e.g. ControlNet residuals).
        batch_size: of inferred arguments.

    Raises:
        InputError: training mode, unknown roles, arguments that do not fit the model's signature, or that are missing and
            cannot be inferred; names them with shapes and types.
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
    with quiet_torch(), torch.no_grad():
        signature = Signature.of(model, roles)
        given = dict(example_inputs or {})
        if is_abstract(model):
            return _capture_abstract(model, signature, given, batch_size, dict(roles or {}))
        if not needed_names(signature) <= given.keys():
            given = infer_call(model, given, batch_size, signature)
        try:
            form, bound = _choose_timestep_form(model, signature, given)
            outputs = _output_spec(model, bound)
        except (CaptureError, InputError):
            raise
        except Exception as error:  # the model itself failed: perhaps for want of an argument
            inferred = _inferred(model, signature, given, batch_size, error)
            form, bound = _choose_timestep_form(model, signature, inferred)
            outputs = _output_spec(model, bound)
        return _capture(model, form, bound, outputs, dict(roles or {}))


def _inferred(
    model: torch.nn.Module, signature: Signature, given: dict[str, Any], batch_size: int, error: Exception
) -> dict[str, Any]:
    """The given arguments with those that the model cannot do without; its own ``error`` if nothing helps."""
    try:
        found = infer_call(model, given, batch_size, signature)
    except InputError as reason:
        raise InputError(f"{type(model).__name__} fails with the given arguments: {explain(error, model)}. {reason}") from error
    if found.keys() == given.keys():
        raise error
    return found


def _capture_abstract(
    model: torch.nn.Module, signature: Signature, given: dict[str, Any], batch_size: int, roles: dict[str, str]
) -> Program:
    """Capture of a model that has shapes but no weights, by way of a copy on fake tensors."""
    call = given if needed_names(signature) <= given.keys() else infer_call(model, given, batch_size, signature)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copy = fake_copy(model, mode)
    tried = []
    with mode:
        for batched in (True, False):
            form = replace(signature, batched_timestep=batched)
            try:
                bound = form.bind((), fake_call(call, mode))
                outputs = _output_spec(copy, bound)
                module = export_running(copy, bound)
                refuse_data_dependent(module)
                return _assemble(module, model, form, bound, outputs, roles, UNVERIFIED)
            except Exception as error:
                tried.append(f"  {UNVERIFIED}: {explain(error, copy)}")
                logger.debug("abstract capture failed", exc_info=True)
    raise CaptureError(f"{type(model).__name__}, which has no weights, could not be captured. Tried:\n" + "\n".join(tried))


def capture_bound(
    model: torch.nn.Module, signature: Signature, bound: BoundCall, roles: Mapping[str, str] | None = None
) -> Program:
    """Capture for a call that is already in canonical form."""
    with quiet_torch(), torch.no_grad():
        return _capture(model, signature, bound, _output_spec(model, bound), dict(roles or {}))


def _capture(
    model: torch.nn.Module, signature: Signature, bound: BoundCall, outputs: OutputSpec, roles: dict[str, str]
) -> Program:
    tried: list[str] = []
    for rung, export, form, call in _attempts(signature, bound, roles):
        module = _climb(model, call, signature.timestep, rung, export, tried)
        if module is not None:
            return _assemble(module, model, form, call, outputs, roles, rung)
    raise CaptureError(
        f"{type(model).__name__} could not be captured as a graph that computes what the model computes. "
        "Tried:\n" + "\n".join(tried) + _advice(model)
    )


def _climb(
    model: torch.nn.Module, bound: BoundCall, timestep: str | None, rung: str, export: Export, tried: list[str]
) -> fx.GraphModule | None:
    """The graph of one rung if it computes what the model computes; else ``None``, and the reason in ``tried``."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints the graph of an export that failed
            module = export(model, bound)
        refuse_data_dependent(module)
        difference = _verify(module, model, bound, timestep, many=rung.startswith(DRAFT))
    except Exception as error:  # each rung fails in its own ways; all of them are reported
        tried.append(f"  {rung}: {explain(error, model)}")
        logger.debug("%s failed", rung, exc_info=True)
        return None
    if difference is not None:
        tried.append(f"  {rung}: {difference}")
        return None
    return module


def _attempts(
    signature: Signature, bound: BoundCall, roles: Mapping[str, str]
) -> Iterator[tuple[str, Export, Signature, BoundCall]]:
    """The ladder. After tracing with values, the same with the values of masks, lengths and ids held fixed: these can be
    sizes, and a graph is for one size."""
    for rung, export in LADDER.items():
        yield rung + _held(signature), export, signature, bound
        if export is trace_values and not signature.fixed:
            names = tuple(
                name
                for name, x in bound.tensors.items()
                if _role(name, signature, roles) == "conditioning" and x.dim() <= 2 and _is_integral(x)
            )
            if names:
                fixed = replace(signature, fixed=names)
                yield rung + _held(fixed), export, fixed, fixed.bind((), bound.arguments)


def _held(signature: Signature) -> str:
    return f", {', '.join(signature.fixed)} fixed" if signature.fixed else ""


def _is_integral(x: torch.Tensor) -> bool:
    if x.is_complex():
        return False
    return not x.is_floating_point() or bool((x == x.round()).all())


def _advice(model: torch.nn.Module) -> str:
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if not scripted:
        return ""
    return f"\nTorchScript submodules cannot be exported: {scripted[:5]}; use the modules that they were scripted from"


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
    for candidate in (signature, single, replace(single, one_timestep=True)):
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


def run_model(model: torch.nn.Module, bound: BoundCall) -> tuple[OutputSpec, list[torch.Tensor]]:
    """Run the model once per value of ``return_dict``: how its outputs are put together, and the tensors in them."""
    tensors = tuple(bound.tensors.values())
    if RETURN_DICT not in bound.arguments:
        flat, build = flatten_output(model(**bound.rebuild(tensors)))
        return OutputSpec({None: build}), flat
    given = bound.arguments[RETURN_DICT]
    flat, build = flatten_output(model(**bound.rebuild(tensors)))
    builds = {given: build}
    with contextlib.suppress(Exception):
        builds[not given] = flatten_output(model(**bound.rebuild(tensors, **{RETURN_DICT: not given})))[1]
    return OutputSpec(builds), flat


def _output_spec(model: torch.nn.Module, bound: BoundCall) -> OutputSpec:
    return run_model(model, bound)[0]


def _verify(
    module: fx.GraphModule, model: torch.nn.Module, bound: BoundCall, timestep: str | None, many: bool = False
) -> str | None:
    """Compare graph and model on the example, on other values and at other timesteps.

    Returns a description of the first difference, or ``None``.
    """
    for name, tensors in _trial_inputs(bound, timestep, many):
        try:
            expected, _ = flatten_output(model(**bound.rebuild(tensors)))
        except Exception:
            if name == EXAMPLE:
                raise
            logger.debug("the model does not take %s", name, exc_info=True)  # e.g. a timestep beyond its table
            continue
        got = module(*tensors)
        for k, (a, b) in enumerate(zip(got, expected, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"output {k} is {a.dtype}{list(a.shape)}, the model's is {b.dtype}{list(b.shape)} ({name})"
            if _same(a, b):
                continue
            scale = float(b.abs().max()) if b.numel() else 0.0
            error = float((_wide(a) - _wide(b)).abs().max())
            if not error <= ROUNDING.get(b.dtype, 0.0) * max(scale, 1e-30):
                return f"output {k} differs from the model's by {error:.3g} (largest value {scale:.3g}; {name})"
    return None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


EXAMPLE = "example inputs"


def _trial_inputs(bound: BoundCall, timestep: str | None, many: bool = False) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """The example itself, the example with other values throughout, and with the first and last timesteps.

    ``many`` timesteps between them, with other values, where a branch on a value may have been frozen.
    """
    tensors = dict(bound.tensors)
    yield EXAMPLE, tuple(tensors.values())
    generator = torch.Generator().manual_seed(0)
    changed = []
    for x in tensors.values():
        if x.dim() > 1 and _is_mask(x):
            changed.append(_shorter(x))
        elif x.is_floating_point() and x.dim() > 1:
            noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
            changed.append(x * 0.5 + noise)
        elif x.dtype == torch.bool or x.is_complex() or not x.numel():
            changed.append(x)
        elif x.is_floating_point():
            changed.append(x / 2)
        else:
            changed.append(x // 2 if x.dim() <= 1 else x.flip(0))
    yield "other values", tuple(changed)
    if timestep in tensors and tensors[timestep].numel():
        t = tensors[timestep]
        last = 1.0 if t.is_floating_point() and float(t.abs().max()) <= 1 else LAST_TIMESTEP
        for value in (0, last):
            yield f"{timestep}={value:g}", tuple({**tensors, timestep: torch.full_like(t, value)}.values())
        for k in range(MANY if many else 0):
            value = last * (k + 0.5) / MANY
            yield f"{timestep}={value:g}", tuple({**tensors, timestep: torch.full_like(t, value)}.values())
            shift = 0.1 * (-1) ** k * 2 ** (k / 3)  # both ways, from small to far beyond noise: a mean has a sign
            shifted = {
                n: x + shift if n != timestep and x.is_floating_point() and x.dim() > 1 else x for n, x in tensors.items()
            }
            yield f"values shifted by {shift:.2g}", tuple(shifted.values())


def _is_mask(x: torch.Tensor) -> bool:
    return not x.is_complex() and bool(x.numel()) and bool(((x == 0) | (x == 1)).all()) and bool(x.any())


def _shorter(mask: torch.Tensor) -> torch.Tensor:
    """The mask with one entry less in its last row: lengths are easily burned into a graph."""
    changed = mask.clone()
    row = changed.view(-1, changed.shape[-1])[-1]
    kept = row.nonzero().flatten()
    if len(kept) > 1:
        row[kept[-1]] = 0
    return changed


LAST_TIMESTEP = 999  # of the usual 1,000 training steps
MANY = 24  # timesteps that a draft is compared at


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
        verified=rung != UNVERIFIED,
        fingerprint=fingerprint_of(module, blocks),
        weights=weights,
    )


def _role(name: str, signature: Signature, roles: Mapping[str, str]) -> str:
    root = name.split(".")[0]
    if name in roles or root in roles:
        return roles.get(name, roles.get(root, ""))
    if name == signature.sample:
        return "sample"
    return "timestep" if name == signature.timestep else "conditioning"


def fingerprint_of(module: fx.GraphModule, blocks: Sequence[Block]) -> str:
    """Digest of operators and blocks. Independent of shapes, so that other batch sizes of a model have the same one."""
    digest = hashlib.sha256()
    for node in module.graph.nodes:
        if node.op == "call_function":
            digest.update(str(node.target).encode())
    for block in blocks:
        digest.update(f"{block.kind} {block.name} {len(block.values)}".encode())
    return digest.hexdigest()[:16]


def recapture(program: Program, bound: BoundCall) -> Program:
    """Capture the program's model again for a call of another shape or type, with the same blocks.

    Where both graphs have the same operators in the same order, blocks keep their places; else they are found again and
    must have the same names.

    Raises:
        CaptureError: the new graph has other blocks, so that a mask for the old one cannot be used.
    """
    roles = {name: role for name, role in program.roles.items() if role in ("conditioning", "step")}
    with quiet_torch(), torch.no_grad():
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
        missing = [block.name for block in program.blocks if not _same_kind(block, by_name.get(block.name))]
        if missing:
            raise CaptureError(
                f"captured for other shapes, {type(program.model).__name__} has no blocks {missing[:5]}; "
                "accelerate the model for these shapes separately"
            )
        blocks = tuple(by_name[block.name] for block in program.blocks)
    return replace(fresh, blocks=blocks, fingerprint=program.fingerprint, symbolic=program.symbolic)


def _same_kind(old: Block, new: Block | None) -> bool:
    return new is not None and new.kind == old.kind and len(new.values) == len(old.values)


def _from_symbolic(program: Program, bound: BoundCall, roles: dict[str, str]) -> Program | None:
    """The program for another shape from one symbolic capture, compared with the model; ``None`` if it cannot be had."""
    model = program.model
    try:
        if not any(graph.covers(bound) for graph in program.symbolic):
            wrapper = Wrapper(model, program.example).eval()
            made = export_symbolic(program.example, bound, wrapper, lambda exported: functionalize(exported, model, MODEL))
            if made is None or not made.covers(bound):
                return None
            program.symbolic.append(made)
        graph = next(graph for graph in program.symbolic if graph.covers(bound))
        module = graph.at(bound)
        difference = _verify(module, model, bound, program.signature.timestep)
    except Exception:  # an export fails in many ways; another capture follows
        logger.debug("no symbolic capture", exc_info=True)
        return None
    if difference is not None:
        logger.debug("the symbolic capture is refused: %s", difference)
        return None
    outputs = _output_spec(model, bound)
    return _assemble(module, model, program.signature, bound, outputs, roles, "torch.export (symbolic sizes)")
