"""Which operators a stored graph may call: those that compute tensors from tensors, and nothing else."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from fxmask._torch import OpOverload, registered_operators
from fxmask.errors import MaskError

_NAME = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)

# Operators of these do something to the process: TorchScript, collectives, memory, profiling.
NO_COMPUTATION = frozenset(
    "_c10d_functional _c10d_functional_autograd _dtensor _native _test c10d coor debug_mode_ops debugprims export inductor "
    "mkldnn_prepacked onnx prim profiler static_runtime symm_mem".split()
)
FILES = frozenset({"aten.from_file", "aten.save", "aten.load", "aten.warn", "aten._print", "aten.format"})


def operator_named(name: Any) -> OpOverload:
    """The registered operator of that name, ``aten.add.Tensor``.

    Raises:
        MaskError: there is none, or it is none that a captured program can have.
    """
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise MaskError(f"{str(name)[:100]!r} is no name of an operator; the graph is damaged: export it again")
    return _operator(*found.groups())


@functools.lru_cache(maxsize=4096)
def _operator(namespace: str, packet: str, overload: str) -> OpOverload:
    name = f"{namespace}.{packet}.{overload}"
    dispatched = f"{namespace}::{packet}" + ("" if overload == "default" else f".{overload}")
    if dispatched not in registered_operators():
        raise MaskError(f"operator {name} is not registered in this process; import the library that defines it")
    operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(operator, OpOverload) or not _computes(namespace, packet, operator):
        raise MaskError(f"operator {name} is none that a captured program can have; export it again")
    return operator


def _computes(namespace: str, packet: str, operator: Any) -> bool:
    """Whether an operator returns new tensors or numbers, and does nothing besides."""
    schema = operator._schema
    if namespace in NO_COMPUTATION or f"{namespace}.{packet}" in FILES or schema.is_mutable or not schema.returns:
        return False
    return not any(str(argument.type) == "Storage" for argument in schema.arguments)
