"""The command ``fxmask``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fxmask.errors import FxmaskError

BENCH = """\
Compare eager, torch.compile and fxmask at several ratios of MACs, with random masks over residual branches.

    fxmask bench examples/studies/speed.py:dit_s --ratios 2 4 --output build/bench

writes bench.md, bench.json and bench.png. MODEL is file.py:function or package.module:function; the function takes nothing
and returns the denoiser, or the denoiser and a dict of the arguments of one call.
"""


def make_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog="fxmask", description="A compiler for the sampling loop of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser(
        "bench", help="measure step graphs", description=BENCH, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_argument("model", metavar="MODEL")
    bench.add_argument("--ratios", nargs="+", type=float, default=[2.0, 4.0], help="ratios of MACs")
    bench.add_argument("--modes", nargs="+", default=["regions", "whole"], help="how step graphs are compiled")
    bench.add_argument("--backends", nargs="+", default=["inductor"], help="inductor, cudagraph")
    bench.add_argument("--steps", type=int, default=20, help="sampling steps")
    bench.add_argument("--repeats", type=int, default=9, help="turns; the medians are reported")
    bench.add_argument("--seed", type=int, default=0, help="of the masks")
    bench.add_argument("--cold", action="store_true", help="also time compilation, in processes of their own")
    bench.add_argument("--kernels", action="store_true", help="also count kernels; compiles everything again")
    bench.add_argument("--output", type=Path, help="folder for the table, JSON and plot")
    summary = commands.add_parser("summary", help="show the blocks of a denoiser")
    summary.add_argument("model", metavar="MODEL")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        return _bench(options) if options.command == "bench" else _summary(options)
    except FxmaskError as error:
        sys.stderr.write(f"fxmask: {error}\n")
        return 2


def _bench(options: argparse.Namespace) -> int:
    from fxmask.tools import bench as benchmark
    from fxmask.tools.bench_report import draw, to_markdown

    model, call = benchmark.load_case(options.model)
    bench = benchmark.Bench(model, call, options.steps, options.seed)
    chosen = benchmark.configurations(options.ratios, options.modes, options.backends)
    rows = bench.measure(chosen, options.repeats)
    if options.cold:
        cold = [v for v in chosen if v.name != benchmark.EAGER]
        benchmark.add_cold(options.model, cold, rows, options.steps, options.seed)
    if options.kernels:
        benchmark.add_kernels(bench, chosen, rows)
    table = to_markdown(rows)
    sys.stdout.write(table + "\n")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "bench.md").write_text(table + "\n", encoding="utf-8")
        (options.output / "bench.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
        draw(rows, f"{type(model).__name__}, {options.steps} steps", options.output / "bench.png")
    return 0


def _summary(options: argparse.Namespace) -> int:
    from fxmask.frontend.capture import capture
    from fxmask.tools.bench import load_case

    model, call = load_case(options.model)
    sys.stdout.write(capture(model, call).summary() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
