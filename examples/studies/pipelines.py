"""What `fxmask.accelerate(pipe)` does with many kinds of pipeline: one table, every cell "works" or the reason why not.

    python examples/studies/pipelines.py [--only sd wan ...] [--write] [--again]

Tiny models with random weights, on one thread of a CPU, in a process of its own for each kind, which is cached in `build/`.
Columns: *one line*: the first image is bit for bit the original's, the second has a plan. *ones*: a mask of ones, by hand.
*ratio*: operations counted in the denoisers, in full over with the plan, meet the asked 1.5 within 3 %. *planned*: the calls
that compute are those of the plan. *second prompt*, *saved*: the same images, bit for bit, in a second process that loads the
plans. *unguided*, *size*, *steps*: another setting, in full once and then with a plan. *batch*: two samples with the plan of
one. *bfloat16*: all of it in that type. *restore*: the originals are back, and make what they made. *error*: relative L2 error
of the second image, which says little with random weights. `--write` puts the table into `examples/results/pipelines.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pipelines_images
import pipelines_sequences
import torch
from pipelines_parts import KINDS, Kind, seeded
from torch.utils.flop_counter import FlopCounterMode

import fxmask
from fxmask.learning.outcome import TOLERANCE
from fxmask.settings.components import component_of, denoisers_of, put
from fxmask.settings.pipeline import session_of
from fxmask.settings.session import Session

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results"
MODULES = (pipelines_images, pipelines_sequences)  # imported for what they register
RATIO = 1.5
MOST = 600  # seconds of one kind
WORKS = "works"
NONE = "has none"
LARGE = 0.5  # of the most operations of a call: it computed
COLUMNS = ("one line", "ones", "ratio", "planned", "second prompt", "saved", "unguided", "size", "steps", "batch", "bfloat16")
COLUMNS = (*COLUMNS, "restore", "error")


def attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of attention, from shapes; PyTorch's counter leaves out the one of CPUs."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations}


class Wrong(Exception):
    """A check failed."""


def made(pipe: Any, call: Mapping[str, Any], seed: int = 0, **changes: Any) -> torch.Tensor:
    """What a pipeline makes, as one tensor."""
    result = pipe(**{**call, **changes}, generator=seeded(seed))
    first = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    return torch.stack([torch.as_tensor(x) for x in first]) if isinstance(first, list) else torch.as_tensor(first)


def error_of(x: torch.Tensor, full: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((x.double() - full.double()).norm() / full.double().norm())


def built(kind: Kind) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and its call at the usual number of steps."""
    pipe, call = kind.build()
    return pipe, {**call, **dict.fromkeys(kind.step_names, kind.steps)}


def accelerated(pipe: Any) -> Session:
    """The pipeline's session."""
    fxmask.accelerate(pipe, speedup=RATIO, backend="eager", progress=False)
    return session_of(pipe)


def require(condition: bool, what: str) -> None:
    """Fail a check."""
    if not condition:
        raise Wrong(what)


def refused(session: Session) -> str | None:
    """Why the setting that was used last is not accelerated."""
    latest = [next(reversed(part.settings.values()), None) for part in session.parts]
    reasons = [known.refused for known in latest if known is not None and known.refused is not None]
    return reasons[0] if reasons else None


def check_setting(pipe: Any, session: Session, full: list[torch.Tensor], make: Callable[[int], torch.Tensor]) -> str:
    """A setting's first image is the original's, and its second has a plan."""
    before = [part.account().images for part in session.parts]
    first, second = make(0), make(1)
    require(torch.equal(first, full[0]), f"first image differs, {error_of(first, full[0]):.1g}")
    reason = refused(session)
    if reason is not None:
        require(torch.equal(second, full[1]), "refused, and the second image differs")
        return f"refused: {reason}"
    require(any(part.account().images > n for part, n in zip(session.parts, before, strict=True)), "no plan was followed")
    require(bool(second.isfinite().all()), "the second image is not finite")
    return WORKS


@contextlib.contextmanager
def counted(models: Sequence[torch.nn.Module]) -> Iterator[list[list[float]]]:
    """Operations of each call of each denoiser, whichever way it runs."""
    found: list[list[float]] = [[] for _ in models]
    hooks = []
    for model, own in zip(models, found, strict=True):
        stack: list[FlopCounterMode] = []

        def enter(*_: Any, stack: list[FlopCounterMode] = stack) -> None:
            stack.append(FlopCounterMode(display=False, custom_mapping=ATTENTION))
            stack[-1].__enter__()

        def leave(*_: Any, stack: list[FlopCounterMode] = stack, own: list[float] = own) -> None:
            counter = stack.pop()
            counter.__exit__(None, None, None)
            own.append(float(counter.get_total_flops()))

        hooks += [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def planned_calls(session: Session) -> list[list[bool]]:
    """Of each denoiser, which calls of a run compute by the plan, in order."""
    found = []
    for part in session.parts:
        known = next(reversed(part.settings.values()))
        if known.unused or known.mask is None:
            found.append([])
            continue
        computes = known.mask.compute.all(dim=1).tolist()
        found.append([bool(computes[i]) for i, _ in known.runs[-1].order])
    return found


def check_costs(pipe: Any, session: Session, call: Mapping[str, Any], costs: list[list[float]]) -> tuple[str, str]:
    """The cells *ratio* and *planned*; ``costs`` are the operations of each call in full."""
    with counted([part.model for part in session.parts]) as done:
        made(pipe, call, 2)
    ratio = sum(map(sum, costs)) / max(sum(map(sum, done)), 1.0)
    computed = [[x > LARGE * full for x, full in zip(*pair, strict=True)] for pair in zip(done, costs, strict=True)]
    alike = computed == planned_calls(session)
    return (
        f"{WORKS} ({ratio:.2f})" if ratio >= RATIO * (1 - TOLERANCE) else f"fails: {ratio:.2f}",
        WORKS if alike else f"fails: calls computed {computed}",
    )


def check_ones(pipe: Any, session: Session, call: Mapping[str, Any], full: torch.Tensor) -> str:
    """A mask of ones, put in by hand, makes what the original makes. The pipeline is restored."""
    parts = [(p.component, p.program, next(iter(p.settings.values()))) for p in session.parts]
    for component, program, known in parts:
        if program is not None and known.mask is not None and component is not None:
            ones = fxmask.Mask.ones(program, known.mask.timesteps)
            put(pipe, component, fxmask.compile(program, fxmask.rectify(program, ones), "eager"))
    again = made(pipe, call)
    for part in session.parts:
        put(pipe, str(part.component), part.replaced)
    require(torch.equal(again, full), f"differs, {error_of(again, full):.1g}")
    return WORKS


def check_batch(kind: Kind, pipe: Any, session: Session, call: Mapping[str, Any], full: torch.Tensor) -> str:
    """Two samples with the plan of one."""
    settings, images = len(session.settings), session.parts[-1].account().images
    both = made(pipe, call, 3, **kind.batch)
    require(len(session.settings) == settings, "taken for another setting")
    require(session.parts[-1].account().images == images + 1, "the plan was not followed")
    require(both.shape == full.shape and bool(both.isfinite().all()), "not finite, or of another shape")
    require(error_of(both, full) < 1.0, f"error {error_of(both, full):.2g}")
    return WORKS


def check_restore(pipe: Any, parts: Mapping[str, Any], call: Mapping[str, Any], full: torch.Tensor) -> str:
    """The originals are back, and make what they made."""
    fxmask.restore(pipe)
    require(all(vars(pipe).get(k) is x for k, x in parts.items()), "another module is in the place of an original")
    require(torch.equal(made(pipe, call), full), "the image differs")
    return WORKS


def check_bfloat16(kind: Kind) -> str:
    """All of it in bfloat16."""
    pipe, call = built(kind)
    try:
        pipe.to(torch.bfloat16)
        changes = {k: _halved(x) for k, x in call.items()}
        full = [made(pipe, changes, seed).float() for seed in (0, 1)]
    except Exception as error:  # whatever it is, it is the pipeline's own
        return f"refused: the pipeline itself does not run in it: {str(error)[:70]}"
    session = accelerated(pipe)
    return check_setting(pipe, session, full, lambda seed: made(pipe, changes, seed).float())


def _halved(value: Any) -> Any:
    if isinstance(value, list):
        return [_halved(x) for x in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_saved(name: str, pipe: Any, call: Mapping[str, Any], second: torch.Tensor) -> dict[str, str]:
    """The cells *second prompt* and *saved*: the same images in a second process that loads the plans."""
    other = made(pipe, call, 4, **KINDS[name].second)
    with tempfile.TemporaryDirectory() as folder:
        fxmask.save(pipe, Path(folder) / "plans")
        torch.save({"same": second, "other": other}, Path(folder) / "images.pt")
        command = [sys.executable, __file__, "--second", name, folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    require(done.returncode == 0, f"the second process ends with {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def check_one(name: str) -> dict[str, str]:
    """All cells of one pipeline, which is used as it would be: one call after another, of several settings."""
    kind = KINDS[name]
    pipe, call = built(kind)
    parts = {k: x for k, x in vars(pipe).items() if isinstance(x, torch.nn.Module)}
    changes = {"unguided": kind.unguided, "size": kind.larger, "steps": dict.fromkeys(kind.step_names, kind.steps + 2)}
    with counted([component_of(pipe, name) for name in denoisers_of(pipe)]) as costs:
        full = [made(pipe, call)]
    full.append(made(pipe, call, 1))
    others = {k: [made(pipe, call, seed, **x) for seed in (0, 1)] for k, x in changes.items() if x is not None}
    both = made(pipe, call, 3, **kind.batch)
    session = accelerated(pipe)
    cells = attempt(lambda: {"one line": check_setting(pipe, session, full, lambda seed: made(pipe, call, seed))}, "one line")
    planned = cells["one line"] == WORKS
    if planned:
        second = made(pipe, call, 1)
        cells["error"] = f"{error_of(second, full[1]):.1g}"
        cells |= attempt(lambda: dict(zip(("ratio", "planned"), check_costs(pipe, session, call, costs), strict=True)), "ratio")
        cells |= attempt(lambda: {"batch": check_batch(kind, pipe, session, call, both)}, "batch")
        cells |= attempt(lambda: check_saved(name, pipe, call, second), "saved")
    for cell, change in changes.items():
        if change is None:
            cells[cell] = NONE
            continue
        make = functools.partial(_changed, pipe, call, change)
        cells |= attempt(lambda cell=cell, make=make: {cell: check_setting(pipe, session, others[cell], make)}, cell)  # type: ignore[misc]
    cells |= attempt(lambda: {"restore": check_restore(pipe, parts, call, full[0])}, "restore")
    if planned:
        cells |= attempt(lambda: {"ones": check_ones(pipe, session, call, full[0])}, "ones")
    return {**dict.fromkeys(COLUMNS[:-1], cells["one line"]), **cells}


def _changed(pipe: Any, call: Mapping[str, Any], change: Mapping[str, Any], seed: int) -> torch.Tensor:
    return made(pipe, call, seed, **change)


def in_a_second_process(name: str, folder: Path) -> dict[str, str]:
    """Load the plans, and make the second prompt's image first."""
    pipe, call = built(KINDS[name])
    fxmask.load(folder / "plans", pipe, backend="eager")
    wanted = torch.load(folder / "images.pt")
    other, same = made(pipe, call, 4, **KINDS[name].second), made(pipe, call, 1)
    pairs = {"second prompt": (other, wanted["other"]), "saved": (same, wanted["same"])}
    return {k: WORKS if torch.equal(a, b) else f"fails: differs, {error_of(a, b):.1g}" for k, (a, b) in pairs.items()}


def measure(name: str) -> dict[str, str]:
    """All cells of a kind."""
    cells = attempt(lambda: check_one(name), "one line")
    return cells | attempt(lambda: {"bfloat16": check_bfloat16(KINDS[name])}, "bfloat16")


def attempt(check: Callable[[], dict[str, str]], cell: str) -> dict[str, str]:
    """What a check found, or how it failed."""
    try:
        return check()
    except Wrong as error:
        return {cell: f"fails: {error}"}
    except Exception as error:  # one kind's failure is a cell of the table
        logging.getLogger(__name__).warning("%s", cell, exc_info=True)
        return {cell: f"fails: {type(error).__name__}: {str(error)[:120]}"}


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown."""
    notes: list[str] = []
    lines = ["| kind | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get(column, ""), notes) for column in COLUMNS) + " |")
    return "\n".join([*lines, "", *(f"{n}. {note}" for n, note in enumerate(notes, start=1))])


def _cell(text: str, notes: list[str]) -> str:
    """Short; reasons are notes."""
    kind, _, reason = text.partition(": ")
    if not reason:
        return text
    reason = " ".join(reason.split()).replace("|", "/").split(" Tried: ")[0]  # what each way of capture said is for the user
    reason = re.sub(r"(/[\w.-]+){2,}", "a folder", reason)
    if reason not in notes:
        notes.append(reason)
    return f"{kind} [{notes.index(reason) + 1}]"


def run_all(names: list[str], again: bool) -> dict[str, dict[str, str]]:
    """Each kind in a process of its own, or as it was cached."""
    cache = ROOT / "build" / "pipelines"
    cache.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in names:
        place = cache / f"{name}.json"
        if again or not place.exists():
            command = [sys.executable, __file__, "--one", name]
            try:
                done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=MOST)
                place.write_text(done.stdout.strip().splitlines()[-1])
            except (subprocess.TimeoutExpired, IndexError) as error:
                place.write_text(json.dumps({"one line": f"fails: {type(error).__name__}"}))
        rows[name] = json.loads(place.read_text())
        wrong = {k: v for k, v in rows[name].items() if v.startswith("fails")}
        print(
            name, f"{sum(v.startswith(WORKS) for v in rows[name].values())} of {len(COLUMNS) - 1} work", wrong or "", flush=True
        )
    return rows


def write(rows: Mapping[str, Mapping[str, str]]) -> None:
    """The page of results."""
    title, text = "# Kinds of pipeline", " ".join((__doc__ or "").split("`build/`.\n", 1)[1].split("`--write`")[0].split())
    cells = [cell for cells in rows.values() for column, cell in cells.items() if column != "error"]
    counts = f"{len(rows)} of {len(KINDS)} kinds; of {len(cells)} cells {sum(c.startswith(WORKS) for c in cells)} work, "
    counts += (
        f"{sum(c.startswith('refused') for c in cells)} are refused by name, {sum(c == NONE for c in cells)} have nothing to "
    )
    counts += f"try, {sum(c.startswith('fails') for c in cells)} fail."
    command = "`python examples/studies/pipelines.py`: tiny models with random weights, eager backend, on a CPU."
    (RESULTS / "pipelines.md").write_text("\n\n".join([title, command, text, counts, table(rows)]) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(KINDS), default=None, help="these kinds")
    parser.add_argument("--again", action="store_true", help="measure again what is cached")
    parser.add_argument("--write", action="store_true", help="write the table to examples/results/pipelines.md")
    parser.add_argument("--one", choices=sorted(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--second", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(measure(options.one)))
    elif options.second:
        print(json.dumps(in_a_second_process(options.second[0], Path(options.second[1]))))
    else:
        rows = run_all(options.only or list(KINDS), options.again)
        if options.write:
            write(rows)
        else:
            print(table(rows))


if __name__ == "__main__":
    main()
