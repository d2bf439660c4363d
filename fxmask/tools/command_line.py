"""What all commands share: options that take several values, where models run, how the command ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from fxmask.errors import FxmaskError, InputError
from fxmask.pictures.canvas import check_path
from fxmask.tools.place import DTYPES

FINE, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130
BACKENDS = ("auto", "inductor", "cudagraph", "eager")
NAMED = (
    "NAME is file.py:function or package.module:function, a folder, or owner/name on the hub, of a pipeline or a denoiser. "
    "A function returns a pipeline, or a pipeline and a list of calls; or a denoiser, a scheduler and a dict of arguments, of "
    "which the last ones may be left out. Modules beside its file can be imported."
)

F = TypeVar("F", bound=Callable[..., Any])


class Several(click.Option):
    """An option that takes one value or more, one after another: ``--ratios 2 4``."""

    def __init__(self, *declarations: Any, **settings: Any) -> None:
        super().__init__(*declarations, **{**settings, "multiple": True})


class Command(click.Command):
    """A command whose options may be ``Several``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The same as ever, with an option before each of its values."""
        names = {name for option in self.params if isinstance(option, Several) for name in option.opts}
        return super().parse_args(ctx, _spread(args, names))


def _spread(arguments: Sequence[str], names: set[str]) -> list[str]:
    """The arguments, with an option of these names before each of its values. Where one is given again, that counts."""
    found: list[str] = []
    current, values = None, 0
    for argument in arguments:
        if argument in names:
            kept = [k for k, x in enumerate(found) if x != argument and (k == 0 or found[k - 1] != argument)]
            found, current, values = [found[k] for k in kept], argument, 0
        elif argument.startswith("-") and not _is_number(argument):
            current = None
        elif current is not None:
            values += 1
            found += [current] if values > 1 else []
        found.append(argument)
    return found


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


class Picture(click.ParamType[Path]):
    """A file that a picture goes to; known to be a kind of picture before any work is done."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The file."""
        try:
            return check_path(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


class Call(click.ParamType[dict[str, Any]]):
    """Arguments of a call, as JSON."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """A dict."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r} must be arguments by name, e.g. \'{{"prompt": "a cat"}}\'', param, ctx)
        return found


# Options that several commands have

PLACE = (
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1"),
    click.option("--dtype", type=click.Choice(tuple(DTYPES)), help="type of the weights; by default their own"),
)
CALLS = (
    click.option(
        "--call", "calls", type=Call(), multiple=True, help='arguments of a call, e.g. \'{"prompt": "a cat"}\'; repeatable'
    ),
    click.option("--prompt", "prompts", multiple=True, help="a call with this prompt; repeatable"),
    click.option("--steps", type=click.IntRange(1), help="num_inference_steps of every call"),
    click.option("--seed", type=int, default=0, show_default=True, help="of the first call; the next ones count on"),
)
OUTCOME = (
    click.option("--speedup", type=float, help="ratio of MACs; 2.0 if nothing is asked for"),
    click.option("--macs", type=float, help="or the share of the MACs to keep"),
    click.option("--max-error", type=float, help="or the largest relative error of the final samples"),
    click.option("--max-graphs", type=int, help="at most so many step graphs; each takes seconds to compile"),
)
BACKEND = click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="eager: compile nothing"
)
AS_JSON = click.option("--json", "json_wanted", is_flag=True, help="print numbers for programs, and nothing else")


def options(*groups: Any) -> Callable[[F], F]:
    """Several options, or groups of them, in the order in which help shows them."""
    flat = [option for group in groups for option in (group if isinstance(group, tuple) else (group,))]

    def add(function: F) -> F:
        for option in reversed(flat):
            function = option(function)
        return function

    return add


# What is printed


def printed(text: str) -> None:
    """A line, or lines, on standard output."""
    click.echo(text)


def said(text: str) -> None:
    """A line for people on standard error, beside what standard output is for."""
    click.echo(text, err=True)


def as_json(content: Any) -> None:
    """Numbers for programs: one line."""
    click.echo(json.dumps(content, default=str))


def console() -> Console:
    """A terminal for tables, as wide as it is; what is no terminal is wide enough for a table."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


# How a command ends


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    happened: bool = False


@contextlib.contextmanager
def noticing_interrupts() -> Iterator[Interruption]:
    """Inside, Ctrl-C is as ever, and noted: learning ends at it and returns the best plan so far."""
    noted = Interruption()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a job in the background of a shell
    if ignored or threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.happened = True
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def invoke(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run a command; returns its exit status. Errors that are nobody's mistake are raised."""
    try:
        result = command.main(args=None if arguments is None else list(arguments), prog_name="fxmask", standalone_mode=False)
        return result if isinstance(result, int) else FINE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        said("fxmask: interrupted")
        return INTERRUPTED
    except FxmaskError as error:
        said(f"fxmask: {error}")
        return USAGE if isinstance(error, InputError) else WRONG


def in_one_line(error: BaseException) -> str:
    """What went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"fxmask: {type(error).__name__}: {lines[0] if lines else 'no message'}"


def quiet_libraries() -> None:
    """Messages of other libraries that say nothing about what was asked for."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")  # read when they are imported
    for name in ("diffusers", "transformers", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
