"""The command ``fxmask``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import click

import fxmask
from fxmask.tools.bench_command import bench_command
from fxmask.tools.break_even import break_even_command
from fxmask.tools.command_line import FINE, WRONG, in_one_line, invoke, quiet_libraries, said
from fxmask.tools.commands.demo import demo_command
from fxmask.tools.commands.evaluate import evaluate_command
from fxmask.tools.commands.inspect import inspect_command, summary_command
from fxmask.tools.commands.learn import learn_command
from fxmask.tools.commands.pareto import pareto_command
from fxmask.tools.commands.run import run_command
from fxmask.tools.commands.show import show_command

COMMANDS = (
    *(demo_command, inspect_command, learn_command, show_command, run_command),
    *(pareto_command, evaluate_command, bench_command, break_even_command, summary_command),
)


class Group(click.Group):
    """Commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in order."""
        return list(self.commands)


@click.group("fxmask", cls=Group, commands={str(command.name): command for command in COMMANDS})
@click.version_option(fxmask.__version__, prog_name="fxmask")
@click.option("--verbose", is_flag=True, help="say what is done on the way")
def command_line(verbose: bool) -> None:
    """A compiler for the sampling loop of diffusion models.

    Exit status: 0 fine, 1 something went wrong and was said, 2 it was asked for wrongly, 130 Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    quiet_libraries()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return invoke(command_line, arguments)


def run() -> int:
    """The same for a shell, where an error that nobody foresaw is a line, too; FXMASK_TRACEBACK=1 shows where it was."""
    try:
        return main()
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
        return FINE
    except Exception as error:
        if os.environ.get("FXMASK_TRACEBACK"):
            raise
        said(f"{in_one_line(error)} (FXMASK_TRACEBACK=1 shows where)")
        return WRONG


if __name__ == "__main__":
    sys.exit(run())
