"""The best schedules, and what refinement makes of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from fxmask.errors import InputError
from fxmask.learning.candidate import Candidate
from fxmask.learning.constraints import keeps_limits
from fxmask.learning.effort import Limits
from fxmask.learning.measured import Measured
from fxmask.learning.schedule import Coefficients, Terms
from fxmask.learning.student import Student

logger = logging.getLogger(__name__)
ROUNDS = 5  # of refinement at most for the best plan with a stochastic sampler, and by adjoints
ENOUGH = 0.03  # dB: a round that gains less is the last one


def best_of_families(pool: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best schedules, one of each family first."""
    ranked = sorted(pool, key=lambda c: c.score)
    families: dict[str, Candidate] = {}
    for candidate in ranked:
        families.setdefault(candidate.schedule.family, candidate)
    first = list(families.values())
    return (first + [c for c in ranked if c not in first])[:count]


def refine_finalists(
    measured: Measured,
    finalists: Sequence[Candidate],
    limits: Limits,
    *,
    rounds: int,
    ends: float,
    stochastic: bool,
    crossed: bool = False,
) -> list[Candidate]:
    """The finalists, and what refinement makes of them while units are left: those of many coefficients need adjoints.

    Where adjoints refine, and with a stochastic sampler, where fits along the way say less about the final samples, each gets
    one round and the best of them more, as long as noise that it was not fitted on is better for it too.

    Args:
        measured: measures.
        finalists: to refine.
        limits: that refined plans keep.
        rounds: of refinement.
        ends: units.
        stochastic: whether the sampler is.
        crossed: whether units must be left to judge them by cross-validation.
    """
    found, refined = list(finalists), []
    for candidate in sorted(finalists, key=lambda c: c.score):
        if candidate.is_refinable:
            freed = free_coefficients(measured.student, candidate, limits) if stochastic else candidate
            better = measured.refine(freed, 1 if stochastic else rounds, ends, again=stochastic, crossed=crossed)
            if better and (not better.schedule.blend or measured.judged(better)[0] < measured.judged(candidate)[0]):
                refined.append(better)
        elif not crossed:
            refined += _by_adjoints(measured, candidate, ends)
    if not refined or rounds < 2:
        return found + refined
    best = min(refined, key=lambda c: c.score)
    for _ in range(ROUNDS if stochastic or not best.is_refinable else 0):
        if best.is_refinable or best.schedule.blend:
            better = measured.refine(best, 1, ends, again=True)
        else:
            better = next(iter(_by_adjoints(measured, best, ends)), None)
        if not better or better.score > best.score - ENOUGH:
            break
        if better.schedule.blend and measured.judged(better)[0] > measured.judged(best)[0]:
            break
        best = better
        refined.append(better)
    return found + refined


def _by_adjoints(measured: Measured, candidate: Candidate, ends: float) -> list[Candidate]:
    """A candidate of many coefficients after one round, if learned and held-out images together are better for it."""
    if not measured.has_adjoints:
        return []
    try:
        better = measured.refine(candidate, 1, ends, again=True)
    except InputError as error:  # no room to pass anything backwards; these coefficients need not be refined
        logger.info("coefficients of %s stay as they are: %s", candidate.schedule.description, error)
        return []
    if better is None:
        return []
    before, after = (measured.of_all(c.score, measured.judged(c)[0]) for c in (candidate, better))
    return [better] if after < before else []


def free_coefficients(student: Student, candidate: Candidate, limits: Limits) -> Candidate:
    """With a stochastic sampler, the same candidate with more coefficients to refine, if some of its steps compute part.

    Reused blocks do not see the noise that was injected since. They may be scaled, and read an older value too; the
    output is blended with the one before and with noisy samples. What is nearest at each step, block by block, is not
    best in the end, so all of it starts as plain reuse.
    """
    schedule, output = candidate.schedule, student.output
    partial = any(loads and output not in loads for loads in schedule.loads)
    if output is None or not student.reads_samples(output) or not partial:
        return candidate
    freed = replace(schedule, samples=max(2, schedule.samples), blend=1)
    coefficients: dict[tuple[int, str], Terms] = {}
    for i, loads in enumerate(schedule.loads):
        for name in sorted(loads | ({output} if student.blends(freed, i) else set())):
            given = dict(candidate.coefficients.get((i, name), ()))
            sources = list(dict.fromkeys([*given, *student.sources(freed, i, name)]))
            coefficients[i, name] = tuple((s, given.get(s, 0.0) if given else float(s == sources[0])) for s in sources)
    result = replace(candidate, schedule=freed, coefficients=coefficients)
    return result if keeps_limits(student, limits, freed, coefficients) else candidate


def refit_on_held_out(measured: Measured, candidate: Candidate, judged: float) -> Coefficients:
    """The coefficients after a last step on the held-out noise, kept if all images are better for it.

    With so many coefficients that only adjoints refine them, the held-out noise has told when to stop: these stay.
    """
    if candidate.schedule.blend or not candidate.is_refinable:
        return candidate.coefficients
    score, refitted, again = measured.refit(candidate)
    better = measured.of_all(again, score) < measured.of_all(candidate.score, judged)
    return refitted if better else candidate.coefficients
