"""What a plan saves: a table for people, a dict for programs."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.ir.text import COMPUTED, LOADED, SOME
from fxmask.runtime.account import Account
from fxmask.runtime.checks import Checks
from fxmask.runtime.history import Run
from fxmask.runtime.quality import Quality

LARGEST = 12  # blocks that a table lists; the rest is summed up
LATEST = 3  # runs that are listed
STEPS = 24  # steps whose shares are listed one by one


@dataclass(frozen=True)
class Report:
    """Savings of a plan.

    Attributes:
        model: class name of the denoiser.
        num_steps: T.
        mac_ratio: total MACs of the full run over total MACs of the plan, the ideal speed-up.
        macs_per_step: multiply-accumulates of each step, at the captured batch size; of each call, if lanes have rows of their
            own. What follows counts likewise.
        full_macs: of one unmasked step.
        distinct_graphs: how many different step graphs run.
        peak_cache_bytes: largest number of bytes cached at once, per lane, at the captured batch size.
        kept_per_step: share of the full MACs that each step computes.
        kept_per_block: for each block of the mask, how many steps compute it.
        batch_size: of the captured call.
        runs: the latest runs, the last one last: calls, how many followed the plan, MACs really spent.
        error: relative L2 error of the final samples that the plan was estimated to have; ``None`` if it was not.
        account: what the plans of the model have cost and saved; ``None`` where nobody keeps it.
        block_macs: for each block of the mask, multiply-accumulates of one call that die when it is skipped.
        quality: what ``fxmask.measure`` found with this plan; ``None`` if it was not measured.
        lanes: names of lanes that have rows of their own.
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
    block_macs: dict[str, int] = field(default_factory=dict)
    quality: Quality | None = None
    lanes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        program: Program,
        plan: Plan,
        runs: Iterable[Run] = (),
        checks: Checks | None = None,
        account: Account | None = None,
        quality: Quality | None = None,
    ) -> Report:
        """Report of a plan for a program, and of the latest runs."""
        mask = plan.mask
        rows = mask.by_call.compute[plan.start :]
        counts = {name: int(rows[:, b].sum()) for b, name in enumerate(mask.blocks)}
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
            block_macs={name: program.block(name).macs for name in mask.blocks},
            quality=quality,
            lanes=mask.lanes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        account = None if self.account is None else self.account.to_dict()
        quality = None if self.quality is None else self.quality.to_dict()
        return {**data, "runs": [_run_to_dict(run) for run in self.runs], "account": account, "quality": quality}

    @property
    def largest(self) -> tuple[str, ...]:
        """Names of the mask's blocks, those that save most first."""
        return tuple(sorted(self.kept_per_block, key=lambda name: -self.block_macs.get(name, 0)))

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people: what it saves, how good it is, what the last runs did, the largest blocks."""
        found = [
            ("denoiser", f"{self.model}, batch {self.batch_size}"),
            ("steps", f"{self.num_steps}" + (f", lanes {', '.join(self.lanes)} with rows of their own" if self.lanes else "")),
            ("MAC ratio (ideal)", f"{self.mac_ratio:.2f}x"),
            *([] if self.quality is None else self.quality.lines()),
            ("distinct graphs", f"{self.distinct_graphs}"),
            ("peak cache", f"{self.peak_cache_bytes / 2**20:.2f} MiB {'for all lanes' if self.lanes else 'per lane'}"),
            ("kept per call" if self.lanes else "kept per step", _shares(self.kept_per_step)),
        ]
        if self.error is not None:
            found.append(("estimated error", f"{self.error:.3g} of the samples' size"))
        found += [("latest run" if run is self.runs[-1] else "earlier run", str(run)) for run in self.runs[-LATEST:]]
        if self.account is not None:
            found.append(("images and seconds", str(self.account)))
        return found + self._block_lines()

    def _block_lines(self) -> list[tuple[str, str]]:
        shown = self.largest[:LARGEST]
        found = [
            (
                "block",
                "computed at"
                + (f", the {LARGEST} largest of {len(self.kept_per_block)}" if len(shown) < len(self.kept_per_block) else ""),
            )
        ]
        for name in shown:
            share = f", {self.block_macs[name] / max(1, self.full_macs):.1%} of the MACs" if name in self.block_macs else ""
            rows = f"{len(self.macs_per_step)} calls" if self.lanes else f"{self.num_steps} steps"
            found.append((name, f"{self.kept_per_block[name]}/{rows}{share}"))
        return found

    def __str__(self) -> str:
        lines = self.lines()
        width = max([len(name) for name, _ in lines] + [18])
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table, and a bar for each step; a page of its own, without scripts."""
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in self.lines())
        return f"<div>{_bars(self.kept_per_step)}<table>{rows}</table></div>"


def _shares(kept: tuple[float, ...]) -> str:
    """The share of each step; of many, a character for each."""
    if len(kept) <= STEPS:
        return " ".join(f"{100 * x:.0f}%" for x in kept)
    line = "".join(COMPUTED if x > 0.99 else SOME if x > 0.01 else LOADED for x in kept)
    return f"{line} ({COMPUTED} all, {SOME} some, {LOADED} none)"


def _bars(kept: tuple[float, ...]) -> str:
    """Shares of the steps as an SVG of at most 600 pixels."""
    width = max(1, min(10, 600 // max(1, len(kept))))
    bars = "".join(
        f"<rect x='{k * width}' y='{32 - round(32 * x)}' width='{max(1, width - 1)}' height='{round(32 * x)}' fill='#08306b'>"
        f"<title>step {k}: {x:.0%}</title></rect>"
        for k, x in enumerate(kept)
    )
    return f"<svg width='{width * len(kept)}' height='33'>{bars}<path d='M0 32.5H{width * len(kept)}' stroke='#555'/></svg>"


def _run_to_dict(run: Run) -> dict[str, Any]:
    data = {name: value for name, value in vars(run).items() if name != "checks"}
    return {**data, "error": None if run.error is None else list(run.error)}
