"""Remove or invert one rule of the library at a time: some test must fail.

    python tests/mutations.py [--only TEXT] [--list]

Works on a copy of the library in a temporary folder; the checkout is not touched. Not part of the test suite: it takes
many minutes (``test_mutations.py`` checks that the rules are still where this file says). Prints one line per mutation,
and exits with 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 1800  # seconds for the tests of one mutation; an endless loop is noticed, too

PROPERTIES = "passes/test_properties.py"
SPECIALISED = f"{PROPERTIES}::test_specialised_is_the_reference"
RUNTIME = ("runtime/test_model.py", "runtime/test_peer_bugs.py")
LANES = ("runtime/test_lanes_apart.py", SPECIALISED)
OWN_ROWS = ("learning/test_own_rows.py", "learning/test_held_lanes.py", "learning/test_adjoint.py")
PAPER = ("learning/test_paper.py",)
GUARDS = ("guards/test_calls.py", "guards/test_state.py", "guards/test_value_branches.py")
REGIONS = ("passes/test_split_regions.py", "passes/test_pipeline.py")


@dataclass(frozen=True)
class Mutation:
    """Replace ``old`` by ``new`` in a file; one of ``tests`` must fail.

    Attributes:
        name: what is no longer so, after the part of the library that it belongs to.
        file: path inside the repository.
        old: is there exactly once.
        new: takes its place.
        tests: what pytest runs, paths inside this folder, in this order up to the first failure.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def source(self) -> Path:
        """The file in the checkout."""
        return ROOT / self.file

    @property
    def installed(self) -> str:
        """The file inside a folder that holds the package as it is installed."""
        return self.file if self.file.startswith("fxmask/") else f"fxmask/{self.file}"


MUTATIONS = [
    # What is live, and what a plan makes of it
    Mutation(
        "liveness: given values still need their inputs",
        "fxmask/ir/liveness.py",
        "        if node.name in given:\n",
        "        if False:\n",
        ("passes/test_passes.py", SPECIALISED),
    ),
    Mutation(
        "liveness: only the outputs are needed",
        "fxmask/ir/liveness.py",
        "return _walk(graph, given, {*roots, *(",
        "return _walk(graph, given, {*(",
        ("passes/test_passes.py", "tools/test_diagnosis.py"),
    ),
    Mutation(
        "liveness: the last of the values that are asked for is left out",
        "fxmask/ir/liveness.py",
        "return _walk(graph, given, roots)[0]",
        "return _walk(graph, given, roots)[0][:-1]",
        ("passes/test_precompute.py",),
    ),
    Mutation(
        "rectify: forecast sources are not reads",
        "passes/rectify.py",
        "for slot in load.slots:\n",
        "for slot in load.slots[:1]:\n",
        ("tools/test_diagnosis.py", SPECIALISED),
    ),
    Mutation(
        "rectify: stored values are not live",
        "passes/rectify.py",
        "roots = set(cut) if keep else {program.block(block).values[i] for block, i in reads[step]}",
        "roots = set(cut) if keep else set()",
        ("tools/test_diagnosis.py", SPECIALISED),
    ),
    Mutation(
        "rectify: slots outlive their last reader",
        "passes/rectify.py",
        "last[slot] <= step",
        "last[slot] < step",
        ("passes/test_passes.py", f"{PROPERTIES}::test_peak_bytes_are_what_a_run_holds", *RUNTIME),
    ),
    Mutation(
        "rectify: dead computes stay in the mask",
        "passes/rectify.py",
        "compute[step, b] = name in rows[step].compute",
        "compute[step, b] = True",
        ("passes/test_passes.py", f"{PROPERTIES}::test_every_computed_block_has_a_reader"),
    ),
    Mutation(
        "rectify: graphs are shared whatever they load",
        "passes/rectify.py",
        "return (self.live, tuple(load.form for load in self.load), tuple(load.form for load in self.blend))",
        "return (self.live,)",
        ("passes/test_passes.py",),
    ),
    Mutation(
        "mask: a run that starts in the middle loads what was never stored",
        "fxmask/ir/mask.py",
        "                    if not usable:\n",
        "                    if False:\n",
        ("ir/test_mask.py", "runtime/test_model.py"),
    ),
    Mutation(
        "planner: a missing store is not reported",
        "fxmask/tools/naive_planner.py",
        "            faults.append(_why_missing(plan.steps[slot.step], slot, dropped.get(slot), step))\n",
        "",
        ("tools/test_diagnosis.py",),
    ),
    # Step graphs
    Mutation(
        "specialise: outputs may alias caches",
        "passes/unalias.py",
        "return [clone_of(graph, node) if _root(node) in roots or node in roots else node for node in results]",
        "return list(results)",
        ("runtime/test_model.py", f"{PROPERTIES}::test_nothing_aliases_a_cache"),
    ),
    Mutation(
        "specialise: views are cached as they are",
        "passes/specialize.py",
        "stored = [value if owns_memory(value) else clone_of(graph, value) for value in stored]",
        "pass",
        ("runtime/test_model.py", f"{PROPERTIES}::test_nothing_aliases_a_cache"),
    ),
    Mutation(
        "specialise: dead code stays",
        "passes/specialize.py",
        "    remove_dead(graph)\n",
        "",
        ("passes/test_passes.py", "passes/test_pipeline.py"),
    ),
    Mutation(
        "specialise: a merged output and store share memory",
        "passes/specialize.py",
        "unalias_outputs(graph, results, set(stored) | set(former.cached)",
        "unalias_outputs(graph, results, set(former.cached)",
        ("passes/test_precompute.py", f"{PROPERTIES}::test_nothing_aliases_a_cache"),
    ),
    Mutation(
        "form values: what is formed has no shape",
        "passes/form_values.py",
        '        node.meta = {"val": _value_of(target, args, kwargs)}\n',
        "        node.meta = {}\n",
        ("passes/test_pipeline.py",),
    ),
    Mutation(
        "form values: what is formed has no marks",
        "passes/form_values.py",
        "result.meta = {**self._like[x].meta, **marks}",
        "result.meta = {**self._like[x].meta}",
        REGIONS,
    ),
    Mutation(
        "combine: every term reads the first coefficient",
        "fxmask/ir/combine.py",
        "coefficients, 0, k))",
        "coefficients, 0, 0))",
        ("passes/test_passes.py", "learning/test_search.py"),
    ),
    Mutation(
        "graph: a node that replaces another has none of its marks",
        "fxmask/ir/graph.py",
        '        if key == "val" or key.startswith(MARK):\n',
        '        if key == "val":\n',
        ("passes/test_pipeline.py",),
    ),
    Mutation(
        "merge: random numbers are drawn once",
        "passes/merge_common.py",
        "        if is_random(node):\n",
        "        if False:\n",
        ("passes/test_precompute.py",),
    ),
    # Capture
    Mutation(
        "functionalise: writes to buffers are accepted",
        "passes/functionalize.py",
        "        if spec.kind in _MUTATIONS:\n",
        "        if False:\n",
        ("frontend/test_capture.py",),
    ),
    Mutation(
        "functionalise: in-place operators stay",
        "passes/functionalize.py",
        "    exported = exported.run_decompositions({})\n",
        "",
        ("frontend/test_capture.py",),
    ),
    Mutation(
        "functionalise: control flow is accepted",
        "passes/functionalize.py",
        "    _refuse_graphs_inside(graph)\n",
        "",
        ("frontend/test_capture.py::test_control_flow_is_refused",),
    ),
    # Running
    Mutation(
        "runtime: a new run starts on the old caches",
        "fxmask/runtime/generation.py",
        "lane.course = Course(row, row, taken={lane.number})",
        "lane.course = Course(row, row, cache=lane.course.cache, taken={lane.number})",
        RUNTIME,
    ),
    Mutation(
        "runtime: an uncovered call leaves the position as it was",
        "fxmask/runtime/generation.py",
        "            self._missed(lane, again, value)\n            lane.forget()\n",
        "            self._missed(lane, again, value)\n",
        RUNTIME,
    ),
    Mutation(
        "runtime: a failed step counts as done",
        "fxmask/runtime/generation.py",
        "        course.next = None\n        if over",
        "        course.next = row + 1\n        if over",
        RUNTIME,
    ),
    Mutation(
        "runtime: two runs that nothing tells apart are taken for one",
        "fxmask/runtime/generation.py",
        "        return step == lane.latest or (lane.doubtful and step > lane.latest)",
        "        return False",
        RUNTIME,
    ),
    Mutation(
        "runtime: lanes are not told apart",
        "fxmask/runtime/lane.py",
        "            version == before and (",
        "            True or version == before and (",
        RUNTIME,
    ),
    Mutation(
        "runtime: changed state is not noticed",
        "fxmask/runtime/variants.py",
        "return self.state is None or self.state.held.same()\n",
        "return True\n",
        ("guards/test_state.py", *RUNTIME),
    ),
    Mutation(
        "runtime: abandoned lanes are kept",
        "fxmask/runtime/generation.py",
        "x.course.cache and self._count - x.seen <= IDLE_CALLS",
        "True",
        RUNTIME,
    ),
    # Lanes with rows of their own
    Mutation(
        "lanes: a value is loaded from whichever lane computed it last",
        "fxmask/ir/lanes.py",
        "        return (own or before)[-1]\n",
        "        return before[-1]\n",
        LANES,
    ),
    Mutation(
        "lanes: a source of another lane is one of the lane itself",
        "fxmask/ir/lanes.py",
        "        of = source[2] if len(source) == 3 else lane\n",
        "        of = lane\n",
        LANES,
    ),
    Mutation(
        "paper's learner: gradients go on from one window into the next",
        "fxmask/learning/paper/passes.py",
        "        self.caches = [cache.detach() for cache in self.caches]\n",
        "",
        PAPER,
    ),
    Mutation(
        "paper's learner: the scale of a penalty is left out of what a window says",
        "fxmask/learning/paper/passes.py",
        "                gradient[i] += found.cpu() * weights[i]\n",
        "                gradient[i] += found.cpu()\n",
        PAPER,
    ),
    Mutation(
        "paper's learner: the worst of the judged masks is taken",
        "fxmask/learning/paper/state.py",
        "        if error < self.lowest or not len(self.best):\n",
        "        if error > self.lowest or not len(self.best):\n",
        PAPER,
    ),
    Mutation(
        "lanes: a lane joins a run of another image",
        "fxmask/runtime/generation.py",
        "                if found.sample is None or not found.sample.is_same(lane.variant.program.moving_part(sample)):\n",
        "                if found.sample is None:\n",
        LANES,
    ),
    Mutation(
        "lanes: a lane takes the turn of another name",
        "fxmask/runtime/generation.py",
        "            if named and mask.lanes[at[1]] != lane.name:\n",
        "            if False:\n",
        LANES,
    ),
    Mutation(
        "learning: with injected noise the images that plans were fitted on have the last word",
        "fxmask/learning/search.py",
        "best = self._best_on_fresh_noise(judged) or best",
        "best = judged[0]",
        ("learning/test_fresh_noise.py",),
    ),
    Mutation(
        "lanes: every even batch holds the lanes, one that is as large as a single lane as well",
        "fxmask/runtime/batched_lanes.py",
        "    return bound.batch_size != program.batch_size or repeats(",
        "    return True or repeats(",
        LANES,
    ),
    Mutation(
        "lanes: a sample is remembered as whatever its owner writes there later",
        "fxmask/runtime/lane.py",
        "sample, version_of(sample), sample.clone())",
        "sample, version_of(sample), sample)",
        LANES,
    ),
    Mutation(
        "lanes: the same memory is the same sample, whatever was written there since",
        "fxmask/runtime/lane.py",
        "        if self.version != -1 and version_of(other) == self.version and is_same_memory(other, self.given):\n",
        "        if is_same_memory(other, self.given):\n",
        LANES,
    ),
    Mutation(
        "lanes: by its name a lane joins in the middle of a run that it missed",
        "fxmask/runtime/generation.py",
        "            elif not named or self._was_due(found, mask, at[1], step):\n",
        "            elif not named:\n",
        LANES,
    ),
    Mutation(
        "lanes: of a video's batch only what has a row per video comes apart",
        "fxmask/ir/calls.py",
        "    per_frame = {rows * size for size in sample.shape[1:3]} if sample.dim() == VIDEO_DIMS else set()\n",
        "    per_frame: set[int] = set()\n",
        ("runtime/test_lanes_of_pipelines.py",),
    ),
    Mutation(
        "adjoints: all parts of a batch are nudged at once",
        "fxmask/learning/adjoint.py",
        "        nudge[first : first + rows] = NUDGE\n",
        "        nudge[:] = NUDGE\n",
        ("learning/test_adjoint.py",),
    ),
    Mutation(
        "adjoints: a part is asked for its own sample alone",
        "fxmask/learning/adjoint.py",
        "    return torch.cat([adjoint.reshape(-1, rows, *adjoint.shape[1:]).sum(dim=0)] * parts)\n",
        "    return adjoint if len(adjoint) == rows * parts else torch.cat([adjoint] * parts)\n",
        ("learning/test_adjoint.py",),
    ),
    Mutation(
        "adjoints: with rows for each lane, the row is the step",
        "fxmask/learning/student.py",
        "        return position if schedule.lanes > 1 else self.order[position][0]\n",
        "        return self.order[position][0]\n",
        ("learning/test_adjoint.py", "learning/test_own_rows.py"),
    ),
    Mutation(
        "refinement: by adjoints as far as the learned images alone say",
        "fxmask/learning/finalists.py",
        "    return [better] if after < before else []\n",
        "    return [better]\n",
        ("learning/test_adjoint.py",),
    ),
    Mutation(
        "lanes: of few images, rows of their own are taken whenever they are tried",
        "fxmask/learning/search.py",
        "                if not is_ahead(images, self.measured.crossed(best)[0]):\n",
        "                if not images:\n",
        ("learning/test_few_images.py",),
    ),
    Mutation(
        "lanes: what is far behind goes on",
        "fxmask/learning/own_rows.py",
        "        if behind > BEHIND:",
        "        if behind > 1000 * BEHIND:",
        ("learning/test_own_rows.py",),
    ),
    Mutation(
        "lanes: what is beside the noise must be the same too",
        "fxmask/ir/calls.py",
        "    return sample[(slice(None), *(slice(size) for size in prediction[1:]))]\n",
        "    return sample\n",
        ("learning/test_own_rows.py",),
    ),
    Mutation(
        "lanes: a call goes on whichever lane's turn it is",
        "fxmask/runtime/generation.py",
        "lane.variant.mask.call_of(step, lane.number) == following",
        "step == lane.position",
        LANES,
    ),
    Mutation(
        "lanes: of a whole batch every lane keeps the first part",
        "fxmask/runtime/generation.py",
        "stored[block, value].chunk(len(parts))[part]",
        "stored[block, value].chunk(len(parts))[0]",
        LANES,
    ),
    Mutation(
        "lanes: steps of the whole batch are those of which one lane computes everything",
        "fxmask/ir/plan.py",
        "frozenset(c for c in calls if all(",
        "frozenset(c for c in calls if any(",
        LANES,
    ),
    Mutation(
        "lanes: parts of a batch are taken in their order, whatever the mask says",
        "fxmask/runtime/model.py",
        "            some, named = parts[part]\n",
        "            some, named = parts[mask.lanes.index(name)]\n",
        LANES,
    ),
    Mutation(
        "lanes: what a step of the whole batch stores goes to the part of its turn",
        "fxmask/runtime/generation.py",
        "stored[block, value].chunk(len(parts))[part]",
        "stored[block, value].chunk(len(parts))[k]",
        LANES,
    ),
    Mutation(
        "lanes: the lane that guidance weighs least comes first",
        "fxmask/learning/own_rows.py",
        "key=lambda lane: -weights[lane]",
        "key=lambda lane: weights[lane]",
        OWN_ROWS,
    ),
    Mutation(
        "lanes: of the others only what this very step computed is read",
        "fxmask/learning/schedule.py",
        "and now // lanes > since:",
        "and now // lanes == row // lanes:",
        OWN_ROWS,
    ),
    Mutation(
        "lanes: the difference to the others changes its sign",
        "fxmask/learning/schedule.py",
        "        found[then] -= 1 / len(pairs)\n",
        "        found[then] += 1 / len(pairs)\n",
        OWN_ROWS,
    ),
    Mutation(
        "lanes: what a blend reads is forgotten before",
        "fxmask/learning/student.py",
        "({self.output} if self.output and self.blends(schedule, row) else set())",
        "set()",
        OWN_ROWS,
    ),
    Mutation(
        "lanes: states of a run of lanes forget what others may read",
        "fxmask/learning/student.py",
        "if schedule.lanes > 1 and not open_end:",
        "if schedule.lanes > 1:",
        OWN_ROWS,
    ),
    Mutation(
        "lanes: rows of their own are taken without asking fresh noise",
        "fxmask/learning/search.py",
        "            return found is apart\n",
        "            return True\n",
        OWN_ROWS,
    ),
    Mutation(
        "lanes: a batch comes apart although the denoiser looks across it",
        "fxmask/sampling/split_lanes.py",
        "            if got.shape != wanted.shape or bool(",
        "            if False and bool(",
        LANES,
    ),
    Mutation(
        "lanes: forecasts of loads are lost where rows are put back to lanes",
        "fxmask/ir/lanes.py",
        "            if column[row] or terms != ((self.reused(row, column), 1.0),):\n",
        "            if column[row]:\n",
        LANES,
    ),
    Mutation(
        "runtime: a copied context is the same run",
        "fxmask/runtime/model.py",
        "if caller is None or caller.who != who:",
        "if caller is None:",
        RUNTIME,
    ),
    Mutation(
        "runtime: calls by turns share one lane",
        "fxmask/runtime/generation.py",
        "            s is not None and lane.latest == s and lane.position is not None for",
        "            False and s is not None and lane.latest == s and lane.position is not None for",
        RUNTIME,
    ),
    Mutation(
        "runtime: tables outlive their run",
        "fxmask/runtime/generation.py",
        "            lane.weights = None\n",
        "            pass\n",
        ("passes/test_precompute.py", *RUNTIME),
    ),
    Mutation(
        "runtime: a call belongs to the innermost generation, whoever runs",
        "fxmask/runtime/marks.py",
        "if mark.owner is None or mark.owner in running",
        "if True",
        ("runtime/test_generations.py",),
    ),
    Mutation(
        "runtime: the mark that is taken away is the last one",
        "fxmask/runtime/marks.py",
        "            if stack[k].generation is generation:\n",
        "            if True:\n",
        ("runtime/test_generations.py",),
    ),
    Mutation(
        "runtime: contexts keep models",
        "fxmask/runtime/model.py",
        "            private.caller.set(caller)\n",
        "            private.caller.set(caller)\n            caller.kept = private\n",
        ("runtime/test_generations.py",),
    ),
    Mutation(
        "runtime: forms that failed are traced again",
        "fxmask/runtime/variants.py",
        "        if refused is not None and not refused[0].changes(now):\n",
        "        if False:\n",
        ("frontend/test_shadow.py",),
    ),
    # Capture beside other threads
    Mutation(
        "capture: the model itself is traced",
        "fxmask/frontend/subject.py",
        "            shadow = shadow_of(model)\n",
        "            shadow = model\n",
        ("frontend/test_shadow.py",),
    ),
    Mutation(
        "capture: state that changes meanwhile is not noticed",
        "fxmask/frontend/subject.py",
        "        if snapshot.held.same():\n",
        "        if True:\n",
        ("frontend/test_shadow.py",),
    ),
    Mutation(
        "capture: tracers reach other threads",
        "fxmask/_torch.py",
        "(new if threading.get_ident() == owner else before)",
        "new",
        ("frontend/test_shadow.py",),
    ),
    Mutation(
        "capture: backends are switched off for all threads",
        "fxmask/_torch.py",
        '            stack.enter_context(mock.patch.object(export_trace, "_ignore_backend_decomps", contextlib.nullcontext))\n',
        "",
        ("frontend/test_shadow.py",),
    ),
    Mutation(
        "recording: values that are not finite are let pass",
        "fxmask/sampling/finite.py",
        "            if not is_finite(prediction):\n",
        "            if False:\n",
        ("sampling/test_finite.py",),
    ),
    # Guards
    Mutation(
        "guards: in a step of a large model, modules are not looked at",
        "fxmask/guards/check.py",
        "                and self._step_internal == self._step_internal_copies\n",
        "",
        ("guards/test_state.py::test_a_change_near_the_model_is_seen_in_the_middle_of_a_run", *GUARDS),
    ),
    Mutation(
        "guards: hooks are not noticed",
        "fxmask/guards/check.py",
        "        if hooks_so_far() != self._hooks:\n",
        "        if False:\n",
        ("guards/test_state.py::test_a_hook_runs_and_the_warning_names_it", *GUARDS),
    ),
    Mutation(
        "guards: plain attributes are not compared",
        "fxmask/guards/check.py",
        "list(map(operator.call, self._plain_getters, self._plain_spaces)) == self._plain_values",
        "True",
        ("guards/test_state.py::test_each_kind_of_state_is_seen", *GUARDS),
    ),
    Mutation(
        "guards: objects are not compared",
        "fxmask/guards/check.py",
        "                and all(map(operator.is_, self._read(), self._values))\n",
        "",
        ("guards/test_state.py::test_each_kind_of_state_is_seen", *GUARDS),
    ),
    Mutation(
        "guards: parameters are not compared",
        "fxmask/guards/check.py",
        "                and self._internal == self._internal_copies\n",
        "",
        ("guards/test_state.py::test_adapters_are_seen", *GUARDS),
    ),
    Mutation(
        "guards: types of weights are not compared",
        "fxmask/guards/check.py",
        "                and list(map(_dtype_of, self.tensors)) == self._types\n"
        "                and list(map(torch.Tensor.data_ptr, self._addressed)) == self._addresses\n",
        "",
        ("guards/test_state.py::test_the_type_of_a_weight_is_part_of_a_graph", *GUARDS),
    ),
    Mutation(
        "guards: arrays are not compared",
        "fxmask/guards/check.py",
        "                and all(x.tobytes() == y for x, y in zip(self.arrays, self._contents, strict=True))\n",
        "",
        ("guards/test_state.py::test_each_kind_of_state_is_seen", *GUARDS),
    ),
    Mutation(
        "guards: nothing is looked at in a step",
        "fxmask/runtime/variants.py",
        "return self.state is None or self.state.held.same_in_step()\n",
        "return True\n",
        ("guards/test_state.py::test_each_kind_of_state_is_seen", *GUARDS),
    ),
    Mutation(
        "guards: closures are not looked into",
        "fxmask/guards/state.py",
        '                self._note(cell.cell_contents, f"{name} in {path}")\n',
        "                pass\n",
        ("guards/test_state.py::test_each_kind_of_state_is_seen", *GUARDS),
    ),
    Mutation(
        "guards: globals are not looked at",
        "fxmask/guards/state.py",
        '        self._members(space, [n for n in names if n in space], str(space.get("__name__")))\n',
        "",
        ("guards/test_state.py::test_each_kind_of_state_is_seen", *GUARDS),
    ),
    Mutation(
        "guards: the modes around a call do not count",
        "fxmask/runtime/variants.py",
        "self.key == bound.key and self.ambient in (None, ambient)",
        "self.key == bound.key",
        ("guards/test_calls.py::test_modes_of_attention_and_determinism_are_part_of_a_variant", *GUARDS),
    ),
    Mutation(
        "guards: graphs run under autocast again",
        "fxmask/guards/ambient.py",
        "stack.enter_context(torch.autocast(device, enabled=False))",
        "pass",
        ("guards/test_calls.py::test_a_part_without_autocast_inside_of_it", *GUARDS),
    ),
    Mutation(
        "guards: gradients are dropped",
        "fxmask/runtime/model.py",
        "        if needs_gradients(bound.tensors):\n",
        "        if False:\n",
        ("guards/test_calls.py::test_guidance_by_a_gradient_through_the_denoiser", *GUARDS),
    ),
    Mutation(
        "guards: weights that are written to in a run leave its table",
        "fxmask/runtime/generation.py",
        "            if lane.weights is None or watch.changed(lane.weights, row):",
        "            if lane.weights is None:",
        ("guards/test_state.py::test_adapter_strength_may_change_in_the_middle_of_a_run", *GUARDS),
    ),
    Mutation(
        "guards: a rounded timestep is answered with the plan's",
        "fxmask/runtime/generation.py",
        "exact = timestep is None or executor.prologues.is_exact(row, timestep)\n",
        "exact = True\n",
        ("guards/test_calls.py::test_a_rounded_timestep_is_computed_as_it_is", *GUARDS),
    ),
    Mutation(
        "guards: a branch on values is not asked",
        "fxmask/runtime/generation.py",
        "        if branch is not None:\n",
        "        if False:\n",
        ("guards/test_value_branches.py::test_the_other_side_is_never_taken_silently", *GUARDS),
    ),
    Mutation(
        "guards: what capture does to a model stays",
        "fxmask/guards/undo.py",
        "            _put_back(live, before)\n",
        "            pass\n",
        ("guards/test_state.py::test_state_that_a_run_keeps_for_the_next_is_refused", *GUARDS),
    ),
    Mutation(
        "guards: capture runs on the caller's tensors",
        "fxmask/frontend/subject.py",
        "torch.Tensor.clone, opened(dict(arguments))",
        "lambda x: x, opened(dict(arguments))",
        ("guards/test_state.py::test_a_model_that_writes_to_its_arguments_is_refused_and_they_are_not_changed", *GUARDS),
    ),
    Mutation(
        "guards: values are compared by what they look like",
        "fxmask/guards/values.py",
        "    if isinstance(value, PLAIN):\n        return (type(value), value)\n",
        "    return (type(value), repr(value))\n",
        ("guards/test_calls.py::test_values_that_look_alike_are_told_apart", *GUARDS),
    ),
    Mutation(
        "guards: objects with tensors are not opened",
        "fxmask/guards/values.py",
        "    if not holds_tensor(value) or pytree.tree_is_leaf(value) is False:\n",
        "    if True:\n",
        ("guards/test_calls.py::test_tensors_inside_of_objects_are_inputs", *GUARDS),
    ),
    Mutation(
        "guards: variants are kept without end",
        "fxmask/runtime/variants.py",
        "            restless = [change for change in changes if self._values[change.path] >= MOST_VALUES]\n",
        "            restless = []\n",
        ("guards/test_state.py::test_a_value_that_never_settles_is_named", *GUARDS),
    ),
    Mutation(
        "binding times: a loaded block is precomputed",
        "passes/binding_times.py",
        "if node.name in cut or ",
        "if ",
        ("passes/test_precompute.py",),
    ),
    Mutation(
        "binding times: what changes at every step is hoisted",
        "passes/binding_times.py",
        'OF_ROLE = {"timestep": BindingTime.TIMESTEP,',
        'OF_ROLE = {"step": BindingTime.CONDITIONING, "timestep": BindingTime.TIMESTEP,',
        ("passes/test_precompute.py",),
    ),
    Mutation(
        "precompute: tables of any size",
        "passes/precompute.py",
        "<= MOST_TABLE_BYTES",
        ">= 0",
        ("passes/test_precompute.py",),
    ),
    Mutation(
        "regions: structures without layouts",
        "passes/split_regions.py",
        "        lines.append(_layout(held))\n",
        "",
        ("passes/test_split_regions.py", "backends/test_inductor.py", "storage/test_packages.py"),
    ),
    Mutation(
        "regions: a kept value is no output",
        "passes/split_regions.py",
        "if node in needed or node.meta.get(KEPT)]",
        "if node in needed]",
        ("passes/test_split_regions.py", "backends/test_inductor.py"),
    ),
    Mutation(
        "replay: results belong to the replay",
        "fxmask/runtime/replay.py",
        "outputs = [x.clone() for x in recorded.outputs]",
        "outputs = list(recorded.outputs)",
        ("runtime/test_replay.py",),
    ),
    Mutation(
        "replay: a step of another timestep leaves its values where it made them",
        "fxmask/runtime/replay.py",
        "            view.copy_(cache[slot])\n            cache[slot] = view\n",
        "            cache[slot] = view\n",
        ("runtime/test_replay.py",),
    ),
    Mutation(
        "replay: values of a step that was not replayed stay where they are",
        "fxmask/runtime/replay.py",
        "            if view is not value:\n                view.copy_(value)\n",
        "            pass\n",
        ("runtime/test_replay.py",),
    ),
    Mutation(
        "replay: conditioning is the first image's",
        "fxmask/runtime/replay.py",
        "            put([memory.inputs[k] for k in self._fixed], [",
        "            memory.recorded or put([memory.inputs[k] for k in self._fixed], [",
        ("runtime/test_replay.py",),
    ),
    Mutation(
        "replay: recordings outlive the weights that they read",
        "fxmask/runtime/replay.py",
        "            memory.forget_recordings()\n",
        "",
        ("runtime/test_replay.py",),
    ),
    Mutation(
        "steady: a twin's turn is taken",
        "fxmask/runtime/generation.py",
        "        if len(self._lanes) > 1 and any(x is not lane and x.is_twin_of(lane) for x in self._lanes):",
        "        if False:",
        ("runtime/test_model.py", "runtime/test_steady.py"),
    ),
    Mutation(
        "steady: conditioning that was written to is what it was",
        "fxmask/runtime/steady.py",
        "            if version_of(x) != version:",
        "            if False:",
        ("runtime/test_model.py", "runtime/test_steady.py"),
    ),
    Mutation(
        "steady: modes are as they were",
        "fxmask/runtime/generation.py",
        " or steady.modes != modes(variant.device_type)",
        "",
        ("runtime/test_steady.py::test_modes_that_change_in_the_middle_of_a_run",),
    ),
    Mutation(
        "steady: the model is as it was",
        "fxmask/runtime/generation.py",
        " or not variant.unchanged_in_step():\n            return None\n        if self",
        ":\n            return None\n        if self",
        ("runtime/test_steady.py", "guards/test_state.py"),
    ),
    Mutation(
        "checks: a run that passes its bound goes on with its plan",
        "fxmask/runtime/generation.py",
        "        if not lane.is_over and lane.checks is not None and lane.checks.is_over():",
        "        if False:",
        ("runtime/test_checks.py",),
    ),
    Mutation(
        "checks: predictions that were written to are read",
        "fxmask/runtime/checks.py",
        "        return kept is not None and version_of(kept[0]) == kept[1]",
        "        return kept is not None",
        ("runtime/test_checks.py",),
    ),
    Mutation(
        "settings: what was refused draws other noise",
        "fxmask/settings/passing.py",
        "        draws.restore()\n",
        "",
        ("settings/test_settings.py::test_what_is_refused_in_the_middle_runs_again_with_the_same_noise",),
    ),
    Mutation(
        "settings: a plan is used at every setting",
        "fxmask/settings/key.py",
        "            found[name] = value\n        elif name in SCHEDULES",
        "            pass\n        elif name in SCHEDULES",
        ("settings/test_settings.py::test_the_first_image_of_every_setting_is_the_same",),
    ),
    Mutation(
        "instant: errors of neighbours are added as if they were independent",
        "fxmask/learning/instant/fitting.py",
        "            total = np.cumsum(moved, axis=0)",
        "            total = moved",
        ("learning/test_instant.py",),
    ),
    Mutation(
        "generation: conditioning that is new is not checked",
        "fxmask/runtime/generation.py",
        "        self._clock.vouch(given, chosen.conditioning)\n",
        "",
        ("runtime/test_waits.py",),
    ),
    Mutation(
        "cudagraph: streams do not wait for each other",
        "backends/cudagraph.py",
        "                stream.wait_event(self._done)\n",
        "                pass\n",
        ("backends/test_cudagraph.py",),
    ),
    Mutation(
        "cudagraph: a recording that failed leaves random numbers and pinned memory with it",
        "backends/cudagraph.py",
        "                self._open_pool()\n\n    def _recorded",
        "                pass\n\n    def _recorded",
        ("backends/test_cudagraph.py",),
    ),
    Mutation(
        "buffers: freed before the step that reads them last",
        "passes/assign_buffers.py",
        "        free.extend(of[slot] for slot in step.drop if slot in of)",
        "        free.extend(of[slot] for slot in plan.steps[min(i + 1, len(plan.steps) - 1)].drop if slot in of)",
        ("runtime/test_replay.py",),
    ),
    # Learning
    Mutation(
        "search: instant plans are no candidates",
        "fxmask/learning/search.py",
        "        self._propose_instant(pool, budget)\n",
        "",
        ("learning/test_few_images.py",),
    ),
    Mutation(
        "choice: the best of few images is taken as it is",
        "fxmask/learning/choice.py",
        "alike = [best, *filter(is_as_good, range(len(columns)))]",
        "alike = [best]",
        ("learning/test_choice.py",),
    ),
    Mutation(
        "pipelines: another denoiser's steps can be changed",
        "fxmask/sampling/pipeline_listener.py",
        "return first and self._count == self.num_scheduler_steps",
        "return first",
        ("sampling/test_pipeline_trajectory.py::test_one_of_two_denoisers_cannot_change_its_steps",),
    ),
    Mutation(
        "search: recorded runs may differ",
        "fxmask/learning/search.py",
        "    for n, other in enumerate(trajectories):\n",
        "    for n, other in enumerate(trajectories[:1]):\n",
        ("learning/test_search.py::test_trajectories_must_agree",),
    ),
    Mutation(
        "search: recorded runs may have other numbers of steps",
        "fxmask/learning/search.py",
        "        if other.num_steps != first.num_steps:\n",
        "        if False:\n",
        ("learning/test_search.py::test_trajectories_must_agree",),
    ),
    Mutation(
        "search: recorded runs may have other timesteps",
        "fxmask/learning/search.py",
        "        if other.timesteps != first.timesteps or other.order != first.order:\n",
        "        if other.order != first.order:\n",
        ("learning/test_search.py::test_trajectories_must_agree",),
    ),
    Mutation(
        "search: recorded runs may come from other schedulers",
        "fxmask/learning/search.py",
        "        if difference is not None:\n",
        "        if False:\n",
        ("learning/test_search.py::test_trajectories_must_agree",),
    ),
    Mutation(
        "forms: a lane may change its form",
        "fxmask/learning/forms.py",
        "            if bound.key != first.key:\n",
        "            if False:\n",
        ("learning/test_forms.py",),
    ),
    Mutation(
        "forms: every lane has the first one's",
        "fxmask/learning/student.py",
        "        programs = [self.programs[n][lane] for n in numbers]\n",
        "        programs = [self.programs[n][0] for n in numbers]\n",
        ("learning/test_forms.py",),
    ),
    # Recording
    Mutation(
        "recording: another denoiser's steps belong to the run",
        "fxmask/sampling/pipeline_listener.py",
        "        if self._own:\n",
        "        if True:\n",
        ("sampling/test_pipeline_trajectory.py::test_each_of_two_denoisers_by_itself",),
    ),
]


def install(package: Path) -> None:
    """Copy the library to a folder, as a wheel would hold it."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for name, folder in sorted(folders.items()):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, package.joinpath(*name.split(".")), ignore=ignored, dirs_exist_ok=True)


def python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the copied library."""
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", *arguments]
    options = {"cwd": ROOT / "tests", "env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT}
    return subprocess.run(command, check=False, **options)  # type: ignore[call-overload]


def failing(package: Path, tests: tuple[str, ...]) -> str | None:
    """Name of the first test that fails on the copy as it is now, or ``None``.

    Raises:
        SystemExit: pytest could not run them.
    """
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow"]
    script = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    try:
        result = python(package, script, *options, *(str(ROOT / "tests" / name) for name in tests))
    except subprocess.TimeoutExpired:
        return "they do not end"
    if result.returncode == 0:
        return None
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not failed:
        raise SystemExit(f"pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return failed[0].split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ").removeprefix("tests/")


def run(mutation: Mutation, package: Path, sound: set[str]) -> str | None:
    """Name of the first test that fails because of a mutation, or ``None``.

    Args:
        mutation: to try.
        package: holds the copy.
        sound: tests that are known to pass without mutations; it grows.

    Raises:
        SystemExit: the rule is not where the list says, or the test fails without the mutation, too.
    """
    path = package / mutation.installed
    original = path.read_text()
    if original.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: the rule is not once in {mutation.file}; update the list")
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        caught = failing(package, mutation.tests)
    finally:
        path.write_text(original)
    if caught is not None and "::" in caught and caught not in sound:
        if failing(package, (caught,)) is not None:
            raise SystemExit(f"{mutation.name}: {caught} fails without the mutation, too")
        sound.add(caught)
    return caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the mutations whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if not options.only or options.only in mutation.name]
    if options.list:
        print("\n".join(mutation.name for mutation in chosen))
        return 0
    survivors = 0
    sound: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "package"
        install(package)
        found = python(package, "import fxmask.passes, fxmask.ir; print(fxmask.passes.__file__, fxmask.ir.__file__)")
        places = found.stdout.split()
        copied = len(places) == 2 and all(place.startswith(str(package)) for place in places)
        assert copied, f"the copy is not what is imported: {found.stdout}{found.stderr}"
        for mutation in chosen:
            started = time.perf_counter()
            caught = run(mutation, package, sound)
            survivors += caught is None
            seconds = f"{time.perf_counter() - started:.0f} s"
            print(f"{'SURVIVED' if caught is None else 'caught'}  {mutation.name}  {caught or ''} ({seconds})", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
