"""nn.Module -> Program: a ladder of ways to capture, each checked against the model on real inputs.

An export that succeeds can still compute something else, so no rung is trusted: a graph that differs from the model is
refused and the next rung is tried.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxmask._torch import FakeTensorMode, tracing, uncompiled
from fxmask.errors import CaptureError, InputError
from fxmask.frontend.arguments import needed_names
from fxmask.frontend.assemble import UNVERIFIED, assemble_program, role_of
from fxmask.frontend.fake import fake_call, fake_copy, is_abstract, quiet_torch
from fxmask.frontend.infer import infer_call
from fxmask.frontend.modules import is_adapted, module_device, require_denoiser
from fxmask.frontend.refusals import advice, explain, refuse_active_hooks, refuse_data_dependent
from fxmask.frontend.rungs import LADDER, Export, export_draft, export_running
from fxmask.frontend.subject import Subject
from fxmask.frontend.timestep_form import choose_timestep_form
from fxmask.frontend.trace_values import trace_values
from fxmask.frontend.value_reads import ASSUMPTIONS, refuse_unseen
from fxmask.frontend.verify import find_difference, is_looked_up, many_inputs, output_spec_of, same_values, usual_inputs
from fxmask.ir.calls import BoundCall, Signature
from fxmask.ir.outputs import OutputSpec, flatten_output
from fxmask.ir.program import Program

logger = logging.getLogger(__name__)
ROLES = ("sample", "timestep", "conditioning", "step")


def capture(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
    *,
    batch_size: int = 2,
) -> Program:
    """Capture a denoiser as a functional graph and find its blocks.

    The graph is what the model computes as it is now: its Python state (attributes, hooks, adapters) and the modes around the
    call (autocast, default dtype) belong to the program, and the runtime looks whether they are still the same. The model is
    run a few times, on copies of the arguments, and left as it was.

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
    given_model, model = model, require_denoiser(model)
    if model.training:
        raise InputError(
            f"{type(model).__name__} is in training mode, where dropout and batch statistics change every call; "
            "call model.eval() first"
        )
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise InputError(
            f"example_inputs must be the arguments of one call by name, got {type(example_inputs).__name__}; of a recorded run "
            "pass run.calls[0][0]"
        )
    unknown = {name: role for name, role in (roles or {}).items() if role not in ROLES}
    if unknown:
        raise InputError(f"unknown roles {unknown}; choose from {ROLES}")
    refuse_active_hooks(model)
    with tracing(), quiet_torch(), torch.no_grad():
        signature = Signature.of(model, roles)
        given = dict(example_inputs or {})
        if is_abstract(model):
            return _capture_abstract(model, signature, given, batch_size, dict(roles or {}))
        if not needed_names(signature) <= given.keys():
            given = infer_call(model, given, batch_size, signature)
        subject = Subject(model, module_device(model).type)
        try:
            form, bound = choose_timestep_form(subject, signature, given)
            outputs = output_spec_of(subject, bound)
        except (CaptureError, InputError):
            raise
        except Exception as error:  # the model itself failed: perhaps for want of an argument
            inferred = _inferred(model, signature, given, batch_size, error)
            form, bound = choose_timestep_form(subject, signature, inferred)
            outputs = output_spec_of(subject, bound)
        _refuse_other_result(given_model, subject, bound)
        return _capture(subject, form, bound, outputs, dict(roles or {}))


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
    device = module_device(copy)
    tried = []
    with mode:
        for batched in (True, False):
            form = replace(signature, batched_timestep=batched)
            try:
                bound = form.bind((), fake_call(call, mode, device))
                outputs = output_spec_of(Subject(copy, device.type), bound)
                module = export_running(copy, bound)
                refuse_data_dependent(module)
                return assemble_program(module, model, form, bound, outputs, roles, UNVERIFIED)
            except Exception as error:
                tried.append(f"  {UNVERIFIED}: {explain(error, copy)}")
                logger.debug("abstract capture failed", exc_info=True)
    raise CaptureError(f"{type(model).__name__}, which has no weights, could not be captured. Tried:\n" + "\n".join(tried))


def capture_bound(
    model: torch.nn.Module, signature: Signature, bound: BoundCall, roles: Mapping[str, str] | None = None
) -> Program:
    """Capture for a call that is already in canonical form."""
    refuse_active_hooks(model)
    with tracing(), quiet_torch(), torch.no_grad():
        subject = Subject(model, module_device(model).type)
        return _capture(subject, signature, bound, output_spec_of(subject, bound), dict(roles or {}))


def _capture(subject: Subject, signature: Signature, bound: BoundCall, outputs: OutputSpec, roles: dict[str, str]) -> Program:
    tried: list[str] = []
    model = subject.model
    _refuse_writes(subject)
    _refuse_kept_state(subject, bound)
    for rung, export, form, call in _attempts(signature, bound, roles):
        module = _climb(subject, form, call, roles, rung, export, tried)
        if module is not None:
            _warn_of_hooks(subject)
            program = assemble_program(module, subject.original, form, call, outputs, roles, rung)
            return replace(program, state=subject.snapshot, ambient=subject.ambient)
    why = advice(model)
    raise CaptureError(
        f"{type(model).__name__} could not be captured as a graph that computes what the model computes. "
        + (f"{why} " if why else "")
        + "Tried:\n"
        + "\n".join(tried)
    )


def _refuse_other_result(given: torch.nn.Module, subject: Subject, bound: BoundCall) -> None:
    """Refuse a PEFT model that does more than call the model inside of it, which is captured in its place."""
    wrapper = uncompiled(given)
    if not is_adapted(wrapper):
        return
    outside, _ = flatten_output(Subject(wrapper, module_device(wrapper).type)(bound.arguments))
    inside, _ = flatten_output(subject(bound.arguments))
    if not all(same_values(a, b) for a, b in zip(outside, inside, strict=True)):
        raise CaptureError(
            f"{type(wrapper).__name__} computes something else than the {type(subject.model).__name__} that it wraps, which is "
            "what would be accelerated. Merge its adapters (merge_and_unload()), or pass model.get_base_model()"
        )


def _refuse_writes(subject: Subject) -> None:
    if subject.writes:
        raise CaptureError(
            f"{type(subject.model).__name__}.forward writes to its arguments {subject.writes} in place (x *= 2, x.mul_(2), "
            "x[...] = y). A graph would leave them as they are, and the sampler would go on with other values; write "
            "x = x * 2 in forward, or give it a clone"
        )


def _refuse_kept_state(subject: Subject, bound: BoundCall) -> None:
    """Refuse a model whose result depends on what an earlier call of the same run left in it."""
    if not subject.written_state:
        return
    first = tuple(bound.tensors.values())
    second = tuple(torch.randn_like(x) if x.is_floating_point() and x.dim() > 2 else x for x in first)
    alone, _ = flatten_output(subject(bound.rebuild(second)))
    after = subject.twice(bound.rebuild(first), bound.rebuild(second))
    if not all(same_values(a, b) for a, b in zip(flatten_output(after)[0], alone, strict=True)):
        raise CaptureError(
            f"{type(subject.model).__name__} keeps state between calls in {subject.written_state[:5]}: its result depends on "
            "the call before, and that cannot be cached. Switch that off (a cache of its own, for instance) for acceleration"
        )


def _warn_of_hooks(subject: Subject) -> None:
    hooks = subject.snapshot.hooks
    if hooks:
        warnings.warn(
            f"{type(subject.model).__name__} has forward hooks ({', '.join(hooks[:3])}{', ...' if len(hooks) > 3 else ''}). "
            "What they change is captured; what else they do, such as keeping features, is not done by the accelerated model. "
            "Remove them before capture if that matters",
            stacklevel=4,
        )


def _climb(
    subject: Subject,
    signature: Signature,
    bound: BoundCall,
    roles: Mapping[str, str],
    rung: str,
    export: Export,
    tried: list[str],
) -> fx.GraphModule | None:
    """The graph of one rung if it computes what the model computes; else ``None``, and the reason in ``tried``."""
    model, timestep = subject.model, signature.timestep
    try:
        with contextlib.redirect_stderr(io.StringIO()), subject.untouched():  # torch.export prints what failed
            module = export(model, bound)
        refuse_data_dependent(module)
        refuse_unseen(module.meta.get(ASSUMPTIONS), list(bound.tensors), lambda name: role_of(name, signature, roles))
        inputs = many_inputs if export is export_draft else usual_inputs
        difference = find_difference(module, subject, bound, inputs(bound, timestep, is_looked_up(module, bound, timestep)))
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
                if role_of(name, signature, roles) == "conditioning" and x.dim() <= 2 and _is_integral(x)
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
