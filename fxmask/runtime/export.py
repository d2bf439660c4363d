"""Compiling all of a plan's step graphs ahead of time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxmask.backends.package import Package, Packages
from fxmask.backends.toolchain import cpu_compiler_problem
from fxmask.errors import BackendError, MaskError
from fxmask.files.foreign import foreign_errors_as
from fxmask.frontend.modules import module_device
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore
from fxmask.storage.graph_data import graph_to_data
from fxmask.storage.package_weights import weights_to_data
from fxmask.storage.recompute import check_values


def compile_packages(program: Program, plan: Plan, known: Mapping[str, Package], *, closed: bool, progress: bool) -> Packages:
    """Compile what the steps of a plan run, and what runs once per generation. The first step's graph computes everything, so
    it also serves calls that the plan does not cover.

    Args:
        program: the captured denoiser.
        plan: of this program.
        known: packages that are not compiled again.
        closed: compile nothing else.
        progress: show a progress bar.

    Returns:
        The compiler, which holds the packages, in files that go when it goes.

    Raises:
        MaskError: the program holds something that cannot be stored.
        BackendError: there is no C++ compiler, or a step graph cannot be compiled ahead of time.
    """
    graph_to_data(program.graph_module.graph)  # refuse what cannot be stored before it is compiled
    weights_to_data(program)
    with foreign_errors_as(MaskError, "the program cannot be stored", "save its plan instead"):
        check_values(program.graph_module, list(program.example.tensors.values()))
    device = module_device(program.model)
    problem = cpu_compiler_problem() if device.type == "cpu" and not closed else None
    if problem is not None:
        raise BackendError(f"exporting needs a C++ compiler: {problem}. Install g++ or clang, or set CXX, and export again")
    compiler = Packages(known, device, closed)
    with torch.no_grad():
        Executor(plan, GraphStore(program, "package", compiler=compiler)).compile_all(progress=progress)
    return compiler
