"""What a plan saves: a table for people, a dict for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.ir.text import as_html
from fxmask.runtime.account import Account
from fxmask.runtime.checks import Checks
from fxmask.runtime.history import Run


@dataclass(frozen=True)
class Report:
    """Savings of a plan.

    Attributes:
        model: class name of the denoiser.
        num_steps: T.
        mac_ratio: total MACs of the full run over total MACs of the plan, the ideal speed-up.
        macs_per_step: multiply-accumulates of each step, at the captured batch size.
        full_macs: of one unmasked step.
        distinct_graphs: how many different step graphs run.
        peak_cache_bytes: largest number of bytes cached at once, per lane, at the captured batch size.
        kept_per_step: share of the full MACs that each step computes.
        kept_per_block: for each block of the mask, how many steps compute it.
        batch_size: of the captured call.
        runs: the latest runs, the last one last: calls, how many followed the plan, MACs really spent.
        error: relative L2 error of the final samples that the plan was estimated to have; ``None`` if it was not.
        account: what the plans of the model have cost and saved; ``None`` where nobody keeps it.
    """

    model: str
    num_steps: int
    mac_ratio: float
    macs_per_step: tuple[int, ...]
    full_macs: int
    distinct_graphs: int
    peak_cache_bytes: int
    kept_per_step: tuple[float, ...]
    kept_per_block: dict[str, int]
    batch_size: int
    runs: tuple[Run, ...] = ()
    error: float | None = None
    account: Account | None = None

    @classmethod
    def of(
        cls,
        program: Program,
        plan: Plan,
        runs: Iterable[Run] = (),
        checks: Checks | None = None,
        account: Account | None = None,
    ) -> Report:
        """Report of a plan for a program, and of the latest runs."""
        mask = plan.mask
        counts = {name: int(mask.compute[plan.start :, b].sum()) for b, name in enumerate(mask.blocks)}
        return cls(
            model=type(program.model).__name__,
            num_steps=mask.num_steps,
            mac_ratio=plan.mac_ratio,
            macs_per_step=plan.macs_per_step,
            full_macs=plan.full_macs,
            distinct_graphs=plan.distinct_graphs,
            peak_cache_bytes=plan.peak_cache_bytes,
            kept_per_step=plan.kept_per_step,
            kept_per_block=counts,
            batch_size=program.batch_size,
            runs=tuple(replace(run) for run in runs),
            error=None if checks is None else checks.error,
            account=account,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        account = None if self.account is None else self.account.to_dict()
        return {**data, "runs": [_run_to_dict(run) for run in self.runs], "account": account}

    def __str__(self) -> str:
        width = max([len(name) for name in self.kept_per_block] + [18])
        lines = [
            f"{'denoiser':<{width}}  {self.model}, batch {self.batch_size}",
            f"{'steps':<{width}}  {self.num_steps}",
            f"{'MAC ratio (ideal)':<{width}}  {self.mac_ratio:.2f}x",
            f"{'distinct graphs':<{width}}  {self.distinct_graphs}",
            f"{'peak cache':<{width}}  {self.peak_cache_bytes / 2**20:.2f} MiB per lane",
            f"{'kept per step':<{width}}  " + " ".join(f"{100 * kept:.0f}%" for kept in self.kept_per_step),
        ]
        if self.error is not None:
            lines.append(f"{'estimated error':<{width}}  {self.error:.3g} of the samples' size")
        lines.append(f"{'block':<{width}}  computed at")
        lines += [f"{name:<{width}}  {count}/{self.num_steps} steps" for name, count in self.kept_per_block.items()]
        lines += [f"{'latest run' if run is self.runs[-1] else 'earlier run':<{width}}  {run}" for run in self.runs]
        if self.account is not None:
            lines.append(f"{'images and seconds':<{width}}  {self.account}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(str(self))


def _run_to_dict(run: Run) -> dict[str, Any]:
    data = {name: value for name, value in vars(run).items() if name != "checks"}
    return {**data, "error": None if run.error is None else list(run.error)}
