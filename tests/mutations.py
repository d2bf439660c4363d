"""Remove or invert one rule of the library at a time: some test must fail.

    python tests/mutations.py [--only NAME]

Works on an installed copy in a temporary folder; the checkout is not touched. Not part of the test suite: it takes
several minutes. Prints one line per mutation, and exits with 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = [
    "test_stages.py",
    "test_regions.py",
    "test_cudagraph.py",
    "test_mask.py",
    "test_capture.py",
    "test_passes.py",
    "test_runtime.py",
    "test_peer_bugs.py",
    "test_properties.py",
]


@dataclass(frozen=True)
class Mutation:
    """Replace ``old`` by ``new`` in ``file`` (path inside the installed package)."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "rectify: a loaded value still needs its inputs",
        "passes/rectify.py",
        "            continue  # its inputs are not needed through it",
        "            pass",
    ),
    Mutation(
        "rectify: forecast sources are not reads",
        "passes/rectify.py",
        "for slot in load.slots:\n",
        "for slot in load.slots[:1]:\n",
    ),
    Mutation(
        "rectify: stored values are not live",
        "passes/rectify.py",
        "roots = set(cut) if keep else {program.block(block).values[i] for block, i in reads[step]}",
        "roots = set(cut) if keep else set()",
    ),
    Mutation("rectify: slots outlive their last reader", "passes/rectify.py", "last[slot] <= step", "last[slot] < step"),
    Mutation(
        "rectify: dead computes stay in the mask",
        "passes/rectify.py",
        "compute[step, b] = name in rows[step].compute",
        "compute[step, b] = True",
    ),
    Mutation(
        "rectify: graphs are shared whatever they load",
        "passes/rectify.py",
        "return (row.live, tuple(load.form for load in row.load), tuple(load.form for load in row.blend))",
        "return (row.live,)",
    ),
    Mutation(
        "mask: a run that starts in the middle loads what was never stored",
        "mask.py",
        "                    if not usable:\n",
        "                    if False:\n",
    ),
    Mutation(
        "specialise: outputs may alias caches",
        "passes/specialize.py",
        "return [_clone(graph, node) if _root(node) in roots or node in roots else node for node in results]",
        "return list(results)",
    ),
    Mutation(
        "specialise: views are cached as they are",
        "passes/specialize.py",
        "stored = [value if _is_fresh(value) else _clone(graph, value) for value in stored]",
        "pass",
    ),
    Mutation("specialise: dead code stays", "passes/specialize.py", "    remove_dead(graph)\n", ""),
    Mutation(
        "forecast: every term reads the first coefficient",
        "passes/forecast.py",
        "coefficients, 0, k))",
        "coefficients, 0, 0))",
    ),
    Mutation(
        "functionalise: writes to buffers are accepted",
        "passes/functionalize.py",
        "        if spec.kind in _MUTATIONS:\n",
        "        if False:\n",
    ),
    Mutation(
        "functionalise: in-place operators stay",
        "passes/functionalize.py",
        "    exported = exported.run_decompositions({})\n",
        "",
    ),
    Mutation(
        "functionalise: wrapped regions stay",
        "passes/functionalize.py",
        "    while _inline_wrapped(result):\n        pass\n",
        "",
    ),
    Mutation(
        "runtime: a new run starts on the old caches",
        "runtime.py",
        "            lane.start, lane.cache = step, {}\n",
        "            lane.start = step\n",
    ),
    Mutation(
        "runtime: an uncovered call leaves the position as it was",
        "runtime.py",
        "            lane.forget()\n            return variant",
        "            return variant",
    ),
    Mutation(
        "runtime: a failed step counts as done",
        "runtime.py",
        "        lane.position = None\n        outputs",
        "        lane.position = step + 1\n        outputs",
    ),
    Mutation(
        "runtime: two runs that nothing tells apart are taken for one",
        "runtime.py",
        "        return step == lane.latest or (lane.doubtful and step > lane.latest)",
        "        return False",
    ),
    Mutation(
        "runtime: lanes are not told apart",
        "runtime.py",
        "        version_of(b) == version != -1\n",
        "        True or version_of(b) == version != -1\n",
    ),
    Mutation(
        "runtime: replaced weights are not noticed",
        "runtime.py",
        "            if weights != private.weights:",
        "            if False:",
    ),
    Mutation("runtime: abandoned lanes are kept", "runtime.py", "x.cache and self._count - x.seen <= IDLE_CALLS", "True"),
    Mutation("runtime: a copied context is the same run", "runtime.py", "or owner != _who():", "or False:"),
    Mutation(
        "runtime: calls by turns share one lane",
        "runtime.py",
        "        if all(lane.latest in matches and lane.position is not None for lane in waiting):\n",
        "        if False:\n",
    ),
    Mutation(
        "runtime: tables outlive their run",
        "runtime.py",
        "            lane.rows = variant.executor(step).begin(tensors)\n",
        "            lane.rows = lane.rows or variant.executor(step).begin(tensors)\n",
    ),
    Mutation("stages: a loaded block is staged", "passes/stage_values.py", "if node.name in cut or ", "if "),
    Mutation(
        "stages: what changes at every step is hoisted",
        "passes/stage_values.py",
        'OF_ROLE = {"timestep": BindingTime.TIMESTEP,',
        'OF_ROLE = {"step": BindingTime.CONDITIONING, "timestep": BindingTime.TIMESTEP,',
    ),
    Mutation("stages: tables of any size", "passes/stage_values.py", "<= MOST_TABLE_BYTES", ">= 0"),
    Mutation(
        "merge: random numbers are drawn once",
        "passes/merge_common.py",
        '        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):\n',
        "        if False:\n",
    ),
    Mutation(
        "specialise: a merged output and store share memory",
        "passes/specialize.py",
        "results = _unalias_outputs(graph, results, set(stored) | set(former.cached) | set(given.values()))",
        "pass",
    ),
    Mutation(
        "regions: structures without layouts",
        "passes/split_regions.py",
        "        lines.append(_layout(held))\n",
        "",
    ),
    Mutation(
        "regions: a kept value is no output",
        "passes/split_regions.py",
        "if node in needed or node.meta.get(KEPT)]",
        "if node in needed]",
    ),
    Mutation(
        "cudagraph: results belong to the replay", "backends/cudagraph.py", "tuple(x.clone() for x in", "tuple(x for x in"
    ),
]


def run(mutation: Mutation, package: Path, folder: Path) -> str | None:
    """Name of the first test that fails, or ``None``."""
    path = package / "fxmask" / mutation.file
    original = path.read_text()
    if mutation.old not in original:
        raise SystemExit(f"{mutation.name}: the rule is no longer in {mutation.file}; update the list")
    path.write_text(original.replace(mutation.old, mutation.new, 1))
    try:
        tests = [str(ROOT / "tests" / name) for name in QUICK if (ROOT / "tests" / name).exists()]
        command = ["pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow", *tests]
        environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", *command[1:]],
            cwd=ROOT / "tests",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        path.write_text(original)
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    (folder / "last.log").write_text(result.stdout + result.stderr)
    return failed[0].split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="run the mutations whose name contains this")
    options = parser.parse_args()
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "package"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(package), str(ROOT)]
        subprocess.run(install, check=True, capture_output=True)
        where = [sys.executable, "-c", "import fxmask.passes; print(fxmask.passes.__file__)"]
        environment = {**os.environ, "PYTHONPATH": str(package)}
        found = subprocess.run(where, env=environment, cwd=ROOT / "tests", capture_output=True, text=True, check=True).stdout
        assert found.startswith(str(package)), f"the copy is not what is imported: {found}"
        for mutation in MUTATIONS:
            if options.only and options.only not in mutation.name:
                continue
            caught = run(mutation, package, Path(name))
            survivors += caught is None
            print(f"{'SURVIVED' if caught is None else 'caught'}  {mutation.name}  {caught or ''}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
