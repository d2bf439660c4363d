"""``fxmask evaluate RUN.toml``: images of every configuration from the same noise, and one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch.distributed as dist

from fxmask.learning.ranks import Group
from fxmask.tools.command_line import BACKENDS, Command, Several, as_json, options, printed, said
from fxmask.tools.evaluation.evaluate import Evaluation, published
from fxmask.tools.evaluation.run_file import load_run
from fxmask.tools.evaluation.table import as_text, averaged, latex, markdown

FORMATS = {"markdown": markdown, "json": as_text, "latex": latex}


@click.command("evaluate", cls=Command)
@click.argument("path", metavar="RUN.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options(
    click.option("--folder", type=click.Path(path_type=Path), required=True, help="of images, plans, rows; goes on from there"),
    click.option("--small", is_flag=True, help="what the run file's [small] says"),
    click.option("--images", type=click.IntRange(1), help="per configuration and seed"),
    click.option("--seeds", cls=Several, type=int, default=(0,), show_default=True, help="of the noise"),
    click.option(
        "--only", cls=Several, help="configurations by name; the first, and what one is compared with, are always made"
    ),
    click.option("--format", "form", type=click.Choice(tuple(FORMATS)), default="markdown", show_default=True),
    click.option("--output", type=click.Path(path_type=Path), help="file that the table is written to, too"),
    click.option("--png", is_flag=True, help="keep images as PNG, too; arrays in ADM's layout are always kept"),
    click.option("--recorded", type=click.IntRange(2), default=8, show_default=True, help="images that are learned from"),
    click.option("--backend", type=click.Choice(BACKENDS), default="eager", show_default=True),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1"),
    click.option("--quiet", is_flag=True, help="no bars"),
)
def evaluate_command(path: Path, form: str, output: Path | None, **given: Any) -> None:
    """Sample every configuration of a run file from the same noise, and tabulate quality and cost.

    Under torchrun batches are shared among the ranks. What lies in the folder is not made again.
    """
    run = load_run(path, given["small"])
    changes: dict[str, Any] = {"images": given["images"]} if given["images"] else {}
    if given["only"]:
        wanted = set(given["only"])
        wanted |= {c.against for c in run.configurations if c.name in wanted and c.against}
        changes["configurations"] = tuple(c for k, c in enumerate(run.configurations) if k == 0 or c.name in wanted)
    run = type(run)(**{**vars(run), **changes})
    started = _joined()
    evaluation = Evaluation(
        run,
        given["folder"],
        device=given["device"],
        backend=given["backend"],
        recorded=given["recorded"],
        as_png=given["png"],
        progress=not given["quiet"] and Group.current().rank == 0,
    )
    rows = [averaged(found) for found in evaluation.rows(given["seeds"])]
    if Group.current().rank == 0:
        text = FORMATS[form]([*rows, *published(run)])
        if output is not None:
            output.write_text(text + "\n", encoding="utf-8")
            said(f"table: {output}")
        as_json(rows) if form == "json" else printed(text)
    if started:
        dist.destroy_process_group()


def _joined() -> bool:
    """Join the ranks that torchrun started; whether that was done now."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        return False
    dist.init_process_group("gloo")
    return True
