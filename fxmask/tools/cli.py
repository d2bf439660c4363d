"""The command ``fxmask``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxmask.errors import FxmaskError
from fxmask.frontend.capture import capture
from fxmask.tools.bench_cases import load_case
from fxmask.tools.bench_command import add_bench, run_bench
from fxmask.tools.break_even import add_break_even, run_break_even


def make_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog="fxmask", description="A compiler for the sampling loop of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_bench(commands)
    add_break_even(commands)
    summary = commands.add_parser("summary", help="show the blocks of a denoiser")
    summary.add_argument("model", metavar="MODEL")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        run = {"bench": run_bench, "break-even": run_break_even, "summary": _summary}[options.command]
        return run(options)
    except FxmaskError as error:
        sys.stderr.write(f"fxmask: {error}\n")
        return 2


def _summary(options: argparse.Namespace) -> int:
    model, call = load_case(options.model)
    sys.stdout.write(capture(model, call).summary() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
