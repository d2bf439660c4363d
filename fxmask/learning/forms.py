"""The forms of call in recorded runs, and the program of each.

Lanes and runs may differ in form: prompts of other lengths, other batches, other image sizes. All forms have the same blocks,
so one mask is for all of them. Values are only ever read again within a lane, whose calls keep one form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxmask.errors import CaptureError, InputError
from fxmask.frontend.recapture import recapture
from fxmask.ir.calls import BoundCall
from fxmask.ir.program import Program
from fxmask.sampling.sampler import Sampler

REMEDY = "make the calls alike, e.g. pad all prompts to one length, or learn from runs of one form"


class Forms:
    """Programs by the form of call that they were captured for.

    Args:
        program: the captured denoiser.
        trajectories: recorded runs. Costs are those of the first call of the first one.

    Attributes:
        base: the program of that call.

    Raises:
        InputError: that call cannot be captured with the blocks of ``program``.
    """

    def __init__(self, program: Program, trajectories: Sequence[Sampler]) -> None:
        self._given = program
        self._known: dict[Any, Program] = {program.example.key: program}
        self.base = self._of(self._bind(trajectories[0], 0, 0), "recorded run 0")

    def of_run(self, trajectory: Sampler, number: int = 0) -> tuple[Program, ...]:
        """The program of each lane of a recorded run.

        Args:
            trajectory: the run.
            number: which run it is, for messages.

        Raises:
            InputError: steps have different numbers of lanes, a lane changes its form from step to step, or one cannot be
                captured with the same blocks.
            CaptureError: the model takes another way for some call of a form than for the one that was captured.
        """
        lanes = {len(step) for step in trajectory.calls}
        if len(lanes) > 1:
            raise InputError(
                f"the steps make different numbers of denoiser calls ({sorted(lanes)}), e.g. because guidance starts or stops "
                "midway; learn from runs whose guidance lasts from the first to the last step"
            )
        return tuple(self._of_lane(trajectory, number, lane) for lane in range(len(trajectory.calls[0])))

    def _of_lane(self, trajectory: Sampler, number: int, lane: int) -> Program:
        first = self._bind(trajectory, 0, lane)
        where = f"recorded run {number}" + (f", lane {lane}" if len(trajectory.calls[0]) > 1 else "")
        form = self._of(first, where)
        for step in range(trajectory.num_steps):
            bound = self._bind(trajectory, step, lane)
            if bound.key != first.key:
                raise InputError(
                    f"the calls of {where}, change their form at step {step}: {_listed(first.differences(bound))}. A cached "
                    "value is of one form. Keep shapes and plain values the same over a run; pass what must change as a tensor"
                )
            form.require_assumed(bound, f"recorded step {step}")
        return form

    def _of(self, bound: BoundCall, where: str) -> Program:
        if bound.key not in self._known:
            self._known[bound.key] = self._captured(bound, where)
        return self._known[bound.key]

    def _captured(self, bound: BoundCall, where: str) -> Program:
        try:
            fresh = recapture(self._given, bound)
        except CaptureError as error:
            reason = str(error)
        else:
            if fresh.example.key == bound.key:
                return fresh
            reason = f"its graph would be for the values of {list(fresh.signature.fixed)} alone"
        differences = _listed(self._given.example.differences(bound))
        raise InputError(
            f"{where} calls {type(self._given.model).__name__} in another form than the captured call ({differences}), and it "
            f"cannot be captured for both with the same blocks: {reason}. Either {REMEDY}"
        )

    def _bind(self, trajectory: Sampler, step: int, lane: int) -> BoundCall:
        return self._given.signature.bind((), dict(trajectory.calls[step][lane]))


def _listed(differences: Sequence[str]) -> str:
    return "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "") or "other modes"
