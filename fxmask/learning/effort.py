"""How much work learning may take, and what bounds a plan besides its cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxmask.errors import OutcomeError
from fxmask.ir.plan import Plan


@dataclass(frozen=True)
class Effort:
    """How much work a plan may take, in full sampling runs of the recorded trajectories.

    Attributes:
        units: in all, for one outcome; refinement stops there.
        kinds: how many levels are tried at equal distances, 0: all of them.
        starts: first steps at which runs are measured, 0: none.
        levels: for how many levels.
        search: units of local search.
        rounds: of refinement.
        finalists: how many schedules are refined and compared on held-out noise.
        instant: how many plans of recorded runs alone are tried, for each number of full steps.
        lanes: units beyond ``units`` for plans in which the lanes of guidance have rows of their own, 0: they are not tried.
        fresh: units beyond ``units`` for judging plans on fresh noise, where the sampler injects some or lanes have rows of
            their own, 0: they are not.
    """

    units: float
    kinds: int
    starts: int
    levels: int
    search: float
    rounds: int
    finalists: int
    instant: int = 3
    lanes: float = field(default=0.0, repr=False)  # checkpoints of before know effort by its other fields
    fresh: float = field(default=0.0, repr=False)  # likewise


EFFORTS = {
    "default": Effort(units=120.0, kinds=0, starts=8, levels=2, search=15.0, rounds=2, finalists=3, lanes=60.0, fresh=15.0),
    "quick": Effort(units=18.0, kinds=3, starts=0, levels=0, search=0.0, rounds=1, finalists=1, lanes=6.0),
}


@dataclass(frozen=True)
class Limits:
    """Bounds on a plan besides its MACs.

    Attributes:
        max_graphs: most distinct step graphs.
        max_cache_bytes: most bytes cached at once, at the captured batch size.

    Raises:
        OutcomeError: a bound is no whole number, or below 1.
    """

    max_graphs: int | None = None
    max_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OutcomeError(f"{name}={value!r} must be a whole number, at least 1")

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan keeps to them."""
        graphs, cached = self.max_graphs, self.max_cache_bytes
        return (graphs is None or plan.distinct_graphs <= graphs) and (cached is None or plan.peak_cache_bytes <= cached)
