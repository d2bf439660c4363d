"""What Inductor generated: kept, and its kernels counted."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator

from fxmask._torch import collected_output_code, without_inductor_cache

_collecting: contextvars.ContextVar[bool] = contextvars.ContextVar("fxmask_collecting", default=False)


@contextlib.contextmanager
def generated_code() -> Iterator[None]:
    """Keep the code that Inductor generates inside; nothing is taken from its cache."""
    token = _collecting.set(True)
    try:
        with without_inductor_cache():
            yield
    finally:
        _collecting.reset(token)


@contextlib.contextmanager
def collected_code(code: list[str]) -> Iterator[None]:
    """Append what Inductor generates inside to ``code``, where ``generated_code`` is active."""
    if not _collecting.get():
        yield
        return
    with collected_output_code(code.append):
        yield


def count_calls(code: str) -> tuple[int, int]:
    """How many generated kernels and how many library routines a generated module calls."""
    lines = code[code.find("def call(") :].splitlines()
    kernels = sum(bool(re.match(r"\s+(?:\w+ = )?(?:cpp_fused\w*\(|triton_\w+\.run\()", line)) for line in lines)
    externs = sum(bool(re.match(r"\s+(?:\w+ = )?(?:extern_kernels\.|torch\.ops\.|aten\.)", line)) for line in lines)
    return kernels, externs
