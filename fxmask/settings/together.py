"""Plans of several denoisers of one pipeline, for one outcome of all of them together.

Each takes some of the steps, or has a sampling loop of its own. What a step of each costs differs, and so does what it is
worth: full steps are shared out as they are between parts of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxmask.learning.instant.parts import PartsLearner, Piece, best_plan, counts_of, learner_of
from fxmask.learning.instant.plans import InstantLearner, formed_share
from fxmask.learning.outcome import Outcome

if TYPE_CHECKING:
    from fxmask.settings.known import Known
    from fxmask.settings.session import Session


def fit_together(waiting: Sequence[tuple[Session, Known]], outcome: Outcome) -> None:
    """Make the plans of several denoisers from what was recorded of them in one call.

    Args:
        waiting: of each denoiser the session, and what is known of the setting.
        outcome: of all together.

    Raises:
        OutcomeError: it is out of reach.
        CaptureError, InputError: one of them cannot be planned.
    """
    fitted, pieces = [], []
    for session, known in waiting:
        program = session.captured(known.runs[-1])
        learner, share = learner_of(list(known.runs), program), formed_share(program)
        macs = program.macs / max(1, program.batch_size)
        own = _pieces(learner, share, macs)
        fitted.append((session, known, program, learner, len(own)))
        pieces += own
    counts = counts_of(pieces, outcome)
    for session, known, program, learner, size in fitted:
        plans = [best_plan(piece, count) for piece, count in zip(pieces[:size], counts[:size], strict=True)]
        pieces, counts = pieces[size:], counts[size:]
        session.keep(known, program, learner, learner.joined(plans) if isinstance(learner, PartsLearner) else plans[0])


def _pieces(learner: InstantLearner | PartsLearner, share: float, macs: float) -> list[Piece]:
    """The parts of a denoiser's run.

    Args:
        learner: of the run.
        share: what a formed step costs, as a share of a full one.
        macs: of one row of a full step.
    """
    if isinstance(learner, PartsLearner):
        return [Piece(p.learner, p.cost * macs, p.share) for p in learner.pieces(share)]
    rows = sum(x.shape[0] for x in learner.runs[0].outputs[0])
    return [Piece(learner, rows * macs, share)]
